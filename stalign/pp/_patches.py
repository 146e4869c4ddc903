"""The pixels that the model sees, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from stalign._validate import check_adata, check_choice, check_positive, listing, near
from stalign.slide._library import PatchReader, niche_record

if TYPE_CHECKING:
    from anndata import AnnData


def get_patches(
    adata: AnnData,
    obs: str | Sequence[str] | np.ndarray | slice | None = None,
    *,
    level: Literal["spot", "niche"] = "spot",
    size: int = 224,
) -> np.ndarray:
    """Cut the histology patches of spots at the size that the model sees.

    Parameters
    ----------
    adata
        After :func:`stalign.pp.extract_niches`.
    obs
        Names, positions, a boolean mask or a slice of spots; ``None`` takes all.
    level
        The patch under the spot or under its niche.
    size
        Side of the result in pixels.

    Returns
    -------
    (n, size, size, 3) uint8, in the order of ``obs``.

    Raises
    ------
    KeyError
        If a spot is not there or :func:`stalign.pp.extract_niches` has not run.
    ValueError
        If the library of a spot has no image.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.pp.extract_niches(adata, n_neighbors=18, spot_um=100, niche_um=400)
    >>> sta.pp.get_patches(adata, adata.obs_names[:3], level="niche", size=64).shape
    (3, 64, 64, 3)
    """
    check_adata(adata)
    check_choice("level", level, ("spot", "niche"))
    size = check_positive("size", size, integer=True)
    um = float(niche_record(adata)["params"][f"{level}_um"])
    index = spot_index(adata, obs)
    with PatchReader(adata) as reader:
        return reader.read(index, um, size)


def spot_index(adata: AnnData, obs: Any) -> np.ndarray:
    """Return the positions of spots given as names, positions, a mask, a slice or ``None`` for all."""
    if obs is None:
        return np.arange(adata.n_obs)
    if isinstance(obs, slice):
        return np.arange(adata.n_obs)[obs]
    if isinstance(obs, str):
        obs = [obs]
    values = obs.to_numpy() if isinstance(obs, (pd.Series, pd.Index)) else np.atleast_1d(np.asarray(obs))
    if values.dtype == bool:
        if values.shape != (adata.n_obs,):
            raise ValueError(f"A mask of spots must have shape ({adata.n_obs},), got {values.shape}.")
        return np.flatnonzero(values)
    if np.issubdtype(values.dtype, np.integer):
        beyond = values[(values < -adata.n_obs) | (values >= adata.n_obs)]
        if len(beyond):
            raise IndexError(f"Spot {beyond[0]} does not exist; the AnnData has {adata.n_obs} spots.")
        return values % adata.n_obs
    names = values.astype(str)
    index = adata.obs_names.get_indexer(names)
    if (index < 0).any():
        missing = names[index < 0]
        raise KeyError(
            f"{listing(missing, 5)} not found in `adata.obs_names`, which starts with {listing(adata.obs_names[:5])}."
            + near(missing[0], adata.obs_names[:10_000])
        )
    return index
