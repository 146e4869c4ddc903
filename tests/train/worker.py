"""A small training run in a process of its own, which may be killed, or be one of several under torchrun.

Usage: worker.py JOB OUT [KEY=VALUE ...]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from conftest import GENES, make_section, tiny

import stalign as sta
from stalign import train
from stalign.train import _callbacks, _module, _pretrain


def _sections() -> list[train.Section]:
    return [make_section("a", seed=1), make_section("b", seed=2), make_section("c", image=False, seed=3)]


def _before_step(step: int, do) -> None:
    """Call ``do`` instead of the training step of that number."""
    original = _module.Alignment.training_step

    def training_step(self, batch, batch_index):
        if self.step == step:
            do()
        return original(self, batch, batch_index)

    _module.Alignment.training_step = training_step


def run(out: str, *changes: str) -> None:
    """Train."""
    train.pretrain(tiny(out, *changes), _sections(), genes=GENES, validation=[make_section("v", seed=9)])


def kill(out: str, step: str, *changes: str) -> None:
    """Train until SIGKILL."""
    _before_step(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(out, *changes)


def kill_in_save(out: str, number: str, *changes: str) -> None:
    """Train until SIGKILL in the middle of writing a checkpoint."""
    original, calls = torch.save, []

    def save(state, file):
        calls.append(1)
        original(state, file)
        if len(calls) == int(number):
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save
    run(out, *changes)


def full_disk(out: str, limit: str, *changes: str) -> None:
    """Train with a limit on the size of files from the second checkpoint on."""
    import resource

    original = _callbacks.write_state

    def write_state(path, state):
        original(path, state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))

    _callbacks.write_state = write_state
    run(out, *changes)


def die(out: str, *changes: str) -> None:
    """Train; the process of rank 1 ends without a word at step 2."""
    if os.environ["RANK"] == "1":
        _before_step(2, lambda: os._exit(3))
    run(out, *changes)


def steps(out: str, *changes: str) -> None:
    """Train once for each group of changes, parted by "--"; write what this process saw of every step.

    ``<out>-<group>-<rank>.npz`` gets losses, gradients, and numbers of rows.
    """
    seen: dict[str, list] = {}
    build = _pretrain.build_model

    def without_dropout(config, genes):
        model = build(config, genes)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    original = _module.Alignment.training_step

    def training_step(self, batch, batch_index):
        loss = original(self, batch, batch_index)
        seen["rows"].append(len(batch.clusters))
        return loss

    def on_before_optimizer_step(self, optimizer):
        seen["loss"].append(float(_callbacks.mean_over_ranks(self.terms["loss"])))
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.model.parameters()]
        seen["gradients"].append(torch.cat([g.flatten() for g in gradients]).numpy().copy())

    _pretrain.build_model = without_dropout
    _module.Alignment.training_step = training_step
    _module.Alignment.on_before_optimizer_step = on_before_optimizer_step
    groups = " ".join(changes).split("--")
    for number, group in enumerate(groups):
        seen.update(loss=[], gradients=[], rows=[])
        run(f"{out}-{number}", *group.split())
        np.savez(
            f"{out}-{number}-{os.environ.get('RANK', '0')}.npz",
            loss=np.array(seen["loss"]),
            rows=np.array(seen["rows"]),
            gradients=np.stack(seen["gradients"]),
        )


def negatives(out: str) -> None:
    """Write the gradient of this rank's keys for two versions of the other rank's queries."""
    import torch.distributed as dist

    from stalign.train._distributed import gather_rows, own_rows
    from stalign.train.losses import masked_info_nce, negative_mask

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn((2, 8, 5), generator=generator)
    mask = negative_mask(torch.arange(8) % 3, "masked")
    found = []
    for change in (0.0, 1.0):
        mine = query[own_rows()].clone()
        if rank == 1:
            mine[0, 0] += change
        own = key[own_rows()].clone().requires_grad_()
        loss = masked_info_nce(
            mine, gather_rows(own), mask[own_rows()], positive=torch.arange(8)[own_rows()], temperature=0.5
        )
        loss.backward()
        found.append(own.grad.tolist())
    Path(f"{out}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    sta.settings.progress = False
    sta.settings.device = "cpu"
    job, *arguments = sys.argv[1:]
    {
        "run": run,
        "kill": kill,
        "kill_in_save": kill_in_save,
        "full_disk": full_disk,
        "die": die,
        "steps": steps,
        "negatives": negatives,
    }[job](*arguments)
