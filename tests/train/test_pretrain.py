from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stalign import models
from stalign.train import pretrain, read_config
from stalign.train._config import OptimiserConfig
from stalign.train._module import schedule

pytest.importorskip("lightning")

from .conftest import GENES, make_section, tiny


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
    assert [row["step"] for row in rows] == ["2", "5"]
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


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "training_log.csv").open()))


@pytest.fixture
def train(tmp_path, sections):
    """Train the tiny network with changes; one validation section with labels."""
    held_out = make_section("v", seed=9)
    held_out.labels = np.where(np.arange(len(held_out)) < 24, "left", "right")

    def run(*changes: str, name: str = "run") -> Path:
        return pretrain(tiny(str(tmp_path / name), *changes), sections, genes=GENES, validation=[held_out])

    return run


# -- what is logged and kept -------------------------------------------------------------------------------------------


def test_validation_measures_retrieval_and_domains(train):
    rows = rows_of(train())
    names = ("recall_at_1_percent", "recall_at_5_percent", "recall_at_10_percent", "alignment", "uniformity")
    for name in (*names, "domain_ari"):
        # One section: the mean is its own.
        assert rows[-1][f"validation/{name}"] == rows[-1][f"validation/v/{name}"] != ""


def test_best_and_last_are_models(train, tmp_path):
    train("run.best=alignment", "run.checkpoint_every=4", "optimiser.validate_every=1")
    folder = tmp_path / "run.run"
    last, best = models.load(folder / "last"), models.load(folder / "best")
    values = [float(row["validation/alignment"]) for row in rows_of(folder)]
    state = torch.load(folder / "resume.ckpt", weights_only=True)
    assert state["best"] == {"value": min(values), "step": values.index(min(values)) + 1}
    trained = models.load(tmp_path / "run")
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in last.state_dict().items())
    if state["best"]["step"] < 6:
        assert any(not torch.equal(t, last.state_dict()[n]) for n, t in best.state_dict().items())


def test_the_best_model_can_be_the_result(train, tmp_path):
    changes = ["optimiser.validate_every=1", "optimiser.lr=0.3", "run.best=recall_at_10_percent", "optimiser.steps=8"]
    train(*changes, "run.final=best")
    best, result = models.load(tmp_path / "run.run" / "best"), models.load(tmp_path / "run")
    assert all(torch.equal(tensor, result.state_dict()[name]) for name, tensor in best.state_dict().items())
    assert len(result.predicted_genes) == 10


def test_best_needs_a_validation(tiny_config, sections):
    config = dataclasses.replace(tiny_config, run=dataclasses.replace(tiny_config.run, final="best"))
    with pytest.raises(ValueError, match="no validation sections"):
        pretrain(config, sections, genes=GENES)


def test_progress_shows_rate_and_time_left(train, monkeypatch, capsys):
    monkeypatch.setattr("stalign.settings._progress", True)
    train("run.log_every=1")
    shown = capsys.readouterr().err
    assert "pairs/s" in shown
    assert "loss" in shown
    assert "6/6" in shown


def test_tensorboard_gets_the_same_numbers(train, tmp_path, monkeypatch):
    written: dict[tuple[str, int], float] = {}

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def close(self):
            written["closed", 0] = 1.0

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    rows = rows_of(train("run.tensorboard=true"))
    assert written["closed", 0]
    for row in rows:
        assert written["train/loss", int(row["step"])] == float(row["train/loss"])


# -- how it is trained -------------------------------------------------------------------------------------------------


def test_parts_can_be_switched_off(train):
    rows = rows_of(train("objective.niche=false", "objective.structure=0.0", "run.log_every=1"))
    terms = {name for name in rows[0] if name.startswith("train/")}
    assert terms == {"train/spot", "train/cross", "train/loss"}
    for row in rows:
        parts = [float(row[name]) for name in terms - {"train/loss"} if row[name]]
        assert float(row["train/loss"]) == pytest.approx(sum(parts), rel=1e-5)


def test_a_batch_that_no_part_can_use_is_harmless(train):
    # The section without an image has nothing to say to the spot contrast.
    only_spot = ("objective.niche=false", "objective.cross=false", "objective.structure=0.0")
    rows = rows_of(train(*only_spot, "augment.drop_modality=0.5", "run.log_every=1"))
    assert len(rows) == 6
    assert all(np.isfinite(float(row["train/loss"])) for row in rows)


