"""What a model has seen: statistics of its training spots, and how far a spot is from them.

Gene encoders that compare spots with their own slide cannot notice that a whole slide is foreign. So this looks at
spots in absolute terms: log-normalised expression against the training spots' mean and leading components, over the
genes that slide and statistics share; and colours, stain direction and texture of the spot's patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.special import log_ndtr
from torch import nn

from stalign.genes import normalise_log1p
from stalign.models._config import FamiliarityConfig
from stalign.slide._appearance import APPEARANCE, appearance

MIN_GENES = 50
"""Genes that a slide must share with the statistics to be judged by them."""

# Rows of a dense block of expression.
_ROWS = 1024
# Counts that a spot is scaled to before the logarithm: few, so that genes of one or two counts weigh little.
_TARGET = 2e3
# Residual variance of a gene, against which a component's own variance is weighed: a few genes do not fit any spot.
_NOISE = 1.0
# Standard deviations by which stained sections of any origin are taken to differ beyond what the training sections
# show: mean colours, log contrast, log gradients (resolution), stain direction, log density. A few slides say little
# about how slides differ; scanners and resolutions vary much, the direction of the stain little.
_BETWEEN_SLIDES = np.array([0.12] * 3 + [0.5] * 3 + [0.7] * 3 + [0.1] * 2 + [0.4])
# Spots that the components are found on, and parts that patients are dealt to, to be left out in turn.
_FIT_ROWS = 2000
_MAX_FOLDS = 8


class SectionSample(NamedTuple):
    """Spots of one section that statistics are taken from.

    Attributes
    ----------
    patient
        Sections of one patient are left out together.
    spot, niche
        (m, n_vocabulary) CSR counts of spots, and summed or averaged over their niches; ``None`` without counts.
    measured
        (n_vocabulary,) bool: genes that the section has.
    patches
        (k, pixels, pixels, 3) uint8 spot patches, ``None`` without an image; or what :func:`appearance` made of them.
    """

    patient: str
    spot: sparse.csr_matrix | None
    niche: sparse.csr_matrix | None
    measured: np.ndarray | None
    patches: np.ndarray | None


class Distances(NamedTuple):
    """(n,) float64 standardised distances: 0 for the mean held-out training spot, in standard deviations of those."""

    gene: np.ndarray | None
    image: np.ndarray | None


def neighbour_sum(graph: sparse.csr_matrix, counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Sum the counts of each niche, whatever the weights of the graph.

    Parameters
    ----------
    graph
        (m, n) CSR niche graph, self included.
    counts
        (n, n_genes) CSR.
    """
    ones = sparse.csr_matrix((np.ones(graph.nnz, dtype=np.float32), graph.indices, graph.indptr), shape=graph.shape)
    return sparse.csr_matrix(ones @ counts)


