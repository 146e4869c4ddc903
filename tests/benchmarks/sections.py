"""Sections to measure on: a real one, and Visium HD-like ones of any size."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import stalign as sta

REAL = "crc_visium/CRC_16"
MPP = 0.25  # µm per pixel of a 40× scan
BIN_UM = 8.0
PIECE = 5_000  # bins of one piece of tissue
MOLECULES = 200  # of one bin, about what 8 µm of Visium HD hold


def real_section(data: str | None, *, quick: bool) -> tuple[ad.AnnData, str] | None:
    """The section of 3,106 spots and 36,601 genes; a small synthetic one in its place for a quick run."""
    if quick:
        return sta.datasets.synthetic_visium(n_rows=16, n_cols=16), "a synthetic section"
    file = None if data is None else Path(data) / f"{REAL}.h5ad"
    return None if file is None or not file.is_file() else (ad.read_h5ad(file), REAL)


def bins(n: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Place 8-µm bins in round pieces of tissue all over an image of ``side`` pixels.

    Returns
    -------
    (n, 2) array positions (row, column), and (n, 2) centres (x, y) in pixels.
    """
    per_side = int(side * MPP / BIN_UM)
    n_pieces = max(1, n // PIECE)
    places = int(np.ceil(np.sqrt(n_pieces)))
    spread = (np.stack(np.divmod(np.arange(places**2), places), axis=1) + 0.5) * per_side / places
    centres = spread[np.random.default_rng(0).permutation(places**2)[:n_pieces]]
    cells = np.stack(np.divmod(np.arange(per_side**2), per_side), axis=1)
    distance = np.full(len(cells), np.inf)
    for centre in centres:
        distance = np.minimum(distance, ((cells - centre) ** 2).sum(axis=1))
    array = cells[np.sort(np.argpartition(distance, n - 1)[:n])]
    return array, (array[:, ::-1] + 0.5) * BIN_UM / MPP


def counts(n: int, n_genes: int) -> sp.csr_matrix:
    """(n, n_genes) float32 CSR; four kinds of tissue, each with genes of its own, a few hundred molecules a bin."""
    rng = np.random.default_rng(1)
    abundance = 1 / np.arange(1, n_genes + 1)
    blocks = []
    for rows in np.array_split(np.arange(n), max(1, n // 10_000)):
        order = np.random.default_rng(rows[0] % 4).permutation(n_genes)
        drawn = np.searchsorted(np.cumsum(abundance) / abundance.sum(), rng.random(len(rows) * MOLECULES))
        genes = order[np.minimum(drawn, n_genes - 1)]
        cell = np.repeat(np.arange(len(rows)), MOLECULES)
        ones = np.ones(len(genes), dtype=np.float32)
        blocks.append(sp.coo_matrix((ones, (cell, genes)), shape=(len(rows), n_genes)).tocsr())
    return sp.vstack(blocks, format="csr", dtype=np.float32)


def hd_section(n: int, side: int, *, n_genes: int = 18_000) -> ad.AnnData:
    """Bins with counts and positions; the image is a file of its own."""
    array, xy = bins(n, side)
    genes = sta.models.vocabulary("stalign-mini")[:n_genes]
    obs = pd.DataFrame({"array_row": array[:, 0], "array_col": array[:, 1]}, index=[f"bin_{i}" for i in range(n)])
    section = ad.AnnData(counts(n, len(genes)), obs=obs, var=pd.DataFrame(index=list(genes)))
    section.obsm["spatial"] = xy
    section.uns["spatial"] = {"HD": {"images": {}, "scalefactors": {"bin_size_um": BIN_UM, "microns_per_pixel": MPP}}}
    return section


def lattice(kind: str, n: int) -> ad.AnnData:
    """``n`` bare spots of known scale, "square" (8-µm bins), "hexagonal" (100 µm apart) or "free" (cells)."""
    side = int(np.ceil(np.sqrt(n)))
    row, column = np.divmod(np.arange(n), side)
    obs = pd.DataFrame(index=pd.RangeIndex(n).astype(str))
    factors = {"microns_per_pixel": MPP}
    if kind == "square":
        xy = np.stack([column, row], axis=1) * BIN_UM
        obs["array_row"], obs["array_col"] = row, column
        factors["bin_size_um"] = BIN_UM
    elif kind == "hexagonal":
        xy = np.stack([column + row % 2 / 2, row * np.sqrt(3) / 2], axis=1) * 100.0
        obs["array_row"], obs["array_col"] = row, 2 * column + row % 2
    else:
        xy = np.random.default_rng(0).random((n, 2)) * side * BIN_UM
    section = ad.AnnData(obs=obs)
    section.obsm["spatial"] = xy / MPP
    section.uns["spatial"] = {"S": {"images": {}, "scalefactors": factors}}
    return section
