from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import stalign as sta
from stalign.tl._annotate import MARKER_TEMPERATURE, REFERENCE_TEMPERATURE, _calibrated
from stalign.tl._calibration import best_temperature, reliability, shares


def annotated(scores: list[list[float]], truth: list[object]) -> AnnData:
    adata = AnnData(np.zeros((len(scores), 1), dtype=np.float32))
    adata.obsm["stalign_annotation_score"] = pd.DataFrame(scores, index=adata.obs_names, columns=["a", "b"])
    adata.obs["truth"] = pd.Categorical(truth)
    return adata


def test_error_of_a_table_made_by_hand():
    # Two bins: 4 spots at 0.95, of which 3 are right; 6 at 0.65, of which 3 are right.
    confidence = np.array([0.95] * 4 + [0.65] * 6)
    correct = np.array([1, 1, 1, 0, 1, 1, 1, 0, 0, 0], dtype=bool)
    found = reliability(confidence, correct)
    assert found.ece == pytest.approx(0.4 * 0.20 + 0.6 * 0.15)
    assert (found.n, found.accuracy, found.confidence) == (10, 0.6, pytest.approx(0.77))
    assert found.table["n"].tolist() == [0, 0, 0, 0, 0, 0, 6, 0, 0, 4]
    assert found.table.loc[6, "accuracy"] == pytest.approx(0.5)
    assert found.table.loc[9, "confidence"] == pytest.approx(0.95)
    assert np.isnan(found.table.loc[0, "accuracy"])


def test_borders_belong_to_the_bin_above_whatever_the_precision():
    for kind in (np.float32, np.float64):
        table = reliability(np.array([0.9, 1.0, 0.0], dtype=kind), np.ones(3, dtype=bool)).table
        assert table["n"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_columns_of_an_annotated_slide():
    adata = annotated([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [np.nan, np.nan], [0.7, 0.3]], ["a", "a", "?", "b", None])
    found = sta.tl.calibration(adata, "truth", ignore="?")
    assert (found.n, found.accuracy) == (2, 0.5)
    assert found.ece == pytest.approx((0.1 + 0.8) / 2)
    # A truth that is no label cannot be found.
    assert sta.tl.calibration(adata, "truth").n == 3
    assert sta.tl.calibration(adata, "truth").accuracy == pytest.approx(1 / 3)


def test_bad_calls():
    adata = annotated([[0.9, 0.1]], ["c"])
    with pytest.raises(ValueError, match="none of which is a label"):
        sta.tl.calibration(adata, "truth")
    with pytest.raises(KeyError, match="wrong"):
        sta.tl.calibration(adata, "wrong")
    with pytest.raises(KeyError, match="zero_shot_annotate"):
        sta.tl.calibration(adata, "truth", key_added="other")
    with pytest.raises(ValueError, match="No spot has both"):
        sta.tl.calibration(adata, "truth", ignore="c")
    with pytest.raises(ValueError, match="n_bins"):
        reliability(np.ones(2), np.ones(2, dtype=bool), n_bins=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        reliability(np.array([1.2]), np.ones(1, dtype=bool))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_temperature_is_found_again(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 4)) * 3
    truth = (shares(logits, temperature).cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1).clip(max=3)
    found = best_temperature(logits, truth)
    assert found == pytest.approx(temperature, rel=0.15)
    calibrated = shares(logits, found)
    assert reliability(calibrated.max(axis=1), logits.argmax(axis=1) == truth).ece < 0.03


def prototypes_and_noise(noise: float, *, n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    return np.eye(3)[labels] + noise * rng.normal(size=(n, 3)), labels


def test_reference_that_errs_gives_a_higher_temperature():
    codes = np.arange(400) % 4
    clear, _ = _calibrated(*prototypes_and_noise(0.1), 3, codes)
    vague, error = _calibrated(*prototypes_and_noise(2.5), 3, codes)
    assert clear == MARKER_TEMPERATURE
    assert vague > 1.5
    assert error is not None
    assert error < 0.1


def test_reference_of_one_slide_is_not_trusted_beyond_itself():
    values, labels = prototypes_and_noise(0.1)
    assert _calibrated(values, labels, 3, np.zeros(400, dtype=int))[0] == REFERENCE_TEMPERATURE


def test_too_little_to_learn_from():
    values, labels = prototypes_and_noise(0.1, n=12)
    assert _calibrated(values, labels, 3, np.arange(12) % 2) == (MARKER_TEMPERATURE, None)
    # A label that one library alone has: the others say nothing about it.
    codes = (prototypes_and_noise(0.1)[1] == 2).astype(int)
    assert _calibrated(*prototypes_and_noise(0.1), 3, codes) == (MARKER_TEMPERATURE, None)


def test_temperature_is_recorded_and_rows_sum_to_one(slide, tiny, markers):
    sta.tl.embed(slide, model=tiny)
    sta.tl.zero_shot_annotate(slide, markers, model=tiny)
    assert slide.uns["stalign"]["annotation"]["temperature"] == MARKER_TEMPERATURE
    np.testing.assert_allclose(slide.obsm["stalign_annotation_score"].sum(axis=1), 1, rtol=1e-5)
    sta.tl.zero_shot_annotate(slide, "truth", reference=slide.copy(), model=tiny)
    record = slide.uns["stalign"]["annotation"]
    assert record["temperature"] >= REFERENCE_TEMPERATURE
    np.testing.assert_allclose(slide.obsm["stalign_annotation_score"].sum(axis=1), 1, rtol=1e-5)
    found = sta.tl.calibration(slide, "truth")
    assert found.n == slide.n_obs
    assert found.confidence == pytest.approx(slide.obs["stalign_annotation_confidence"].mean(), rel=1e-5)
