from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from stalign.pp import extract_niches
from stalign.slide import _neighbours
from stalign.slide._grid import Grid, find_grid, shell_radius
from stalign.slide._neighbours import niche_neighbours

GEOMETRY = {"n_neighbors": 18, "spot_um": 100.0, "niche_um": 400.0}


def niche(adata: AnnData, spot: int) -> set[int]:
    graph = adata.obsp["niche_connectivities"]
    return set(graph.indices[graph.indptr[spot] : graph.indptr[spot + 1]].tolist())


def check_graph(adata: AnnData) -> None:
    graph = adata.obsp["niche_connectivities"]
    assert graph.format == "csr"
    assert graph.dtype == np.float32
    assert (graph.data == 1).all()
    assert (graph.diagonal() == 1).all()
    assert graph.has_sorted_indices
    np.testing.assert_array_equal(adata.obs["niche_n_spots"], np.diff(graph.indptr))


@pytest.mark.parametrize(
    ("kind", "n", "low", "high"),
    [
        ("hexagonal", 1, 1, np.sqrt(3)),
        ("hexagonal", 6, 1, np.sqrt(3)),
        ("hexagonal", 7, np.sqrt(3), 2),
        ("hexagonal", 18, 2, np.sqrt(7)),
        ("hexagonal", 19, np.sqrt(7), 3),
        ("square", 4, 1, np.sqrt(2)),
        ("square", 8, np.sqrt(2), 2),
        ("square", 9, 2, np.sqrt(5)),
        ("square", 18, np.sqrt(5), np.sqrt(8)),
    ],
)
def test_shells(kind, n, low, high):
    assert shell_radius(kind, n) == pytest.approx((low + high) / 2)


def test_hexagonal_niche(hexagonal):
    extract_niches(hexagonal, n_neighbors=6, spot_um=100, niche_um=300)
    check_graph(hexagonal)
    # Row 4, position 4 of 9 × 9: left and right, and two in each row above and below (even rows: the left ones).
    assert niche(hexagonal, 40) == {40, 39, 41, 30, 31, 48, 49}
    assert niche(hexagonal, 0) == {0, 1, 9}  # a corner
    extract_niches(hexagonal, **GEOMETRY)
    assert hexagonal.obs["niche_n_spots"].iloc[40] == 19
    assert hexagonal.uns["stalign"]["niche"]["libraries"]["S1"]["grid"] == "hexagonal"


def test_square_niche(section_maker):
    row, col = (a.ravel() for a in np.mgrid[:7, :7])
    adata = section_maker(row, col, np.column_stack([col, row]) * 250.0 + 300)
    extract_niches(adata, **{**GEOMETRY, "n_neighbors": 4})
    assert niche(adata, 24) == {24, 17, 31, 23, 25}
    extract_niches(adata, **{**GEOMETRY, "n_neighbors": 8})
    assert niche(adata, 24) == {16, 17, 18, 23, 24, 25, 30, 31, 32}
    extract_niches(adata, **GEOMETRY)
    check_graph(adata)
    assert adata.obs["niche_n_spots"].iloc[24] == 21
    assert adata.uns["stalign"]["niche"]["libraries"]["S1"]["grid"] == "square"


def test_free_niche(section_maker):
    xy = np.array([[0, 0], [1, 0], [3, 0], [7, 0], [15, 0.0]])
    adata = section_maker(np.zeros(5), np.zeros(5), xy)
    extract_niches(adata, **{**GEOMETRY, "n_neighbors": 2})
    check_graph(adata)
    assert niche(adata, 0) == {0, 1, 2}
    assert niche(adata, 4) == {4, 3, 2}
    assert (adata.obs["niche_n_spots"] == 3).all()
    extract_niches(adata, **{**GEOMETRY, "n_neighbors": 50})  # more than there are
    assert (adata.obs["niche_n_spots"] == 5).all()


def test_one_spot(section_maker):
    adata = section_maker(np.zeros(1), np.zeros(1), np.array([[5.0, 5.0]]))
    extract_niches(adata, **GEOMETRY)
    check_graph(adata)


