"""Simulated tissue with known domains, for development: programmes and depth of a real section, drawn anew.

Expression programmes are those of clusters of a training section. Domains are curved layers or blobs; beside them there
are mixing over their borders, spots that vary in composition, depth that varies smoothly, and two programmes that have
nothing to do with the domains, one of single spots and one that drifts over the slide.
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA

from stalign.genes import normalise_log1p

SHAPE = (60, 62)
N_DOMAINS = 7
N_GENES = 5000
DEPTH = 1500
CONTRAST = 0.2


def neighbour_mean(coordinates: np.ndarray, k: int) -> csr_matrix:
    """(n, n) that averages over a spot and its k nearest."""
    n = len(coordinates)
    _, near = cKDTree(coordinates).query(coordinates, k=k + 1)
    rows = np.repeat(np.arange(n), k + 1)
    return csr_matrix((np.full(n * (k + 1), 1 / (k + 1)), (rows, near.ravel())), shape=(n, n))


def programmes(section: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(domains, genes) shares of counts of clusters of a section, and the names of the genes."""
    adata = ad.read_h5ad(section)
    expression = normalise_log1p(adata.X)
    mean = np.asarray(expression.mean(axis=0)).ravel()
    variance = np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    genes = np.argsort(-variance, kind="stable")[:N_GENES]
    smooth = (neighbour_mean(adata.obsm["spatial"], 6) @ expression[:, genes]).toarray()
    _, cluster = kmeans2(PCA(15, random_state=0).fit_transform(smooth), N_DOMAINS, minit="++", seed=seed, iter=50)
    counts = csr_matrix(adata.X)[:, genes]
    background = np.asarray(counts.sum(axis=0)).ravel() * 1e-3 / N_DOMAINS
    total = np.array([np.asarray(counts[cluster == k].sum(axis=0)).ravel() for k in range(N_DOMAINS)]) + background
    shares = total / total.sum(axis=1, keepdims=True)
    order = np.argsort(PCA(1).fit_transform(np.log(shares + 1e-7)).ravel())
    return shares[order], adata.var_names.to_numpy()[genes]


def domains(kind: str, coordinates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) domain of each spot: curved ``"layers"`` across the slide, or ``"blobs"``."""
    place = (coordinates - coordinates.mean(axis=0)) / coordinates.std()
    if kind == "layers":
        angle = rng.uniform(0, np.pi)
        across, along = place @ [np.cos(angle), np.sin(angle)], place @ [-np.sin(angle), np.cos(angle)]
        depth = across + rng.uniform(0.1, 0.35) * along**2 + 0.08 * np.sin(3 * along + rng.uniform(0, 6))
        return np.searchsorted(np.quantile(depth, np.cumsum(rng.dirichlet(np.full(N_DOMAINS, 4.0)))[:-1]), depth)
    centres = place[rng.choice(len(place), 3 * N_DOMAINS, replace=False)]
    owner = rng.permutation(np.repeat(np.arange(N_DOMAINS), 3))
    distance = np.array([np.hypot(*(place - c).T) + rng.normal(0, 0.15) for c in centres])
    waves = 0.15 * np.sin(4 * place[:, 0] + rng.uniform(0, 6)) * np.cos(4 * place[:, 1] + rng.uniform(0, 6))
    return owner[(distance + waves * rng.normal(size=(len(centres), 1))).argmin(axis=0)]


def simulate(section: Path, kind: str, seed: int) -> ad.AnnData:
    """One slide, with ``obs["domain"]`` and the grid of a Visium array.

    Parameters
    ----------
    section
        A training section with counts.
    kind
        ``"layers"`` or ``"blobs"``.
    seed
        Of everything.
    """
    rng = np.random.default_rng(seed)
    row, column = (part.ravel() for part in np.mgrid[: SHAPE[0], : SHAPE[1]])
    grid = np.column_stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2])
    domain = domains(kind, grid, rng)
    shares, genes = programmes(section, seed)
    n = len(grid)
    mean = np.exp(np.log(shares).mean(axis=0))
    mean /= mean.sum()
    near = neighbour_mean(grid, 6)
    own = np.eye(N_DOMAINS)[domain]
    mixed = rng.gamma(8 * (0.7 * own + 0.3 * (near @ own)) + 0.05)
    mixed /= mixed.sum(axis=1, keepdims=True)
    far = neighbour_mean(grid, 90)
    nuisance = [rng.normal(size=n) * (rng.random(n) < 0.15), far @ (far @ rng.normal(size=n))]
    effects = [rng.normal(size=N_GENES) * (rng.random(N_GENES) < 0.05) * size for size in (0.5, 0.12)]
    log_rate = np.log(mean) + mixed @ (np.log(shares / mean) * CONTRAST)
    log_rate += sum(np.outer(z / z.std(), effect) for z, effect in zip(nuisance, effects, strict=True))
    rate = np.exp(log_rate)
    drift = near @ (near @ rng.normal(size=n))
    by_domain = 0.15 * (domain - domain.mean()) / domain.std() * rng.choice([-1, 1])
    depth = DEPTH * np.exp(0.4 * rng.normal(size=n) + 0.2 * drift / drift.std() + by_domain)
    counts = rng.poisson(rate / rate.sum(axis=1, keepdims=True) * depth[:, None]).astype(np.float32)
    adata = ad.AnnData(csr_matrix(counts))
    adata.var_names = genes
    adata.obs["array_row"], adata.obs["array_col"] = row, 2 * column + row % 2
    adata.obs["domain"] = domain.astype(str)
    adata.obsm["spatial"] = grid * 100.0
    return adata
