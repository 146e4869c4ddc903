from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from stalign import models
from stalign.train import _alignment
from stalign.train._alignment import _choose_penalty, _fit, _Pair, fit_alignment
from stalign.train._config import AlignmentFitConfig, PretrainConfig
from stalign.train._evaluate import embed_section, inputs_of, recall_at
from stalign.train._features import encode_section

from .conftest import GENES, make_section, tiny


def planted(seed: int, *, noise: float = 0.1, weight: np.ndarray | None = None) -> _Pair:
    """A gene side of three dimensions that is linear in four features, beside an offset of the slide's own."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(80, 4))
    weight = np.array([[1.0, 0, 2], [0, -1, 0], [0.5, 0, 0], [0, 1, 0]]) if weight is None else weight
    return _Pair(features + seed, seed + features @ weight + noise * rng.normal(size=(80, 3)))


def test_planted_maps_are_found_whatever_the_offsets():
    (found,) = _fit([[planted(1)], [planted(2)]], 1e-6)
    np.testing.assert_allclose(found.weight, [[1.0, 0, 2], [0, -1, 0], [0.5, 0, 0], [0, 1, 0]], atol=0.05)
    np.testing.assert_allclose(found.centre, [1.5] * 4, atol=0.2)


def test_sections_count_alike_however_large():
    small, other = planted(1), planted(2, weight=np.zeros((4, 3)))
    large = _Pair(np.tile(small.features, (50, 1)), np.tile(small.target, (50, 1)))
    np.testing.assert_allclose(_fit([[large], [other]], 1.0)[0].weight, _fit([[small], [other]], 1.0)[0].weight)


def test_penalty_is_that_of_patients_left_out():
    # Each patient has a map of its own besides the common one: to follow it is to lose the next patient.
    rng = np.random.default_rng(0)
    common = np.array([[3.0, 0, 0], *np.zeros((19, 3))])
    own = {patient: np.vstack([np.zeros((1, 3)), 4 * rng.normal(size=(19, 3))]) for patient in "ABC"}

    def section(patient: str) -> list[_Pair]:
        features = rng.normal(size=(60, 20)) * np.array([3.0, *np.ones(19)])
        return [_Pair(features, features @ (common + own[patient]))]

    pairs = [section(patient) for patient in "AABBCC"]
    of_patients = _choose_penalty(pairs, list("AABBCC"), [1e-6, 30.0])
    of_sections = _choose_penalty(pairs[:2], list("AA"), [1e-6, 30.0])
    assert of_patients == 30.0
    assert of_sections == 1e-6


def test_a_single_section_takes_the_middle_penalty():
    assert _choose_penalty([[planted(1)]], ["A"], [0.1, 1.0, 10.0]) == 1.0


def untrained(**image) -> models.STAlign:
    """A model with linear heads and a bypass, as stalign-mini has them."""
    changes = {"n_tokens": 2, "width": 16, "spot_patch": {"pixels": 16}, "niche_patch": {"pixels": 16}}
    changes |= {"fusion": {"heads": 2, "head_dim": 8, "hidden": 8}, "heads": {"out": 16}}
    changes |= {name: {"args": {"dim": 16, "hidden": 16}} for name in ("spot_gene", "niche_gene")}
    changes |= {name: {"args": image} for name in ("spot_image", "niche_image")}
    torch.manual_seed(0)
    return models.STAlign(models.config("mini").updated(changes), genes=GENES)


@pytest.fixture
def linear():
    """Nine features of an image in two tokens of sixteen."""
    return untrained(n_filters=0)


def test_image_sides_meet_the_gene_sides_of_a_patient_left_out(linear):
    encoded = [encode_section(linear, make_section(name, seed=i), n_clusters=2, seed=0) for i, name in enumerate("abc")]
    before = embed_section(linear, encoded[2])
    linear = fit_alignment(linear, encoded[:2], AlignmentFitConfig(enabled=True))
    after = embed_section(linear, encoded[2])
    # Two kinds of tissue: which half a spot is in, its image says, and no more than that.
    half = np.arange(48) >= 24
    right = (after.image @ after.gene[half].mean(axis=0) > after.image @ after.gene[~half].mean(axis=0)) == half
    assert right.mean() > 0.95
    assert recall_at(after.image, after.gene, share=0.5) > recall_at(before.image, before.gene, share=0.5)


def test_penalty_is_on_the_features_whatever_the_tokens_make_of_them(linear):
    encoded = [encode_section(linear, make_section(name, seed=i), n_clusters=2, seed=0) for i, name in enumerate("abc")]
    other = copy.deepcopy(linear)
    with torch.no_grad():
        for scale in ("spot", "niche"):
            tokens = other.branch(f"{scale}_image").tokens.proj
            tokens.weight.mul_(torch.linspace(0.2, 5, tokens.in_features)).add_(0.3)
            tokens.bias.normal_()
    config = AlignmentFitConfig(enabled=True, penalties=[1.0])
    first, second = (embed_section(fit_alignment(model, encoded[:2], config), encoded[2]) for model in (linear, other))
    np.testing.assert_allclose(first.image, second.image, atol=1e-4)


@pytest.mark.parametrize("penalty", [1e-3, 1e4])
def test_image_sides_are_as_long_as_the_gene_sides_whatever_the_penalty(linear, penalty):
    encoded = [encode_section(linear, make_section(name, seed=i), n_clusters=2, seed=0) for i, name in enumerate("ab")]
    linear = fit_alignment(linear, encoded, AlignmentFitConfig(enabled=True, penalties=[penalty]))
    pairs = [_alignment._pair(linear, section, "spot", 100) for section in encoded]
    with torch.inference_mode():
        images = [linear(spot_image=inputs_of(linear, s, slice(None))["spot_image"]).spot_image for s in encoded]
    assert np.mean([float(x.std()) for x in images]) == pytest.approx(
        np.mean([(p.target - p.target.mean(axis=0)).std() for p in pairs]), rel=0.05
    )


def test_tokens_that_hide_features_are_fitted_themselves():
    model = untrained(n_filters=64)
    assert _alignment._linear_tokens(model, "spot") is None  # 137 features do not fit into two tokens of sixteen
    encoded = [encode_section(model, make_section(name, seed=i), n_clusters=2, seed=0) for i, name in enumerate("abc")]
    model = fit_alignment(model, encoded[:2], AlignmentFitConfig(enabled=True))
    after = embed_section(model, encoded[2])
    assert recall_at(after.image, after.gene, share=0.5) > 0.6


def test_gene_sides_are_the_profiles_again(linear):
    encoded = [encode_section(linear, make_section(name, seed=i), n_clusters=2, seed=0) for i, name in enumerate("ab")]
    with torch.no_grad():
        linear.heads["spot_gene"].mlp.weight.normal_()
    linear = fit_alignment(linear, encoded, AlignmentFitConfig(enabled=True))
    profile = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(spot_gene=profile).spot_gene, profile / 4)


def test_off_by_default_and_harmless_without_an_image(linear):
    state = {name: value.clone() for name, value in linear.state_dict().items()}
    section = make_section("c", image=False)
    encoded = [encode_section(linear, section, n_clusters=2, seed=0)]
    for config in (AlignmentFitConfig(), AlignmentFitConfig(enabled=True)):
        fit_alignment(linear, encoded, config)
        assert all(torch.equal(value, state[name]) for name, value in linear.state_dict().items())


def test_hidden_layers_are_refused_before_training(sections, tmp_path, monkeypatch):
    from stalign.train import _pretrain, pretrain

    monkeypatch.setattr(_pretrain, "_train", lambda *_: pytest.fail("trained"))
    config = tiny(str(tmp_path / "run"), "alignment.enabled=true")
    with pytest.raises(ValueError, match=r"spot_image has a hidden layer"):
        pretrain(config, sections, genes=GENES)


def test_more_spots_than_are_drawn(linear):
    encoded = [encode_section(linear, make_section(name, seed=i), n_clusters=2, seed=0) for i, name in enumerate("ab")]
    config = AlignmentFitConfig(enabled=True, max_spots=20, max_sections=1)
    weight = fit_alignment(linear, encoded, config).heads["spot_image"].mlp.weight
    assert torch.isfinite(weight).all()
    assert weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"enabled": 1}, "enabled"), ({"penalties": []}, "penalties"), ({"penalties": [-1.0]}, "penalties")],
)
def test_bad_config(change, message):
    data = {"out": "run", "data": {"root": ".", "train": ["*.h5ad"]}, "alignment": change}
    with pytest.raises((TypeError, ValueError), match=message):
        PretrainConfig.from_dict(data)
