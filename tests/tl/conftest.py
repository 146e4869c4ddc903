from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, concat
from scipy import sparse

import stalign as sta
from stalign import models

MARKERS = {
    "tumour": ["ERBB2", "EPCAM", "KRT8", "KRT18", "KRT19", "CDH1", "MUC1", "CLDN4"],
    "immune": ["CD3E", "CD3D", "PTPRC", "MS4A1", "CD79A", "CD2", "TRAC", "CCL5"],
    "stroma": ["COL1A1", "COL1A2", "COL3A1", "DCN", "LUM", "VIM", "ACTA2", "FAP"],
}
N_GENES = 240
PITCH_PX = 20.0  # 100 µm at 5 µm per pixel
COLOURS = {"tumour": (120, 40, 140), "immune": (40, 60, 170), "stroma": (230, 150, 180)}


def _vocabulary() -> tuple[str, ...]:
    named = [gene for genes in MARKERS.values() for gene in genes]
    others = [gene for gene in sta.genes.protein_coding_genes()[::50] if gene not in named]
    return tuple(sorted([*named, *others[: N_GENES - len(named)]]))


@pytest.fixture(scope="session")
def genes() -> tuple[str, ...]:
    return _vocabulary()


@pytest.fixture(scope="session")
def markers() -> dict[str, list[str]]:
    return {label: list(genes) for label, genes in MARKERS.items()}


@pytest.fixture(scope="session")
def make_tiny(genes) -> Callable[..., models.STAlign]:
    """The bundled model's architecture, small and untrained; the same seed gives the same weights."""
    image = {
        "encoder": "colour-cnn",
        "args": {"model": "resnet10t", "model_args": {"channels": [8, 8, 8, 8], "stem_width": 4}},
    }
    gene = {"args": {"dim": 64, "hidden": 16, "n_components": 8}}
    changes = {
        "name": "tiny",
        "n_neighbors": 6,
        "spot_patch": {"um": 80.0, "pixels": 16},
        "niche_patch": {"um": 240.0, "pixels": 16},
        "spot_image": image,
        "niche_image": image,
        "spot_gene": gene,
        "niche_gene": gene,
        "n_tokens": 2,
        "width": 32,
        "fusion": {"heads": 2, "head_dim": 8, "hidden": 8},
        "heads": {"hidden": 16, "out": 64},
        "prediction": {"n_genes": 30},
    }

    def make(seed: int = 0, **more: object) -> models.STAlign:
        torch.manual_seed(seed)
        model = models.STAlign(models.config("mini").updated(changes).updated(more), genes).eval()
        if model.prediction is not None:
            model.prediction.gene_index.copy_(torch.arange(30) * 8)  # every eighth gene of the vocabulary
            model.prediction.mean.copy_(torch.linspace(0, 2, 30))
            model.prediction.sd.copy_(torch.linspace(0.1, 1, 30))
        return model

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny) -> models.STAlign:
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    """The same model on disk, so that later calls find it by what ``uns`` says."""
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


def planted(library: str = "S1", *, seed: int = 0, n_rows: int = 10, n_cols: int = 12) -> AnnData:
    """A Visium-like section of three vertical bands, each with a colour and eight marker genes of its own.

    ``obs["truth"]`` names the bands. The section is wider than high, and its bands run along x: swapping axes shows.
    """
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(n_rows), n_cols)
    cols = np.tile(2 * np.arange(n_cols), n_rows) + rows % 2
    xy = np.column_stack([cols * PITCH_PX / 2, rows * PITCH_PX * np.sqrt(3) / 2]) + 2 * PITCH_PX
    width, height = (xy.max(axis=0) + 2 * PITCH_PX).astype(int)
    labels = list(MARKERS)
    borders = 2 * PITCH_PX + np.array([1, 2]) / 3 * (xy[:, 0].max() - 2 * PITCH_PX)
    band = np.digitize(xy[:, 0], borders)

    image = np.empty((height, width, 3), dtype=np.float64)
    image[:] = np.array([COLOURS[label] for label in labels])[np.digitize(np.arange(width), borders)][None]
    image += rng.normal(0, 15, image.shape)

    vocabulary = _vocabulary()
    rate = np.tile(rng.gamma(2.0, 1.0, len(vocabulary)), (len(xy), 1))
    for number, label in enumerate(labels):
        columns = [vocabulary.index(gene) for gene in MARKERS[label]]
        rate[np.ix_(band == number, columns)] *= 8
    counts = rng.poisson(rate).astype(np.float32)

    obs = pd.DataFrame(
        {
            "array_row": rows,
            "array_col": cols,
            "truth": pd.Categorical.from_codes(band, categories=labels),
            "library": library,
        },
        index=[f"{library}_{number}" for number in range(len(xy))],
    )
    adata = AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(vocabulary)))
    adata.obsm["spatial"] = xy
    adata.uns["spatial"] = {
        library: {
            "images": {"hires": image.clip(0, 255).astype(np.uint8)},
            "scalefactors": {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 13.0},
        }
    }
    return adata


@pytest.fixture(scope="session")
def make_planted() -> Callable[..., AnnData]:
    return planted


@pytest.fixture
def slide() -> AnnData:
    return planted()


@pytest.fixture
def two_libraries() -> AnnData:
    """Sections A (120 spots) and B (63 spots), rows mixed."""
    parts = [planted("A", seed=1), planted("B", seed=2, n_rows=7, n_cols=9)]
    both = concat(parts)
    both.uns["spatial"] = {name: part.uns["spatial"][name] for name, part in zip("AB", parts, strict=True)}
    return both[np.random.default_rng(0).permutation(both.n_obs)].copy()


@pytest.fixture(scope="session")
def _embedded(tiny_folder) -> AnnData:
    adata = planted()
    sta.tl.embed(adata, model=tiny_folder, progress=False)
    return adata


@pytest.fixture
def embedded(_embedded) -> AnnData:
    """The planted section after ``tl.embed`` with the small model on disk."""
    return _embedded.copy()


@pytest.fixture(scope="session")
def same() -> Callable[..., None]:
    """Compare all embeddings of two AnnData: the same slots, the same values."""

    def compare(a: AnnData, b: AnnData, *, atol: float = 1e-5, key: str = "X_stalign") -> None:
        names = sorted(name for name in a.obsm if name.startswith(key))
        assert names
        assert names == sorted(name for name in b.obsm if name.startswith(key))
        for name in names:
            np.testing.assert_allclose(a.obsm[name], b.obsm[name], rtol=0, atol=atol, err_msg=name)

    return compare
