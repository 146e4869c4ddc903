"""Statistics of colour and texture, and filters that were learned from patches without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stalign._validate import check_positive
from stalign.models.encoders._base import IMAGENET_MEAN, IMAGENET_STD, ImageEncoder

N_STATISTICS = 9
_LIMIT = 5.0
_WINDOWS = 40_000
_ROUNDS = 10
# Responses below this many standard deviations of a whitened window do not count.
_THRESHOLD = 0.5
_WHITENING = 0.05
_BATCH = 256


class FilterBank(ImageEncoder):
    """Mean, spread and gradient of each colour, and how strongly each of some learned filters responds on average.

    On few slides this carries over to patients that were never seen, where a network that is trained from scratch does
    not. The filters are learned from patches alone: windows are whitened and clustered by their direction (spherical
    k-means; Coates and Ng, *Learning feature representations with k-means*, 2012). Every feature is brought to mean 0
    and standard deviation 1 over the patches it was learned from; the encoder has no weights that a gradient trains.

    Parameters
    ----------
    n_filters
        Learned filters; each gives two features, for responses of either sign. 0: statistics alone.
    kernel
        Side of a filter, in pixels.
    stride
        Pixels between two places where the filters are applied.
    share
        Weight of the filters' features, all together, beside that of the statistics.
    mean, std
        Colour normalisation of pixels scaled to [0, 1].
    """

    def __init__(
        self,
        *,
        n_filters: int = 64,
        kernel: int = 6,
        stride: int = 2,
        share: float = 0.25,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(mean=mean, std=std)
        self.n_filters = n_filters if n_filters == 0 else check_positive("n_filters", n_filters, integer=True)
        self.kernel = check_positive("kernel", kernel, integer=True)
        self.stride = check_positive("stride", stride, integer=True)
        self.share = check_positive("share", share)
        self.dim = N_STATISTICS + 2 * self.n_filters
        self.filters: torch.Tensor
        self.offset: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("filters", torch.zeros(self.n_filters, 3, self.kernel, self.kernel))
        self.register_buffer("offset", torch.zeros(self.dim))
        self.register_buffer("scale", torch.ones(self.dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, height, width) to (n, dim)."""
        return ((self._features(images) - self.offset) * self.scale).clamp(-_LIMIT, _LIMIT)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        statistics = colour_texture(images)
        if not self.n_filters:
            return statistics
        response = nn.functional.conv2d(images, self.filters, stride=self.stride)
        both = [nn.functional.relu(sign * response - _THRESHOLD).mean(dim=(2, 3)) for sign in (1, -1)]
        return torch.cat([statistics, *both], dim=1)

    def learn(self, patches: Sequence[torch.Tensor], *, seed: int) -> None:
        """Learn filters and scale from patches; see :meth:`ImageEncoder.learn`."""
        patches = [part for part in patches if len(part)]
        if not patches:
            return
        generator = torch.Generator().manual_seed(seed)
        if self.n_filters:
            self.filters.copy_(self._learn_filters(patches, generator))
        with torch.inference_mode():
            features = [
                torch.cat([self._features(part[start : start + _BATCH]) for start in range(0, len(part), _BATCH)])
                for part in patches
            ]
        # Every slide counts alike.
        self.offset.copy_(torch.stack([part.mean(dim=0) for part in features]).mean(dim=0))
        variance = torch.stack([((part - self.offset) ** 2).mean(dim=0) for part in features]).mean(dim=0)
        weight = torch.ones(self.dim)
        if self.n_filters:
            weight[N_STATISTICS:] = (self.share * N_STATISTICS / (2 * self.n_filters)) ** 0.5
        self.scale.copy_(torch.where(variance > 1e-12, weight / variance.clamp(min=1e-12).sqrt(), 0.0))

    def _learn_filters(self, patches: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        windows = self._windows(patches, generator)
        whiten = _whitening(windows)
        whitened = (windows - windows.mean(dim=0)) @ whiten
        directions = torch.randn(self.n_filters, whitened.shape[1], generator=generator, dtype=torch.float64)
        directions = nn.functional.normalize(directions, dim=1)
        for _ in range(_ROUNDS):
            similarity = whitened @ directions.T
            nearest = similarity.abs().argmax(dim=1)
            sign = similarity.gather(1, nearest[:, None]).sign()
            total = torch.zeros_like(directions).index_add_(0, nearest, sign * whitened)
            found = total.norm(dim=1, keepdim=True) > 0
            directions = nn.functional.normalize(torch.where(found, total, directions), dim=1)
        return (directions @ whiten).view(self.n_filters, 3, self.kernel, self.kernel).float()

    def _windows(self, patches: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """Draw (n, 3 * kernel * kernel) float64 windows, from every slide the same number."""
        share = max(1, _WINDOWS // len(patches))
        drawn = []
        for part in patches:
            n, _, height, width = part.shape
            if min(height, width) < self.kernel:
                raise ValueError(f"Patches of {height} × {width} pixels are smaller than the filters, {self.kernel}.")
            which, top, left = (
                torch.randint(high, (share, 1, 1, 1), generator=generator)
                for high in (n, height - self.kernel + 1, width - self.kernel + 1)
            )
            colour, row, column = torch.meshgrid(
                torch.arange(3), torch.arange(self.kernel), torch.arange(self.kernel), indexing="ij"
            )
            drawn.append(part[which, colour, top + row, left + column].flatten(1))
        return torch.cat(drawn).double()


def _whitening(windows: torch.Tensor) -> torch.Tensor:
    """Symmetric whitening of the windows' covariance, regularised by a share of its mean variance."""
    size, vectors = torch.linalg.eigh(torch.cov(windows.T))
    return vectors / (size.clamp(min=0) + _WHITENING * size.mean()).sqrt() @ vectors.T


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
