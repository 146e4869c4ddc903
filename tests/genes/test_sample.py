from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from stalign.genes._sample import sample_patches


def square(side: int) -> sparse.csr_matrix:
    """A square lattice whose niches are a spot and its four neighbours."""
    line = sparse.eye(side) + sparse.eye(side, k=1) + sparse.eye(side, k=-1)
    return sparse.csr_matrix(sparse.kron(sparse.eye(side), line) + sparse.kron(line, sparse.eye(side)))


@pytest.mark.parametrize("limit", [1, 10, 100, 399])
def test_a_sample_stays_within_the_limit(limit):
    spots = sample_patches(square(20), np.arange(400), limit)
    assert limit / 2 <= len(spots) <= limit
    assert (np.diff(spots) > 0).all()


def test_a_small_slide_is_taken_whole():
    assert sample_patches(square(5), np.arange(25)[::-1], 25).tolist() == list(range(25))


def test_patches_are_compact():
    graph = square(100)
    spots = sample_patches(graph, np.arange(10_000), 3000)
    inside = np.isin(np.arange(10_000), spots)
    complete = [inside[graph[spot].indices].all() for spot in spots]
    assert np.mean(complete) > 0.8


def test_patches_are_spread_over_the_slide():
    spots = sample_patches(square(100), np.arange(10_000), 4000)
    rows = np.bincount(spots // 100 // 25, minlength=4)
    assert (rows > 500).all()


def test_the_choice_does_not_depend_on_the_order_of_rows():
    graph = square(20)
    moved = np.random.default_rng(0).permutation(400)
    position = np.argsort(moved)
    spots = sample_patches(graph, np.arange(400), 120)
    again = sample_patches(graph[moved][:, moved], position, 120)
    assert sorted(moved[again]) == spots.tolist()


def test_pieces_without_links_are_sampled_too():
    graph = sparse.block_diag([square(2)] * 100).tocsr()
    spots = sample_patches(graph, np.arange(400), 200)
    assert 100 <= len(spots) <= 200
