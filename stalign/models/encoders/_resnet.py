"""ResNet-50 for small patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stalign.models.encoders._base import IMAGENET_MEAN, IMAGENET_STD, ImageEncoder


class SmallStemResNet50(ImageEncoder):
    """The published spot encoder: ResNet-50 with a 3 × 3 stride-1 stem and no max-pool, ``dim`` features.

    The stem keeps the resolution of patches of a few tens of pixels. No pretrained weights fit it.
    """

    def __init__(
        self,
        *,
        dim: int = 512,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(mean=mean, std=std)
        import timm

        self.dim = dim
        self.resnet = timm.create_model("resnet50", pretrained=False, num_classes=dim)
        self.resnet.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.resnet.maxpool = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, height, width) of any size to (n, dim)."""
        return self.resnet(images)
