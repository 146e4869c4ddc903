"""One face for pixels in memory, in files and in stores."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from stalign._settings import settings
from stalign._validate import check_positive
from stalign.slide._convert import to_rgb_uint8

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jp2", ".webp", ".bmp")
_MIN_SIDE = 128
_BACKGROUND_SAMPLE = 1_000_000
_BAND_PIXELS = 2**24


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
        window = self._read(level, int(top), int(left), int(height), int(width))
        # Tiles that are kept for other readers must not be written into.
        return window if window.flags.writeable else window.copy()

    def level_for(self, shrink: float) -> int:
        """Return the coarsest level that is at least as fine as a target pixel of ``shrink`` level-0 pixels."""
        fine_enough = [
            i for i, downsample in enumerate(self.level_downsamples) if downsample <= max(shrink, 1.0) * 1.001
        ]
        return max(fine_enough, key=lambda i: self.level_downsamples[i])

    def reduction_for(self, shrink: float) -> tuple[int, int]:
        """Return the level to read for a target pixel of ``shrink`` level-0 pixels, and by how much to average it."""
        return self.level_for(shrink), 1

    def _window(self, level: int, factor: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Return a window of a level that is averaged by ``factor``, in pixels of the averages."""
        return self._read(level, top, left, height, width)

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
        shrink = max(1.0, max(self.height, self.width) / max_side)
        level, factor = self.reduction_for(shrink)
        height, width = (-(-side // factor) for side in self.level_size(level))
        spanned = self.level_downsamples[level] * factor
        if shrink / spanned <= 1.001:
            return self._window(level, factor, 0, 0, height, width), spanned
        target = (max(1, round(self.height / shrink)), max(1, round(self.width / shrink)))
        return self._box_resized(level, factor, (height, width), target), self.height / target[0]

    def _box_resized(self, level: int, factor: int, size: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
        """Average a whole level down to a small size, band by band."""
        from PIL import Image

        ratio = size[0] / target[0]
        out = np.empty((*target, 3), dtype=np.uint8)
        step = max(1, int(_BAND_PIXELS / (size[1] * ratio)))
        for first in range(0, target[0], step):
            last = min(first + step, target[0])
            top, bottom = int(first * ratio), min(int(np.ceil(last * ratio)), size[0])
            band = Image.fromarray(np.ascontiguousarray(self._window(level, factor, top, 0, bottom - top, size[1])))
            box = (0, first * ratio - top, size[1], min(last * ratio, size[0]) - top)
            out[first:last] = np.asarray(band.resize((target[1], last - first), resample=Image.Resampling.BOX, box=box))
        return out

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
        self._lock = threading.Lock()
        self.height, self.width = self._levels[0].shape[:2]
        depth = max(0, int(np.floor(np.log2(max(1.0, min(self.height, self.width) / _MIN_SIDE)))))
        self.level_downsamples = tuple(float(2**i) for i in range(depth + 1))

    def level_array(self, level: int) -> np.ndarray:
        """Return a whole level, (height, width, 3) uint8."""
        with self._lock:
            while len(self._levels) <= level:
                self._levels.append(halve(self._levels[-1]))
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


def halve(array: np.ndarray) -> np.ndarray:
    """Average 2 × 2 pixels of a (height, width, 3) uint8 image; an odd last row or column stands twice."""
    height, width = array.shape[:2]
    rows, columns = -(-height // 2), -(-width // 2)
    out = np.empty((rows, columns, 3), dtype=np.uint8)
    # In bands, so that the sums of a large image are never all there.
    step = max(1, _BAND_PIXELS // (16 * max(width, 1)))
    for first in range(0, rows, step):
        band = array[2 * first : 2 * (first + step)]
        upper, lower = band[0::2], band[1::2]
        total = upper.astype(np.uint16)
        total[: len(lower)] += lower
        if len(lower) < len(upper):
            total[-1] *= 2
        # Colour by colour over flat rows: long strided sums are several times as fast as sums of three.
        flat = total.reshape(len(total), 3 * width)
        for channel in range(3):
            left, right = flat[:, channel::6], flat[:, channel + 3 :: 6]
            sums = left + np.uint16(2)
            sums[:, : right.shape[1]] += right
            if right.shape[1] < left.shape[1]:
                sums[:, -1] += left[:, -1]
            out[first : first + len(sums), :, channel] = sums >> 2
    return out


def natural_downsample(full: tuple[int, int], reduced: tuple[int, int]) -> float:
    """Return the factor between two levels: the whole number behind rounded sizes, else the mean of both ratios."""
    ratios = (full[0] / reduced[0], full[1] / reduced[1])
    whole = round(sum(ratios) / 2)
    exact = whole >= 1 and all(abs(side - small * whole) < whole for side, small in zip(full, reduced, strict=True))
    return float(whole) if exact else sum(ratios) / 2


_picture_lock = threading.Lock()


@contextmanager
def open_picture(path: Path) -> Iterator[Any]:
    """Open a PNG or JPEG with Pillow, without decoding it."""
    from PIL import Image, UnidentifiedImageError

    # Pillow's own limit guesses at an attack and is a global; ours is an argument and is checked by the caller.
    with _picture_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(path)
        except UnidentifiedImageError as error:
            raise ValueError(f"'{path.name}' cannot be read as an image; is the file complete?") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with picture:
        yield picture


def picture_size(path: Path) -> tuple[int, int]:
    """Return width and height of a PNG or JPEG; only its header is read."""
    with open_picture(path) as picture:
        return picture.size


def pixel_limit(max_pixels: int | None) -> int:
    """Return the largest number of pixels that may be decoded at once: what is passed, else the setting."""
    return settings.max_image_pixels if max_pixels is None else check_positive("max_pixels", max_pixels, integer=True)


def check_whole(name: str, size: tuple[int, int], max_pixels: int, piece: str = "") -> None:
    """Refuse a picture, or a piece of one, that can only be decoded as a whole and is larger than ``max_pixels``."""
    height, width = size
    if height * width > max_pixels:
        raise ValueError(
            f"'{name}' has {piece}{height} × {width} pixels and can only be decoded as a whole: more than the limit of "
            f"{max_pixels} pixels. Convert it to a tiled TIFF; or, if you trust the file and have the memory, pass "
            "`max_pixels=...` to `stalign.slide.open_image` or raise `stalign.settings.max_image_pixels`."
        )
