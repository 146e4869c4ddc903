"""What plain methods make of a section: expression, colour and texture, an untrained network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stalign.benchmark._metrics import neighbour_mean, neighbours

if TYPE_CHECKING:
    from stalign.benchmark._section import Section
    from stalign.models import STAlign

_PATCH_PIXELS: Final = 64
_SMALL: Final = 500
_RANDOM_ENCODER: Final = "resnet18"
_IMAGENET: Final = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))


def components(values: np.ndarray, n: int) -> np.ndarray:
    """(rows, n) leading principal component scores, exact."""
    from sklearn.decomposition import PCA

    n = min(n, *values.shape)
    solver = "full" if min(values.shape) <= _SMALL else "arpack"
    return PCA(n, svd_solver=solver, random_state=0).fit_transform(values)


def variance(matrix: sparse.csr_matrix) -> np.ndarray:
    """Variance of each column."""
    mean = np.asarray(matrix.mean(axis=0)).ravel()
    return np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - mean**2


def z_scores(values: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Columns of mean 0 and variance 1, cut at ``limit``; those that do not vary are 0."""
    scaled = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-9)
    return scaled if limit is None else np.clip(scaled, -limit, limit)


# --- expression --------------------------------------------------------------------------------------------------


def _median_depth(section: Section) -> sparse.csr_matrix:
    """log1p of counts scaled to the section's median total."""
    from stalign.genes import library_size, normalise_log1p

    totals = library_size(section.adata.X)
    median = float(np.median(totals[totals > 0])) if (totals > 0).any() else 1.0
    return normalise_log1p(section.adata.X, target_sum=median)


def _variable(expression: sparse.csr_matrix, n_genes: int = 3000) -> np.ndarray:
    """(n, n_genes) dense: highly variable genes by normalised dispersion, as scanpy chooses them."""
    import scanpy as sc
    from anndata import AnnData

    if expression.shape[1] <= n_genes:
        return expression.toarray()
    # Genes that nobody expresses have no dispersion.
    expression = expression[:, np.bincount(expression.indices, minlength=expression.shape[1]) > 0]
    if expression.shape[1] <= n_genes:
        return expression.toarray()
    work = AnnData(expression)
    sc.pp.highly_variable_genes(work, n_top_genes=n_genes)
    return expression[:, work.var["highly_variable"].to_numpy()].toarray()


def pca(section: Section) -> np.ndarray:
    """(n, 30) log1p of counts per 10,000; 3,000 variable genes; z-scores cut at 10."""
    return section.remember("pca", lambda: components(z_scores(_variable(section.log_expression()), 10), 30))


def pca_median(section: Section) -> np.ndarray:
    """(n, 30) as :func:`pca`, of counts scaled to the section's median total."""
    return section.remember("pca median", lambda: components(z_scores(_variable(_median_depth(section)), 10), 30))


def pca_beside_niche(section: Section) -> np.ndarray:
    """(n, 60) components beside their mean over the spot and its 6 nearest."""
    scores = pca_median(section)
    return np.hstack([scores, neighbour_mean(section.coordinates, 6) @ scores])


def niche_pca(section: Section) -> np.ndarray:
    """(n, 15) components of the expression averaged over the spot and its 18 nearest."""
    mean = neighbour_mean(section.coordinates, 18).astype(np.float32)
    return components(mean @ _variable(_median_depth(section)), 15)


def smoothed_genes(section: Section) -> np.ndarray:
    """(n, 8) components of the genes whose variance survives averaging.

    Genes in at least 1 % of the spots (10 at least); the 2,000 that keep the largest share of their variance when
    averaged over the spot and its 18 nearest; z-scores of the averages; eight components.
    """
    expression = section.log_expression()
    detected = np.bincount(expression.indices, minlength=expression.shape[1])
    expression = expression[:, detected >= max(10, 0.01 * expression.shape[0])]
    niche = sparse.csr_matrix(neighbour_mean(section.coordinates, 18) @ expression)
    share = variance(niche) / np.maximum(variance(expression), 1e-9)
    return components(z_scores(niche[:, np.argsort(-share)[:2000]].toarray()), 8)


