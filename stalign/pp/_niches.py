"""The niche graph, the physical scale and the patch geometry of every library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import (
    check_adata,
    check_positive,
    get_coordinates,
    get_library_codes,
    listing,
)
from stalign.slide import Scale, inside_fraction
from stalign.slide._grid import Grid, find_grid, recorded_orientation
from stalign.slide._library import PatchReader, niche_record, open_library_image, recorded_libraries
from stalign.slide._neighbours import niche_neighbours
from stalign.slide._section import section_scale
from stalign.slide._source import PASSED_KEY, ImageSource, by_library, find_sources

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["PatchReader", "extract_niches", "niche_record", "open_library_image", "recorded_libraries"]

DEFAULT_MODEL = "stalign-mini"
_OUTSIDE_TOLERANCE = 0.01


@dataclass
class _Library:
    """What is worked out for one library before anything is written."""

    name: str
    source: ImageSource
    grid: Grid
    scale: Scale
    pitch_um: float
    size_hw: tuple[int, int]
    in_image: np.ndarray
    graph: csr_matrix


def extract_niches(
    adata: AnnData,
    *,
    image: Any = None,
    image_key: str | None = None,
    mpp: float | Mapping[str, float] | None = None,
    n_neighbors: int | None = None,
    spot_um: float | None = None,
    niche_um: float | None = None,
    spatial_key: str = Key.obsm.SPATIAL,
    library_key: str | None = None,
    key_added: str = Key.NICHE,
    copy: bool = False,
) -> AnnData | None:
    """Find the niche of every spot, the physical scale and the image.

    On a grid (hexagonal or square, recognised from ``array_row`` and ``array_col`` or from the coordinates) a niche is
    every spot within the smallest distance that holds ``n_neighbors`` neighbours on a full grid, ties included; at
    borders and holes it has fewer spots. Elsewhere it is the ``n_neighbors`` nearest. Libraries never mix. No pixels
    are copied: patches are cut when they are needed.

    Parameters
    ----------
    adata
        Spots with (x, y) = (column, row) in full-resolution pixels.
    image
        A full-resolution image: an array (height × width × channel), the path of a TIFF, zarr or PNG, a zarr array; or
        a dict of these by library. ``None`` takes the file of
        ``uns["spatial"][library]["metadata"]["source_image_path"]`` if it exists, else the finest image in ``uns``.
    image_key
        The image in ``uns["spatial"][library]["images"]`` to use; together with ``image``, the key whose
        ``tissue_<key>_scalef`` belongs to the image that is passed.
    mpp
        µm per full-resolution pixel, one for all or by library. ``None`` derives it from the spot pitch, the image
        file's metadata or the spot diameter, in this order.
    n_neighbors, spot_um, niche_um
        Size of a niche, side of the spot patch and of the niche patch in µm; ``None`` takes those of the bundled
        model.
    spatial_key
        Coordinates in ``obsm``.
    library_key
        Column of ``obs`` that names each spot's library.
    key_added
        Prefix of the slots written.
    copy
        Return a new object instead of writing to ``adata``.

    Returns
    -------
    ``None``, or with ``copy=True`` a new AnnData, with

    - ``obsp["niche_connectivities"]``: (n_obs, n_obs) CSR float32 of ones, self included; row i is the niche of spot i
    - ``obs["niche_n_spots"]``: int32, spots in the niche, self included
    - ``obs["niche_in_image"]``: float32, share of the niche patch inside the image; NaN without an image
    - ``uns["stalign"]["niche"]``: ``params``, and per library scale, grid and image

    Raises
    ------
    KeyError
        If coordinates, an image key, a scale factor or a library are not there.
    ValueError
        If the input contradicts itself: no scale, spots outside the image, swapped x and y, several libraries without
        ``library_key``.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.pp.extract_niches(adata, n_neighbors=18, spot_um=100, niche_um=400)
    >>> adata.obsp["niche_connectivities"].shape == (adata.n_obs, adata.n_obs)
    True
    """
    check_adata(adata)
    params = _resolve_geometry(n_neighbors, spot_um, niche_um)
    coordinates = get_coordinates(adata, spatial_key)
    codes, names = get_library_codes(adata, library_key)
    sources = find_sources(adata, names, image, image_key, library_key)
    scales = by_library("mpp", mpp, names)
    libraries, members = [], []
    for code, name in enumerate(names):
        here = np.flatnonzero(codes == code)
        factors, technology = _scalefactors(adata, name), _technology(adata, name)
        part = _Part(name, adata.obs.iloc[here], coordinates[here], factors, technology)
        libraries.append(_work_out(part, sources[name], scales.get(name), params))
        members.append(here)
    graph = _join([library.graph for library in libraries], members, adata.n_obs)

    out = adata.copy() if copy else adata
    record = {
        "params": {
            **params,
            "spatial_key": spatial_key,
            "library_key": library_key or "",
            "key_added": key_added,
        },
        "libraries": {library.name: _entry(library) for library in libraries},
    }
    in_image = np.empty(adata.n_obs, dtype=np.float32)
    for library, here in zip(libraries, members, strict=True):
        in_image[here] = library.in_image
    _write(out, graph, in_image, record, [library for library in libraries if library.source.passed])
    _report(libraries, in_image, key_added)
    return out if copy else None


@dataclass(frozen=True)
class _Part:
    """One library's share of the AnnData."""

    name: str
    obs: pd.DataFrame
    coordinates: np.ndarray
    scalefactors: Mapping[str, Any]
    technology: str


