"""Smoothing over the niche graph: weighted averages over walks of several lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

_TIE = 1e-4


def walks(graph: sparse.csr_matrix, values: np.ndarray, steps: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the values averaged over walks of each number of steps, in rising order.

    Parameters
    ----------
    graph
        (n, n) row-stochastic niche graph.
    values
        (n, r).
    steps
        Numbers of steps, rising; 0 is the values themselves.
    """
    done = 0
    for step in steps:
        for _ in range(step - done):
            values = graph @ values
        done = step
        yield values


def smooth(
    graph: sparse.csr_matrix, values: np.ndarray, steps: Sequence[int], weights: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Return the sum over ``steps`` of weight times the values averaged over walks of that many steps.

    Parameters
    ----------
    graph, values, steps
        As in :func:`walks`.
    weights
        One for each entry of ``steps``.

    Returns
    -------
    (n, r), in the dtype of ``values``.
    """
    total = np.zeros_like(values)
    used = np.flatnonzero(np.asarray(weights))
    if not len(used):
        return total
    last = int(used[-1]) + 1
    for weight, averaged in zip(weights[:last], walks(graph, values, steps[:last]), strict=True):
        if weight:
            total += values.dtype.type(weight) * averaged
    return total


def learn_weights(graph: sparse.csr_matrix, values: np.ndarray, target: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Return the non-negative weights, of sum one, with which smoothed values predict a target best.

    Non-negative least squares over all entries. With values and target from two independent halves of the counts,
    noise predicts nothing, so that no more is averaged than the tissue's own smoothness warrants.

    Parameters
    ----------
    graph, values, steps
        As in :func:`walks`.
    target
        (n, r).

    Returns
    -------
    (len(steps),) float64; all weight on the shortest step where nothing predicts the target.
    """
    from scipy.optimize import nnls

    averaged = [walk.ravel() for walk in walks(graph, values, steps)]
    gram = np.array([[np.dot(a, b) for b in averaged] for a in averaged], dtype=np.float64)
    inner = np.array([np.dot(a, target.ravel()) for a in averaged], dtype=np.float64)
    # Where longer walks predict no better, as in pieces of few spots, the shortest is taken, not the one that rounding
    # favours.
    inner -= _TIE * np.abs(inner) * np.arange(len(steps))
    # A square root of the normal equations has the same solution, and as many rows as there are steps.
    size, vectors = np.linalg.eigh(gram)
    kept = size > max(size.max(), 0) * 1e-10
    root = np.sqrt(size[kept])[:, None] * vectors[:, kept].T
    weights = np.zeros(len(steps))
    if kept.any():
        weights = nnls(root, (vectors[:, kept].T @ inner) / np.sqrt(size[kept]))[0]
    if weights.sum() <= 0:
        weights[0] = 1.0
    return weights / weights.sum()
