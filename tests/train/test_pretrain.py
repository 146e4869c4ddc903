from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from stalign import models
from stalign.train import pretrain
from stalign.train._config import OptimiserConfig
from stalign.train._evaluate import recall_at
from stalign.train._module import schedule

pytest.importorskip("lightning")

from .conftest import GENES, make_section


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("stalign.settings._progress", False)
    monkeypatch.setattr("stalign.settings._device", "cpu")


def test_run_writes_a_checkpoint_that_loads(tiny_config, sections):
    out = pretrain(tiny_config, sections, genes=GENES, validation=[make_section("v", seed=9)])
    model = models.load(out)
    assert model.genes == GENES
    assert len(model.predicted_genes) == 10
    rows = list(csv.DictReader((out / "training_log.csv").open()))
    assert {"train/loss", "train/cross", "train/structure", "validation/v/recall_at_5_percent"} <= set(rows[0])
    assert json.loads((out / "training_config.json").read_text())["seed"] == 3
    assert "3 sections of 3 patients" in (out / "README.md").read_text()


def test_same_seed_same_weights(tiny_config, sections, tmp_path):
    first = models.load(pretrain(tiny_config, sections, genes=GENES)).state_dict()
    again_config = dataclasses.replace(tiny_config, out=str(tmp_path / "again"))
    again = models.load(pretrain(again_config, sections, genes=GENES)).state_dict()
    other_config = dataclasses.replace(tiny_config, out=str(tmp_path / "other"), seed=4)
    other = models.load(pretrain(other_config, sections, genes=GENES)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_aligns_image_and_genes(tiny_config, sections):
    long = dataclasses.replace(
        tiny_config, optimiser=OptimiserConfig(steps=60, batch_size=32, warmup=5, lr=3e-3, validate_every=60)
    )
    out = pretrain(long, sections, genes=GENES)
    rows = [row for row in csv.DictReader((out / "training_log.csv").open()) if row.get("train/niche")]
    first, last = float(rows[0]["train/niche"]), float(rows[-1]["train/niche"])
    assert last < 0.7 * first


def test_no_image_anywhere_is_an_error(tiny_config):
    with pytest.raises(ValueError, match="None of the 1 training sections has an image"):
        pretrain(tiny_config, [make_section("c", image=False)], genes=GENES)


def test_schedule():
    config = OptimiserConfig(steps=100, warmup=10, lr=1.0, lr_min=0.0, weight_decay=0.04, weight_decay_end=0.4)
    assert schedule(0, config)[0] == pytest.approx(0.1)
    assert schedule(9, config)[0] == pytest.approx(1.0)
    assert schedule(55, config)[0] == pytest.approx(0.5)
    assert schedule(100, config) == pytest.approx((0.0, 0.4))
    assert schedule(0, config)[1] == pytest.approx(0.04)


def test_recall_counts_ranks():
    key = np.eye(4)
    assert recall_at(key, key, share=0.25) == 1.0
    assert recall_at(key[[1, 0, 2, 3]], key, share=0.25) == 0.5
