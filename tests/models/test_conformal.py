from __future__ import annotations

import numpy as np
import pytest

from stalign.models._conformal import LEVELS, conformal_quantiles, half_width


def test_rank_of_the_finite_sample_quantile():
    # Of 19 residuals, the 90 % interval takes the 18th: ceil(20 × 0.9).
    residual = np.random.default_rng(0).permutation(np.arange(1.0, 20.0))[:, None]
    assert conformal_quantiles([residual], [0.9])[0, 0] == 18
    # 99 % cannot be had of so few: the largest stands in.
    assert conformal_quantiles([residual], [0.99])[0, 0] == 19


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_coverage_on_exchangeable_data_is_nominal(level):
    rng = np.random.default_rng(1)
    scale = np.array([0.1, 1.0, 5.0])
    calibration = np.abs(rng.standard_t(3, (4000, 3)) * scale)
    new = np.abs(rng.standard_t(3, (20000, 3)) * scale)
    half = conformal_quantiles([calibration], [level])[0]
    np.testing.assert_allclose((new <= half).mean(axis=0), level, atol=0.025)


def test_patients_count_alike_however_many_spots_they_have():
    large, small = np.full((900, 1), 1.0), np.full((100, 1), 3.0)
    assert conformal_quantiles([large, small], [0.8])[0, 0] == 1
    assert conformal_quantiles([large, small], [0.8], groups=["a", "b"])[0, 0] == 3
    halves = [large[:450], large[450:], small]
    assert conformal_quantiles(halves, [0.6], groups=["a", "a", "b"])[0, 0] == 3


def test_a_gene_takes_nothing_from_a_section_without_it():
    first, second = np.full((30, 2), 1.0), np.full((30, 2), 9.0)
    valid = [np.array([True, True]), np.array([True, False])]
    np.testing.assert_array_equal(conformal_quantiles([first, second], [0.9], valid=valid)[0], [9, 1])
    nowhere = [np.array([True, False])] * 2
    assert np.isnan(conformal_quantiles([first, second], [0.9], valid=nowhere)[0, 1])


def test_genes_do_not_touch_each_other_across_blocks():
    rng = np.random.default_rng(2)
    residual = np.abs(rng.normal(size=(50, 600)))
    whole = conformal_quantiles([residual], [0.8])
    np.testing.assert_array_equal(whole[:, 300:310], conformal_quantiles([residual[:, 300:310]], [0.8]))


def test_half_widths_between_levels():
    stored = np.array([[1.0], [2.0], [4.0]])
    levels = (0.5, 0.7, 0.9)
    np.testing.assert_allclose(
        [half_width(stored, levels, at)[0] for at in (0.5, 0.6, 0.7, 0.8, 0.9)], [1, 1.5, 2, 3, 4]
    )
    assert list(LEVELS) == sorted(LEVELS)