def _resolve_geometry(n_neighbors: int | None, spot_um: float | None, niche_um: float | None) -> dict[str, Any]:
    if n_neighbors is None or spot_um is None or niche_um is None:
        from stalign.models import geometry

        default = geometry(DEFAULT_MODEL)
        n_neighbors = default.n_neighbors if n_neighbors is None else n_neighbors
        spot_um = default.spot_um if spot_um is None else spot_um
        niche_um = default.niche_um if niche_um is None else niche_um
    return {
        "n_neighbors": check_positive("n_neighbors", n_neighbors, integer=True),
        "spot_um": check_positive("spot_um", spot_um),
        "niche_um": check_positive("niche_um", niche_um),
    }


def _scalefactors(adata: AnnData, library: str) -> Mapping[str, Any]:
    return adata.uns.get(Key.uns.SPATIAL, {}).get(library, {}).get("scalefactors", {})


def _technology(adata: AnnData, library: str) -> str:
    """What the metadata of the library, or else of the whole object, says about the method."""
    own = adata.uns.get(Key.uns.SPATIAL, {}).get(library, {}).get("metadata", {})
    for metadata in (own, adata.uns.get("metadata", {})):
        if isinstance(metadata, Mapping) and metadata.get("technology"):
            return str(metadata["technology"])
    return ""


# --- one library -------------------------------------------------------------------------------------------------


def _work_out(part: _Part, source: ImageSource, mpp: float | None, params: Mapping[str, Any]) -> _Library:
    grid = find_grid(part.obs, part.coordinates)
    _check_one_section(part, grid)
    _check_orientation(part, grid)
    image = source.open()
    size_hw = (0, 0) if image is None else (image.height, image.width)
    image_mpp = None if image is None or image.mpp is None else image.mpp * source.scale
    if image is not None:
        image.close()
    scale, pitch_um = section_scale(
        part.obs,
        grid,
        part.scalefactors,
        technology=part.technology,
        user=mpp,
        image_mpp=image_mpp,
        has_image=image is not None,
        library=part.name,
    )
    in_image = np.full(len(part.coordinates), np.nan, dtype=np.float32)
    if image is not None:
        _check_extent(part, source, size_hw, params["spot_um"] / scale.mpp)
        side = params["niche_um"] / scale.mpp * source.scale
        in_image = inside_fraction(size_hw, part.coordinates * source.scale, side)
    graph = niche_neighbours(grid, params["n_neighbors"])
    return _Library(part.name, source, grid, scale, pitch_um, size_hw, in_image, graph)


def _check_one_section(part: _Part, grid: Grid) -> None:
    """Refuse an array whose places are taken twice: sections that were concatenated without saying which is which."""
    if not grid.from_array:
        return
    n_places = len(np.unique(np.rint(grid.positions * 1000).astype(np.int64), axis=0))
    n_doubled = len(grid.positions) - n_places
    if n_doubled > _OUTSIDE_TOLERANCE * len(grid.positions):
        raise ValueError(
            f"{n_doubled} of {len(grid.positions)} spots of library {part.name!r} share their place in the array "
            "(`array_row`, `array_col`) with another: these look like several sections. Pass `library_key=...`, the "
            f"column of `adata.obs` that names each spot's library. Available: {listing(part.obs.columns)}."
        )


def _check_orientation(part: _Part, grid: Grid) -> None:
    recorded = recorded_orientation(part.obs, part.coordinates)
    if recorded == "swapped":
        raise ValueError(
            f"x and y look swapped in library {part.name!r}: `obs['pxl_col_in_fullres']` is the second column of the "
            "coordinates. They must be (x, y) = (column, row): use `adata.obsm['spatial'][:, ::-1]`."
        )
    if recorded is None and grid.transposed:
        raise ValueError(
            f"x and y look swapped in library {part.name!r}: `obs['array_col']` runs along y and `obs['array_row']` "
            "along x. Coordinates must be (x, y) = (column, row): use `adata.obsm['spatial'][:, ::-1]`. If the image "
            "was transposed on purpose, drop `obs['array_row']` and pass `mpp=...`."
        )


