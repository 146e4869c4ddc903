"""The neighbours of every spot, for a million of them as for a thousand.

The graphs are those of ``squidpy.gr``: the spots within a radius, or the nearest, and the spot itself. Squidpy 1.8
builds the one of a million spots on a square grid in 13 s with 1.9 GB beside the data, which is more memory than a
slide with its counts may leave; it holds all pairs at once, with their distances. Here a grid with array positions is
looked up in a table of its places, and everything else is asked of a tree, block by block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree

from stalign.slide._grid import Grid, shell_radius

# Spots whose neighbours are looked for at once.
_BLOCK = 1 << 16
# A table of places is used as long as it has no more than this many for each spot.
_PLACES_PER_SPOT = 8
_HALF = {"hexagonal": np.array([0.5, np.sqrt(3) / 2]), "square": np.ones(2)}


def niche_neighbours(grid: Grid, n_neighbors: int) -> csr_matrix:
    """Return the niche graph of one library.

    Parameters
    ----------
    grid
        The spots' arrangement, from :func:`~stalign.slide._grid.find_grid`.
    n_neighbors
        On a grid: every spot within the smallest distance that holds this many on a full grid. Elsewhere: this many
        nearest spots.

    Returns
    -------
    (n, n) CSR float32 of ones, self included, indices sorted.

    Examples
    --------
    >>> strip = Grid("square", np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), 1.0, from_array=True)
    >>> niche_neighbours(strip, 4).toarray()
    array([[1., 1., 0.],
           [1., 1., 1.],
           [0., 1., 1.]], dtype=float32)
    """
    n = len(grid.positions)
    if grid.kind == "free":
        return _nearest(grid.positions, min(n_neighbors, n - 1))
    radius = shell_radius(grid.kind, n_neighbors)
    places = _places(grid)
    return _within(grid.positions, radius) if places is None else _on_array(places, _steps(grid.kind, radius))


def _places(grid: Grid) -> np.ndarray | None:
    """(n, 2) whole numbers, each place taken once and most of them taken; ``None`` where it is not like that."""
    if not grid.from_array:
        return None
    places = np.rint(grid.positions / _HALF[grid.kind]).astype(np.int64)
    places -= places.min(axis=0)
    width, height = places.max(axis=0) + 1
    if width * height > _PLACES_PER_SPOT * len(places) + 1024:
        return None
    taken = np.bincount(places[:, 1] * width + places[:, 0], minlength=width * height)
    return places if taken.max() == 1 else None


def _steps(kind: str, radius: float) -> np.ndarray:
    """(k, 2) steps in columns and rows to the places within a radius."""
    reach = int(np.ceil(2 * radius)) + 1
    column, row = (axis.ravel() for axis in np.meshgrid(*[np.arange(-reach, reach + 1)] * 2))
    steps = np.column_stack([column, row])
    if kind == "hexagonal":  # every other place of the array is empty
        steps = steps[steps.sum(axis=1) % 2 == 0]
    return steps[np.linalg.norm(steps * _HALF[kind], axis=1) <= radius]


def _on_array(places: np.ndarray, steps: np.ndarray) -> csr_matrix:
    """Look up the neighbours of spots with whole-numbered places in a table of all places."""
    n, margin = len(places), np.abs(steps).max(axis=0)
    width, height = places.max(axis=0) + 1 + 2 * margin
    table = np.full(int(width * height), n, dtype=np.int32)
    at = (places[:, 1] + margin[1]) * width + places[:, 0] + margin[0]
    table[at] = np.arange(n, dtype=np.int32)
    away = steps[:, 1] * width + steps[:, 0]
    return _collect(n, lambda spots: table[at[spots, None] + away])


def _within(positions: np.ndarray, radius: float) -> csr_matrix:
    """Neighbours within a radius, from a tree."""
    n = len(positions)
    tree = cKDTree(positions)

    def find(spots: slice) -> np.ndarray:
        # As many as a full grid holds, and more as long as there are more.
        k = min(n, int(np.ceil(1.2 * np.pi * radius**2)) + 4)
        while True:
            bound = np.nextafter(radius, np.inf)
            _, nearest = tree.query(positions[spots], k=np.arange(1, k + 1), distance_upper_bound=bound)
            found = np.asarray(nearest)
            if k == n or (found[:, -1] == n).all():
                return found
            k = min(n, 2 * k)

    return _collect(n, find)


def _nearest(positions: np.ndarray, n_neighbors: int) -> csr_matrix:
    """The nearest spots and the spot itself, from a tree."""
    n = len(positions)
    tree = cKDTree(positions)

    def find(spots: slice) -> np.ndarray:
        # One more than asked for is the spot itself, unless enough others lie on the very same point.
        found = np.asarray(tree.query(positions[spots], k=np.arange(1, n_neighbors + 2))[1])
        own = np.arange(n)[spots]
        lost = ~(found == own[:, None]).any(axis=1)
        found[lost, -1] = own[lost]
        return found

    return _collect(n, find)


def _collect(n: int, find: Callable[[slice], np.ndarray]) -> csr_matrix:
    """Join the neighbours of blocks of spots, (m, k) each, where n stands for none."""
    counts, indices = [np.zeros(1, dtype=np.int64)], []
    for start in range(0, n, _BLOCK):
        found = np.sort(find(slice(start, min(start + _BLOCK, n))).astype(np.int32, copy=False), axis=1)
        there = found < n
        counts.append(there.sum(axis=1))
        indices.append(found[there])
    indptr = np.cumsum(np.concatenate(counts))
    whole = np.concatenate(indices)
    # scipy wants both of one type.
    indptr = indptr.astype(np.int32 if len(whole) < 2**31 else np.int64)
    return csr_matrix((np.ones(len(whole), dtype=np.float32), whole, indptr), shape=(n, n))
