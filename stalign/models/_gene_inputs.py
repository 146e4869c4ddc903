"""Inputs of the two gene encoders of one slide, some spots at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

if TYPE_CHECKING:
    from stalign.models._network import STAlign
    from stalign.models.encoders._base import GeneEncoder, Level

_BLOCK = 16_384


class GeneInputs:
    """What the gene encoders of a model take of one slide; counts are read when they are needed, in blocks.

    Parameters
    ----------
    model
        With the two gene encoders.
    counts
        Called with the positions of some spots, sorted, returns their (m, n_vocabulary) raw counts.
    connectivities
        (n, n) row-stochastic niche graph of the slide.
    statistics
        What the encoders of spots and of niches took from the slide (:meth:`STAlign.fit_genes`).

    Examples
    --------
    >>> inputs = GeneInputs(model, lambda rows: counts[rows], graph, statistics)  # doctest: +SKIP
    >>> spot, niche = inputs(np.arange(100))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: STAlign,
        counts: Callable[[np.ndarray], csr_matrix],
        connectivities: csr_matrix,
        statistics: tuple[Any, Any],
    ) -> None:
        self._encoders: dict[Level, GeneEncoder] = {
            "spot": model.encoder("spot_gene"),
            "niche": model.encoder("niche_gene"),
        }
        self._statistics: dict[Level, Any] = dict(zip(("spot", "niche"), statistics, strict=True))  # type: ignore[arg-type]
        self._counts = counts
        self._graph = connectivities
        self._spread: dict[Level, np.ndarray] = {}

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs of some spots and of their niches, (m, input_dim) float32 each."""
        return self.spots(rows), self.niches(rows)

    def spots(self, rows: np.ndarray) -> np.ndarray:
        """Return the (m, input_dim) float32 inputs of some spots."""
        if self._encoders["spot"].spreads:
            return self._expand("spot", rows)
        order = np.argsort(rows, kind="stable")
        counts = self._counts(rows[order])
        inputs = self._encoders["spot"].preprocess(counts, statistics=self._statistics["spot"])
        return inputs[np.argsort(order, kind="stable")]

    def niches(self, rows: np.ndarray) -> np.ndarray:
        """Return the (m, input_dim) float32 inputs of the niches of some spots."""
        if self._encoders["niche"].spreads:
            return self._expand("niche", rows)
        part = self._graph[rows]
        # The niches of these spots reach beyond them.
        around = np.unique(part.indices)
        columns = np.searchsorted(around, part.indices).astype(np.int32)
        graph = csr_matrix((part.data, columns, part.indptr), shape=(len(rows), len(around)))
        return self._encoders["niche"].preprocess(
            self._counts(around), connectivities=graph, statistics=self._statistics["niche"]
        )

    def _expand(self, level: Level, rows: np.ndarray) -> np.ndarray:
        if level not in self._spread:
            self._spread_slide()
        return self._encoders[level].expand(self._spread[level][rows], statistics=self._statistics[level])

    def _spread_slide(self) -> None:
        """Read all counts of the slide once, for the encoders that want the whole of it."""
        levels: list[Level] = [level for level, encoder in self._encoders.items() if encoder.spreads]
        scores = self._reduce(levels)
        for level in levels:
            self._spread[level] = self._encoders[level].spread(
                scores[level], connectivities=self._graph, statistics=self._statistics[level], level=level
            )

    def _reduce(self, levels: list[Level]) -> dict[Level, np.ndarray]:
        # Two encoders alike share their statistics, and so what the spots are reduced to.
        shared = len(levels) == 2 and self._statistics["spot"] is self._statistics["niche"]
        blocks: dict[Level, list[np.ndarray]] = {level: [] for level in levels}
        for rows in self._blocks():
            counts = self._counts(rows)
            for level in levels[:1] if shared else levels:
                blocks[level].append(self._encoders[level].reduce(counts, statistics=self._statistics[level]))
        if shared:
            blocks[levels[1]] = blocks[levels[0]]
        return {level: np.concatenate(parts) for level, parts in blocks.items()}

    def _blocks(self) -> Iterator[np.ndarray]:
        n = self._graph.shape[0]
        for start in range(0, max(n, 1), _BLOCK):
            yield np.arange(start, min(start + _BLOCK, n))
