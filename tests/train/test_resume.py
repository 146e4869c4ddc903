from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stalign import models
from stalign.train import _files, pretrain
from stalign.train._callbacks import RunLog
from stalign.train._files import disk_full_named, read_state, write_state

pytest.importorskip("lightning")

from .conftest import GENES, make_section, tiny

WORKER = Path(__file__).parent / "worker.py"
# Six steps, a checkpoint after every second, a log row after each.
OFTEN = ("run.checkpoint_every=2", "run.log_every=1")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("stalign.settings._progress", False)
    monkeypatch.setattr("stalign.settings._device", "cpu")


def worker(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(WORKER), *arguments]
    return subprocess.run(  # noqa: S603  our own script
        command, capture_output=True, text=True, timeout=240, env=environment, check=False
    )


def run(out: Path, *changes: str) -> Path:
    sections = [make_section("a", seed=1), make_section("b", seed=2), make_section("c", image=False, seed=3)]
    return pretrain(tiny(str(out), *changes), sections, genes=GENES, validation=[make_section("v", seed=9)])


def run_alone(out: Path, *changes: str) -> Path:
    """Train in a new process, as a command does that is called again.

    A process that has done other things before was seen to differ in the last bits.
    """
    done = worker("run", str(out), *changes)
    assert done.returncode == 0, done.stderr
    return out


def assert_same_result(first: Path, second: Path) -> None:
    one, two = models.load(first).state_dict(), models.load(second).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (first / "training_log.csv").read_text() == (second / "training_log.csv").read_text()


@pytest.mark.parametrize(("step", "changes"), [(3, ()), (5, ("run.accumulate=2", "optimiser.slides_per_batch=2"))])
def test_killed_run_goes_on_bit_for_bit(tmp_path, step, changes):
    whole = run_alone(tmp_path / "whole", *OFTEN, *changes)
    killed = worker("kill", str(tmp_path / "killed"), str(step), *OFTEN, *changes)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "killed").exists()
    # A row that no checkpoint covers, cut short: what a kill in the middle of writing leaves.
    with (tmp_path / "killed.run" / "training_log.csv").open("a") as file:
        file.write("999,0.1,")
    state = read_state(tmp_path / "killed.run" / "resume.ckpt")
    assert state["step"] == step // 2 * 2
    assert_same_result(whole, run_alone(tmp_path / "killed", *OFTEN, *changes))


def test_killed_while_a_checkpoint_is_written(tmp_path):
    whole = run_alone(tmp_path / "whole", *OFTEN)
    killed = worker("kill_in_save", str(tmp_path / "killed"), "2", *OFTEN)
    assert killed.returncode == -9, killed.stderr
    assert read_state(tmp_path / "killed.run" / "resume.ckpt")["step"] == 2
    assert_same_result(whole, run_alone(tmp_path / "killed", *OFTEN))


def test_disk_full_leaves_the_previous_checkpoint(tmp_path):
    full = worker("full_disk", str(tmp_path / "run"), "20000", *OFTEN)
    assert full.returncode == 1
    assert "Disk full" in full.stderr
    assert str(tmp_path / "run.run" / "last") in full.stderr or "resume.ckpt" in full.stderr
    assert read_state(tmp_path / "run.run" / "resume.ckpt")["step"] == 2
    assert not list((tmp_path / "run.run").glob(".resume*"))
    assert_same_result(run_alone(tmp_path / "whole", *OFTEN), run_alone(tmp_path / "run", *OFTEN))


def test_full_disk_is_named_and_the_earlier_file_intact(tmp_path, monkeypatch):
    path = tmp_path / "resume.ckpt"
    write_state(path, {"step": 1})

    def save(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files.torch, "save", save)
    with pytest.raises(OSError, match="Disk full") as caught:
        write_state(path, {"step": 2})
    assert caught.value.errno == errno.ENOSPC
    assert str(path) in str(caught.value)
    assert read_state(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["resume.ckpt"]


def test_full_disk_is_seen_through_other_libraries(tmp_path):
    with pytest.raises(OSError, match="Disk full"), disk_full_named(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="something else"), disk_full_named(tmp_path):
        raise RuntimeError("something else")


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    first = run(tmp_path / "run")
    digest = models.load(first).provenance.sha256
    monkeypatch.setattr("stalign.train._module.Alignment.training_step", None)
    assert models.load(run(tmp_path / "run")).provenance.sha256 == digest


def test_another_config_does_not_take_over_a_run(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"optimiser\.lr: 0\.001 → 0\.5.*run\.resume=false"):
        run(tmp_path / "run", "optimiser.lr=0.5")
    # Where it runs and how often it saves is nobody's business.
    run(tmp_path / "run", "run.checkpoint_every=1", "run.num_workers=0", "card.description=text")
    assert read_state(tmp_path / "run.run" / "resume.ckpt")["step"] == 6
    run(tmp_path / "run", "run.resume=false", "optimiser.steps=2")
    assert read_state(tmp_path / "run.run" / "resume.ckpt")["step"] == 2


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path / "run")
    file = tmp_path / "run.run" / "resume.ckpt"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"resume\.ckpt is not a readable"):
        run(tmp_path / "run")


def test_the_state_is_plain(tmp_path):
    run(tmp_path / "run")
    state = torch.load(tmp_path / "run.run" / "resume.ckpt", weights_only=True)
    assert state["step"] == 6
    assert set(state["optimiser"]) == {"state", "param_groups"}


def test_log_drops_what_no_checkpoint_covers(tmp_path):
    log = RunLog(tmp_path / "log.csv")
    for step in range(4):
        log.add(step, {"train/loss": 1.5 / (step + 1)})
    log.add(4, {"train/loss": 0.25, "validation/x": 1.0})
    again = RunLog(tmp_path / "log.csv", before=2)
    again.add(2, {"train/loss": 7.0})
    assert (tmp_path / "log.csv").read_text() == "step,train/loss\n0,1.5\n1,0.75\n2,7.0\n"


def test_tensorboard_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        run(tmp_path / "run", "run.tensorboard=true")
