"""Sizes of pixels as files state them."""

from __future__ import annotations

import numpy as np

UM_PER_UNIT = {
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "mm": 1e3,
    "millimeter": 1e3,
    "cm": 1e4,
    "centimeter": 1e4,
    "m": 1e6,
    "meter": 1e6,
}
# Printer's and screen's resolutions (72 to 1200 dots per inch) are not a microscope's.
_CREDIBLE_MPP = (0.01, 20.0)


def same_sides(x: float, y: float) -> float | None:
    """Mean of two pixel sizes, or ``None`` where pixels are not square or the numbers make no sense."""
    if not (np.isfinite([x, y]).all() and x > 0 and y > 0) or abs(x - y) > 0.01 * max(x, y):
        return None
    return (x + y) / 2


def is_credible(mpp: float) -> bool:
    """Whether a number can be a microscope's µm per pixel."""
    return _CREDIBLE_MPP[0] <= mpp <= _CREDIBLE_MPP[1]


def number(text: str | None) -> float | None:
    """Return a number from metadata, ``None`` where it is none."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