def test_weights_of_the_parts_are_alpha_beta_and_the_rest(train):
    one_step = ("objective.structure=0.0", "optimiser.steps=1", "augment.drop_modality=0.0")
    imaged = "optimiser.image_sections=1e9"
    plain = rows_of(train(*one_step, imaged, name="a"))[0]
    other = rows_of(train(*one_step, imaged, "objective.alpha=0.15", "objective.beta=0.6", name="b"))[0]
    for name, factor in (("spot", 0.5), ("niche", 2.0), ("cross", 0.25 / 0.4)):
        assert float(other[f"train/{name}"]) == pytest.approx(factor * float(plain[f"train/{name}"]), rel=1e-4)


def test_accumulated_batches_make_one_step(train, monkeypatch):
    from stalign.train._module import Alignment

    seen: list[int] = []
    original = Alignment.training_step

    def training_step(self, batch, batch_index):
        seen.append(self.step)
        return original(self, batch, batch_index)

    monkeypatch.setattr(Alignment, "training_step", training_step)
    train("run.accumulate=3", "optimiser.steps=2", "optimiser.warmup=0")
    assert seen == [0, 0, 0, 1, 1, 1]


def test_mixed_precision_trains_and_the_loss_is_float32(tmp_path, sections, monkeypatch):
    from stalign.train import _module

    # On CPUs torch's bfloat16 gradient of a strided convolution of a single pixel is unreliable (2.15): larger patches.
    for section in sections[:2]:
        section.spot_image = section.niche_image = section.spot_image.repeat(2, axis=1).repeat(2, axis=2)
    seen = []
    original = _module.masked_info_nce
    monkeypatch.setattr(_module, "masked_info_nce", lambda q, *a, **k: (seen.append(q.dtype), original(q, *a, **k))[1])
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        config = tiny(str(tmp_path / precision), "run.log_every=1", f'run.precision="{precision}"')
        losses[precision] = [float(row["train/loss"]) for row in rows_of(pretrain(config, sections, genes=GENES))]
    assert set(seen) == {torch.float32}
    assert losses["32-true"] != losses["bf16-mixed"]
    assert losses["bf16-mixed"][0] == pytest.approx(losses["32-true"][0], rel=0.05)


def test_clipping_bounds_the_step(train, tmp_path):
    # Adam divides by the gradient's size: what is clipped to nothing moves the weights by eps alone.
    train("run.clip=1e-12", "optimiser.weight_decay=0.0", "optimiser.weight_decay_end=0.0", name="clipped")
    train("run.clip=0.0", "optimiser.weight_decay=0.0", "optimiser.weight_decay_end=0.0", name="free")
    start = tmp_path / "start"
    train("optimiser.steps=1", "optimiser.lr=1e-12", "optimiser.lr_min=0", name="start")
    weights = {n: models.load(tmp_path / n).state_dict()["heads.spot.mlp.0.weight"] for n in ("clipped", "free")}
    before = models.load(start).state_dict()["heads.spot.mlp.0.weight"]
    assert (weights["clipped"] - before).abs().max() < 0.1 * (weights["free"] - before).abs().max()


def test_several_slides_share_a_batch(train):
    rows = rows_of(train("optimiser.slides_per_batch=2", "run.log_every=1"))
    assert all(np.isfinite(float(row["train/loss"])) for row in rows)


def test_a_loss_that_is_not_finite_names_the_library(train, monkeypatch):
    from stalign.train._data import Batches

    original = Batches.batch

    def batch(self, step):
        found = original(self, step)
        return found._replace(niche_profile=found.niche_profile * float("nan")) if step == 4 else found

    monkeypatch.setattr(Batches, "batch", batch)
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step 4, on a batch of library '[abc]'"):
        train()


def test_an_interrupted_run_is_no_result(train, tmp_path, monkeypatch):
    from stalign.train import _fit

    monkeypatch.setattr(_fit, "make_trainer", None)
    monkeypatch.setattr("lightning.Trainer.fit", lambda self, module, loader: None)
    with pytest.raises(KeyboardInterrupt, match="step 0 of 6"):
        train()
    assert not (tmp_path / "run").exists()


