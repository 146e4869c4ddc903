"""Square patches from anywhere on a slide, resampled to one size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stalign._validate import check_positive
from stalign.slide._image import ArrayImage, SlideImage

_CHUNK_BYTES = 48 * 2**20
_MIN_BLOCK = 512


def inside_fraction(image_size_hw: tuple[int, int], centers: np.ndarray, size: float) -> np.ndarray:
    """Share of each square patch that lies inside the image.

    Parameters
    ----------
    image_size_hw
        Height and width of the image in pixels.
    centers
        (n, 2) patch centres (x, y) in image pixels; pixel i covers [i, i + 1).
    size
        Side of the patches in image pixels.

    Returns
    -------
    (n,) float32 between 0 and 1.

    Examples
    --------
    >>> inside_fraction((100, 100), np.array([[50.0, 50.0], [0.0, 50.0]]), 10)
    array([1. , 0.5], dtype=float32)
    """
    centers = _check_centers(centers)
    size = check_positive("size", size)
    extent = np.array([image_size_hw[1], image_size_hw[0]], dtype=np.float64)
    overlap = np.minimum(centers + size / 2, extent) - np.maximum(centers - size / 2, 0.0)
    return (np.clip(overlap, 0.0, None) / size).clip(max=1.0).prod(axis=1).astype(np.float32)


def read_patches(
    image: SlideImage, centers: np.ndarray, size: float, pixels: int, *, level: int | None = None
) -> np.ndarray:
    """Cut square patches and resample them to ``pixels`` × ``pixels``.

    Shrinking averages the exact area under each target pixel, enlarging interpolates bilinearly; both are exact at
    fractions of a pixel. What lies outside the image takes the colour of the slide's background. A patch depends on
    the image and its own centre only, not on which others are read with it or in which order.

    Parameters
    ----------
    image
        An open image.
    centers
        (n, 2) patch centres (x, y) in level-0 pixels; pixel i covers [i, i + 1).
    size
        Side of the patches in level-0 pixels; fractions are meant.
    pixels
        Side of the result in pixels.
    level
        Pyramid level to read from; ``None`` takes the coarsest that is still as fine as the result.

    Returns
    -------
    (n, pixels, pixels, 3) uint8.

    Raises
    ------
    ValueError
        For centres that are not (n, 2) or not finite, for sizes that are not positive and a level that is not there.

    Examples
    --------
    >>> from stalign.slide import open_image
    >>> image = open_image(np.full((64, 64, 3), 200, dtype=np.uint8))
    >>> read_patches(image, np.array([[32.0, 32.0]]), 16.0, 8).shape
    (1, 8, 8, 3)
    """
    centers = _check_centers(centers)
    size = check_positive("size", size)
    pixels = check_positive("pixels", pixels, integer=True)
    if level is None:
        level = image.level_for(size / pixels)
    elif not 0 <= level < len(image.level_downsamples):
        raise ValueError(f"level={level} does not exist; the image has {len(image.level_downsamples)} levels.")
    downsample = image.level_downsamples[level]
    corner = (centers - size / 2) / downsample
    ratio = size / downsample / pixels
    start, span = _window(corner, size / downsample, enlarge=ratio < 1)
    out = np.empty((len(centers), pixels, pixels, 3), dtype=np.uint8)
    chunk = max(1, _CHUNK_BYTES // (span * span * 3 * 4))
    for index, windows in _windows(image, level, start, span, chunk):
        weights = _weights(corner[index] - start[index], ratio, pixels, span)
        out[index] = _resample(windows, weights[:, 1], weights[:, 0])
    return out


def _check_centers(centers: np.ndarray) -> np.ndarray:
    centers = np.asarray(centers, dtype=np.float64)
    if centers.ndim != 2 or centers.shape[1] != 2:
        raise ValueError(f"Patch centres must have shape (n, 2), got {centers.shape}.")
    if not np.isfinite(centers).all():
        raise ValueError("Patch centres must be finite; some are NaN or infinite.")
    return centers


def _window(corner: np.ndarray, side: float, *, enlarge: bool) -> tuple[np.ndarray, int]:
    """First pixel (x, y) and number of pixels that a patch needs; interpolation needs one more on each side."""
    margin = 1 if enlarge else 0
    return np.floor(corner).astype(np.int64) - margin, int(np.ceil(side - 1e-9)) + 1 + 2 * margin


def _weights(offset: np.ndarray, ratio: float, pixels: int, span: int) -> np.ndarray:
    """Weights (n, 2, pixels, span) of the window's pixels in each target pixel, for x and y; rows sum to 1."""
    source = np.arange(span, dtype=np.float32)
    edge = offset[:, :, None].astype(np.float32) + np.arange(pixels, dtype=np.float32) * np.float32(ratio)
    edge = edge[..., None]
    if ratio < 1:
        weights = 1 - np.abs(edge + np.float32(ratio / 2) - (source + np.float32(0.5)))
    else:
        weights = np.minimum(edge + np.float32(ratio), source + 1)
        weights -= np.maximum(edge, source)
    np.maximum(weights, 0, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def _resample(windows: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Apply row and column weights to (n, span, span, 3) windows as two batched matrix products."""
    n, span = windows.shape[:2]
    pixels = rows.shape[1]
    planes = np.ascontiguousarray(windows.transpose(0, 1, 3, 2), dtype=np.float32).reshape(n, span, 3 * span)
    shrunk = (rows @ planes).reshape(n, pixels * 3, span)
    result = (shrunk @ columns.transpose(0, 2, 1)).reshape(n, pixels, 3, pixels)
    result += np.float32(0.5)
    np.clip(result, 0, 255, out=result)
    return result.astype(np.uint8).transpose(0, 1, 3, 2)


def _windows(
    image: SlideImage, level: int, start: np.ndarray, span: int, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices, windows) until all patches are read; near patches of a file share one read."""
    if isinstance(image, ArrayImage):
        pixels = image.level_array(level)
        for first in range(0, len(start), chunk):
            index = np.arange(first, min(first + chunk, len(start)))
            yield index, _gather(pixels, start[index], span, image)
        return
    for group in _blocks(start, max(_MIN_BLOCK, 2 * span)):
        for first in range(0, len(group), chunk):
            index = group[first : first + chunk]
            yield index, _read_group(image, level, start[index], span)


def _blocks(start: np.ndarray, side: int) -> list[np.ndarray]:
    """Group patches whose corners fall in the same square of the slide."""
    if len(start) == 0:
        return []
    block = start // side
    block -= block.min(axis=0)
    code = block[:, 1] * (block[:, 0].max() + 1) + block[:, 0]
    order = np.argsort(code, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(code[order])) + 1)


def _read_group(image: SlideImage, level: int, start: np.ndarray, span: int) -> np.ndarray:
    """Read near patches: their common rectangle at once if they fill it, else one by one."""
    height, width = image.level_size(level)
    low = np.clip(start.min(axis=0), 0, [width, height])
    high = np.clip(start.max(axis=0) + span, 0, [width, height])
    area = int(np.prod(high - low))
    if area == 0:
        return np.broadcast_to(image.background, (len(start), span, span, 3))
    if area <= len(start) * span * span:
        region = image.read_region(level, low[1], low[0], high[1] - low[1], high[0] - low[0])
        return _gather(region, start - low, span, image)
    return np.concatenate([_read_group(image, level, one[None], span) for one in start])


def _gather(pixels: np.ndarray, start: np.ndarray, span: int, image: SlideImage) -> np.ndarray:
    """Copy (n, span, span, 3) windows out of an array; parts outside take the background."""
    height, width = pixels.shape[:2]
    inside = (start >= 0).all(axis=1) & (start[:, 0] + span <= width) & (start[:, 1] + span <= height)
    if inside.all() and len(start):
        view = np.lib.stride_tricks.sliding_window_view(pixels, (span, span), axis=(0, 1))
        return view[start[:, 1], start[:, 0]].transpose(0, 2, 3, 1)
    windows = np.empty((len(start), span, span, 3), dtype=np.uint8)
    if inside.any():
        windows[inside] = _gather(pixels, start[inside], span, image)
    edge = np.flatnonzero(~inside)
    steps = np.arange(span)
    columns, rows = start[edge, :1] + steps, start[edge, 1:] + steps
    cut = pixels[rows.clip(0, height - 1)[:, :, None], columns.clip(0, width - 1)[:, None, :]]
    outside = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
    cut[outside] = image.background
    windows[edge] = cut
    return windows
