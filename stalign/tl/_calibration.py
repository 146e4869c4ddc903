"""Whether confidences say how often they are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from stalign._keys import Key
from stalign._validate import check_adata, check_positive, listing, require_key

if TYPE_CHECKING:
    from anndata import AnnData

# Temperatures that are tried, as multiples of the standard deviation of a score.
_TEMPERATURES = np.geomspace(0.25, 16.0, 37)


class Calibration(NamedTuple):
    """How well confidences are calibrated.

    Attributes
    ----------
    ece
        Expected calibration error: mean distance of confidence and accuracy over bins of confidence, each counted by
        its spots.
    accuracy, confidence
        Share of spots that are right, and their mean confidence; their difference is what is over- or underestimated
        on the whole.
    n
        Number of spots.
    table
        DataFrame, one row a bin: ``low``, ``high`` (its borders), ``n``, ``confidence``, ``accuracy`` (means; NaN where
        a bin is empty).
    """

    ece: float
    accuracy: float
    confidence: float
    n: int
    table: pd.DataFrame


def calibration(
    adata: AnnData,
    truth_key: str,
    *,
    ignore: str | Sequence[str] = (),
    n_bins: int = 10,
    key_added: str = Key.obs.ANNOTATION,
) -> Calibration:
    """Compare the confidence of annotations with how often they are right.

    Parameters
    ----------
    adata
        After :func:`stalign.tl.zero_shot_annotate`.
    truth_key
        Column of ``obs`` with the true names, spelt as the labels are.
    ignore
        Names in that column that are no truth, e.g. ``"undetermined"``.
    n_bins
        Bins of equal width over confidences from 0 to 1.
    key_added
        ``key_added`` of :func:`stalign.tl.zero_shot_annotate`.

    Returns
    -------
    :class:`Calibration`. Spots without a truth or a confidence are left out. A truth that is none of the labels counts
    as wrong. Spots that a ``threshold`` left unassigned count with the label they would have got.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If no spot has both a truth and a confidence, or no truth is among the labels.

    Notes
    -----
    The expected calibration error is that of Naeini, Cooper and Hauskrecht (AAAI 2015). It depends on the number of
    bins, and is never exactly 0 on a finite number of spots.

    Examples
    --------
    >>> import stalign as sta
    >>> sta.tl.calibration(adata, "region").ece  # doctest: +SKIP
    """
    check_adata(adata)
    score = require_key(
        adata.obsm, f"{key_added}_score", where="adata.obsm", hint="Run `sta.tl.zero_shot_annotate(adata, ...)` first."
    )
    truth = require_key(adata.obs, truth_key, where="adata.obs", hint="It must hold the true names.")
    names = [str(name) for name in score.columns]
    left_out = [ignore] if isinstance(ignore, str) else list(ignore)
    values = score.to_numpy()
    kept = (truth.notna() & ~truth.astype(str).isin(left_out)).to_numpy() & ~np.isnan(values).any(axis=1)
    if not kept.any():
        raise ValueError(f"No spot has both a name in `obs[{truth_key!r}]` and a confidence.")
    true_names = truth.astype(str).to_numpy()[kept]
    if not np.isin(true_names, names).any():
        raise ValueError(
            f"`obs[{truth_key!r}]` holds {listing(sorted(set(true_names)))}, none of which is a label: "
            f"{listing(names)}. Spell them the same way."
        )
    best = values[kept].argmax(axis=1)
    return reliability(values[kept].max(axis=1), np.asarray(names, dtype=object)[best] == true_names, n_bins=n_bins)


def reliability(confidence: np.ndarray, correct: np.ndarray, *, n_bins: int = 10) -> Calibration:
    """Make the reliability table of confidences, and their expected calibration error.

    Parameters
    ----------
    confidence
        (n,) between 0 and 1.
    correct
        (n,) bool.
    n_bins
        Bins of equal width; a confidence on a border belongs to the bin above.

    Examples
    --------
    >>> reliability(np.array([0.9, 0.9]), np.array([True, False])).ece
    0.4
    """
    n_bins = check_positive("n_bins", n_bins, integer=True)
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool)
    if confidence.shape != correct.shape or confidence.ndim != 1 or not len(confidence):
        raise ValueError(f"confidence and correct must be (n,), got {confidence.shape} and {correct.shape}.")
    if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():
        raise ValueError("Confidences must lie between 0 and 1.")
    # A hair above the border, so that float32 0.9 is in the bin of 0.9.
    which = np.minimum(((confidence + 1e-7) * n_bins).astype(np.intp), n_bins - 1)
    n = np.bincount(which, minlength=n_bins)
    sums = (
        np.bincount(which, weights=confidence, minlength=n_bins),
        np.bincount(which, weights=correct, minlength=n_bins),
    )
    mean, right = (np.divide(total, n, out=np.full(n_bins, np.nan), where=n > 0) for total in sums)
    borders = np.linspace(0, 1, n_bins + 1)
    table = pd.DataFrame({"low": borders[:-1], "high": borders[1:], "n": n, "confidence": mean, "accuracy": right})
    gap = np.abs(sums[0] - sums[1]).sum() / len(confidence)
    return Calibration(float(gap), float(correct.mean()), float(confidence.mean()), len(confidence), table)


def shares(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Softmax over labels, float32; rows of NaN stay."""
    scaled = logits / temperature
    raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)


def best_temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """Temperature under which the true labels are most likely (Guo et al., ICML 2017).

    Parameters
    ----------
    logits
        (n, labels) scores of spots that took no part in making them.
    truth
        (n,) number of the true label.
    """
    losses = []
    for temperature in _TEMPERATURES:
        scaled = logits / temperature
        top = scaled.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(scaled - top).sum(axis=1)) + top[:, 0]
        losses.append(float((log_sum - scaled[np.arange(len(truth)), truth]).mean()))
    return float(_TEMPERATURES[int(np.argmin(losses))])
