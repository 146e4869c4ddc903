from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from stalign.genes._sample import sample_niches


def square(side: int, reach: int = 1) -> sparse.csr_matrix:
    """Niches of (2 · reach + 1)² spots on a square grid."""
    row, column = np.divmod(np.arange(side**2), side)
    near = (np.abs(np.subtract.outer(row, row)) <= reach) & (np.abs(np.subtract.outer(column, column)) <= reach)
    return sparse.csr_matrix(near.astype(np.float32))


@pytest.mark.parametrize("limit", [1, 9, 30, 100, 399])
def test_niches_are_whole_and_spots_bounded(limit):
    graph = square(20)
    niches, spots = sample_niches(graph, np.arange(400), limit)
    assert np.isin(graph[niches].indices, spots).all()
    assert (np.diff(spots) > 0).all()
    assert (np.diff(niches) > 0).all()
    assert len(spots) <= max(limit, 9)  # one niche is the least


def test_a_small_slide_is_taken_whole():
    niches, spots = sample_niches(square(5), np.arange(25)[::-1], 25)
    assert niches.tolist() == spots.tolist() == list(range(25))


def test_niches_lie_apart_and_cover_the_slide():
    graph = square(60)
    # Along rows: neighbours in this order are neighbours on the slide.
    niches, spots = sample_niches(graph, np.arange(3600), 900)
    assert len(spots) > 0.8 * 900
    assert len(spots) > 7 * len(niches)  # nine each, where none overlap
    for half in (np.arange(1800), np.arange(1800, 3600)):
        assert 0.4 < np.isin(niches, half).mean() < 0.6


def test_order_of_rows_is_irrelevant():
    graph = square(20)
    moved = np.random.default_rng(0).permutation(400)
    niches, spots = sample_niches(graph, np.arange(400), 120)
    position = np.argsort(moved)  # where each spot is now
    again, spots_again = sample_niches(graph[moved][:, moved], position, 120)
    assert sorted(moved[again]) == sorted(niches)
    assert sorted(moved[spots_again]) == sorted(spots)
