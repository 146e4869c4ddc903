"""Everything that is frozen, run once over each section and kept beside it on disk.

What depends on weights that train is made in the training step. The rest, the gene encoders' inputs (profiles, scGPT
embeddings, pathway values), clusters, and features of frozen image encoders, is made here, block by block.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from stalign._logging import logger
from stalign._settings import settings
from stalign._validate import check_positive
from stalign.models._checkpoint import tensor_digest
from stalign.models._gene_inputs import GeneInputs
from stalign.models._network import STAlign
from stalign.models.encoders._base import GeneEncoder, ImageEncoder
from stalign.train._config import AugmentConfig
from stalign.train._data import EncodedSection, Section, initial_clusters
from stalign.train._shards import CACHE, cached, digest_of_genes, row_blocks

# Raised when what is computed here changes, so that older caches are not taken.
_VERSION = 2
_FEATURE_DTYPE = np.float16


class FrozenEncoders:
    """The frozen parts of a model, and all that what they make depends on.

    Parameters
    ----------
    model
        The network; its encoders are used as they are.
    n_clusters
        Expression clusters of a slide.
    seed
        Of clusters and augmented views.
    views
        Views of each patch that frozen image encoders see: the patch as it is, and ``views - 1`` augmented ones.
    augment
        How the views are augmented; ``gain``, ``shift`` and ``flips`` are used.
    device
        Where frozen image encoders run; ``None``: where the model is.
    batch_size
        Patches in one forward pass.
    progress
        Show a progress bar; ``None`` is ``stalign.settings.progress``.
    """

    def __init__(
        self,
        model: STAlign,
        *,
        n_clusters: int,
        seed: int,
        views: int = 1,
        augment: AugmentConfig | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.n_clusters = n_clusters
        self.seed = seed
        self.views = check_positive("views", views, integer=True)
        self.augment = augment or AugmentConfig(gain=0.0, shift=0.0, flips=False)
        if self.views > 1 and not (self.augment.gain or self.augment.shift or self.augment.flips):
            raise ValueError(f"views is {views}, but no augmentation is asked for: all views would be the same.")
        self.device = torch.device(model.device if device is None else device)
        self.batch_size = check_positive("batch_size", batch_size, integer=True)
        self.progress = settings.progress if progress is None else progress

    # -- what the results depend on ------------------------------------------------------------------------------------

    @cached_property
    def _gene_keys(self) -> dict[str, dict[str, Any]]:
        vocabulary = digest_of_genes(self.model.genes)
        return {name: {**self._gene_key(name), "vocabulary_sha256": vocabulary} for name in ("spot_gene", "niche_gene")}

    def _gene_key(self, name: str) -> dict[str, Any]:
        branch, encoder = self.model.config.branch(name), self.model.encoder(name)
        provenance = encoder.provenance
        return {
            "version": _VERSION,
            "encoder": branch.encoder,
            "args": branch.args,
            # Which genes the inputs stand for is in the buffers; weights that train do not enter.
            "buffers_sha256": tensor_digest(_buffers(encoder)),
            "weights_sha256": "" if provenance is None else provenance.sha256,
        }

    @cached_property
    def image_keys(self) -> dict[str, dict[str, Any]]:
        """By name of a frozen image branch: encoder, weights, transform, and how views are made."""
        return {name: self._image_key(name) for name in ("spot_image", "niche_image") if self.is_cacheable(name)}

    def is_cacheable(self, name: str) -> bool:
        """Whether no gradient trains an image branch's encoder, and it yields what the network takes for features."""
        branch, encoder = self.model.branch(name), self.model.encoder(name)
        parameters = list(encoder.parameters())
        fixed = not parameters or (branch.frozen and not any(parameter.requires_grad for parameter in parameters))
        return fixed and encoder.n_tokens is None

    def _image_key(self, name: str) -> dict[str, Any]:
        branch, encoder = self.model.config.branch(name), self.model.encoder(name)
        provenance = encoder.provenance
        return {
            "version": _VERSION,
            "encoder": branch.encoder,
            "args": branch.args,
            "revision": "" if provenance is None else provenance.revision,
            "weights_sha256": "" if provenance is None else provenance.sha256,
            # The weights as they are here and now, wherever they came from.
            "state_sha256": tensor_digest(encoder),
            "transform": {"mean": list(encoder.mean), "std": list(encoder.std), "size": encoder.size},
            "colour": self.model.config.colour,
            "amp": self._amp,
            "dtype": np.dtype(_FEATURE_DTYPE).str,
            "views": self.views,
            "seed": self.seed if self.views > 1 else 0,
            "augment": {name: getattr(self.augment, name) for name in ("gain", "shift", "flips")}
            if self.views > 1
            else {},
        }

    @property
    def _amp(self) -> str:
        return settings.amp or "" if self.device.type != "cpu" else ""

    # -- one section ---------------------------------------------------------------------------------------------------

    def encode(self, section: Section) -> EncodedSection:
        """Run everything frozen over a section, or find that it was done.

        Results of a section that was opened from a shard are kept in the shard's folder and mapped; those of one in
        memory stay there.
        """
        if section.n_genes != len(self.model.genes):
            raise ValueError(
                f"Section {section.name!r} has counts of {section.n_genes} genes, the model a vocabulary of "
                f"{len(self.model.genes)}."
            )
        genes = self._encode_genes(section)
        normalised = copy(section)
        if self.model.config.colour != "library":
            normalised.colour = None
        features = {}
        for name in self.image_keys if section.has_image else ():
            features[name.replace("image", "feature")] = self._encode_images(normalised, name)
        return EncodedSection(section=normalised, **genes, **features)

    def _encode_genes(self, section: Section) -> dict[str, Any]:
        content = _checksums(section, "counts", "connectivities")

        @cache
        def inputs() -> GeneInputs:
            # Once for both encoders, and only where one of them is not cached.
            statistics = self.model.fit_genes(section.counts, connectivities=section.connectivities)
            return GeneInputs(self.model, section.counts.__getitem__, section.connectivities, statistics)

        keys = {name: {**key, "content": content} for name, key in self._gene_keys.items()}
        genes: dict[str, Any] = {}
        for name, key in keys.items():
            encoder = self.model.encoder(name)
            shape = (len(section), encoder.input_dim)
            blocks = partial(self._gene_blocks, inputs, name, len(section))
            genes[name] = _kept(section, name, key, shape, np.float32, blocks)
        key = {"profile": keys["niche_gene"], "n_clusters": self.n_clusters, "seed": self.seed}

        def clusters() -> Iterator[np.ndarray]:
            profile = genes["niche_gene"]
            profile = np.load(profile, mmap_mode="r") if isinstance(profile, Path) else profile
            yield initial_clusters(np.asarray(profile), self.n_clusters, seed=self.seed)

        genes["clusters"] = _kept(section, "clusters", key, (len(section),), np.int64, clusters)
        return genes

    def _gene_blocks(self, inputs: Callable[[], GeneInputs], name: str, n_spots: int) -> Iterator[np.ndarray]:
        """Yield a gene encoder's input, some tens of megabytes at a time."""
        encoder: GeneEncoder = self.model.encoder(name)
        # An encoder may run a network of its own here (scGPT does).
        with self._lent(encoder):
            slide = inputs()
            encode = slide.spots if name == "spot_gene" else slide.niches
            for rows in row_blocks(n_spots, 4 * encoder.input_dim):
                yield encode(np.arange(rows.start, rows.stop))

    def _encode_images(self, section: Section, name: str) -> Any:
        colour = None if section.colour is None else [values.astype(float).tolist() for values in section.colour]
        key = {**self.image_keys[name], "content": _checksums(section, name), "library_colour": colour}
        shape = (len(section), self.views, self.model.encoder(name).dim)
        return _kept(section, name, key, shape, _FEATURE_DTYPE, partial(self._feature_blocks, section, name))

    def _feature_blocks(self, section: Section, name: str) -> Iterator[np.ndarray]:
        encoder: ImageEncoder = self.model.encoder(name)
        patches = getattr(section, name)
        draws = [_ViewDraw(section, name, view, self.seed) for view in range(1, self.views)]
        bar = tqdm(
            total=len(section) * self.views, unit="patch", desc=f"{section.name} {name}", disable=not self.progress
        )
        with bar, self._lent(encoder):
            for start in range(0, len(section), self.batch_size):
                rows = slice(start, min(start + self.batch_size, len(section)))
                images = encoder.preprocess(np.array(patches[rows]), colour=section.colour)
                views = [images, *(draw.apply(images, rows, self.augment) for draw in draws)]
                with torch.inference_mode(), self._autocast():
                    features = [encoder(view.to(self.device)).float().cpu().numpy() for view in views]
                yield _as_feature(np.stack(features, axis=1), section, name)
                bar.update((rows.stop - rows.start) * self.views)

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self._amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=bool(self._amp))

    @contextmanager
    def _lent(self, encoder: ImageEncoder | GeneEncoder) -> Iterator[None]:
        """Lend an encoder to the device, in evaluation mode; afterwards it is as it was."""
        before, was_training = self.model.device, encoder.training
        try:
            encoder.to(self.device).eval()
            yield
        finally:
            encoder.to(before).train(was_training)


