"""Sections ready for training, and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.cluster.vq import kmeans2, vq
from torch.utils.data import IterableDataset, get_worker_info

from stalign._validate import check_positive
from stalign.train._config import AugmentConfig

# A slide with more spots is clustered by a sample of them.
_MAX_CLUSTERED = 50_000


class StoredMatrix(NamedTuple):
    """A CSR matrix on disk: ``<folder>/<name>_data.npy``, ``…_indices.npy`` and ``…_indptr.npy``."""

    folder: Path
    name: str
    shape: tuple[int, int]

    def open(self) -> sp.csr_matrix:
        """Map the three files; nothing is read yet."""
        parts = [map_array(self.folder / f"{self.name}_{part}.npy") for part in ("data", "indices", "indptr")]
        return sp.csr_matrix(tuple(parts), shape=self.shape, copy=False)


def map_array(file: Path) -> np.ndarray:
    """Map an ``.npy`` file; no pickle is read."""
    return np.load(file, mmap_mode="r", allow_pickle=False)


class _Lazy:
    """An attribute given as an array or matrix, or as where one is stored, which is then mapped at each access.

    Nothing stays open between two accesses, so that thousands of sections need no file handles, and an object with such
    attributes is pickled as paths.
    """

    def __init__(self, *, optional: bool = False) -> None:
        self.optional = optional

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            if self.optional:
                return None  # what a dataclass takes for the default
            raise AttributeError(self.name)
        value = instance.__dict__[self.name]
        if isinstance(value, Path):
            return map_array(value)
        return value.open() if isinstance(value, StoredMatrix) else value

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value


@dataclass
class Section:
    """One slide, cut and counted, before any encoder.

    Every array may also be the path of an ``.npy`` file, which is mapped when it is used.

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
    labels
        (n,) str names of tissue, empty where a spot has none; only ever used to measure. ``None`` without.
    folder
        The shard that the section was opened from, ``None`` for one in memory.
    checksums
        SHA-256 of the shard's files by name.
    """

    name: str
    patient: str
    counts: Any = _Lazy()
    connectivities: Any = _Lazy()
    spot_image: Any = _Lazy(optional=True)
    niche_image: Any = _Lazy(optional=True)
    colour: tuple[np.ndarray, np.ndarray] | None = None
    labels: Any = _Lazy(optional=True)
    folder: Path | None = None
    checksums: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._n_spots, self._n_genes = self.counts.shape
        n = self._n_spots
        graph = self.connectivities.shape
        if graph != (n, n):
            raise ValueError(f"Section {self.name!r}: the niche graph is {graph}, for {n} spots.")
        for name in ("spot_image", "niche_image"):
            patches = getattr(self, name)
            if patches is not None and len(patches) != n:
                raise ValueError(f"Section {self.name!r}: {len(patches)} {name} patches for {n} spots.")
        labels = self.labels
        if labels is not None and len(labels) != n:
            raise ValueError(f"Section {self.name!r}: {len(labels)} labels for {n} spots.")

    def __len__(self) -> int:
        return self._n_spots

    @property
    def n_genes(self) -> int:
        """Number of genes of the vocabulary."""
        return self._n_genes

    @property
    def has_image(self) -> bool:
        """Whether patches are there."""
        return self.__dict__["spot_image"] is not None and self.__dict__["niche_image"] is not None


@dataclass
class EncodedSection:
    """A section after everything that is frozen.

    Every array may also be the path of an ``.npy`` file, which is mapped when it is used.

    Attributes
    ----------
    section
        What was encoded. Its colour is the one to normalise pixels with, ``None`` where the model has its own.
    spot_gene, niche_gene
        (n, input_dim) float32 inputs of the two gene encoders.
    clusters
        (n,) int64 expression clusters, for the negatives.
    spot_feature, niche_feature
        (n, n_views, dim) output of a frozen image encoder, float16 or float32; view 0 is the patch as it is, the others
        are augmented. ``None`` for an encoder that trains, or a section without image.
    """

    section: Section
    spot_gene: Any = _Lazy()
    niche_gene: Any = _Lazy()
    clusters: Any = _Lazy()
    spot_feature: Any = _Lazy(optional=True)
    niche_feature: Any = _Lazy(optional=True)

    def __len__(self) -> int:
        return len(self.section)


class Batch(NamedTuple):
    """Spots of one slide, or of several; what is absent or left out is ``None``.

    Attributes
    ----------
    library
        Names of the slides, joined by commas.
    spot_profile, niche_profile
        (n, input_dim) of the spots and of their niches, without noise.
    clusters
        (n,) int64; numbers of different slides mean different things.
    slides
        (n,) int64, which of the slides of this batch a spot is from.
    spot_gene, niche_gene
        (n, input_dim) float32.
    spot_image, niche_image
        (n, 3, height, width) float32, or the (n, dim) float32 features of a frozen encoder.
    """

    library: str
    spot_profile: torch.Tensor
    niche_profile: torch.Tensor
    clusters: torch.Tensor
    slides: torch.Tensor
    spot_gene: torch.Tensor | None
    niche_gene: torch.Tensor | None
    spot_image: torch.Tensor | None
    niche_image: torch.Tensor | None


def initial_clusters(profile: np.ndarray, n_clusters: int, *, seed: int) -> np.ndarray:
    """Cluster the expression profiles of one slide with k-means, as the source of negatives.

    Parameters
    ----------
    profile
        (n, d) expression profiles. Of more than 50,000, the centres are found on that many, spread evenly over the
        rows.
    n_clusters
        Number of clusters; fewer where the slide has fewer spots.
    seed
        Seed of the k-means++ start.

    Returns
    -------
    (n,) int64 cluster numbers.
    """
    check_positive("n_clusters", n_clusters, integer=True)
    n = len(profile)
    k = min(n_clusters, n)
    if n <= _MAX_CLUSTERED:
        _, labels = kmeans2(profile.astype(np.float64), k, minit="++", seed=seed, iter=50)
        return labels.astype(np.int64)
    sample = np.linspace(0, n - 1, _MAX_CLUSTERED).round().astype(np.intp)
    centres, _ = kmeans2(profile[sample].astype(np.float64), k, minit="++", seed=seed, iter=50)
    centres = centres.astype(profile.dtype)
    blocks = [vq(profile[start : start + _MAX_CLUSTERED], centres)[0] for start in range(0, n, _MAX_CLUSTERED)]
    return np.concatenate(blocks).astype(np.int64)


class _Draw(NamedTuple):
    """Which spots a step takes: ``rows[i]`` of slide ``slides[i]``; this process takes ``mine`` of them."""

    parts: list[EncodedSection]
    slides: np.ndarray
    rows: np.ndarray
    mine: slice

    def read(self, name: str) -> np.ndarray:
        """Return the rows of this process of an array of the encoded sections."""
        slides, rows = self.slides[self.mine], self.rows[self.mine]
        parts = [np.asarray(getattr(part, name)[rows[slides == i]]) for i, part in enumerate(self.parts)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Batches(IterableDataset):
    """A stream of batches, each from one slide or a few; step ``i`` depends on the seed and ``i`` alone.

    Slides are drawn with a probability that grows with the square root of their spots, those with an image
    ``image_sections`` times as often, spots without replacement. Several processes draw the same global batch and each
    takes every ``world_size``-th of its spots, so that the numbers do not depend on how many share the work. The
    workers of a ``DataLoader`` share the steps.

    Parameters
    ----------
    sections
        What to draw from.
    steps
        Number of steps of the whole run.
    batch_size
        Spots of the global batch, at most.
    augment
        Strengths of the augmentation.
    image_sections
        How much more often slides with an image are drawn.
    preprocess
        By ``"spot_image"`` and ``"niche_image"``: from (n, pixels, pixels, 3) uint8 and ``colour=`` to the encoder's
        input.
    seed
        Of everything that is drawn.
    rank, world_size
        Which process this is, of how many.
    slides_per_batch
        Slides that share a batch in equal parts; all have an image, or none has.
    start
        The first step: those before it were taken by a run that is resumed.
    stratified
        Exchange a few spots of a batch that by chance lacks a cluster of the slide, so that every spot meets negatives
        of all other clusters, or of as many as the batch has room for. The spots of the other batches stay as drawn.
    """

    def __init__(
        self,
        sections: Sequence[EncodedSection],
        *,
        steps: int,
        batch_size: int,
        augment: AugmentConfig,
        image_sections: float,
        preprocess: Mapping[str, Callable[..., torch.Tensor]],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        slides_per_batch: int = 1,
        start: int = 0,
        stratified: bool = True,
    ) -> None:
        self.sections = list(sections)
        self.steps = steps
        self.batch_size = check_positive("batch_size", batch_size, integer=True)
        self.augment = augment
        self.preprocess = dict(preprocess)
        self.seed = seed
        self.rank, self.world_size = rank, check_positive("world_size", world_size, integer=True)
        self.slides_per_batch = check_positive("slides_per_batch", slides_per_batch, integer=True)
        self.start = start
        self.stratified = stratified
        self._check()
        weight = np.array([np.sqrt(len(s)) * (image_sections if s.section.has_image else 1.0) for s in self.sections])
        self.probability = weight / weight.sum()
        self._n_clusters = [len(np.unique(s.clusters)) if stratified else 0 for s in self.sections]

    def _check(self) -> None:
        if not self.sections:
            raise ValueError("There is no section to draw batches from.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 ({self.world_size - 1}), got {self.rank!r}.")
        needed = self.world_size * self.slides_per_batch
        if self.batch_size < needed:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be at least world_size × slides_per_batch = {self.world_size} × "
                f"{self.slides_per_batch}."
            )
        for encoded in self.sections:
            if len(encoded) < self.world_size:
                raise ValueError(
                    f"Section {encoded.section.name!r} has {len(encoded)} spots, too few for {self.world_size} "
                    "processes to share a batch of it. Leave it out, or use fewer processes."
                )

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        first, stride = (0, 1) if info is None else (info.id, info.num_workers)
        for step in range(self.start + first, self.steps, stride):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        # The order of these draws is part of how a model was made: it may be added to, not changed.
        rng = np.random.default_rng([self.seed, step])
        draw = self._draw(step, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        spot, niche = (torch.from_numpy(draw.read(name)) for name in ("spot_gene", "niche_gene"))
        noise = self.augment.gene_noise
        # A niche mean is known better than its spots, hence half the noise.
        inputs = {
            "spot_gene": _add_noise(spot, noise, draw, generator),
            "niche_gene": _add_noise(niche, noise / 2, draw, generator),
            "spot_image": self._images(draw, "spot", rng, generator),
            "niche_image": self._images(draw, "niche", rng, generator),
        }
        absent = self._left_out(draw.parts[0].section, rng)
        return Batch(
            library=", ".join(part.section.name for part in draw.parts),
            spot_profile=spot,
            niche_profile=niche,
            clusters=torch.from_numpy(draw.read("clusters")),
            slides=torch.from_numpy(draw.slides[draw.mine]),
            **{name: None if name.endswith(absent) else x for name, x in inputs.items()},
        )

    def _draw(self, step: int, rng: np.random.Generator) -> _Draw:
        chosen = self._choose_slides(rng)
        share = self.batch_size // len(chosen)
        rows = []
        for number in chosen:
            encoded = self.sections[number]
            drawn = rng.choice(len(encoded), min(share, len(encoded)), replace=False)
            if self.stratified:
                # A stream of its own: what is drawn after this does not change.
                other = np.random.default_rng([self.seed, step, number])
                drawn = hold_all_clusters(drawn, encoded.clusters, self._n_clusters[number], other)
            rows.append(np.sort(drawn))
        sizes = [len(part) for part in rows]
        # Every process gets the same number of spots.
        total = sum(sizes) // self.world_size * self.world_size
        return _Draw(
            parts=[self.sections[number] for number in chosen],
            slides=np.repeat(np.arange(len(chosen)), sizes)[:total],
            rows=np.concatenate(rows)[:total],
            mine=slice(self.rank, None, self.world_size),
        )

    def _choose_slides(self, rng: np.random.Generator) -> list[int]:
        first = int(rng.choice(len(self.sections), p=self.probability))
        if self.slides_per_batch == 1:
            return [first]
        has_image = self.sections[first].section.has_image
        alike = [s.section.has_image == has_image for s in self.sections]
        others = np.array([i for i, like in enumerate(alike) if like and i != first], dtype=np.intp)
        n = min(self.slides_per_batch - 1, len(others))
        if n == 0:
            return [first]
        weight = self.probability[others]
        return [first, *(int(i) for i in rng.choice(others, n, replace=False, p=weight / weight.sum()))]

    def _left_out(self, section: Section, rng: np.random.Generator) -> tuple[str, ...]:
        chance, share = rng.random(), self.augment.drop_modality
        if not section.has_image or chance >= 2 * share:
            return ()
        return ("image",) if chance < share else ("gene",)

    def _images(
        self, draw: _Draw, scale: str, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor | None:
        if not draw.parts[0].section.has_image:
            return None
        if getattr(draw.parts[0], f"{scale}_feature") is not None:
            return _features(draw, f"{scale}_feature", rng)
        slides, rows = draw.slides[draw.mine], draw.rows[draw.mine]
        images = []
        for i, part in enumerate(draw.parts):
            pixels = np.asarray(getattr(part.section, f"{scale}_image")[rows[slides == i]])
            images.append(self.preprocess[f"{scale}_image"](pixels, colour=part.section.colour))
        joined = images[0] if len(images) == 1 else torch.cat(images)
        return augment_images(joined, self.augment, rng=rng, generator=generator, n=len(draw.rows), mine=draw.mine)


def _features(draw: _Draw, name: str, rng: np.random.Generator) -> torch.Tensor:
    """Return one view of each spot, drawn at random."""
    n_views = min(getattr(part, name).shape[1] for part in draw.parts)
    view = rng.integers(n_views, size=len(draw.rows)) if n_views > 1 else np.zeros(len(draw.rows), dtype=np.intp)
    slides, rows, view = draw.slides[draw.mine], draw.rows[draw.mine], view[draw.mine]
    parts = [getattr(p, name)[rows[slides == i], view[slides == i]] for i, p in enumerate(draw.parts)]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))


def hold_all_clusters(rows: np.ndarray, clusters: np.ndarray, n_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Exchange rows of a draw that lacks clusters for members of these.

    Parameters
    ----------
    rows
        (k,) spots that were drawn, each once.
    clusters
        (n,) cluster of every spot of the slide.
    n_clusters
        How many clusters the slide has.
    rng
        Source of randomness, used only where a cluster is lacking.

    Returns
    -------
    (k,) spots, each once. Every cluster is there, or every spot is of another cluster. A cluster gives up a spot only
    if it keeps one.
    """
    present = np.unique(clusters[rows])
    if len(present) == n_clusters or len(rows) == len(present):
        return rows
    rows = rng.permutation(rows)
    _, first = np.unique(clusters[rows], return_index=True)
    spare = np.setdiff1d(np.arange(len(rows)), first)
    order = rng.permutation(len(clusters))
    names, member = np.unique(clusters[order], return_index=True)
    lacking = rng.permutation(order[member[~np.isin(names, present)]])
    n = min(len(spare), len(lacking))
    rows[rng.choice(spare, n, replace=False)] = lacking[:n]
    return rows


