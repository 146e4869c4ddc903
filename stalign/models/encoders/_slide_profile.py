"""Expression compared with the rest of its slide: what varies over the tissue, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from stalign._validate import check_positive
from stalign.genes import library_size, normalise_log1p
from stalign.genes._sample import sample_niches
from stalign.models.encoders._base import GeneEncoder

_POWER_ITERATIONS = 4
_OVERSAMPLING = 10
# Values of a dense block of niche means: a megabyte, which stay in the processor's cache.
_BLOCK = 1 << 18
# Genes detected in more than this share of the spots are averaged over niches as dense columns: a dense column costs
# as much as a sparse one that holds this share.
_DENSE = 0.02


class SlideStatistics(NamedTuple):
    """What :class:`SlideProfile` learns from one slide; no label enters.

    Attributes
    ----------
    genes
        (k,) places in the vocabulary of the genes that have a weight.
    ceiling
        (k,) log-normalised expression above which a value is cut.
    spot_loadings, niche_loadings
        (k, r) from log-normalised expression of a spot, or of a niche, to the slide's components.
    spot_shift, niche_shift
        (r,) subtracted afterwards: the components of the slide's mean.
    directions
        (r, input_dim) from the components to the encoder's input.
    """

    genes: np.ndarray
    ceiling: np.ndarray
    spot_loadings: np.ndarray
    niche_loadings: np.ndarray
    spot_shift: np.ndarray
    niche_shift: np.ndarray
    directions: np.ndarray

    @property
    def spot_map(self) -> np.ndarray:
        """(k, input_dim) from log-normalised expression of a spot to the encoder's input."""
        return self.spot_loadings @ self.directions

    @property
    def niche_map(self) -> np.ndarray:
        """(k, input_dim) from log-normalised expression of a niche to the encoder's input."""
        return self.niche_loadings @ self.directions


@lru_cache(maxsize=4)
def gene_table(n_genes: int, dim: int, seed: int) -> np.ndarray:
    """Return (n_genes, dim) float32 random directions, one a gene, nearly orthogonal to each other.

    They need not be stored: the legacy generator's stream is fixed for good by NumPy's compatibility policy.
    """
    table = np.random.RandomState(seed).standard_normal((n_genes, dim)) / np.sqrt(dim)
    table = table.astype(np.float32)
    table.flags.writeable = False
    return table


@lru_cache(maxsize=4)
def _start(n_genes: int, width: int, seed: int) -> np.ndarray:
    """Return the (n_genes, width) directions in which the decomposition starts, the same for a gene on all slides."""
    start = np.random.RandomState(seed).standard_normal((n_genes, width))
    start.flags.writeable = False
    return start


