"""What stands on top of the tokens: projection heads and the head that predicts expression."""

from __future__ import annotations

import torch
from torch import nn

from stalign.models._config import HeadsConfig, PredictionConfig


class ProjectionHead(nn.Module):
    """Tokens (n, T, width) → one embedding (n, out) in the space where the alignment is learned."""

    def __init__(self, n_tokens: int, width: int, config: HeadsConfig) -> None:
        super().__init__()
        self.pool = config.pool
        self.normalise = config.normalise
        dim = n_tokens * width if config.pool == "flatten" else width
        self.mlp: nn.Module = (
            nn.Linear(dim, config.out)
            if config.hidden is None
            else nn.Sequential(nn.Linear(dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.out))
        )
        self.skip = nn.Linear(dim, config.out, bias=False) if config.skip else None

    def start_at_zero(self) -> None:
        """Set the last layers to zero, so that the embedding starts at zero."""
        last = self.mlp[-1] if isinstance(self.mlp, nn.Sequential) else self.mlp
        for layer in (last, self.skip):
            for parameter in [] if layer is None else layer.parameters():
                nn.init.zeros_(parameter)

    def pooled(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map (n, T, width) to what the layers take: the tokens side by side, or their mean."""
        return tokens.flatten(1) if self.pool == "flatten" else tokens.mean(dim=1)

    def forward(self, tokens: torch.Tensor, bypass: torch.Tensor | None = None) -> torch.Tensor:
        """Map (n, T, width) to (n, out); ``bypass`` (n, out) is added before the embedding is normalised."""
        pooled = self.pooled(tokens)
        projected = self.mlp(pooled)
        if self.skip is not None:
            projected = projected + self.skip(pooled)
        if bypass is not None:
            projected = projected + bypass.to(projected.dtype)
        return nn.functional.normalize(projected, dim=-1) if self.normalise else projected


class GenePrediction(nn.Module):
    """Expression from aligned embeddings.

    Buffers, saved with the weights: ``gene_index`` (n_genes,), the predicted genes' places in the vocabulary;
    ``mean`` and ``scale`` (n_genes,), location and spread of the training expression; ``sd`` (n_genes,), the spread of
    the residuals on held-out slides; ``centre`` (dim · inputs,), the mean features of the training slides;
    ``half_widths`` (levels, n_genes), where the config names levels: conformal quantiles of the absolute residuals on
    held-out patients.

    ``niche_share`` is for the caller, who has the graph: by how much the features' mean over the niche takes the place
    of the spot's own.
    """

    gene_index: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    sd: torch.Tensor
    centre: torch.Tensor
    half_widths: torch.Tensor

    def __init__(self, dim: int, config: PredictionConfig) -> None:
        super().__init__()
        self.inputs = config.inputs
        self.niche_share = config.niche_share
        dim = dim * len(config.inputs)
        self.net: nn.Module = (
            nn.Linear(dim, config.n_genes)
            if config.hidden is None
            else nn.Sequential(nn.Linear(dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.n_genes))
        )
        self.register_buffer("gene_index", torch.arange(config.n_genes))
        self.register_buffer("mean", torch.zeros(config.n_genes))
        self.register_buffer("scale", torch.ones(config.n_genes))
        self.register_buffer("sd", torch.zeros(config.n_genes))
        self.register_buffer("centre", torch.zeros(dim))
        self.levels = config.levels
        if config.levels:
            self.register_buffer("half_widths", torch.zeros(len(config.levels), config.n_genes))

    def features(self, embeddings: list[torch.Tensor]) -> torch.Tensor:
        """Join the embeddings named in ``inputs``, each (n, dim), scaled to unit norm."""
        return torch.cat([nn.functional.normalize(embedding, dim=-1) for embedding in embeddings], dim=-1)

    def forward(self, embeddings: list[torch.Tensor], *, centre: torch.Tensor | None = None) -> torch.Tensor:
        """Map the embeddings named in ``inputs``, each (n, dim), to (n, n_genes).

        ``centre`` is the mean of :meth:`features` over the slide, which takes out how slides differ as a whole; without
        it that of the training slides stands in.
        """
        return self.from_features(self.features(embeddings), centre=centre)

    def from_features(self, features: torch.Tensor, *, centre: torch.Tensor | None = None) -> torch.Tensor:
        """Map what :meth:`features` returned, or averages of it over niches, to (n, n_genes)."""
        return self.mean + self.scale * self.net(features - (self.centre if centre is None else centre))
