"""Adapt a trained model to a cohort: its encoders stay, what stands on them is trained on."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stalign._settings import settings
from stalign._validate import check_adata, listing
from stalign.genes._resolve import resolve_genes
from stalign.models._checkpoint import ModelCard, load_folder
from stalign.models._config import BRANCHES, Geometry, Provenance, build_config
from stalign.models._network import STAlign
from stalign.slide._library import find_niche_record, recorded_libraries
from stalign.train._config import (
    AugmentConfig,
    ObjectiveConfig,
    OptimiserConfig,
    PredictionFitConfig,
    RunConfig,
)
from stalign.train._data import Batches, EncodedSection, Section
from stalign.train._distributed import World, launched_world
from stalign.train._features import encode_sections
from stalign.train._files import disk_full_named, write_text
from stalign.train._fit import import_lightning, make_trainer, run_steps
from stalign.train._prediction import fit_prediction
from stalign.train._pretrain import CONFIG, LOG
from stalign.train._sections import read_section

if TYPE_CHECKING:
    from anndata import AnnData

# Numbers of the niche record that must be those of the model.
_GEOMETRY = ("n_neighbors", "spot_um", "niche_um")


def finetune(
    model: STAlign,
    adata: AnnData | Section | Sequence[AnnData | Section],
    *,
    validation: AnnData | Section | Sequence[AnnData | Section] = (),
    steps: int = 200,
    batch_size: int = 192,
    lr: float = 1e-4,
    objective: ObjectiveConfig | None = None,
    augment: AugmentConfig | None = None,
    validate_every: int | None = None,
    precision: str = "32-true",
    name: str | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
) -> STAlign:
    """Adapt a model to a cohort in minutes: train its tokens, fusion networks and heads; all encoders stay as they are.

    Each image encoder runs once over each section, so that a step costs next to nothing. A prediction head is fitted
    anew on the sections with an image.

    Parameters
    ----------
    model
        A trained model, :func:`stalign.models.load`. It is not changed.
    adata
        Sections of the cohort, each an AnnData of one slide with raw counts in ``X`` and the niche record of
        :func:`stalign.pp.extract_niches` (which :func:`stalign.tl.embed` runs, too), or a :class:`Section`.
    validation
        Sections that are measured, never trained on; the numbers go to the log.
    steps, batch_size, lr
        Steps, spots of one step, and the largest learning rate.
    objective
        The loss; ``None`` for the one that the model was trained with, where its folder states it, else the paper's.
    augment
        Noise on the profiles and modalities left out; colours and flips are those of the cached patches.
    validate_every
        Steps between two validations; ``None``: before the first step and after the last.
    precision
        ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
    name
        Name of the result, by default the model's with ``-finetuned``.
    seed
        ``None`` is ``stalign.settings.seed``.
    out
        Folder to write the model to, with ``training_log.csv`` and ``training_config.json``; ``None``: not written.

    Returns
    -------
    The adapted model, in evaluation mode on the CPU.

    Raises
    ------
    KeyError
        If an AnnData has no niche record.
    ValueError
        If its niches are not the model's, no section has an image, or its genes are not the model's.
    FileExistsError
        If ``out`` exists and is not empty.
    ImportError
        Without Lightning (``pip install 'stalign[train]'``).

    Examples
    --------
    >>> import stalign as sta
    >>> sta.pp.extract_niches(adata)  # doctest: +SKIP
    >>> model = sta.train.finetune(sta.models.load("stalign-mini"), adata, out="my-model")  # doctest: +SKIP
    >>> sta.tl.embed(adata, model=model)  # doctest: +SKIP
    """
    import_lightning()
    if not isinstance(model, STAlign):
        raise TypeError(f"model must be a loaded STAlign, got {type(model).__name__}: {model!r}. See `models.load`.")
    if launched_world().size > 1:
        raise ValueError("`finetune` runs in one process; for several, `pretrain` does.")
    target = None if out is None else _new_folder(Path(out).expanduser())
    seed = settings.seed if seed is None else seed
    objective = objective or recorded_objective(model)
    augment = augment or AugmentConfig()
    optimiser = OptimiserConfig(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=min(50, steps // 10),
        # The weights are near their place: what pulls them to zero need not grow.
        weight_decay_end=OptimiserConfig.weight_decay,
        validate_every=validate_every or steps,
        image_sections=1.0,
    )
    sections, held_out = (_sections(data, model) for data in (adata, validation))
    if not any(section.has_image for section in sections):
        raise ValueError(f"None of the {len(sections)} sections has an image: there is nothing to align.")
    new = _copy(model, name)
    # One step depends on the seed alone, not on what ran before in this session.
    with _seeded(seed), _frozen_encoders(new):
        options: dict[str, Any] = {"n_clusters": objective.n_clusters, "seed": seed}
        encoded = encode_sections(new, sections, **options)
        measured = encode_sections(new, held_out, **options) if held_out else []
        rows = _train(new, encoded, measured, objective, optimiser, augment, precision, seed)
    with _seeded(seed):
        new = _with_prediction(new, encoded, 0 if model.prediction is None else len(model.prediction.gene_index))
    new.card = _card(model, sections, optimiser, seed)
    if target is None:
        return new
    with disk_full_named(target):
        new.save(target)
    origin = {key: value for key, value in model.provenance._asdict().items() if key != "folder"}
    tables = {"objective": asdict(objective), "augment": asdict(augment), "optimiser": asdict(optimiser)}
    content = {"finetuned_from": origin, "seed": seed, **tables}
    write_text(target / CONFIG, json.dumps(content, indent=2) + "\n")
    write_text(target / LOG, rows)
    return load_folder(target)


def recorded_objective(model: STAlign) -> ObjectiveConfig:
    """Return the loss that a model was trained with, as its folder states it; the paper's where it does not."""
    file = Path(model.provenance.folder) / CONFIG
    if not model.provenance.folder or not file.is_file():
        return ObjectiveConfig()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Pass `objective=`.") from error
    return build_config(ObjectiveConfig, content.get("objective", {}), where=f"{file}: objective")


