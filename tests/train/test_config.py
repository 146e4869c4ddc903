from __future__ import annotations

from pathlib import Path

import pytest

import stalign
from stalign.train import PretrainConfig, read_config

MINIMAL = 'out = "run"\n[data]\nroot = "."\ntrain = ["*.h5ad"]\n'


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_the_papers(config_file):
    objective = read_config(config_file).objective
    assert (objective.alpha, objective.beta, objective.temperature, objective.n_clusters) == (0.3, 0.3, 0.1, 6)


def test_changes_are_applied_with_their_type(config_file):
    config = read_config(config_file, ["optimiser.steps=7", "optimiser.lr=0.5", "data.root=/some/where", "seed=4"])
    assert (config.optimiser.steps, config.optimiser.lr, config.data.root, config.seed) == (7, 0.5, "/some/where", 4)


def test_round_trip(config_file):
    config = read_config(config_file)
    assert PretrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optimiser.step=3"], "Did you mean 'steps'"),
        (["optimizer.steps=3"], "Did you mean 'optimiser'"),
        (["optimiser.steps"], "key=value"),
        (["optimiser.steps=0"], "positive integer"),
        (["optimiser.lr=-1"], "positive number"),
        (["objective.alpha=0.9"], "at most 1"),
        (['objective.negatives="all"'], "must be one of"),
        (["objective.n_clusters=1"], "at least 2"),
        (["augment.drop_modality=0.8"], "at most 0.5"),
        (["data.train=[]"], "train is empty"),
        (["seed=-1"], "seed must be"),
        (["out.x=1"], "is a value"),
    ],
)
def test_bad_values_are_named(config_file, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        read_config(config_file, changes)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config"):
        read_config(tmp_path / "absent.toml")


def test_broken_toml(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("out = [")
    with pytest.raises(ValueError, match="no valid TOML"):
        read_config(path)


def test_pattern_without_a_file(config_file, tmp_path):
    config = read_config(config_file, [f"data.root={tmp_path}"])
    with pytest.raises(FileNotFoundError, match=r"data\.root"):
        config.data.files("train")


def test_files_are_sorted_and_each_once(config_file, tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.h5ad").touch()
    config = read_config(config_file, [f"data.root={tmp_path}", 'data.train=["*.h5ad", "a.h5ad"]'])
    assert [path.stem for path in config.data.files("train")] == ["a", "b"]


def test_config_of_the_bundled_model_is_valid():
    path = Path(stalign.__file__).parent / "train" / "configs" / "stalign-mini.toml"
    assert read_config(path).network.name == "stalign-mini"
