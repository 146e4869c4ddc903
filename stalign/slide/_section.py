"""The physical scale of one section, from its array, its scale factors and its image's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from stalign._validate import check_positive
from stalign.slide._grid import Grid, is_legacy_st
from stalign.slide._scale import (
    LEGACY_ST_PITCH_UM,
    LEGACY_ST_SPOT_UM,
    VISIUM_PITCH_UM,
    VISIUM_SPOT_UM,
    Scale,
    derive_mpp,
)

PITCH_FACTOR = "spot_pitch_um"
"""Scale factor that a reader writes where the data's own metadata says how far apart spot centres are."""
DIAMETER_FACTOR = "spot_diameter_um"
"""Scale factor that a reader writes where it is known which diameter ``spot_diameter_fullres`` stands for."""


def section_scale(
    obs: pd.DataFrame,
    grid: Grid,
    scalefactors: Mapping[str, Any],
    *,
    technology: str = "",
    user: float | None = None,
    image_mpp: float | None = None,
    has_image: bool = True,
    library: str = "library",
) -> tuple[Scale, float]:
    """Return the physical scale of a section and its spot pitch in µm (NaN where unknown).

    Parameters
    ----------
    obs
        Rows of the section's spots.
    grid
        Their array, from :func:`~stalign.slide._grid.find_grid`.
    scalefactors
        ``uns["spatial"][library]["scalefactors"]``.
    technology
        What the metadata says about the method.
    user, image_mpp
        µm per full-resolution pixel as passed, and as the image file says.
    has_image
        Without an image an unknown scale is no error: the scale is then NaN with the source ``"none"``.
    library
        Name for messages.

    Raises
    ------
    ValueError
        If there is an image and no source of the scale.
    """
    pitch_um, spot_um = nominal_sizes(obs, grid, scalefactors, technology)
    known: dict[str, Any] = {
        "user": None if user is None else check_positive(f"mpp of library {library!r}", user),
        "pitch_um": pitch_um,
        "pitch_px": grid.pitch_px if np.isfinite(grid.pitch_px) else None,
        "microns_per_pixel": positive_or_none(scalefactors.get("microns_per_pixel")),
        "image_mpp": image_mpp,
        "spot_diameter_px": positive_or_none(scalefactors.get("spot_diameter_fullres")),
        "spot_diameter_um": spot_um,
    }
    sources = (
        ("user",),
        ("pitch_um", "pitch_px"),
        ("microns_per_pixel",),
        ("image_mpp",),
        ("spot_diameter_px", "spot_diameter_um"),
    )
    if not has_image and not any(all(known[key] is not None for key in source) for source in sources):
        return Scale(float("nan"), "none"), float("nan")
    scale = derive_mpp(**known, library=library)
    return scale, pitch_um if pitch_um is not None else grid.pitch_px * scale.mpp


def nominal_sizes(
    obs: pd.DataFrame, grid: Grid, scalefactors: Mapping[str, Any], technology: str = ""
) -> tuple[float | None, float | None]:
    """Return the pitch and the spot diameter in µm that the array is known to have."""
    pitch, spot = _of_the_kind(obs, grid, scalefactors, technology)
    if grid.kind != "free":
        pitch = positive_or_none(scalefactors.get(PITCH_FACTOR)) or pitch
    return pitch, positive_or_none(scalefactors.get(DIAMETER_FACTOR)) or spot


def _of_the_kind(
    obs: pd.DataFrame, grid: Grid, scalefactors: Mapping[str, Any], technology: str
) -> tuple[float | None, float | None]:
    if grid.kind == "square":
        bin_um = positive_or_none(scalefactors.get("bin_size_um"))
        if bin_um is not None:
            return bin_um, bin_um
        if grid.from_array and is_legacy_st(obs, technology):
            return LEGACY_ST_PITCH_UM, LEGACY_ST_SPOT_UM
        return None, None
    # Spots may have lost their array positions; a full hexagonal grid that is said to be Visium is a Visium array.
    if grid.kind == "hexagonal" and (grid.from_array or "visium" in technology.lower()):
        return VISIUM_PITCH_UM, VISIUM_SPOT_UM
    return None, VISIUM_SPOT_UM


def positive_or_none(value: Any) -> float | None:
    """Return a scale factor that is there and makes sense."""
    is_number = isinstance(value, (int, float, np.number)) and np.isfinite(value) and value > 0
    return float(value) if is_number else None