class Familiarity(nn.Module):
    """Statistics of the training spots, as buffers that are saved with the weights.

    Gene side: ``gene_index`` (n_genes,), places in the vocabulary; ``gene_rate`` (n_genes,), share of counts;
    ``components`` (n_genes, k) and ``variances`` (k,) of log-normalised niche expression about the mean;
    ``gene_scale`` (2, 2), for spots and niches location and scale of the logit of the unexplained share of held-out
    spots; ``gene_mix`` (2,), location and scale of the mean of the two.
    Image side: ``image_mean`` (12,), ``image_whitening`` (12, 12), ``image_scale`` (2,), location and scale of the log
    distance of held-out spots.
    """

    gene_index: torch.Tensor
    gene_rate: torch.Tensor
    components: torch.Tensor
    variances: torch.Tensor
    gene_scale: torch.Tensor
    gene_mix: torch.Tensor
    image_mean: torch.Tensor
    image_whitening: torch.Tensor
    image_scale: torch.Tensor

    def __init__(self, config: FamiliarityConfig) -> None:
        super().__init__()
        self.config = config
        if config.n_genes:
            self.register_buffer("gene_index", torch.arange(config.n_genes))
            self.register_buffer("gene_rate", torch.full((config.n_genes,), 1.0 / config.n_genes))
            self.register_buffer("components", torch.zeros(config.n_genes, config.n_components))
            self.register_buffer("variances", torch.ones(config.n_components))
            self.register_buffer("gene_scale", torch.tensor([[0.0, 1.0]] * 2))
            self.register_buffer("gene_mix", torch.tensor([0.0, 1.0]))
        if config.image:
            self.register_buffer("image_mean", torch.zeros(APPEARANCE))
            self.register_buffer("image_whitening", torch.eye(APPEARANCE))
            self.register_buffer("image_scale", torch.tensor([0.0, 1.0]))

    @property
    def knows_genes(self) -> bool:
        """Whether there are statistics of expression."""
        return self.config.n_genes > 0

    @property
    def knows_images(self) -> bool:
        """Whether there are statistics of pixels."""
        return self.config.image

    def n_shared(self, measured: np.ndarray) -> int:
        """Return how many genes of the statistics are among those measured.

        Parameters
        ----------
        measured
            (n_vocabulary,) bool.
        """
        return int(measured[_array(self.gene_index).astype(np.intp)].sum()) if self.knows_genes else 0

    def gene_distance(self, spot: sparse.csr_matrix, niche: sparse.csr_matrix, measured: np.ndarray) -> np.ndarray:
        """Return how far the expression of spots and their niches is from that of the training spots.

        The share of a spot's variance over genes that neither the mean profile nor the leading components explain,
        compared with that of held-out training spots: the mean over the spot and its niche, which is less noisy.

        Parameters
        ----------
        spot, niche
            (n, n_vocabulary) counts of the spots, and summed or averaged over their niches.
        measured
            (n_vocabulary,) bool: genes that the slide has.

        Returns
        -------
        (n,) float64, see :class:`Distances`; NaN for spots without counts of the shared genes.

        Raises
        ------
        ValueError
            If fewer than ``MIN_GENES`` genes are shared.
        """
        shared = self.n_shared(measured)
        if shared < MIN_GENES:
            raise ValueError(
                f"The slide shares {shared} of the {self.config.n_genes} genes that the model's statistics are over; "
                f"at least {MIN_GENES} are needed."
            )
        profile = _Profile(
            _array(self.gene_index).astype(np.intp),
            _array(self.gene_rate),
            _array(self.components),
            _array(self.variances),
        )
        scales = _array(self.gene_scale)
        parts = [
            (profile.unexplained(counts, measured) - location) / spread
            for counts, (location, spread) in zip((spot, niche), scales, strict=True)
        ]
        location, spread = _array(self.gene_mix)
        return ((parts[0] + parts[1]) / 2 - location) / spread

    def image_distance(self, patches: np.ndarray) -> np.ndarray:
        """Return how far patches are from the training spots in colour, stain and texture.

        Parameters
        ----------
        patches
            (n, pixels, pixels, 3) uint8 spot patches of the model's geometry.

        Returns
        -------
        (n,) float64, see :class:`Distances`.
        """
        distance = _log_distance(appearance(patches), _array(self.image_mean), _array(self.image_whitening))
        location, spread = _array(self.image_scale)
        return (distance - location) / spread


def tail(distance: np.ndarray) -> np.ndarray:
    """Return -log10 of the share of held-out training spots that are as far, by a normal tail; NaN stays NaN.

    Examples
    --------
    >>> tail(np.array([0.0, 2.326])).round(2).tolist()
    [0.3, 2.0]
    """
    return -log_ndtr(-np.asarray(distance, dtype=np.float64)) / np.log(10)


def joined_tail(tails: Sequence[np.ndarray]) -> np.ndarray:
    """Join tails of two sides by Fisher's method (Statistical Methods for Research Workers, 1925, section 21.1).

    Parameters
    ----------
    tails
        One or two (n,) values of :func:`tail`; NaN where a spot lacks that side.

    Returns
    -------
    (n,) -log10 of the share of spots that would be as far on both sides together, were these independent: of two,
    p₁p₂(1 - ln p₁p₂). NaN where all are NaN.

    Examples
    --------
    >>> joined_tail([np.array([2.0, 1.0]), np.array([1.0, np.nan])]).round(2).tolist()
    [2.1, 1.0]
    """
    stack = np.stack(tails)
    n = (~np.isnan(stack)).sum(axis=0)
    total = np.where(np.isnan(stack), 0, stack).sum(axis=0)
    joined = np.where(n > 1, total - np.log1p(total * np.log(10)) / np.log(10), total)
    return np.where(n > 0, joined, np.nan)


def _array(buffer: torch.Tensor) -> np.ndarray:
    values = buffer.detach().cpu().numpy()
    return values.astype(np.float64) if values.dtype.kind == "f" else values


# -- expression -------------------------------------------------------------------------------------------------------


