"""The plainest gene encoder: an MLP on log-normalised expression."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from stalign.models.encoders._base import GeneEncoder

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class GeneMLP(GeneEncoder):
    """Counts to 10,000, log1p, mean over the niche, then ``n_vocabulary`` → ``hidden`` … → ``dim`` with GELU."""

    def __init__(self, *, vocabulary: Sequence[str] = (), hidden: Sequence[int] = (512,), dim: int = 256) -> None:
        super().__init__(vocabulary=vocabulary)
        if not self.vocabulary:
            raise ValueError("The gene encoder 'mlp' needs a vocabulary: pass `genes=` when the model is made.")
        self.dim = dim
        self.input_dim = len(self.vocabulary)
        widths = [self.input_dim, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], dim))

    def preprocess(
        self,
        counts: csr_matrix,
        *,
        connectivities: csr_matrix | None = None,
        library: np.ndarray | None = None,
        statistics: Any = None,
    ) -> np.ndarray:
        """Return (n, n_vocabulary) float32 log-normalised expression of spots, or its mean over niches."""
        from stalign.genes import niche_mean, normalise_log1p

        expression = normalise_log1p(counts)
        if connectivities is not None:
            expression = niche_mean(connectivities, expression)
        return np.asarray(expression.toarray(), dtype=np.float32)

    def prompt(self, gene_index: np.ndarray) -> np.ndarray:
        """Return the input of a spot in which only these genes are expressed, 10,000 counts in all."""
        values = np.zeros(self.input_dim, dtype=np.float32)
        values[np.asarray(gene_index)] = np.log1p(1e4 / max(len(gene_index), 1))
        return values

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map (n, n_vocabulary) to (n, dim)."""
        return self.net(values)
