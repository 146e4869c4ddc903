"""Split counts into two independent halves, the same ones every time."""

from __future__ import annotations

import numpy as np
from scipy import sparse

# Constants of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), a mixing function of 64 bits.
_GAMMA, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_WORD = 64


def split_counts(counts: sparse.csr_matrix) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split every count x into a draw from Binomial(x, 1/2) and the rest.

    Where counts are Poisson, the halves are independent given the rates (count splitting; Neufeld et al.,
    Biostatistics 25:270, 2024). The draws depend on the gene and the spot's own counts alone, so that neither the
    order of the spots nor how many are split at a time changes them.

    Parameters
    ----------
    counts
        (n, g) whole numbers, at least 0.

    Returns
    -------
    Two (n, g) matrices of the same sparsity structure (zeros are stored), in the dtype of the counts, which add up to
    them.

    Examples
    --------
    >>> counts = sparse.csr_matrix(np.array([[4.0, 0.0, 100.0]]))
    >>> first, second = split_counts(counts)
    >>> (first + second).toarray().tolist()
    [[4.0, 0.0, 100.0]]
    """
    left = counts.data.astype(np.int64)
    word = np.repeat(_row_keys(counts), np.diff(counts.indptr)) ^ _mixed(_gene_keys(counts))
    drawn = np.zeros(len(left), dtype=counts.dtype)
    todo = np.flatnonzero(left > 0)
    left, word = left[todo], word[todo]
    while len(todo):
        word = _mixed(word + _GAMMA)
        drawn[todo] += _ones(word >> (_WORD - np.minimum(left, _WORD)).astype(np.uint64))
        more = left > _WORD
        todo, left, word = todo[more], left[more] - _WORD, word[more]
    return tuple(  # type: ignore[return-value]
        sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)
        for values in (drawn, counts.data - drawn)
    )


def _gene_keys(counts: sparse.csr_matrix) -> np.ndarray:
    return (counts.indices.astype(np.uint64) + np.uint64(1)) * _GAMMA


def _row_keys(counts: sparse.csr_matrix) -> np.ndarray:
    """Return a number for each row that depends on its entries, not on their order."""
    value = _mixed(_gene_keys(counts)) * counts.data.astype(np.uint64)
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(value, dtype=np.uint64)])
    return _mixed(total[counts.indptr[1:]] - total[counts.indptr[:-1]])


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def _ones(x: np.ndarray) -> np.ndarray:
    """Count the bits that are set, in parallel within each word."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