class SlideProfile(GeneEncoder):
    """Slide-relative expression profile, then a small residual network.

    Every step before the network uses the slide's own statistics and no label. Counts are normalised to 10,000 and
    log1p; each gene becomes a z-score over the slide's niches (or spots), weighted by how much of its variance
    survives averaging over a niche (above what noise alone would leave); the profile is projected onto the slide's
    leading niche components, which removes what does not vary over tissue; and the components are laid along the fixed
    directions of their genes, so that slides with different genes land in one space. The directions of a slide's
    components are turned against each other as little as makes them orthogonal, so that distances are kept exactly.

    Parameters
    ----------
    vocabulary
        Gene symbols.
    dim
        Width of the profile and of the output.
    hidden
        Width of the residual network's hidden layer.
    n_components
        Leading niche components that are kept.
    noise_floor
        Multiple of the variance share that pure noise keeps in a niche mean; genes below it get no weight.
    max_fit
        Spots that a slide's statistics are taken from, at most; of a larger slide, those of niches spread over it.
    seed
        Seed of the genes' directions and of the randomised decomposition.
    """

    def __init__(
        self,
        *,
        vocabulary: Sequence[str] = (),
        dim: int = 256,
        hidden: int = 256,
        n_components: int = 32,
        noise_floor: float = 1.5,
        max_fit: int = 20_000,
        seed: int = 0,
    ) -> None:
        super().__init__(vocabulary=vocabulary)
        self.dim = self.input_dim = check_positive("dim", dim, integer=True)
        self.n_components = check_positive("n_components", n_components, integer=True)
        self.noise_floor = check_positive("noise_floor", noise_floor)
        self.max_fit = check_positive("max_fit", max_fit, integer=True)
        self.seed = seed
        self.adapter = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, dim)
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map (n, input_dim) profiles to (n, dim)."""
        return values + self.adapter(values)

    def prompt(self, gene_index: np.ndarray) -> np.ndarray:
        """Return the profile of a spot in which just these genes are high."""
        return self._to_unit_scale(self._table()[gene_index].sum(axis=0))

    def fit(
        self, counts: sp.csr_matrix, *, connectivities: sp.csr_matrix, library: np.ndarray | None = None
    ) -> dict[int, SlideStatistics]:
        """Take the statistics of every slide; see :class:`SlideStatistics`.

        Parameters
        ----------
        counts, connectivities, library
            As in :meth:`preprocess`; the graph is needed here.
        """
        library = np.zeros(counts.shape[0], dtype=np.intp) if library is None else library
        statistics = {}
        codes = np.unique(library)
        for code in codes:
            rows = np.flatnonzero(library == code)
            slide, graph = counts, connectivities
            if len(codes) > 1:
                slide, graph = counts[rows], connectivities[rows][:, rows]
            statistics[int(code)] = self._fit_slide(*self._bounded(slide, graph))
        return statistics

    @property
    def fit_limit(self) -> int:
        """Spots of a slide that :meth:`fit` looks at, at most."""
        return self.max_fit

    def preprocess(
        self,
        counts: sp.csr_matrix,
        *,
        connectivities: sp.csr_matrix | None = None,
        library: np.ndarray | None = None,
        statistics: dict[int, SlideStatistics] | None = None,
    ) -> np.ndarray:
        """Turn raw counts into profiles; see :meth:`GeneEncoder.preprocess`.

        Parameters
        ----------
        counts, connectivities, library
            As in :meth:`GeneEncoder.preprocess`.
        statistics
            What :meth:`fit` returned for these slides. Without it the niches are the spots themselves where no graph
            is given.
        """
        n = counts.shape[0]
        library = np.zeros(n, dtype=np.intp) if library is None else library
        if statistics is None:
            graph = sp.identity(n, dtype=np.float32, format="csr") if connectivities is None else connectivities
            statistics = self.fit(counts, connectivities=graph, library=library)
        codes = np.unique(library)
        if len(codes) == 1:
            return _profile(counts, connectivities, statistics[int(codes[0])])
        profile = np.zeros((n, self.input_dim), dtype=np.float32)
        for code in codes:
            rows = np.flatnonzero(library == code)
            own = None if connectivities is None else connectivities[rows][:, rows]
            profile[rows] = _profile(counts[rows], own, statistics[int(code)])
        return profile

    # -- statistics of one slide -------------------------------------------------------------------------------------

    def _bounded(self, counts: sp.csr_matrix, graph: sp.csr_matrix) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Return a sample of a large slide: some niches, and the counts of their spots."""
        if counts.shape[0] <= self.max_fit or graph.shape[0] != graph.shape[1]:
            return counts, graph
        order = np.lexsort((np.diff(counts.indptr), library_size(counts)))
        niches, spots = sample_niches(graph, order, self.max_fit)
        return counts[spots], graph[niches][:, spots]

    def _fit_slide(self, counts: sp.csr_matrix, graph: sp.csr_matrix) -> SlideStatistics:
        expression = normalise_log1p(counts)
        n_spots = expression.shape[0]
        detected = np.bincount(expression.indices, minlength=expression.shape[1])
        genes = np.flatnonzero(detected >= max(min(10, n_spots / 4), 0.01 * n_spots))
        expression = expression[:, genes]
        spot_mean, spot_sd = _moments(expression)
        ceiling = (spot_mean + 10 * spot_sd).astype(np.float32)
        expression = _cut(expression, ceiling)
        niche_mean, niche_sd = _niche_moments(graph, expression)
        weight = self._spatial_weight(graph, spot_sd, niche_sd)
        # What has no weight has no part in anything that follows.
        used = np.flatnonzero(weight)
        genes, ceiling, weight, expression = genes[used], ceiling[used], weight[used], expression[:, used]
        spot_mean, spot_sd, niche_mean, niche_sd = (v[used] for v in (spot_mean, spot_sd, niche_mean, niche_sd))
        spot_scale, niche_scale = _safe_ratio(weight, spot_sd), _safe_ratio(weight, niche_sd)
        components = self._components(graph, expression, niche_mean, niche_scale, genes)
        directions = _isometry(components.T @ self._table()[genes])
        spot_loadings = (spot_scale[:, None] * components).astype(np.float32)
        niche_loadings = (niche_scale[:, None] * components).astype(np.float32)
        spot_shift, niche_shift = spot_mean @ spot_loadings, niche_mean @ niche_loadings
        spot_factor = self._unit_factor((expression @ spot_loadings - spot_shift) @ directions)
        niche_factor = self._unit_factor((graph @ (expression @ niche_loadings) - niche_shift) @ directions)
        return SlideStatistics(
            genes=genes,
            ceiling=ceiling,
            spot_loadings=spot_loadings * np.float32(spot_factor),
            niche_loadings=niche_loadings * np.float32(niche_factor),
            spot_shift=(spot_shift * spot_factor).astype(np.float32),
            niche_shift=(niche_shift * niche_factor).astype(np.float32),
            directions=directions.astype(np.float32),
        )

    def _spatial_weight(self, graph: sp.csr_matrix, spot_sd: np.ndarray, niche_sd: np.ndarray) -> np.ndarray:
        """Share of a gene's variance that survives averaging over a niche, above the share that noise would keep."""
        survives = _safe_ratio(niche_sd, spot_sd) ** 2
        # The mean of m independent values keeps 1/m of their variance; the sum of squared weights is that 1/m.
        noise = float(graph.multiply(graph).sum()) / max(graph.shape[0], 1)
        weight = np.maximum(survives - self.noise_floor * noise, 0.0)
        return weight if weight.any() else survives

    def _components(
        self,
        graph: sp.csr_matrix,
        expression: sp.csr_matrix,
        mean: np.ndarray,
        scale: np.ndarray,
        genes: np.ndarray,
    ) -> np.ndarray:
        """Leading right singular vectors (k, r) of the weighted niche z-scores, which are never formed.

        Randomised subspace iteration (Halko, Martinsson and Tropp, SIAM Review 53:217, 2011). It starts from the genes'
        own directions, so neither the order of the spots nor chance changes the result.
        """
        rank = min(self.n_components, len(genes), max(graph.shape[0] - 1, 1))
        width = min(rank + _OVERSAMPLING, len(genes))
        basis = np.linalg.qr(_start(len(self.vocabulary), width, self.seed + 1)[genes])[0]
        expression = expression.astype(np.float32)
        graph, transposed = graph.astype(np.float32), (expression.T.tocsr(), graph.T.tocsr().astype(np.float32))

        def forward(directions: np.ndarray) -> np.ndarray:
            scaled = scale[:, None] * directions
            return graph @ (expression @ scaled.astype(np.float32)) - mean @ scaled

        def backward(scores: np.ndarray) -> np.ndarray:
            raw = transposed[0] @ (transposed[1] @ scores.astype(np.float32)) - np.outer(mean, scores.sum(axis=0))
            return scale[:, None] * raw

        for _ in range(_POWER_ITERATIONS):
            basis = np.linalg.qr(backward(forward(basis)))[0]
        _, _, rotation = np.linalg.svd(forward(basis), full_matrices=False)
        return basis @ rotation[:rank].T

    # -- scale -------------------------------------------------------------------------------------------------------

    def _table(self) -> np.ndarray:
        return gene_table(len(self.vocabulary), self.input_dim, self.seed)

    def _unit_factor(self, profile: np.ndarray) -> float:
        """Factor that gives the rows a mean norm of sqrt(dim), which is what the network is made for."""
        norm = float(np.linalg.norm(profile, axis=1).mean()) if len(profile) else 0.0
        return float(np.sqrt(self.input_dim)) / norm if norm > 0 else 1.0

    def _to_unit_scale(self, profile: np.ndarray) -> np.ndarray:
        return (profile * self._unit_factor(profile[None])).astype(np.float32)


