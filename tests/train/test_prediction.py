from __future__ import annotations

import numpy as np
import pytest

from stalign.train import _prediction
from stalign.train._prediction import _choose_penalty, _Fitted, _ridge


def planted(seed: int, *, measured=(True, True, True), noise: float = 0.1) -> _Fitted:
    """Three genes that are linear in four features, with a slide-wide offset."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(80, 4))
    weight = np.array([[1.0, 0, 2], [0, -1, 0], [0.5, 0, 0], [0, 0, 0]])
    expression = 10 * seed + features @ weight + noise * rng.normal(size=(80, 3))
    return _Fitted(features, expression * np.array(measured), np.array(measured))


def test_ridge_recovers_planted_weights_whatever_the_offsets():
    weight = _ridge([planted(1), planted(2)], penalty=1e-3)
    np.testing.assert_allclose(weight[:, 0], [1, 0, 0.5, 0], atol=0.05)
    np.testing.assert_allclose(weight[:, 2], [2, 0, 0, 0], atol=0.05)


def test_a_gene_takes_nothing_from_a_section_that_did_not_measure_it():
    both = [planted(1), planted(2, measured=(False, True, True))]
    alone = _ridge([planted(1)], penalty=1.0)
    np.testing.assert_allclose(_ridge(both, penalty=1.0)[:, 0], alone[:, 0])


def test_penalty_and_spread_come_from_left_out_sections():
    penalty, spread = _choose_penalty([planted(1), planted(2), planted(3)], [1e-3, 1e5])
    assert penalty == 1e-3
    np.testing.assert_allclose(spread, 0.1, rtol=0.3)


def test_genes_are_chosen_by_variance_among_the_well_detected(sections):
    from stalign.train._data import EncodedSection

    encoded = [EncodedSection(s, None, None, None) for s in sections[:2]]
    chosen = _prediction.choose_genes(encoded, 7)
    assert len(chosen) == 7
    assert (np.diff(chosen) > 0).all()


def test_empty_penalties_are_refused():
    with pytest.raises(ValueError, match="penalties"):
        _choose_penalty([planted(1)], [])


def test_of_a_single_section_quarters_are_left_out():
    # Without anything left out, the smallest penalty would always win; here there is nothing but noise to fit.
    rng = np.random.default_rng(0)
    noise = _Fitted(rng.normal(size=(24, 20)), rng.normal(size=(24, 3)), np.ones(3, dtype=bool))
    penalty, spread = _choose_penalty([noise], [1e-6, 1e6])
    assert penalty == 1e6
    assert (spread > 0.5).all()
