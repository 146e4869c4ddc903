from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from stalign.train import _prediction
from stalign.train._config import PredictionFitConfig
from stalign.train._prediction import _Choice, _choose, _Coexpressed, _Fitted, _folds, _moments, _ridge, _spread
from stalign.train._programmes import Coexpression, coexpression


def planted(seed: int, *, measured=(True, True, True), noise: float = 0.1) -> _Fitted:
    """Three genes that are linear in four features, with a slide-wide offset."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(80, 4))
    weight = np.array([[1.0, 0, 2], [0, -1, 0], [0.5, 0, 0], [0, 0, 0]])
    expression = 10 * seed + features @ weight + noise * rng.normal(size=(80, 3))
    return _Fitted(features, features, expression * np.array(measured), np.array(measured))


def choose(fitted: list[_Fitted], patients: str, penalties: list[float]) -> tuple[_Choice, np.ndarray]:
    """What is chosen where nothing is known of programmes, and the spread that is left."""
    folds = _folds(fitted, list(patients), _Coexpressed([], []), 20)
    choice = _choose(folds, PredictionFitConfig(penalties=penalties))
    return choice, _spread(folds, choice)


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
    choice, spread = choose([planted(1), planted(2), planted(3)], patients, [1e-3, 1e5])
    assert choice.penalty == 1e-3
    np.testing.assert_allclose(spread, 0.1, rtol=0.3)


def test_what_tells_two_patients_apart_is_not_learned_from_near_replicates():
    # The second gene follows the third feature in all sections of patient A, and in nobody else's.
    fitted = [planted(seed) for seed in range(1, 7)]
    rng = np.random.default_rng(0)
    for section in fitted[:4]:
        section.expression[:, 1] = 20 * section.features[:, 2]
    for section in fitted[4:]:
        section.expression[:, 1] = 20 * rng.normal(size=80)
    of_patients, _ = choose(fitted, "AAAABC", [1e-3, 1e2])
    of_sections, _ = choose(fitted, "ABCDEF", [1e-3, 1e2])
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
    assert choose(fitted, "ABC", [1e-3])[0].niche_share == 1.0
    rough = [f._replace(expression=f.features @ [[1.0, 2.0]]) for f in fitted]
    assert choose(rough, "ABC", [1e-3])[0].niche_share == 0.0


def test_genes_are_chosen_by_variance_among_the_well_detected(sections):
    from stalign.train._data import EncodedSection

    encoded = [EncodedSection(s, None, None, None) for s in sections[:2]]
    chosen = _prediction.choose_genes(encoded, 7)
    assert len(chosen) == 7
    assert (np.diff(chosen) > 0).all()


def test_of_a_single_section_quarters_are_left_out():
    # Without anything left out, the smallest penalty would always win; here there is nothing but noise to fit.
    rng = np.random.default_rng(0)
    features = rng.normal(size=(24, 20))
    noise = _Fitted(features, features, rng.normal(size=(24, 3)), np.ones(3, dtype=bool))
    choice, spread = choose([noise], "A", [1e-6, 1e6])
    assert choice.penalty == 1e6
    assert (spread > 0.5).all()


def test_near_replicates_count_as_one_patient():
    # Four sections of one patient say that the gene rises with the feature, two other patients that it falls.
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(500, 1)) for _ in range(6)]
    signs, patients = [1, 1, 1, 1, -1, -1], list("AAAABC")
    parts = [
        _Fitted(x, x, sign * x, np.array([True]), 1 / patients.count(patient))
        for x, sign, patient in zip(features, signs, patients, strict=True)
    ]
    assert _ridge([_moments(part) for part in parts], 1e-6)[0, 0] == pytest.approx(-1 / 3, abs=0.05)
    _, spread = choose(parts, "AAAABC", [1e6])
    assert spread == pytest.approx(1.0, abs=0.1)


def test_squared_error_from_moments_is_that_of_the_residuals():
    section = planted(3)
    niche = planted(4).features
    section = section._replace(niche_features=niche)
    weight = np.random.default_rng(1).normal(size=(4, 3))
    predicted = 0.7 * section.features + 0.3 * niche - section.features.mean(axis=0)
    residual = section.expression - section.expression.mean(axis=0) - predicted @ weight
    error = _prediction._squared_error(_moments(section, 0.3), weight)
    np.testing.assert_allclose(error, (residual**2).mean(axis=0), rtol=1e-9)


class TestProgrammes:
    """Forty genes of one programme; the image tells of it, and by chance of one gene more."""

    def sections(self, seed: int, n: int = 60) -> tuple[_Fitted, Coexpression]:
        rng = np.random.default_rng(seed)
        activity = np.sin(np.linspace(0, 9, n) + rng.uniform(0, 6))
        loadings = np.linspace(0.5, 1.5, 40)
        expression = 2 + np.outer(activity, loadings) + 0.5 * rng.normal(size=(n, 40))
        features = np.column_stack([activity + 0.3 * rng.normal(size=n), *rng.normal(size=(11, n))])
        fitted = _Fitted(features, features, expression, np.ones(40, dtype=bool))
        return fitted, coexpression(sp.csr_matrix(expression), sp.identity(n, format="csr"))

    def folds(self, patients: str, extra: str = "") -> list[_prediction._Fold]:
        made = [self.sections(seed) for seed in range(len(patients) + len(extra))]
        coexpressed = _Coexpressed([counts for _, counts in made], [*patients, *extra])
        return _folds([fitted for fitted, _ in made[: len(patients)]], list(patients), coexpressed, 5)

    def test_confined_predictions_err_less(self):
        folds = self.folds("ABC")
        confined = _choose(folds, PredictionFitConfig(penalties=[0.1], programmes=[0, 1, 5]))
        free = _choose(folds, PredictionFitConfig(penalties=[0.1], programmes=[0]))
        assert confined.n_programmes == 1
        assert (_spread(folds, confined) ** 2).mean() < (_spread(folds, free) ** 2).mean()

    def test_the_number_is_not_confined_where_there_is_no_programme(self):
        rng = np.random.default_rng(0)
        parts, counts = [], []
        for _ in range(3):
            features = rng.normal(size=(200, 12))
            expression = features @ np.eye(12)
            parts.append(_Fitted(features, features, expression, np.ones(12, dtype=bool)))
            counts.append(coexpression(sp.csr_matrix(expression), sp.identity(200, format="csr")))
        folds = _folds(parts, list("ABC"), _Coexpressed(counts, list("ABC")), 5)
        assert _choose(folds, PredictionFitConfig(penalties=[0.1], programmes=[0, 1, 5])).n_programmes == 0

    def test_a_single_patient_is_no_test_of_its_own_programmes(self):
        config = PredictionFitConfig(penalties=[0.1], programmes=[0, 1])
        assert _choose(self.folds("AA"), config).n_programmes == 0
        # A number that was asked for is taken.
        asked = PredictionFitConfig(penalties=[0.1], programmes=[1])
        assert _choose(self.folds("AA"), asked).n_programmes == 1
        # Counts of another patient, without an image, are.
        assert _choose(self.folds("AA", extra="B"), config).n_programmes == 1

    def test_intervals_are_those_of_confined_predictions(self):
        folds = self.folds("ABC")
        half = [
            _prediction._half_widths(folds, _Choice(0.01, 0.0, number), np.full(40, 0.5)).mean() for number in (0, 1)
        ]
        assert half[1] < half[0]


@pytest.mark.parametrize("patients", [["a", "b", "b"], ["a", "a", "a"]])
def test_head_of_few_programmes(sections, patients):
    from dataclasses import replace

    from stalign import models
    from stalign.train._features import encode_sections

    from .conftest import GENES

    model = models.STAlign(models.config("mini"), genes=GENES)
    renamed = [replace(s, patient=patient) for s, patient in zip(sections, patients, strict=True)]
    encoded = encode_sections(model, renamed, n_clusters=2, seed=0)
    config = PredictionFitConfig(n_genes=20, programmes=[2])
    head = _prediction.fit_prediction(model, encoded, config).prediction
    weight = (head.net.weight.detach().double() * head.scale[:, None]).numpy()
    assert np.linalg.matrix_rank(weight, tol=1e-5 * np.linalg.norm(weight)) == 2
    with pytest.raises(ValueError, match="programmes is empty"):
        PredictionFitConfig(programmes=[])
    with pytest.raises(ValueError, match="programmes must be an integer >= 0, got -1"):
        PredictionFitConfig(programmes=[0, -1])


def test_what_is_chosen_suits_the_genes_that_vary(monkeypatch):
    # Two hundred genes of noise, and one that follows the first feature: alone it says that the penalty is small.
    monkeypatch.setattr(_prediction, "_CHOICE_GENES", 1)
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(3):
        features = rng.normal(size=(60, 8))
        expression = np.column_stack([rng.normal(size=(60, 200)), 3 * features[:, 0]])
        parts.append(_Fitted(features, features, expression, np.ones(201, dtype=bool)))
    assert choose(parts, "ABC", [1e-3, 1e3])[0].penalty == 1e-3
    monkeypatch.setattr(_prediction, "_CHOICE_GENES", 201)
    noise = [part.of_genes(np.arange(200)) for part in parts]
    assert choose(noise, "ABC", [1e-3, 1e3])[0].penalty == 1e3
