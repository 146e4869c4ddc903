"""One step of training on a GPU is the step on the CPU."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest
import torch

from stalign import models
from stalign.train import losses, pretrain

from .conftest import GENES

pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda:0"


def first_loss(folder) -> float:
    with (folder / "training_log.csv").open() as lines:
        return next(float(row["train/loss"]) for row in csv.DictReader(lines) if row.get("train/loss"))


def test_one_step(tiny_config, sections, tmp_path, monkeypatch):
    """Without dropout, whose random numbers are the device's own, loss and weights are those of the CPU."""
    monkeypatch.setattr("stalign.settings._progress", False)
    changes = {**tiny_config.network.changes}
    changes["fusion"] = {**changes["fusion"], "dropout": 0.0}
    found = {}
    for device in ("cpu", DEVICE):
        monkeypatch.setattr("stalign.settings._device", device)
        config = dataclasses.replace(
            tiny_config,
            out=str(tmp_path / device.replace(":", "_")),
            network=dataclasses.replace(tiny_config.network, changes=changes, dtype="float32"),
            optimiser=dataclasses.replace(tiny_config.optimiser, steps=1, validate_every=1),
        )
        folder = pretrain(config, sections, genes=GENES)
        found[device] = first_loss(folder), models.load(folder).state_dict()
    (loss, weights), (other_loss, other_weights) = found["cpu"], found[DEVICE]
    assert np.isfinite(other_loss)
    assert other_loss == pytest.approx(loss, rel=1e-3)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not name.startswith("prediction"):
            # Adam's first step is as long as the learning rate, whichever way a gradient near zero points.
            difference = (tensor - other_weights[name]).abs().max().item()
            assert difference <= 2.5 * tiny_config.optimiser.lr + 1e-4, name


def test_losses():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(32, 16, generator=generator) for _ in range(2))
    clusters = torch.arange(32) % 4
    mask = losses.negative_mask(clusters, "masked", generator=generator)
    expected = losses.masked_info_nce(query, key, mask), losses.info_nce(query, key)
    found = (
        losses.masked_info_nce(query.to(DEVICE), key.to(DEVICE), mask.to(DEVICE)),
        losses.info_nce(query.to(DEVICE), key.to(DEVICE)),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