def test_grid_from_coordinates_alone(hexagonal):
    del hexagonal.obs["array_row"]
    xy = hexagonal.obsm["spatial"] + np.random.default_rng(0).normal(0, 2, (81, 2))
    grid = find_grid(hexagonal.obs, xy)
    assert grid.kind == "hexagonal"
    assert not grid.from_array
    assert grid.pitch_px == pytest.approx(200, rel=0.01)
    row, col = (a.ravel() for a in np.mgrid[:9, :9])
    assert find_grid(pd.DataFrame(index=range(81)), np.column_stack([col, row]) * 30.0).kind == "square"
    scattered = np.random.default_rng(0).uniform(0, 1000, (500, 2))
    assert find_grid(pd.DataFrame(index=range(500)), scattered).kind == "free"


def test_array_positions_that_do_not_fit_are_not_used(hexagonal):
    shuffled = np.random.default_rng(0).permutation(81)
    hexagonal.obs["array_row"] = hexagonal.obs["array_row"].to_numpy()[shuffled]
    grid = find_grid(hexagonal.obs, hexagonal.obsm["spatial"])
    assert grid.kind == "hexagonal"
    assert not grid.from_array


def test_holes_keep_the_reach(hexagonal):
    """Half of the spots are missing: a niche has fewer, it does not reach further."""
    full = hexagonal.copy()
    extract_niches(full, **GEOMETRY)
    kept = np.sort(np.random.default_rng(0).choice(81, 40, replace=False))
    part = hexagonal[kept].copy()
    extract_niches(part, **GEOMETRY)
    expected = full.obsp["niche_connectivities"][kept][:, kept]
    assert (part.obsp["niche_connectivities"] != expected).nnz == 0
    entry = part.uns["stalign"]["niche"]["libraries"]["S1"]
    assert entry["mpp"] == pytest.approx(0.5)


def test_libraries_never_mix(section_maker, hexagon_array):
    rows, cols, um = hexagon_array(7, 7)
    first = section_maker(rows, cols, um * 2, spot_diameter=130.0, library="A")
    second = section_maker(rows, cols, um * 4, spot_diameter=260.0, library="B")
    spatial = {**first.uns["spatial"], **second.uns["spatial"]}
    both = ad.concat({"A": first, "B": second}, label="sample")
    both.uns["spatial"] = spatial
    mixed = both[np.random.default_rng(0).permutation(98)].copy()
    extract_niches(mixed, library_key="sample", **GEOMETRY)
    check_graph(mixed)
    graph = mixed.obsp["niche_connectivities"].tocoo()
    sample = mixed.obs["sample"].to_numpy()
    assert (sample[graph.row] == sample[graph.col]).all()
    entries = mixed.uns["stalign"]["niche"]["libraries"]
    assert entries["A"]["mpp"] == pytest.approx(0.5)
    assert entries["B"]["mpp"] == pytest.approx(0.25)
    extract_niches(first, **GEOMETRY)
    back = mixed[first.obs_names].obsp["niche_connectivities"]
    assert (back != first.obsp["niche_connectivities"]).nnz == 0


