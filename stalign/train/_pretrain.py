"""A pretraining run from sections to a checkpoint folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from stalign._logging import logger
from stalign._settings import settings
from stalign._validate import listing
from stalign.models._checkpoint import ModelCard, load_folder
from stalign.models._config import BRANCHES
from stalign.models._folder import CONFIG as MODEL_CONFIG
from stalign.models._network import STAlign
from stalign.models._registry import config as model_config
from stalign.models.encoders._base import ImageEncoder
from stalign.models.encoders._registry import find_image_encoder
from stalign.train._alignment import check_alignable, fit_alignment
from stalign.train._config import PretrainConfig
from stalign.train._data import Batches, EncodedSection, Section
from stalign.train._distributed import World, launched_world, wait_for_all
from stalign.train._familiarity import fit_model_familiarity
from stalign.train._features import encode_sections
from stalign.train._files import disk_full_named, read_state, write_text
from stalign.train._fit import import_lightning, make_trainer, run_steps
from stalign.train._prediction import fit_prediction
from stalign.train._shards import open_shards

if TYPE_CHECKING:
    from stalign.train._callbacks import Checkpoints

LOG = "training_log.csv"
CONFIG = "training_config.json"
TENSORBOARD = "tensorboard"


class Cohort(NamedTuple):
    """The sections of a run, and the genes that are the columns of their counts."""

    train: list[Section]
    validation: list[Section]
    genes: tuple[str, ...]


def shards_folder(config: PretrainConfig) -> Path:
    """Return where the prepared sections of a run are: ``data.shards``, else ``<out>.shards``."""
    return Path(config.data.shards or f"{config.out}.shards").expanduser()


def run_folder(config: PretrainConfig) -> Path:
    """Return where a run keeps its checkpoints and its log: ``<out>.run``."""
    out = Path(config.out).expanduser()
    return out.with_name(f"{out.name}.run")


def pretrain(
    config: PretrainConfig,
    sections: Sequence[Section] | None = None,
    *,
    genes: Sequence[str] | None = None,
    validation: Sequence[Section] = (),
) -> Path:
    """Train a model and write it to ``config.out``. Killed, and called again, it goes on from its last checkpoint.

    Started by ``torchrun``, or with ``run.devices`` or ``run.num_nodes``, several processes share every batch; loss and
    gradients are those of one process with the whole batch.

    Parameters
    ----------
    config
        The run; see :func:`read_config`.
    sections
        Training sections; ``None`` for the shards that ``stalign prepare`` wrote (``config.data``). Those without an
        image train the gene side, the fusion, and the niche scale.
    genes
        The vocabulary: symbols in the order of the columns of ``Section.counts``. Needed with ``sections``.
    validation
        With ``sections``: sections that are measured, never trained on.

    Returns
    -------
    The checkpoint folder: what :func:`stalign.models.load` reads, ``training_log.csv`` and ``training_config.json``.
    ``<out>.run`` holds the models ``last`` and ``best``, and what the run goes on from. In processes other than the
    first the folder may not be complete yet.

    Raises
    ------
    ValueError
        If no section has an image, since nothing could be aligned; if ``<out>.run`` holds a run of another config.
    FileExistsError
        If ``config.out`` exists and is no checkpoint folder.
    FloatingPointError
        If the loss is not finite, naming the section.
    ConnectionError
        If another process of a distributed run has ended.
    OSError
        If the disk is full, naming the file; the previous checkpoint is intact.
    ImportError
        Without Lightning (``pip install 'stalign[train]'``).

    Examples
    --------
    >>> from stalign import train
    >>> config = train.read_config("my-model.toml", ["optimiser.steps=20"])  # doctest: +SKIP
    >>> train.pretrain(config)  # doctest: +SKIP
    """
    lightning = import_lightning()
    cohort = open_cohort(config) if sections is None else _in_memory(sections, genes, validation)
    if not any(section.has_image for section in cohort.train):
        raise ValueError(f"None of the {len(cohort.train)} training sections has an image: there is nothing to align.")
    if config.run.final == "best" and not cohort.validation:
        raise ValueError("run.final is 'best', but there are no validation sections to judge by.")
    out = _check_out(config)
    lightning.seed_everything(config.seed, verbose=False)
    model = build_model(config, cohort.genes)
    if config.alignment.enabled:
        check_alignable(model)
    state = _earlier_state(config, _identity(config, model, cohort))
    # The layout that convolutions are fastest in, on CPUs and GPUs alike.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    encoded, held_out = encode_cohort(config, model, cohort)
    trained = _train(config, model, cohort, encoded, held_out, state)
    if trained is not None:
        _finish(config, trained, cohort, encoded)
    return out


# -- what goes in -----------------------------------------------------------------------------------------------------


def open_cohort(config: PretrainConfig) -> Cohort:
    """Open the prepared sections that a config names.

    Raises
    ------
    FileNotFoundError
        If there are no shards, or a pattern matches none of them.
    ValueError
        If shards are damaged, were cut for another network, or none is left to train on.
    """
    shards = open_shards(shards_folder(config), skip_damaged=config.data.skip_damaged)
    geometry = model_config(config.network.config).updated(config.network.changes).geometry
    shards.check(geometry, shards.genes)
    held_out = list(
        dict.fromkeys([*shards.select(config.data.validation), *shards.of_patients(config.data.validation_patients)])
    )
    chosen = shards.select(config.data.train) if config.data.train else list(shards.entries)
    kept = [name for name in chosen if name not in held_out]
    if not kept:
        raise ValueError(f"All {len(chosen)} sections are held out for validation: none is left to train on.")
    return Cohort(shards.open(kept), shards.open(held_out), shards.genes)


def _in_memory(sections: Sequence[Section], genes: Sequence[str] | None, validation: Sequence[Section]) -> Cohort:
    if genes is None:
        raise ValueError("Pass `genes=`, the symbols that are the columns of the sections' counts.")
    names = [section.name for section in (*sections, *validation)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Sections must have names of their own; given more than once: {listing(twice)}.")
    return Cohort(list(sections), list(validation), tuple(genes))


def _check_out(config: PretrainConfig) -> Path:
    """Refuse early what could not be written at the end."""
    out = Path(config.out).expanduser()
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; `out` is the folder that the model is written to.")
    if out.is_dir() and any(out.iterdir()) and not (out / MODEL_CONFIG).is_file():
        raise FileExistsError(f"{out} does not hold a model ({MODEL_CONFIG} is not there); it is not overwritten.")
    return out


def build_model(config: PretrainConfig, genes: Sequence[str]) -> STAlign:
    """Build the untrained network of a run, with the pretrained weights of its frozen encoders.

    Parameters
    ----------
    config
        The run.
    genes
        The vocabulary.

    Raises
    ------
    ValueError
        If a frozen encoder has no weights, or weights are named for an encoder that is not there.
    """
    network = config.network
    base = model_config(network.config).updated({**network.changes, "name": network.name})
    weights = dict(network.weights)
    if base.spot_gene.encoder == "scgpt":
        from stalign.models._assemble import assemble

        scgpt = weights.pop("scgpt", "")
        if not scgpt:
            raise ValueError(
                f"Config {network.config!r} takes scGPT embeddings: name the folder of a checkpoint (args.json, "
                "vocab.json, best_model.pt), e.g. `--set network.weights.scgpt=PATH`."
            )
        model = assemble(
            base,
            scgpt=scgpt,
            image_weights=weights.pop("niche_image", "") or None,
            gene_sets=network.gene_sets or None,
            genes=genes,
            seed=config.seed,
        ).train()
    else:
        model = STAlign(base, genes=genes)
    if "scgpt" in weights:
        raise ValueError(
            f"network.weights names scgpt, but the spot gene encoder of config {network.config!r} is "
            f"{base.spot_gene.encoder!r}."
        )
    for branch, path in weights.items():
        model.load_encoder(branch, path or None)
    _check_pretrained(model)
    return model


def _check_pretrained(model: STAlign) -> None:
    """Refuse to train beside a frozen encoder that is random: it would stay so."""
    for name in BRANCHES:
        branch = model.branch(name)
        encoder = model.config.branch(name).encoder
        if branch.frozen and branch.is_image and branch.encoder.provenance is None and find_image_encoder(encoder).hub:
            raise ValueError(
                f"The frozen encoder {encoder!r} of branch {name} has no weights and would stay random. Name them: "
                f'`--set network.weights.{name}=PATH`, or "" for the Hub.'
            )


def encode_cohort(
    config: PretrainConfig, model: STAlign, cohort: Cohort
) -> tuple[list[EncodedSection], list[EncodedSection]]:
    """Let encoders learn from patches alone, then run the frozen ones over all sections; processes share the work.

    What they made before of the same patches, with the same weights, is found again.

    Parameters
    ----------
    config
        The run.
    model
        What :func:`build_model` built.
    cohort
        The sections.

    Returns
    -------
    The encoded training sections, and those of the validation.
    """
    learn_encoders(model, cohort.train, seed=config.seed)
    rank, size = launched_world()
    options: dict[str, Any] = {"n_clusters": config.objective.n_clusters, "seed": config.seed}
    frozen_device = _encoder_device(rank)
    encoded = encode_sections(
        model,
        cohort.train,
        rank=rank,
        world_size=size,
        views=config.augment.views,
        augment=config.augment,
        device=frozen_device,
        **options,
    )
    held_out = []
    if cohort.validation:
        options |= {"rank": rank, "world_size": size, "device": frozen_device}
        held_out = encode_sections(model, cohort.validation, **options)
    wait_for_all()
    return encoded, held_out


# Patches of each section from which image encoders learn.
_LEARNED_PATCHES = 512


def learn_encoders(model: STAlign, sections: Sequence[Section], *, seed: int) -> None:
    """Let the image encoders learn from patches alone what they can; see :meth:`ImageEncoder.learn`.

    Parameters
    ----------
    model
        The network.
    sections
        Training sections; of each with an image, patches spread over it are taken, as many of a large one as of a
        small one.
    seed
        Of what is drawn.
    """
    imaged = [section for section in sections if section.has_image]
    for name in ("spot_image", "niche_image"):
        encoder = model.encoder(name)
        if type(encoder).learn is ImageEncoder.learn:
            continue
        patches = []
        for section in imaged:
            rows = np.unique(np.linspace(0, len(section) - 1, _LEARNED_PATCHES).round().astype(np.intp))
            colour = section.colour if model.config.colour == "library" else None
            patches.append(encoder.preprocess(np.array(getattr(section, name)[rows]), colour=colour))
        encoder.learn(patches, seed=seed)


def _encoder_device(rank: int) -> str | None:
    """Return where frozen encoders run before the trainer has placed the model."""
    if settings.device != "auto":
        return settings.device
    if torch.cuda.is_available():
        return f"cuda:{rank % torch.cuda.device_count()}"
    return None


# -- going on from an earlier run -------------------------------------------------------------------------------------


def _identity(config: PretrainConfig, model: STAlign, cohort: Cohort) -> dict[str, Any]:
    """Return all that decides the result: what a run must have in common with the one it goes on from."""
    encoders = {
        name: model.encoder(name).provenance.sha256 for name in BRANCHES if model.encoder(name).provenance is not None
    }
    identity = {f"{key}": value for key, value in config.recipe().items()}
    identity["data.sections"] = [[section.name, len(section)] for section in cohort.train]
    identity["data.held_out"] = [[section.name, len(section)] for section in cohort.validation]
    identity["network.encoders"] = encoders
    # Patterns may be written in many ways; the sections they name are what counts.
    return {key: value for key, value in identity.items() if key not in ("data.train", "data.validation")}


def _earlier_state(config: PretrainConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of the run and, under ``"state"``, the checkpoint to go on from, if there is one."""
    from stalign.train._callbacks import STATE

    file = run_folder(config) / STATE
    if not config.run.resume or not file.is_file():
        return {"identity": identity, "state": None}
    state = read_state(file)
    earlier, now = json.loads(state["identity"]), json.loads(json.dumps(identity))
    differing = [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]
    if differing:
        changes = [f"{key}: {_short(earlier.get(key))} → {_short(now.get(key))}" for key in differing]
        raise ValueError(
            f"{file.parent} holds a run of another config ({listing(changes, 4)}). Set another `out`, or "
            "`--set run.resume=false` to start anew and give that run up."
        )
    logger.info("Going on from step %d of %s.", state["step"], file.parent)
    return {"identity": identity, "state": state}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    from stalign.train._callbacks import BEST, LAST, STATE

    for name in (STATE, LOG):
        (folder / name).unlink(missing_ok=True)
    for name in (LAST, BEST, TENSORBOARD):
        shutil.rmtree(folder / name, ignore_errors=True)


