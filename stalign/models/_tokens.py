"""Tokenisers: from one feature vector to the tokens that the fusion network attends over."""

from __future__ import annotations

import torch
from torch import nn

from stalign.models._config import TokenConfig


class ConvTokens(nn.Module):
    """The published tokeniser: a 1-d convolution over the feature vector, one output channel per token.

    With ``kernel=1`` every token is the same vector times a number, so that after a LayerNorm they differ in sign
    only; ``"linear"`` tokens have no such limit.
    """

    def __init__(self, dim: int, n_tokens: int, width: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        length = (dim - kernel) // stride + 1
        if length != width:
            raise ValueError(
                f"Convolution tokens with kernel {kernel} and stride {stride} turn {dim} features into tokens of width "
                f"{length}, but the model's width is {width}. Change the kernel and stride, or use kind='linear'."
            )
        self.conv = nn.Conv1d(1, n_tokens, kernel_size=kernel, stride=stride)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (n, dim) to (n, n_tokens, width)."""
        return self.conv(features.unsqueeze(1))


class LinearTokens(nn.Module):
    """One linear map per token, so that the tokens may point in different directions."""

    def __init__(self, dim: int, n_tokens: int, width: int) -> None:
        super().__init__()
        self.n_tokens = n_tokens
        self.proj = nn.Linear(dim, n_tokens * width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (n, dim) to (n, n_tokens, width)."""
        return self.proj(features).unflatten(1, (self.n_tokens, -1))


class GivenTokens(nn.Module):
    """For encoders that yield tokens themselves; a single vector is one token."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return (n, n_tokens, width) as it is, (n, width) as (n, 1, width)."""
        return features.unsqueeze(1) if features.ndim == 2 else features


def build_tokens(config: TokenConfig, *, dim: int, encoder_tokens: int | None, n_tokens: int, width: int) -> nn.Module:
    """Make the tokeniser of a branch whose encoder yields ``encoder_tokens`` tokens (None: one vector) of ``dim``."""
    if config.kind == "none":
        if (encoder_tokens or 1, dim) != (n_tokens, width):
            raise ValueError(
                f"Tokens of kind 'none' need an encoder that yields {n_tokens} tokens of width {width}; this one "
                f"yields {encoder_tokens or 1} of width {dim}. Use kind='linear' or 'conv'."
            )
        return GivenTokens()
    if encoder_tokens is not None:
        raise ValueError(f"The encoder yields {encoder_tokens} tokens itself: its tokens must be of kind 'none'.")
    if config.kind == "conv":
        return ConvTokens(dim, n_tokens, width, kernel=config.kernel, stride=config.stride)
    return LinearTokens(dim, n_tokens, width)
