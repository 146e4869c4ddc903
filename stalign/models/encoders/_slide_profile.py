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
from stalign.genes import library_size, normalise_log1p, row_normalise
from stalign.genes._halves import split_counts
from stalign.genes._sample import sample_patches
from stalign.models.encoders._base import GeneEncoder, Level
from stalign.models.encoders._kernels import learn_weights, smooth

STEPS = (0, 1, 2, 4, 8)
"""Steps on the niche graph over which components may be averaged."""

_POWER_ITERATIONS = 4
_LEARNING_ROUNDS = 2
_LEARNING_COMPONENTS = 20
_OVERSAMPLING = 10
# Where fewer genes than this are spatial beyond doubt, all that lean that way have a part.
_FEW_GENES = 30
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
    loadings
        (k, r) from log-normalised expression to the slide's components.
    spot_weights, niche_weights
        (5,) by how much the components of walks of each number of :data:`STEPS` enter the profile of a spot, or of a
        niche.
    directions
        (r, input_dim) from the components to the encoder's input.
    """

    genes: np.ndarray
    ceiling: np.ndarray
    loadings: np.ndarray
    spot_weights: np.ndarray
    niche_weights: np.ndarray
    directions: np.ndarray

    @property
    def gene_map(self) -> np.ndarray:
        """(k, input_dim) what log-normalised expression of each gene adds to the encoder's input, but for its scale."""
        return self.loadings @ self.directions


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
    log1p. Each gene is divided by its standard deviation and weighted by its autocorrelation: Moran's I over the niche
    graph without the spot itself, less ``min_z`` standard errors of chance, to the ``power``; the
    ``n_genes`` with the highest are kept. The leading components of what is smooth over the tissue are taken, and
    averaged over walks on the niche graph of 0, 1, 2, 4 and 8 steps. By how much each of these enters is learned from
    the slide: the counts are split into two independent halves, and the weights are those with which one half predicts
    the other best, its spots for the profile of a spot and its niche means for that of a niche. So a slide with deep
    counts and fine structure is averaged little, a shallow one with broad layers much. The components are laid along
    the fixed directions of their genes, so that slides with different genes land in one space. The directions of a
    slide's components are turned against each other as little as makes them orthogonal, so that distances are kept
    exactly.

    Parameters
    ----------
    vocabulary
        Gene symbols.
    dim
        Width of the profile and of the output.
    hidden
        Width of the residual network's hidden layer.
    n_components
        Leading components that are kept.
    n_genes
        Genes of a slide that have a part in its components, at most.
    min_z
        Standard errors of chance that are taken off a gene's autocorrelation. Genes of which chance alone could be the
        cause are many, and together they say more than they cost; 0 keeps all that lean to the spatial side.
    power
        Power of what is left that weights a gene: the lower, the less the few genes that stand out rule the profile.
    max_fit
        Spots that a slide's statistics are taken from, at most; of a larger slide, those of patches spread over it.
    seed
        Seed of the genes' directions and of the randomised decomposition.
    """

    spreads = True

    def __init__(
        self,
        *,
        vocabulary: Sequence[str] = (),
        dim: int = 256,
        hidden: int = 256,
        n_components: int = 32,
        n_genes: int = 5000,
        min_z: float = 0.0,
        power: float = 0.25,
        max_fit: int = 20_000,
        seed: int = 0,
    ) -> None:
        super().__init__(vocabulary=vocabulary)
        self.dim = self.input_dim = check_positive("dim", dim, integer=True)
        self.n_components = check_positive("n_components", n_components, integer=True)
        self.n_genes = check_positive("n_genes", n_genes, integer=True)
        if isinstance(min_z, bool) or not np.isfinite(min_z) or min_z < 0:
            raise ValueError(f"min_z must be a number >= 0, got {min_z!r}.")
        self.min_z = float(min_z)
        self.power = check_positive("power", power)
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
        level: Level = "niche",
    ) -> np.ndarray:
        """Turn the raw counts of whole slides into profiles; see :meth:`GeneEncoder.preprocess`.

        Parameters
        ----------
        counts, connectivities, library
            As in :meth:`GeneEncoder.preprocess`. Without a graph nothing is averaged.
        statistics
            What :meth:`fit` returned for these slides.
        level
            ``"spot"`` or ``"niche"``: whose profiles.
        """
        n = counts.shape[0]
        library = np.zeros(n, dtype=np.intp) if library is None else library
        graph = sp.identity(n, dtype=np.float32, format="csr") if connectivities is None else connectivities
        statistics = self.fit(counts, connectivities=graph, library=library) if statistics is None else statistics
        profile = np.zeros((n, self.input_dim), dtype=np.float32)
        for code in np.unique(library):
            rows = np.flatnonzero(library == code)
            slide = {0: statistics[int(code)]}
            whole = len(rows) == n
            scores = self.reduce(counts if whole else counts[rows], statistics=slide)
            spread = self.spread(
                scores, connectivities=graph if whole else graph[rows][:, rows], statistics=slide, level=level
            )
            profile[rows] = self.expand(spread, statistics=slide)
        return profile

    # -- a slide in three steps --------------------------------------------------------------------------------------

    def reduce(self, counts: sp.csr_matrix, *, statistics: dict[int, SlideStatistics]) -> np.ndarray:
        """Return the (n, r) components of each spot of a slide."""
        slide = _only(statistics)
        expression = _cut(normalise_log1p(counts)[:, slide.genes], slide.ceiling)
        return np.asarray(expression @ slide.loadings, dtype=np.float32)

    def spread(
        self,
        scores: np.ndarray,
        *,
        connectivities: sp.csr_matrix,
        statistics: dict[int, SlideStatistics],
        level: Level,
    ) -> np.ndarray:
        """Return the (n, r) components averaged over the niche graph, centred, at a mean norm of sqrt(input_dim)."""
        slide = _only(statistics)
        weights = slide.spot_weights if level == "spot" else slide.niche_weights
        averaged = _centred(smooth(connectivities.astype(np.float32), _centred(scores), STEPS, weights))
        return averaged * np.float32(self._unit_factor(averaged))

    def expand(self, scores: np.ndarray, *, statistics: dict[int, SlideStatistics]) -> np.ndarray:
        """Return the (m, input_dim) profiles of some averaged components."""
        return np.asarray(scores @ _only(statistics).directions, dtype=np.float32)

    # -- statistics of one slide -------------------------------------------------------------------------------------

    def _bounded(self, counts: sp.csr_matrix, graph: sp.csr_matrix) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Return the counts and the graph of a sample of a large slide."""
        if counts.shape[0] <= self.max_fit:
            return counts, graph
        order = np.lexsort((np.diff(counts.indptr), library_size(counts)))
        spots = sample_patches(graph, order, self.max_fit)
        return counts[spots], row_normalise(graph[spots][:, spots])

    def _fit_slide(self, counts: sp.csr_matrix, graph: sp.csr_matrix) -> SlideStatistics:
        graph = graph.astype(np.float32)
        genes, ceiling, scale, expression = self._spatial_genes(normalise_log1p(counts), graph)
        start = self._start_of(genes)
        niche_weights, spot_weights = _learn_smoothing(counts, genes, scale, graph, start)
        rank = min(self.n_components, len(genes), max(counts.shape[0] - 1, 1))
        components = _leading_components(expression, scale, graph, niche_weights, start, rank)
        loadings = (scale[:, None] * components).astype(np.float32)
        directions = _isometry(components.T @ self._table()[genes]).astype(np.float32)
        return SlideStatistics(
            genes=genes,
            ceiling=ceiling,
            loadings=loadings,
            spot_weights=spot_weights,
            niche_weights=niche_weights,
            directions=directions,
        )

    def _spatial_genes(
        self, expression: sp.csr_matrix, graph: sp.csr_matrix
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, sp.csr_matrix]:
        """Return the genes that vary over the tissue, the ceiling and the weighted scale of each, and their values."""
        n_spots = expression.shape[0]
        detected = np.bincount(expression.indices, minlength=expression.shape[1])
        genes = np.flatnonzero(detected >= max(min(10, n_spots / 4), 0.01 * n_spots))
        expression = expression[:, genes]
        mean, sd = _moments(expression)
        ceiling = (mean + 10 * sd).astype(np.float32)
        expression = _cut(expression, ceiling)
        sd = _moments(expression)[1]
        correlation, error = autocorrelation(graph, expression)
        weight = np.maximum(correlation - self.min_z * error, 0.0) ** self.power
        if np.count_nonzero(weight) < _FEW_GENES:
            weight = np.maximum(correlation, 0.0) ** self.power
        if not weight.any():
            weight = np.ones(len(genes))
        scale = _safe_ratio(weight, sd)
        used = np.sort(np.argsort(-weight, kind="stable")[: self.n_genes])
        used = used[scale[used] > 0]
        return genes[used], ceiling[used], scale[used].astype(np.float32), expression[:, used]

    # -- scale -------------------------------------------------------------------------------------------------------

    def _table(self) -> np.ndarray:
        return gene_table(len(self.vocabulary), self.input_dim, self.seed)

    def _start_of(self, genes: np.ndarray) -> np.ndarray:
        """Directions in which decompositions start, so that neither the order of the spots nor chance changes them."""
        width = min(max(self.n_components, _LEARNING_COMPONENTS) + _OVERSAMPLING, len(genes))
        return np.linalg.qr(_start(len(self.vocabulary), width, self.seed + 1)[genes])[0].astype(np.float32)

    def _unit_factor(self, profile: np.ndarray) -> float:
        """Factor that gives the rows a mean norm of sqrt(dim), which is what the network is made for."""
        norm = float(np.linalg.norm(profile, axis=1).mean()) if len(profile) else 0.0
        return float(np.sqrt(self.input_dim)) / norm if norm > 0 else 1.0

    def _to_unit_scale(self, profile: np.ndarray) -> np.ndarray:
        return (profile * self._unit_factor(profile[None])).astype(np.float32)


