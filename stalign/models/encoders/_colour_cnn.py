"""A small convolutional network beside plain statistics of colour and texture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stalign.models.encoders._timm import TimmEncoder

_N_STATISTICS = 9


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
        self.dim += _N_STATISTICS
        self.scale = nn.BatchNorm1d(_N_STATISTICS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, height, width) to (n, dim)."""
        return torch.cat([self.network(images), self.scale(colour_texture(images))], dim=1)


def colour_texture(images: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation and mean absolute gradient of each channel: (n, 3, height, width) → (n, 9)."""
    n, colours, height, width = images.shape
    # Rows of pixels with their colours side by side, as pixels lie in memory: sums then run along the memory, which is
    # three times as fast as channel by channel.
    rows = images.permute(0, 2, 3, 1).reshape(n, height, width * colours)

    def total(values: torch.Tensor) -> torch.Tensor:
        return values.sum(dim=1).view(n, -1, colours).sum(dim=1)

    mean = total(rows) / (height * width)
    deviation = rows - mean.repeat(1, width).unsqueeze(1)
    std = (total(deviation * deviation) / (height * width - 1)).sqrt()
    down = total((rows[:, 1:] - rows[:, :-1]).abs()) / ((height - 1) * width)
    right = total((rows[..., colours:] - rows[..., :-colours]).abs()) / (height * (width - 1))
    return torch.cat([mean, std, (down + right) / 2], dim=1)
