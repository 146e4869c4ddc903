"""A bounded sample of a slide's spots that stands for the slide."""

from __future__ import annotations

import numpy as np
from scipy import sparse

# Patches of a thousand spots, of fewer where that would be less than twenty patches, but of no less than fifty.
_LARGE, _MANY, _SMALL = 1000, 20, 50


def sample_patches(connectivities: sparse.csr_matrix, order: np.ndarray, limit: int) -> np.ndarray:
    """Choose spots of one slide, at most ``limit``, in compact patches spread evenly over it.

    Patches keep what is smooth over the tissue: most spots of a patch of a thousand have the neighbours that they have
    on the slide, several steps deep.

    Parameters
    ----------
    connectivities
        (n, n) niche graph of the slide, self included.
    order
        (n,) permutation of the spots along which the patches' centres are spread evenly, such as along the slide; that
        the choice does not depend on the order of the rows is up to it.
    limit
        Spots, at most.

    Returns
    -------
    Positions of the spots, sorted; all of them where the slide has no more than that.

    Examples
    --------
    >>> line = sparse.eye(100) + sparse.eye(100, k=1) + sparse.eye(100, k=-1)
    >>> spots = sample_patches(line.tocsr(), np.arange(100), 60)
    >>> int(spots.min()), int(spots.max()), len(spots)
    (21, 79, 59)
    """
    n = len(order)
    if n <= limit:
        return np.arange(n)
    n_patches = max(1, min(limit // _SMALL, max(_MANY, limit // _LARGE)))
    while True:
        spots = _grown(connectivities, order[_evenly(n, n_patches)], limit)
        # Patches stop growing early where the graph falls apart into small pieces: then more of them are taken.
        if len(spots) >= limit / 2 or n_patches == limit:
            return spots
        n_patches = min(2 * n_patches, limit)


def _grown(connectivities: sparse.csr_matrix, centres: np.ndarray, limit: int) -> np.ndarray:
    """Grow patches around their centres, ring by ring, as long as they hold no more than ``limit`` spots."""
    inside = np.zeros(connectivities.shape[0], dtype=np.float32)
    inside[centres] = 1
    while True:
        grown = ((connectivities.T @ inside) + inside > 0).astype(np.float32)
        if grown.sum() > limit or grown.sum() == inside.sum():
            return np.flatnonzero(inside)
        inside = grown


def _evenly(n: int, k: int) -> np.ndarray:
    """Return k positions spread over n, away from the ends."""
    return ((np.arange(k) + 0.5) * n / k).astype(np.intp)
