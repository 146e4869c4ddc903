"""Take what a model has seen from its training sections, so that it can say what is foreign to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from stalign._logging import logger
from stalign.models._checkpoint import load_folder
from stalign.models._familiarity import Familiarity, SectionSample, fit_familiarity, neighbour_sum
from stalign.models._network import STAlign
from stalign.train._config import FamiliarityFitConfig
from stalign.train._data import Section
from stalign.train._shards import open_shards


def fit_model_familiarity(model: STAlign, sections: Sequence[Section], config: FamiliarityFitConfig) -> STAlign:
    """Give the model statistics of its training spots, for :func:`stalign.tl.quality`.

    Parameters
    ----------
    model
        Any model; its weights play no part.
    sections
        Training sections; of many, as many as the config says, spread over their order.
    config
        How much is looked at; ``enabled=False`` leaves the model without.

    Returns
    -------
    The same model.
    """
    if not config.enabled:
        return set_familiarity(model, None)
    chosen = list(sections)
    if len(chosen) > config.max_sections:
        places = np.linspace(0, len(chosen) - 1, config.max_sections).round().astype(int)
        chosen = [chosen[place] for place in places]
    samples = [sample_section(section, config.max_spots) for section in chosen]
    familiarity = fit_familiarity(samples, n_genes=config.n_genes, n_components=config.n_components)
    if familiarity is None:
        logger.info("No statistics of the training spots: the sections have neither enough genes nor an image.")
    else:
        logger.info(
            "Statistics of the training spots: %d genes, %s.",
            familiarity.config.n_genes,
            "colour and texture" if familiarity.knows_images else "no image",
        )
    return set_familiarity(model, familiarity)


def set_familiarity(model: STAlign, familiarity: Familiarity | None) -> STAlign:
    """Put statistics into a model, and their size into its config."""
    model.familiarity = None if familiarity is None else familiarity.to(model.device)
    model.config = replace(model.config, familiarity=None if familiarity is None else familiarity.config)
    return model


def sample_section(section: Section, max_spots: int) -> SectionSample:
    """Draw spots spread over the order of a section, with the sums of their niches' counts."""
    n = len(section)
    rows = np.unique(np.linspace(0, n - 1, min(n, max_spots)).round().astype(np.intp))
    counts = sp.csr_matrix(section.counts)
    return SectionSample(
        patient=section.patient,
        spot=counts[rows],
        niche=neighbour_sum(sp.csr_matrix(section.connectivities)[rows], counts),
        measured=np.bincount(counts.indices, minlength=counts.shape[1]) > 0,
        patches=np.asarray(section.spot_image[rows]) if section.has_image else None,
    )


def add_familiarity(
    model: str | Path | STAlign,
    sections: str | Path | Sequence[Section],
    out: str | Path | None = None,
    *,
    n_genes: int = 4000,
    max_spots: int = 500,
    dtype: str = "float32",
    overwrite: bool = False,
) -> STAlign:
    """Add statistics of training spots to a model that was trained without, so that :func:`stalign.tl.quality` works.

    The weights stay as they are. Pass the sections that the model was trained on: whatever is passed is what counts as
    known.

    Parameters
    ----------
    model
        Name, folder, Hub id, or a loaded model, which is changed in place. An embedding that it made stays valid, but
        a file that is written is another model to :func:`stalign.tl.embed`.
    sections
        Sections over the model's vocabulary, in memory or the folder of shards of :func:`stalign.pp.prepare_shards`.
    out
        Folder to save the model to; ``None`` saves nothing. May be the folder the model came from, with ``overwrite``.
    n_genes
        Genes with the most counts that are used, at most.
    max_spots
        Spots of a section that are looked at, at most.
    dtype, overwrite
        As of :meth:`stalign.models.STAlign.save`.

    Returns
    -------
    The model; that of ``out``, read again, where one was saved.

    Raises
    ------
    ValueError
        If there is no section, one has another vocabulary, or there is nothing to take statistics from.

    Examples
    --------
    >>> from stalign import train
    >>> train.add_familiarity("my-model", "cohort.shards", "my-model", overwrite=True)  # doctest: +SKIP
    """
    from stalign.models import load

    loaded = model if isinstance(model, STAlign) else load(model)
    chosen = _open(sections, loaded)
    config = FamiliarityFitConfig(n_genes=n_genes, max_spots=max_spots)
    earlier = loaded.familiarity
    fit_model_familiarity(loaded, chosen, config)
    if loaded.familiarity is None:
        set_familiarity(loaded, earlier)
        raise ValueError(
            f"The {len(chosen)} sections have neither enough genes nor an image: nothing to take statistics from."
        )
    if out is not None:
        return load_folder(loaded.save(out, dtype=dtype, overwrite=overwrite))
    return loaded


def _open(sections: str | Path | Sequence[Section], model: STAlign) -> list[Section]:
    if isinstance(sections, (str, Path)):
        shards = open_shards(Path(sections).expanduser())
        shards.check(model.geometry, model.genes)
        chosen = shards.open(list(shards.entries))
    else:
        chosen = list(sections)
    if not chosen:
        raise ValueError("sections is empty: pass the sections that the model was trained on.")
    for section in chosen:
        if section.n_genes != len(model.genes):
            raise ValueError(
                f"Section {section.name!r} has counts of {section.n_genes} genes, the model a vocabulary of "
                f"{len(model.genes)}."
            )
    return chosen
