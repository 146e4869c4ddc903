"""A small convolutional network beside plain statistics of colour and texture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stalign.models.encoders._filter_bank import N_STATISTICS, colour_texture
from stalign.models.encoders._timm import TimmEncoder


class ColourCNN(TimmEncoder):
    """An image model of timm, with mean, spread and mean gradient of each colour appended to its features.

    On few slides the statistics carry most of what a patch of 30 pixels says about expression, and a network trained
    from scratch needs many patches to find them.

    Parameters
    ----------
    model, size, mean, std, model_args
        As in :class:`~stalign.models.encoders._timm.TimmEncoder`.
    """

    def __init__(
        self,
        *,
        model: str,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model=model, size=size, mean=mean, std=std, model_args=model_args)
        self.dim += N_STATISTICS
        self.scale = nn.BatchNorm1d(N_STATISTICS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, height, width) to (n, dim)."""
        return torch.cat([self.network(images), self.scale(colour_texture(images))], dim=1)