def test_large_square_grid_is_lean():
    """100,000 bins; a million must take less than a minute and 2 GB."""
    side = 316
    row, col = (a.ravel() for a in np.mgrid[:side, :side])
    adata = AnnData(obs=pd.DataFrame({"array_row": row, "array_col": col}, index=np.arange(side**2).astype(str)))
    adata.obsm["spatial"] = np.column_stack([col, row]) * 8.0
    adata.uns["spatial"] = {"HD": {"images": {}, "scalefactors": {"bin_size_um": 2.0}}}
    extract_niches(adata[:100].copy(), **GEOMETRY)  # imports
    started = time.perf_counter()
    extract_niches(adata, **GEOMETRY)
    assert time.perf_counter() - started < 6
    tracemalloc.start()
    extract_niches(adata, **GEOMETRY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    assert adata.uns["stalign"]["niche"]["libraries"]["HD"]["mpp"] == pytest.approx(0.25)


# --- against squidpy, whose graphs these are ---------------------------------------------------------------------


def of_squidpy(positions: np.ndarray, **how: float) -> set[tuple[int, int]]:
    sq = pytest.importorskip("squidpy")
    bare = AnnData(obsm={"spatial": positions})
    if hasattr(sq.gr, "spatial_neighbors_radius"):
        function = sq.gr.spatial_neighbors_radius if "radius" in how else sq.gr.spatial_neighbors_knn
        graph = function(bare, set_diag=True, copy=True, **how)[0]
    else:
        graph = sq.gr.spatial_neighbors(bare, coord_type="generic", set_diag=True, copy=True, **how)[0]
    return set(zip(*map(np.ndarray.tolist, graph.nonzero()), strict=True))


def pairs(graph) -> set[tuple[int, int]]:
    return set(zip(*map(np.ndarray.tolist, graph.nonzero()), strict=True))


def a_grid(kind: str, *, holes: bool, from_array: bool, seed: int = 0) -> Grid:
    rng = np.random.default_rng(seed)
    row, column = np.divmod(np.arange(30 * 23), 23)
    unit = np.array([0.5, np.sqrt(3) / 2]) if kind == "hexagonal" else np.ones(2)
    places = np.column_stack([2 * column + row % 2 if kind == "hexagonal" else column, row + 2]) * unit
    places = places[rng.random(len(places)) < 0.7] if holes else places
    positions = places[rng.permutation(len(places))]
    if not from_array:
        positions = positions + rng.normal(0, 0.02, positions.shape)
    return Grid(kind, positions, 1.0, from_array=from_array)


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("from_array", [False, True])
@pytest.mark.parametrize("n_neighbors", [4, 18, 60])
def test_grids_are_squidpys(monkeypatch, kind, holes, from_array, n_neighbors):
    monkeypatch.setattr(_neighbours, "_BLOCK", 64)
    grid = a_grid(kind, holes=holes, from_array=from_array)
    graph = niche_neighbours(grid, n_neighbors)
    assert pairs(graph) == of_squidpy(grid.positions, radius=shell_radius(kind, n_neighbors))
    assert graph.has_sorted_indices
    assert (graph.indices.dtype, graph.data.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("n_neighbors", [1, 6, 18])
def test_nearest_are_squidpys(monkeypatch, n_neighbors):
    monkeypatch.setattr(_neighbours, "_BLOCK", 64)
    positions = np.random.default_rng(0).random((300, 2)) * 100
    grid = Grid("free", positions, float("nan"))
    assert pairs(niche_neighbours(grid, n_neighbors)) == of_squidpy(positions, n_neighs=n_neighbors)


def test_places_taken_twice_and_places_far_apart():
    """Where a table of places would be wrong, or larger than the slide, the tree is asked."""
    grid = a_grid("square", holes=False, from_array=True)
    twice = replace(grid, positions=np.concatenate([grid.positions, grid.positions[:3]]))
    assert pairs(niche_neighbours(twice, 4)) == of_squidpy(twice.positions, radius=shell_radius("square", 4))
    far = replace(grid, positions=np.concatenate([grid.positions, [[1e6, 1e6]]]))
    graph = niche_neighbours(far, 4)
    assert graph.shape[0] == len(far.positions)
    assert graph[-1].indices.tolist() == [len(far.positions) - 1]


def test_many_spots_on_one_point_keep_themselves():
    positions = np.concatenate([np.zeros((9, 2)), np.random.default_rng(0).random((5, 2))])
    graph = niche_neighbours(Grid("free", positions, float("nan")), 3)
    assert (graph.diagonal() == 1).all()
    assert (np.diff(graph.indptr) == 4).all()


def test_one_spot_is_its_own_niche():
    for kind in ("free", "square"):
        assert niche_neighbours(Grid(kind, np.zeros((1, 2)), 1.0), 6).toarray().tolist() == [[1.0]]


def test_a_crowd_denser_than_a_grid():
    """More spots within the radius than a full grid has: none is left out."""
    positions = np.random.default_rng(0).random((400, 2)) * 3
    grid = Grid("square", positions, 1.0)
    assert pairs(niche_neighbours(grid, 4)) == of_squidpy(positions, radius=shell_radius("square", 4))
