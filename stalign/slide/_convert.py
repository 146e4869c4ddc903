"""Any common pixel layout to 8-bit RGB, or a clear refusal."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

CHANNELS = (1, 3, 4)
_WAY_OUT = "Pass the image as uint8, uint16 or float in [0, 1], grey, RGB or RGBA, channels last or first."


class Layout(NamedTuple):
    """Where rows, columns and channels of a pixel array are."""

    height: int
    width: int
    channels: int
    channel_axis: int
    """2 (channels last), 0 (channels first) or -1 (grey, no channel axis)."""


def pixel_layout(shape: tuple[int, ...]) -> Layout:
    """Tell rows, columns and channels of an array from its shape; channels last wins where both would fit."""
    shape = tuple(int(side) for side in shape)
    if len(shape) not in (2, 3) or 0 in shape:
        what = "is empty" if 0 in shape else f"has {len(shape)} axes"
        raise ValueError(
            f"An image of shape {shape} {what}; expected (rows, columns) or (rows, columns, channels). {_WAY_OUT}"
        )
    if len(shape) == 2:
        return Layout(shape[0], shape[1], 1, -1)
    if shape[2] in CHANNELS:
        return Layout(shape[0], shape[1], shape[2], 2)
    if shape[0] in CHANNELS:
        return Layout(shape[1], shape[2], shape[0], 0)
    raise ValueError(
        f"An image of shape {shape} has no channel axis of length 1 (grey), 3 (RGB) or 4 (RGBA). "
        f"A multiplexed image must be reduced to RGB first. {_WAY_OUT}"
    )


def check_dtype(dtype: Any) -> np.dtype:
    """Return the pixel type if it is one that has a fixed meaning: uint8, uint16 or float."""
    dtype = np.dtype(dtype)
    if dtype == np.uint8 or dtype == np.uint16 or dtype.kind == "f":
        return dtype
    if dtype.kind == "b":
        raise ValueError(f"A 1-bit (boolean) array is a mask, not an image. {_WAY_OUT}")
    raise ValueError(f"Pixels of type {dtype} have no fixed range. {_WAY_OUT}")


def sixteen_bit_divisor(array: np.ndarray) -> int:
    """Return 257 for a uint16 image that uses its range, 1 for one that holds 8-bit values."""
    return 1 if int(array.max()) <= 255 else 257


def to_uint8(array: np.ndarray, divisor: int | None = None) -> np.ndarray:
    """Scale pixel values to uint8; ``divisor`` fixes the uint16 range where only a part of the image is at hand."""
    dtype = check_dtype(array.dtype)
    if dtype == np.uint8:
        return array
    if dtype == np.uint16:
        divisor = sixteen_bit_divisor(array) if divisor is None else divisor
        if divisor == 1:
            return np.minimum(array, 255).astype(np.uint8)
        return ((array.astype(np.uint32) + divisor // 2) // divisor).astype(np.uint8)
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"The image holds NaN or infinite pixels. {_WAY_OUT}")
    if low < 0 or high > 1:
        raise ValueError(
            f"Float pixels must lie in [0, 1], got [{low:g}, {high:g}]. Divide by 255 or convert to uint8 first."
        )
    return np.rint(array * np.float32(255)).astype(np.uint8)


def channels_to_rgb(array: np.ndarray, channel_axis: int) -> np.ndarray:
    """Turn uint8 grey, RGB or RGBA with the given channel axis into (rows, columns, 3); alpha is laid on white."""
    if channel_axis == -1:
        array = array[..., None]
    elif channel_axis == 0:
        array = np.moveaxis(array, 0, 2)
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 3:
        return array
    alpha = array[..., 3:].astype(np.uint16)
    colour = array[..., :3].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def ycbcr_to_rgb(array: np.ndarray) -> np.ndarray:
    """Turn full-range YCbCr, (..., 3) uint8, into RGB (ITU-R BT.601, as in JFIF)."""
    y = array[..., 0].astype(np.float32)
    blue, red = (array[..., channel].astype(np.float32) - 128 for channel in (1, 2))
    rgb = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=-1)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def to_rgb_uint8(array: Any) -> np.ndarray:
    """Convert an image to 8-bit RGB.

    uint16 is divided by 257 (unless all values fit in 8 bits, then they are kept), floats must lie in [0, 1],
    grey is repeated, RGBA is composited on white, channels first becomes channels last.

    Parameters
    ----------
    array
        Pixels, (rows, columns), (rows, columns, 1 | 3 | 4) or (1 | 3 | 4, rows, columns).

    Returns
    -------
    (rows, columns, 3) uint8; the input itself where it already is that.

    Raises
    ------
    ValueError
        For empty arrays, other numbers of axes or channels, boolean or other integer types, NaN, and floats outside
        [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.slide import to_rgb_uint8
    >>> to_rgb_uint8(np.array([[0.0, 1.0]]))[0, 1]
    array([255, 255, 255], dtype=uint8)
    """
    array = np.asarray(array)
    layout = pixel_layout(array.shape)
    return channels_to_rgb(to_uint8(array), layout.channel_axis)
