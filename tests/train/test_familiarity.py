from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stalign import models, train
from stalign.train import pretrain, save_sections
from stalign.train._config import FamiliarityFitConfig
from stalign.train._familiarity import sample_section
from stalign.train._prediction import _Choice, _Coexpressed, _Fitted, _folds, _half_widths
from stalign.train._pretrain import build_model

from .conftest import GENES, make_section, tiny


@pytest.fixture
def model(tiny_config) -> models.STAlign:
    return build_model(tiny_config, GENES).eval()


def test_a_run_leaves_what_it_saw_in_the_checkpoint(tiny_config, sections):
    pytest.importorskip("lightning")
    model = models.load(pretrain(tiny_config, sections, genes=GENES))
    assert model.config.familiarity.n_genes == len(GENES)
    assert model.familiarity.knows_images
    assert model.prediction.levels[0] == 0.5
    widths = model.prediction.half_widths.numpy()
    assert (np.diff(widths, axis=0) >= -1e-3).all()
    assert (widths > 0).all()


def test_it_can_be_left_out(tmp_path, sections):
    pytest.importorskip("lightning")
    config = tiny(str(tmp_path / "run"), "familiarity.enabled=false", "optimiser.steps=2")
    model = models.load(pretrain(config, sections, genes=GENES))
    assert model.familiarity is None
    assert model.config.familiarity is None


def test_added_to_a_model_that_was_saved_without(model, sections, tmp_path):
    folder = model.save(tmp_path / "m")
    before = {name: value.clone() for name, value in models.load(folder).state_dict().items()}
    added = train.add_familiarity(folder, sections, folder, overwrite=True)
    assert added.provenance.folder == str(folder)
    after = models.load(folder).state_dict()
    assert all((after[name] == value).all() for name, value in before.items())
    assert sorted(set(after) - set(before))[0].startswith("familiarity.")


def test_shards_and_memory_give_the_same(model, sections, tmp_path):
    in_memory = train.add_familiarity(model, sections).familiarity.state_dict()
    folder = save_sections(tmp_path / "shards", sections, genes=GENES, geometry=model.geometry)
    from_shards = train.add_familiarity(model, folder).familiarity.state_dict()
    for name, value in in_memory.items():
        np.testing.assert_allclose(from_shards[name], value, rtol=1e-5, atol=1e-5)


def test_bad_sections(model, sections, tmp_path):
    with pytest.raises(ValueError, match="sections is empty"):
        train.add_familiarity(model, [])
    other = make_section("x")
    other = dataclasses.replace(other, counts=other.counts[:, :50])
    with pytest.raises(ValueError, match="counts of 50 genes, the model a vocabulary of 60"):
        train.add_familiarity(model, [other])
    few = dataclasses.replace(make_section("x", image=False), counts=make_section("x").counts.multiply(0).tocsr())
    train.add_familiarity(model, sections)
    known = model.familiarity
    with pytest.raises(ValueError, match="neither enough genes nor an image"):
        train.add_familiarity(model, [few])
    assert model.familiarity is known
    with pytest.raises(ValueError, match="max_spots"):
        FamiliarityFitConfig(max_spots=0)
    with pytest.raises(TypeError, match="enabled"):
        FamiliarityFitConfig(enabled="no")


def test_sample_is_bounded_and_sums_niches():
    section = make_section("a")
    sample = sample_section(section, 10)
    assert sample.spot.shape == sample.niche.shape == (10, 60)
    assert sample.patches.shape[0] == 10
    np.testing.assert_allclose(sample.niche[0].toarray(), section.counts[:3].sum(axis=0))


def _slide(seed: int, offset: float, n: int = 400) -> _Fitted:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 3))
    expression = offset + features @ np.array([[1.0], [0.5], [0.0]]) + rng.normal(0, 0.3, (n, 1))
    return _Fitted(features, features, expression, np.array([True]))


def _widths(fitted: list[_Fitted], patients: str, spread: float) -> np.ndarray:
    """Half-widths of the one gene, by level."""
    folds = _folds(fitted, list(patients), _Coexpressed([], []), 0)
    return _half_widths(folds, _Choice(1e-3, 0.0, 0), np.array([spread]))[:, 0]


def test_half_widths_cover_a_slide_of_the_kind_that_was_left_out():
    fitted = [_slide(seed, 0.0) for seed in range(4)]
    half = _widths(fitted, "abcd", 0.3)
    # Normal residuals of 0.3: 90 % lie within 1.645 of them.
    assert half[5] == pytest.approx(1.645 * 0.3, rel=0.08)


def test_half_widths_know_how_patients_differ():
    alike = _widths([_slide(s, 0.0) for s in range(4)], "abcd", 0.3)
    apart = _widths([_slide(s, float(s)) for s in range(4)], "abcd", 0.3)
    assert (apart > 2 * alike).all()
    # Sections of one patient are left out together.
    together = _widths([_slide(s, float(s // 2)) for s in range(4)], "aabb", 0.3)
    assert (together > alike).all()


def test_a_gene_of_one_patient_has_normal_half_widths():
    fitted = [_slide(0, 0.0), _slide(1, 0.0)._replace(measured=np.array([False]))]
    half = _widths(fitted, "ab", 0.2)
    assert half[5] == pytest.approx(1.645 * 0.2, rel=1e-3)
