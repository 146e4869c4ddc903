from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import stalign as sta
from stalign._cli import app

pytest.importorskip("lightning")

SMALL = """
[network.changes]
n_tokens = 2
width = 16
spot_patch = { pixels = 16 }
niche_patch = { pixels = 16 }
spot_image = { encoder = "timm", args = { model = "resnet10t", model_args = { channels = [8, 8, 8, 8] } } }
niche_image = { encoder = "timm", args = { model = "resnet10t", model_args = { channels = [8, 8, 8, 8] } } }
spot_gene = { args = { dim = 16, hidden = 16 } }
niche_gene = { args = { dim = 16, hidden = 16 } }
fusion = { heads = 2, head_dim = 8, hidden = 8 }
heads = { hidden = 16, out = 16 }
"""


@pytest.fixture(autouse=True)
def _as_before():
    progress, device = sta.settings.progress, sta.settings.device
    sta.settings.device = "cpu"
    yield
    sta.settings.progress, sta.settings.device = progress, device


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for number in range(3):
        sta.datasets.synthetic_visium(n_rows=8, n_cols=8, seed=number).write_h5ad(folder / f"S{number}.h5ad")
    return folder


@pytest.fixture
def config(tmp_path, slides):
    path = tmp_path / "run.toml"
    path.write_text(
        f'out = "{tmp_path / "model"}"\n[data]\nroot = "{slides}"\ntrain = ["S[01].h5ad"]\nvalidation = ["S2.h5ad"]\n'
        "[optimiser]\nsteps = 4\nbatch_size = 16\nwarmup = 1\nvalidate_every = 2\n[prediction]\nn_genes = 5\n" + SMALL
    )
    return path


def test_pretrain_from_slides_to_model_and_figure(run, config, tmp_path):
    result = run("pretrain", config, "--no-progress")
    assert result.exit_code == 0, result.output
    model = sta.models.load(tmp_path / "model")
    assert len(model.predicted_genes) == 5
    assert (tmp_path / "model.shards" / "manifest.json").is_file()
    assert {f.name for f in (tmp_path / "model.run").iterdir()} == {
        "best",
        "last",
        "resume.ckpt",
        "training.png",
        "training_config.json",
        "training_log.csv",
    }
    recipe = json.loads((tmp_path / "model" / "training_config.json").read_text())
    assert (recipe["out"], recipe["data"]["root"]) == ("model", ".")
    # The same call again has nothing left to do.
    digest = model.provenance.sha256
    assert run("pretrain", config, "--no-progress").exit_code == 0
    assert sta.models.load(tmp_path / "model").provenance.sha256 == digest


def test_pretrain_of_another_config_says_how_to_go_on(run, config):
    assert run("pretrain", config, "--no-progress").exit_code == 0
    result = run("pretrain", config, "--set", "optimiser.lr=0.1", "--no-progress")
    assert result.exit_code == 2
    assert "run.resume=false" in result.output


def test_pretrain_on_shards_alone_holds_out_patients(run, config, tmp_path):
    assert run("pretrain", config, "--no-progress").exit_code == 0
    shards = ("--set", f"data.shards={tmp_path / 'model.shards'}")
    other = ("--set", "data.train=[]", "--set", "data.validation=[]", "--set", f"out={tmp_path / 'other'}")
    result = run("pretrain", config, *shards, *other, "--set", 'data.validation_patients=["S1"]', "--no-progress")
    assert result.exit_code == 0, result.output
    log = (tmp_path / "other" / "training_log.csv").read_text()
    assert "validation/S1/recall_at_5_percent" in log
    assert "validation/S2" not in log


def test_a_loss_that_is_not_finite_is_one_line(run, config):
    result = run("pretrain", config, "--set", "optimiser.lr=1e30", "--set", "run.clip=0", "--no-progress")
    assert result.exit_code == 2
    assert "of library 'S" in result.output


def test_finetune_writes_a_model(run, slides, tmp_path):
    out = tmp_path / "ours"
    options = ("--steps", 3, "--batch-size", 16, "--no-progress")
    result = run("finetune", slides / "S0.h5ad", "--validation", slides / "S1.h5ad", "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert sta.models.load(out).config.name == "stalign-mini-finetuned"
    assert (out / "training.png").is_file()
    again = run("finetune", slides / "S0.h5ad", "--out", out, *options)
    assert again.exit_code == 2
    assert "exists" in again.output
