"""Images that are decoded tile by tile, each tile once."""

from __future__ import annotations

import itertools
import sys
import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stalign.slide._cache import TileCache, shared_cache
from stalign.slide._convert import channels_to_rgb, sixteen_bit_divisor, to_uint8
from stalign.slide._image import SlideImage, halve, natural_downsample

_MAX_CELL_PIXELS = 2**24
"""Largest piece of a level that is averaged at once, unless a single tile is larger."""
_PROBES = 6
_PROBE_SIDE = 96
"""A level is compared with the next finer one at so many places, in squares of so many pixels."""
_MIN_CONTRAST = 3.0
_MIN_CORRELATION = 0.2
"""Every fourth pixel of pure noise still correlates by 0.25 with the means of four by four."""
_numbers = itertools.count()


@dataclass(frozen=True)
class TileGrid:
    """How a level is cut into tiles.

    Attributes
    ----------
    rows, columns
        Edges of the tiles in pixels, from 0 to the height and the width.
    """

    rows: np.ndarray
    columns: np.ndarray

    @classmethod
    def regular(cls, height: int, width: int, tall: int, wide: int) -> TileGrid:
        """Tiles of one size; the last ones are cut off."""
        return cls(np.append(np.arange(0, height, tall), height), np.append(np.arange(0, width, wide), width))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the level."""
        return int(self.rows[-1]), int(self.columns[-1])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns of tiles."""
        return len(self.rows) - 1, len(self.columns) - 1

    @property
    def tile_size(self) -> tuple[int, int]:
        """Height and width of the largest tile."""
        return int(np.diff(self.rows).max()), int(np.diff(self.columns).max())

    def window(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a tile."""
        top, left = int(self.rows[row]), int(self.columns[column])
        return top, left, int(self.rows[row + 1]) - top, int(self.columns[column + 1]) - left

    def touched(self, top: int, left: int, height: int, width: int) -> tuple[range, range]:
        """Rows and columns of the tiles that a window touches."""
        first = np.searchsorted(self.rows, [top, top + height - 1], side="right") - 1
        second = np.searchsorted(self.columns, [left, left + width - 1], side="right") - 1
        return range(int(first[0]), int(first[1]) + 1), range(int(second[0]), int(second[1]) + 1)

    def reduced(self, factor: int) -> TileGrid | None:
        """Grid of the level shrunk by a factor, cut where tiles are cut; ``None`` where its pieces would be too large.

        A piece must begin at a multiple of the factor, so that its pixels are averages of whole squares.
        """
        edges = []
        for axis in (self.rows, self.columns):
            inner = axis[:-1]
            edges.append(np.append(inner[inner % factor == 0], axis[-1]))
        piece = int(np.diff(edges[0]).max()) * int(np.diff(edges[1]).max())
        tile = self.tile_size
        if piece > max(_MAX_CELL_PIXELS, tile[0] * tile[1]):
            return None
        return TileGrid(*(-(-axis // factor) for axis in edges))


@dataclass
class ReadCounters:
    """What has been read from an image since it was opened.

    Attributes
    ----------
    bytes_read
        Bytes of the tiles that were read: as they lie in a TIFF, decoded for zarr, dask and OpenSlide.
    tiles_decoded
        How many tiles were decoded; one that was dropped from the cache and decoded again counts twice.
    """

    bytes_read: int = 0
    tiles_decoded: int = 0


class TiledImage(SlideImage):
    """An image whose tiles are decoded when they are needed and kept in a cache that is bounded in bytes.

    Where a level is much finer than what is asked for, averages of 2, 4, 8, … pixels are made from each tile when it
    is decoded, and kept in the same cache: a file without coarse levels is decoded once all the same.

    Parameters
    ----------
    name
        For messages.
    grids
        The tiles of every level, from fine to coarse.
    mpp
        µm per level-0 pixel, where known.
    cache
        Where decoded tiles are kept; ``None`` takes the one that all images share.
    downsamples
        How many level-0 pixels one pixel of each level spans; ``None`` takes it from the sizes.

    Attributes
    ----------
    counters
        A :class:`ReadCounters`.
    """

    def __init__(
        self,
        name: str,
        grids: Sequence[TileGrid],
        *,
        mpp: float | None = None,
        cache: TileCache | None = None,
        downsamples: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.mpp = mpp
        self.counters = ReadCounters()
        self.height, self.width = grids[0].size
        self.level_downsamples = downsamples or check_levels(name, [grid.size for grid in grids])
        self._grids = {(level, 1): grid for level, grid in enumerate(grids)}
        self._number = next(_numbers)
        self._cache = shared_cache if cache is None else cache
        # A level that is one large piece cannot be read but whole: it stays until the image is closed.
        self._whole = TileCache(limit=sys.maxsize)
        self._wanted: dict[int, tuple[int, ...]] = {}
        self._lock = threading.Lock()
        self._compared = {0}
        self._compare_lock = threading.Lock()
        self._closed = False
        self._channel_axis = 2
        self._divisor: int | None = None

    @abstractmethod
    def _raw(self, level: int, row: int, column: int) -> tuple[np.ndarray, int]:
        """Return a tile in the file's own type and layout, and how many bytes were read for it."""

    def _decode(self, level: int, row: int, column: int) -> tuple[np.ndarray, int]:
        """Return a tile as (height, width, 3) uint8, and how many bytes were read for it."""
        raw, size = self._raw(level, row, column)
        return channels_to_rgb(to_uint8(raw, self._divisor), self._channel_axis), size

    def _find_divisor(self) -> int:
        """Tell whether 16-bit pixels hold 8-bit values, from the coarsest level or tiles all over it."""
        level = len(self.level_downsamples) - 1
        n_rows, n_columns = self._grids[level, 1].shape
        height, width = self.level_size(level)
        if height * width <= _MAX_CELL_PIXELS:
            places = [(row, column) for row in range(n_rows) for column in range(n_columns)]
        else:
            spread = [np.unique(np.linspace(0, n - 1, 4).astype(int)).tolist() for n in (n_rows, n_columns)]
            places = list(itertools.product(*spread))
        # The first value above 255 decides.
        return 257 if any(sixteen_bit_divisor(self._raw(level, *place)[0]) == 257 for place in places) else 1

    def _damaged(self, level: int, row: int, column: int, error: Exception) -> ValueError:
        top, left, height, width = self._grids[level, 1].window(row, column)
        return ValueError(
            f"'{self.name}' cannot be decoded at level {level}, tile ({row}, {column}), which is rows {top} to "
            f"{top + height - 1} and columns {left} to {left + width - 1}: {error}. The file is damaged there; fetch "
            "or export it again."
        )

    def level_size(self, level: int) -> tuple[int, int]:
        """Return (height, width) of a level."""
        return self._grids[level, 1].size

    def reduction_for(self, shrink: float) -> tuple[int, int]:
        """Return the level to read for a target pixel of ``shrink`` level-0 pixels, and by how much to average it.

        The averages stay twice as fine as the target.
        """
        level = self.level_for(shrink)
        factor = 1
        while shrink / self.level_downsamples[level] / (2 * factor) >= 2 and self._offers(level, 2 * factor):
            factor *= 2
        if factor not in self._wanted.get(level, ()):
            with self._lock:
                self._wanted[level] = tuple(sorted({*self._wanted.get(level, ()), factor}))
        return level, factor

    def tile_side(self, level: int, factor: int) -> tuple[int, int]:
        """Height and width of the largest tile of a level in pixels of that level averaged by ``factor``."""
        return self._grids[level, factor].tile_size

    def check_content(self, level: int, centers: np.ndarray) -> None:
        """Refuse a level that shows something else than the next finer one; looked at once, where patches are read.

        A file can hold a cut-out, another section or another staining where a reader looks for a smaller copy. Places
        without structure tell nothing.

        Parameters
        ----------
        level
            The level that is about to be read.
        centers
            (n, 2) places (x, y) in level-0 pixels.
        """
        with self._compare_lock:
            if level in self._compared:
                return
            probes = centers[np.linspace(0, len(centers) - 1, min(_PROBES, len(centers))).astype(np.intp)]
            pairs = [pair for pair in (self._probe(level, center) for center in probes) if pair is not None]
            if pairs:
                coarse, fine = (np.concatenate(side) for side in zip(*pairs, strict=True))
                if min(coarse.std(), fine.std()) >= _MIN_CONTRAST:
                    correlation = float(np.corrcoef(coarse, fine)[0, 1])
                    if correlation < _MIN_CORRELATION:
                        tall, wide = self.level_size(level)
                        raise ValueError(
                            f"The levels of '{self.name}' disagree: level {level} ({tall} × {wide} pixels) shows "
                            f"something else than level {level - 1} (correlation {correlation:.2f} where patches lie). "
                            "It is no smaller copy. Save the pyramid again, or level 0 alone."
                        )
            self._compared.add(level)

    def _probe(self, level: int, center: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Structure of a square around a place in a level and in the next finer one, 32 × 32 values of mean 0."""
        from PIL import Image

        ratio = self.level_downsamples[level] / self.level_downsamples[level - 1]
        side = round(_PROBE_SIDE * ratio)
        finer = self._grids[level - 1, 1]
        place = center[::-1] / self.level_downsamples[level - 1]
        if (place < 0).any() or (place >= finer.size).any():
            return None
        # Within one tile of the finer level where it fits, since its tiles are read for this alone.
        rows, columns = finer.touched(int(place[0]), int(place[1]), 1, 1)
        *corner, tall, wide = finer.window(rows[0], columns[0])
        last = np.add(corner, (tall, wide)) - side - ratio
        top, left = np.ceil(np.maximum(np.minimum(place - side / 2, last), corner) / ratio).astype(int).tolist()
        height, width = self.level_size(level)
        first = round(top * ratio), round(left * ratio)
        if top + _PROBE_SIDE > height or left + _PROBE_SIDE > width:
            return None
        if first[0] + side > finer.size[0] or first[1] + side > finer.size[1]:
            return None
        windows = (
            self._read(level, top, left, _PROBE_SIDE, _PROBE_SIDE),
            self._read(level - 1, *first, side, side),
        )
        size = (_PROBE_SIDE // 3, _PROBE_SIDE // 3)
        coarse, fine = (
            np.asarray(
                Image.fromarray(window).convert("L").resize(size, Image.Resampling.BOX), dtype=np.float64
            ).ravel()
            for window in map(np.ascontiguousarray, windows)
        )
        # Two places of different brightness are alike in any two pictures of tissue; what is in a place is not.
        return coarse - coarse.mean(), fine - fine.mean()

    def _offers(self, level: int, factor: int) -> bool:
        if (level, factor) not in self._grids:
            grid = self._grids[level, 1].reduced(factor)
            if grid is None:
                return False
            self._grids[level, factor] = grid
        return True

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self._window(level, 1, top, left, height, width)

    def _window(self, level: int, factor: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Put a window together from tiles; a view of the cached tile where one holds all of it."""
        grid = self._grids[level, factor]
        rows, columns = grid.touched(top, left, height, width)
        out = None
        for row in rows:
            for column in columns:
                tile = self._tile(level, factor, row, column)
                first, second, tall, wide = grid.window(row, column)
                r0, r1 = max(first, top), min(first + tall, top + height)
                c0, c1 = max(second, left), min(second + wide, left + width)
                part = tile[r0 - first : r1 - first, c0 - second : c1 - second]
                if part.shape == (height, width, 3):
                    return part
                if out is None:
                    out = np.empty((height, width, 3), dtype=np.uint8)
                out[r0 - top : r1 - top, c0 - left : c1 - left] = part
        if out is None:
            raise ValueError(f"The window of {height} × {width} pixels is empty.")
        return out

    def _tile(self, level: int, factor: int, row: int, column: int) -> np.ndarray:
        if self._closed:
            raise ValueError(f"'{self.name}' is closed. Open it again with `open_image`.")
        grid = self._grids[level, factor]
        tall, wide = grid.tile_size
        cache = self._whole if grid.shape == (1, 1) and 12 * tall * wide > self._cache.limit else self._cache
        return cache.get((self._number, level, factor, row, column), lambda: self._make(level, factor, row, column))

    def _make(self, level: int, factor: int, row: int, column: int) -> np.ndarray:
        if factor == 1:
            tile = self._decoded(level, row, column)
        else:
            tile, step = self._finer(level, factor, row, column)
            for _ in range(step.bit_length() - 1):
                tile = halve(tile)
        tile = np.ascontiguousarray(tile)
        tile.flags.writeable = False
        return tile

    def _finer(self, level: int, factor: int, row: int, column: int) -> tuple[np.ndarray, int]:
        """Return the pixels of a tile of averages at a finer step, and by how much they are finer.

        They come from the next finer averages that are in use, so that two patch sizes share one decoding. Halving
        again and again gives the same values on every way.
        """
        finer = max((known for known in self._wanted.get(level, ()) if known < factor), default=None)
        step = factor // (finer or 1)
        height, width = self._grids[level, finer or 1].size
        top, left, tall, wide = (step * value for value in self._grids[level, factor].window(row, column))
        tall, wide = min(tall, height - top), min(wide, width - left)
        if finer is None:
            # Nobody reads these pixels themselves: where they are one tile, it need not be kept.
            rows, columns = self._grids[level, 1].touched(top, left, tall, wide)
            if len(rows) == len(columns) == 1 and self._grids[level, 1].window(rows[0], columns[0])[2:] == (tall, wide):
                return self._decoded(level, rows[0], columns[0]), step
        return self._window(level, finer or 1, top, left, tall, wide), step

    def _decoded(self, level: int, row: int, column: int) -> np.ndarray:
        tile, size = self._decode(level, row, column)
        with self._lock:
            self.counters.bytes_read += size
            self.counters.tiles_decoded += 1
        return tile

    def close(self) -> None:
        """Release the tiles, and the file where there is one."""
        self._closed = True
        self._cache.drop(self._number)
        self._whole.drop(self._number)


def check_levels(name: str, sizes: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """Return how many level-0 pixels a pixel of each level spans; refuse levels that are no smaller copies.

    Each level may have lost a pixel to rounding at every halving.
    """
    height, width = sizes[0]
    for number, (tall, wide) in enumerate(sizes[1:], start=1):
        above = sizes[number - 1]
        if tall > above[0] or wide > above[1]:
            raise ValueError(
                f"The levels of '{name}' disagree: level {number} has {tall} × {wide} pixels, more than level "
                f"{number - 1} with {above[0]} × {above[1]}. Save the pyramid again, or level 0 alone."
            )
        factors = height / tall, width / wide
        # The sides of a level are whole numbers, rounded up or down at each halving.
        slack = 1 + np.log2(max(factors))
        low = max(height / (tall + slack), width / (wide + slack))
        high = min(height / max(tall - slack, 0.5), width / max(wide - slack, 0.5))
        if low > high:
            raise ValueError(
                f"The levels of '{name}' disagree: level 0 has {height} × {width} pixels, level {number} {tall} × "
                f"{wide}, which is {factors[0]:.4g} times lower and {factors[1]:.4g} times narrower. Save the pyramid "
                "again, or level 0 alone."
            )
    return tuple(natural_downsample(sizes[0], size) for size in sizes)
