"""Spatial domains without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from stalign.benchmark import _metrics as metrics
from stalign.benchmark._methods import DOMAIN_METHODS, wanted
from stalign.benchmark._peers import PEERS
from stalign.benchmark._rows import BLOCKS, Row

if TYPE_CHECKING:
    from stalign.benchmark._section import Section
    from stalign.models import STAlign

TASK: Final = "domains"
_AGREEMENT: Final = {
    "ARI": metrics.adjusted_rand,
    "NMI": metrics.normalised_mutual_information,
    "homogeneity": metrics.homogeneity,
}
_COHERENCE: Final = {
    "neighbours alike": metrics.neighbour_agreement,
    "CHAOS": metrics.chaos,
    "PAS": metrics.abnormal_spots,
}
MODALITIES: Final[dict[str, tuple[str, ...]]] = {
    "stalign": ("image", "gene"),
    "stalign-genes-only": ("gene",),
    "stalign-image-only": ("image",),
}


def domains(
    section: Section, *, model: STAlign, seeds: Sequence[int] = (0, 1, 2), methods: Sequence[str] | None = None
) -> list[Row]:
    """Divide a section into as many domains as it has labels, and compare them.

    Parameters
    ----------
    section
        With labels; spots without one were left out before.
    model
        The model.
    seeds
        Of the clustering.
    methods
        Names or patterns (``"stalign*"``) of :data:`stalign.benchmark.METHODS`; ``None`` is all but peers.

    Returns
    -------
    Rows of ARI, NMI and homogeneity against the labels (scores of 0 and 1 for labels drawn by chance and the same
    division), and of spatial coherence: share of the 6 nearest spots in the same domain, CHAOS and PAS. None for a
    section with fewer than two labels.

    Examples
    --------
    >>> import stalign as sta
    >>> from stalign.benchmark import Section, domains
    >>> section = Section.of(sta.datasets.synthetic_visium(n_rows=12, n_cols=12), label_key="region")
    >>> model = sta.models.load("stalign-mini")
    >>> rows = domains(section, model=model, seeds=[0], methods=["pca"])
    >>> [row.metric for row in rows]
    ['ARI', 'NMI', 'homogeneity', 'neighbours alike', 'CHAOS', 'PAS']
    """
    if section.labels is None or section.n_classes < 2:
        return []
    rows = []
    truth = np.unique(section.names, return_inverse=True)[1]
    if wanted("annotation", methods):
        rows += _coherence(section, "annotation", truth, None)
    for method, seed, found in _divisions(section, model, seeds, methods):
        rows += score_domains(section, method, found, seed)
        rows += _coherence(section, method, found, seed)
    return rows


def _divisions(
    section: Section, model: STAlign, seeds: Sequence[int], methods: Sequence[str] | None
) -> Iterator[tuple[str, int, np.ndarray]]:
    n = section.n_classes
    for name, method in DOMAIN_METHODS.items():
        if wanted(name, methods) and (section.has_image or not method.needs_image):
            values = method.features(section, model)
            for seed in seeds:
                yield name, seed, method.cluster(values, n, seed)
    for name, peer in PEERS.items():
        if wanted(name, methods):
            for seed in seeds:
                yield name, seed, peer.domains(section, n, seed)
    for name, modalities in MODALITIES.items():
        # A section without an image is embedded from its genes alone in any case.
        if wanted(name, methods) and (section.has_image or name == "stalign"):
            for seed in seeds:
                yield name, seed, model_domains(section, model, modalities, n, seed)


def model_domains(section: Section, model: STAlign, modalities: tuple[str, ...], n: int, seed: int) -> np.ndarray:
    """(spots,) domains of the model's embedding, with the defaults of :func:`stalign.tl.spatial_domains`."""
    from stalign import tl

    key = section.embed(model, modalities)
    tl.spatial_domains(section.adata, n, use_rep=key, random_state=seed)
    return section.adata.obs["stalign_domain"].cat.codes.to_numpy()


def score_domains(section: Section, method: str, found: np.ndarray, seed: int | None) -> list[Row]:
    """Compare a division of the spots with the labels."""
    truth = np.unique(section.names, return_inverse=True)[1]
    tables = metrics.contingency(truth, np.unique(found, return_inverse=True)[1], section.blocks)
    return [
        Row(
            *(TASK, metric, section.name, method, float(measure(tables.sum(axis=0))), seed),
            *metrics.block_interval(measure, tables),
            *(BLOCKS, len(truth)),
        )
        for metric, measure in _AGREEMENT.items()
    ]


def _coherence(section: Section, method: str, found: np.ndarray, seed: int | None) -> list[Row]:
    rows = []
    for metric, measure in _COHERENCE.items():
        values = measure(found, section.coordinates)
        low, high = metrics.mean_block_interval(values, section.blocks)
        rows.append(
            Row(TASK, metric, section.name, method, float(np.nanmean(values)), seed, low, high, BLOCKS, len(found))
        )
    return rows
