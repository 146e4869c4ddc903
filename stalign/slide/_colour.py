"""The colours of a slide's tissue, to compare stainings."""

from __future__ import annotations

import numpy as np

# A slide's colours are known well from this many patches.
MAX_PATCHES = 1024
# On a slide of very many spots the patches are taken in groups, so that the look ahead does not read the whole file.
_MANY_SPOTS = 16 * MAX_PATCHES
_GROUP = 8
_SQUARES = 512


def colour_statistics(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each colour.

    Parameters
    ----------
    patches
        (n, height, width, 3) uint8.

    Returns
    -------
    (3,) mean and (3,) standard deviation, float32, of values scaled to [0, 1]. A standard deviation below 0.02, as of a
    blank slide, is raised to 0.02.

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.slide import colour_statistics
    >>> mean, sd = colour_statistics(np.full((2, 4, 4, 3), 255, dtype=np.uint8))
    >>> mean.tolist()
    [1.0, 1.0, 1.0]
    """
    # Sums of whole numbers do not depend on the order of the patches, nor on how many are added at once.
    values = patches.reshape(-1, 3)
    total = values.sum(axis=0, dtype=np.int64)
    squares = np.array([np.einsum("i,i->", v, v, dtype=np.int64) for v in values.T], dtype=np.float64)
    mean = total / (len(values) * 255)
    variance = squares / (len(values) * 255**2) - mean**2
    return mean.astype(np.float32), np.sqrt(np.maximum(variance, 0.02**2)).astype(np.float32)


def spread_over_slide(coordinates: np.ndarray, limit: int = MAX_PATCHES) -> np.ndarray:
    """Choose at most ``limit`` spots spread over the slide, whatever their order.

    Among very many spots (more than 16,384) these are groups of eight neighbours.

    Parameters
    ----------
    coordinates
        (n, 2) positions.
    limit
        How many at most.

    Returns
    -------
    (k,) positions, sorted along x, then y.
    """
    order = np.lexsort((coordinates[:, 1], coordinates[:, 0]))
    if len(order) <= limit:
        return order
    if len(order) <= _MANY_SPOTS:
        return order[np.linspace(0, len(order) - 1, limit).round().astype(np.intp)]
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    square = np.floor((coordinates - low) / np.maximum(high - low, 1e-9) * _SQUARES)
    near = np.lexsort((coordinates[:, 1], coordinates[:, 0], square[:, 1], square[:, 0]))
    n_groups = max(1, limit // _GROUP)
    starts = np.linspace(0, len(order) - _GROUP, n_groups).round().astype(np.intp)
    chosen = near[np.unique((starts[:, None] + np.arange(_GROUP)).ravel())]
    return chosen[np.lexsort((coordinates[chosen, 1], coordinates[chosen, 0]))]
