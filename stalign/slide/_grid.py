"""The array behind the spots: hexagonal, square or none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.spatial import KDTree

from stalign._keys import Key

GridKind = Literal["hexagonal", "square", "free"]

_AXIS_RATIO = {"hexagonal": np.sqrt(3.0), "square": 1.0}
_RATIO_TOLERANCE = 0.1
_RESIDUAL_TOLERANCE = 0.25
_LEGACY_ST_EXTENT = 40
_PROBES = 2000
_ST_NAME = re.compile(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)")
_PIXEL_COLUMNS = ("pxl_col_in_fullres", "pxl_row_in_fullres")


@dataclass(frozen=True)
class Grid:
    """A regular arrangement of spots.

    Attributes
    ----------
    kind
        ``"hexagonal"``, ``"square"`` or ``"free"``.
    positions
        (n, 2) float64: positions in units of the pitch (grids), or the coordinates themselves (free).
    pitch_px
        Distance between neighbouring centres in full-resolution pixels, NaN if free.
    from_array
        Whether ``array_row`` and ``array_col`` gave it, not the coordinates alone.
    transposed
        Whether ``array_col`` runs along y and ``array_row`` along x, mirrored: what swapped coordinates look like.
    """

    kind: GridKind
    positions: np.ndarray
    pitch_px: float
    from_array: bool = False
    transposed: bool = False


def find_grid(obs: pd.DataFrame, coordinates: np.ndarray) -> Grid:
    """Recognise the grid from ``array_row``/``array_col``, else from how regular the coordinates are."""
    index = array_index(obs)
    grid = None if index is None else _grid_from_array(index, coordinates)
    return grid or _grid_from_coordinates(coordinates) or Grid("free", coordinates, float("nan"))


def array_index(obs: pd.DataFrame) -> np.ndarray | None:
    """(n, 2) float64 of (array_col, array_row), or ``None`` where they are absent or incomplete."""
    if Key.obs.ARRAY_ROW not in obs or Key.obs.ARRAY_COL not in obs:
        return None
    columns = [pd.to_numeric(obs[name], errors="coerce") for name in (Key.obs.ARRAY_COL, Key.obs.ARRAY_ROW)]
    index = np.stack([column.to_numpy(dtype=np.float64) for column in columns], axis=1)
    return index if np.isfinite(index).all() else None


def _grid_from_array(index: np.ndarray, coordinates: np.ndarray) -> Grid | None:
    """Regress the coordinates on the array: its two axes in pixels tell the kind, the pitch and the orientation."""
    design = np.column_stack([index, np.ones(len(index))])
    fit, _, rank, _ = np.linalg.lstsq(design, coordinates, rcond=None)
    if rank < 3:
        return None
    along_column, along_row = fit[0], fit[1]
    lengths = np.linalg.norm(along_column), np.linalg.norm(along_row)
    area = abs(np.linalg.det(fit[:2]))
    if area < 0.9 * lengths[0] * lengths[1]:  # the axes must be nearly perpendicular
        return None
    whole = np.rint(index).astype(np.int64)
    parity = whole.sum(axis=1) % 2
    kind: GridKind = "hexagonal" if (parity == parity[0]).all() and lengths[1] > 1.3 * lengths[0] else "square"
    if abs(lengths[1] / lengths[0] / _AXIS_RATIO[kind] - 1) > _RATIO_TOLERANCE:
        return None
    # A hexagonal spot owns two array cells; its area is √3/2 pitch².
    pitch = np.sqrt(4 * area / np.sqrt(3)) if kind == "hexagonal" else np.sqrt(area)
    residual = np.sqrt(((coordinates - design @ fit) ** 2).sum(axis=1).mean())
    if residual > _RESIDUAL_TOLERANCE * pitch:
        return None
    unit = np.array([0.5, np.sqrt(3) / 2]) if kind == "hexagonal" else np.ones(2)
    crosswise = abs(fit[0, 1]) + abs(fit[1, 0]) > abs(fit[0, 0]) + abs(fit[1, 1])
    mirrored = np.linalg.det(fit[:2]) < 0
    return Grid(kind, whole * unit, float(pitch), from_array=True, transposed=bool(crosswise and mirrored))


def _grid_from_coordinates(coordinates: np.ndarray) -> Grid | None:
    """Recognise a full grid by the number of nearest neighbours at one distance: 6 or 4, and none just behind."""
    if len(coordinates) < 9:
        return None
    probes = coordinates[np.linspace(0, len(coordinates) - 1, min(_PROBES, len(coordinates))).astype(np.intp)]
    distances = np.asarray(KDTree(coordinates).query(probes, k=9)[0])[:, 1:]
    pitch = float(np.median(distances[:, 0]))
    if pitch <= 0:
        return None
    first = distances < 1.2 * pitch
    spread = np.std(distances[first] / pitch)
    n_first = first.sum(axis=1)
    if spread > 0.06:
        return None
    for kind, n, gap in (("hexagonal", 6, 1.6), ("square", 4, 1.3)):
        complete = n_first == n
        empty_behind = ~((distances > 1.2 * pitch) & (distances < gap * pitch)).any(axis=1)
        if (complete & empty_behind).mean() > 0.5 and (n_first <= n).mean() > 0.99:
            pitch = float(distances[first].mean())
            return Grid(kind, coordinates / pitch, pitch)  # type: ignore[arg-type]
    return None


def shell_radius(kind: GridKind, n_neighbors: int) -> float:
    """Radius, in pitches, that on a full grid holds at least ``n_neighbors``, ties included.

    It lies midway between the last shell taken and the next, so that shifted spots do not matter.

    Examples
    --------
    >>> round(shell_radius("hexagonal", 18), 2)  # between shells 2 and √7
    2.32
    """
    reach = int(np.ceil(np.sqrt(n_neighbors))) + 3
    steps = np.arange(-2 * reach, 2 * reach + 1)
    column, row = (axis.ravel() for axis in np.meshgrid(steps, steps))
    squared = column**2 + row**2 + (column * row if kind == "hexagonal" else 0)
    shells, counts = np.unique(squared[squared > 0], return_counts=True)
    last = int(np.searchsorted(np.cumsum(counts), n_neighbors))
    return float(np.sqrt(shells[last]) + np.sqrt(shells[last + 1])) / 2


def is_legacy_st(obs: pd.DataFrame, technology: str = "") -> bool:
    """Whether a square array is that of legacy Spatial Transcriptomics (about 35 × 33 spots).

    The size alone would also fit a cut-out of another square array, so one of its marks must be there as well: spot
    names like ``10x13``, adjusted (fractional) array positions, or the technology in the metadata.
    """
    index = array_index(obs)
    if index is None or index.min() < -1 or index.max() > _LEGACY_ST_EXTENT:
        return False
    fractional = not np.allclose(index, np.rint(index))
    technology = technology.lower()
    named = "spatial transcriptomics" in technology and "visium" not in technology
    return fractional or named or _names_are_positions(obs.index, index)


def _names_are_positions(names: pd.Index, index: np.ndarray) -> bool:
    found = pd.Series(names.astype(str)).str.extract(_ST_NAME).astype(np.float64).to_numpy()
    same = np.isclose(found, index, atol=0.51) | np.isclose(found, index[:, ::-1], atol=0.51)
    return bool(same.all(axis=1).mean() > 0.9)


def recorded_orientation(obs: pd.DataFrame, coordinates: np.ndarray) -> Literal["as given", "swapped"] | None:
    """Compare the coordinates with Space Ranger's pixel columns, where ``obs`` has kept them."""
    if any(name not in obs for name in _PIXEL_COLUMNS):
        return None
    recorded = np.stack([pd.to_numeric(obs[n], errors="coerce").to_numpy(np.float64) for n in _PIXEL_COLUMNS], axis=1)
    for answer, candidate in (("as given", recorded), ("swapped", recorded[:, ::-1])):
        if np.allclose(coordinates, candidate, atol=1.0):
            return answer  # type: ignore[return-value]
    return None
