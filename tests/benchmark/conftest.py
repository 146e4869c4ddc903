from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stalign as sta
from stalign.benchmark import Section

MARKERS = {"tumour": ["ERBB2", "KRT8"], "immune": ["CD3E", "PTPRC"], "stroma": ["COL1A1", "DCN"]}


@pytest.fixture(autouse=True)
def quiet():
    before = sta.settings.progress, sta.settings.verbosity
    sta.settings.progress, sta.settings.verbosity = False, "WARNING"
    yield
    sta.settings.progress, sta.settings.verbosity = before


@pytest.fixture(scope="session")
def mini():
    return sta.models.load("stalign-mini")


def make_slide(seed: int):
    adata = sta.datasets.synthetic_visium(n_rows=14, n_cols=14, seed=seed)
    adata.obs["patient"] = f"patient {seed}"
    return adata


@pytest.fixture(scope="session")
def _slides():
    return [make_slide(seed) for seed in (0, 1)]


@pytest.fixture
def slides(_slides):
    return [adata.copy() for adata in _slides]


@pytest.fixture(scope="session")
def sections(_slides):
    """Two labelled slides of two patients; what is computed of them is kept for all tests."""
    return [Section.of(adata, f"slide {number}", label_key="region") for number, adata in enumerate(_slides)]


@pytest.fixture(scope="session")
def folder(_slides, tmp_path_factory) -> Path:
    """The same two slides as files, and one without image and labels."""
    path = tmp_path_factory.mktemp("data")
    (path / "set").mkdir()
    for number, adata in enumerate(_slides):
        adata.write_h5ad(path / "set" / f"{number}.h5ad")
    bare = _slides[0].copy()
    bare.uns["spatial"]["synthetic_visium"]["images"] = {}
    bare.obs = bare.obs.drop(columns="region")
    # Without an image its scale is that of the array.
    bare.write_h5ad(path / "bare.h5ad")
    return path


@pytest.fixture
def markers():
    return MARKERS


@pytest.fixture
def rng():
    return np.random.default_rng(0)
