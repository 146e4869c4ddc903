"""Square patches from anywhere on a slide, resampled to one size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stalign._validate import check_positive
from stalign.slide._image import ArrayImage, SlideImage
from stalign.slide._tiles import TiledImage

_RESAMPLE_BYTES = 2**20
_MIN_STEP = 4
_MIN_BLOCK = 512
_RUN = 8
_SMALL_SPAN = 64
"""Windows up to this size are resampled in one run: small products cost more to start than to compute."""


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
    >>> import numpy as np
    >>> from stalign.slide import inside_fraction
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
    >>> import numpy as np
    >>> from stalign.slide import open_image, read_patches
    >>> image = open_image(np.full((64, 64, 3), 200, dtype=np.uint8))
    >>> read_patches(image, np.array([[32.0, 32.0]]), 16.0, 8).shape
    (1, 8, 8, 3)
    """
    centers = _check_centers(centers)
    size = check_positive("size", size)
    pixels = check_positive("pixels", pixels, integer=True)
    factor = 1
    if level is None:
        level, factor = image.reduction_for(size / pixels)
    elif not 0 <= level < len(image.level_downsamples):
        raise ValueError(f"level={level} does not exist; the image has {len(image.level_downsamples)} levels.")
    if isinstance(image, TiledImage) and len(centers):
        image.check_content(level, centers)
    downsample = image.level_downsamples[level] * factor
    corner = (centers - size / 2) / downsample
    ratio = size / downsample / pixels
    start, span = _window(corner, size / downsample, enlarge=ratio < 1)
    out = np.empty((len(centers), pixels, pixels, 3), dtype=np.uint8)
    resampler = _Resampler(ratio, pixels, span)
    for index, windows in _windows(image, level, factor, start, span, resampler.step):
        out[index] = resampler(windows, corner[index] - start[index])
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