# -- training ---------------------------------------------------------------------------------------------------------


def _train(
    config: PretrainConfig,
    model: STAlign,
    cohort: Cohort,
    encoded: Sequence[EncodedSection],
    held_out: Sequence[EncodedSection],
    earlier: Mapping[str, Any],
) -> STAlign | None:
    """Take the steps, and return the trained model in the first process, ``None`` in the others."""
    from stalign.train._callbacks import Checkpoints, Progress, Recorder, RunLog, Validation, load_trained_state
    from stalign.train._module import Alignment

    run, folder, state = config.run, run_folder(config), earlier["state"]
    optimiser = config.optimiser.resolved(sum(len(s) for s in encoded), accumulate=run.accumulate)
    start = 0 if state is None else int(state["step"])
    if state is not None:
        load_trained_state(model, state["model"])
    checkpoints = Checkpoints(
        folder,
        every=run.checkpoint_every,
        identity=earlier["identity"],
        best=run.best,
        dtype=config.network.dtype,
        card=_card(config, cohort.train),
        state=state,
    )
    recorder = Recorder(
        log=None,
        validation=Validation(held_out, every=optimiser.validate_every) if held_out else None,
        checkpoints=checkpoints,
        log_every=run.log_every,
        seed=config.seed,
    )
    trainer = make_trainer(run, steps=optimiser.steps - start, callbacks=[recorder, Progress(every=run.log_every)])
    if trainer.is_global_zero:
        if state is None:
            _clear(folder)
        tensorboard = folder / TENSORBOARD if run.tensorboard else None
        recorder.run_log = RunLog(folder / LOG, before=start, tensorboard=tensorboard)
        write_text(folder / CONFIG, json.dumps(_recipe(config), indent=2) + "\n")
    module = Alignment(
        model,
        objective=config.objective,
        optimiser=optimiser,
        seed=config.seed,
        accumulate=run.accumulate,
        start=start,
        mixed=run.precision != "32-true",
    )

    def batches(world: World) -> Batches:
        return Batches(
            encoded,
            steps=optimiser.steps * run.accumulate,
            start=start * run.accumulate,
            batch_size=optimiser.batch_size,
            slides_per_batch=optimiser.slides_per_batch,
            augment=config.augment,
            image_sections=optimiser.image_sections,
            preprocess={name: model.encoder(name).preprocess for name in ("spot_image", "niche_image")},
            stratified=config.objective.stratified,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
        )

    try:
        run_steps(trainer, module, batches, run)
    finally:
        if recorder.run_log is not None:
            recorder.run_log.close()
    if not trainer.is_global_zero:
        return None
    return _final_model(config, model, checkpoints).to(trainer.strategy.root_device).eval()


