"""What a patch looks like in absolute terms: colour, stain direction, texture, and how much of it is tissue."""

from __future__ import annotations

import numpy as np

APPEARANCE = 12
"""Number of values of :func:`appearance`."""

# Patches whose float copies are held at once.
_ROWS = 512
# Glass is nearly as bright as the light (this share of it in every channel) and nearly without colour.
_BRIGHT = 0.9
_COLOURLESS = 0.06
# Darker backgrounds than this are no glass: the slide is covered by tissue, or not in brightfield.
_DARKEST_GLASS = 160


def appearance(patches: np.ndarray) -> np.ndarray:
    """Describe patches by absolute statistics of colour and texture.

    Nothing is taken relative to the slide, so that an unusual slide shows. Haematoxylin and eosin absorb green most:
    the direction of the optical density (Beer-Lambert; as in Ruifrok and Johnston, Anal Quant Cytol Histol 23:291,
    2001) is what tells a stained section from an inverted picture.

    Parameters
    ----------
    patches
        (n, height, width, 3) uint8.

    Returns
    -------
    (n, 12) float32: mean of red, green and blue in [0, 1]; log of their standard deviations; log of their mean absolute
    gradients; share of red and of green in the optical density (times 3, so that grey is 1); log of the total optical
    density.

    Raises
    ------
    ValueError
        If the patches are not (n, height, width, 3), or smaller than 2 × 2.

    Examples
    --------
    >>> appearance(np.full((1, 4, 4, 3), 255, dtype=np.uint8))[0, :3].tolist()
    [1.0, 1.0, 1.0]
    """
    _check(patches)
    blocks = [_describe(patches[start : start + _ROWS]) for start in range(0, len(patches), _ROWS)]
    return np.concatenate(blocks) if blocks else np.empty((0, APPEARANCE), dtype=np.float32)


def _check(patches: np.ndarray) -> None:
    if patches.ndim != 4 or patches.shape[3] != 3 or min(patches.shape[1:3]) < 2:
        raise ValueError(f"Patches must have shape (n, height, width, 3), at least 2 × 2 pixels, got {patches.shape}.")
    if patches.dtype != np.uint8:
        raise ValueError(f"Patches must be uint8, got {patches.dtype}.")


def _describe(patches: np.ndarray) -> np.ndarray:
    values = patches.astype(np.float32) / 255
    down = np.abs(np.diff(values, axis=1)).mean(axis=(1, 2))
    right = np.abs(np.diff(values, axis=2)).mean(axis=(1, 2))
    density = -np.log(np.maximum(values, 1 / 255)).mean(axis=(1, 2))
    total = density.sum(axis=1, keepdims=True) + 0.05
    return np.concatenate(
        [
            values.mean(axis=(1, 2)),
            np.log(values.std(axis=(1, 2)) + 0.01),
            np.log((down + right) / 2 + 0.005),
            3 * density[:, :2] / total,
            np.log(total),
        ],
        axis=1,
        dtype=np.float32,
    )


def tissue_share(patches: np.ndarray, background: tuple[int, int, int] | None = None) -> np.ndarray:
    """Share of each patch that is tissue rather than glass.

    Glass lets nearly all light through and has nearly no colour; what is darker or coloured is tissue. Fat, whose cells
    are as clear as glass, counts as tissue where its walls are.

    Parameters
    ----------
    patches
        (n, height, width, 3) uint8.
    background
        Colour of the slide's bare glass, which the light is measured by; ``None``, or one too dark to be glass, is
        white.

    Returns
    -------
    (n,) float32 between 0 and 1.

    Examples
    --------
    >>> half = np.full((1, 2, 2, 3), 255, dtype=np.uint8)
    >>> half[0, 0] = (180, 90, 160)
    >>> tissue_share(half).tolist()
    [0.5]
    """
    _check(patches)
    light = np.full(3, 255.0, dtype=np.float32)
    if background is not None and min(background) >= _DARKEST_GLASS:
        light = np.asarray(background, dtype=np.float32)
    shares = [_tissue(patches[start : start + _ROWS], light) for start in range(0, len(patches), _ROWS)]
    return np.concatenate(shares) if shares else np.empty(0, dtype=np.float32)


def _tissue(patches: np.ndarray, light: np.ndarray) -> np.ndarray:
    values = np.minimum(patches / light, 1)
    low, high = values.min(axis=3), values.max(axis=3)
    glass = (low >= _BRIGHT) & (high - low <= _COLOURLESS)
    return (1 - glass.mean(axis=(1, 2))).astype(np.float32)
