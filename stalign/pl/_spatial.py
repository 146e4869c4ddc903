"""Spots on their slide, one panel per library and colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.spatial import KDTree

from stalign._keys import Key
from stalign._validate import (
    check_adata,
    check_choices,
    check_positive,
    get_coordinates,
    get_library_codes,
    listing,
    near,
    require_key,
)
from stalign.pl._colours import distinct_colours, draw_scale_bar
from stalign.slide._library import find_niche_record
from stalign.slide._source import ImageSource, find_sources

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

PICTURE_SIDE = 1600
PANEL_INCHES = 3.6
_SPOT_SHARE = 0.9
_MANY_SPOTS = 30_000
_LIBRARY = "library"


@dataclass(frozen=True)
class Slide:
    """One library as it is drawn: its spots, and the picture under them, scaled for the screen."""

    name: str
    index: np.ndarray
    coordinates: np.ndarray
    picture: np.ndarray | None
    picture_scale: float
    spot_px: float
    mpp: float | None = None
    """µm per full-resolution pixel, where the niches' record states it."""


@dataclass(frozen=True)
class Panel:
    """What one Axes shows."""

    slide: Slide
    values: pd.Series | None
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bar_label: str = ""
    """Words beside the bar of colours: what its numbers are."""


def spatial(
    adata: AnnData,
    color: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    library_key: str | None = None,
    library_id: str | Sequence[str] | None = None,
    image_key: str | None = None,
    image: bool = True,
    scale_bar: bool = True,
    spatial_key: str = Key.obsm.SPATIAL,
    size: float = 1.0,
    cmap: str = "viridis",
    palette: Mapping[str, str] | None = None,
    title: str | Sequence[str] | None = None,
    ncols: int = 4,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes | np.ndarray:
    """Show spots on the slide, coloured by annotations or genes.

    Built on :func:`squidpy.pl.spatial_scatter`. Every library is cut to its spots and keeps the same colours for the
    same categories; libraries without an image are shown as spots alone.

    Parameters
    ----------
    adata
        Spots; nothing is written to it.
    color
        Columns of ``obs`` or genes; ``None`` shows the slide and its spots.
    layer
        Layer that genes are taken from; ``None`` takes ``X``.
    library_key
        Column of ``obs`` with each spot's library; ``None`` takes the one of the niche record, if there is one.
    library_id
        Libraries to show; ``None`` shows all.
    image_key
        Picture in ``uns["spatial"][library]["images"]``; ``None`` takes the finest.
    image
        Whether the picture is shown.
    scale_bar
        Whether a bar says how large the tissue is, where :func:`stalign.pp.extract_niches` worked out the scale.
    spatial_key
        Coordinates in ``obsm``.
    size
        Diameter of the spots, relative to nine tenths of the distance between neighbours.
    cmap
        Colours of numbers.
    palette
        Colours of categories; ``None`` takes ``uns["<color>_colors"]`` where they exist.
    title
        Titles of the panels, by library, then by colour.
    ncols
        Panels in a row.
    ax
        Axes to draw in, for a single panel.
    **kwargs
        For :func:`squidpy.pl.spatial_scatter`, such as ``alpha``, ``legend_loc``, ``vmin`` and ``vmax``.

    Returns
    -------
    The Axes of one panel, or an array of as many Axes as panels.

    Raises
    ------
    KeyError
        If a colour, layer or library is not there.
    ValueError
        If ``ax`` is given for more than one panel.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> axes = sta.pl.spatial(adata, color=["region", "ERBB2"])
    """
    check_adata(adata)
    colors: list[str | None] = [None] if color is None else [color] if isinstance(color, str) else list(color)
    columns = {name: colour_values(adata, name, layer) for name in colors if name is not None}
    slides = get_slides(adata, library_key, library_id, image_key, spatial_key, with_picture=image)
    panels = []
    for slide in slides:
        for name in colors:
            values = None if name is None else columns[name].iloc[slide.index]
            options = {} if name is None else colour_options(adata, columns[name], cmap, palette)
            panels.append(Panel(slide, values, panel_title(slide, name, len(slides)), options))
    if title is not None:
        panels = _retitled(panels, title)
    return draw(panels, ncols=ncols, ax=ax, size=size, scale_bar=scale_bar, **kwargs)


def _retitled(panels: list[Panel], title: str | Sequence[str]) -> list[Panel]:
    titles = [title] if isinstance(title, str) else list(title)
    if len(titles) != len(panels):
        raise ValueError(f"{len(titles)} titles for {len(panels)} panels: {[panel.title for panel in panels]}.")
    return [replace(panel, title=text) for panel, text in zip(panels, titles, strict=True)]


def panel_title(slide: Slide, name: str | None, n_slides: int) -> str:
    """Name what is shown, and the library where there are several."""
    if name is None:
        return slide.name
    return name if n_slides == 1 else f"{slide.name}: {name}"


# --- what is shown -----------------------------------------------------------------------------------------------


def colour_values(adata: AnnData, name: str, layer: str | None = None) -> pd.Series:
    """Return a column of ``obs`` or a gene as a series named after it; text becomes categorical."""
    if name in adata.obs:
        values = adata.obs[name]
        if values.dtype == object or values.dtype == bool or isinstance(values.dtype, pd.StringDtype):
            values = values.astype(str).astype("category")
        return values.rename(name)
    if name in adata.var_names:
        matrix = adata.X if layer is None else require_key(adata.layers, layer, where="adata.layers")
        if matrix is None:
            raise ValueError(f"Gene {name!r} has no values: `adata.X` is None. Pass `layer=...`.")
        return pd.Series(gene_column(matrix, adata.var_names.get_loc(name)), index=adata.obs_names, name=name)
    known = [*adata.obs.columns, *adata.var_names]
    raise KeyError(
        f"{name!r} is neither a column of `adata.obs` nor a gene. Columns: {listing(adata.obs.columns)}; "
        f"{adata.n_vars} genes, such as {listing(adata.var_names[:5])}.{near(name, known)}"
    )


def gene_column(matrix: Any, position: int) -> np.ndarray:
    """One column of a matrix as (n_obs,) float."""
    column: Any = matrix[:, [position]]
    dense = column.toarray() if hasattr(column, "toarray") else column
    return np.asarray(dense, dtype=np.float64).ravel()


def colour_options(
    adata: AnnData, values: pd.Series, cmap: str, palette: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Choose colours: a colour map for numbers, one fixed colour per category for labels."""
    if not isinstance(values.dtype, pd.CategoricalDtype):
        return {"cmap": cmap}
    categories = [str(category) for category in values.cat.categories]
    stored = adata.uns.get(f"{values.name}_colors")
    if palette is not None:
        missing = [category for category in categories if category not in palette]
        if missing:
            raise KeyError(f"`palette` has no colour for {listing(missing)}. It names {listing(palette)}.")
        colors = [palette[category] for category in categories]
    elif stored is not None and len(stored) == len(categories):
        colors = [str(color) for color in stored]
    else:
        colors = distinct_colours(categories)
    return {"colors": colors}


# --- slides ------------------------------------------------------------------------------------------------------


def recorded_library_key(adata: AnnData, library_key: str | None) -> str | None:
    """Return the argument, or the ``library_key`` that :func:`stalign.pp.extract_niches` was called with."""
    if library_key is not None:
        return library_key
    params = adata.uns.get(Key.UNS, {}).get(Key.uns.NICHE, {}).get("params", {})
    return str(params.get("library_key", "")) or None


def get_slides(
    adata: AnnData,
    library_key: str | None,
    library_id: str | Sequence[str] | None,
    image_key: str | None,
    spatial_key: str,
    *,
    with_picture: bool = True,
    picture_side: int = PICTURE_SIDE,
) -> list[Slide]:
    """Split the spots by library, each with a picture small enough for the screen."""
    library_key = recorded_library_key(adata, library_key)
    coordinates = get_coordinates(adata, spatial_key)
    codes, names = get_library_codes(adata, library_key)
    wanted = names if library_id is None else check_choices("library_id", library_id, names)
    sources = find_sources(adata, names, None, image_key, library_key) if with_picture else {}
    sources = {
        name: _recorded_source(adata, name) if source.kind == "none" else source for name, source in sources.items()
    }
    slides = []
    for name in wanted:
        index = np.flatnonzero(codes == names.index(name))
        picture, scale = _picture(sources.get(name), picture_side)
        diameter = _spot_diameter(coordinates[index])
        slides.append(Slide(name, index, coordinates[index], picture, scale, diameter, _recorded_mpp(adata, name)))
    return slides


def _recorded_source(adata: AnnData, library: str) -> ImageSource:
    """Return the file that :func:`stalign.pp.extract_niches` was given, if it is still there."""
    entry = (find_niche_record(adata) or {}).get("libraries", {}).get(library, {})
    path = str(entry.get("image_path", ""))
    if not path or not Path(path).exists():
        return ImageSource()
    return ImageSource("path", path=path, scale=float(entry["image_scale"]))


def _recorded_mpp(adata: AnnData, library: str) -> float | None:
    entry = (find_niche_record(adata) or {}).get("libraries", {}).get(library, {})
    return float(entry["mpp"]) if "mpp" in entry else None


def _picture(source: Any, side: int) -> tuple[np.ndarray | None, float]:
    image = None if source is None else source.open()
    if image is None:
        return None, 1.0
    with image:
        picture, factor = image.thumbnail(side)
    return np.asarray(picture), source.scale / factor


def _spot_diameter(coordinates: np.ndarray) -> float:
    """Nine tenths of the distance between neighbours: large enough to read, small enough to tell apart."""
    if len(coordinates) < 2:
        return 100.0
    probes = coordinates[np.linspace(0, len(coordinates) - 1, min(2000, len(coordinates))).astype(np.intp)]
    nearest = np.asarray(KDTree(coordinates).query(probes, k=2)[0])[:, 1]
    positive = nearest[nearest > 0]
    return _SPOT_SHARE * float(np.median(positive)) if len(positive) else 100.0


# --- drawing -----------------------------------------------------------------------------------------------------


def draw(
    panels: Sequence[Panel],
    *,
    ncols: int = 4,
    ax: Axes | None = None,
    size: float = 1.0,
    scale_bar: bool = True,
    **kwargs: Any,
) -> Axes | np.ndarray:
    """Draw panels; return the Axes of one, or an array of Axes."""
    size = check_positive("size", size)
    ncols = check_positive("ncols", ncols, integer=True)
    if ax is not None:
        if len(panels) != 1:
            raise ValueError(f"`ax` takes one panel, these are {len(panels)}: {[panel.title for panel in panels]}.")
        axes = [ax]
    else:
        axes = new_axes(len(panels), ncols, [_aspect(panel.slide) for panel in panels])
    for panel, where in zip(panels, axes, strict=True):
        _draw_panel(panel, where, size, kwargs)
        for bar in (shown.colorbar for shown in where.collections if shown.colorbar is not None):
            bar.outline.set_visible(False)
            bar.set_label(panel.bar_label, fontsize="small")
        if scale_bar and panel.slide.mpp is not None and not kwargs.get("scalebar_dx"):
            um_per_pixel = panel.slide.mpp / panel.slide.picture_scale
            draw_scale_bar(where, um_per_pixel, on_picture=panel.slide.picture is not None)
    return axes[0] if len(axes) == 1 else np.array(axes, dtype=object)


def new_axes(n: int, ncols: int, aspects: Sequence[float]) -> list[Axes]:
    """Make a figure with ``n`` Axes, its height after the slides' shape."""
    import matplotlib.pyplot as plt

    columns = min(n, ncols)
    rows = -(-n // columns)
    height = PANEL_INCHES * float(np.clip(np.median(aspects), 0.5, 1.6)) + 0.3
    figure, grid = plt.subplots(
        rows, columns, figsize=((PANEL_INCHES + 1.2) * columns, height * rows), layout="constrained", squeeze=False
    )
    for spare in grid.ravel()[n:]:
        figure.delaxes(spare)
    return list(grid.ravel()[:n])


def _aspect(slide: Slide) -> float:
    extent = np.ptp(slide.coordinates, axis=0) + 4 * slide.spot_px
    return float(extent[1] / extent[0])


def _draw_panel(panel: Panel, ax: Axes, size: float, kwargs: Mapping[str, Any]) -> None:
    """Hand squidpy an object with this panel's spots, values and picture only: it writes to what it is given."""
    import squidpy as sq

    slide = panel.slide
    options = {**panel.options, **kwargs}
    colors = options.pop("colors", None)
    bare = _bare(panel, size, colors)
    many = len(slide.index) > _MANY_SPOTS
    if panel.values is None:
        options.setdefault("alpha", 0.0 if slide.picture is not None else 1.0)
    if many:
        # Circles of a true size are slow to draw by the hundred thousand; dots are not.
        options.setdefault("shape", None)
        options.setdefault("size", max(0.1, 60_000 * size**2 / len(slide.index)))
    if options.get("shape", "circle") is None:
        options.setdefault("scale_factor", slide.picture_scale)
        options["img_res_key"] = None
    sq.pl.spatial_scatter(
        bare,
        color=None if panel.values is None else str(panel.values.name),
        library_id=_LIBRARY if not many else [_LIBRARY],
        img=slide.picture is not None,
        title=panel.title,
        axis_label=["", ""],
        frameon=options.pop("frameon", False),
        ax=ax,
        return_ax=True,
        **options,
    )
    if slide.picture is not None and options.get("shape", "circle") is None:
        ax.imshow(slide.picture, zorder=0)
    _crop(ax, slide)


def _bare(panel: Panel, size: float, colors: Sequence[str] | None) -> AnnData:
    from anndata import AnnData

    slide = panel.slide
    bare = AnnData(obsm={Key.obsm.SPATIAL: slide.coordinates.astype(np.float64)})
    bare.obs_names = [str(i) for i in range(len(slide.index))]
    if panel.values is not None:
        name = str(panel.values.name)
        values = panel.values.copy()
        values.index = bare.obs_names
        bare.obs[name] = values
        if colors is not None:
            bare.uns[f"{name}_colors"] = list(colors)
    images = {} if slide.picture is None else {"hires": slide.picture}
    factors = {"tissue_hires_scalef": slide.picture_scale, "spot_diameter_fullres": slide.spot_px * size}
    bare.uns[Key.uns.SPATIAL] = {_LIBRARY: {"images": images, "scalefactors": factors}}
    return bare


def view(slide: Slide) -> tuple[float, float, float, float]:
    """Left, right, bottom and top, in pixels of the picture: the spots with a margin, not the whole glass."""
    scale = slide.picture_scale
    first, last = slide.coordinates.min(axis=0) * scale, slide.coordinates.max(axis=0) * scale
    margin = max(2 * slide.spot_px * scale, 0.03 * float((last - first).max()))
    low, high = first - margin, last + margin
    if slide.picture is not None:
        # No empty strip beside the picture, unless spots lie there.
        half = 0.55 * slide.spot_px * scale
        size = np.array(slide.picture.shape[1::-1], dtype=np.float64)
        low, high = (
            np.maximum(low, np.minimum(-0.5, first - half)),
            np.minimum(high, np.maximum(size - 0.5, last + half)),
        )
    return float(low[0]), float(high[0]), float(high[1]), float(low[1])


def _crop(ax: Axes, slide: Slide) -> None:
    left, right, bottom, top = view(slide)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
