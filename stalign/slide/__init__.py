"""Pixels: open a picture of a slide wherever it is, and read patches at a physical scale."""

from __future__ import annotations

from stalign.slide._colour import colour_statistics
from stalign.slide._convert import to_rgb_uint8
from stalign.slide._image import ArrayImage, SlideImage
from stalign.slide._lazy import LazyImage
from stalign.slide._open import open_image
from stalign.slide._openslide import OpenSlideImage
from stalign.slide._patches import inside_fraction, read_patches
from stalign.slide._scale import Scale, ScaleWarning, derive_mpp
from stalign.slide._tiff import TiffImage
from stalign.slide._tiles import ReadCounters, TiledImage

__all__ = [
    "ArrayImage",
    "LazyImage",
    "OpenSlideImage",
    "ReadCounters",
    "Scale",
    "ScaleWarning",
    "SlideImage",
    "TiffImage",
    "TiledImage",
    "colour_statistics",
    "derive_mpp",
    "inside_fraction",
    "open_image",
    "read_patches",
    "to_rgb_uint8",
]
