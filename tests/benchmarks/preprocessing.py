"""Niches without a loop: against subsetting an AnnData for every spot, and for a million spots."""

from __future__ import annotations

from typing import NamedTuple

import anndata as ad
import numpy as np
import scipy.sparse as sp
from scipy.spatial import KDTree

import stalign as sta
from stalign import models
from tests.benchmarks.measure import alternate, isolated, peak_rss, seconds
from tests.benchmarks.rows import Row, at_least, at_most, left_open
from tests.benchmarks.sections import lattice, real_section

KINDS = ("square", "hexagonal", "free")


class Niches(NamedTuple):
    """Members and share of the patch on the image of every niche, and its mean expression."""

    members: sp.csr_matrix
    in_image: np.ndarray
    mean: sp.csr_matrix | None


class Setting(NamedTuple):
    """What both sides are told: radius of a niche and side of its patch in pixels, extent of the image in pixels."""

    radius: float
    side: float
    extent: np.ndarray


def setting_of(adata: ad.AnnData) -> Setting:
    """Take the physical scale as it is known; the loop need not find it out."""
    from stalign.slide._grid import find_grid, shell_radius

    done = adata.copy()
    sta.pp.extract_niches(done)
    (library,) = done.uns["stalign"]["niche"]["libraries"].values()
    geometry = models.geometry("stalign-mini")
    grid = find_grid(adata.obs, adata.obsm["spatial"])
    extent = np.array([library["image_width"], library["image_height"]]) / library["image_scale"]
    radius = shell_radius(grid.kind, geometry.n_neighbors) * grid.pitch_px
    return Setting(radius, geometry.niche_um / library["mpp"], extent)


def spot_by_spot(adata: ad.AnnData, setting: Setting, *, expression: bool) -> Niches:
    """The loop: for every spot an AnnData of its niche, of which mean and patch are taken."""
    tree = KDTree(adata.obsm["spatial"])
    members, shares, means = [], [], []
    for spot in range(adata.n_obs):
        index = np.sort(tree.query_ball_point(adata.obsm["spatial"][spot], setting.radius))
        niche = adata[index]
        centre = adata.obsm["spatial"][spot]
        low, high = centre - setting.side / 2, centre + setting.side / 2
        inside = np.clip(np.minimum(high, setting.extent) - np.maximum(low, 0), 0, None)
        shares.append(inside.prod() / setting.side**2)
        members.append([niche.obsm["spatial"].shape[0], index])
        if expression:
            means.append(sp.csr_matrix(niche.X.mean(axis=0), dtype=np.float32))
    lengths = np.array([length for length, _ in members])
    indices = np.concatenate([index for _, index in members])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    graph = sp.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=(adata.n_obs,) * 2)
    return Niches(graph, np.array(shares), sp.vstack(means, format="csr") if expression else None)


def at_once(adata: ad.AnnData, *, expression: bool) -> Niches:
    """The same with the package."""
    sta.pp.extract_niches(adata)
    graph = adata.obsp["niche_connectivities"]
    mean = sta.genes.niche_mean(sta.genes.row_normalise(graph), adata.X) if expression else None
    return Niches(graph, adata.obs["niche_in_image"].to_numpy(), mean)


def check_equal(ours: Niches, theirs: Niches) -> None:
    if (ours.members != theirs.members).nnz:
        raise AssertionError("the niches differ")
    np.testing.assert_allclose(ours.in_image, theirs.in_image, atol=1e-4)
    if ours.mean is not None and theirs.mean is not None:
        difference = abs(ours.mean - theirs.mean)
        if difference.nnz and difference.max() > 1e-5 * max(1.0, theirs.mean.max()):
            raise AssertionError(f"the niche means differ by {difference.max()}")


def preprocessing(data: str | None, *, quick: bool) -> list[Row]:
    what = "niche graph, patch geometry and niche means of all genes against an AnnData per spot"
    without = "the same without the expression"
    found = real_section(data, quick=quick)
    if found is None:
        return [left_open(what, "≥ 10 ×", "needs --data"), left_open(without, "≥ 200 ×", "needs --data")]
    adata, name = found
    bare = ad.AnnData(obs=adata.obs, obsm={"spatial": adata.obsm["spatial"]}, uns=adata.uns)
    setting = setting_of(adata)
    rows = []
    for title, expression, factor in ((what, True, 10), (without, False, 200)):
        source = adata if expression else bare
        check_equal(
            at_once(source.copy(), expression=expression),
            spot_by_spot(adata, setting, expression=expression),
        )
        times = alternate(
            {
                "loop": lambda: seconds(lambda: spot_by_spot(adata, setting, expression=expression)),  # noqa: B023
                "ours": lambda: _ours(source.copy(), expression=expression),  # noqa: B023
            },
            repeats=1 if quick else 3,
        )
        per_spot = {side: value / adata.n_obs * 1e3 for side, value in times.items()}
        how = (
            f"{name}: {adata.n_obs:,} spots, {adata.n_vars:,} genes, {models.geometry('stalign-mini').n_neighbors} "
            f"neighbours; {per_spot['loop']:.3g} ms per spot against {per_spot['ours']:.3g}; equal outputs checked"
        )
        rows.append(at_least(title, times["loop"] / times["ours"], factor, "×", how))
    return rows


def _ours(own: ad.AnnData, *, expression: bool) -> float:
    """Seconds of ours on a fresh copy, which is made outside them."""
    return seconds(lambda: at_once(own, expression=expression))


def graphs(data: str | None, *, quick: bool) -> list[Row]:
    """A million spots, each kind in a process of its own."""
    n = 2_000 if quick else 1_000_000
    rows = []
    for kind in KINDS:
        arguments = {"kind": kind, "n": n}
        result = one_graph(**arguments) if quick else isolated("preprocessing:one_graph", **arguments)
        how = (
            f"`pp.extract_niches` of bare spots, {result['per_niche']:.1f} spots a niche on average; "
            f"{result['before']:.2f} GB before the call"
        )
        rows.append(at_most(f"niches of {n:,} spots, {kind}", result["seconds"], 60, "s", how))
        rows.append(at_most(f"memory for {n:,} spots, {kind}", result["peak"], 2, "GB", how))
    return rows


def one_graph(kind: str, n: int) -> dict[str, float]:
    adata = lattice(kind, n)
    import squidpy  # noqa: F401  its import is not what is measured

    before = peak_rss()
    elapsed = seconds(lambda: sta.pp.extract_niches(adata))
    graph = adata.obsp["niche_connectivities"]
    return {"seconds": elapsed, "peak": peak_rss(), "before": before, "per_niche": graph.nnz / n}