# -- what goes in ------------------------------------------------------------------------------------------------------


def _new_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty. Choose another `out`, or remove it first.")
    return folder


def _sections(data: Any, model: STAlign) -> list[Section]:
    items = list(data) if isinstance(data, (list, tuple)) else [data]
    sections = [item if isinstance(item, Section) else _read(item, model, number) for number, item in enumerate(items)]
    names = [section.name for section in sections]
    return [
        replace(section, name=f"{section.name}_{number}") if names.count(section.name) > 1 else section
        for number, section in enumerate(sections)
    ]


def _read(adata: AnnData, model: STAlign, number: int) -> Section:
    check_adata(adata)
    record = find_niche_record(adata)
    asked = _asked(model.geometry)
    if record is None:
        raise KeyError(
            f"Section {number} has no niches: run `stalign.pp.extract_niches(adata, {asked})` or "
            "`stalign.tl.embed(adata, model=model)` first."
        )
    params = record["params"]
    wrong = [key for key in _GEOMETRY if float(params[key]) != float(getattr(model.geometry, key))]
    if wrong:
        raise ValueError(
            f"Section {number} has niches of another size than the model's ({listing(wrong)} differ). Run "
            f"`stalign.pp.extract_niches(adata, {asked})`."
        )
    _, libraries = recorded_libraries(adata)
    match = resolve_genes(adata, model.genes)
    return read_section(adata, model.geometry, match=match, name=libraries[0] or f"section_{number}")


def _asked(geometry: Geometry) -> str:
    return ", ".join(f"{name}={getattr(geometry, name):g}" for name in _GEOMETRY)


# -- what is trained ---------------------------------------------------------------------------------------------------


def _copy(model: STAlign, name: str | None) -> STAlign:
    new = copy.deepcopy(model).cpu()
    new.config = replace(new.config, name=name or f"{model.config.name}-finetuned")
    new.provenance = Provenance(name=new.config.name)
    return new


@contextmanager
def _frozen_encoders(model: STAlign) -> Iterator[None]:
    """Freeze all encoders as a whole, and the prediction head; afterwards what trains is what the config says."""
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    frozen = {name: model.branch(name).frozen for name in BRANCHES}
    for name in BRANCHES:
        model.branch(name).frozen = True
        model.encoder(name).requires_grad_(False)
    if model.prediction is not None:
        model.prediction.requires_grad_(False)
    try:
        yield
    finally:
        for name in BRANCHES:
            model.branch(name).frozen = frozen[name]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a seed, and leave the caller's random state as it was."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _train(
    model: STAlign,
    encoded: Sequence[EncodedSection],
    held_out: Sequence[EncodedSection],
    objective: ObjectiveConfig,
    optimiser: OptimiserConfig,
    augment: AugmentConfig,
    precision: str,
    seed: int,
) -> str:
    """Take the steps; returns the log as CSV."""
    import tempfile

    from stalign.train._callbacks import Progress, Recorder, RunLog, Validation
    from stalign.train._module import Alignment

    run = RunConfig(devices=1, precision=precision, log_every=max(1, min(10, optimiser.steps // 10)))
    validation = Validation(held_out, every=optimiser.validate_every) if held_out else None
    with tempfile.TemporaryDirectory(prefix="stalign-finetune-") as folder:
        log = RunLog(Path(folder) / LOG)
        if validation is not None:
            before = validation.run(model)
            log.add(-1, before)
        recorder = Recorder(log=log, validation=validation, checkpoints=None, log_every=run.log_every, seed=seed)
        trainer = make_trainer(run, steps=optimiser.steps, callbacks=[recorder, Progress(every=run.log_every)])
        module = Alignment(model, objective=objective, optimiser=optimiser, seed=seed, mixed=precision != "32-true")

        def batches(world: World) -> Batches:
            return Batches(
                encoded,
                steps=optimiser.steps,
                batch_size=optimiser.batch_size,
                augment=augment,
                image_sections=optimiser.image_sections,
                preprocess={name: model.encoder(name).preprocess for name in ("spot_image", "niche_image")},
                stratified=objective.stratified,
                seed=seed,
            )

        run_steps(trainer, module, batches, run)
        log.close()
        model.to(trainer.strategy.root_device).eval()
        return log.path.read_text(encoding="utf-8")


# -- what comes out ----------------------------------------------------------------------------------------------------


def _with_prediction(model: STAlign, encoded: Sequence[EncodedSection], n_genes: int) -> STAlign:
    """Fit the head anew, if there was one: the old one was made for other embeddings."""
    model.prediction = None
    model.config = replace(model.config, prediction=None)
    return fit_prediction(model, encoded, PredictionFitConfig(n_genes=n_genes))


def _card(model: STAlign, sections: Sequence[Section], optimiser: OptimiserConfig, seed: int) -> ModelCard:
    earlier = model.card or ModelCard()
    origin = model.provenance
    text = (
        f"Fine-tuned from {origin.name or model.config.name}{f' ({origin.revision})' if origin.revision else ''} on "
        f"{', '.join(section.name for section in sections)}: {optimiser.steps} steps of {optimiser.batch_size} spots, "
        f"seed {seed}. Its encoders are those of that model."
    )
    return replace(earlier, description="\n\n".join(filter(None, [earlier.description.strip(), text])))
