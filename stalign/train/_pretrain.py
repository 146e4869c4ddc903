"""A pretraining run from sections to a checkpoint folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from stalign._logging import logger
from stalign._settings import settings
from stalign.models._checkpoint import ModelCard
from stalign.models._network import STAlign
from stalign.models._registry import config as model_config
from stalign.train._config import PretrainConfig
from stalign.train._data import Batches, EncodedSection, Section, initial_clusters
from stalign.train._prediction import fit_prediction

if TYPE_CHECKING:
    from lightning import Trainer

LOG = "training_log.csv"
CONFIG = "training_config.json"


def encode_section(model: STAlign, section: Section, *, n_clusters: int, seed: int) -> EncodedSection:
    """Run everything that is frozen over a section, once: gene profiles and initial clusters."""
    spot, niche = model.preprocess_genes(section.counts, connectivities=section.connectivities)
    return EncodedSection(
        section=section if model.config.colour == "library" else replace(section, colour=None),
        spot_gene=torch.from_numpy(spot),
        niche_gene=torch.from_numpy(niche),
        clusters=torch.from_numpy(initial_clusters(niche, n_clusters, seed=seed)),
    )


def pretrain(
    config: PretrainConfig,
    sections: Sequence[Section],
    *,
    genes: Sequence[str],
    validation: Sequence[Section] = (),
) -> Path:
    """Train a model on sections and write it to ``config.out``.

    Parameters
    ----------
    config
        The run; see :func:`read_config`.
    sections
        Training sections. Those without an image train the gene side, the fusion, and the niche scale.
    genes
        The vocabulary: symbols in the order of the columns of ``Section.counts``.
    validation
        Sections whose retrieval is logged, never trained on.

    Returns
    -------
    The checkpoint folder: what :func:`stalign.models.load` reads, ``training_log.csv`` and ``training_config.json``.

    Raises
    ------
    ValueError
        If no section has an image, since nothing could be aligned.
    FileExistsError
        If ``config.out`` exists and is no checkpoint folder.
    ImportError
        Without Lightning (``pip install 'stalign[train]'``).
    """
    lightning = _import_lightning()
    from stalign.train._module import Alignment

    if not any(section.has_image for section in sections):
        raise ValueError(f"None of the {len(sections)} training sections has an image: there is nothing to align.")
    out = Path(config.out).expanduser()
    lightning.seed_everything(config.seed, verbose=False)
    changes = {**config.network.changes, "name": config.network.name}
    model = STAlign(model_config(config.network.config).updated(changes), genes=genes)
    model.warn_untrained()
    # Moments of parameters that hardly move fall below the normal range, where CPUs are many times slower.
    torch.set_flush_denormal(True)
    # The layout that convolutions are fastest in, on CPUs and GPUs alike.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    n_clusters = config.objective.n_clusters
    encoded = [encode_section(model, s, n_clusters=n_clusters, seed=config.seed) for s in sections]
    held_out = [encode_section(model, s, n_clusters=n_clusters, seed=config.seed) for s in validation]
    logger.info("Encoded %d training and %d validation sections.", len(encoded), len(held_out))
    batches = Batches(
        encoded,
        steps=config.optimiser.steps,
        batch_size=config.optimiser.batch_size,
        augment=config.augment,
        image_sections=config.optimiser.image_sections,
        preprocess={"spot_image": model.preprocess_spot_image, "niche_image": model.preprocess_niche_image},
        seed=config.seed,
    )
    module = Alignment(
        model, objective=config.objective, optimiser=config.optimiser, validation=held_out, seed=config.seed
    )
    with tempfile.TemporaryDirectory(prefix="stalign-train-") as logs:
        trainer = _trainer(lightning, config, logs, has_validation=bool(held_out))
        trainer.fit(
            module,
            DataLoader(batches, batch_size=None, collate_fn=_same),
            DataLoader(list(range(len(held_out))), batch_size=None, collate_fn=_same)  # type: ignore[arg-type]
            if held_out
            else None,
        )
        model = fit_prediction(module.model.cpu().eval(), encoded, config.prediction)
        model.save(out, dtype=config.network.dtype, card=_card(config, sections), overwrite=True)
        _replace(Path(trainer.logger.log_dir) / "metrics.csv", out / LOG)
    _write_text(out / CONFIG, json.dumps(_recipe(config), indent=2) + "\n")
    logger.info("Wrote %s.", out)
    return out


def _recipe(config: PretrainConfig) -> dict[str, Any]:
    """Return the config without the places of one machine, which are not part of how a model was made."""
    recipe = config.to_dict()
    recipe["out"] = Path(config.out).name
    recipe["data"]["root"] = "."
    return recipe


def _import_lightning() -> ModuleType:
    try:
        import lightning
    except ImportError as error:
        raise ImportError("Pretraining needs Lightning: `pip install 'stalign[train]'`.") from error
    return lightning


def _trainer(lightning: ModuleType, config: PretrainConfig, logs: str, *, has_validation: bool) -> Trainer:
    from lightning.pytorch.loggers import CSVLogger

    return lightning.Trainer(
        max_steps=config.optimiser.steps,
        accelerator="auto" if settings.device == "auto" else settings.device.split(":")[0],
        devices=1,
        logger=CSVLogger(logs, name="", version=""),
        log_every_n_steps=min(10, config.optimiser.steps),
        val_check_interval=min(config.optimiser.validate_every, config.optimiser.steps) if has_validation else None,
        check_val_every_n_epoch=None if has_validation else 1,
        limit_val_batches=1.0 if has_validation else 0,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=settings.progress,
    )


def _same(item: Any) -> Any:
    """Batches come complete: nothing is left to collate."""
    return item


def _card(config: PretrainConfig, sections: Sequence[Section]) -> ModelCard:
    with_image = [s.name for s in sections if s.has_image]
    without = [s.name for s in sections if not s.has_image]
    n_pairs = sum(len(s) for s in sections if s.has_image)
    run = (
        f"Trained by `stalign pretrain` on {len(sections)} sections of {len({s.patient for s in sections})} patients; "
        f"{n_pairs:,} spots have an image. With image: {', '.join(with_image)}. "
        f"Counts only: {', '.join(without) or 'none'}. "
        f"Seed {config.seed}, {config.optimiser.steps} steps of {config.optimiser.batch_size} spots."
    )
    stated = {name: text for name, text in vars(config.card).items() if text and name != "description"}
    return ModelCard(description="\n\n".join(filter(None, [config.card.description, run])), **stated)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _replace(source: Path, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
