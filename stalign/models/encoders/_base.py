"""What every encoder has: a width, a way from data to its input, and a forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from stalign._validate import check_positive
from stalign.models._config import Provenance

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _three(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be three finite numbers, one per colour, got {values!r}.")
    return numbers


class Encoder(nn.Module, ABC):
    """Common to image and gene encoders.

    Attributes
    ----------
    dim
        Width of what :meth:`forward` returns.
    n_tokens
        ``None`` for an encoder that yields one vector per spot, else the number of tokens it yields.
    encoder_name, licence
        Its name in the registry, and the licence of its pretrained weights (empty: there are none).
    provenance
        Where its weights come from; ``None`` while they are random.
    """

    dim: int
    n_tokens: int | None = None
    encoder_name: str = ""
    licence: str = ""
    provenance: Provenance | None = None

    def frozen_modules(self) -> Iterator[nn.Module]:
        """Yield the parts that ``frozen`` in a branch's config keeps fixed: all of it by default."""
        yield self

    def resolved_args(self) -> dict[str, Any]:
        """Return the arguments that the encoder filled in itself, so that they travel with the checkpoint."""
        return {}


class ImageEncoder(Encoder):
    """Base of the image encoders.

    Parameters
    ----------
    mean, std
        Colour normalisation of pixels scaled to [0, 1].
    size
        Side in pixels the encoder needs; patches of another size are resampled by :meth:`preprocess`. ``None``: any.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.mean = _three("mean", mean)
        self.std = _three("std", std)
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}.")
        self.size = None if size is None else check_positive("size", size, integer=True)

    def preprocess(
        self, pixels: np.ndarray | torch.Tensor, *, colour: tuple[np.ndarray, np.ndarray] | None = None
    ) -> torch.Tensor:
        """Turn RGB pixels into the encoder's input.

        Parameters
        ----------
        pixels
            (n, height, width, 3) uint8, an array or a tensor on any device.
        colour
            (3,) mean and (3,) standard deviation of the slide's pixels scaled to [0, 1], in place of the encoder's own.

        Returns
        -------
        (n, 3, height, width) float32, on the device of the input.
        """
        if isinstance(pixels, np.ndarray) and not pixels.flags.writeable:
            pixels = pixels.copy()  # torch has no read-only tensors
        tensor = torch.as_tensor(pixels)
        if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[-1] != 3:
            raise ValueError(
                f"Patches must be (n, height, width, 3) uint8 RGB, got shape {tuple(tensor.shape)} of {tensor.dtype}."
            )
        # Channels stay last in memory, which the convolutions of the CPU prefer, too.
        images = tensor.permute(0, 3, 1, 2).float().div_(255)
        if self.size is not None and tuple(images.shape[-2:]) != (self.size, self.size) and len(images):
            images = nn.functional.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (
            torch.as_tensor(np.asarray(values), dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
            for values in (colour or (self.mean, self.std))
        )
        return images.sub_(mean).div_(std)

    def learn(self, patches: Sequence[torch.Tensor], *, seed: int) -> None:
        """Learn from patches with no labels what no gradient trains; nothing by default.

        Parameters
        ----------
        patches
            (n, 3, height, width) float32 of each slide, from :meth:`preprocess`.
        seed
            Of what is drawn.
        """

    @property
    def backbone(self) -> nn.Module:
        """The part that a file of pretrained weights fills."""
        return self

    def convert(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the keys of a file of pretrained weights to those of :attr:`backbone`."""
        return dict(state)

    def resolved_args(self) -> dict[str, Any]:
        """Return mean and std, which describe the patches the weights were trained on."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @abstractmethod
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, height, width) to (n, dim), or to (n, n_tokens, dim)."""


Level = Literal["spot", "niche"]


class GeneEncoder(Encoder):
    """Base of the gene encoders.

    An input comes from the counts of a spot or of its niche (:meth:`preprocess`). Where it needs more of the slide
    than that (``spreads``), a slide goes through three steps: :meth:`reduce` the counts of each spot to few numbers,
    :meth:`spread` them over the niche graph, the whole slide at once, and :meth:`expand` them to inputs.

    Parameters
    ----------
    vocabulary
        Gene symbols of the model; columns of the counts in :meth:`preprocess` come in this order.
    """

    input_dim: int
    runs_network: bool = False
    """Whether :meth:`preprocess` runs a network, which wants the device, and the thread, of the forward passes."""
    spreads: bool = False
    """Whether an input needs more of the slide than the counts of a spot, or of its niche."""

    def __init__(self, *, vocabulary: Sequence[str] = ()) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)

    @property
    def fit_limit(self) -> int:
        """Spots of a slide that :meth:`fit` looks at, at most; 0 where it takes nothing from a slide."""
        return 0

    def fit(self, counts: csr_matrix, *, connectivities: csr_matrix, library: np.ndarray | None = None) -> Any:
        """Take from the slides what :meth:`preprocess` needs of all their spots; ``None`` where it needs nothing.

        Parameters
        ----------
        counts, connectivities, library
            As in :meth:`preprocess`, of whole slides, or of samples of them.
        """
        return None

    @abstractmethod
    def preprocess(
        self,
        counts: csr_matrix,
        *,
        connectivities: csr_matrix | None = None,
        library: np.ndarray | None = None,
        statistics: Any = None,
    ) -> np.ndarray:
        """Turn raw counts into the encoder's input.

        Parameters
        ----------
        counts
            (n, n_vocabulary) raw counts.
        connectivities
            (n, n) row-stochastic niche graph; ``None`` for the spots themselves. Of one slide, (m, n): the niches of m
            spots, given the counts of all n spots in them.
        library
            (n,) number of the slide of each spot, for encoders that compare spots of one slide.
        statistics
            What :meth:`fit` returned for these slides.

        Returns
        -------
        (n, input_dim) float32, (m, input_dim) with niches of m spots. A row does not depend on which others are asked
        for, given ``statistics``.
        """

    def reduce(self, counts: csr_matrix, *, statistics: Any) -> np.ndarray:
        """Turn raw counts of some spots of a slide into (n, r) float32, each spot by itself.

        Parameters
        ----------
        counts
            (n, n_vocabulary) raw counts.
        statistics
            What :meth:`fit` returned for this slide.
        """
        raise NotImplementedError(f"{type(self).__name__} has no slides to spread.")

    def spread(self, scores: np.ndarray, *, connectivities: csr_matrix, statistics: Any, level: Level) -> np.ndarray:
        """Average what :meth:`reduce` returned for all spots of a slide over its niche graph.

        Parameters
        ----------
        scores
            (n, r).
        connectivities
            (n, n) row-stochastic niche graph.
        statistics
            As in :meth:`reduce`.
        level
            Whether spots or niches are to be described.

        Returns
        -------
        (n, r) float32.
        """
        raise NotImplementedError(f"{type(self).__name__} has no slides to spread.")

    def expand(self, scores: np.ndarray, *, statistics: Any) -> np.ndarray:
        """Turn some rows of what :meth:`spread` returned into the encoder's (m, input_dim) float32 input."""
        raise NotImplementedError(f"{type(self).__name__} has no slides to spread.")

    def prompt(self, gene_index: np.ndarray) -> np.ndarray:
        """Return the (input_dim,) float32 input that stands for "the genes at these places are high"."""
        raise NotImplementedError(
            f"The gene encoder {type(self).__name__} takes no gene prompts. Annotate with a labelled reference instead "
            "(`reference=`), or use a model whose gene encoder takes prompts."
        )

    @abstractmethod
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map (n, input_dim) to (n, dim), or to (n, n_tokens, dim)."""
