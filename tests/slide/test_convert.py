from __future__ import annotations

import numpy as np
import pytest

from stalign.slide import to_rgb_uint8

RED = np.zeros((5, 7, 3), dtype=np.uint8)
RED[..., 0] = 255


def test_rgb_is_not_copied():
    assert to_rgb_uint8(RED) is RED


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float(dtype):
    np.testing.assert_array_equal(to_rgb_uint8((RED / 255).astype(dtype)), RED)


def test_uint16_full_range():
    np.testing.assert_array_equal(to_rgb_uint8(RED.astype(np.uint16) * 257), RED)


def test_uint16_holding_8_bits():
    np.testing.assert_array_equal(to_rgb_uint8(RED.astype(np.uint16)), RED)


def test_grey_and_one_channel():
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    expected = np.stack([grey] * 3, axis=-1)
    np.testing.assert_array_equal(to_rgb_uint8(grey), expected)
    np.testing.assert_array_equal(to_rgb_uint8(grey[..., None]), expected)


def test_channels_first():
    np.testing.assert_array_equal(to_rgb_uint8(np.moveaxis(RED, 2, 0)), RED)


def test_rgba_is_laid_on_white():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (0, 0, 0, 51)
    out = to_rgb_uint8(rgba)
    assert out[0, 0].tolist() == [255, 0, 0]
    assert out[0, 1].tolist() == [204, 204, 204]
    assert out[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 7), dtype=bool), "1-bit"),
        (np.zeros((5, 7, 16), dtype=np.uint8), r"\(5, 7, 16\).*channel"),
        (np.zeros((0, 7, 3), dtype=np.uint8), "empty"),
        (np.zeros((1, 5, 7, 3), dtype=np.uint8), "4 axes"),
        (np.full((5, 7, 3), np.nan), "NaN"),
        (np.full((5, 7, 3), np.inf), "infinite"),
        (np.full((5, 7, 3), 200.0), r"\[0, 1\].*255"),
        (np.full((5, 7, 3), 200, dtype=np.int64), "int64"),
        (np.full((5, 7, 3), -0.5), r"\[0, 1\]"),
    ],
)
def test_refusals(array, message):
    with pytest.raises(ValueError, match=message):
        to_rgb_uint8(array)
