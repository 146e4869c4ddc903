"""A generated Visium section with known regions, for examples and tests."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from stalign._keys import Key
from stalign._validate import check_positive

if TYPE_CHECKING:
    from anndata import AnnData

LIBRARY = "synthetic_visium"

_PITCH_UM = 100.0
_CAPTURE_UM = 55.0
_MPP = 0.5
_MARGIN_UM = 250.0
_LOWRES_SIDE = 600
_DEPTH = 5500.0
_RELATIVE_DEPTH = {"tumour": 1.5, "immune": 1.1, "stroma": 0.7, "adipose": 0.3, "normal epithelium": 0.95}
_COLORS = {
    "tumour": "#8c2d9b",
    "immune": "#2b4fa8",
    "stroma": "#e88fb4",
    "adipose": "#f2d16b",
    "normal epithelium": "#3c9d6e",
}


def synthetic_visium(*, n_rows: int = 40, n_cols: int = 38, seed: int = 0) -> AnnData:
    """Generate a Visium section of a breast tumour: counts, H&E image and the truth.

    The tissue has fat, stroma with lobules of normal glands, an immune front with follicles and a tumour in nests.
    The image is drawn, the counts are sampled; nothing comes from a patient. The same seed gives the same section.

    Parameters
    ----------
    n_rows, n_cols
        Rows of the hexagonal array, and spots in a row, 100 µm apart; the tissue covers about four fifths of them.
    seed
        Another seed gives another section with the same kinds of tissue.

    Returns
    -------
    AnnData of the spots under tissue, about 1,200 × 800, with

    - ``X``: counts, CSR float32 of integers; ``var_names`` are real human gene symbols, ``var["gene_ids"]`` Ensembl
    - ``var["programme"]``: the region whose marker a gene is, or ``"background"``
    - ``obs["array_row"]``, ``obs["array_col"]``, ``obs["in_tissue"]`` as Space Ranger writes them
    - ``obs["region"]``: the true region of a spot (categorical)
    - ``obsm["spatial"]``: float64 (x, y) in full-resolution pixels of 0.5 µm
    - ``obsm["region_fraction"]``: (n, 5) float32, share of each region under the spot, in the order of the categories
    - ``uns["spatial"]["synthetic_visium"]``: ``hires`` and ``lowres`` images and scale factors
    - ``uns["synthetic"]``: ``True``

    Raises
    ------
    ValueError
        If the array has fewer than 4 rows or columns.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> list(adata.obs["region"].cat.categories)
    ['tumour', 'immune', 'stroma', 'adipose', 'normal epithelium']
    """
    from anndata import AnnData

    from stalign.datasets._histology import REGIONS, UM_PER_PIXEL, draw_section

    n_rows, n_cols = check_positive("n_rows", n_rows, integer=True), check_positive("n_cols", n_cols, integer=True)
    if min(n_rows, n_cols) < 4:
        raise ValueError(f"The array must have at least 4 rows and 4 columns, got n_rows={n_rows}, n_cols={n_cols}.")
    rng = np.random.default_rng(seed)
    rows, columns, positions_um = _array(n_rows, n_cols)
    width_um, height_um = positions_um.max(axis=0) + _MARGIN_UM
    section = draw_section(width_um, height_um, _MARGIN_UM, rng)
    share = _under_spots(section.regions, positions_um / UM_PER_PIXEL, _CAPTURE_UM / UM_PER_PIXEL, len(REGIONS))
    tissue = share.sum(axis=1) >= 0.5
    share = share[tissue] / share[tissue].sum(axis=1, keepdims=True)
    genes = _genes()
    counts = _counts(share, genes["programme"].to_numpy(), REGIONS, rng)

    obs = pd.DataFrame(
        {
            "in_tissue": np.ones(int(tissue.sum()), dtype=np.int64),
            Key.obs.ARRAY_ROW: rows[tissue],
            Key.obs.ARRAY_COL: columns[tissue],
            "region": pd.Categorical(np.array(REGIONS)[share.argmax(axis=1)], categories=list(REGIONS)),
        },
        index=_barcodes(np.flatnonzero(tissue)),
    )
    adata = AnnData(counts, obs=obs, var=genes)
    adata.obsm[Key.obsm.SPATIAL] = positions_um[tissue] / _MPP
    adata.obsm["region_fraction"] = share.astype(np.float32)
    adata.uns["synthetic"] = True
    adata.uns["region_colors"] = [_COLORS[region] for region in REGIONS]
    adata.uns[Key.uns.SPATIAL] = {LIBRARY: _spatial_entry(section.image, UM_PER_PIXEL)}
    return adata


def _array(n_rows: int, n_cols: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Space Ranger's hexagonal array: ``array_col`` counts half-pitches, odd rows hold odd numbers; centres in µm."""
    rows = np.repeat(np.arange(n_rows), n_cols)
    columns = np.tile(2 * np.arange(n_cols), n_rows) + rows % 2
    x = columns * _PITCH_UM / 2 + _MARGIN_UM
    y = rows * _PITCH_UM * np.sqrt(3) / 2 + _MARGIN_UM
    return rows, columns, np.column_stack([x, y])


