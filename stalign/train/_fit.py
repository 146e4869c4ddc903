"""The Lightning trainer of a run: devices, precision, several processes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from stalign._settings import settings
from stalign.train._config import RunConfig
from stalign.train._data import Batches
from stalign.train._distributed import World, launched_world, lost_contact

if TYPE_CHECKING:
    from lightning import Callback, Trainer

    from stalign.train._module import Alignment

BatchesOf = Callable[[World], Batches]


def import_lightning() -> ModuleType:
    """Import Lightning, or say how to get it."""
    try:
        import lightning
    except ImportError as error:
        raise ImportError("Training needs Lightning: `pip install 'stalign[train]'`.") from error
    return lightning


def device_arguments(run: RunConfig) -> dict[str, Any]:
    """Return ``accelerator``, ``devices`` and ``num_nodes`` of the trainer.

    Raises
    ------
    ValueError
        If the config asks for another number of processes than ``torchrun`` started.
    """
    name = settings.device
    kind, _, index = name.partition(":")
    accelerator = "auto" if kind == "auto" else kind
    launched = launched_world()
    if launched.size > 1:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = launched.size // local
        if run.devices not in ("auto", "all", local) or run.num_nodes not in (1, nodes):
            raise ValueError(
                f"run.devices={run.devices!r} and run.num_nodes={run.num_nodes} do not fit what torchrun started: "
                f"{local} processes on each of {nodes} nodes. Leave both out of the config."
            )
        return {"accelerator": accelerator, "devices": local, "num_nodes": nodes}
    devices: Any = {"auto": 1, "all": "auto"}.get(str(run.devices), run.devices)
    if index and devices == 1:
        devices = [int(index)]
    return {"accelerator": accelerator, "devices": devices, "num_nodes": run.num_nodes}


def make_trainer(run: RunConfig, *, steps: int, callbacks: Sequence[Callback]) -> Trainer:
    """Make the trainer; logging, validation and checkpoints are the callbacks' work.

    Parameters
    ----------
    run
        Devices, precision, accumulation and clipping.
    steps
        Steps that are left.
    callbacks
        Called between the steps.
    """
    lightning = import_lightning()
    arguments = device_arguments(run)
    several = arguments["devices"] not in (1, "auto") and not isinstance(arguments["devices"], list)
    strategy: Any = "auto"
    if several or arguments["num_nodes"] > 1 or run.strategy == "ddp" or _has_several_gpus(arguments):
        from lightning.pytorch.strategies import DDPStrategy

        # Batches that lack a modality leave parameters without a gradient, in all processes alike.
        strategy = DDPStrategy(find_unused_parameters=True, timeout=timedelta(minutes=run.timeout))
    with _hushed():
        return lightning.Trainer(
            **arguments,
            strategy=strategy,
            precision=run.precision,
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=run.accumulate,
            gradient_clip_val=run.clip or None,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )


def _has_several_gpus(arguments: dict[str, Any]) -> bool:
    is_gpu = arguments["accelerator"] in ("auto", "cuda", "gpu")
    return arguments["devices"] == "auto" and is_gpu and torch.cuda.device_count() > 1


def run_steps(trainer: Trainer, module: Alignment, batches: BatchesOf, run: RunConfig) -> None:
    """Take the steps that are left.

    Parameters
    ----------
    trainer
        What :func:`make_trainer` made.
    module
        What is trained; its ``start`` says how many steps were taken before.
    batches
        Makes the batches of one process.
    run
        Number of workers.

    Raises
    ------
    ConnectionError
        If another process has ended.
    KeyboardInterrupt
        If the run was interrupted.
    """
    total = module.optimiser_config.steps
    if module.start >= total:
        return
    # Moments of parameters that hardly move fall below the normal range, where CPUs are many times slower.
    torch.set_flush_denormal(True)
    module.train()
    loader = DataLoader(
        batches(World(trainer.global_rank, trainer.world_size)),
        batch_size=None,
        num_workers=run.num_workers,
        collate_fn=_same,
    )
    with lost_contact(lambda: f"at step {module.step} of {total}"), _hushed():
        trainer.fit(module, loader)
    if module.step < total:
        raise KeyboardInterrupt(f"The run was interrupted at step {module.step} of {total}.")


def _same(item: Any) -> Any:
    """Batches come complete: nothing is left to collate."""
    return item


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep Lightning's notes on devices, loaders and frozen parts, which call for nothing, out of the log."""
    noisy = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = noisy.level
    noisy.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")  # what is frozen
            warnings.filterwarnings("ignore", message=".*num_workers")
            warnings.filterwarnings("ignore", message=".*treespec", category=FutureWarning)
            yield
    finally:
        noisy.setLevel(before)
