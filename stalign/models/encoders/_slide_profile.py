"""Expression compared with the rest of its slide: what varies over the tissue, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from stalign._validate import check_positive
from stalign.genes import normalise_log1p
from stalign.models.encoders._base import GeneEncoder

_ROWS_PER_CHUNK = 2048
_POWER_ITERATIONS = 4
_OVERSAMPLING = 10


class SlideStatistics(NamedTuple):
    """What :class:`SlideProfile` learns from one slide; no label enters.

    Attributes
    ----------
    genes
        (k,) places in the vocabulary of the genes that are used.
    ceiling
        (k,) log-normalised expression above which a value is cut.
    spot_map, niche_map
        (k, input_dim) from log-normalised expression of a spot, or of a niche, to the encoder's input.
    spot_shift, niche_shift
        (input_dim,) subtracted afterwards: the image of the slide's mean.
    """

    genes: np.ndarray
    ceiling: np.ndarray
    spot_map: np.ndarray
    niche_map: np.ndarray
    spot_shift: np.ndarray
    niche_shift: np.ndarray


@lru_cache(maxsize=4)
def gene_table(n_genes: int, dim: int, seed: int) -> np.ndarray:
    """Return (n_genes, dim) float32 random directions, one a gene, nearly orthogonal to each other.

    They need not be stored: the legacy generator's stream is fixed for good by NumPy's compatibility policy.
    """
    table = np.random.RandomState(seed).standard_normal((n_genes, dim)) / np.sqrt(dim)
    table = table.astype(np.float32)
    table.flags.writeable = False
    return table


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
        Niches that the slide's statistics are taken from, at most.
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
        for code in np.unique(library):
            rows = np.flatnonzero(library == code)
            statistics[int(code)] = self._fit_slide(counts[rows], connectivities[rows][:, rows])
        return statistics

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
        profile = np.zeros((n, self.input_dim), dtype=np.float32)
        for code, slide in statistics.items():
            rows = np.flatnonzero(library == code)
            expression = _cut(normalise_log1p(counts[rows])[:, slide.genes], slide.ceiling)
            if connectivities is None:
                profile[rows] = expression @ slide.spot_map - slide.spot_shift
            else:
                profile[rows] = connectivities[rows][:, rows] @ (expression @ slide.niche_map) - slide.niche_shift
        return profile

    # -- statistics of one slide -------------------------------------------------------------------------------------

    def _fit_slide(self, counts: sp.csr_matrix, graph: sp.csr_matrix) -> SlideStatistics:
        expression = normalise_log1p(counts)
        n_spots = expression.shape[0]
        detected = np.bincount(expression.indices, minlength=expression.shape[1])
        genes = np.flatnonzero(detected >= max(min(10, n_spots / 4), 0.01 * n_spots))
        expression = expression[:, genes]
        spot_mean, spot_sd = _moments(expression)
        ceiling = (spot_mean + 10 * spot_sd).astype(np.float32)
        expression = _cut(expression, ceiling)
        sample = _spread_rows(expression, self.max_fit)
        niche_graph = graph[sample]
        niche_mean, niche_sd = _niche_moments(niche_graph, expression)
        weight = self._spatial_weight(niche_graph, spot_sd, niche_sd)
        spot_scale, niche_scale = _safe_ratio(weight, spot_sd), _safe_ratio(weight, niche_sd)
        components = self._components(niche_graph, expression, niche_mean, niche_scale, genes)
        to_input = components @ _isometry(components.T @ self._table()[genes])
        spot_map, niche_map = spot_scale[:, None] * to_input, niche_scale[:, None] * to_input
        spot_shift, niche_shift = spot_mean @ spot_map, niche_mean @ niche_map
        spot_factor = self._unit_factor(expression[sample] @ spot_map - spot_shift)
        niche_factor = self._unit_factor(niche_graph @ (expression @ niche_map) - niche_shift)
        return SlideStatistics(
            genes=genes,
            ceiling=ceiling,
            spot_map=(spot_map * spot_factor).astype(np.float32),
            niche_map=(niche_map * niche_factor).astype(np.float32),
            spot_shift=(spot_shift * spot_factor).astype(np.float32),
            niche_shift=(niche_shift * niche_factor).astype(np.float32),
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
        start = np.random.RandomState(self.seed + 1).standard_normal((len(self.vocabulary), width))
        basis = np.linalg.qr(start[genes])[0]

        def forward(directions: np.ndarray) -> np.ndarray:
            scaled = scale[:, None] * directions
            return graph @ (expression @ scaled) - mean @ scaled

        def backward(scores: np.ndarray) -> np.ndarray:
            raw = expression.T @ (graph.T @ scores) - np.outer(mean, scores.sum(axis=0))
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
    total = np.zeros(expression.shape[1])
    squares = np.zeros(expression.shape[1])
    for start in range(0, graph.shape[0], _ROWS_PER_CHUNK):
        block_total, block_squares = _column_sums(sp.csr_matrix(graph[start : start + _ROWS_PER_CHUNK] @ expression))
        total += block_total
        squares += block_squares
    return _from_sums(total, squares, graph.shape[0])


def _spread_rows(expression: sp.csr_matrix, limit: int) -> np.ndarray:
    """At most ``limit`` rows, spread evenly over the range of total expression, whatever the order of the rows."""
    n = expression.shape[0]
    if n <= limit:
        return np.arange(n)
    total = np.asarray(expression.sum(axis=1)).ravel()
    order = np.lexsort((np.diff(expression.indptr), total))
    return np.sort(order[np.linspace(0, n - 1, limit).round().astype(np.intp)])
