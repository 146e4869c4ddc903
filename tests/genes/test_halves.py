from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from stalign.genes._halves import _ones, split_counts


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    rng = np.random.default_rng(0)
    return sparse.csr_matrix(rng.poisson(rng.gamma(1, 5, 300)[None], (400, 300)).astype(np.float32))


def test_halves_add_up_to_the_counts(counts):
    first, second = split_counts(counts)
    assert abs(first + second - counts).sum() == 0
    assert first.data.min() >= 0
    assert second.data.min() >= 0
    assert first.dtype == counts.dtype
    np.testing.assert_array_equal(first.data, np.round(first.data))


def test_halves_are_binomial(counts):
    first, _ = split_counts(counts)
    z = (first.data - counts.data / 2) / np.sqrt(counts.data / 4)
    assert abs(z.mean()) < 0.02
    assert z.std() == pytest.approx(1, abs=0.02)


def test_halves_of_poisson_counts_are_independent(counts):
    first, second = (half.toarray().astype(float) for half in split_counts(counts))
    a, b = first - first.mean(axis=0), second - second.mean(axis=0)
    covariance = (a * b).mean(axis=0) / np.maximum(first.mean(axis=0), 1e-9)
    assert abs(covariance.mean()) < 0.02


def test_order_of_spots_and_batches_are_irrelevant(counts):
    order = np.random.default_rng(1).permutation(400)
    whole = split_counts(counts)[0].toarray()
    np.testing.assert_array_equal(split_counts(counts[order])[0].toarray(), whole[order])
    np.testing.assert_array_equal(split_counts(counts[:7])[0].toarray(), whole[:7])


def test_large_counts_take_several_words():
    counts = sparse.csr_matrix(np.full((50, 40), 1000.0))
    counts = counts + sparse.csr_matrix((np.arange(50.0), (np.arange(50), np.zeros(50, int))), shape=(50, 40))
    first = split_counts(sparse.csr_matrix(counts))[0]
    assert first.data.mean() == pytest.approx(500, abs=2)
    assert first.data.std() == pytest.approx(np.sqrt(250), rel=0.1)


def test_empty_and_zero_counts():
    empty = sparse.csr_matrix((3, 5), dtype=np.float32)
    assert split_counts(empty)[0].nnz == 0
    stored = sparse.csr_matrix((np.zeros(2, np.float32), ([0, 1], [1, 2])), shape=(2, 3))
    assert not split_counts(stored)[0].data.any()


def test_bits_are_counted():
    values = np.array([0, 1, 3, 2**63, 2**64 - 1], dtype=np.uint64)
    assert _ones(values).tolist() == [0, 1, 2, 1, 64]