def _final_model(config: PretrainConfig, model: STAlign, checkpoints: Checkpoints) -> STAlign:
    from stalign.train._callbacks import BEST

    if config.run.final == "last":
        return model
    if not checkpoints.best:
        raise ValueError(
            f"No validation measured run.best = {config.run.best!r}: there is no best model. The last one is in "
            f"{checkpoints.folder}; set run.final='last', or another metric."
        )
    best = load_folder(checkpoints.folder / BEST)
    logger.info("The best model is that of step %d.", checkpoints.best["step"])
    return best


# -- what comes out ---------------------------------------------------------------------------------------------------


def _finish(config: PretrainConfig, model: STAlign, cohort: Cohort, encoded: Sequence[EncodedSection]) -> None:
    out = Path(config.out).expanduser()
    model = fit_alignment(model, encoded, config.alignment)
    model = fit_prediction(model, encoded, config.prediction)
    model = fit_model_familiarity(model, cohort.train, config.familiarity)
    with disk_full_named(out):
        model.save(out, dtype=config.network.dtype, card=_card(config, cohort.train), overwrite=True)
    write_text(out / LOG, (run_folder(config) / LOG).read_text(encoding="utf-8"))
    write_text(out / CONFIG, json.dumps(_recipe(config), indent=2) + "\n")
    logger.info("Wrote %s.", out)


