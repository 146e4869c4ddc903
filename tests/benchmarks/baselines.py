"""What plain methods reach, written with scanpy's and scikit-learn's own parts."""

from __future__ import annotations

import numpy as np
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.mixture import GaussianMixture

import stalign as sta


def log_normalised(adata: AnnData) -> sp.csr_matrix:
    return sta.genes.normalise_log1p(adata.X)


def neighbour_mean(adata: AnnData, n_neighbors: int) -> sp.csr_matrix:
    """Mean over a spot and its nearest neighbours, as a matrix."""
    _, index = cKDTree(adata.obsm["spatial"]).query(adata.obsm["spatial"], k=n_neighbors + 1)
    rows = np.repeat(np.arange(adata.n_obs), n_neighbors + 1)
    values = np.full(len(rows), 1 / (n_neighbors + 1))
    return sp.csr_matrix((values, (rows, index.ravel())), shape=(adata.n_obs, adata.n_obs))


def _variance(matrix: sp.csr_matrix) -> np.ndarray:
    mean = np.asarray(matrix.mean(axis=0)).ravel()
    return np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - mean**2


def principal_components(adata: AnnData, *, n_genes: int = 3000, n_components: int = 30) -> np.ndarray:
    """Leading components of the genes of largest variance."""
    expression = log_normalised(adata)
    values = expression[:, np.argsort(-_variance(expression))[:n_genes]].toarray()
    return PCA(n_components, random_state=0).fit_transform(values)


def kmeans(values: np.ndarray, k: int, seed: int) -> np.ndarray:
    return KMeans(k, n_init=10, random_state=seed).fit_predict(values)


def tied_gmm(values: np.ndarray, k: int, seed: int) -> np.ndarray:
    return GaussianMixture(k, covariance_type="tied", n_init=3, random_state=seed).fit_predict(values)


def scaled_components(adata: AnnData) -> np.ndarray:
    """The usual scanpy pipeline: 3,000 highly variable genes, unit variance cut at ten, 30 components."""
    work = AnnData(log_normalised(adata), var=adata.var[[]])
    sc.pp.highly_variable_genes(work, n_top_genes=min(3000, adata.n_vars))
    values = work.X[:, work.var["highly_variable"].to_numpy()].toarray()
    values = np.clip((values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-9), -10, 10)
    return PCA(30, random_state=0).fit_transform(values)


def scaled_beside_niche(adata: AnnData) -> np.ndarray:
    scores = scaled_components(adata)
    return np.hstack([scores, neighbour_mean(adata, 6) @ scores])


def niche_components(adata: AnnData) -> np.ndarray:
    return neighbour_mean(adata, 18) @ principal_components(adata, n_components=15)


def smoothed_genes(adata: AnnData) -> np.ndarray:
    """Genes by the share of variance that survives averaging over 18 neighbours; z-scores; eight components."""
    expression = log_normalised(adata)
    detected = np.bincount(expression.indices, minlength=adata.n_vars) >= max(10, 0.01 * adata.n_obs)
    expression = expression[:, detected]
    niche = sp.csr_matrix(neighbour_mean(adata, 18) @ expression)
    share = _variance(niche) / np.maximum(_variance(expression), 1e-9)
    best = niche[:, np.argsort(-share)[:2000]].toarray()
    scores = (best - best.mean(axis=0)) / np.maximum(best.std(axis=0), 1e-9)
    return PCA(8, random_state=0).fit_transform(scores)


# Name: (features, clustering).
DOMAIN_BASELINES = {
    "PCA + k-means": (principal_components, kmeans),
    "scanpy PCA, scaled + k-means": (scaled_components, kmeans),
    "scanpy PCA beside its niche mean + k-means": (scaled_beside_niche, kmeans),
    "niche-averaged PCA + GMM": (niche_components, tied_gmm),
    "smoothed spatial genes + GMM": (smoothed_genes, tied_gmm),
}


def colour_texture(patches: np.ndarray) -> np.ndarray:
    """(n, s, s, 3) uint8 → (n, 18): mean, spread and mean gradient of RGB and of the three optical densities."""
    # In blocks, since floats of all patches of a slide would fill gigabytes.
    return np.vstack([_colour_texture(block) for block in np.array_split(patches, max(1, len(patches) // 256))])


def _colour_texture(patches: np.ndarray) -> np.ndarray:
    values = np.moveaxis(patches, -1, 1).astype(np.float32) / 255
    both = np.concatenate([values, -np.log(np.maximum(values, 1 / 255))], axis=1)
    flat = both.reshape(*both.shape[:2], -1)
    down = np.abs(np.diff(both, axis=2)).mean(axis=(2, 3))
    right = np.abs(np.diff(both, axis=3)).mean(axis=(2, 3))
    return np.hstack([flat.mean(axis=2), flat.std(axis=2), (down + right) / 2])


def image_features(adata: AnnData) -> np.ndarray:
    """Colour and texture of spot and niche patches, centred and scaled within the slide."""
    features = np.hstack([colour_texture(sta.pp.get_patches(adata, level=level)) for level in ("spot", "niche")])
    return (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-6)


def ridge(train: list[tuple[np.ndarray, np.ndarray]], features: np.ndarray) -> np.ndarray:
    """Ridge regression on slides that are centred one by one; the mean expression of the training slides is added."""
    x = np.vstack([f for f, _ in train])
    y = np.vstack([e - e.mean(axis=0) for _, e in train])
    model = RidgeCV(alphas=np.logspace(-1, 5, 13)).fit(x, y)
    return model.predict(features) + np.vstack([e for _, e in train]).mean(axis=0)
