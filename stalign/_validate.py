"""Checks of user input, each written once.

Every message names the thing, the value, what was available and the way out.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stalign._keys import Key

if TYPE_CHECKING:
    from anndata import AnnData

_SHOWN = 10
DISK_FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EFBIG", "EDQUOT") if hasattr(errno, name))
"""Codes of an OSError where a disk, a quota or a limit on the size of files is reached; Windows has no quotas."""


def listing(names: Iterable[Any], limit: int = _SHOWN) -> str:
    """Write names as a list for an error message, cut after ``limit``."""
    names = list(names)
    shown = ", ".join(repr(str(name)) for name in names[:limit])
    rest = len(names) - limit
    return f"[{shown}, … and {rest} more]" if rest > 0 else f"[{shown}]"


def near(name: str, available: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for a close match of ``name``, else an empty string."""
    close = difflib.get_close_matches(str(name), [str(a) for a in available], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """Return ``value`` if it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.{near(value, choices)}")
    return value


def check_choices(name: str, values: Sequence[str] | str, choices: Collection[str]) -> tuple[str, ...]:
    """Return ``values`` as a tuple without repeats if each is one of ``choices`` and there is at least one."""
    values = (values,) if isinstance(values, str) else tuple(values)
    if not values:
        raise ValueError(f"{name} is empty. Choose from {list(choices)}.")
    return tuple(dict.fromkeys(check_choice(name, value, choices) for value in values))


def check_positive(name: str, value: Any, *, integer: bool = False) -> Any:
    """Return ``value`` if it is a finite number above zero (an integer on request)."""
    is_number = isinstance(value, (int, np.integer) if integer else (int, float, np.number))
    if isinstance(value, bool) or not is_number or not np.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a positive {'integer' if integer else 'number'}, got {value!r}.")
    return int(value) if integer else float(value)


def check_adata(adata: Any) -> None:
    """Refuse what is not an AnnData, has no spots, or has names that are not unique."""
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise TypeError(
            f"Expected an AnnData, got {type(adata).__name__}. "
            "SpatialData objects become one with `stalign.io.from_spatialdata`."
        )
    if adata.n_obs == 0:
        raise ValueError(f"The AnnData is empty: {adata.n_obs} spots × {adata.n_vars} genes.")
    if not adata.obs_names.is_unique:
        duplicates = adata.obs_names[adata.obs_names.duplicated()].unique()
        raise ValueError(
            f"`obs_names` are not unique: {listing(duplicates, 5)} occur more than once. "
            "Call `adata.obs_names_make_unique()` first."
        )
    if not adata.var_names.is_unique:
        duplicates = adata.var_names[adata.var_names.duplicated()].unique()
        raise ValueError(
            f"`var_names` are not unique: {listing(duplicates, 5)} occur more than once. "
            "Call `adata.var_names_make_unique()` first."
        )


def require_key(container: Any, key: str, *, where: str, hint: str = "") -> Any:
    """Return ``container[key]``, or raise a KeyError that lists what is there."""
    if key not in container:
        available = list(container.keys()) if hasattr(container, "keys") else list(container)
        raise KeyError(
            f"Key {key!r} not found in `{where}`. Available: {listing(available)}.{near(key, available)}"
            + (f" {hint}" if hint else "")
        )
    return container[key]


def get_coordinates(adata: AnnData, spatial_key: str = Key.obsm.SPATIAL) -> np.ndarray:
    """Return ``obsm[spatial_key]`` as a checked (n_obs, 2) float64 array of (x, y)."""
    values = require_key(
        adata.obsm,
        spatial_key,
        where="adata.obsm",
        hint="It must hold (x, y) = (column, row) in full-resolution pixels; `spatial_key=...` if it has another name.",
    )
    coordinates = np.asarray(values, dtype=np.float64)
    if coordinates.ndim != 2 or coordinates.shape[1] != 2:
        raise ValueError(
            f"`adata.obsm[{spatial_key!r}]` must have shape (n_spots, 2) = ({adata.n_obs}, 2), got {coordinates.shape}."
        )
    finite = np.isfinite(coordinates).all(axis=1)
    if not finite.all():
        bad = adata.obs_names[~finite]
        raise ValueError(
            f"`adata.obsm[{spatial_key!r}]` has NaN or infinite coordinates for {len(bad)} of {adata.n_obs} spots: "
            f"{listing(bad, 5)}. Remove these spots first."
        )
    return coordinates


def get_library_codes(adata: AnnData, library_key: str | None) -> tuple[np.ndarray, list[str]]:
    """Return for each spot the number of its library, and the libraries' names.

    Without ``library_key`` all spots belong to one library, named as the only entry of ``uns["spatial"]``
    or ``"library"`` where there is none. More than one entry asks for a ``library_key``.
    """
    if library_key is None:
        names = list(adata.uns.get(Key.uns.SPATIAL, {}))
        if len(names) > 1:
            raise ValueError(
                f"`adata.uns['spatial']` has {len(names)} libraries: {listing(names)}. Pass `library_key=...`, the "
                f"column of `adata.obs` that names each spot's library. Available: {listing(adata.obs.columns)}."
            )
        return np.zeros(adata.n_obs, dtype=np.intp), [str(names[0]) if names else "library"]
    column = require_key(adata.obs, library_key, where="adata.obs", hint="It must name the library of each spot.")
    if column.isna().any():
        raise ValueError(f"`adata.obs[{library_key!r}]` is missing for {int(column.isna().sum())} spots.")
    codes, names = pd.factorize(column.astype(str), sort=True)
    return codes.astype(np.intp), [str(name) for name in names]
