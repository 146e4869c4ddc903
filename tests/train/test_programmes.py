from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from stalign.train import _programmes
from stalign.train._programmes import coexpression, find_programmes


def slide(activities: np.ndarray, loadings: np.ndarray, *, noise: float = 0.0, seed: int = 0) -> sp.csr_matrix:
    """(n, programmes) activities and (programmes, genes) loadings, far from zero."""
    values = 5 + activities @ loadings
    return sp.csr_matrix(values + noise * np.random.default_rng(seed).normal(size=values.shape))


def ring(n: int) -> sp.csr_matrix:
    """Niches of three spots in a row."""
    return sp.csr_matrix(sum(np.roll(np.eye(n), step, axis=1) for step in (-1, 0, 1)) / 3)


@pytest.fixture
def waves() -> np.ndarray:
    place = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    return np.column_stack([np.sin(place), np.cos(2 * place)])


LOADINGS = np.array([[1.0, 2, 3, 0, 0, 0], [0, 0, 0, 1.0, -1, 2]])


def test_programmes_are_those_planted_in_units_of_spread(waves):
    found = find_programmes([coexpression(slide(waves * [2, 1], LOADINGS), ring(90))], ["A"], 2)
    np.testing.assert_allclose(found.spread, np.abs(LOADINGS).sum(axis=0) * [2, 2, 2, 1, 1, 1] / np.sqrt(2), rtol=1e-6)
    # All genes of a programme follow it alike once they are scaled.
    expected = np.sign(LOADINGS) / np.sqrt(3)
    np.testing.assert_allclose(np.abs(found.loadings.T @ expected.T), np.eye(2), atol=1e-6)


def test_confined_weights_keep_what_lies_in_the_programmes_and_nothing_else(waves):
    programmes = find_programmes([coexpression(slide(waves, LOADINGS), ring(90))], ["A"], 2)
    np.testing.assert_allclose(programmes.confine(LOADINGS, 2), LOADINGS, atol=1e-9)
    outside = np.array([[1.0, -2, 0, 0, 0, 0]])  # in units of spread, 1, -1: no programme
    np.testing.assert_allclose(programmes.confine(outside, 2), 0, atol=1e-9)
    assert np.linalg.matrix_rank(programmes.confine(np.random.default_rng(0).normal(size=(6, 6)), 1)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_niche_means_show_what_single_spots_hide(waves, seed):
    # What every gene of a spot shares, from one spot to the next: no pattern over tissue.
    rng = np.random.default_rng(seed)
    expression = slide(np.column_stack([waves, 2 * rng.normal(size=90)]), np.vstack([LOADINGS, np.ones(6)]))
    expected = np.sign(LOADINGS[:1]) / np.sqrt(3)

    def found(graph: sp.csr_matrix) -> float:
        programmes = find_programmes([coexpression(expression, graph)], ["A"], 1)
        return abs(float((expected @ programmes.loadings)[0, 0]))

    assert found(ring(90) ** 6) > found(sp.identity(90, format="csr")) + 0.05


def test_near_replicates_count_as_one_patient(waves):
    first = coexpression(slide(waves[:, :1], LOADINGS[:1]), ring(90))
    second = coexpression(slide(waves[:, 1:], np.array([[0.0, 1, 1, 1, 0, 1]])), ring(90))
    weight = np.eye(6)
    alike = find_programmes([first, second], ["A", "B"], 1).confine(weight, 1)
    replicated = find_programmes([first, first, first, second], ["A", "A", "A", "B"], 1).confine(weight, 1)
    np.testing.assert_allclose(alike, replicated, atol=1e-9)
    others = find_programmes([first, first, first, second], ["A", "B", "C", "D"], 1).confine(weight, 1)
    assert np.abs(others - alike).max() > 0.1


def test_a_gene_that_was_not_measured_takes_nothing_from_that_section(waves):
    expression = slide(waves[:, :1], np.array([[1.0, 2, 3, 1, -1, 2]]))
    whole = coexpression(expression, ring(90))
    part = coexpression(expression.multiply([1, 1, 0, 0, 0, 0]).tocsr(), ring(90))
    alone, found = find_programmes([whole], ["A"], 1), find_programmes([whole, part], ["A", "B"], 1)
    np.testing.assert_allclose(found.spread, alone.spread)
    np.testing.assert_allclose(np.abs(found.loadings), np.abs(alone.loadings), rtol=1e-6)


def test_order_of_sections_and_spots_does_not_matter(waves):
    made = [slide(waves, LOADINGS, noise=0.3, seed=seed) for seed in (0, 1)]
    order = np.random.default_rng(0).permutation(90)
    plain = find_programmes([coexpression(x, ring(90)) for x in made], ["A", "B"], 2)
    shuffled = find_programmes([coexpression(x[order], ring(90)[order][:, order]) for x in made[::-1]], ["B", "A"], 2)
    weight = np.random.default_rng(0).normal(size=(4, 6))
    np.testing.assert_allclose(plain.confine(weight, 2), shuffled.confine(weight, 2), atol=1e-9)


def test_a_few_leading_components_stand_for_a_large_section(monkeypatch):
    rng = np.random.default_rng(0)
    counts = slide(rng.normal(size=(400, 6)) * [9, 8, 7, 6, 5, 4], rng.normal(size=(6, 500)), noise=0.1)
    graph = sp.identity(400, format="csr")
    short = coexpression(counts, graph)
    assert len(short.components) == _programmes._KEPT
    monkeypatch.setattr(_programmes, "_KEPT", 400)
    whole = find_programmes([coexpression(counts, graph)], ["A"], 5)
    np.testing.assert_allclose(
        np.linalg.svd(find_programmes([short], ["A"], 5).loadings.T @ whole.loadings)[1], 1, atol=1e-6
    )


def test_more_programmes_than_there_are_change_nothing(waves):
    programmes = find_programmes([coexpression(slide(waves, LOADINGS), ring(90))], ["A"], 50)
    np.testing.assert_allclose(programmes.confine(LOADINGS, 50), LOADINGS, atol=1e-9)


def test_without_sections_or_variation_there_are_none():
    assert find_programmes([], [], 3) is None
    flat = coexpression(sp.csr_matrix(np.ones((9, 4))), ring(9))
    assert find_programmes([flat], ["A"], 3) is None
