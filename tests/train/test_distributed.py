from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stalign import models
from stalign.train import _distributed
from stalign.train._config import RunConfig
from stalign.train._distributed import _BatchNormOverRanks, gather_rows, lost_contact, share_batch_norm, world
from stalign.train._fit import device_arguments

pytest.importorskip("lightning")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

WORKER = Path(__file__).parent / "worker.py"
# Dropout draws other numbers in every process.
EXACT = (
    "network.changes.fusion.dropout=0.0",
    "augment.gene_noise=0.1",
    "optimiser.steps=4",
    "optimiser.validate_every=2",
    "run.log_every=1",
)


def launch(*arguments: str, processes: int = 2, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Run the worker, alone or under torchrun."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(  # noqa: S603 - our own script
        [*command, str(WORKER), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


VARIANTS = {
    "masked": (),
    "paper, two slides": ("optimiser.slides_per_batch=2", "objective.negatives=paper", "augment.drop_modality=0.4"),
    "in batch, accumulated": ("objective.symmetric=false", "objective.negatives=in_batch", "run.accumulate=2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All variants by one process, and by two that torchrun starts."""
    folder = tmp_path_factory.mktemp("distributed")
    groups = [(*EXACT, *changes) for changes in VARIANTS.values()]
    arguments = [part for group in groups for part in ("--", *group)][1:]
    for name, processes in (("one", 1), ("two", 2)):
        done = launch("steps", str(folder / name), *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_have_loss_and_gradients_of_one(runs, variant):
    number = list(VARIANTS).index(variant)
    alone = np.load(runs / f"one-{number}-0.npz")
    for rank in (0, 1):
        shared = np.load(runs / f"two-{number}-{rank}.npz")
        assert (2 * shared["rows"] == alone["rows"]).all()
        np.testing.assert_allclose(shared["loss"], alone["loss"], rtol=1e-5)
        # Later steps add what rounding did to the weights before.
        for step, (two, one) in enumerate(zip(shared["gradients"], alone["gradients"], strict=True)):
            scale = np.abs(one).max()
            np.testing.assert_allclose(two / scale, one / scale, atol=2e-3 if step else 1e-5)
    first, second = (models.load(runs / f"{name}-{number}").state_dict() for name in ("one", "two"))
    for name in first:
        np.testing.assert_allclose(first[name].float(), second[name].float(), atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_the_log_of_two_processes_is_that_of_one(runs):
    logs = [list(csv.DictReader((runs / f"{name}-0" / "training_log.csv").open())) for name in ("one", "two")]
    assert [row.keys() for row in logs[0]] == [row.keys() for row in logs[1]]
    for one, two in zip(*logs, strict=True):
        for name, value in one.items():
            assert bool(value) == bool(two[name])
            if value and not name.startswith("validation/"):
                assert float(two[name]) == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.slow
def test_negatives_cross_ranks(tmp_path):
    done = launch("negatives", str(tmp_path / "keys"))
    assert done.returncode == 0, done.stderr
    before, after = np.array(json.loads((tmp_path / "keys-0.json").read_text()))
    assert np.abs(before).max() > 0
    # The queries of process 1 changed: what they say of the keys of process 0 is another thing.
    assert np.abs(before - after).max() > 1e-4


@pytest.mark.slow
def test_one_process_that_dies_ends_the_others(tmp_path):
    done = launch("die", str(tmp_path / "run"), timeout=120)
    assert done.returncode != 0
    assert "lost contact with another process at step 2 of 6" in done.stderr
    assert not (tmp_path / "run").exists()


# -- without a second process ------------------------------------------------------------------------------------------


def test_alone_rows_stay_as_they_are():
    rows = torch.randn(3, 2, requires_grad=True)
    assert world() == (0, 1)
    assert gather_rows(rows) is rows


def test_batch_norm_keeps_names_and_what_it_does():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2))
    frozen = nn.BatchNorm1d(2).requires_grad_(False)
    x = torch.randn(5, 3, 6, 6)
    expected, names = layers[:2](x), list(layers.state_dict())
    layers[1].reset_running_stats()
    share_batch_norm(layers, torch.device("cpu"))
    assert isinstance(layers[1], _BatchNormOverRanks)
    assert list(layers.state_dict()) == names
    torch.testing.assert_close(layers[:2](x), expected)
    assert share_batch_norm(frozen, torch.device("cpu")) is frozen


def test_batch_norm_over_ranks_equals_torch(monkeypatch):
    plain = nn.BatchNorm2d(3)
    nn.init.uniform_(plain.weight)
    shared = _BatchNormOverRanks(plain)
    shared.running_mean, shared.running_var = torch.zeros(3), torch.ones(3)
    shared.num_batches_tracked = torch.tensor(0)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    # Two processes with the same rows are one with each row twice: the same statistics, but for the unbiased variance.
    monkeypatch.setattr(_distributed, "world", lambda: _distributed.World(0, 2))
    monkeypatch.setattr(_distributed.dist, "all_reduce", lambda values: values.mul_(2))
    result = shared(first)
    (result**3).sum().backward()
    expected = plain(second)
    (2 * expected**3).sum().backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(shared.running_mean, plain.running_mean)
    assert int(shared.num_batches_tracked) == 1


def test_lost_contact_is_told_from_other_errors(monkeypatch):
    with pytest.raises(RuntimeError, match="gloo"), lost_contact(lambda: "here"):
        raise RuntimeError("gloo: alone nobody can be lost")
    monkeypatch.setattr(_distributed, "world", lambda: _distributed.World(1, 4))
    message = "Process 1 of 4 lost contact with another process at step 5"
    with pytest.raises(ConnectionError, match=message), lost_contact(lambda: "at step 5"):
        raise RuntimeError("[gloo/transport] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shapes"), lost_contact(lambda: "here"):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.fixture
def sigterms(monkeypatch) -> Iterator[list[int]]:
    """What this process, one of two under torchrun, heard of SIGTERM."""
    monkeypatch.setattr(_distributed, "world", lambda: _distributed.World(0, 2))
    monkeypatch.setattr(_distributed, "launched_world", lambda: _distributed.World(0, 2))
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


def end_with(message: str) -> None:
    signal.raise_signal(signal.SIGTERM)
    raise RuntimeError(message)


def test_sigterm_waits_for_the_end_of_the_steps(sigterms):
    with lost_contact(lambda: "here"):
        signal.raise_signal(signal.SIGTERM)
        assert not sigterms
    assert sigterms == [signal.SIGTERM]
    signal.raise_signal(signal.SIGTERM)
    assert len(sigterms) == 2


def test_sigterm_does_not_silence_lost_contact(sigterms):
    with pytest.raises(ConnectionError, match="lost contact"), lost_contact(lambda: "here"):
        end_with("[gloo/transport] Connection closed by peer")
    signal.raise_signal(signal.SIGTERM)
    assert not sigterms


def test_sigterm_is_not_lost_with_another_error(sigterms):
    with pytest.raises(RuntimeError, match="shapes"), lost_contact(lambda: "here"):
        end_with("shapes cannot be multiplied")
    assert sigterms == [signal.SIGTERM]


def test_devices_follow_torchrun(monkeypatch):
    monkeypatch.setattr("stalign.settings._device", "cpu")
    assert device_arguments(RunConfig()) == {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
    assert device_arguments(RunConfig(devices=3, num_nodes=2)) == {"accelerator": "cpu", "devices": 3, "num_nodes": 2}
    monkeypatch.setattr("stalign.train._fit.launched_world", lambda: _distributed.World(5, 8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_arguments(RunConfig()) == {"accelerator": "cpu", "devices": 4, "num_nodes": 2}
    with pytest.raises(ValueError, match="4 processes on each of 2 nodes"):
        device_arguments(RunConfig(devices=2))


def test_a_named_gpu_is_taken(monkeypatch):
    monkeypatch.setattr("stalign.settings._device", "cuda:1")
    assert device_arguments(RunConfig())["devices"] == [1]