def _isometry(matrix: np.ndarray) -> np.ndarray:
    """Nearest matrix (r, d) with orthonormal rows (the polar factor)."""
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _cut(expression: sp.csr_matrix, ceiling: np.ndarray) -> sp.csr_matrix:
    """Cut each gene at its ceiling: one spot with an absurd value must not make a component of its own."""
    cut = sp.csr_matrix(expression, copy=True)
    np.minimum(cut.data, ceiling[cut.indices], out=cut.data)
    return cut


def _safe_ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 1e-6)


def _column_sums(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    values = matrix.data.astype(np.float64)
    size = matrix.shape[1]
    return (
        np.bincount(matrix.indices, weights=values, minlength=size),
        np.bincount(matrix.indices, weights=values**2, minlength=size),
    )


def _moments(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column."""
    total, squares = _column_sums(matrix)
    return _from_sums(total, squares, matrix.shape[0])


def _from_sums(total: np.ndarray, squares: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    mean = total / max(n, 1)
    return mean, np.sqrt(np.maximum(squares / max(n, 1) - mean**2, 0.0))


def _niche_moments(graph: sp.csr_matrix, expression: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each gene over the niches, block by block, since niche means are hardly sparse."""
    n_niches, n_genes = graph.shape[0], expression.shape[1]
    # The mean over niches is a weighted mean over spots.
    mean = expression.T @ np.asarray(graph.sum(axis=0), dtype=np.float64).ravel() / max(n_niches, 1)
    squares = np.zeros(n_genes)
    columns = sp.csc_matrix(expression)
    share = np.diff(columns.indptr) / max(columns.shape[0], 1)
    for genes in _gene_blocks(np.flatnonzero(share > _DENSE), max(graph.shape)):
        deviation = graph @ columns[:, genes].toarray(order="C") - mean[genes].astype(np.float32)
        squares[genes] = np.einsum("ij,ij->j", deviation, deviation)
    for genes in _gene_blocks(np.flatnonzero(share <= _DENSE), max(graph.shape) * _DENSE):
        niches = sp.csr_matrix(graph @ sp.csr_matrix(columns[:, genes]))
        raw = np.bincount(niches.indices, weights=niches.data**2, minlength=len(genes))
        # Most niches hold none of such a gene: the mean is small, and nothing cancels out.
        squares[genes] = np.maximum(raw - n_niches * mean[genes] ** 2, 0.0)
    return mean, np.sqrt(squares / max(n_niches, 1))


def _gene_blocks(genes: np.ndarray, values_per_gene: float) -> Iterator[np.ndarray]:
    size = max(16, int(_BLOCK / max(values_per_gene, 1)))
    for start in range(0, len(genes), size):
        yield genes[start : start + size]


def _profile(counts: sp.csr_matrix, graph: sp.csr_matrix | None, slide: SlideStatistics) -> np.ndarray:
    """Profiles of the spots, or with a graph (m, n) those of the m niches that it describes."""
    expression = _cut(normalise_log1p(counts)[:, slide.genes], slide.ceiling)
    if graph is None:
        scores = expression @ slide.spot_loadings - slide.spot_shift
    else:
        scores = graph @ (expression @ slide.niche_loadings) - slide.niche_shift
    return np.asarray(scores @ slide.directions, dtype=np.float32)
