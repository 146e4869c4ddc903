"""From section files to what :func:`stalign.train.pretrain` takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stalign._keys import Key
from stalign._logging import logger

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import ModelConfig
    from stalign.train import PretrainConfig, Section


def prepare_sections(config: PretrainConfig, role: str = "train") -> tuple[list[Section], tuple[str, ...]]:
    """Read the sections of a pretraining config and cut their patches.

    Parameters
    ----------
    config
        A pretraining run.
    role
        ``"train"`` or ``"validation"``.

    Returns
    -------
    The sections, and the vocabulary whose genes are the columns of their counts.
    """
    import anndata

    from stalign.genes import protein_coding_genes
    from stalign.models import config as model_config

    genes = protein_coding_genes()
    network = model_config(config.network.config).updated(config.network.changes)
    sections = []
    files = config.data.files(role) if role == "train" or config.data.validation else []
    for file in files:
        adata = anndata.read_h5ad(file)
        sections.append(prepare_section(adata, network, genes, name=file.stem, mpp=config.data.mpp.get(file.stem)))
    return sections, genes


def prepare_section(
    adata: AnnData, network: ModelConfig, genes: tuple[str, ...], *, name: str, mpp: float | None = None
) -> Section:
    """Turn the AnnData of one slide into a training section.

    Parameters
    ----------
    adata
        Counts, coordinates and, if there is one, the image. It is not changed.
    network
        Says how large niches and patches are.
    genes
        The vocabulary.
    name
        Name of the section.
    mpp
        µm per full-resolution pixel, where nothing in the file states it.
    """
    from stalign.genes import aggregate, check_counts, row_normalise
    from stalign.pp._genes import resolve_genes
    from stalign.pp._niches import extract_niches
    from stalign.slide._library import PatchReader
    from stalign.train import Section

    geometry = network.geometry
    work = adata.copy()
    extract_niches(
        work, mpp=mpp, n_neighbors=geometry.n_neighbors, spot_um=geometry.spot_um, niche_um=geometry.niche_um
    )
    check_counts(work.X, name=f"X of {name}")
    counts = aggregate(work.X, resolve_genes(work, genes))
    patient = str(work.obs["patient"].iloc[0]) if "patient" in work.obs else name
    images: dict[str, Any] = {}
    with PatchReader(work) as reader:
        if reader.has_image.all():
            everything = np.arange(work.n_obs)
            colours = reader.colours(geometry.spot_um, geometry.spot_pixels)
            images = {
                "spot_image": reader.read(everything, geometry.spot_um, geometry.spot_pixels),
                "niche_image": reader.read(everything, geometry.niche_um, geometry.niche_pixels),
                "colour": colours[reader.libraries[0]],
            }
    graph = row_normalise(work.obsp[Key.connectivities()])
    logger.info("Section %s: %d spots, %s.", name, work.n_obs, "image and counts" if images else "counts only")
    return Section(name=name, patient=patient, counts=counts, connectivities=graph, **images)


def pretrain_from_files(config: PretrainConfig) -> Path:
    """Prepare the sections that a config names and train on them: what ``stalign pretrain`` runs."""
    from stalign.train import pretrain

    sections, genes = prepare_sections(config, "train")
    validation, _ = prepare_sections(config, "validation")
    return pretrain(config, sections, genes=genes, validation=validation)
