"""From the AnnData of one slide, its niches found, to a training section in memory or in a shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from stalign._logging import logger
from stalign._validate import listing
from stalign.genes import GeneMatch, aggregate, check_counts, row_normalise
from stalign.models._config import Geometry
from stalign.slide._library import PatchReader, niche_graph
from stalign.train._data import Section
from stalign.train._shards import (
    ShardWriter,
    folder_lock,
    row_blocks,
    section_settings,
    write_genes,
    write_manifest,
)

if TYPE_CHECKING:
    from anndata import AnnData

LABELS = "annotation"
PATIENT = "patient"


class SectionReader:
    """The parts of a training section, read from an AnnData with a niche record; patches block by block.

    Parameters
    ----------
    adata
        One slide, with the niche record of :func:`stalign.pp.extract_niches`. It is not changed.
    geometry
        Says how large the patches are.
    match
        The genes of the AnnData matched to the vocabulary.
    name
        Name of the section.
    patient
        Its patient; ``None`` takes ``obs["patient"]``, else the section's name.
    """

    def __init__(
        self, adata: AnnData, geometry: Geometry, *, match: GeneMatch, name: str, patient: str | None = None
    ) -> None:
        check_counts(adata.X, name=f"X of {name}")
        self.geometry = geometry
        self.name = name
        self.patient = patient or _patient(adata, name) or name
        self.counts = aggregate(adata.X, match)
        self.connectivities = row_normalise(niche_graph(adata))
        self.labels = _labels(adata)
        self._patches = PatchReader(adata)
        libraries = self._patches.libraries
        if len(libraries) > 1:
            raise ValueError(
                f"Section {name!r} holds {len(libraries)} libraries: {listing(libraries)}. A training section is one "
                "slide: split the AnnData by library first."
            )
        self.has_image = bool(self._patches.has_image.all())
        self.colour: tuple[np.ndarray, np.ndarray] | None = None
        if self.has_image:
            self.colour = self._patches.colours(geometry.spot_um, geometry.spot_pixels)[libraries[0]]

    def __len__(self) -> int:
        return self.counts.shape[0]

    def patch_shape(self, scale: str) -> tuple[int, int, int, int]:
        """Return the shape of all patches of ``"spot"`` or ``"niche"``."""
        pixels = self.geometry.spot_pixels if scale == "spot" else self.geometry.niche_pixels
        return (len(self), pixels, pixels, 3)

    def patches(self, scale: str) -> Iterator[np.ndarray]:
        """Yield the patches of ``"spot"`` or ``"niche"``, uint8, some tens of megabytes at a time."""
        um = self.geometry.spot_um if scale == "spot" else self.geometry.niche_um
        shape = self.patch_shape(scale)
        for rows in row_blocks(len(self), int(np.prod(shape[1:]))):
            yield self._patches.read(np.arange(rows.start, rows.stop), um, shape[1])

    def close(self) -> None:
        """Close the image."""
        self._patches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _patient(adata: AnnData, name: str) -> str:
    if PATIENT not in adata.obs:
        return ""
    patients = adata.obs[PATIENT].dropna().astype(str).unique()
    if len(patients) > 1:
        raise ValueError(
            f"Section {name!r} names {len(patients)} patients in `obs['{PATIENT}']`: {listing(patients)}. A training "
            "section is one slide of one patient, since training and validation are split by patient."
        )
    return str(patients[0]) if len(patients) else ""


def _labels(adata: AnnData) -> np.ndarray | None:
    """Return the names of tissue in ``obs``, empty where there is none."""
    if LABELS not in adata.obs:
        return None
    column: pd.Series = adata.obs[LABELS]
    return column.astype(object).where(column.notna(), "").to_numpy().astype(str)


def read_section(
    adata: AnnData, geometry: Geometry, *, match: GeneMatch, name: str, patient: str | None = None
) -> Section:
    """Read a section into memory; parameters as of :class:`SectionReader`."""
    with SectionReader(adata, geometry, match=match, name=name, patient=patient) as reader:
        images: dict[str, Any] = {}
        for scale in ("spot", "niche") if reader.has_image else ():
            images[f"{scale}_image"] = np.concatenate(list(reader.patches(scale)))
        return Section(
            name=name,
            patient=reader.patient,
            counts=reader.counts,
            connectivities=reader.connectivities,
            labels=reader.labels,
            colour=reader.colour,
            **images,
        )


def write_section(
    folder: Path,
    adata: AnnData,
    geometry: Geometry,
    *,
    match: GeneMatch,
    name: str,
    patient: str | None = None,
    meta: Mapping[str, Any],
) -> None:
    """Write a section as a shard, patches block by block.

    Parameters
    ----------
    folder
        The shards.
    adata, geometry, match, name, patient
        As of :class:`SectionReader`.
    meta
        What ``meta.json`` holds beside what describes the arrays: ``settings`` and ``source``.
    """
    with (
        SectionReader(adata, geometry, match=match, name=name, patient=patient) as reader,
        ShardWriter(folder, name) as writer,
    ):
        if reader.has_image:
            for scale in ("spot", "niche"):
                writer.add_blocks(f"{scale}_image", reader.patch_shape(scale), np.uint8, reader.patches(scale))
        _finish(writer, reader, meta)
    logger.info("Section %s: %d spots, %s.", name, len(reader), "image and counts" if reader.has_image else "counts")


def save_sections(folder: str | Path, sections: Sequence[Section], *, genes: Sequence[str], geometry: Geometry) -> Path:
    """Write sections that are in memory as shards.

    Parameters
    ----------
    folder
        The shards; sections that are there already stay, unless they have the name of a new one.
    sections
        Whatever they were made from.
    genes
        The vocabulary: symbols in the order of the columns of ``Section.counts``.
    geometry
        Niche and patch sizes the sections were cut with.

    Returns
    -------
    The folder, as a path.

    Examples
    --------
    >>> from stalign import train
    >>> train.save_sections("my.shards", sections, genes=genes, geometry=geometry)  # doctest: +SKIP
    """
    folder = Path(folder).expanduser()
    settings = section_settings(geometry, genes)
    with folder_lock(folder):
        for section in sections:
            with ShardWriter(folder, section.name) as writer:
                for name in ("spot_image", "niche_image") if section.has_image else ():
                    writer.add(name, getattr(section, name))
                source = {"path": f"{section.patient}/{section.name}", "files": {}}
                _finish(writer, section, {"settings": settings, "source": source})
        write_genes(folder, genes)
        write_manifest(folder, settings)
    return folder


def _finish(writer: ShardWriter, section: SectionReader | Section, meta: Mapping[str, Any]) -> None:
    """Write all but the patches, and put the shard in its place."""
    writer.add_matrix("counts", section.counts)
    writer.add_matrix("connectivities", section.connectivities)
    if section.labels is not None:
        writer.add("labels", section.labels)
    colour = None
    if section.colour is not None:
        mean, sd = (np.asarray(values, dtype=float).tolist() for values in section.colour)
        colour = {"mean": mean, "sd": sd}
    n_spots, n_genes = section.counts.shape
    writer.finish(
        {
            **meta,
            "patient": section.patient,
            "n_spots": n_spots,
            "n_genes": n_genes,
            "has_image": section.has_image,
            "colour": colour,
        }
    )