def _recipe(config: PretrainConfig) -> dict[str, Any]:
    """Return the config without the places of one machine, which are not part of how a model was made."""
    recipe = config.to_dict()
    recipe["out"] = Path(config.out).name
    recipe["data"]["root"] = "."
    recipe["data"]["shards"] = ""
    recipe["network"]["weights"] = {name: Path(path).name for name, path in config.network.weights.items()}
    recipe["network"]["gene_sets"] = Path(config.network.gene_sets).name
    return recipe


def _card(config: PretrainConfig, sections: Sequence[Section]) -> ModelCard:
    with_image = [s.name for s in sections if s.has_image]
    without = [s.name for s in sections if not s.has_image]
    n_pairs = sum(len(s) for s in sections if s.has_image)
    optimiser = config.optimiser.resolved(sum(len(s) for s in sections), accumulate=config.run.accumulate)
    run = (
        f"Trained by `stalign pretrain` on {len(sections)} sections of {len({s.patient for s in sections})} patients; "
        f"{n_pairs:,} spots have an image. With image: {_names(with_image)}. "
        f"Counts only: {_names(without)}. "
        f"Seed {config.seed}, {optimiser.steps} steps of {optimiser.batch_size * config.run.accumulate} spots."
    )
    stated = {name: text for name, text in vars(config.card).items() if text and name != "description"}
    return ModelCard(description="\n\n".join(filter(None, [config.card.description, run])), **stated)


def _names(names: Sequence[str], limit: int = 50) -> str:
    rest = len(names) - limit
    return (", ".join(names[:limit]) or "none") + (f" and {rest} more" if rest > 0 else "")
