from __future__ import annotations

import numpy as np
import pytest

from stalign.train import _prediction
from stalign.train._prediction import _choose, _Fitted, _moments, _ridge


def planted(seed: int, *, measured=(True, True, True), noise: float = 0.1) -> _Fitted:
    """Three genes that are linear in four features, with a slide-wide offset."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(80, 4))
    weight = np.array([[1.0, 0, 2], [0, -1, 0], [0.5, 0, 0], [0, 0, 0]])
    expression = 10 * seed + features @ weight + noise * rng.normal(size=(80, 3))
    return _Fitted(features, features, expression * np.array(measured), np.array(measured))


def test_ridge_recovers_planted_weights_whatever_the_offsets():
    weight = _ridge([_moments(planted(1)), _moments(planted(2))], penalty=1e-3)
    np.testing.assert_allclose(weight[:, 0], [1, 0, 0.5, 0], atol=0.05)
    np.testing.assert_allclose(weight[:, 2], [2, 0, 0, 0], atol=0.05)


def test_a_gene_takes_nothing_from_a_section_that_did_not_measure_it():
    both = [_moments(planted(1)), _moments(planted(2, measured=(False, True, True)))]
    alone = _ridge(both[:1], penalty=1.0)
    np.testing.assert_allclose(_ridge(both, penalty=1.0)[:, 0], alone[:, 0])


@pytest.mark.parametrize("patients", ["ABC", "AAA"])
def test_penalty_and_spread_come_from_left_out_patients_or_sections(patients):
    choice = _choose([planted(1), planted(2), planted(3)], list(patients), [1e-3, 1e5])
    assert choice.penalty == 1e-3
    np.testing.assert_allclose(choice.spread, 0.1, rtol=0.3)


def test_what_tells_two_patients_apart_is_not_learned_from_near_replicates():
    # The second gene follows the third feature in all sections of patient A, and in nobody else's.
    fitted = [planted(seed) for seed in range(1, 7)]
    rng = np.random.default_rng(0)
    for section in fitted[:4]:
        section.expression[:, 1] = 20 * section.features[:, 2]
    for section in fitted[4:]:
        section.expression[:, 1] = 20 * rng.normal(size=80)
    of_patients = _choose(fitted, list("AAAABC"), [1e-3, 1e2])
    of_sections = _choose(fitted, list("ABCDEF"), [1e-3, 1e2])
    assert of_patients.penalty > of_sections.penalty


def test_noise_of_single_spots_is_averaged_over_niches():
    rng = np.random.default_rng(0)
    place = np.linspace(0, 6, 300)
    niche = np.exp(-((np.subtract.outer(place, place) / 0.2) ** 2))
    niche /= niche.sum(axis=1, keepdims=True)
    fitted = []
    for _ in range(3):
        smooth = np.sin(place + rng.uniform(0, 6))[:, None]
        features = smooth + rng.normal(size=(300, 1))
        fitted.append(_Fitted(features, niche @ features, smooth @ [[1.0, 2.0]], np.ones(2, dtype=bool)))
    assert _choose(fitted, list("ABC"), [1e-3]).niche_share == 1.0
    rough = [f._replace(expression=f.features @ [[1.0, 2.0]]) for f in fitted]
    assert _choose(rough, list("ABC"), [1e-3]).niche_share == 0.0


def test_genes_are_chosen_by_variance_among_the_well_detected(sections):
    from stalign.train._data import EncodedSection

    encoded = [EncodedSection(s, None, None, None) for s in sections[:2]]
    chosen = _prediction.choose_genes(encoded, 7)
    assert len(chosen) == 7
    assert (np.diff(chosen) > 0).all()


def test_empty_penalties_are_refused():
    with pytest.raises(ValueError, match="penalties"):
        _choose([planted(1)], ["A"], [])


def test_of_a_single_section_quarters_are_left_out():
    # Without anything left out, the smallest penalty would always win; here there is nothing but noise to fit.
    rng = np.random.default_rng(0)
    features = rng.normal(size=(24, 20))
    noise = _Fitted(features, features, rng.normal(size=(24, 3)), np.ones(3, dtype=bool))
    choice = _choose([noise], ["A"], [1e-6, 1e6])
    assert choice.penalty == 1e6
    assert (choice.spread > 0.5).all()