class _Resampler:
    """Resample windows of one size to ``pixels`` × ``pixels``, each at its own fraction of a pixel.

    A target pixel has weights for the few source pixels under it alone. So the target is cut into runs, and each run is
    one small matrix product with the part of the window that it can touch; first along rows, then along columns.
    """

    def __init__(self, ratio: float, pixels: int, span: int) -> None:
        self.ratio = np.float32(ratio)
        self.pixels = pixels
        self.span = span
        run = pixels if span <= _SMALL_SPAN else min(_RUN, pixels)
        firsts = np.arange(0, pixels, run)
        # Offsets lie in [margin, margin + 1): the pixels that a run can touch are the same for all windows.
        margin = 1 if ratio < 1 else 0
        self.width = min(int(np.ceil(run * ratio)) + 2 + 2 * margin, span)
        self.lows = np.minimum((firsts * ratio).astype(int), span - self.width)
        targets = np.minimum(firsts[:, None] + np.arange(run), pixels - 1)
        self.edges = targets[..., None].astype(np.float32) * self.ratio
        self.source = (self.lows[:, None, None] + np.arange(self.width)).astype(np.float32)
        self.runs = [
            (number, low, first, min(first + run, pixels))
            for number, (low, first) in enumerate(zip(self.lows.tolist(), firsts.tolist(), strict=True))
        ]
        # Few windows at a time: what lies between the two products then stays in the processor's cache.
        self.step = max(_MIN_STEP, _RESAMPLE_BYTES // (span * span * 12))
        self.spread = np.zeros((self.step, len(self.runs), self.width, 3, run, 3), dtype=np.float32)

    def __call__(self, windows: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Return (n, pixels, pixels, 3) uint8 of (n, span, span, 3) windows; ``offset`` is (n, 2), x and y."""
        n, span, pixels = len(windows), self.span, self.pixels
        weights = self._weights(offset.astype(np.float32))
        flat = windows.reshape(n, span, 3 * span).astype(np.float32)
        shrunk = np.empty((n, pixels, 3 * span), dtype=np.float32)
        for run, low, first, last in self.runs:
            rows = weights[:, 1, run, : last - first]
            np.matmul(rows, flat[:, low : low + self.width], out=shrunk[:, first:last])
        # The colours of a pixel lie side by side: each weight stands three times on the diagonal of its own square.
        spread = self.spread[:n]
        for colour in range(3):
            spread[:, :, :, colour, :, colour] = weights[:, 0].swapaxes(-1, -2)
        columns = spread.reshape(n, len(self.runs), 3 * self.width, -1)
        result = np.empty((n, pixels, 3 * pixels), dtype=np.float32)
        for run, low, first, last in self.runs:
            part = shrunk[:, :, 3 * low : 3 * (low + self.width)]
            np.matmul(part, columns[:, run, :, : 3 * (last - first)], out=result[:, :, 3 * first : 3 * last])
        # Means of bytes stay in their range.
        result += np.float32(0.5)
        return result.astype(np.uint8).reshape(n, pixels, pixels, 3)

    def _weights(self, offset: np.ndarray) -> np.ndarray:
        """Weights (n, 2, runs, run, width) of the source pixels that a run can touch, for x and y; rows sum to 1."""
        edge = offset[:, :, None, None, None] + self.edges
        if self.ratio < 1:
            weights = edge + (self.ratio / 2 - np.float32(0.5)) - self.source
            np.abs(weights, out=weights)
            np.subtract(1, weights, out=weights)
        else:
            weights = np.minimum(edge + self.ratio, self.source + 1)
            weights -= np.maximum(edge, self.source)
        np.maximum(weights, 0, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
        return weights


def _windows(
    image: SlideImage, level: int, factor: int, start: np.ndarray, span: int, step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices, windows) of at most ``step`` patches until all are read; near patches of a file share a read."""
    if isinstance(image, ArrayImage):
        pixels = image.level_array(level)
        for first in range(0, len(start), step):
            index = np.arange(first, min(first + step, len(start)))
            yield index, _gather(pixels, start[index], span, image)
        return
    for group in _blocks(start, max(_MIN_BLOCK, 2 * span)):
        low, high = _inside(image, level, factor, start[group], span)
        # The common rectangle at once if the patches fill it, else one by one.
        area = int(np.prod(high - low))
        region = _region(image, level, factor, low, high) if 0 < area <= len(group) * span * span else None
        for first in range(0, len(group), step):
            index = group[first : first + step]
            if region is not None:
                yield index, _gather(region, start[index] - low, span, image)
            else:
                yield index, _one_by_one(image, level, factor, start[index], span)


def _inside(image: SlideImage, level: int, factor: int, start: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last corner (x, y) of the rectangle around windows, cut at the image's borders."""
    height, width = (-(-side // factor) for side in image.level_size(level))
    corners = start.min(axis=0), start.max(axis=0) + span
    low, high = (np.clip(corner, 0, [width, height]) for corner in corners)
    return low, high


def _region(image: SlideImage, level: int, factor: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    (left, top), (right, bottom) = low.tolist(), high.tolist()
    return image._window(level, factor, top, left, bottom - top, right - left)


def _one_by_one(image: SlideImage, level: int, factor: int, start: np.ndarray, span: int) -> np.ndarray:
    windows = np.empty((len(start), span, span, 3), dtype=np.uint8)
    for window, corner in zip(windows, start, strict=True):
        low, high = _inside(image, level, factor, corner[None], span)
        if (high > low).all():
            region = _region(image, level, factor, low, high)
            window[...] = (
                region if region.shape == window.shape else _gather(region, corner[None] - low, span, image)[0]
            )
        else:
            window[...] = image.background
    return windows


def _blocks(start: np.ndarray, side: int) -> list[np.ndarray]:
    """Group patches whose corners fall in the same square of the slide."""
    if len(start) == 0:
        return []
    block = start // side
    block -= block.min(axis=0)
    code = block[:, 1] * (block[:, 0].max() + 1) + block[:, 0]
    order = np.argsort(code, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(code[order])) + 1)


def _gather(pixels: np.ndarray, start: np.ndarray, span: int, image: SlideImage) -> np.ndarray:
    """Copy (n, span, span, 3) windows out of an array; parts outside take the background."""
    height, width = pixels.shape[:2]
    inside = (start >= 0).all(axis=1) & (start[:, 0] + span <= width) & (start[:, 1] + span <= height)
    if inside.all() and len(start):
        if pixels.strides[1:] != (3, 1):
            pixels = np.ascontiguousarray(pixels)
        # Whole rows of a window lie side by side in memory, colours and all.
        rows = np.lib.stride_tricks.as_strided(
            pixels,
            (height - span + 1, width - span + 1, span, 3 * span),
            (pixels.strides[0], 3, pixels.strides[0], 1),
            writeable=False,
        )
        return rows[start[:, 1], start[:, 0]].reshape(-1, span, span, 3)
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