def banksy(section: Section, mixing: float, *, k: int = 18) -> np.ndarray:
    """(n, 20) components of own expression, neighbourhood mean and azimuthal gradient, as in BANKSY.

    With z-scores C of the genes, weights w that fall with the distance as a Gaussian and sum to 1, and the angles φ
    of the neighbours: M = Σ w c; G = |Σ w (c − M) exp(iφ)|; both are z-scored and put together as
    [√(1−λ) C, √(λ/1.5) M, √(λ/3) G] (Singhal et al., Nat Genet 56:431, 2024). Written from the formula, with 2,000
    variable genes and 18 neighbours for both; not the authors' code, which clusters by Leiden.

    Parameters
    ----------
    section
        The section.
    mixing
        λ, the weight of the neighbourhood.
    k
        Neighbours.
    """
    own, mean, gradient = section.remember(f"banksy {k}", lambda: _banksy_parts(section, k))
    joined = [np.sqrt(1 - mixing) * own, np.sqrt(mixing / 1.5) * mean, np.sqrt(mixing / 3) * gradient]
    return components(np.hstack(joined), 20)


def _banksy_parts(section: Section, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Z-scores of own expression, neighbourhood mean and magnitude of the gradient, (n, genes) float32 each."""
    own = z_scores(_variable(section.log_expression(), 2000), 10)
    xy = section.coordinates
    index = neighbours(xy, k)
    step = xy[index] - xy[:, None]
    distance = np.hypot(step[..., 0], step[..., 1])
    weight = np.exp(-((distance / np.maximum(np.median(distance, axis=1, keepdims=True), 1e-9)) ** 2) / 2)
    weight = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)

    def mix(values: np.ndarray) -> np.ndarray:
        rows = np.arange(0, index.size + 1, index.shape[1])
        return sparse.csr_matrix((values.ravel(), index.ravel(), rows), shape=(len(xy),) * 2) @ own

    mean = mix(weight)
    angle = np.arctan2(step[..., 1], step[..., 0]).astype(np.float32)
    # Σ w (c − M) exp(iφ) in two real sums.
    turns = [weight * wave(angle) for wave in (np.cos, np.sin)]
    gradient = np.hypot(*(mix(turn) - turn.sum(axis=1, keepdims=True) * mean for turn in turns))
    return own, z_scores(mean), z_scores(gradient)


# --- images ------------------------------------------------------------------------------------------------------


def patches(section: Section, model: STAlign) -> list[np.ndarray]:
    """Return the patches under spots and under niches, (n, 64, 64, 3) uint8 each, at the model's sizes in µm."""
    from stalign import pp

    section.prepare(model)
    return [pp.get_patches(section.adata, level=level, size=_PATCH_PIXELS) for level in ("spot", "niche")]  # type: ignore[arg-type]


def colour_texture(values: np.ndarray) -> np.ndarray:
    """Colour and texture of patches.

    Parameters
    ----------
    values
        (n, side, side, 3) uint8.

    Returns
    -------
    (n, 18): mean, spread and mean gradient of red, green, blue and of their optical densities.
    """
    # In blocks, since floats of all patches of a section would fill gigabytes.
    return np.vstack([_colour_texture(block) for block in np.array_split(values, max(1, len(values) // 256))])


def _colour_texture(values: np.ndarray) -> np.ndarray:
    scaled = np.moveaxis(values, -1, 1).astype(np.float32) / 255
    both = np.concatenate([scaled, -np.log(np.maximum(scaled, 1 / 255))], axis=1)
    flat = both.reshape(*both.shape[:2], -1)
    down, right = (np.abs(np.diff(both, axis=axis)).mean(axis=(2, 3)) for axis in (2, 3))
    return np.hstack([flat.mean(axis=2), flat.std(axis=2), (down + right) / 2])


def colour(section: Section, model: STAlign) -> np.ndarray:
    """(n, 36) colour and texture of spots and niches, centred and scaled within the section."""
    return section.remember(
        f"colour {model.geometry}",
        lambda: z_scores(np.hstack([colour_texture(block) for block in patches(section, model)])),
    )


def random_encoder(section: Section, model: STAlign) -> np.ndarray:
    """(n, 1024) features of spots and niches by a ResNet-18 of timm with the weights it starts with (seed 0)."""
    return section.remember(
        f"random {model.geometry}",
        lambda: np.hstack([_untrained_features(block) for block in patches(section, model)]),
    )


def _untrained_features(values: np.ndarray) -> np.ndarray:
    import timm
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = timm.create_model(_RANDOM_ENCODER, pretrained=False, num_classes=0).eval()
    mean, sd = (torch.tensor(part, dtype=torch.float32)[:, None, None] for part in _IMAGENET)
    found = []
    with torch.inference_mode():
        for block in np.array_split(values, max(1, len(values) // 64)):
            pixels = torch.from_numpy(np.moveaxis(block, -1, 1).astype(np.float32) / 255)
            # Half the size costs a quarter of the time; the images of many sections have no more.
            found.append(network((torch.nn.functional.avg_pool2d(pixels, 2) - mean) / sd).numpy())
    return np.vstack(found)
