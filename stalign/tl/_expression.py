"""Inputs of the gene encoders, some spots at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from stalign.genes import row_normalise
from stalign.genes._sample import sample_patches
from stalign.models._gene_inputs import GeneInputs

if TYPE_CHECKING:
    from stalign.genes._rows import CountRows
    from stalign.models import STAlign


class Expression:
    """Counts of a slide's spots and niches, as a model's gene encoders take them.

    Counts are read when they are asked for: those of a block of spots and of their neighbours, or, for encoders that
    want the whole slide, all of them once, of which a few numbers for each spot are held.

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
        self._inputs: dict[int, GeneInputs] = {}
        # Where each spot is within its library.
        self._place = np.empty(len(codes), dtype=np.intp)
        for code in np.unique(codes):
            here = codes == code
            self._place[here] = np.arange(np.count_nonzero(here))

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
        here, graph = self._library(code)
        spots = np.arange(len(here))
        if len(here) > limit:
            x, y = self._coordinates[here].T
            spots = sample_patches(graph, np.lexsort((y, x)), limit)
            graph = row_normalise(graph[spots][:, spots])
        return self._model.fit_genes(self._counts(here[spots]), connectivities=graph)

    def _library(self, code: int) -> tuple[np.ndarray, csr_matrix]:
        """Return the spots of a library and their niche graph, row-stochastic."""
        here = np.flatnonzero(self._codes == code)
        whole = len(here) == len(self._codes)
        return here, row_normalise(self._graph if whole else self._graph[here][:, here])

    def _inputs_of(self, code: int) -> GeneInputs:
        if code not in self._inputs:
            here, graph = self._library(code)
            self._inputs[code] = GeneInputs(self._model, lambda rows: self._counts(here[rows]), graph, self.fit()[code])
        return self._inputs[code]

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs of some spots of one library and of their niches, (m, input_dim) float32 each."""
        code = int(self._codes[rows[0]])
        return self._inputs_of(code)(self._place[rows])
