"""Pictures of a report: maps without words, which the page writes beside them, so that they can be read anywhere."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.spatial import KDTree

from stalign.pl._colours import OKABE_ITO, UNASSIGNED, draw_scale_bar
from stalign.pl._html import Picture
from stalign.pl._niches import draw_overview, spread
from stalign.pl._spatial import PANEL_INCHES, Panel, Slide, draw, view
from stalign.slide._library import PatchReader, niche_record

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUALITY = 82
_PATCH_PIXELS = 224
_RAMP_STEPS = 9


class Seen(NamedTuple):
    """What the model saw of one spot: its name, its colour, and its patches, as they are and as the model gets them."""

    name: str
    colour: str
    spot: Picture
    niche: Picture
    spot_input: Picture
    niche_input: Picture


def encode(pixels: np.ndarray, *, exact: bool = False) -> Picture:
    """Encode (height, width, 3 or 4) uint8 as WebP where Pillow has it, else as PNG; ``exact`` loses nothing."""
    from PIL import Image, features

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    kind = "webp" if features.check("webp") else "png"
    if kind == "webp":
        picture.save(buffer, "WEBP", quality=_QUALITY, method=4, lossless=exact)
    else:
        picture.save(buffer, "PNG", optimize=True)
    return Picture(buffer.getvalue(), kind, picture.width, picture.height)


def _canvas(height_over_width: float) -> tuple[Figure, Axes]:
    """Make a figure outside pyplot whose one Axes fills it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_INCHES, PANEL_INCHES * float(np.clip(height_over_width, 0.2, 3.0))))
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    return figure, ax


def _render(figure: Figure, width: int) -> Picture:
    figure.set_dpi(width / PANEL_INCHES)
    figure.patch.set_alpha(0.0)
    for ax in figure.axes:
        ax.set_axis_off()
        ax.set_title("")
    canvas: Any = figure.canvas
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    return encode(pixels[..., :3] if (pixels[..., 3] == 255).all() else pixels)


def spot_map(panel: Panel, width: int, *, codes: Mapping[str, str] | None = None, scale_bar: bool = True) -> Picture:
    """Draw spots over their tissue; ``codes`` are written where most spots of a category lie."""
    left, right, bottom, top = view(panel.slide)
    figure, ax = _canvas((bottom - top) / (right - left))
    options: dict[str, Any] = {} if panel.values is None else {"colorbar": False, "legend_loc": None}
    draw([panel], ax=ax, scale_bar=scale_bar, **options)
    if codes and panel.values is not None:
        _write_codes(ax, panel, codes)
    return _render(figure, width)


def tissue(slide: Slide, width: int, *, scale_bar: bool = True) -> Picture:
    """Draw the tissue alone, or where no image exists the places of the spots."""
    if slide.picture is not None:
        return spot_map(Panel(slide, None, ""), width, scale_bar=scale_bar)
    places = pd.Series(np.zeros(len(slide.index)), name="spots")
    return spot_map(Panel(slide, places, "", {"cmap": "bone", "vmin": -1.0, "vmax": 1.0}), width, scale_bar=scale_bar)


def _write_codes(ax: Axes, panel: Panel, codes: Mapping[str, str]) -> None:
    from matplotlib.patheffects import withStroke

    values = panel.values
    if values is None:
        return
    points = panel.slide.coordinates * panel.slide.picture_scale
    for category, code in codes.items():
        own = points[(values == category).to_numpy()]
        if category == UNASSIGNED or not len(own):
            continue
        x, y = _heart(own)
        ax.text(
            x,
            y,
            code,
            ha="center",
            va="center",
            fontsize=7.5,
            fontweight="bold",
            color="black",
            zorder=15,
            parse_math=False,
            path_effects=[withStroke(linewidth=2.2, foreground="white")],
        )


def _heart(points: np.ndarray) -> np.ndarray:
    """Return the point in the thick of the others: nearest to its neighbours, and of these to the middle of all."""
    neighbours = min(len(points), 19)
    if neighbours < 3:
        return points[0]
    probes = points[np.linspace(0, len(points) - 1, min(len(points), 5000)).astype(np.intp)]
    crowding = np.asarray(KDTree(points).query(probes, k=neighbours)[0]).mean(axis=1)
    apart = np.linalg.norm(probes - np.median(points, axis=0), axis=1)
    return probes[np.argmin(crowding / np.median(crowding) + 0.2 * apart / max(float(np.median(apart)), 1e-9))]


def overview_and_patches(
    adata: AnnData, reader: PatchReader, library: str, n: int, width: int, pixels: Mapping[str, int]
) -> tuple[Picture, list[Seen]]:
    """Draw a slide with the outlines of a few niches, and their patches.

    ``pixels`` says how many the model gets of a ``"spot"`` and of a ``"niche"`` patch.
    """
    params = niche_record(adata)["params"]
    um = {level: float(params[f"{level}_um"]) for level in ("spot", "niche")}
    index = spread(adata, reader, n, reader.libraries.index(library))
    colours = [OKABE_ITO[i % len(OKABE_ITO)] for i in range(len(index))]
    side = {level: max(pixels[level], 1) for level in um}
    shown = {level: reader.read(index, um[level], _PATCH_PIXELS) for level in um}
    fed = {level: reader.read(index, um[level], side[level]) for level in um}
    picture, factor = reader.opened(library).thumbnail(2 * width)
    figure, ax = _canvas(1.0)
    draw_overview(ax, np.asarray(picture), factor, reader, index, library, params, colours)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    figure.set_size_inches(PANEL_INCHES, PANEL_INCHES * float(np.clip((bottom - top) / (right - left), 0.2, 3.0)))
    draw_scale_bar(ax, factor / reader.side(1.0, library))
    seen = [
        Seen(
            str(adata.obs_names[spot]),
            colours[row],
            encode(shown["spot"][row]),
            encode(shown["niche"][row]),
            encode(fed["spot"][row], exact=True),
            encode(fed["niche"][row], exact=True),
        )
        for row, spot in enumerate(index)
    ]
    return _render(figure, width), seen


def ramp_colours(name: str) -> list[str]:
    """Sample a colour map as ``#rrggbb``."""
    import matplotlib as mpl

    return [mpl.colors.to_hex(mpl.colormaps[name](i / (_RAMP_STEPS - 1))) for i in range(_RAMP_STEPS)]


def colour_of(name: str) -> Callable[[float], str]:
    """Return the function from 0…1 to ``#rrggbb`` of a colour map."""
    import matplotlib as mpl

    scale = mpl.colormaps[name]
    return lambda share: mpl.colors.to_hex(scale(float(share)))
