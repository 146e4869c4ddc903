"""Colours of categories, and the bar that says how large things are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito, Color Universal Design (2008), without black, the strongest first.
OKABE_ITO: Final = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442")
# Tol, Colour Schemes (SRON/EPS/TN/09-002, 2021): "muted", told apart by colour-blind readers, too.
_TOL_MUTED: Final = (
    "#cc6677",
    "#332288",
    "#ddcc77",
    "#117733",
    "#88ccee",
    "#882255",
    "#44aa99",
    "#999933",
    "#aa4499",
)
GREY: Final = "#d3d3d3"
UNASSIGNED: Final = "unassigned"


def distinct_colours(categories: Sequence[str]) -> list[str]:
    """Different colours, grey for spots without a name.

    Up to nine are told apart by colour-blind readers; more need names or numbers beside them.
    """
    from scanpy.plotting import palettes

    named = [category for category in categories if category != UNASSIGNED]
    pools = (OKABE_ITO, _TOL_MUTED, palettes.vega_20_scanpy, palettes.default_28, palettes.default_102)
    pool = next((colors for colors in pools if len(colors) >= len(named)), pools[-1])
    chosen = {category: pool[i % len(pool)] for i, category in enumerate(named)}
    return [chosen.get(category, GREY) for category in categories]


def bar_length(width_um: float) -> float:
    """Return the largest of 1, 2 or 5 times a power of ten that is at most a quarter of ``width_um``."""
    exponent = np.floor(np.log10(width_um / 4))
    return float(next(step * 10**exponent for step in (5, 2, 1) if step * 10**exponent <= width_um / 4 * (1 + 1e-9)))


def draw_scale_bar(ax: Axes, um_per_unit: float, *, on_picture: bool = True, fontsize: float = 7.0) -> None:
    """Draw a bar of a round length in the lower left corner; ``um_per_unit`` is µm per unit of the Axes.

    Black with a white edge on a picture; a grey that shows on light and on dark without one.
    """
    from matplotlib.patheffects import withStroke

    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    length = bar_length(abs(x1 - x0) * um_per_unit)
    left, low = x0 + 0.04 * (x1 - x0), y0 + 0.04 * (y1 - y0)
    color = "black" if on_picture else "#808080"
    edges = [[withStroke(linewidth=width, foreground="white")] if on_picture else [] for width in (4, 2)]
    bar = [left, left + length / um_per_unit]
    ax.plot(bar, [low, low], color=color, linewidth=2, solid_capstyle="butt", zorder=20, path_effects=edges[0])
    ax.annotate(
        f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm",
        (sum(bar) / 2, low),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=fontsize,
        color=color,
        zorder=20,
        path_effects=edges[1],
    )
    ax.set_xlim(x0, x1)
    ax.set_ylim(y0, y1)
