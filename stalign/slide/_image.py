"""One face for pixels in memory, in a TIFF and in a zarr store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from stalign.slide._convert import (
    channels_to_rgb,
    check_dtype,
    pixel_layout,
    sixteen_bit_divisor,
    to_rgb_uint8,
    to_uint8,
)

MAX_PIXELS = 2**31
"""Largest picture that is decoded as a whole; larger ones must be tiled."""

_TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".svs", ".ndpi", ".scn", ".qptiff", ".bif", ".lsm")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jp2", ".webp", ".bmp")
_MIN_SIDE = 128
_BACKGROUND_SAMPLE = 1_000_000
_THUMBNAIL_READ = 400_000_000


class SlideImage(ABC):
    """A picture of a slide that is read in windows.

    Attributes
    ----------
    height, width
        Size of level 0 in pixels.
    level_downsamples
        How many level-0 pixels one pixel of each level spans; the first is 1.
    mpp
        µm per level-0 pixel as the file's metadata says, or ``None``.
    """

    height: int
    width: int
    level_downsamples: tuple[float, ...] = (1.0,)
    mpp: float | None = None

    def __init__(self) -> None:
        self._background: np.ndarray | None = None

    @abstractmethod
    def level_size(self, level: int) -> tuple[int, int]:
        """Return (height, width) of a level."""

    @abstractmethod
    def _read(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Return a window that is known to lie inside as (height, width, 3) uint8."""

    def read_region(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Read a window that lies inside a level.

        Parameters
        ----------
        level
            Pyramid level, 0 is the finest.
        top, left, height, width
            The window in pixels of that level.

        Returns
        -------
        (height, width, 3) uint8.

        Raises
        ------
        ValueError
            If there is no such level or the window does not lie inside.
        """
        if not 0 <= level < len(self.level_downsamples):
            raise ValueError(f"level={level} does not exist; the image has {len(self.level_downsamples)} levels.")
        rows, columns = self.level_size(level)
        if top < 0 or left < 0 or height < 1 or width < 1 or top + height > rows or left + width > columns:
            raise ValueError(
                f"The window (top={top}, left={left}, height={height}, width={width}) does not lie inside "
                f"level {level} of {rows} × {columns} pixels."
            )
        return self._read(level, int(top), int(left), int(height), int(width))

    def level_for(self, shrink: float) -> int:
        """Return the coarsest level that is at least as fine as a target pixel of ``shrink`` level-0 pixels."""
        fine_enough = [
            i for i, downsample in enumerate(self.level_downsamples) if downsample <= max(shrink, 1.0) * 1.001
        ]
        return max(fine_enough, key=lambda i: self.level_downsamples[i])

    @property
    def background(self) -> np.ndarray:
        """Colour of the empty slide, (3,) uint8; the most frequent bright and grey tone, else white."""
        if self._background is None:
            self._background = bright_mode(self._overview())
        return self._background

    def _overview(self) -> np.ndarray:
        """Return a small sample of the whole picture."""
        level = len(self.level_downsamples) - 1
        height, width = self.level_size(level)
        step = int(np.ceil(np.sqrt(height * width / _BACKGROUND_SAMPLE)))
        if step <= 4:
            return self._read(level, 0, 0, height, width)[::step, ::step]
        # A large picture without coarse levels: a grid of small windows instead of all its pixels.
        side = max(1, min(256, height // 4, width // 4))
        tops = np.linspace(0, height - side, 4).astype(int)
        lefts = np.linspace(0, width - side, 4).astype(int)
        return np.concatenate([self._read(level, int(t), int(c), side, side) for t in tops for c in lefts])

    def thumbnail(self, max_side: int = 2000) -> tuple[np.ndarray, float]:
        """Return a small copy to show, and how many level-0 pixels one of its pixels spans.

        Parameters
        ----------
        max_side
            Longest side of the copy.

        Returns
        -------
        (height, width, 3) uint8, and the factor; the picture itself where it is small enough.
        """
        factor = max(1.0, max(self.height, self.width) / max_side)
        level = SlideImage.level_for(self, factor)
        height, width = self.level_size(level)
        rest = factor / self.level_downsamples[level]
        if rest <= 1.001:
            return self._read(level, 0, 0, height, width), self.level_downsamples[level]
        target = (max(1, round(height / rest)), max(1, round(width / rest)))
        if height * width > _THUMBNAIL_READ:
            # Too much to read for a glance: every so-many-th row of pixels.
            return self._strided(level, target), self.height / target[0]
        from PIL import Image

        picture = Image.fromarray(np.ascontiguousarray(self._read(level, 0, 0, height, width)))
        small = np.asarray(picture.resize(target[::-1], Image.Resampling.BOX))
        return small, self.height / target[0]

    def _strided(self, level: int, target: tuple[int, int]) -> np.ndarray:
        height, width = self.level_size(level)
        rows = ((np.arange(target[0]) + 0.5) * height / target[0]).astype(np.intp)
        columns = ((np.arange(target[1]) + 0.5) * width / target[1]).astype(np.intp)
        return np.stack([self._read(level, int(row), 0, 1, width)[0, columns] for row in rows])

    def close(self) -> None:
        """Release the file, where there is one."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        size = f"{self.height} × {self.width} pixels"
        return f"{type(self).__name__}({size}, {len(self.level_downsamples)} levels, mpp={self.mpp})"


def bright_mode(pixels: np.ndarray) -> np.ndarray:
    """Most frequent bright, nearly grey colour of (..., 3) uint8 pixels; white where under 0.5 % are such."""
    pixels = pixels.reshape(-1, 3)
    chroma = pixels.max(axis=1).astype(np.int16) - pixels.min(axis=1)
    light = pixels.mean(axis=1)
    # Scans differ in exposure: bright is relative to the picture's own lights.
    empty = (chroma <= 40) & (light >= max(80.0, 0.75 * float(np.percentile(light, 99))))
    if empty.sum() < max(1, 0.005 * len(pixels)):
        return np.full(3, 255, dtype=np.uint8)
    tone = (light[empty] // 4).astype(np.intp)
    mode = np.bincount(tone, minlength=64).argmax()
    return np.median(pixels[empty][tone == mode], axis=0).astype(np.uint8)


class ArrayImage(SlideImage):
    """Pixels in memory. Coarser levels are averaged from them when they are first needed.

    Parameters
    ----------
    array
        An image that :func:`~stalign.slide.to_rgb_uint8` takes; 8-bit RGB is used as it is, without a copy.
    """

    def __init__(self, array: np.ndarray) -> None:
        super().__init__()
        self._levels = [to_rgb_uint8(array)]
        self.height, self.width = self._levels[0].shape[:2]
        depth = max(0, int(np.floor(np.log2(max(1.0, min(self.height, self.width) / _MIN_SIDE)))))
        self.level_downsamples = tuple(float(2**i) for i in range(depth + 1))

    def level_array(self, level: int) -> np.ndarray:
        """Return a whole level, (height, width, 3) uint8."""
        while len(self._levels) <= level:
            self._levels.append(_halve(self._levels[-1]))
        return self._levels[level]

    def level_size(self, level: int) -> tuple[int, int]:
        """Return (height, width) of a level."""
        step = 2**level
        return -(-self.height // step), -(-self.width // step)

    def level_for(self, shrink: float) -> int:
        """Return a level twice as fine as the target: these pixels are averages already, not a scanner's level."""
        return super().level_for(shrink / 2)

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self.level_array(level)[top : top + height, left : left + width]

    def _overview(self) -> np.ndarray:
        step = int(np.ceil(np.sqrt(self.height * self.width / _BACKGROUND_SAMPLE)))
        return self._levels[0][::step, ::step]


def _halve(array: np.ndarray) -> np.ndarray:
    """Average 2 × 2 pixels; an odd last row or column stands twice."""
    height, width = array.shape[:2]
    if height % 2 or width % 2:
        array = np.pad(array, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    total = array[0::2, 0::2].astype(np.uint16)
    total += array[1::2, 0::2]
    total += array[0::2, 1::2]
    total += array[1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)


def natural_downsample(full: tuple[int, int], reduced: tuple[int, int]) -> float:
    """Return the factor between two levels: the whole number behind rounded sizes, else the mean of both ratios."""
    ratios = (full[0] / reduced[0], full[1] / reduced[1])
    whole = round(sum(ratios) / 2)
    exact = whole >= 1 and all(abs(side - small * whole) < whole for side, small in zip(full, reduced, strict=True))
    return float(whole) if exact else sum(ratios) / 2


class LazyImage(SlideImage):
    """Levels that are array-likes outside memory (zarr, dask): only the windows asked for are read.

    Parameters
    ----------
    levels
        Array-likes from fine to coarse, all of one layout.
    mpp
        µm per pixel of the first, where known.
    """

    def __init__(self, levels: Sequence[Any], *, mpp: float | None = None) -> None:
        super().__init__()
        self._arrays = list(levels)
        self._layouts = [pixel_layout(array.shape) for array in self._arrays]
        self.height, self.width = self._layouts[0][:2]
        self.mpp = mpp
        sizes = [layout[:2] for layout in self._layouts]
        self.level_downsamples = tuple(natural_downsample(sizes[0], size) for size in sizes)
        self._divisor: int | None = None
        if check_dtype(self._arrays[0].dtype) == np.uint16:
            coarsest = self._layouts[-1]
            small = coarsest.height * coarsest.width <= 16 * _BACKGROUND_SAMPLE
            self._divisor = sixteen_bit_divisor(np.asarray(self._arrays[-1][...])) if small else 257

    def level_size(self, level: int) -> tuple[int, int]:
        """Return (height, width) of a level."""
        return self._layouts[level].height, self._layouts[level].width

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        window = (slice(top, top + height), slice(left, left + width))
        axis = self._layouts[level].channel_axis
        index = (slice(None), *window) if axis == 0 else window
        return channels_to_rgb(to_uint8(np.asarray(self._arrays[level][index]), self._divisor), axis)


def open_image(source: Any, *, max_pixels: int | None = None) -> SlideImage:
    """Open pixels wherever they are.

    Parameters
    ----------
    source
        A NumPy array, a zarr or dask array, or the path of a TIFF (flat or pyramidal, tiled or striped; OME-TIFF,
        SVS and other dialects of TIFF), of a zarr array or OME-Zarr image, or of a PNG or JPEG.
    max_pixels
        Largest picture that is decoded as a whole (PNG, JPEG, a TIFF that is one strip); ``None`` allows 2³¹.

    Returns
    -------
    A :class:`SlideImage`; close it, or use it in a ``with`` block.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the pixels cannot be read as RGB, or the picture is too large to decode as a whole.
    TypeError
        If ``source`` is something else.

    Examples
    --------
    >>> with open_image(np.zeros((300, 200, 3), dtype=np.uint8)) as image:
    ...     image.height, image.width
    (300, 200)
    """
    if isinstance(source, SlideImage):
        return source
    if isinstance(source, np.ndarray):
        return ArrayImage(source)
    if isinstance(source, (str, Path)):
        return _open_path(Path(source).expanduser(), MAX_PIXELS if max_pixels is None else max_pixels)
    if all(hasattr(source, name) for name in ("shape", "dtype", "__getitem__")):
        return LazyImage([source])
    raise TypeError(
        f"Cannot open {type(source).__name__} as an image. Pass a NumPy, zarr or dask array, or a path to a TIFF, "
        "zarr, PNG or JPEG."
    )


def _open_path(path: Path, max_pixels: int) -> SlideImage:
    if not path.exists():
        raise FileNotFoundError(f"No image at '{path}'. Pass the path of a TIFF, zarr, PNG or JPEG.")
    if path.is_dir():
        return _open_zarr(path)
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        return _open_picture(path, max_pixels)
    if suffix in _TIFF_SUFFIXES or _looks_like_tiff(path):
        from stalign.slide._tiff import TiffImage

        return TiffImage(path, max_pixels=max_pixels)
    raise ValueError(
        f"'{path.name}' is none of the formats that can be read: TIFF ({', '.join(_TIFF_SUFFIXES)}), zarr, "
        f"{', '.join(PICTURE_SUFFIXES)}. Convert it to a tiled TIFF."
    )


def _looks_like_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _open_picture(path: Path, max_pixels: int) -> ArrayImage:
    from PIL import Image

    # Pillow's own limit is a guess at an attack; ours is an argument.
    width, height = picture_size(path)
    check_whole(path, height, width, max_pixels)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as picture:
            if picture.mode == "1":
                raise ValueError(f"'{path.name}' is a 1-bit picture, a mask rather than an image. Pass an RGB image.")
            array = np.asarray(picture.convert("RGBA") if picture.mode in ("P", "PA", "LA") else picture)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return ArrayImage(array)


def picture_size(path: Path) -> tuple[int, int]:
    """Return width and height of a PNG or JPEG; only its header is read."""
    from PIL import Image, UnidentifiedImageError

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as picture:
            return picture.size
    except UnidentifiedImageError as error:
        raise ValueError(f"'{path.name}' cannot be read as an image; is the file complete?") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def check_whole(path: Path, height: int, width: int, max_pixels: int) -> None:
    """Refuse a picture that would be decoded as a whole and is larger than ``max_pixels``."""
    if height * width > max_pixels:
        raise ValueError(
            f"'{path.name}' has {height} × {width} pixels and can only be decoded as a whole "
            f"(limit max_pixels={max_pixels}). Convert it to a tiled TIFF, or raise `max_pixels`."
        )


def _open_zarr(path: Path) -> LazyImage:
    import zarr

    node = zarr.open(str(path), mode="r")
    if hasattr(node, "shape"):
        return LazyImage([node])
    attributes = dict(node.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        raise ValueError(
            f"The zarr group '{path}' is not an image: it has no 'multiscales' metadata. "
            f"It holds {sorted(node.keys())}; pass the path of one array."
        )
    return LazyImage([_plane(node[dataset["path"]]) for dataset in scales[0]["datasets"]])


def _plane(array: Any) -> Any:
    """Refuse OME-Zarr arrays with time or depth; (c, y, x) and (y, x) are images."""
    if len(array.shape) > 3:
        raise ValueError(f"An OME-Zarr image of shape {tuple(array.shape)} has time or depth. Pass one plane of it.")
    return array
