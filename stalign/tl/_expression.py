"""Inputs of the gene encoders, some spots at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from stalign.genes import row_normalise
from stalign.genes._sample import sample_niches

if TYPE_CHECKING:
    from stalign.genes._rows import CountRows
    from stalign.models import STAlign


class Expression:
    """Counts of a slide's spots and niches, as a model's gene encoders take them.

    Nothing is held but the statistics of the slides: the counts of a block of spots and of their neighbours are read
    when the block is asked for.

    Parameters
    ----------
    model
        With the two gene encoders.
    counts
        Counts over the model's vocabulary, by rows.
    graph
        (n, n) niche graph, self included.
    codes
        (n,) number of each spot's library; niches stay within it.
    coordinates
        (n, 2) positions, along which the sample of a large slide is spread.
    """

    def __init__(
        self, model: STAlign, counts: CountRows, graph: csr_matrix, codes: np.ndarray, coordinates: np.ndarray
    ) -> None:
        self._spot, self._niche = model.encoder("spot_gene"), model.encoder("niche_gene")
        self._model = model
        self._counts = counts
        self._graph = graph
        self._codes = codes
        self._coordinates = coordinates
        self._statistics: dict[int, tuple[Any, Any]] | None = None

    @property
    def runs_network(self) -> bool:
        """Whether an encoder runs a network of its own on the counts."""
        return self._spot.runs_network or self._niche.runs_network

    @property
    def bytes_per_spot(self) -> int:
        """Size of one spot's two inputs."""
        return 4 * (self._spot.input_dim + self._niche.input_dim)

    def fit(self) -> dict[int, tuple[Any, Any]]:
        """Return, for each library, what the encoders of spots and of niches take from it; done once."""
        if self._statistics is None:
            self._statistics = {int(code): self._fit_library(code) for code in np.unique(self._codes)}
        return self._statistics

    def _fit_library(self, code: int) -> tuple[Any, Any]:
        limit = max(self._spot.fit_limit, self._niche.fit_limit)
        if limit == 0:
            return None, None
        here = np.flatnonzero(self._codes == code)
        niches = spots = here
        if len(here) > limit:
            graph = self._graph if len(here) == self._graph.shape[0] else self._graph[here][:, here]
            x, y = self._coordinates[here].T
            niches, spots = (here[part] for part in sample_niches(graph, np.lexsort((y, x)), limit))
        return self._model.fit_genes(self._counts(spots), connectivities=_within(self._graph[niches], spots))

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs of some spots of one library and of their niches, (m, input_dim) float32 each."""
        spot_statistics, niche_statistics = self.fit()[int(self._codes[rows[0]])]
        part = self._graph[rows]
        spots = np.union1d(part.indices, rows)
        counts = self._counts(spots)
        return (
            self._spot.preprocess(counts[np.searchsorted(spots, rows)], statistics=spot_statistics),
            self._niche.preprocess(counts, connectivities=_within(part, spots), statistics=niche_statistics),
        )


def _within(graph: csr_matrix, spots: np.ndarray) -> csr_matrix:
    """Rows of a niche graph, scaled to sum to one, over the columns ``spots`` alone, which are all they have."""
    scaled = row_normalise(graph)
    columns = np.searchsorted(spots, scaled.indices).astype(np.int32)
    return csr_matrix((scaled.data, columns, scaled.indptr), shape=(graph.shape[0], len(spots)))