# -- what goes in ------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_no_model_is_not_overwritten(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="does not hold a model"):
        train()
    assert not (tmp_path / "run.run").exists()


def test_sections_need_genes(tiny_config, sections):
    with pytest.raises(ValueError, match="genes="):
        pretrain(tiny_config, sections)


def test_names_of_sections_must_differ(tiny_config, sections):
    with pytest.raises(ValueError, match=r"more than once: \['a'\]"):
        pretrain(tiny_config, sections, genes=GENES, validation=[make_section("a", seed=9)])


def test_a_frozen_encoder_without_weights_is_refused(tmp_path, sections):
    config = tiny(str(tmp_path / "run"))
    changes = {**config.network.changes, "niche_image": {"encoder": "uni", "args": {"depth": 1}, "frozen": True}}
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, changes=changes))
    with pytest.raises(ValueError, match=r"network\.weights\.niche_image"):
        pretrain(config, sections, genes=GENES)


def test_weights_for_nothing_are_refused(tmp_path, sections):
    with pytest.raises(ValueError, match="names scgpt"):
        pretrain(tiny(str(tmp_path / "run"), "network.weights.scgpt=x"), sections, genes=GENES)


def test_the_papers_config_asks_for_scgpt(tmp_path, sections):
    config = tiny(str(tmp_path / "run"), "network.config=paper")
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, changes={}))
    with pytest.raises(ValueError, match=r"network\.weights\.scgpt=PATH"):
        pretrain(config, sections, genes=GENES)


@pytest.mark.reference
def test_the_papers_network_trains_on_cached_features(shared, tmp_path):
    """The paper's config with tiny stand-ins for UNI and scGPT, each run once over a section."""
    reference = shared / "reference"
    scgpt = reference / "scgpt_tiny" / "ckpt_flash"
    vocabulary = json.loads((scgpt / "vocab.json").read_text())
    genes = tuple(sorted(gene for gene in vocabulary if not gene.startswith("<")))[:60]
    sets = tmp_path / "sets.gmt"
    sets.write_text("".join(f"SET_{i}\tx\t" + "\t".join(genes[5 * i : 5 * i + 8]) + "\n" for i in range(4)))
    small = {
        "spot_image": tiny("x").network.changes["spot_image"],
        "niche_gene": {"args": {"hidden": [16, 8], "layers": 1, "feedforward": 16, "out_hidden": 8}},
        "heads": {"hidden": 16, "out": 8},
        "fusion": {"heads": 2, "head_dim": 4, "hidden": 4},
        "width": 24,
    }
    small["spot_image"] = {**small["spot_image"], "tokens": {"kind": "linear"}}
    path = Path(models.__file__).parents[1] / "train" / "configs" / "stalign-paper.toml"
    config = read_config(
        path,
        [
            f"out={tmp_path / 'run'}",
            f"network.weights.scgpt={scgpt}",
            f"network.weights.niche_image={reference / 'uni_tiny'}",
            f"network.gene_sets={sets}",
            "optimiser.epochs=2",
            "optimiser.batch_size=24",
            "optimiser.warmup_epochs=1",
            "prediction.n_genes=5",
            "run.log_every=1",
        ],
    )
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, changes=small))
    sections = [make_section("a", seed=1), make_section("b", seed=2)]
    out = pretrain(config, sections, genes=genes, validation=[make_section("v", seed=9)])
    rows = rows_of(out)
    assert len(rows) == 8  # 2 epochs of 96 spots in batches of 24
    assert all(np.isfinite(float(row["train/loss"])) for row in rows)
    model = models.load(out)
    assert model.provenance.name == "stalign-paper"
    assert model.encoder("niche_image").provenance.sha256
    assert model.encoder("spot_gene").provenance.sha256
    assert model.prediction.inputs == ("spot_image",)
    # Frozen weights are in the model folders, and not a second time in what a run goes on from.
    state = torch.load(tmp_path / "run.run" / "resume.ckpt", weights_only=True)
    assert not any("niche_image.encoder" in name for name in state["model"])
    # Going on from there takes them from where they came.
    shutil.rmtree(out)
    assert models.load(pretrain(config, sections, genes=genes, validation=[make_section("v", seed=9)])).provenance
