"""The order in which patches are read, so that every tile of a file is read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stalign.slide._image import SlideImage
from stalign.slide._tiles import TiledImage

_BUDGET = 96 * 2**20
"""Bytes of tiles that a strip and the patches' overlap may need to stay in the cache. A constant and not the setting:
the order must not change between two runs that continue each other."""
_STRIP = 512
"""Height of strips where there are no tiles."""


def tile_order(image: SlideImage | None, centers: np.ndarray, patches: Sequence[tuple[float, int]]) -> np.ndarray:
    """Order patches so that those on the same tiles follow each other.

    The slide is cut into columns so narrow that the tiles under one strip of them, with all that patches overlap, stay
    in the cache while the next strip is read; within a column strips one row of tiles high follow each other, to and
    fro.

    Parameters
    ----------
    image
        The image; ``None`` where there is none.
    centers
        (n, 2) centres (x, y) in level-0 pixels.
    patches
        Side in level-0 pixels and in target pixels of every patch that is cut at a centre.

    Returns
    -------
    (n,) positions.
    """
    x, y = centers.T
    tall, wide, column = float(_STRIP), float(_STRIP), np.inf
    if isinstance(image, TiledImage) and patches:
        tall, wide, column = _sizes(image, patches)
    first = np.floor(x / wide).min() * wide if len(x) else 0.0
    columns = np.zeros(len(x)) if np.isinf(column) else np.floor((x - first) / column)
    strips = np.floor(y / tall)
    onward = np.where(strips % 2 == 0, x, -x)
    return np.lexsort((y, onward, strips, columns))


def _sizes(image: TiledImage, patches: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """Height and width of the finest tiles that are read, and width of a column, in level-0 pixels."""
    plans = [(side, *image.reduction_for(side / pixels)) for side, pixels in patches]
    tiles = [[edge * image.level_downsamples[level] for edge in image.tile_side(level, 1)] for _, level, _ in plans]
    tall, wide = (min(edges) for edges in zip(*tiles, strict=True))
    per_pixel = 0.0
    for (side, level, factor), (height, _) in zip(plans, tiles, strict=True):
        spanned = image.level_downsamples[level] * factor
        per_pixel += 3 * (tall + side + 2 * height) / spanned**2
    # A column must be much wider than what it shares with the next.
    shared = max(side + tile[1] for (side, *_), tile in zip(plans, tiles, strict=True))
    column = max(_BUDGET / per_pixel, 8 * shared)
    return tall, wide, max(1, column // wide) * wide
