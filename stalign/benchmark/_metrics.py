"""Measures, and intervals from drawing blocks of tissue or genes again.

Measures of labels are functions of a contingency table, so that a bootstrap over blocks adds the blocks' tables up
instead of going through the spots again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from scipy import sparse

from stalign.benchmark._rows import percentile_interval

N_BOOTSTRAP: Final = 500
N_BLOCKS: Final = 25
_SEED: Final = 0
_ROUNDING: Final = 1e-7
_RING: Final = 16


# --- spatial blocks ----------------------------------------------------------------------------------------------


def spatial_blocks(coordinates: np.ndarray, n_blocks: int = N_BLOCKS) -> np.ndarray:
    """Cut a section into squares.

    Parameters
    ----------
    coordinates
        (n, 2) positions.
    n_blocks
        About how many squares cover the box around the spots; squares without spots do not count.

    Returns
    -------
    (n,) number of each spot's block, from 0.

    Examples
    --------
    >>> spatial_blocks(np.array([[0.0, 0.0], [9.0, 9.0], [0.1, 0.0]]), 4).tolist()
    [0, 1, 0]
    """
    low, extent = coordinates.min(axis=0), np.ptp(coordinates, axis=0)
    side = float(np.sqrt(max(extent[0], 1e-9) * max(extent[1], 1e-9) / n_blocks))
    side = max(side, float(extent.max()) / n_blocks, 1e-9)
    cell = np.floor((coordinates - low) / side).astype(np.int64)
    return np.unique(cell, axis=0, return_inverse=True)[1].ravel()


def _draws(n: int) -> np.ndarray:
    """(N_BOOTSTRAP, n) how often each of ``n`` things is drawn."""
    return np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP)


def block_interval(measure: Callable[[np.ndarray], np.ndarray], tables: np.ndarray) -> tuple[float, float]:
    """95 % interval of a measure from drawing blocks with replacement.

    Parameters
    ----------
    measure
        From tables (..., rows, columns) to values (...).
    tables
        (blocks, rows, columns), to be added up.
    """
    return percentile_interval(measure(np.tensordot(_draws(len(tables)), tables, axes=1)))


def mean_block_interval(values: np.ndarray, blocks: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean over spots from drawing blocks with replacement; NaN are left out."""
    there = np.isfinite(values)
    sums = np.bincount(blocks, weights=np.where(there, values, 0.0))
    counts = np.bincount(blocks, weights=there.astype(float))
    drawn = _draws(len(sums))
    with np.errstate(invalid="ignore", divide="ignore"):
        return percentile_interval((drawn @ sums) / (drawn @ counts))


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean from drawing the values (of genes) with replacement."""
    return percentile_interval(_draws(len(values)) @ values / len(values))


# --- labels ------------------------------------------------------------------------------------------------------


def contingency(first: np.ndarray, second: np.ndarray, blocks: np.ndarray | None = None) -> np.ndarray:
    """Count the spots of each pair of labels, block by block.

    Parameters
    ----------
    first, second
        (n,) numbers of labels from 0.
    blocks
        (n,) number of each spot's block; ``None`` is one block.

    Returns
    -------
    (blocks, labels of the first, labels of the second) float64.
    """
    block = np.zeros(len(first), dtype=np.int64) if blocks is None else blocks
    shape = (int(block.max()) + 1, int(first.max()) + 1, int(second.max()) + 1)
    flat = np.ravel_multi_index((block, first, second), shape)
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape).astype(np.float64)


def adjusted_rand(table: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of tables (..., classes, clusters) (Hubert and Arabie, J Classif 2:193, 1985)."""

    def pairs(counts: np.ndarray) -> np.ndarray:
        return counts * (counts - 1) / 2

    together = pairs(table).sum(axis=(-2, -1))
    rows, columns = pairs(table.sum(axis=-1)).sum(axis=-1), pairs(table.sum(axis=-2)).sum(axis=-1)
    whole = pairs(table.sum(axis=(-2, -1)))
    expected = np.divide(rows * columns, whole, out=np.zeros_like(rows), where=whole > 0)
    largest = (rows + columns) / 2
    # Both are one block, or all blocks are single spots: the same division.
    same = np.isclose(largest, expected)
    return np.where(same, 1.0, (together - expected) / np.where(same, 1.0, largest - expected))


