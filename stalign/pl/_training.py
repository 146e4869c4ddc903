"""Loss curves of a pretraining run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stalign.pl._colours import distinct_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG = "training_log.csv"
_TRAIN = "train/"
_VALIDATION = "validation/"
_RECALL = "recall_at_5_percent"


def training(path: str | Path, *, smooth: int = 5) -> np.ndarray:
    """Plot the terms of the loss, and the retrieval on validation sections where there are any.

    Parameters
    ----------
    path
        A checkpoint folder written by :func:`stalign.train.pretrain`, or its ``training_log.csv``.
    smooth
        Logged steps in the running mean.

    Returns
    -------
    Array of one :class:`~matplotlib.axes.Axes`, or two with a validation.

    Raises
    ------
    FileNotFoundError
        If there is no training log.

    Examples
    --------
    >>> import stalign as sta
    >>> sta.pl.training("stalign-mini")  # doctest: +SKIP
    """
    import matplotlib.pyplot as plt

    log = read_training_log(path)
    terms = [str(column) for column in log.columns if str(column).startswith(_TRAIN)]
    measured = [str(column) for column in log.columns if _is_recall(str(column))]
    panels = 1 + bool(measured)
    _, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 3.8), layout="constrained", squeeze=False)
    terms.sort(key=lambda column: column != f"{_TRAIN}loss")  # the sum first
    _curves(axes[0, 0], log, terms, prefix=_TRAIN, smooth=smooth)
    axes[0, 0].set(xlabel="step", ylabel="weighted loss", title="Training", yscale="log")
    if measured:
        _curves(axes[0, 1], log, measured, prefix=_VALIDATION, smooth=1)
        axes[0, 1].axhline(0.05, color="0.5", linestyle=":", label="chance")
        axes[0, 1].set(xlabel="step", ylabel="recall@5%", title="Image → gene retrieval, sections not trained on")
        axes[0, 1].set_ylim(bottom=0)
        axes[0, 1].legend(frameon=False, fontsize="small")
    return axes[0]


def read_training_log(path: str | Path) -> pd.DataFrame:
    """Read the log of a run; rows are steps, columns ``train/…`` and ``validation/…``."""
    path = Path(path).expanduser()
    file = path / LOG if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no training log {str(file)!r}. `stalign pretrain` writes {LOG!r} into the checkpoint folder."
        )
    return pd.read_csv(file)


def _is_recall(column: str) -> bool:
    """Whether a column is the recall of one section; the mean of all has no section in its name."""
    return column.startswith(_VALIDATION) and column.endswith(f"/{_RECALL}") and column.count("/") > 1


def _curves(axes: Axes, log: pd.DataFrame, columns: list[str], *, prefix: str, smooth: int) -> None:
    colours = distinct_colours([column for column in columns if column != f"{_TRAIN}loss"])
    for column in columns:
        is_sum = column == f"{_TRAIN}loss"
        values = log.dropna(subset=column)
        curve = values[column].rolling(smooth, min_periods=1).mean()
        label = column.removeprefix(prefix).removesuffix(f"/{_RECALL}")
        axes.plot(
            values["step"],
            curve,
            label="loss (sum)" if is_sum else label,
            color="black" if is_sum else colours.pop(0),
            linewidth=2.2 if is_sum else 1.5,
        )
    axes.legend(frameon=False, fontsize="small", loc="best")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
