"""The methods of the table: their names and what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from stalign._validate import listing, near
from stalign.benchmark import _features as features
from stalign.benchmark import _peers as peers

if TYPE_CHECKING:
    from stalign.benchmark._section import Section
    from stalign.models import STAlign

METHODS: Final[dict[str, str]] = {
    "annotation": "the labels themselves: how coherent they are in space",
    "pca": "log1p of counts per 10,000, 3,000 variable genes, z-scores, PCA(30), k-means",
    "pca-median": "the same with counts scaled to the section's median total",
    "pca-niche": "`pca-median` beside its mean over the 6 nearest spots, k-means",
    "niche-pca": "expression averaged over the 18 nearest spots, PCA(15), Gaussian mixture with one covariance",
    "smoothed-genes": "2,000 genes whose variance survives averaging over 18 neighbours, z-scores of the averages, "
    "PCA(8), Gaussian mixture with one covariance",
    "banksy-0.2": "own expression, neighbourhood mean and azimuthal gradient as in BANKSY, λ = 0.2, PCA(20), Gaussian "
    "mixture with one covariance",
    "banksy-0.8": "the same with λ = 0.8",
    "colour": "colour and texture statistics of the images of spot and niche",
    "random-encoder": "ResNet-18 of ImageNet's shape with random weights, on images of spot and niche of 32 pixels",
    "stalign": "the model from images and genes, frozen, with the defaults of `stalign.tl`",
    "stalign-genes-only": "the model without the image",
    "stalign-image-only": "the model without the counts",
    "stalign-gene": "the gene side of the aligned pair",
    "stalign-image": "the image side of the aligned pair",
    "mean": "mean expression of the training sections",
    "ridge-colour": "ridge from colour and texture, sections centred one by one, penalty by cross-validation",
    "ridge-random-encoder": "the same from the random encoder",
    "neighbours-colour": "mean of the 50 training spots of the nearest colour and texture",
    "hest-colour": "HEST's protocol (z-scores, PCA(256), ridge with α = 100 / (components × genes)) on colour and "
    "texture",
    "hest-random-encoder": "HEST's protocol on the random encoder",
    "hest-stalign": "HEST's protocol on the image side of the model",
    "stalign-head": "`tl.predict_expression`, the model's own head: no training sections",
    "stalign-retrieval": "`tl.predict_expression`, the nearest gene sides of the training sections",
    "stalign-ridge": "`tl.predict_expression`, ridge from the image side, fitted on the training sections",
    "chance": "a random order",
    "majority": "the largest class everywhere",
    "prior": "each answer drawn by the share of its class",
    "marker-z": "mean z-score of the markers",
    "expression-prototypes": "nearest class mean of the reference by cosine; z-scores within sections of shared genes",
    "wrong tissue": "out-of-distribution score of the spots of another tissue against those of a breast tumour",
    "inverted image": "the same, of the breast tumour with the negative of its image",
    "shuffled genes": "the same, of the breast tumour with its gene names exchanged",
    "head": "coverage of the prediction intervals of the model's head; in brackets the quartiles of the genes",
    **{name: peer.description for name, peer in peers.PEERS.items()},
}


QUALITY_METHODS: Final = ("wrong tissue", "inverted image", "shuffled genes", "head")


class DomainMethod(NamedTuple):
    """Features of a section and what divides them."""

    features: Callable[[Section, STAlign], np.ndarray]
    cluster: Callable[[np.ndarray, int, int], np.ndarray]
    needs_image: bool = False


def kmeans(values: np.ndarray, n: int, seed: int) -> np.ndarray:
    """(rows,) k-means clusters, the best of 10 starts; of 30 on small sections, where much is left to the seed."""
    from sklearn.cluster import KMeans

    return KMeans(n, n_init=30 if len(values) < 1000 else 10, random_state=seed).fit_predict(values)


def tied_mixture(values: np.ndarray, n: int, seed: int) -> np.ndarray:
    """(rows,) components of a Gaussian mixture with one covariance, the best of ten starts."""
    from sklearn.mixture import GaussianMixture

    # The scale is that of the first component, so that the regularisation of the covariance is relative to it.
    scaled = values / max(float(values[:, 0].std()), 1e-12)
    return GaussianMixture(n, covariance_type="tied", n_init=10, max_iter=300, random_state=seed).fit_predict(scaled)


DOMAIN_METHODS: Final[dict[str, DomainMethod]] = {
    "pca": DomainMethod(lambda s, m: features.pca(s), kmeans),
    "pca-median": DomainMethod(lambda s, m: features.pca_median(s), kmeans),
    "pca-niche": DomainMethod(lambda s, m: features.pca_beside_niche(s), kmeans),
    "niche-pca": DomainMethod(lambda s, m: features.niche_pca(s), tied_mixture),
    "smoothed-genes": DomainMethod(lambda s, m: features.smoothed_genes(s), tied_mixture),
    "banksy-0.2": DomainMethod(lambda s, m: features.banksy(s, 0.2), tied_mixture),
    "banksy-0.8": DomainMethod(lambda s, m: features.banksy(s, 0.8), tied_mixture),
    "colour": DomainMethod(lambda s, m: features.components(features.colour(s, m), 15), tied_mixture, True),
    "random-encoder": DomainMethod(
        lambda s, m: features.components(features.random_encoder(s, m), 15), tied_mixture, True
    ),
}


def wanted(method: str, patterns: Sequence[str] | None) -> bool:
    """Whether a method is asked for; without patterns, all but those that are trained on the section itself."""
    if patterns is None:
        return method not in peers.PEERS
    return any(fnmatch(method, pattern) for pattern in patterns)


def check_methods(patterns: Sequence[str] | None) -> None:
    """Refuse names and patterns that no method has.

    Raises
    ------
    ValueError
        Naming them and what there is.
    """
    for pattern in patterns or ():
        if not any(fnmatch(method, pattern) for method in METHODS):
            raise ValueError(
                f"No method is called {pattern!r}.{near(pattern, METHODS)} There are {listing(METHODS, len(METHODS))}."
            )