def _buffers(encoder: GeneEncoder) -> torch.nn.Module:
    """Return a module that holds nothing but an encoder's buffers."""
    holder = torch.nn.Module()
    persistent = set(encoder.state_dict())
    for name, buffer in encoder.named_buffers():
        if name in persistent:
            holder.register_buffer(name.replace(".", "/"), buffer)
    return holder


def _checksums(section: Section, *names: str) -> dict[str, str]:
    """Return the SHA-256 of the section's files that belong to some of its arrays."""
    return {file: digest for file, digest in section.checksums.items() if file.startswith(names)}


def _kept(
    section: Section,
    name: str,
    key: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: Any,
    blocks: Callable[[], Iterator[np.ndarray]],
) -> np.ndarray | Path:
    """Return an array in memory, or where it is kept for a section that is on disk."""
    if section.folder is not None:
        return cached(section.folder / CACHE, name, key, shape, dtype, blocks)
    values = np.empty(shape, dtype=dtype)
    start = 0
    for block in blocks():
        values[start : start + len(block)] = block
        start += len(block)
    return values


class _ViewDraw:
    """The random numbers of one augmented view of all patches of a section; they do not depend on the batches."""

    def __init__(self, section: Section, name: str, view: int, seed: int) -> None:
        rng = np.random.default_rng([seed, view, zlib.crc32(f"{section.name}/{name}".encode())])
        n = len(section)
        self.gain = torch.from_numpy(rng.standard_normal((n, 3, 1, 1), dtype=np.float32))
        self.shift = torch.from_numpy(rng.standard_normal((n, 3, 1, 1), dtype=np.float32))
        self.turn = torch.from_numpy(rng.random((n, 3, 1, 1, 1)) < 0.5)

    def apply(self, images: torch.Tensor, rows: slice, augment: AugmentConfig) -> torch.Tensor:
        """Return the view of normalised (n, 3, height, width) patches, each turned and coloured by itself."""
        images = images * (1 + augment.gain * self.gain[rows]) + augment.shift * self.shift[rows]
        if augment.flips:
            turn = self.turn[rows]
            images = torch.where(turn[:, 0], images.flip(-2), images)
            images = torch.where(turn[:, 1], images.flip(-1), images)
            images = torch.where(turn[:, 2], images.transpose(-1, -2), images)
        return images


