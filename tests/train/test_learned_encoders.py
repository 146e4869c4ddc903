from __future__ import annotations

import numpy as np
import pytest
import torch

from stalign import models, train
from stalign.models import STAlign
from stalign.train._features import encode_section
from stalign.train._pretrain import learn_encoders

pytest.importorskip("lightning")

from .conftest import GENES, make_section, tiny

FILTERS = '{ encoder = "filter-bank", args = { n_filters = 8, kernel = 4 } }'
CHANGES = (f"network.changes.spot_image={FILTERS}", f"network.changes.niche_image={FILTERS}")


def make_model(**image) -> STAlign:
    changes = tiny("out").network.changes | dict.fromkeys(("spot_image", "niche_image"), image)
    return STAlign(models.config("mini").updated(changes), genes=GENES)


@pytest.fixture
def learned(sections) -> STAlign:
    model = make_model(encoder="filter-bank", args={"n_filters": 8, "kernel": 4})
    learn_encoders(model, sections, seed=0)
    return model


def test_filters_are_learned_from_sections_with_an_image(learned, sections):
    filters = learned.encoder("spot_image").filters
    assert filters.abs().sum(dim=(1, 2, 3)).min() > 0
    again = make_model(encoder="filter-bank", args={"n_filters": 8, "kernel": 4})
    learn_encoders(again, sections[:2], seed=0)  # the third has none
    torch.testing.assert_close(again.encoder("spot_image").filters, filters)


def test_a_large_section_counts_no_more_than_a_small_one(sections, monkeypatch):
    from stalign.train import _pretrain

    monkeypatch.setattr(_pretrain, "_LEARNED_PATCHES", 10)
    seen: list[list[int]] = []
    model = make_model(encoder="filter-bank", args={"n_filters": 2})
    for name in ("spot_image", "niche_image"):
        monkeypatch.setattr(model.encoder(name), "learn", lambda patches, seed: seen.append([len(p) for p in patches]))
        monkeypatch.setattr(type(model.encoder(name)), "learn", lambda self, patches, *, seed: None, raising=True)
    learn_encoders(model, [*sections, make_section("large", n_spots=200), make_section("few", n_spots=6)], seed=0)
    assert seen == [[10, 10, 10, 6]] * 2


def test_other_encoders_are_left_alone(sections):
    model = make_model(encoder="timm", args={"model": "resnet10t", "model_args": {"channels": [8, 8, 8, 8]}})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn_encoders(model, sections, seed=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_features_are_kept_since_nothing_in_the_encoder_trains(learned, sections):
    encoded = encode_section(learned, sections[0], n_clusters=2, seed=0, progress=False)
    assert np.asarray(encoded.spot_feature).shape == (48, 1, learned.encoder("spot_image").dim)


def test_a_run_saves_what_was_learned(tmp_path, sections):
    out = train.pretrain(tiny(str(tmp_path / "run"), *CHANGES), sections, genes=GENES)
    encoder = models.load(str(out)).encoder("niche_image")
    assert encoder.filters.abs().sum() > 0
    assert encoder.scale.ne(1).any()
    other = train.pretrain(tiny(str(tmp_path / "again"), *CHANGES), sections, genes=GENES)
    torch.testing.assert_close(models.load(str(other)).encoder("niche_image").filters, encoder.filters)
