"""What a training run may have left in its checkpoint files, and what is refused."""

from __future__ import annotations

import argparse
import pickle

import pytest
import torch

from stalign.models._torchfile import read_torch, unwrap

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1)}
PREFIXED = {f"module.{key}": value for key, value in STATE.items()}
OPTIMISER = {"state": {0: {"exp_avg": torch.zeros(2), "step": 3}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        PREFIXED,
        {"model": STATE},
        {"model": PREFIXED, "args": argparse.Namespace(lr=0.1, gpu=None, sizes=[1, 2]), "epoch": 7},
        {"state_dict": PREFIXED, "optimizer": OPTIMISER},
        {"model": {"state_dict": PREFIXED}},
        {"student": PREFIXED, "optimizer": OPTIMISER, "epoch": 3, "args": argparse.Namespace()},
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_wrappers(tmp_path, content, new):
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    found = unwrap(read_torch(tmp_path / "x.pth"), what="x")
    assert set(found) == set(STATE)
    assert all(torch.equal(found[key], value) for key, value in STATE.items())


def test_two_states_are_a_choice_that_is_not_made(tmp_path):
    torch.save({"student": STATE, "teacher": STATE}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        unwrap(read_torch(tmp_path / "x.pth"), what="x")


class Payload:
    """Harmless code that a careless reader would run."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("write", ["zip", "legacy", "pickle"])
def test_code_is_not_executed(tmp_path, write):
    file, trap = tmp_path / "x.pth", tmp_path / "trap"
    content = {**STATE, "x": Payload(str(trap))}
    if write == "pickle":
        with file.open("wb") as handle:
            pickle.dump({"x": Payload(str(trap))}, handle)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(ValueError, match=r"x\.pth"):
        read_torch(file)
    assert not trap.exists()


def test_every_cut_is_noticed(tmp_path):
    torch.save(STATE, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    file = tmp_path / "x.pth"
    for length in range(0, len(whole), max(len(whole) // 40, 1)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.pth"):
            read_torch(file)


def test_every_flipped_number_is_noticed(tmp_path):
    torch.save({"a": torch.arange(4096.0)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    start = whole.find(torch.arange(4096.0).numpy().tobytes())
    file = tmp_path / "x.pth"
    for place in range(start, start + 4 * 4096, 997):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated or corrupt"):
            read_torch(file)