def _as_feature(values: np.ndarray, section: Section, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = values.astype(_FEATURE_DTYPE)
    if not np.isfinite(half).all():
        raise ValueError(
            f"The frozen encoder of branch {name} gives features of section {section.name!r} that half precision "
            f"cannot hold (largest {np.abs(values).max():g}). Are its weights loaded, and are they whole?"
        )
    return half


def encode_section(model: STAlign, section: Section, **options: Any) -> EncodedSection:
    """Run everything that is frozen over a section, once.

    Parameters
    ----------
    model
        The network.
    section
        One slide.
    **options
        As of :class:`FrozenEncoders`: ``n_clusters``, ``seed``, and more.
    """
    return FrozenEncoders(model, **options).encode(section)


def encode_sections(
    model: STAlign, sections: Sequence[Section], *, rank: int = 0, world_size: int = 1, **options: Any
) -> list[EncodedSection]:
    """Run everything that is frozen over all sections, once.

    Parameters
    ----------
    model
        The network.
    sections
        Slides.
    rank, world_size
        Which process this is, of how many: each encodes its share first, and then finds what the others have cached.
    **options
        As of :class:`FrozenEncoders`.

    Returns
    -------
    In the order of ``sections``.
    """
    frozen = FrozenEncoders(model, **options)
    done: dict[int, EncodedSection] = {}
    for place in [*range(rank, len(sections), world_size), *range(len(sections))]:
        if place not in done:
            done[place] = frozen.encode(sections[place])
    names = [*frozen.image_keys]
    logger.info("Encoded %d sections%s.", len(done), f", with features of {' and '.join(names)}" if names else "")
    return [done[place] for place in range(len(sections))]
