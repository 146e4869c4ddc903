"""Formats of scanners that are not TIFF to the letter, through OpenSlide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stalign.slide._cache import TileCache
from stalign.slide._image import check_whole, pixel_limit
from stalign.slide._tiles import TiledImage, TileGrid
from stalign.slide._units import is_credible, number, same_sides

ONLY_SUFFIXES = (".mrxs", ".vms", ".vmu", ".svslide", ".bif", ".dcm", ".czi", ".zvi")
"""Read by OpenSlide alone."""
PREFERRED_SUFFIXES = (".ndpi", ".scn")
"""Read by OpenSlide where it is installed, which knows more of these dialects of TIFF, else by tifffile."""
_TILE = 512
_MIN_TILE = 256


def has_openslide() -> bool:
    """Whether OpenSlide is installed, bindings and library."""
    try:
        import openslide
    except (ImportError, OSError):  # bindings without the library raise an OSError on some systems
        return False
    return hasattr(openslide, "OpenSlide")


class OpenSlideImage(TiledImage):
    """A whole slide that OpenSlide reads.

    Parameters
    ----------
    path
        The file.
    max_pixels
        Largest single tile; ``None`` takes ``settings.max_image_pixels``.
    cache
        Where decoded tiles are kept; ``None`` takes the one that all images share.

    Raises
    ------
    ImportError
        If OpenSlide is not installed.
    ValueError
        If OpenSlide does not know the format, or the file is damaged.
    """

    def __init__(self, path: str | Path, *, max_pixels: int | None = None, cache: TileCache | None = None) -> None:
        self.path = Path(path)
        if not has_openslide():
            raise ImportError(
                f"'{self.path.name}' is read through OpenSlide, which is not installed: `pip install 'stalign[wsi]'` "
                "(openslide-python and openslide-bin). Or convert the slide to a tiled TIFF."
            )
        import openslide

        try:
            self._slide = openslide.OpenSlide(str(self.path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise ValueError(
                f"'{self.path.name}' is of no format that OpenSlide {openslide.__library_version__} knows. Formats of "
                "several files need all of them beside each other; else convert the slide to a tiled TIFF."
            ) from error
        except openslide.OpenSlideError as error:
            raise ValueError(f"'{self.path.name}' cannot be opened: {error}. Is the file complete?") from error
        try:
            properties = self._slide.properties
            grids = []
            for level, (width, height) in enumerate(self._slide.level_dimensions):
                tall, wide = (_tile_side(properties, level, side) for side in ("height", "width"))
                grids.append(TileGrid.regular(height, width, tall, wide))
                check_whole(self.path.name, grids[-1].tile_size, pixel_limit(max_pixels), "tiles of ")
            downsamples = tuple(float(value) for value in self._slide.level_downsamples)
            super().__init__(self.path.name, grids, mpp=_mpp(properties), cache=cache, downsamples=downsamples)
        except BaseException:
            self._slide.close()
            raise
        # Where a slide has no pixels (scanners skip empty glass) it is of this colour.
        empty = properties.get("openslide.background-color", "FFFFFF")
        self._empty = np.frombuffer(bytes.fromhex(empty), dtype=np.uint8).astype(np.uint16)

    def _raw(self, level: int, row: int, column: int) -> tuple[np.ndarray, int]:
        import openslide

        top, left, height, width = self._grids[level, 1].window(row, column)
        factor = self.level_downsamples[level]
        try:
            region = self._slide.read_region((round(left * factor), round(top * factor)), level, (width, height))
        except openslide.OpenSlideError as error:
            raise self._damaged(level, row, column, error) from error
        rgba = np.asarray(region)
        if (rgba[..., 3] == 255).all():
            return rgba[..., :3], 3 * height * width
        alpha = rgba[..., 3:].astype(np.uint16)
        mixed = (rgba[..., :3] * alpha + self._empty * (255 - alpha) + 127) // 255
        return mixed.astype(np.uint8), 3 * height * width

    def close(self) -> None:
        """Close the file and release its tiles."""
        super().close()
        self._slide.close()


def _tile_side(properties: Any, level: int, side: str) -> int:
    """Side of the tiles that the file has at a level, or a multiple where they are small."""
    stated = int(properties.get(f"openslide.level[{level}].tile-{side}", _TILE))
    return stated * -(-_MIN_TILE // stated)


def _mpp(properties: Any) -> float | None:
    x, y = (number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    mpp = None if x is None or y is None else same_sides(x, y)
    return mpp if mpp is not None and is_credible(mpp) else None
