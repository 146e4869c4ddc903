"""The physical scale: µm per full-resolution pixel, from what is known, never guessed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from stalign._validate import check_positive

TOLERANCE = 0.02
SPOT_DIAMETER_TOLERANCE = 0.10
VISIUM_PITCH_UM = 100.0
LEGACY_ST_PITCH_UM = 200.0
VISIUM_SPOT_UM = 65.0
"""Space Ranger's ``spot_diameter_fullres`` stands for a theoretical spot of 65 µm, not for the 55 µm capture area."""
LEGACY_ST_SPOT_UM = 100.0

_WORDS = {
    "user": "`mpp` as passed",
    "pitch": "the spot pitch",
    "microns_per_pixel": "`scalefactors['microns_per_pixel']`",
    "image": "the image file's metadata",
    "spot_diameter": "`spot_diameter_fullres`",
}


class ScaleWarning(UserWarning):
    """Two sources of the physical scale contradict each other."""


@dataclass(frozen=True)
class Scale:
    """µm per full-resolution pixel, where it comes from, and what every source said."""

    mpp: float
    source: str
    candidates: dict[str, float] = field(default_factory=dict)


def derive_mpp(
    *,
    user: float | None = None,
    pitch_um: float | None = None,
    pitch_px: float | None = None,
    microns_per_pixel: float | None = None,
    image_mpp: float | None = None,
    spot_diameter_px: float | None = None,
    spot_diameter_um: float | None = VISIUM_SPOT_UM,
    library: str = "library",
) -> Scale:
    """Choose the most trusted scale and compare the others with it.

    The order of trust is the order of the parameters.

    Parameters
    ----------
    user
        What the user passed.
    pitch_um, pitch_px
        Distance between spot centres in µm (nominal) and full-resolution pixels (measured).
    microns_per_pixel
        Space Ranger's own value (Visium HD).
    image_mpp
        From the image file's metadata, per full-resolution pixel.
    spot_diameter_px, spot_diameter_um
        ``spot_diameter_fullres`` and the diameter it stands for.
    library
        Name for messages.

    Returns
    -------
    The :class:`Scale`; ``candidates`` holds all sources, keys ``"user"``, ``"pitch"``, ``"microns_per_pixel"``,
    ``"image"``, ``"spot_diameter"``.

    Raises
    ------
    ValueError
        If no source is known.

    Warns
    -----
    ScaleWarning
        If a source differs from the chosen one by more than 2 % (10 % for the spot diameter).

    Examples
    --------
    >>> from stalign.slide import derive_mpp
    >>> derive_mpp(pitch_um=100.0, pitch_px=200.0).mpp
    0.5
    """
    candidates = {
        "user": user,
        "pitch": pitch_um / pitch_px if pitch_um and pitch_px else None,
        "microns_per_pixel": microns_per_pixel,
        "image": image_mpp,
        "spot_diameter": spot_diameter_um / spot_diameter_px if spot_diameter_um and spot_diameter_px else None,
    }
    known = {name: check_positive(f"mpp from {_WORDS[name]}", v) for name, v in candidates.items() if v is not None}
    if not known:
        raise ValueError(
            f"The physical scale of library {library!r} is unknown: no spot pitch is known for its array, the image "
            "file names no pixel size and the scale factors no spot diameter of known size. Pass `mpp=...`, the µm per "
            "full-resolution pixel."
        )
    source = next(iter(known))
    for other in list(known)[1:]:
        _compare(known, source, other, library)
    return Scale(mpp=known[source], source=source, candidates=known)


def _compare(known: dict[str, float], source: str, other: str, library: str) -> None:
    tolerance = SPOT_DIAMETER_TOLERANCE if other == "spot_diameter" else TOLERANCE
    difference = abs(known[other] / known[source] - 1)
    if difference > tolerance:
        warnings.warn(
            f"Library {library!r}: {_WORDS[source]} gives {known[source]:.4g} µm per pixel, {_WORDS[other]} gives "
            f"{known[other]:.4g} ({difference:.0%} apart). Using {known[source]:.4g}; pass `mpp=...` to decide "
            "otherwise.",
            ScaleWarning,
            stacklevel=4,
        )
