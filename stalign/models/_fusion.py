"""The Attention-Based Fusion Network (ABFN): image and gene tokens look at each other and become one."""

from __future__ import annotations

import torch
from torch import nn

from stalign.models._config import FusionConfig


class CrossAttention(nn.Module):
    """Multi-head attention of one set of tokens over another, each with a LayerNorm of its own."""

    def __init__(self, width: int, config: FusionConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.residual = config.residual
        self.dropout = config.dropout
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width)

    def forward(self, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Let ``tokens`` (n, T, width) ask ``context`` (n, S, width); returns (n, T, width)."""
        query, context = self.norm_query(tokens), self.norm_context(context)
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, x in ((self.query, query), (self.key, context), (self.value, context))
        )
        dropout = self.dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
        attended = nn.functional.dropout(self.out(attended), self.dropout, self.training)
        return tokens + attended if self.residual else attended


class ABFN(nn.Module):
    """Fuse the image and the gene tokens of one scale.

    Image tokens attend to gene tokens and the other way round; each side passes a narrow feed-forward to half the
    width; the halves are joined and layer-normed (Lin et al. 2024, arXiv 2411.16793). The published network has no
    residual; with ``config.residual`` each attention adds to its query, and a linear map passes beside each narrow
    feed-forward.

    Parameters
    ----------
    width
        Width of the tokens.
    config
        Heads, their width, the hidden width, dropout, residual.
    """

    def __init__(self, width: int, config: FusionConfig) -> None:
        super().__init__()
        self.image_attention = CrossAttention(width, config)
        self.gene_attention = CrossAttention(width, config)
        self.image_feedforward = self._feedforward(width, config.hidden)
        self.gene_feedforward = self._feedforward(width, config.hidden)
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()
        self.image_skip = nn.Linear(width, width // 2, bias=False) if config.residual else None
        self.gene_skip = nn.Linear(width, width // 2, bias=False) if config.residual else None

    @staticmethod
    def _feedforward(width: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width // 2))

    def forward(self, image: torch.Tensor, gene: torch.Tensor) -> torch.Tensor:
        """Fuse (n, T, width) image and gene tokens to (n, T, width)."""
        image_attended, gene_attended = self.image_attention(image, gene), self.gene_attention(gene, image)
        image_half, gene_half = self.image_feedforward(image_attended), self.gene_feedforward(gene_attended)
        if self.image_skip is not None and self.gene_skip is not None:
            image_half = image_half + self.image_skip(image_attended)
            gene_half = gene_half + self.gene_skip(gene_attended)
        return self.norm(torch.cat([image_half, gene_half], dim=-1))