def _under_spots(regions: np.ndarray, centers: np.ndarray, diameter: float, n_regions: int) -> np.ndarray:
    """(n, n_regions) share of the spot's disc that each region covers."""
    reach = int(np.ceil(diameter / 2))
    step = np.arange(-reach, reach + 1)
    dx, dy = (axis.ravel() for axis in np.meshgrid(step, step))
    disc = np.hypot(dx, dy) <= diameter / 2
    columns = np.rint(centers[:, :1]).astype(np.intp) + dx[disc]
    rows = np.rint(centers[:, 1:]).astype(np.intp) + dy[disc]
    under = regions[rows.clip(0, regions.shape[0] - 1), columns.clip(0, regions.shape[1] - 1)]
    return np.stack([(under == region).mean(axis=1) for region in range(n_regions)], axis=1)


def _genes() -> pd.DataFrame:
    """Symbols, Ensembl identifiers and programmes (symbols: HGNC, CC0)."""
    table = files("stalign.datasets").joinpath("_data", "genes.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in table.splitlines()[1:]]
    symbols, ensembl, programmes = zip(*lines, strict=True)
    return pd.DataFrame({"gene_ids": list(ensembl), "programme": list(programmes)}, index=list(symbols))


def _counts(
    share: np.ndarray, programmes: np.ndarray, regions: tuple[str, ...], rng: np.random.Generator
) -> csr_matrix:
    """Negative binomial counts around a mixture of the regions' profiles.

    A marker is high in its own region and low, but not silent, elsewhere; background genes differ a little by region.
    """
    n_genes = len(programmes)
    background = programmes == "background"
    base = np.where(background, rng.lognormal(0.0, 1.1, n_genes), rng.lognormal(-1.2, 0.5, n_genes))
    profiles = base * np.exp(rng.normal(0, 0.2, (len(regions), n_genes)))
    for row, region in zip(profiles, regions, strict=True):
        markers = programmes == region
        row[markers] *= rng.lognormal(2.8, 0.45, int(markers.sum()))
    profiles /= profiles.sum(axis=1, keepdims=True)
    depth = _DEPTH * np.array([_RELATIVE_DEPTH[region] for region in regions])
    mean = (share * depth) @ profiles * rng.lognormal(0, 0.28, (len(share), 1))
    overdispersed = rng.gamma(6.0, mean / 6.0)
    return csr_matrix(rng.poisson(overdispersed).astype(np.float32))


def _barcodes(numbers: np.ndarray) -> list[str]:
    """Spell numbers as 16 bases; multiplying by an odd constant spreads them over the 4¹⁶ words without repeats."""
    words = (numbers.astype(np.uint64) * np.uint64(2_654_435_761) + np.uint64(1)) % np.uint64(2**32)
    digits = (words[:, None] >> (np.uint64(2) * np.arange(16, dtype=np.uint64))) & np.uint64(3)
    letters = np.array(list("ACGT"))[digits.astype(np.intp)]
    return ["".join(word) + "-1" for word in letters]


def _spatial_entry(image: np.ndarray, um_per_pixel: float) -> dict[str, object]:
    from PIL import Image

    scale = _MPP / um_per_pixel
    shrink = min(1.0, _LOWRES_SIDE / max(image.shape[:2]))
    height, width = (round(side * shrink) for side in image.shape[:2])
    lowres = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    return {
        "images": {"hires": image, "lowres": lowres},
        "scalefactors": {
            "tissue_hires_scalef": scale,
            "tissue_lowres_scalef": scale * shrink,
            # As Space Ranger: a theoretical spot of 65 µm; fiducial markers of 105 µm.
            "spot_diameter_fullres": 65.0 / _MPP,
            "fiducial_diameter_fullres": 105.0 / _MPP,
        },
        "metadata": {"chemistry_description": "generated by stalign.datasets.synthetic_visium"},
    }
