from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from anndata import AnnData

import stalign as sta
from stalign import models
from stalign.models import STAlign
from stalign.train import ObjectiveConfig, finetune
from stalign.train._finetune import recorded_objective

pytest.importorskip("lightning")

from .conftest import GENES, make_section, tiny

FEW = {"steps": 4, "batch_size": 16}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("stalign.settings._progress", False)
    monkeypatch.setattr("stalign.settings._device", "cpu")


@pytest.fixture
def model() -> STAlign:
    config = models.config("mini").updated(tiny("x").network.changes, prediction={"n_genes": 5})
    torch.manual_seed(0)
    return STAlign(config, genes=GENES).eval()


def state(model: STAlign) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_encoders_stay_and_the_rest_moves(model):
    before = state(model)
    new = finetune(model, make_section("a", seed=1), **FEW)
    after = new.state_dict()
    for name in before:
        if ".encoder." in name:
            assert torch.equal(before[name], after[name]), name
    for part in ("tokens", "spot_fusion", "niche_fusion", "heads.spot_image", "heads.niche."):
        moved = [not torch.equal(before[n], after[n]) for n in before if part in n]
        assert any(moved), part
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_trains_is_as_before(model):
    new = finetune(model, make_section("a", seed=1), **FEW)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {n: p.requires_grad for n, p in new.named_parameters() if "prediction" not in n} == {
        n: t for n, t in trains.items() if "prediction" not in n
    }
    assert not new.branch("spot_image").frozen
    assert not new.training


def test_image_encoders_run_once(model, monkeypatch):
    seen = []
    encoder = type(model.encoder("spot_image"))
    original = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda self, x: (seen.append(len(x)), original(self, x))[1])
    section = make_section("a", seed=1)
    finetune(model, section, steps=20, batch_size=16)
    assert sum(seen) == 2 * len(section)  # spots and niches


def test_the_loss_falls_and_retrieval_of_a_held_out_section_rises(model, tmp_path):
    out = tmp_path / "new"
    finetune(
        model,
        [make_section("a", seed=1), make_section("b", seed=2)],
        validation=make_section("v", seed=9),
        steps=60,
        batch_size=32,
        lr=3e-3,
        out=out,
    )
    rows = list(csv.DictReader((out / "training_log.csv").open()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert losses[-1] < 0.8 * losses[0]
    measured = [float(row["validation/alignment"]) for row in rows if row["validation/alignment"]]
    recall = [float(row["validation/recall_at_10_percent"]) for row in rows if row["validation/alignment"]]
    assert len(measured) == 2
    assert recall[-1] > recall[0]


def test_same_seed_same_weights_whatever_was_drawn_before(model):
    first = finetune(model, make_section("a", seed=1), seed=1, **FEW).state_dict()
    torch.rand(7)
    before = torch.get_rng_state()
    again = finetune(model, make_section("a", seed=1), seed=1, **FEW).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    other = finetune(model, make_section("a", seed=1), seed=2, **FEW).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_folder_holds_model_log_and_recipe(model, tmp_path):
    objective = ObjectiveConfig(structure=1.0, n_clusters=2)
    out = tmp_path / "new"
    new = finetune(model, make_section("a", seed=1), objective=objective, name="ours", out=out, **FEW)
    assert new.config.name == "ours"
    assert new.provenance.sha256 == models.load(out).provenance.sha256
    recipe = json.loads((out / "training_config.json").read_text())
    assert recipe["optimiser"]["steps"] == 4
    assert recorded_objective(new) == objective
    assert "Fine-tuned from" in (out / "README.md").read_text()
    assert len(new.predicted_genes) == 5
    with pytest.raises(FileExistsError, match="not empty"):
        finetune(model, make_section("a", seed=1), out=out, **FEW)


def test_objective_of_the_bundled_model_is_found():
    objective = recorded_objective(models.load("stalign-mini"))
    assert (objective.structure, objective.negatives) == (10.0, "paper")


def test_no_image_is_an_error(model):
    with pytest.raises(ValueError, match="None of the 1 sections has an image"):
        finetune(model, make_section("c", image=False), **FEW)


def test_a_name_is_no_model():
    with pytest.raises(TypeError, match=r"models\.load"):
        finetune("stalign-mini", make_section("a"), **FEW)


def test_sections_of_one_name_are_told_apart(model, tmp_path):
    held_out = [make_section("a", seed=8), make_section("a", seed=9)]
    finetune(model, make_section("a", seed=1), validation=held_out, out=tmp_path / "new", **FEW)
    row = next(csv.DictReader((tmp_path / "new" / "training_log.csv").open()))
    assert {"validation/a_0/alignment", "validation/a_1/alignment"} <= set(row)


class TestAnnData:
    @pytest.fixture
    def mini(self) -> STAlign:
        return models.load("stalign-mini")

    @pytest.fixture
    def adata(self) -> AnnData:
        return sta.datasets.synthetic_visium(n_rows=8, n_cols=8)

    def test_niches_must_be_there(self, mini, adata):
        with pytest.raises(KeyError, match=r"pp\.extract_niches\(adata, n_neighbors=18, spot_um=112, niche_um=448\)"):
            finetune(mini, adata, **FEW)

    def test_niches_must_be_the_models(self, mini, adata):
        sta.pp.extract_niches(adata, niche_um=200.0)
        with pytest.raises(ValueError, match="niche_um"):
            finetune(mini, adata, **FEW)

    def test_a_slide_is_embedded_with_the_result(self, mini, adata):
        sta.pp.extract_niches(adata)
        keys = {name: list(getattr(adata, name)) for name in ("obs", "var", "obsm", "obsp", "uns")}
        new = finetune(mini, adata, steps=3, batch_size=32)
        assert {name: list(getattr(adata, name)) for name in keys} == keys
        sta.tl.embed(adata, model=new)
        assert np.isfinite(adata.obsm["X_stalign"]).all()
        assert adata.uns["stalign"]["embed"]["model"] == "stalign-mini-finetuned"
