"""What the model sees: the patches of a few spots beside their slide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial.distance import cdist

from stalign._keys import Key
from stalign._validate import check_adata, check_positive, listing
from stalign.pl._colours import OKABE_ITO, draw_scale_bar
from stalign.pl._spatial import PICTURE_SIDE
from stalign.pp._patches import spot_index
from stalign.slide._library import PatchReader, niche_record

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_PATCH_PIXELS = 224
_CANDIDATES = 4000
_SETTLING_ROUNDS = 12


def niches(adata: AnnData, obs: Any = None, *, n: int = 4, size: int = _PATCH_PIXELS) -> np.ndarray:
    """Show what the model sees: spot and niche patches beside the slide, with their outlines.

    The dashed square in a niche patch is the spot patch; the rings are the spots of the niche.

    Parameters
    ----------
    adata
        After :func:`stalign.pp.extract_niches`.
    obs
        Spots to show, all of one library: names, positions or a mask; ``None`` spreads ``n`` over the first library
        that has an image.
    n
        How many spots to show.
    size
        Side of the patches in pixels; the model sees fewer.

    Returns
    -------
    Array of Axes: the slide, then for every spot its spot patch and its niche patch.

    Raises
    ------
    ValueError
        If the spots have no image or lie in several libraries.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.pp.extract_niches(adata, n_neighbors=18, spot_um=100, niche_um=400)
    >>> axes = sta.pl.niches(adata, n=3)
    """
    check_adata(adata)
    n = check_positive("n", n, integer=True)
    size = check_positive("size", size, integer=True)
    params = niche_record(adata)["params"]
    with PatchReader(adata) as reader:
        index = spread(adata, reader, n) if obs is None else spot_index(adata, obs)[:n]
        library = _one_library(reader, index)
        spot = reader.read(index, float(params["spot_um"]), size)
        niche = reader.read(index, float(params["niche_um"]), size)
        image = reader.opened(library)
        picture, factor = image.thumbnail(PICTURE_SIDE)
        colors = _colors(len(index))
        overview, patches = _layout(len(index))
        draw_overview(overview, np.asarray(picture), factor, reader, index, library, params, colors)
        draw_scale_bar(overview, _um_per_pixel(reader, library, factor))
    for row, (left, right) in enumerate(patches):
        _draw_patch(left, spot[row], colors[row], f"{row + 1}  spot, {params['spot_um']:g} µm")
        _draw_patch(right, niche[row], colors[row], f"{row + 1}  niche, {params['niche_um']:g} µm")
        _draw_members(right, adata, reader, int(index[row]), library, params, size)
    return np.array([overview, *[ax for pair in patches for ax in pair]], dtype=object)


def _one_library(reader: PatchReader, index: np.ndarray) -> str:
    if len(index) == 0:
        raise ValueError("No spots to show: `obs` selects none.")
    codes = np.unique(reader.codes[index])
    if len(codes) > 1:
        raise ValueError(
            f"The spots lie in {len(codes)} libraries: {listing(reader.libraries[c] for c in codes)}. "
            "Pass `obs` with spots of one."
        )
    return reader.libraries[int(codes[0])]


def spread(adata: AnnData, reader: PatchReader, n: int, code: int | None = None) -> np.ndarray:
    """Choose spots far from each other, whose niche lies inside the image where there are enough of them.

    They are of library number ``code``, or of the first with an image.
    """
    if not reader.has_image.any():
        raise ValueError(
            "No library has an image, so there are no patches to show. "
            "Run `stalign.pp.extract_niches(adata, image=...)`."
        )
    first = reader.codes[np.flatnonzero(reader.has_image)[0]] if code is None else code
    pool = np.flatnonzero(reader.codes == first)
    inside = Key.niche_in_image(str(niche_record(adata)["params"]["key_added"]))
    if inside in adata.obs:
        whole = pool[adata.obs[inside].to_numpy()[pool] >= 1]
        pool = whole if len(whole) >= n else pool
    pool = pool[np.linspace(0, len(pool) - 1, min(len(pool), _CANDIDATES)).astype(np.intp)]
    points = reader.centers(pool, reader.libraries[int(first)])
    return pool[_representatives(points, min(n, len(pool)))]


def _representatives(points: np.ndarray, n: int) -> np.ndarray:
    """Choose ``n`` different points that cover the others: farthest first, then moved to the middle of their share."""
    chosen = [int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmin())]
    distance = np.full(len(points), np.inf)
    for _ in range(n - 1):
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    centers = points[chosen]
    for _ in range(_SETTLING_ROUNDS):
        own = cdist(points, centers).argmin(axis=1)
        members = np.maximum(np.bincount(own, minlength=n), 1)[:, None]
        centers = np.column_stack([np.bincount(own, weights=points[:, axis], minlength=n) for axis in (0, 1)]) / members
    nearest = cdist(centers, points).argmin(axis=1)
    return nearest if len(np.unique(nearest)) == n else np.array(chosen)


def _colors(n: int) -> list[str]:
    return [OKABE_ITO[i % len(OKABE_ITO)] for i in range(n)]


def _layout(n: int) -> tuple[Axes, list[tuple[Axes, Axes]]]:
    """Slide on the left, pairs of patches in up to two columns on the right."""
    import matplotlib.pyplot as plt

    columns = 1 if n <= 2 else 2
    rows = -(-n // columns)
    height = max(3.4, 1.9 * rows)
    figure = plt.figure(figsize=(1.15 * height + 3.9 * columns, height), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.15 * height, 3.9 * columns])
    grid = right.subplots(rows, 2 * columns, squeeze=False)
    pairs = []
    for i in range(rows * columns):
        row, column = i % rows, 2 * (i // rows)
        pair = (grid[row, column], grid[row, column + 1])
        if i < n:
            pairs.append(pair)
        else:
            for spare in pair:
                right.delaxes(spare)
    return left.subplots(), pairs


def draw_overview(
    ax: Axes,
    picture: np.ndarray,
    factor: float,
    reader: PatchReader,
    index: np.ndarray,
    library: str,
    params: Any,
    colors: list[Any],
) -> None:
    """Draw a slide's picture with the outlines of some spots' patches; its pixels are ``factor`` of the image's."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    ax.imshow(picture)
    members = np.flatnonzero(reader.codes == reader.libraries.index(library))
    spots = reader.centers(members, library) / factor
    # Image pixel i is drawn from i - 0.5 to i + 0.5.
    for row, center in enumerate(reader.centers(index, library) / factor - 0.5):
        for um in (params["niche_um"], params["spot_um"]):
            side = reader.side(float(um), library) / factor
            outline = Rectangle(center - side / 2, side, side, fill=False, edgecolor=colors[row], linewidth=1.6)
            ax.add_patch(outline)
        label = center - [reader.side(float(params["niche_um"]), library) / factor / 2, 0]
        ax.annotate(
            str(row + 1),
            label,
            xytext=(-3, 0),
            textcoords="offset points",
            color=colors[row],
            ha="right",
            va="center",
            fontweight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
    margin = reader.side(float(params["niche_um"]), library) / factor / 2 + 0.02 * max(picture.shape[:2])
    low, high = spots.min(axis=0) - margin, spots.max(axis=0) + margin
    ax.set_xlim(max(low[0], -0.5), min(high[0], picture.shape[1] - 0.5))
    ax.set_ylim(min(high[1], picture.shape[0] - 0.5), max(low[1], -0.5))
    ax.set_title(library)
    ax.set_axis_off()


def _um_per_pixel(reader: PatchReader, library: str, factor: float) -> float:
    return factor / reader.side(1.0, library)


def _draw_patch(ax: Axes, pixels: np.ndarray, color: Any, title: str) -> None:
    ax.imshow(pixels)
    ax.set_title(title, fontsize="small")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color=color, linewidth=2)


def _draw_members(
    ax: Axes, adata: AnnData, reader: PatchReader, spot: int, library: str, params: Any, size: int
) -> None:
    """Outline the spot patch in the niche patch, and ring the spots of the niche."""
    from matplotlib.patches import Rectangle

    share = float(params["spot_um"]) / float(params["niche_um"]) * size
    corner = (size - share) / 2 - 0.5
    ax.add_patch(Rectangle((corner, corner), share, share, fill=False, edgecolor="black", linewidth=1, linestyle="--"))
    graph = adata.obsp[Key.connectivities(str(params["key_added"]))]
    members = graph.indices[graph.indptr[spot] : graph.indptr[spot + 1]]
    offset = reader.centers(members, library) - reader.centers(np.array([spot]), library)
    at = offset / reader.side(float(params["niche_um"]), library) * size + size / 2 - 0.5
    ax.scatter(at[:, 0], at[:, 1], s=14, facecolors="none", edgecolors="black", linewidths=0.8)
    ax.set_xlim(-0.5, size - 0.5)
    ax.set_ylim(size - 0.5, -0.5)
