from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from scipy.sparse import csr_matrix, issparse

mpl.use("Agg")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference fixtures and real data that stands beside the repository."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared with reference fixtures and data")
    return folder


@pytest.fixture(scope="session")
def real_section(shared: Path) -> Callable[[str], AnnData]:
    """Loader of a real section, ``real_section("her2st/A1")``; each call gives an object of its own."""
    cache: dict[str, AnnData] = {}

    def load(name: str) -> AnnData:
        file = shared / "data" / f"{name}.h5ad"
        if not file.is_file():
            pytest.skip(f"needs the section {name}")
        if name not in cache:
            cache[name] = read_h5ad(file)
        return cache[name].copy()

    return load


def make_section(
    rows: np.ndarray,
    cols: np.ndarray,
    xy: np.ndarray,
    *,
    image: np.ndarray | None = None,
    scalef: float = 1.0,
    spot_diameter: float | None = None,
    library: str = "S1",
) -> AnnData:
    """Hand-drawn section with four genes; spot i has counts (i, 1, 0, 2)."""
    n = len(xy)
    counts = np.stack([np.arange(n), np.ones(n), np.zeros(n), np.full(n, 2)], axis=1).astype(np.float32)
    adata = AnnData(
        csr_matrix(counts),
        obs=pd.DataFrame({"array_row": rows, "array_col": cols}, index=[f"{library}_{i}" for i in range(n)]),
        var=pd.DataFrame(index=["ERBB2", "CD3E", "COL1A1", "EPCAM"]),
    )
    adata.obsm["spatial"] = np.asarray(xy, dtype=np.float64)
    factors: dict[str, float] = {}
    if spot_diameter is not None:
        factors["spot_diameter_fullres"] = spot_diameter
    if image is not None:
        factors["tissue_hires_scalef"] = scalef
    adata.uns["spatial"] = {library: {"images": {} if image is None else {"hires": image}, "scalefactors": factors}}
    return adata


def hexagon(n_rows: int = 9, n_cols: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and centres in µm of a Visium-like array."""
    rows = np.repeat(np.arange(n_rows), n_cols)
    cols = np.tile(2 * np.arange(n_cols), n_rows) + rows % 2
    return rows, cols, np.column_stack([cols * 50.0, rows * 50.0 * np.sqrt(3)])


@pytest.fixture
def hexagonal() -> AnnData:
    """81 spots, 0.5 µm per pixel, image of 1/4 size with room around; red inside x < 400 full-resolution pixels."""
    rows, cols, um = hexagon()
    image = np.full((480, 520, 3), 240, dtype=np.uint8)
    image[:, :100] = (200, 30, 30)
    return make_section(rows, cols, um / 0.5 + 100.0, image=image, scalef=0.25, spot_diameter=130.0)


@pytest.fixture
def section_maker() -> Callable[..., AnnData]:
    return make_section


@pytest.fixture
def hexagon_array() -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return hexagon


def _freeze(value: Any) -> Any:
    if issparse(value):
        value = value.tocsr()
        return ("sparse", value.shape, value.data.tobytes(), value.indices.tobytes(), value.indptr.tobytes())
    if isinstance(value, np.ndarray):
        return ("array", value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, pd.DataFrame):
        columns = tuple((str(c), _freeze(value[c].to_numpy())) for c in value.columns)
        return ("frame", tuple(value.index), columns, tuple(map(str, value.dtypes)))
    if hasattr(value, "items"):
        return tuple((str(key), _freeze(item)) for key, item in value.items())
    return repr(value)


@pytest.fixture
def snapshot() -> Callable[[AnnData], Any]:
    """Everything an AnnData holds, comparable: to check that a failing call changed nothing."""

    def take(adata: AnnData) -> Any:
        parts = ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns")
        return (adata.shape, _freeze(adata.X), *[_freeze(getattr(adata, part)) for part in parts])

    return take
