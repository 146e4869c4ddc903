"""The published niche gene encoder: a transformer over pathways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from stalign._validate import check_positive, listing
from stalign.models.encoders._base import GeneEncoder

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class PreNormLayer(nn.Module):
    """One transformer layer, pre-norm, with an attention whose inner width may differ from the tokens'."""

    def __init__(self, width: int, *, heads: int, head_dim: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, feedforward)
        self.fc2 = nn.Linear(feedforward, width)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, T, width) to (n, T, width)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        x = x + self._drop(self.proj(attended.transpose(1, 2).flatten(2)))
        return x + self._drop(self.fc2(self._drop(nn.functional.gelu(self.fc1(self.norm2(x))))))


class PathwayTransformer(GeneEncoder):
    """Expression seen through gene sets, one token per set.

    The input is one copy of the expression of all genes of the union per set, zero where a gene is not a member. An
    MLP mixes all of it, a transformer relates the sets, a second MLP makes the tokens (Lin et al. 2024).

    Parameters
    ----------
    n_pathways, n_genes
        Number of sets, and of genes in their union.
    gene_sets
        The sets: ``{name: genes}``, or names among the hallmark sets that come with the package. ``None`` leaves
        them open, as the published weights do: the network works, :meth:`preprocess` needs :meth:`set_gene_sets`.
    hidden
        The two hidden widths of the first MLP.
    layers, heads, head_dim, feedforward, dropout
        The transformer.
    out_hidden, dim
        The second MLP: ``n_genes`` → ``out_hidden`` → ``dim``.
    """

    mask: torch.Tensor
    gene_index: torch.Tensor

    def __init__(
        self,
        *,
        vocabulary: Sequence[str] = (),
        n_pathways: int = 8,
        n_genes: int | None = 548,
        gene_sets: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        hidden: Sequence[int] = (1024, 512),
        layers: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        feedforward: int = 1024,
        dropout: float = 0.1,
        out_hidden: int = 256,
        dim: int = 512,
    ) -> None:
        super().__init__(vocabulary=vocabulary)
        sets = None if gene_sets is None else _resolve_sets(gene_sets)
        if n_genes is None:
            if sets is None:
                raise ValueError("n_genes=None takes the number of genes from gene_sets, which is None as well.")
            n_genes = len({gene for genes in sets.values() for gene in genes})
        self.n_tokens = check_positive("n_pathways", n_pathways, integer=True)
        self.n_genes = check_positive("n_genes", n_genes, integer=True)
        self.dim = dim
        self.input_dim = n_pathways * n_genes
        first, second = hidden
        self.mix = nn.Sequential(
            nn.Linear(self.input_dim, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, self.input_dim),
        )
        self.layers = nn.ModuleList(
            PreNormLayer(n_genes, heads=heads, head_dim=head_dim, feedforward=feedforward, dropout=dropout)
            for _ in range(layers)
        )
        self.out = nn.Sequential(nn.Linear(n_genes, out_hidden), nn.ReLU(), nn.Linear(out_hidden, dim))
        # Which genes the inputs stand for belongs to the weights: -1 is "not known" or "not in the vocabulary".
        self.register_buffer("mask", torch.zeros(n_pathways, n_genes, dtype=torch.uint8))
        self.register_buffer("gene_index", torch.full((n_genes,), -1, dtype=torch.int64))
        if sets is not None:
            self.set_gene_sets(sets)

    def set_gene_sets(self, gene_sets: Mapping[str, Sequence[str]] | Sequence[str]) -> None:
        """State which genes the inputs stand for: the sorted union of the sets, in the order of the sets.

        Raises
        ------
        ValueError
            If the number of sets or of genes in their union is not what the weights were made for, or no gene of
            theirs is in the vocabulary.
        """
        sets = _resolve_sets(gene_sets)
        genes = sorted({gene for members in sets.values() for gene in members})
        if (len(sets), len(genes)) != (self.n_tokens, self.n_genes):
            raise ValueError(
                f"The encoder takes {self.n_tokens} gene sets with {self.n_genes} genes in their union; got "
                f"{len(sets)} sets with {len(genes)}: {listing(sets, 10)}."
            )
        place = {gene: number for number, gene in enumerate(self.vocabulary)}
        index = np.array([place.get(gene, -1) for gene in genes])
        if (index < 0).all():
            raise ValueError(
                f"None of the {len(genes)} genes of the gene sets is in the model's vocabulary of "
                f"{len(self.vocabulary)} genes."
            )
        mask = np.array([np.isin(genes, list(members)) for members in sets.values()])
        self.mask.copy_(torch.from_numpy(mask.astype(np.uint8)))
        self.gene_index.copy_(torch.from_numpy(index))

    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        index, mask = self.gene_index.cpu().numpy(), self.mask.cpu().numpy().astype(np.float32)
        if (index < 0).all():
            raise ValueError(
                "The weights do not say which genes they were trained on (the published ones never do). "
                "Call `set_gene_sets({name: genes, ...})` on this encoder first."
            )
        return index, mask

    def preprocess(
        self,
        counts: csr_matrix,
        *,
        connectivities: csr_matrix | None = None,
        library: np.ndarray | None = None,
        statistics: Any = None,
    ) -> np.ndarray:
        """Normalise to 10,000 counts, log1p, average over the niche and mask by gene set; returns (n, input_dim)."""
        from stalign.genes import niche_mean, normalise_log1p

        index, mask = self._columns()
        expression = normalise_log1p(counts)
        if connectivities is not None:
            expression = niche_mean(connectivities, expression)
        known = index >= 0
        values = np.zeros((expression.shape[0], self.n_genes), dtype=np.float32)
        values[:, known] = expression[:, index[known]].toarray()
        return (values[:, None, :] * mask[None]).reshape(len(values), self.input_dim)

    def prompt(self, gene_index: np.ndarray) -> np.ndarray:
        """Return the masked input of a niche in which only these genes are expressed, 10,000 counts in all."""
        index, mask = self._columns()
        named = np.isin(index, np.asarray(gene_index)) & (index >= 0)
        if not named.any():
            raise ValueError("None of the prompt's genes is in the encoder's gene sets.")
        values = np.where(named, np.log1p(1e4 / max(len(gene_index), 1)), 0.0).astype(np.float32)
        return (values[None] * mask).reshape(self.input_dim)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map (n, n_pathways · n_genes) to (n, n_pathways, dim)."""
        tokens = self.mix(values).unflatten(1, (self.n_tokens, self.n_genes))
        for layer in self.layers:
            tokens = layer(tokens)
        return self.out(tokens)


def _resolve_sets(gene_sets: Mapping[str, Sequence[str]] | Sequence[str]) -> dict[str, tuple[str, ...]]:
    if isinstance(gene_sets, Mapping):
        return {str(name): tuple(genes) for name, genes in gene_sets.items()}
    from stalign.genes._gmt import hallmark, select_sets

    return select_sets(hallmark(), gene_sets)