def _entropy(counts: np.ndarray) -> np.ndarray:
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-300)
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)


def _information(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entropy of the classes, of the clusters, and their mutual information."""
    classes, clusters = _entropy(table.sum(axis=-1)), _entropy(table.sum(axis=-2))
    both = _entropy(table.reshape(*table.shape[:-2], -1))
    return classes, clusters, np.maximum(classes + clusters - both, 0.0)


def normalised_mutual_information(table: np.ndarray) -> np.ndarray:
    """Mutual information over the mean of both entropies (Strehl and Ghosh, JMLR 3:583, 2002; arithmetic mean)."""
    classes, clusters, shared = _information(table)
    mean = (classes + clusters) / 2
    return np.where(mean > 1e-12, shared / np.maximum(mean, 1e-12), 1.0)


def homogeneity(table: np.ndarray) -> np.ndarray:
    """1 if every cluster holds spots of one class only (Rosenberg and Hirschberg, EMNLP-CoNLL 2007)."""
    classes, _, shared = _information(table)
    return np.where(classes > 1e-12, shared / np.maximum(classes, 1e-12), 1.0)


def macro_f1(table: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes.

    Parameters
    ----------
    table
        (..., classes, answers): the first answers are the classes in the same order; further columns are other answers.
        A class without spots, as in a drawn sample, does not count.
    """
    n = table.shape[-2]
    right = np.diagonal(table[..., :n], axis1=-2, axis2=-1)
    there, said = table.sum(axis=-1), table[..., :n].sum(axis=-2)
    f1 = np.divide(2 * right, there + said, out=np.zeros_like(right), where=there + said > 0)
    return _mean_of_present(f1, there > 0)


def balanced_accuracy(table: np.ndarray) -> np.ndarray:
    """Mean recall of the classes; the table is that of :func:`macro_f1`."""
    n = table.shape[-2]
    right, there = np.diagonal(table[..., :n], axis1=-2, axis2=-1), table.sum(axis=-1)
    recall = np.divide(right, there, out=np.zeros_like(right), where=there > 0)
    return _mean_of_present(recall, there > 0)


def _mean_of_present(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    n = there.sum(axis=-1)
    return np.where(n > 0, (values * there).sum(axis=-1) / np.maximum(n, 1), np.nan)


def guessing_bar(counts: Sequence[int] | np.ndarray) -> tuple[float, float]:
    """Macro-F1 of two ways to guess, for large samples.

    Parameters
    ----------
    counts
        Spots of each class.

    Returns
    -------
    Of naming the largest class everywhere: its F1, 2p / (1 + p), over the number of classes. Of drawing each answer by
    the share p of its class: precision and recall of a class are both p, and so is its F1; the mean of the shares is
    one over the number of classes.

    Examples
    --------
    >>> guessing_bar([75, 25])
    (0.42857142857142855, 0.5)
    """
    share = np.asarray(counts, dtype=np.float64) / np.sum(counts)
    largest = share.max()
    return float(2 * largest / (1 + largest) / len(share)), float(share.mean())


# --- space -------------------------------------------------------------------------------------------------------


def neighbours(coordinates: np.ndarray, k: int, *, with_self: bool = False) -> np.ndarray:
    """Nearest spots of each spot, the nearest first; equally near ones by position, whatever the order of the spots.

    Parameters
    ----------
    coordinates
        (n, 2) positions.
    k
        How many; all others where there are fewer.
    with_self
        Put the spot itself before them.

    Returns
    -------
    (n, k) positions in ``coordinates``, or (n, k + 1).
    """
    from scipy.spatial import cKDTree

    n = len(coordinates)
    k = min(k, n - 1)
    looked_at = min(n, k + 1 + _RING)
    distance, index = (np.reshape(part, (n, looked_at)) for part in cKDTree(coordinates).query(coordinates, looked_at))
    # Spots on a lattice come in rings of one distance, up to rounding.
    step = float(np.median(distance[:, min(1, looked_at - 1)])) or 1.0
    ring = np.rint(distance / step * 1e6)
    ring[index == np.arange(n)[:, None]] = -1
    place = np.empty(n, dtype=np.int64)
    place[np.lexsort(coordinates.T)] = np.arange(n)
    order = np.lexsort((place[index], ring), axis=1)
    nearest = np.take_along_axis(index, order, axis=1)
    # Where very many spots coincide the own one may not be among them: it is put in front all the same.
    missing = nearest[:, 0] != np.arange(n)
    nearest[missing] = np.column_stack([np.flatnonzero(missing), nearest[missing, :-1]])
    return nearest[:, : k + 1] if with_self else nearest[:, 1 : k + 1]


def neighbour_mean(coordinates: np.ndarray, k: int) -> sparse.csr_matrix:
    """(n, n) CSR that averages over a spot and its ``k`` nearest neighbours."""
    index = neighbours(coordinates, k, with_self=True)
    n, m = index.shape
    return sparse.csr_matrix((np.full(n * m, 1 / m), index.ravel(), np.arange(0, n * m + 1, m)), shape=(n, n))


def neighbour_agreement(domains: np.ndarray, coordinates: np.ndarray, k: int = 6) -> np.ndarray:
    """(n,) share of the ``k`` nearest spots in the same domain; its mean is 1 for one domain."""
    return (domains[neighbours(coordinates, k)] == domains[:, None]).mean(axis=1)


def chaos(domains: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """(n,) distance of each spot to the nearest of its domain; its mean is the CHAOS score, the lower the smoother.

    Coordinates are scaled to unit variance; a spot alone in its domain is NaN (Shang and Zhou, Nat Commun 13:7203,
    2022).
    """
    from scipy.spatial import cKDTree

    scaled = (coordinates - coordinates.mean(axis=0)) / np.maximum(coordinates.std(axis=0), 1e-12)
    result = np.full(len(domains), np.nan)
    for domain in np.unique(domains):
        spots = np.flatnonzero(domains == domain)
        if len(spots) > 1:
            result[spots] = np.asarray(cKDTree(scaled[spots]).query(scaled[spots], k=2)[0])[:, 1]
    return result


def abnormal_spots(domains: np.ndarray, coordinates: np.ndarray, k: int = 10) -> np.ndarray:
    """(n,) whether at least six of the ten nearest spots are in other domains; the mean is the PAS score.

    Percentage of abnormal spots (Shang and Zhou, Nat Commun 13:7203, 2022).
    """
    other = domains[neighbours(coordinates, k)] != domains[:, None]
    return (other.mean(axis=1) >= 0.6).astype(np.float64)


# --- genes and pairs ---------------------------------------------------------------------------------------------


def pearson(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Pearson correlation over spots, column by column; 0 where either does not vary.

    Parameters
    ----------
    predicted, measured
        (n, genes).
    """
    x, y = (values.astype(np.float64) - values.mean(axis=0, dtype=np.float64) for values in (predicted, measured))
    norm = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return np.divide((x * y).sum(axis=0), norm, out=np.zeros_like(norm), where=norm > 1e-9)


def mean_squared_errors(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """(genes,) mean squared error over spots."""
    return ((predicted.astype(np.float64) - measured) ** 2).mean(axis=0)


def pair_ranks(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Rank, from 0, of each query's own key among all keys by cosine; in a tie the middle of the tied ranks.

    Parameters
    ----------
    queries, keys
        (n, d); row i of one belongs to row i of the other.
    """
    unit = [values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) for values in (queries, keys)]
    ranks = np.empty(len(queries))
    for start in range(0, len(queries), 1024):
        rows = np.arange(start, min(start + 1024, len(queries)))
        similarity = unit[0][rows] @ unit[1].T
        own = similarity[np.arange(len(rows)), rows][:, None]
        # The own key is one of the tied; what differs by rounding alone is tied.
        tied = np.abs(similarity - own) <= _ROUNDING
        ranks[rows] = ((similarity > own) & ~tied).sum(axis=1) + (tied.sum(axis=1) - 1) / 2
    return ranks
