"""Nearest neighbours by cosine, without a matrix of all pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_QUERY_BLOCK = 1024
_KEY_BLOCK = 32_768


class Neighbours(NamedTuple):
    """(n, k) positions of the keys, the nearest first, and their cosines."""

    indices: np.ndarray
    scores: np.ndarray


def nearest(queries: np.ndarray, keys: np.ndarray, k: int) -> Neighbours:
    """Return the ``k`` keys of the highest dot product with each query.

    Parameters
    ----------
    queries, keys
        (n, d) and (m, d) float32 unit rows.
    k
        Neighbours, at most m.

    Returns
    -------
    :class:`Neighbours`: (n, k) int64 and float32. No more than a block of pairs is held at a time.
    """
    import torch

    query_rows, key_rows = torch.from_numpy(np.ascontiguousarray(queries)), torch.from_numpy(np.ascontiguousarray(keys))
    indices = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(queries), _QUERY_BLOCK):
            rows = slice(start, start + _QUERY_BLOCK)
            best, where = _nearest_block(query_rows[rows], key_rows, k)
            scores[rows], indices[rows] = best.numpy(), where.numpy()
    return Neighbours(indices, scores)


def _nearest_block(queries, keys, k):  # type: ignore[no-untyped-def]
    """Merge the best of every block of keys into the best of all."""
    import torch

    best = torch.empty((len(queries), 0))
    where = torch.empty((len(queries), 0), dtype=torch.int64)
    for start in range(0, len(keys), _KEY_BLOCK):
        similarity = queries @ keys[start : start + _KEY_BLOCK].T
        values, columns = similarity.topk(min(k, similarity.shape[1]), dim=1)
        values, columns = torch.cat([best, values], dim=1), torch.cat([where, columns + start], dim=1)
        best, chosen = values.topk(min(k, values.shape[1]), dim=1)
        where = columns.gather(1, chosen)
    return best, where
