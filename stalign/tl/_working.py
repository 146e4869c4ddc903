"""A light working copy of an AnnData with the niches that a model needs; neither counts nor pixels are copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import require_key
from stalign.slide._library import find_niche_record, recorded_libraries

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import Geometry

# What `extract_niches` reads of `obs`, beside the column of the libraries.
_OBS = (Key.obs.ARRAY_ROW, Key.obs.ARRAY_COL, "pxl_row_in_fullres", "pxl_col_in_fullres")


class NicheArguments(NamedTuple):
    """Arguments of :func:`stalign.pp.extract_niches` that a user passed on; ``None`` is "as before, or as usual"."""

    image: Any = None
    image_key: str | None = None
    mpp: float | Mapping[str, float] | None = None
    spatial_key: str | None = None
    library_key: str | None = None


class WorkingCopy(NamedTuple):
    """The light AnnData, with the niche record, and whether that is new."""

    adata: AnnData
    is_new: bool


def working_copy(adata: AnnData, geometry: Geometry, arguments: NicheArguments, *, use_image: bool) -> WorkingCopy:
    """Return a light AnnData with the niches of ``geometry``.

    The niches of ``adata`` are taken over where they fit; otherwise they are worked out again, as the user asked the
    last time where this call says nothing else.

    Parameters
    ----------
    adata
        It is not changed.
    geometry
        What the model sees of a slide.
    arguments
        What the user passed.
    use_image
        Whether the image will be read; without it, it is not looked for either.
    """
    from anndata import AnnData

    from stalign.pp import extract_niches

    record = find_niche_record(adata)
    params = {} if record is None else record["params"]
    spatial_key = arguments.spatial_key or str(params.get("spatial_key", Key.obsm.SPATIAL))
    library_key = arguments.library_key or _recorded_key(adata, params)
    require_key(
        adata.obsm,
        spatial_key,
        where="adata.obsm",
        hint="It must hold (x, y) = (column, row) in full-resolution pixels; `spatial_key=...` if it has another name.",
    )
    if library_key is not None:
        require_key(adata.obs, library_key, where="adata.obs", hint="It must name the library of each spot.")
    reason = "there are none" if record is None else _why_not(adata, record, geometry, arguments, use_image=use_image)
    columns = [column for column in (*_OBS, library_key) if column in adata.obs]
    light = AnnData(
        obs=adata.obs[list(dict.fromkeys(columns))],
        obsm={spatial_key: np.asarray(adata.obsm[spatial_key])},
        uns={Key.UNS: dict(adata.uns.get(Key.UNS, {}))},
    )
    if "metadata" in adata.uns:
        light.uns["metadata"] = adata.uns["metadata"]
    if record is not None and not reason:
        light.uns[Key.uns.SPATIAL] = dict(adata.uns.get(Key.uns.SPATIAL, {}))
        name = Key.connectivities(str(params["key_added"]))
        light.obsp[name] = adata.obsp[name]
        return WorkingCopy(light, is_new=False)
    spatial = adata.uns.get(Key.uns.SPATIAL, {})
    light.uns[Key.uns.SPATIAL] = dict(spatial) if use_image else _without_images(spatial)
    logger.info("Niches of the model's geometry are worked out: %s.", reason)
    extract_niches(
        light,
        **_remembered(adata, record, arguments, use_image=use_image),
        n_neighbors=geometry.n_neighbors,
        spot_um=geometry.spot_um,
        niche_um=geometry.niche_um,
        spatial_key=spatial_key,
        library_key=library_key,
        key_added=str(params.get("key_added", Key.NICHE)),
    )
    return WorkingCopy(light, is_new=True)


def adopt(adata: AnnData, light: AnnData, *, use_image: bool) -> None:
    """Write what :func:`stalign.pp.extract_niches` added to the working copy into ``adata``."""
    record = light.uns[Key.UNS][Key.uns.NICHE]
    key_added = str(record["params"]["key_added"])
    adata.obsp[Key.connectivities(key_added)] = light.obsp[Key.connectivities(key_added)]
    for column in (Key.niche_n_spots(key_added), Key.niche_in_image(key_added)):
        adata.obs[column] = light.obs[column].to_numpy()
    adata.uns[Key.UNS] = {**adata.uns.get(Key.UNS, {}), Key.uns.NICHE: record}
    if use_image and light.uns.get(Key.uns.SPATIAL):
        adata.uns[Key.uns.SPATIAL] = light.uns[Key.uns.SPATIAL]


def _recorded_key(adata: AnnData, params: Mapping[str, Any]) -> str | None:
    key = str(params.get("library_key", "")) or None
    return key if key in adata.obs else None


def _without_images(spatial: Mapping[str, Any]) -> dict[str, Any]:
    """Return the libraries with their scale factors, but nothing that leads to an image."""
    return {
        str(name): {key: value for key, value in entry.items() if key not in ("images", "metadata")}
        for name, entry in spatial.items()
    }


def _why_not(
    adata: AnnData, record: Mapping[str, Any], geometry: Geometry, arguments: NicheArguments, *, use_image: bool
) -> str:
    """Say why the recorded niches do not serve; empty if they do."""
    params = record["params"]
    if any(value is not None for value in arguments[:3]):
        return "another image or scale was passed"
    for name in ("spatial_key", "library_key"):
        passed = getattr(arguments, name)
        if passed is not None and passed != str(params[name]):
            return f"`{name}` is another one"
    for name in ("n_neighbors", "spot_um", "niche_um"):
        if float(params[name]) != float(getattr(geometry, name)):
            return f"{name} is {params[name]:g} in `uns` and {getattr(geometry, name):g} in the model"
    name = Key.connectivities(str(params["key_added"]))
    if name not in adata.obsp:
        return f"`obsp[{name!r}]` is gone"
    key = str(params["library_key"])
    if key and (key not in adata.obs or not set(adata.obs[key].astype(str)) <= set(record["libraries"])):
        return "the libraries are others"
    codes, names = recorded_libraries(adata)
    if any((codes == code).sum() != record["libraries"][library]["n_spots"] for code, library in enumerate(names)):
        return "the number of spots is another one"
    spatial = adata.uns.get(Key.uns.SPATIAL, {})
    for library in names if use_image else ():
        entry = spatial.get(library, {})
        at_hand = bool(entry.get("images")) or "source_image_path" in entry.get("metadata", {})
        if record["libraries"][library]["image"] == "none" and at_hand:
            return f"library {library!r} has an image now"
    return ""


def _remembered(
    adata: AnnData, record: Mapping[str, Any] | None, arguments: NicheArguments, *, use_image: bool
) -> dict[str, Any]:
    """Return ``image``, ``image_key`` and ``mpp`` as passed, else as they were passed for the recorded niches."""
    chosen: dict[str, Any] = {"mpp": arguments.mpp}
    if use_image:
        chosen |= {"image": arguments.image, "image_key": arguments.image_key}
    if record is None:
        return chosen
    libraries = record["libraries"]
    key = str(record["params"]["library_key"])
    if key and key in adata.obs:
        here = set(adata.obs[key].astype(str))
        libraries = {name: entry for name, entry in libraries.items() if name in here}
    if arguments.mpp is None:
        chosen["mpp"] = {
            name: float(entry["mpp"]) for name, entry in libraries.items() if entry["mpp_source"] == "user"
        } or None
    if use_image and arguments.image is None and arguments.image_key is None:
        paths = {
            name: str(entry["image_path"])
            for name, entry in libraries.items()
            if entry["image"] == "path" and float(entry["image_scale"]) == 1.0
        }
        keys = {str(entry["image_key"]) for entry in libraries.values() if entry["image"] == "uns"}
        if paths:
            chosen["image"] = paths
        elif len(keys) == 1 and all(entry["image"] == "uns" for entry in libraries.values()):
            chosen["image_key"] = keys.pop()
    return chosen
