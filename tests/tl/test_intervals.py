from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import stalign as sta
from stalign.models._heads import GenePrediction
from stalign.tl import _predict

LEVELS = (0.5, 0.9, 0.99)


@pytest.fixture
def with_levels(make_tiny):
    """The tiny model, its head with half-widths 1, 3 and 6 for every gene."""
    model = make_tiny()
    config = dataclasses.replace(model.config.prediction, levels=LEVELS)
    head = GenePrediction(model.config.heads.out, config)
    head.load_state_dict(
        {**model.prediction.state_dict(), "half_widths": torch.tensor([[1.0], [3.0], [6.0]]).expand(3, 30).clone()}
    )
    model.prediction, model.config = head.eval(), dataclasses.replace(model.config, prediction=config)
    return model


def ends(adata) -> tuple[np.ndarray, np.ndarray]:
    return tuple(adata.obsm[f"stalign_predicted_{end}"].to_numpy() for end in ("lower", "upper"))


def predicted(adata) -> np.ndarray:
    genes = adata.obsm["stalign_predicted_lower"].columns
    return adata.layers["stalign_predicted"][:, adata.var_names.get_indexer(genes)]


@pytest.mark.parametrize(("interval", "half"), [(0.5, 1), (0.7, 2), (0.9, 3), (0.99, 6)])
def test_head_has_the_stored_half_widths(slide, with_levels, interval, half):
    sta.tl.embed(slide, model=with_levels)
    sta.tl.predict_expression(slide, model=with_levels, interval=interval)
    lower, upper = ends(slide)
    mean = predicted(slide)
    np.testing.assert_allclose(upper, np.maximum(mean + half, 0), rtol=1e-5)
    np.testing.assert_allclose(lower, np.maximum(mean - half, 0), rtol=1e-5)
    assert lower.dtype == np.float32
    assert slide.obsm["stalign_predicted_lower"].columns.tolist() == slide.obsm["stalign_predicted_sd"].columns.tolist()


def test_coverage_is_the_share_inside(slide, with_levels):
    sta.tl.embed(slide, model=with_levels)
    sta.tl.predict_expression(slide, model=with_levels, interval=0.9)
    record = slide.uns["stalign"]["prediction"]
    lower, upper = ends(slide)
    counts = slide.X.toarray()
    measured = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    measured = measured[:, slide.var_names.get_indexer(slide.obsm["stalign_predicted_lower"].columns)]
    inside = (measured >= lower) & (measured <= upper)
    assert record["interval"] == 0.9
    assert record["coverage"] == pytest.approx(inside.mean(), abs=2e-3)
    np.testing.assert_allclose(
        record["coverage_quartiles"], np.quantile(inside.mean(axis=0), [0.25, 0.5, 0.75]), atol=0.01
    )


def test_without_interval_nothing_is_left_of_an_earlier_call(slide, with_levels):
    sta.tl.embed(slide, model=with_levels)
    sta.tl.predict_expression(slide, model=with_levels, interval=0.9)
    sta.tl.predict_expression(slide, model=with_levels)
    assert "stalign_predicted_lower" not in slide.obsm
    assert "interval" not in slide.uns["stalign"]["prediction"]


@pytest.mark.parametrize("method", ["retrieval", "ridge"])
@pytest.mark.parametrize("n_references", [1, 2])
def test_reference_residuals_cover_another_slide_of_the_kind(make_planted, tiny, method, n_references):
    query = make_planted("Q", seed=9)
    references = [make_planted(name, seed=number) for number, name in enumerate("AB"[:n_references])]
    for adata in (query, *references):
        sta.tl.embed(adata, model=tiny)
    sta.tl.predict_expression(query, reference=references, method=method, k=20, interval=0.9, model=tiny)
    record = query.uns["stalign"]["prediction"]
    # Slides are drawn anew, mean expression included: coverage is near the nominal one, not equal to it.
    assert 0.5 < record["coverage"] < 1
    lower, upper = ends(query)
    assert (upper >= lower).all()
    assert (lower >= 0).all()
    wider = query.copy()
    sta.tl.predict_expression(wider, reference=references, method=method, k=20, interval=0.99, model=tiny)
    assert (ends(wider)[1] >= upper - 1e-5).all()
    assert wider.uns["stalign"]["prediction"]["coverage"] >= record["coverage"]


@pytest.mark.parametrize("method", ["retrieval", "ridge"])
def test_halves_of_one_slide_are_exchangeable(make_planted, tiny, method):
    whole = make_planted("A", seed=3, n_rows=20, n_cols=24)
    sta.tl.embed(whole, model=tiny)
    order = np.random.default_rng(0).permutation(whole.n_obs)
    reference, query = whole[np.sort(order[:320])].copy(), whole[np.sort(order[320:])].copy()
    # Quarters by the order of the spots: here at random.
    shuffled = reference[np.random.default_rng(1).permutation(reference.n_obs)].copy()
    sta.tl.predict_expression(query, reference=shuffled, method=method, k=20, interval=0.9, model=tiny)
    assert query.uns["stalign"]["prediction"]["coverage"] == pytest.approx(0.9, abs=0.03)


def test_patients_are_left_out_together(make_planted):
    slide = make_planted("A")
    slide.obs["patient"] = ["p"] * 60 + ["q"] * 59 + [None]
    groups = _predict._patients(slide, np.zeros(120, dtype=int), 0)
    assert set(groups[:60]) == {"p"}
    assert groups[-1] == "reference 0, library 0"


@pytest.mark.parametrize(
    ("interval", "error"), [(0.3, ValueError), (1.0, ValueError), ("0.9", TypeError), (True, TypeError)]
)
def test_bad_intervals(slide, with_levels, snapshot, interval, error):
    sta.tl.embed(slide, model=with_levels)
    before = snapshot(slide)
    with pytest.raises(error, match="interval"):
        sta.tl.predict_expression(slide, model=with_levels, interval=interval)
    assert snapshot(slide) == before


def test_head_without_residuals(slide, tiny, snapshot):
    sta.tl.embed(slide, model=tiny)
    before = snapshot(slide)
    with pytest.raises(ValueError, match="saved without the residuals"):
        sta.tl.predict_expression(slide, model=tiny, interval=0.9)
    assert snapshot(slide) == before


def test_checkpoint_keeps_half_widths(with_levels, tmp_path):
    again = sta.models.load(with_levels.save(tmp_path / "m"))
    assert again.prediction.levels == LEVELS
    torch.testing.assert_close(again.prediction.half_widths, with_levels.prediction.half_widths)
