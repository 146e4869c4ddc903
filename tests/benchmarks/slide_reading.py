"""A whole slide that is made tile by tile, and what reading patches from it costs in bytes and time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stalign.slide import TiffImage, read_patches
from stalign.slide._cache import TileCache
from stalign.slide._plan import tile_order

PALETTE = 16
"""How many different tiles a made slide has; their order is drawn, so that neighbours differ."""
MPP = 0.25


@cache
def _palette(tile: int) -> np.ndarray:
    """(PALETTE, tile, tile, 3) uint8: stained ground with nuclei, fibres and a scanner's noise."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(7)
    haematoxylin, eosin = np.array([0.62, 0.70, 0.32]), np.array([0.08, 0.74, 0.34])
    tiles = []
    for number in range(PALETTE):
        smooth = [
            gaussian_filter(rng.standard_normal((tile, tile)).astype(np.float32), s, mode="wrap") for s in (3, 12)
        ]
        fine, coarse = (field / field.std() for field in smooth)
        # Every tile has its own share of nuclei, so that levels of a pyramid differ from place to place.
        nuclei = np.clip((fine - 1.6 + 0.08 * number) * 3, 0, 1)
        density = nuclei[..., None] * haematoxylin + (0.25 + 0.1 * coarse)[..., None] * eosin
        noise = rng.normal(0, 2, (tile, tile, 3))
        tiles.append(np.clip(243 * np.exp(-np.clip(density, 0, None)) + noise, 0, 255).astype(np.uint8))
    return np.stack(tiles)


def _shrunk(tiles: np.ndarray, factor: int) -> np.ndarray:
    n, side = tiles.shape[:2]
    small = side // factor
    return tiles.reshape(n, small, factor, small, factor, 3).mean(axis=(2, 4)).round().astype(np.uint8)


