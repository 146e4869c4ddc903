"""What happens between the steps of a run: the log, validation, checkpoints, and the progress bar."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch.utils.data import DataLoader

from stalign._logging import logger
from stalign._settings import settings
from stalign.models._network import STAlign
from stalign.train._config import METRICS
from stalign.train._data import Batch, EncodedSection
from stalign.train._distributed import gather_objects, mean_over_ranks, world
from stalign.train._evaluate import measure
from stalign.train._files import disk_full_named, write_state, write_text
from stalign.train._module import Alignment, schedule

if TYPE_CHECKING:
    from stalign.models._checkpoint import ModelCard

STATE = "resume.ckpt"
LAST = "last"
BEST = "best"
_FORMAT = 1


class RunLog:
    """The training log: a CSV file, one row a logged step, and TensorBoard's files if asked for.

    Parameters
    ----------
    path
        The CSV file.
    before
        Rows of an earlier run from this step on are dropped: they were not part of the checkpoint gone on from.
    tensorboard
        Folder of TensorBoard's files, or ``None``.

    Raises
    ------
    ImportError
        If TensorBoard is asked for and not installed.
    """

    def __init__(self, path: Path, *, before: int = 0, tensorboard: Path | None = None) -> None:
        self.path = path
        self.columns = ["step"]
        self.rows: list[dict[str, str]] = []
        if path.is_file() and before:
            with path.open(newline="", encoding="utf-8") as file:
                # A row that was being written when the run was killed may be incomplete.
                rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
            self.rows = [
                {name: value for name, value in row.items() if value} for row in rows if int(row["step"]) < before
            ]
            self.columns = list(dict.fromkeys(name for row in self.rows for name in row)) or ["step"]
        self._writer = _tensorboard(tensorboard, before) if tensorboard is not None else None
        self._write_all()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row, at once on disk."""
        row = {"step": str(step), **{name: repr(float(value)) for name, value in values.items()}}
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._write_all()
        else:
            with disk_full_named(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(self._text([row]))
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()

    def _text(self, rows: Sequence[Mapping[str, str]], *, header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _write_all(self) -> None:
        write_text(self.path, self._text(self.rows, header=True))


def _tensorboard(folder: Path, before: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "run.tensorboard needs TensorBoard: `pip install tensorboard`, or set run.tensorboard=false; the same "
            "numbers are in training_log.csv."
        ) from error
    return SummaryWriter(str(folder), purge_step=before or None)


class Validation:
    """Measures held-out sections; several processes share them.

    Parameters
    ----------
    sections
        The held-out sections.
    every
        Steps between two validations.
    """

    def __init__(self, sections: Sequence[EncodedSection], *, every: int) -> None:
        self.sections = list(sections)
        self.every = every

    def run(self, model: STAlign) -> dict[str, float]:
        """Return ``validation/<section>/<metric>`` of all sections, and ``validation/<metric>``, their means."""
        rank, size = world()
        mine: dict[str, dict[str, float]] = {}
        # A loader draws one random number when it starts, which is part of how the bundled model was made.
        for index in DataLoader(range(len(self.sections)), batch_size=None, collate_fn=_same):  # type: ignore[arg-type]
            if index % size == rank:
                mine[self.sections[index].section.name] = measure(model, self.sections[index])
        found = {name: metrics for part in gather_objects(mine) for name, metrics in part.items()}
        named = [encoded.section.name for encoded in self.sections]
        values = {f"validation/{name}/{metric}": found[name][metric] for name in named for metric in found[name]}
        for metric in METRICS:
            known = [metrics[metric] for metrics in found.values() if metric in metrics]
            if known:
                values[f"validation/{metric}"] = math.fsum(known) / len(known)
        return values


class Checkpoints:
    """The files that a run can go on from, and the models that it has reached.

    Parameters
    ----------
    folder
        ``<out>.run``: gets ``resume.ckpt``, and the model folders ``last`` and ``best``.
    every
        Steps between two checkpoints.
    identity
        What a later run must agree on to go on from here, in plain values.
    best
        The validation metric that decides which model is the best.
    dtype, card
        Of the model folders.
    state
        What the run goes on from: the content of ``resume.ckpt``, or ``None``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        identity: Mapping[str, Any],
        best: str,
        dtype: str,
        card: ModelCard,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.folder = folder
        self.every = every
        self.identity = json.dumps(identity, sort_keys=True)
        self.metric = best
        self.dtype, self.card = dtype, card
        self.state = state
        self.best: dict[str, float] = dict(state["best"]) if state else {}

    def judge(self, module: Alignment, values: Mapping[str, float]) -> None:
        """Keep the model as the best one if the last validation says so."""
        value = values.get(f"validation/{self.metric}")
        if value is None or not math.isfinite(value):
            return
        sign = 1 if METRICS[self.metric] else -1
        if self.best and sign * value <= sign * self.best["value"]:
            return
        self.best = {"value": value, "step": float(module.step)}
        if world().rank == 0:
            self._save_model(module.model, BEST)

    def save(self, trainer: lightning.Trainer, module: Alignment) -> None:
        """Write the state of the run, then the model as it is now."""
        random = gather_objects(_random_state(module.device))
        if world().rank:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        state = {
            "format": _FORMAT,
            "identity": self.identity,
            "step": module.step,
            "model": trained_state(module.model),
            "optimiser": module.optimizers(use_pl_optimizer=False).state_dict(),  # type: ignore[union-attr]
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": random,
            "best": self.best,
        }
        write_state(self.folder / STATE, state)
        self._save_model(module.model, LAST)

    def _save_model(self, model: STAlign, name: str) -> None:
        folder = self.folder / name
        with disk_full_named(folder), _quiet():
            model.save(folder, dtype=self.dtype, card=self.card, overwrite=True)


def trained_state(model: STAlign) -> dict[str, torch.Tensor]:
    """Return the state dict without what is frozen: that never changes, and may be gigabytes."""
    frozen = {
        id(tensor)
        for branch in model.branches.values()
        if branch.frozen
        for part in branch.encoder.frozen_modules()  # type: ignore[union-attr,operator]
        for tensor in part.state_dict(keep_vars=True).values()
    }
    state = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in frozen}


def load_trained_state(model: STAlign, state: Mapping[str, torch.Tensor]) -> None:
    """Fill what :func:`trained_state` returned back in."""
    from stalign.models._checkpoint import check_state

    check_state(dict(state), trained_state(model), what="The state of the run")
    model.load_state_dict(dict(state), strict=False)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


class Recorder(lightning.Callback):
    """Logs, validates and saves after a step, in this order, so that a checkpoint covers all that was logged before.

    Parameters
    ----------
    log
        The training log; ``None`` for none, and in processes other than the first.
    validation, checkpoints
        ``None`` for none.
    log_every
        Steps between two rows.
    seed
        From which the random numbers of processes but the first come.
    """

    def __init__(
        self,
        *,
        log: RunLog | None,
        validation: Validation | None,
        checkpoints: Checkpoints | None,
        log_every: int,
        seed: int,
    ) -> None:
        self.run_log, self.validation, self.checkpoints = log, validation, checkpoints
        self.log_every, self.seed = log_every, seed
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._is_first = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the optimiser back to where the earlier run left it."""
        module = _alignment(pl_module)
        starts = gather_objects(module.start)
        if len(set(starts)) > 1:
            raise ValueError(
                f"The processes start from different steps {starts}: they do not see the same checkpoint. `out` must "
                "lie on a file system that all nodes share."
            )
        state = None if self.checkpoints is None else self.checkpoints.state
        if state is None:
            return
        module.optimizers(use_pl_optimizer=False).load_state_dict(state["optimiser"])  # type: ignore[union-attr]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the random numbers before the first step, after all that Lightning draws to get there."""
        if self._is_first:
            self._is_first = False
            self._set_random_state(_alignment(pl_module))

    def _set_random_state(self, module: Alignment) -> None:
        rank, size = world()
        state = None if self.checkpoints is None else self.checkpoints.state
        if (
            state is not None
            and len(state["random"]) == size
            and _random_state(module.device).keys() <= state["random"][rank].keys()
        ):
            own = state["random"][rank]
            torch.set_rng_state(own["cpu"])
            if module.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"], module.device)
        elif state is not None:
            logger.warning(
                "The run goes on with other devices than before: dropout draws other random numbers from here on."
            )
            torch.manual_seed((self.seed * 1_000_003 + module.start) * size + rank)
        elif rank:
            torch.manual_seed(self.seed * 1_000_003 + rank)  # not the same dropout in every process

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do what is due after this step."""
        module = _alignment(pl_module)
        for name, term in module.terms.items():
            self._sums[name] = self._sums.get(name, 0) + term
            self._counts[name] = self._counts.get(name, 0) + 1
        if (batch_idx + 1) % module.accumulate:
            return
        step, total = module.step, module.optimiser_config.steps
        means = {name: value / self._counts[name] for name, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        validates = self.validation is not None and step % min(self.validation.every, total) == 0
        values: dict[str, float] = {}
        if step % min(self.log_every, total) == 0 or validates:
            values |= _to_floats(means)
            values["lr"] = schedule(step - 1, module.optimiser_config)[0]
        if validates and self.validation is not None:
            measured = self.validation.run(module.model)
            values |= measured
            if self.checkpoints is not None:
                self.checkpoints.judge(module, measured)
        if values and self.run_log is not None:
            self.run_log.add(step - 1, values)
        if self.checkpoints is not None and (step % self.checkpoints.every == 0 or step == total):
            self.checkpoints.save(trainer, module)


def _alignment(module: lightning.LightningModule) -> Alignment:
    if not isinstance(module, Alignment):
        raise TypeError(f"Expected an Alignment, got {type(module).__name__}.")
    return module


def _to_floats(terms: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Mean of the terms over all processes, under the names of the log."""
    names = sorted(terms)
    means = mean_over_ranks(torch.stack([terms[name].float() for name in names])).tolist()
    return {f"train/{name}": value for name, value in zip(names, means, strict=True)}


class Progress(lightning.Callback):
    """A bar with the loss, pairs of spot and niche per second, and the time left.

    Parameters
    ----------
    every
        Steps between two looks at the loss, which wait for the device.
    """

    def __init__(self, *, every: int) -> None:
        self.every = every
        self._pairs = 0
        self._since = 0.0
        self._bar: Any = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the bar, in the first process."""
        from tqdm.auto import tqdm

        module = _alignment(pl_module)
        hidden = not settings.progress or not trainer.is_global_zero
        total = module.optimiser_config.steps
        self._bar = tqdm(total=total, initial=module.start, unit="step", desc="Training", disable=hidden)
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        module = _alignment(pl_module)
        self._pairs += _n_pairs(batch) * world().size
        if (batch_idx + 1) % module.accumulate:
            return
        if module.step % self.every == 0 and not self._bar.disable:
            now = time.monotonic()
            rate = self._pairs / max(now - self._since, 1e-9)
            self._pairs, self._since = 0, now
            self._bar.set_postfix_str(f"loss {float(module.terms['loss']):.4g}, {rate:,.0f} pairs/s", refresh=False)
        self._bar.update()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the bar."""
        self._bar.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()


def _n_pairs(batch: Batch) -> int:
    return len(batch.clusters)


def _same(item: Any) -> Any:
    """Batches come complete: nothing is left to collate."""
    return item


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what is written every few steps out of the log."""
    before = logger.level
    logger.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(before)
