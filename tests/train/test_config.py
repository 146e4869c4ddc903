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
        (["data.shards=3"], "shards must be a string"),
        (['data.validation_patients="A"'], "must be a list of names"),
        (["run.device=2"], "Did you mean 'devices'"),
        (["run.devices=0"], "positive integer"),
        (['run.devices="some"'], "must be one of"),
        (['run.precision="16"'], "Did you mean|must be one of"),
        (['run.best="recall_at_5"'], "Did you mean 'recall_at_5_percent'"),
        (['run.final="worst"'], "must be one of"),
        (["run.accumulate=0"], "positive integer"),
        (["run.clip=-1"], "number >= 0"),
        (["run.resume=1"], "true or false"),
        (["run.timeout=0"], "positive number"),
        (["objective.spot=1"], "true or false"),
        (["objective.spot=false", "objective.niche=false", "objective.cross=false"], "nothing is left to train"),
        (["optimiser.slides_per_batch=100"], "less than two"),
        (['optimiser.lr_scaling="square"'], "must be one of"),
        (["network.weights.scgtp=x"], "Did you mean 'scgpt'"),
        (["network.weights.scgpt=1"], "must be a string"),
        (["prediction.n_genes=-1"], "integer >= 0"),
        (["augment.views=0"], "positive integer"),
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


def test_epochs_become_steps_and_the_rate_follows_the_batch(config_file):
    changes = ["optimiser.epochs=10", "optimiser.warmup_epochs=2", "optimiser.batch_size=64", "optimiser.lr=5e-4"]
    optimiser = read_config(config_file, [*changes, 'optimiser.lr_scaling="linear"']).optimiser
    alone = optimiser.resolved(6400)
    assert (alone.steps, alone.warmup, alone.lr) == (1000, 200, pytest.approx(5e-4 / 4))
    four = optimiser.resolved(6400, accumulate=4)
    assert (four.steps, four.warmup, four.lr) == (250, 50, pytest.approx(5e-4))
    assert four.resolved(6400, accumulate=4) == four


def test_steps_stay_without_epochs(config_file):
    optimiser = read_config(config_file, ["optimiser.steps=7", "optimiser.warmup=3"]).optimiser
    assert (optimiser.resolved(10**6).steps, optimiser.resolved(10**6).warmup) == (7, 3)


def test_shards_stand_for_patterns(config_file):
    config = read_config(config_file, ["data.train=[]", 'data.shards="cohort.shards"'])
    assert config.data.train == []


def test_the_recipe_leaves_out_where_and_on_what(config_file):
    places = ["out=other", "data.root=/x", "run.devices=4", "run.num_workers=3", "run.log_every=1"]
    assert read_config(config_file, places).recipe() == read_config(config_file).recipe()
    for change in ("optimiser.lr=1", "run.accumulate=2", "run.clip=0", "seed=1", "objective.niche=false"):
        assert read_config(config_file, [change]).recipe() != read_config(config_file).recipe()


def test_config_of_the_paper_has_its_numbers():
    path = Path(stalign.__file__).parent / "train" / "configs" / "stalign-paper.toml"
    config = read_config(path)
    optimiser = config.optimiser.resolved(1_300_000)
    assert optimiser.steps == round(100 * 1_300_000 / 64)
    assert optimiser.lr == pytest.approx(5e-4 * 64 / 256)
    assert (optimiser.lr_min, optimiser.weight_decay, optimiser.weight_decay_end) == (1e-6, 0.04, 0.4)
    objective = config.objective
    assert (objective.alpha, objective.beta, objective.negatives, objective.structure) == (0.3, 0.3, "paper", 0.0)
    assert (config.run.clip, config.augment.drop_modality, config.augment.gene_noise) == (0.0, 0.0, 0.0)