def _check_extent(part: _Part, source: ImageSource, size_hw: tuple[int, int], spot_px: float) -> None:
    """Refuse spots that do not lie on the image: more than 1 %, or any by more than a spot."""
    height, width = size_hw
    extent = np.array([width, height]) / source.scale
    beyond = _beyond(part.coordinates, extent)
    n_outside = int((beyond > 0).sum())
    if n_outside <= _OUTSIDE_TOLERANCE * len(beyond) and beyond.max() <= spot_px:
        return
    low, high = part.coordinates.min(axis=0), part.coordinates.max(axis=0)
    swapped = (_beyond(part.coordinates[:, ::-1], extent) > 0).sum() <= _OUTSIDE_TOLERANCE * len(beyond)
    picture = f"image {source.key!r}" if source.kind == "uns" else f"image '{Path(source.path).name}'"
    raise ValueError(
        f"{n_outside} of {len(beyond)} spots of library {part.name!r} lie outside the image. Spots span x "
        f"{low[0]:.0f} to {high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f} in full-resolution pixels; the {picture} of "
        f"{width} × {height} (width × height) pixels at scale factor {source.scale:.4g} covers x 0 to {extent[0]:.0f}, "
        f"y 0 to {extent[1]:.0f}. "
        + (
            "x and y look swapped: coordinates must be (x, y) = (column, row), use `adata.obsm['spatial'][:, ::-1]`."
            if swapped
            else "Pass the `image` or `image_key` that belongs to these coordinates, or correct the scale factor."
        )
    )


def _beyond(coordinates: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """How far each spot's centre lies outside, in full-resolution pixels; 0 or less inside."""
    return np.maximum(-coordinates, coordinates - extent).max(axis=1)


# --- the graph ---------------------------------------------------------------------------------------------------


def _join(graphs: list[csr_matrix], members: list[np.ndarray], n_obs: int) -> csr_matrix:
    """Put the libraries' graphs back into the order of the spots, without mixing them."""
    if len(graphs) == 1:
        return graphs[0]
    counts = np.zeros(n_obs, dtype=np.int64)
    for graph, here in zip(graphs, members, strict=True):
        counts[here] = np.diff(graph.indptr)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    indices = np.empty(indptr[-1], dtype=np.int32)
    for graph, here in zip(graphs, members, strict=True):
        shift = np.repeat(indptr[here] - graph.indptr[:-1], counts[here])
        indices[shift + np.arange(graph.nnz)] = here[graph.indices]
    return csr_matrix((np.ones(len(indices), dtype=np.float32), indices, indptr), shape=(n_obs, n_obs))


# --- writing -----------------------------------------------------------------------------------------------------


def _entry(library: _Library) -> dict[str, Any]:
    source = library.source
    return {
        "mpp": float(library.scale.mpp),
        "mpp_source": library.scale.source,
        "mpp_candidates": dict(library.scale.candidates),
        "grid": library.grid.kind,
        "pitch_um": float(library.pitch_um),
        "n_spots": int(library.graph.shape[0]),
        "image": source.kind,
        "image_key": source.key,
        "image_path": source.path,
        "image_scale": float(source.scale),
        "image_height": int(library.size_hw[0]),
        "image_width": int(library.size_hw[1]),
    }


def _write(
    adata: AnnData, graph: csr_matrix, in_image: np.ndarray, record: Mapping[str, Any], passed: list[_Library]
) -> None:
    key_added = record["params"]["key_added"]
    adata.obsp[Key.connectivities(key_added)] = graph
    adata.obs[Key.niche_n_spots(key_added)] = np.diff(graph.indptr).astype(np.int32)
    adata.obs[Key.niche_in_image(key_added)] = in_image
    # New dicts on the way down: a view or a shallow copy may share the old ones with another AnnData.
    adata.uns[Key.UNS] = {**adata.uns.get(Key.UNS, {}), Key.uns.NICHE: dict(record)}
    if not passed:
        return
    spatial = dict(adata.uns.get(Key.uns.SPATIAL, {}))
    for library in passed:
        entry = dict(spatial.get(library.name, {}))
        entry["images"] = {**entry.get("images", {}), PASSED_KEY: library.source.pixels}
        factor = {f"tissue_{PASSED_KEY}_scalef": library.source.scale}
        entry["scalefactors"] = {**entry.get("scalefactors", {}), **factor}
        spatial[library.name] = entry
    adata.uns[Key.uns.SPATIAL] = spatial


def _report(libraries: list[_Library], in_image: np.ndarray, key_added: str) -> None:
    for library in libraries:
        logger.info(
            "Library '%s': %d spots on a %s grid, %.4g µm per pixel (%s), image %s.",
            library.name,
            library.graph.shape[0],
            library.grid.kind,
            library.scale.mpp,
            library.scale.source,
            library.source.key or library.source.path or "none",
        )
    cut = int((in_image < 1).sum())
    if cut:
        logger.info("%d niche patches reach beyond the image; the rest is filled with the slide's background.", cut)
    logger.info(
        "Added `obsp['%s']`, `obs['%s']`, `obs['%s']`, `uns['%s']['%s']`.",
        Key.connectivities(key_added),
        Key.niche_n_spots(key_added),
        Key.niche_in_image(key_added),
        Key.UNS,
        Key.uns.NICHE,
    )
