"""Sections ready for training, and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.cluster.vq import kmeans2
from torch.utils.data import IterableDataset

from stalign._validate import check_positive
from stalign.train._config import AugmentConfig


@dataclass
class Section:
    """One slide, cut and counted, before any encoder.

    Attributes
    ----------
    name, patient
        Names; splits are by patient.
    counts
        (n, n_vocabulary) CSR raw counts.
    connectivities
        (n, n) CSR row-stochastic niche graph.
    spot_image, niche_image
        (n, pixels, pixels, 3) uint8 patches, or ``None`` for a slide without image.
    colour
        (3,) mean and (3,) standard deviation of the spot patches in [0, 1], or ``None``.
    """

    name: str
    patient: str
    counts: sp.csr_matrix
    connectivities: sp.csr_matrix
    spot_image: np.ndarray | None = None
    niche_image: np.ndarray | None = None
    colour: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        n = self.counts.shape[0]
        if self.connectivities.shape != (n, n):
            raise ValueError(f"Section {self.name!r}: the niche graph is {self.connectivities.shape}, for {n} spots.")
        for name in ("spot_image", "niche_image"):
            patches = getattr(self, name)
            if patches is not None and len(patches) != n:
                raise ValueError(f"Section {self.name!r}: {len(patches)} {name} patches for {n} spots.")

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def has_image(self) -> bool:
        """Whether patches are there."""
        return self.spot_image is not None and self.niche_image is not None


@dataclass
class EncodedSection:
    """A section after everything that is frozen: gene profiles once and for all, clusters for the negatives."""

    section: Section
    spot_gene: torch.Tensor
    niche_gene: torch.Tensor
    clusters: torch.Tensor

    def __len__(self) -> int:
        return len(self.section)


class Batch(NamedTuple):
    """Spots of one slide; what is absent or left out is ``None``. ``profile`` is the niches', without noise."""

    library: str
    profile: torch.Tensor
    clusters: torch.Tensor
    spot_gene: torch.Tensor | None
    niche_gene: torch.Tensor | None
    spot_image: torch.Tensor | None
    niche_image: torch.Tensor | None


def initial_clusters(profile: np.ndarray, n_clusters: int, *, seed: int) -> np.ndarray:
    """Cluster the expression profiles of one slide with k-means, as the source of negatives.

    Parameters
    ----------
    profile
        (n, d) expression profiles.
    n_clusters
        Number of clusters; fewer where the slide has fewer spots.
    seed
        Seed of the k-means++ start.

    Returns
    -------
    (n,) int64 cluster numbers.
    """
    check_positive("n_clusters", n_clusters, integer=True)
    k = min(n_clusters, len(profile))
    _, labels = kmeans2(profile.astype(np.float64), k, minit="++", seed=seed, iter=50)
    return labels.astype(np.int64)


class Batches(IterableDataset):
    """An endless stream of batches, each from one slide; step ``i`` depends on the seed and ``i`` alone.

    Slides are drawn with a probability that grows with the square root of their spots, those with an image
    ``image_sections`` times as often, spots without replacement.
    """

    def __init__(
        self,
        sections: Sequence[EncodedSection],
        *,
        steps: int,
        batch_size: int,
        augment: AugmentConfig,
        image_sections: float,
        preprocess: dict,
        seed: int,
    ) -> None:
        self.sections = list(sections)
        self.steps = steps
        self.batch_size = batch_size
        self.augment = augment
        self.preprocess = preprocess
        self.seed = seed
        weight = np.array([np.sqrt(len(s)) * (image_sections if s.section.has_image else 1.0) for s in self.sections])
        self.probability = weight / weight.sum()

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        rng = np.random.default_rng([self.seed, step])
        encoded = self.sections[rng.choice(len(self.sections), p=self.probability)]
        rows = np.sort(rng.choice(len(encoded), min(self.batch_size, len(encoded)), replace=False))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        profile = encoded.niche_gene[rows]
        noise = self.augment.gene_noise
        # A niche mean is known better than its spots, hence half the noise.
        inputs = {
            "spot_gene": _add_noise(encoded.spot_gene[rows], noise, generator),
            "niche_gene": _add_noise(profile, noise / 2, generator),
            "spot_image": self._images(encoded.section, "spot_image", rows, rng, generator),
            "niche_image": self._images(encoded.section, "niche_image", rows, rng, generator),
        }
        absent = self._left_out(encoded.section, rng)
        return Batch(
            library=encoded.section.name,
            profile=profile,
            clusters=encoded.clusters[rows],
            **{name: None if name.endswith(absent) else x for name, x in inputs.items()},
        )

    def _left_out(self, section: Section, rng: np.random.Generator) -> tuple[str, ...]:
        chance, share = rng.random(), self.augment.drop_modality
        if not section.has_image or chance >= 2 * share:
            return ()
        return ("image",) if chance < share else ("gene",)

    def _images(
        self, section: Section, name: str, rows: np.ndarray, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor | None:
        if not section.has_image:
            return None
        images = self.preprocess[name](getattr(section, name)[rows], colour=section.colour)
        return augment_images(images, self.augment, rng=rng, generator=generator)


def _add_noise(values: torch.Tensor, sd: float, generator: torch.Generator) -> torch.Tensor:
    return values + sd * torch.randn(values.shape, generator=generator) if sd else values


def augment_images(
    images: torch.Tensor, config: AugmentConfig, *, rng: np.random.Generator, generator: torch.Generator
) -> torch.Tensor:
    """Vary the colour of each normalised patch, and flip or turn the batch.

    Parameters
    ----------
    images
        (n, 3, h, w) float32, normalised to the slide.
    config
        Strengths.
    rng, generator
        Sources of randomness.
    """
    n = len(images)
    if config.gain:
        images = images * (1 + config.gain * torch.randn((n, 3, 1, 1), generator=generator))
    if config.shift:
        images = images + config.shift * torch.randn((n, 3, 1, 1), generator=generator)
    if config.flips:
        turn = rng.random(3) < 0.5
        dims = [dim for dim, flip in ((-2, turn[0]), (-1, turn[1])) if flip]
        images = images.flip(dims) if dims else images
        images = images.transpose(-1, -2) if turn[2] else images
    return images