def _add_noise(values: torch.Tensor, sd: float, draw: _Draw, generator: torch.Generator) -> torch.Tensor:
    if not sd:
        return values
    shape = (len(draw.rows), *values.shape[1:])
    return values + sd * torch.randn(shape, generator=generator)[draw.mine]


def augment_images(
    images: torch.Tensor,
    config: AugmentConfig,
    *,
    rng: np.random.Generator,
    generator: torch.Generator,
    n: int | None = None,
    mine: slice = slice(None),
) -> torch.Tensor:
    """Vary the colour of each normalised patch, and flip or turn the batch.

    Parameters
    ----------
    images
        (k, 3, h, w) float32, normalised to the slide.
    config
        Strengths.
    rng, generator
        Sources of randomness.
    n, mine
        Random numbers are drawn for ``n`` patches, of which ``images`` are those at ``mine``.
    """
    shape = (len(images) if n is None else n, 3, 1, 1)
    if config.gain:
        images = images * (1 + config.gain * torch.randn(shape, generator=generator)[mine])
    if config.shift:
        images = images + config.shift * torch.randn(shape, generator=generator)[mine]
    if config.flips:
        turn = rng.random(3) < 0.5
        dims = [dim for dim, flip in ((-2, turn[0]), (-1, turn[1])) if flip]
        images = images.flip(dims) if dims else images
        images = images.transpose(-1, -2) if turn[2] else images
    return images
