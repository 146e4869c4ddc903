from __future__ import annotations

import json
import subprocess
import sys

import pytest

from stalign import models
from stalign.models import BranchConfig, Geometry, ModelConfig, PatchConfig, TokenConfig


def test_round_trip_through_json(tiny_config):
    text = json.dumps(tiny_config.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == tiny_config


def test_paper_numbers():
    config = models.config("paper")
    assert (config.width, config.n_tokens) == (512, 8)
    assert (config.fusion.heads, config.fusion.head_dim, config.fusion.hidden) == (8, 64, 64)
    assert config.fusion.residual is False
    assert (config.heads.hidden, config.heads.out, config.heads.niche) == (2048, 1024, False)
    assert (config.niche_gene.args["n_pathways"], config.niche_gene.args["n_genes"]) == (8, 548)
    assert config.niche_image.args["front"] == "imagenet"
    assert config.niche_image.frozen
    published = models.config("published")
    assert published.niche_image.args["front"] == "published"
    assert not published.niche_image.frozen


def test_unknown_key_names_the_nearest(tiny_config):
    data = tiny_config.to_dict()
    data["fusion"]["head"] = data["fusion"].pop("heads")
    with pytest.raises(ValueError, match=r"config\.fusion has an unknown key 'head'.*Did you mean 'heads'"):
        ModelConfig.from_dict(data)


def test_missing_key(tiny_config):
    data = tiny_config.to_dict()
    del data["niche_image"]
    with pytest.raises(ValueError, match="lacks \\['niche_image'\\]"):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 15}, "width must be even"),
        ({"n_tokens": 0}, "n_tokens must be a positive integer"),
        ({"missing": "tokenz"}, "Did you mean 'tokens'"),
        ({"fusion": {"dropout": 1.0}}, r"config\.fusion: dropout must be a number in \[0, 1\)"),
        ({"fusion": {"residual": 1}}, "residual must be True or False"),
        ({"spot_image": {"tokens": {"kind": "convv"}}}, r"config\.spot_image\.tokens: kind must be one of"),
        ({"spot_patch": {"um": -1}}, r"config\.spot_patch: um must be a positive number"),
        ({"heads": {"niche": False}}, r"prediction\.inputs names \['niche_image'\]"),
        ({"fusion": None}, "fusion"),
    ],
)
def test_values_out_of_range(tiny_config, changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_config.updated(changes)


def test_args_are_a_private_copy():
    args = {"dim": 8}
    branch = BranchConfig("mlp", args)
    args["dim"] = 9
    assert branch.args == {"dim": 8}


def test_updated_merges_deeply(tiny_config):
    changed = tiny_config.updated({"spot_gene": {"args": {"dim": 4}}}, name="other")
    assert changed.spot_gene.args == {"hidden": [12], "dim": 4}
    assert changed.name == "other"
    # another encoder starts with no arguments
    assert tiny_config.updated({"spot_gene": {"encoder": "scgpt"}}).spot_gene.args == {}
    assert tiny_config.spot_gene.args["dim"] == 8


def test_geometry(tiny_config):
    assert tiny_config.geometry == Geometry(6, 100.0, 300.0, 32, 32)
    assert models.geometry("paper") == models.config("paper").geometry


def test_not_a_dict():
    with pytest.raises(TypeError, match="spot_patch must be a dict"):
        ModelConfig.from_dict(
            {
                **models.config("paper").to_dict(),
                "spot_patch": 3,
            }
        )
    assert PatchConfig(um=1, pixels=2).um == 1
    assert TokenConfig().kind == "linear"


def test_unknown_model_names():
    with pytest.raises(ValueError, match="Did you mean 'paper'"):
        models.config("papr")
    with pytest.raises(ValueError, match="a config without weights"):
        models.load("paper")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        models.load("./does-not-exist")


def test_geometry_imports_no_torch():
    code = "import sys, stalign.models as m; m.geometry('paper'); m.available(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603 - our own interpreter