def _order(side: int, tile: int) -> np.ndarray:
    """Number of the palette's tile at every place of level 0."""
    n = -(-side // tile)
    return np.random.default_rng(11).integers(0, PALETTE, (n, n))


def _encoded_level(side: int, tile: int, factor: int, quality: int) -> Iterator[bytes]:
    """Yield the JPEG tiles of a level, row by row; never more than a few tiles are held."""
    import imagecodecs

    order = _order(side, tile)
    small = _shrunk(_palette(tile), factor) if factor > 1 else _palette(tile)
    part = small.shape[1]
    known: dict[bytes, bytes] = {}
    n = math.ceil(math.ceil(side / factor) / tile)
    for row in range(n):
        for column in range(n):
            numbers = order[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
            key = numbers.tobytes() + bytes(numbers.shape)
            if key not in known or len(numbers) > 1:
                block = np.full((tile, tile, 3), 243, dtype=np.uint8)
                for (i, j), number in np.ndenumerate(numbers):
                    block[i * part : (i + 1) * part, j * part : (j + 1) * part] = small[number]
                encoded = imagecodecs.jpeg8_encode(block, level=quality, colorspace="RGB", outcolorspace="YCBCR")
                if factor > 1:
                    yield encoded
                    continue
                known[key] = encoded
            yield known[key]


def make_tiled_tiff(
    path: str | Path, side: int, tile: int = 512, *, levels: int = 4, mpp: float = MPP, quality: int = 80
) -> Path:
    """Write a square JPEG pyramid (YCbCr, tiled, BigTIFF) without ever holding the picture.

    Parameters
    ----------
    path
        The file, overwritten.
    side
        Side of level 0 in pixels.
    tile
        Side of the tiles in pixels, a multiple of 16 and of ``4 ** (levels - 1)``.
    levels
        Number of levels, each a quarter of the side of the one before; 1 writes a flat file.
    mpp
        µm per pixel that the file states.
    quality
        Of JPEG, 1 to 100.

    Returns
    -------
    The path.
    """
    import tifffile

    path = Path(path)
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for level in range(levels):
            factor = 4**level
            rows = -(-side // factor)
            tif.write(
                _encoded_level(side, tile, factor, quality),
                shape=(rows, rows, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                subifds=levels - 1 if level == 0 and levels > 1 else None,
                subfiletype=1 if level else 0,
                resolution=(10_000 / (mpp * factor), 10_000 / (mpp * factor)),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


class BytesRead(NamedTuple):
    """What was read from a file, and what had to be."""

    bytes_read: int
    bytes_touched: int
    tiles_decoded: int
    tiles_touched: int

    @property
    def ratio(self) -> float:
        return self.bytes_read / self.bytes_touched


def touched_bytes(path: str | Path, centers: np.ndarray, patches: Sequence[tuple[float, int]]) -> tuple[int, int]:
    """Bytes and number of a file's tiles that patches lie on, worked out from the file's tables alone.

    Parameters
    ----------
    path
        A tiled TIFF.
    centers
        (n, 2) centres (x, y) in level-0 pixels.
    patches
        Side in level-0 pixels and in target pixels of every patch that is cut at a centre.
    """
    import tifffile

    touched: dict[int, set[tuple[int, int]]] = {}
    total = 0
    with tifffile.TiffFile(path) as file:
        pages = [level.keyframe for level in file.series[0].levels]
        for side, pixels in patches:
            factors = [pages[0].imagewidth / page.imagewidth for page in pages]
            level = max(i for i, factor in enumerate(factors) if factor <= max(side / pixels, 1) * 1.001)
            page, factor = pages[level], pages[0].imagewidth / pages[level].imagewidth
            tile, size = (page.tilewidth, page.tilelength), (page.imagewidth, page.imagelength)
            low, high = ((centers + sign * side / 2) / factor for sign in (-1, 1))
            inside = ((high > 0) & (low < size)).all(axis=1)
            first = np.maximum(low[inside], 0) // tile
            last = np.minimum(np.ceil(high[inside]) - 1, np.array(size) - 1) // tile
            corners = np.unique(np.concatenate([first, last], axis=1).astype(int), axis=0)
            found = touched.setdefault(level, set())
            for x0, y0, x1, y1 in corners:
                found.update((x, y) for x in range(x0, x1 + 1) for y in range(y0, y1 + 1))
        for level, tiles in touched.items():
            page = pages[level]
            per_row = -(-page.imagewidth // page.tilewidth)
            total += sum(page.databytecounts[y * per_row + x] for x, y in tiles)
    return total, sum(map(len, touched.values()))


def measure_bytes(
    path: str | Path,
    centers: np.ndarray,
    patches: Sequence[tuple[float, int]],
    *,
    order: np.ndarray | None = None,
    batch_size: int = 256,
    num_workers: int = 2,
    cache_bytes: int | None = None,
) -> BytesRead:
    """Read all patches batch by batch with threads, and count what the file gave.

    Parameters
    ----------
    path, centers, patches
        As in :func:`touched_bytes`.
    order
        The order of the spots; ``None`` takes that of :meth:`stalign.slide._library.PatchReader.order`.
    batch_size, num_workers
        Spots of one batch, and threads that read batches.
    cache_bytes
        Bytes of decoded tiles that are kept; ``None`` takes the setting.
    """
    cache = TileCache(cache_bytes)
    with TiffImage(path, cache=cache) as image, ThreadPoolExecutor(num_workers) as pool:
        if order is None:
            order = tile_order(image, centers, patches)
        ahead: deque = deque()
        for start in range(0, len(order), batch_size):
            batch = centers[order[start : start + batch_size]]
            ahead.append(pool.submit(lambda xy: [read_patches(image, xy, *patch).shape for patch in patches], batch))
            if len(ahead) > num_workers:
                ahead.popleft().result()
        for task in ahead:
            task.result()
        counters = image.counters
        return BytesRead(
            counters.bytes_read,
            (touched := touched_bytes(path, centers, patches))[0],
            counters.tiles_decoded,
            touched[1],
        )


@contextmanager
def counted() -> Iterator[list[TiffImage]]:
    """Collect the TIFFs that are opened meanwhile, closed or not, for their counters."""
    opened: list[TiffImage] = []
    original = TiffImage.__init__

    def remember(self: TiffImage, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        opened.append(self)

    TiffImage.__init__ = remember  # type: ignore[method-assign]
    try:
        yield opened
    finally:
        TiffImage.__init__ = original  # type: ignore[method-assign]


def decode_alone(path: str | Path, centers: np.ndarray, patches: Sequence[tuple[float, int]]) -> float:
    """Seconds to decode every tile that the patches lie on once, in one thread, and nothing else."""
    with TiffImage(path, cache=TileCache(1)) as image:
        start = time.perf_counter()
        for side, pixels in patches:
            level, _ = image.reduction_for(side / pixels)
            grid, factor = image._grids[level, 1], image.level_downsamples[level]
            low, high = ((centers + sign * side / 2) / factor for sign in (-1, 1))
            tall, wide = grid.tile_size
            places = np.concatenate([np.floor(low / (wide, tall)), np.floor((high - 1e-9) / (wide, tall))], axis=1)
            tiles = {
                (row, column)
                for x0, y0, x1, y1 in np.unique(places.astype(int), axis=0)
                for row in range(max(y0, 0), min(y1, grid.shape[0] - 1) + 1)
                for column in range(max(x0, 0), min(x1, grid.shape[1] - 1) + 1)
            }
            for row, column in tiles:
                image._decode(level, row, column)
        return time.perf_counter() - start


def read_all(
    path: str | Path, centers: np.ndarray, patches: Sequence[tuple[float, int]], batch_size: int = 256
) -> float:
    """Seconds to read and resample all patches in one thread, from a file just opened."""
    with TiffImage(path, cache=TileCache()) as image:
        start = time.perf_counter()
        order = tile_order(image, centers, patches)
        for first in range(0, len(order), batch_size):
            for side, pixels in patches:
                read_patches(image, centers[order[first : first + batch_size]], side, pixels)
        return time.perf_counter() - start