class _Profile(NamedTuple):
    """Mean and leading components of log-normalised expression."""

    genes: np.ndarray
    rate: np.ndarray
    components: np.ndarray
    variances: np.ndarray

    def mean(self, here: np.ndarray) -> np.ndarray:
        """Return the mean profile over some of the genes, normalised over these alone, as a panel's spots are."""
        rate = self.rate[here]
        return np.log1p(_TARGET * rate / max(rate.sum(), 1e-12))

    def unexplained(self, counts: sparse.csr_matrix, measured: np.ndarray) -> np.ndarray:
        """Return the logit of the share of variance over genes that is not explained, (n,); NaN without counts."""
        here = np.flatnonzero(measured[self.genes])
        mean = self.mean(here)
        basis = np.column_stack([mean - mean.mean(), self.components[here] - self.components[here].mean(axis=0)])
        # Ridge: a component may vary as much as it does among the training spots; the mean profile is free.
        prior = np.concatenate([[1e-9], _NOISE / np.maximum(self.variances, 1e-9)])
        solve = np.linalg.solve(basis.T @ basis + np.diag(prior), basis.T)
        own = sparse.csr_matrix(counts[:, self.genes[here]])
        share = np.full(own.shape[0], np.nan)
        for start in range(0, own.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            values = normalise_log1p(own[rows], target_sum=_TARGET).toarray().astype(np.float64)
            values -= values.mean(axis=1, keepdims=True)
            total = np.einsum("ij,ij->i", values, values)
            values -= (values @ solve.T) @ basis.T
            rest = np.einsum("ij,ij->i", values, values)
            share[rows] = np.divide(rest, total, out=np.full_like(total, np.nan), where=total > 0)
        share = np.clip(share, 1e-4, 1 - 1e-4)
        return np.log(share / (1 - share))


# -- pixels -----------------------------------------------------------------------------------------------------------


def _log_distance(values: np.ndarray, mean: np.ndarray, whitening: np.ndarray) -> np.ndarray:
    white = (values.astype(np.float64) - mean) @ whitening
    return np.log(np.maximum(np.einsum("ij,ij->i", white, white) / len(mean), 1e-6)) / 2


# -- fitting ----------------------------------------------------------------------------------------------------------


def fit_familiarity(
    samples: Sequence[SectionSample], *, n_genes: int = 4000, n_components: int = 16
) -> Familiarity | None:
    """Take the statistics of sections, every patient counting alike.

    Location and scale of the distances come from patients that are left out in turn (of one patient sections, of one
    section quarters), and from a quarter of every section that is left out: half of the spots that they are measured on
    are of patients that are not known, half of known ones.

    Parameters
    ----------
    samples
        Spots of the sections.
    n_genes
        Genes with the most counts that are used, at most.
    n_components
        Leading components of niche expression.

    Returns
    -------
    The statistics; ``None`` if there is neither expression nor an image to take them from.
    """
    with_counts = [sample for sample in samples if sample.spot is not None and sample.spot.shape[0] > 1]
    with_image = [
        sample._replace(patches=appearance(sample.patches), spot=None, niche=None)
        for sample in samples
        if sample.patches is not None and len(sample.patches) > 1
    ]
    genes = _fit_genes(_parts(with_counts), n_genes, n_components) if with_counts else {}
    image = _fit_image(_parts(with_image)) if with_image else {}
    if not genes and not image:
        return None
    config = FamiliarityConfig(
        n_genes=len(genes["gene_index"]) if genes else 0,
        n_components=genes["components"].shape[1] if genes else 1,
        image=bool(image),
    )
    familiarity = Familiarity(config)
    state = {}
    for name, values in {**genes, **image}.items():
        kind = np.int64 if name == "gene_index" else np.float32
        state[name] = torch.from_numpy(np.ascontiguousarray(values, dtype=kind))
    familiarity.load_state_dict(state)
    return familiarity.eval()


class _Part(NamedTuple):
    """A sample, the patient it counts for, and the fold it is left out with."""

    sample: SectionSample
    patient: str
    fold: int


def _parts(samples: Sequence[SectionSample]) -> list[_Part]:
    """Deal patients to folds; of one patient sections, of one section quarters in the order of its spots."""
    patients = list(dict.fromkeys(sample.patient for sample in samples))
    if len(patients) > 1:
        return [
            _Part(sample, sample.patient, patients.index(sample.patient) % min(_MAX_FOLDS, len(patients)))
            for sample in samples
        ]
    if len(samples) > 1:
        return [_Part(sample, str(number), number % _MAX_FOLDS) for number, sample in enumerate(samples)]
    return [_Part(part, str(number), number) for number, part in enumerate(_quarters(samples[0]))]


def _quarters(sample: SectionSample) -> Iterator[SectionSample]:
    n = [len(rows) for rows in (sample.patches,) if rows is not None]
    n += [sample.spot.shape[0]] if sample.spot is not None else []
    for number in range(min(4, max(n))):
        cuts = {length: np.array_split(np.arange(length), 4)[number] for length in n}
        yield sample._replace(
            spot=None if sample.spot is None else sample.spot[cuts[sample.spot.shape[0]]],
            niche=None if sample.niche is None else sample.niche[cuts[sample.niche.shape[0]]],
            patches=None if sample.patches is None else sample.patches[cuts[len(sample.patches)]],
        )


def _weights(parts: Sequence[_Part], lengths: Sequence[int]) -> np.ndarray:
    """Weight of every spot, so that patients, and the sections of a patient, count alike; sums to 1."""
    names = [part.patient for part, n in zip(parts, lengths, strict=True) if n]
    per_section = [
        1 / (len(set(names)) * names.count(part.patient)) if n else 0.0 for part, n in zip(parts, lengths, strict=True)
    ]
    return np.concatenate(
        [np.full(n, share / n) if n else np.empty(0) for share, n in zip(per_section, lengths, strict=True)]
    )


def _moments(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Weighted mean and standard deviation; the latter never so small that all else is infinitely far."""
    mean = float(weights @ values)
    return mean, max(float(np.sqrt(weights @ (values - mean) ** 2)), 0.05)


def _fit_genes(parts: Sequence[_Part], n_genes: int, n_components: int) -> dict[str, np.ndarray]:
    """Return the buffers of the gene side; empty if too few genes are known."""
    rates, measured = _rates(parts)
    if not rates.any():
        return {}
    index = _choose_genes(rates, measured, n_genes)
    if len(index) < MIN_GENES:
        return {}
    whole = _fit_profile(parts, index, n_components)
    owners: list[_Part] = []
    logits: list[np.ndarray] = []
    for known, left in _splits(parts):
        profile = _fit_profile(known, index, n_components)
        owners += left
        logits += [_at_both_scales(profile, part.sample) for part in left]
    weights = _weights(owners, [values.shape[1] for values in logits])
    joined = np.concatenate(logits, axis=1)
    scales = np.array([_moments(values, weights) for values in joined])
    mixed = ((joined - scales[:, :1]) / scales[:, 1:]).mean(axis=0)
    return {
        "gene_index": index,
        "gene_rate": whole.rate,
        "components": whole.components,
        "variances": whole.variances,
        "gene_scale": scales,
        "gene_mix": np.array(_moments(mixed, weights)),
    }


def _rates(parts: Sequence[_Part]) -> tuple[np.ndarray, np.ndarray]:
    """Return (patients, n_vocabulary) shares of counts, and which genes each patient measured."""
    patients = list(dict.fromkeys(part.patient for part in parts))
    n_vocabulary = parts[0].sample.spot.shape[1]  # type: ignore[union-attr]
    rates, measured = np.zeros((len(patients), n_vocabulary)), np.zeros((len(patients), n_vocabulary), dtype=bool)
    for part in parts:
        row, counts = patients.index(part.patient), part.sample.spot
        total = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()  # type: ignore[union-attr]
        rates[row] += total / max(total.sum(), 1)
        measured[row] |= part.sample.measured  # type: ignore[arg-type]
    rates /= np.maximum(rates.sum(axis=1, keepdims=True), 1e-12)
    return _on_one_scale(rates, measured), measured


def _on_one_scale(rates: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Scale the shares of patients with a panel to those of the patients with the most genes, on the panel's genes."""
    n_measured = measured.sum(axis=1)
    full = n_measured > n_measured.max() / 2
    counted = measured[full].sum(axis=0)
    mean = np.divide(rates[full].sum(axis=0), counted, out=np.zeros(rates.shape[1]), where=counted > 0)
    scaled = rates.copy()
    for row in np.flatnonzero(~full):
        on_panel = mean[measured[row]].sum()
        scaled[row] *= on_panel if on_panel > 0 else 1.0
    return scaled


def _mean_rate(rates: np.ndarray, measured: np.ndarray) -> np.ndarray:
    counted = measured.sum(axis=0)
    return np.divide((rates * measured).sum(axis=0), counted, out=np.zeros(rates.shape[1]), where=counted > 0)


def _choose_genes(rates: np.ndarray, measured: np.ndarray, n_genes: int) -> np.ndarray:
    """Return the genes with the most counts that at least two patients, or all there are, have measured."""
    mean = _mean_rate(rates, measured)
    known = np.flatnonzero((measured.sum(axis=0) >= min(2, len(measured))) & (mean > 0))
    return np.sort(known[np.argsort(-mean[known], kind="stable")][:n_genes])


def _fit_profile(parts: Sequence[_Part], index: np.ndarray, n_components: int) -> _Profile:
    """Mean and leading components of niche expression; a gene that a section did not measure is at its mean there."""
    rate = _mean_rate(*_rates(parts))[index]
    profile = _Profile(index, rate, np.zeros((len(index), 0)), np.zeros(0))
    blocks = []
    for part in parts:
        counts = part.sample.niche
        n = counts.shape[0]  # type: ignore[union-attr]
        rows = np.unique(np.linspace(0, n - 1, max(2, min(n, _FIT_ROWS // len(parts)))).round().astype(np.intp))
        here = np.flatnonzero(part.sample.measured[index])  # type: ignore[index]
        values = np.zeros((len(rows), len(index)), dtype=np.float32)
        if len(here):
            own = counts[rows][:, index[here]]  # type: ignore[index]
            values[:, here] = normalise_log1p(own, target_sum=_TARGET).toarray() - profile.mean(here)
        blocks.append(values)
    weights = _weights(parts, [len(block) for block in blocks])
    values = np.concatenate(blocks) * np.sqrt(weights).astype(np.float32)[:, None]
    rank = max(1, min(n_components, min(values.shape) - 1))
    components, variances = _leading(values, rank)
    wide = np.zeros((len(index), n_components))
    wide[:, :rank] = components
    return profile._replace(components=wide, variances=np.pad(variances, (0, n_components - rank)))


def _leading(values: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Leading right singular vectors (genes, rank), and their squared singular values."""
    from scipy.sparse.linalg import svds

    if min(values.shape) <= 3 * rank:
        _, singular, right = np.linalg.svd(values.astype(np.float64), full_matrices=False)
        return right[:rank].T, singular[:rank] ** 2
    start = np.ones(min(values.shape))
    _, singular, right = svds(values, k=rank, v0=start, solver="arpack")
    order = np.argsort(-singular)
    return right[order].T.astype(np.float64), singular[order].astype(np.float64) ** 2


def _at_both_scales(profile: _Profile, sample: SectionSample) -> np.ndarray:
    """Return (2, m) logits of spots and niches, for the spots that have both."""
    pair = [profile.unexplained(counts, sample.measured) for counts in (sample.spot, sample.niche)]  # type: ignore[arg-type]
    values = np.stack(pair)
    return values[:, ~np.isnan(values).any(axis=0)]


def _splits(parts: Sequence[_Part]) -> Iterator[tuple[list[_Part], list[_Part]]]:
    """Yield what is known and what is left out: each fold in turn, and for each of them a quarter of every section.

    So half of the held-out spots are of patients that are not known, and half of places that are not.
    """
    folds = sorted({part.fold for part in parts})
    for fold in folds if len(folds) > 1 else ():
        yield [part for part in parts if part.fold != fold], [part for part in parts if part.fold == fold]
    cut = [(part, list(_quarters(part.sample))) for part in parts]
    known = [part._replace(sample=quarter) for part, quarters in cut for quarter in quarters[:1] + quarters[2:]]
    left = [part._replace(sample=quarters[1]) for part, quarters in cut if len(quarters) > 1]
    if known and left:
        yield known, left


def _fit_image(parts: Sequence[_Part]) -> dict[str, np.ndarray]:
    """Return the buffers of the image side; the samples' patches are replaced by their appearance."""
    mean, whitening = _fit_cloud(parts)
    held_out: list[np.ndarray] = []
    owners: list[_Part] = []
    for known, left in _splits(parts):
        cloud = _fit_cloud(known)
        owners += left
        held_out += [_log_distance(_described(part), *cloud) for part in left]
    scale = _moments(np.concatenate(held_out), _weights(owners, [len(values) for values in held_out]))
    return {"image_mean": mean, "image_whitening": whitening, "image_scale": np.array(scale)}


def _described(part: _Part) -> np.ndarray:
    return np.asarray(part.sample.patches, dtype=np.float64)


def _fit_cloud(parts: Sequence[_Part]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and a matrix that whitens the differences from it."""
    values = [_described(part) for part in parts]
    weights = _weights(parts, [len(part) for part in values])
    joined = np.concatenate(values)
    mean = weights @ joined
    centred = joined - mean
    covariance = (centred * weights[:, None]).T @ centred
    covariance += np.diag(_BETWEEN_SLIDES**2)
    return mean, np.linalg.cholesky(np.linalg.inv(covariance))
