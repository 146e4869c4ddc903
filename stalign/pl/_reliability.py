"""Whether confidences say how often they are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stalign.pl._colours import OKABE_ITO

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stalign.tl import Calibration


def reliability(calibration: Calibration, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Plot the accuracy of annotations against their confidence, with the number of spots in each bin.

    Below the diagonal, confidences promise more than they hold.

    Parameters
    ----------
    calibration
        What :func:`stalign.tl.calibration` returned.
    title
        Title; ``None`` states the expected calibration error and the number of spots.
    ax
        Axes to draw in.

    Returns
    -------
    The Axes.

    Raises
    ------
    TypeError
        If ``calibration`` is something else.

    Examples
    --------
    >>> import stalign as sta
    >>> sta.pl.reliability(sta.tl.calibration(adata, "region"))  # doctest: +SKIP
    """
    import matplotlib.pyplot as plt

    from stalign.tl import Calibration

    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"calibration must be what `stalign.tl.calibration` returns, got {type(calibration).__name__}: "
            f"{calibration!r:.60}."
        )
    if ax is None:
        _, ax = plt.subplots(figsize=(4.2, 4.9), layout="constrained")
    filled = calibration.table[calibration.table["n"] > 0]
    width = filled["high"] - filled["low"]
    ax.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="as often right as confident", zorder=2)
    ax.bar(
        filled["low"],
        filled["accuracy"],
        width=0.92 * width,
        align="edge",
        color=OKABE_ITO[4],
        label="share that is right",
        zorder=1,
    )
    ax.scatter(
        filled["confidence"], filled["accuracy"], s=18, color=OKABE_ITO[0], label="at its mean confidence", zorder=3
    )
    middles = (filled["low"] + width / 2).to_numpy(dtype=np.float64)
    for middle, n in zip(middles, filled["n"], strict=True):
        ax.annotate(f"{int(n):,}", (middle, 0.012), ha="center", va="bottom", fontsize="x-small", zorder=4)
    if title is None:
        title = f"ECE {calibration.ece:.3f}, {calibration.n:,} spots"
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="share that is right", title=title)
    ax.set_aspect("equal")
    ax.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14))
    ax.spines[["top", "right"]].set_visible(False)
    return ax