def autocorrelation(graph: sp.csr_matrix, expression: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return Moran's I of each gene without the spots' own values, and its standard error where nothing is spatial.

    The error is that of independent values (Cliff and Ord, *Spatial Processes*, 1981), but for terms of the order of
    one over the number of spots.

    Parameters
    ----------
    graph
        (n, n) row-stochastic niche graph, self included.
    expression
        (n, k).

    Returns
    -------
    (k,) and (k,) float64; zeros where a graph has nothing but the spots themselves.
    """
    n_spots, n_genes = expression.shape
    own = graph.diagonal().astype(np.float64)
    others = graph.nnz and float(graph.sum() - own.sum())
    if others <= 1e-6 * max(n_spots, 1):
        return np.zeros(n_genes), np.zeros(n_genes)
    mean, sd = _moments(expression)
    products = _niche_products(graph, expression, mean)
    columns = sp.csc_matrix(expression)
    # What the spots' own values add to the products: the weight that a spot has in its niche hardly varies.
    squares = np.asarray(columns.multiply(columns).T @ own).ravel() - 2 * mean * (columns.T @ own) + mean**2 * own.sum()
    scatter = sd**2 * n_spots
    correlation = _safe_ratio((products - squares) * n_spots, scatter * others)
    both = graph + graph.T
    error = np.sqrt(max(float(both.multiply(both).sum()) - 4 * float((own**2).sum()), 0.0) / 2) / others
    return correlation, np.full(n_genes, error)


def _niche_products(graph: sp.csr_matrix, expression: sp.csr_matrix, mean: np.ndarray) -> np.ndarray:
    """Sum over spots of each gene's deviation times its mean deviation over the niche, block by block of genes."""
    n_spots, n_genes = expression.shape
    products = np.zeros(n_genes)
    columns = sp.csc_matrix(expression)
    share = np.diff(columns.indptr) / max(n_spots, 1)
    for genes in _gene_blocks(np.flatnonzero(share > _DENSE), n_spots):
        deviation = columns[:, genes].toarray(order="C") - mean[genes].astype(np.float32)
        products[genes] = np.einsum("ij,ij->j", deviation, graph @ deviation, dtype=np.float64)
    sent, received = (np.asarray(graph.sum(axis=axis), dtype=np.float64).ravel() for axis in (0, 1))
    for genes in _gene_blocks(np.flatnonzero(share <= _DENSE), n_spots * _DENSE):
        values = sp.csr_matrix(columns[:, genes])
        raw = np.asarray(values.multiply(graph @ values).sum(axis=0), dtype=np.float64).ravel()
        # Most niches hold none of such a gene: the mean is small, and nothing cancels out.
        crossed = values.T @ (sent + received)
        products[genes] = raw - mean[genes] * crossed + mean[genes] ** 2 * received.sum()
    return products


def _learn_smoothing(
    counts: sp.csr_matrix, genes: np.ndarray, scale: np.ndarray, graph: sp.csr_matrix, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of :data:`STEPS` for niches, and for spots, with which half of the counts predicts the other.

    A niche's own spots always have a part in its mean, so that the shortest step there is one.
    """
    niche, spot = np.array([0.0, 1.0, 0.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    if not len(genes) or not counts.shape[0]:
        return niche, spot
    first, second = (_halved(half, counts) for half in split_counts(counts[:, genes]))
    for _ in range(_LEARNING_ROUNDS):
        basis = start[:, : min(_LEARNING_COMPONENTS + _OVERSAMPLING, start.shape[1])]
        rank = min(_LEARNING_COMPONENTS, basis.shape[1])
        components = _leading_components(first, scale, graph, niche, basis, rank, iterations=2)
        seen, unseen = (_centred(half @ (scale[:, None] * components)) for half in (first, second))
        niche = np.append(0.0, learn_weights(graph, seen, graph @ unseen, STEPS[1:]))
    return niche, learn_weights(graph, seen, unseen, STEPS)


def _halved(half: sp.csr_matrix, counts: sp.csr_matrix) -> sp.csr_matrix:
    """Log-normalise half of some counts; what is absurdly high is cut."""
    total = np.maximum(library_size(counts) / 2, 1)
    data = np.log1p(half.data * np.repeat(1e4 / total, np.diff(half.indptr)).astype(np.float32))
    expression = sp.csr_matrix((data, half.indices, half.indptr), shape=half.shape)
    mean, sd = _moments(expression)
    return _cut(expression, (mean + 10 * sd).astype(np.float32))


def _leading_components(
    expression: sp.csr_matrix,
    scale: np.ndarray,
    graph: sp.csr_matrix,
    weights: np.ndarray,
    start: np.ndarray,
    rank: int,
    *,
    iterations: int = _POWER_ITERATIONS,
) -> np.ndarray:
    """Leading right singular vectors (k, rank) of the scaled and smoothed expression, which is never formed.

    Randomised subspace iteration (Halko, Martinsson and Tropp, SIAM Review 53:217, 2011).
    """
    backwards, transposed = graph.T.tocsr(), expression.T.tocsr()
    mean = np.asarray(expression.mean(axis=0), dtype=np.float32).ravel()

    def forward(directions: np.ndarray) -> np.ndarray:
        scaled = (scale[:, None] * directions).astype(np.float32)
        return _centred(smooth(graph, expression @ scaled - mean @ scaled, STEPS, weights))

    def backward(scores: np.ndarray) -> np.ndarray:
        spread = smooth(backwards, _centred(scores), STEPS, weights)
        return scale[:, None] * (transposed @ spread - np.outer(mean, spread.sum(axis=0)))

    basis = start
    for _ in range(iterations):
        basis = np.linalg.qr(backward(forward(basis)))[0]
    _, _, rotation = np.linalg.svd(forward(basis), full_matrices=False)
    return basis @ rotation[:rank].T


def _centred(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores - scores.mean(axis=0), dtype=np.float32) if len(scores) else scores


def _only(statistics: dict[int, SlideStatistics]) -> SlideStatistics:
    (slide,) = statistics.values()
    return slide


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


def _gene_blocks(genes: np.ndarray, values_per_gene: float) -> Iterator[np.ndarray]:
    size = max(16, int(_BLOCK / max(values_per_gene, 1)))
    for start in range(0, len(genes), size):
        yield genes[start : start + size]
