"""Split-conformal quantiles of held-out residuals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)
"""Coverages whose half-widths are stored; those in between are interpolated."""

MAX_RESIDUALS = 4000
"""Held-out spots whose residuals are kept, at most."""

_GENES = 256


def conformal_quantiles(
    residuals: Sequence[np.ndarray],
    levels: Sequence[float],
    *,
    valid: Sequence[np.ndarray] | None = None,
    groups: Sequence[object] | None = None,
) -> np.ndarray:
    """Half-widths of intervals that cover a new spot with a given probability, gene by gene.

    The quantile of the absolute residuals of spots that the fit has not seen, with one more residual, infinitely large,
    for the new spot itself (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; Lei et al., JASA
    113:1094, 2018). It holds if the new spot could as well have been one of the held-out ones, in any order.

    Parameters
    ----------
    residuals
        For each held-out section (n, n_genes) absolute residuals.
    levels
        Coverages between 0 and 1.
    valid
        For each section (n_genes,) bool: genes it has residuals of; ``None`` for all.
    groups
        Patient of each section; patients count alike, and the sections of a patient. ``None``: all spots count alike.

    Returns
    -------
    (len(levels), n_genes) float32. Where there are too few spots for a level, the largest residual; NaN for a gene that
    no section is valid for.

    Examples
    --------
    >>> residual = np.arange(1.0, 10.0)[:, None]
    >>> conformal_quantiles([residual], [0.5, 0.9]).ravel().tolist()
    [5.0, 9.0]
    """
    weights = _weights([len(part) for part in residuals], groups)
    n_genes = residuals[0].shape[1]
    valid = [np.ones(n_genes, dtype=bool)] * len(residuals) if valid is None else valid
    result = np.full((len(levels), n_genes), np.nan, dtype=np.float32)
    for start in range(0, n_genes, _GENES):
        genes = slice(start, min(start + _GENES, n_genes))
        values = np.concatenate([part[:, genes] for part in residuals]).astype(np.float32)
        share = np.concatenate([np.outer(w, keep[genes]) for w, keep in zip(weights, valid, strict=True)])
        result[:, genes] = _quantiles(values, share, levels)
    return result


def _weights(lengths: Sequence[int], groups: Sequence[object] | None) -> list[np.ndarray]:
    if groups is None:
        return [np.ones(n) for n in lengths]
    sections = [sum(other == group for other in groups) for group in groups]
    return [np.full(n, 1 / (max(n, 1) * m)) for n, m in zip(lengths, sections, strict=True)]


def _quantiles(values: np.ndarray, weights: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    order = np.argsort(np.where(weights > 0, values, np.inf), axis=0, kind="stable")
    values, weights = np.take_along_axis(values, order, axis=0), np.take_along_axis(weights, order, axis=0)
    count = (weights > 0).sum(axis=0)
    total = weights.sum(axis=0)
    # The new spot weighs as much as a held-out one does on average.
    reached = np.cumsum(weights, axis=0) / np.maximum(total + total / np.maximum(count, 1), 1e-300)
    result = np.full((len(levels), values.shape[1]), np.nan, dtype=np.float32)
    columns = np.flatnonzero(count > 0)
    for number, level in enumerate(levels):
        place = (reached < level - 1e-12).sum(axis=0)
        result[number, columns] = values[np.minimum(place, count - 1)[columns], columns]
    return result


def half_width(quantiles: np.ndarray, levels: Sequence[float], level: float) -> np.ndarray:
    """Interpolate the stored half-widths at a coverage.

    Parameters
    ----------
    quantiles
        (len(levels), n_genes), see :func:`conformal_quantiles`.
    levels
        Coverages, ascending.
    level
        Between the first and the last of them.

    Returns
    -------
    (n_genes,) float64.
    """
    above = int(np.clip(np.searchsorted(levels, level), 1, len(levels) - 1))
    low, high = levels[above - 1], levels[above]
    share = (level - low) / (high - low)
    return (1 - share) * quantiles[above - 1].astype(np.float64) + share * quantiles[above].astype(np.float64)
