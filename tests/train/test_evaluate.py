from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stalign import models
from stalign.models import STAlign
from stalign.train import _evaluate
from stalign.train._evaluate import (
    adjusted_rand_index,
    alignment,
    domain_ari,
    embed_section,
    measure,
    recall_at,
    uniformity,
)
from stalign.train._features import encode_section

from .conftest import GENES, make_section, tiny


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_recall_counts_ranks():
    key = np.eye(4)
    assert recall_at(key, key, share=0.25) == 1.0
    assert recall_at(key[[1, 0, 2, 3]], key, share=0.25) == 0.5


def test_recall_in_blocks_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    query, key = unit(rng.normal(size=(100, 6))), unit(rng.normal(size=(100, 6)))
    whole = recall_at(query, key, share=0.2)
    monkeypatch.setattr(_evaluate, "_ROWS", 7)
    assert recall_at(query, key, share=0.2) == whole
    assert 0 < whole < 1


def test_alignment_of_equal_and_opposite_vectors():
    x = unit(np.random.default_rng(0).normal(size=(9, 4)))
    assert alignment(x, x) == 0.0
    assert alignment(x, -x) == pytest.approx(4.0)


def test_uniformity_of_known_configurations():
    assert uniformity(np.tile([[1.0, 0.0]], (5, 1))) == pytest.approx(0.0)
    assert uniformity(np.array([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8.0)
    # Three orthogonal vectors: all squared distances are 2.
    assert uniformity(np.eye(3)) == pytest.approx(-4.0)


def test_uniformity_of_a_large_section_is_that_of_a_sample(monkeypatch):
    x = unit(np.random.default_rng(0).normal(size=(600, 8)))
    whole = uniformity(x)
    monkeypatch.setattr(_evaluate, "_SAMPLE", 300)
    assert uniformity(x) == pytest.approx(whole, abs=0.02)


def test_adjusted_rand_index_known_values():
    a = np.array(["x", "x", "y", "y"])
    assert adjusted_rand_index(a, np.array([7, 7, 3, 3])) == 1.0
    assert adjusted_rand_index(a, np.array([0, 1, 0, 1])) == pytest.approx(-0.5)
    assert adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])) == pytest.approx(4 / 7)
    assert adjusted_rand_index(np.zeros(4), np.zeros(4)) == 1.0


def test_adjusted_rand_index_of_chance_is_near_zero():
    rng = np.random.default_rng(0)
    values = [adjusted_rand_index(rng.integers(4, size=300), rng.integers(3, size=300)) for _ in range(20)]
    assert abs(np.mean(values)) < 0.01


def test_domains_find_labels_and_leave_out_what_has_none():
    rng = np.random.default_rng(0)
    fused = np.repeat([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]], 20, axis=0) + rng.normal(0, 0.1, (60, 2))
    labels = np.repeat(["a", "b", "c"], 20).astype(object)
    assert domain_ari(fused, labels) == 1.0
    labels[:20] = ""
    assert domain_ari(fused, labels) == 1.0
    assert domain_ari(fused, np.full(60, "a")) is None


class TestSection:
    @pytest.fixture
    def model(self) -> STAlign:
        torch.manual_seed(0)
        return STAlign(models.config("mini").updated(tiny("x").network.changes), genes=GENES)

    def test_measures_of_a_section(self, model):
        section = make_section("a", seed=1)
        section.labels = np.where(np.arange(48) < 24, "left", "right")
        found = measure(model, encode_section(model, section, n_clusters=2, seed=0))
        names = {"recall_at_1_percent", "recall_at_5_percent", "recall_at_10_percent"}
        assert set(found) == names | {"alignment", "uniformity", "domain_ari"}
        assert all(math.isfinite(value) for value in found.values())
        # The two halves are told apart by their profile alone, which an untrained network of this kind passes on.
        assert found["domain_ari"] > 0.9

    def test_what_cannot_be_measured_is_left_out(self, model):
        assert measure(model, encode_section(model, make_section("c", image=False), n_clusters=2, seed=0)) == {}

    def test_batches_and_mode_change_nothing(self, model):
        encoded = encode_section(model, make_section("a", seed=1), n_clusters=2, seed=0)
        model.train()
        whole = embed_section(model, encoded)
        parts = embed_section(model, encoded, batch_size=7)
        assert model.training
        for one, other in zip(whole, parts, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(whole.image, axis=1), 1, atol=1e-5)

    def test_cached_features_stand_for_pixels(self, model):
        section = make_section("a", seed=1)
        pixels = embed_section(model, encode_section(model, section, n_clusters=2, seed=0))
        for name in ("spot_image", "niche_image"):
            model.branch(name).frozen = True
            model.encoder(name).requires_grad_(False)
        encoded = encode_section(model, section, n_clusters=2, seed=0)
        assert encoded.spot_feature is not None
        np.testing.assert_allclose(embed_section(model, encoded).image, pixels.image, atol=2e-3)
