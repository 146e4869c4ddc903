"""SpatialData: its transformations bring spots into the pixel frame of an image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import listing, require_key
from stalign.io._files import as_counts, repeats_allowed, unique_genes
from stalign.io._report import report
from stalign.slide import to_rgb_uint8
from stalign.slide._grid import find_grid

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData
    from xarray import DataArray

_AXES = ("x", "y")
_ATTRS = "spatialdata_attrs"
_MAX_PIXELS = 2**28
_HD_REGION = re.compile(r"square_(\d{3})um")
PICTURE_KEY = "hires"
"""Name of an image that is taken over; squidpy draws this one."""


@dataclass(frozen=True)
class _Place:
    """How an element comes to lie on an image.

    Attributes
    ----------
    system
        The coordinate system that both know; the element's own where there is no image.
    to_pixels
        (3, 3) from the system to pixels of the image.
    image_key
        Name of the image, empty where there is none.
    pixels_per_unit
        Image pixels that one unit of the element spans.
    """

    system: str
    to_pixels: np.ndarray
    image_key: str = ""
    pixels_per_unit: float = 1.0


def from_spatialdata(
    sdata: SpatialData | str | Path,
    *,
    table_key: str | None = None,
    image_key: str | Mapping[str, str] | None = None,
    coordinate_system: str | None = None,
    microns: str | None = None,
    library_id: str | None = None,
    max_pixels: int = _MAX_PIXELS,
) -> AnnData:
    """Make an AnnData from a table of a SpatialData object, the shapes it annotates and an image.

    Centroids (circles, polygons, points, labels) are brought into the pixel frame of the image by the transformations
    of both to a coordinate system they share. An image that lies in a zarr store on disk is referenced by its path;
    one in memory is taken over as 8-bit RGB.

    Parameters
    ----------
    sdata
        The object, or the path of its zarr store.
    table_key
        Name of the table; may be left out where there is one.
    image_key
        Name of the image, or a dict of names by annotated element. ``None`` takes, of the RGB images that share a
        coordinate system with the element, the one with the finest pixels.
    coordinate_system
        The system to go through; ``None`` takes ``"global"`` where both know it, else the first that both know.
    microns
        Name of a coordinate system whose unit is µm, where there is one: it gives the scale.
    library_id
        Name of the library; ``None`` takes the annotated element's. A table of several elements becomes several
        libraries, each named after its element.
    max_pixels
        Largest image that is taken into memory.

    Returns
    -------
    A new AnnData with the table's spots, with

    - ``obsm["spatial"]``: (n, 2) float64 (x, y) in pixels of the image's finest level; without an image, in units of
      the coordinate system
    - ``uns["spatial"][library]``: ``images`` (``hires``, where it was in memory), ``scalefactors``
      (``tissue_hires_scalef`` = 1; ``spot_diameter_fullres`` of circles on a hexagonal grid; ``microns_per_pixel``
      with ``microns``; ``bin_size_um`` of Visium HD bins), ``metadata`` (``source_image_path``, ``image``,
      ``coordinate_system``)

    Raises
    ------
    ImportError
        If spatialdata is not installed.
    KeyError
        If a table, image, element or coordinate system is not there.
    ValueError
        If a choice has to be made, the table annotates nothing, or instances are missing from the element.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.io.from_spatialdata("slide.zarr", image_key="he")  # doctest: +SKIP
    """
    sdata = _open(sdata)
    table_key = _choose_table(sdata, table_key)
    table = sdata.tables[table_key]
    regions, region_key, instance_key = _annotated(table, table_key)
    if library_id is not None and len(regions) > 1:
        raise ValueError(
            f"One `library_id` for {len(regions)} annotated elements: {listing(regions)}. Leave it out: each element "
            "becomes a library of its name."
        )
    keys = _image_keys(image_key, regions)
    adata = _bare_copy(table)
    coordinates = np.empty((adata.n_obs, 2))
    spatial: dict[str, Any] = {}
    of_region = table.obs[region_key].astype(str).to_numpy()
    for region in regions:
        here = np.flatnonzero(of_region == region)
        element = require_key(_elements(sdata), region, where="the elements of the SpatialData object")
        place = _find_place(sdata, element, region, keys.get(region), coordinate_system)
        xy = _centroids(element, place.system, table.obs[instance_key].to_numpy()[here], region)
        coordinates[here] = xy @ place.to_pixels[:2, :2].T + place.to_pixels[:2, 2]
        factors = _array_factors(element, region, place, adata.obs.iloc[here], coordinates[here])
        spatial[library_id or region] = _entry(sdata, place, factors, microns, max_pixels)
    adata.obsm[Key.obsm.SPATIAL] = coordinates
    adata.uns[Key.uns.SPATIAL] = spatial
    unique_genes(adata)
    several = len(regions) > 1
    report(adata, library_key=region_key if several else None)
    if several:
        logger.info("The table annotates %d elements: pass `library_key=%r` to what follows.", len(regions), region_key)
    return adata


# --- the table ---------------------------------------------------------------------------------------------------


def _open(sdata: Any) -> SpatialData:
    try:
        import spatialdata
    except ImportError as error:
        raise ImportError(
            "`stalign.io.from_spatialdata` needs the package spatialdata, which comes with squidpy. Install it with "
            "`pip install spatialdata`."
        ) from error
    if isinstance(sdata, (str, Path)):
        path = Path(sdata).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"There is no SpatialData store '{path}'.")
        return spatialdata.read_zarr(path)
    if not isinstance(sdata, spatialdata.SpatialData):
        raise TypeError(f"Expected a SpatialData object or the path of its zarr store, got {type(sdata).__name__}.")
    return sdata


def _choose_table(sdata: SpatialData, table_key: str | None) -> str:
    tables = list(sdata.tables)
    if table_key is not None:
        require_key(sdata.tables, table_key, where="sdata.tables")
        return table_key
    if len(tables) != 1:
        raise ValueError(
            f"The SpatialData object has {len(tables)} tables"
            + (f": {listing(tables)}. Pass `table_key=...`." if tables else "; expression is read from a table.")
        )
    return tables[0]


def _annotated(table: AnnData, table_key: str) -> tuple[list[str], str, str]:
    """Return the elements that a table annotates, and the columns that name them and their instances."""
    attrs = table.uns.get(_ATTRS)
    if not attrs:
        raise ValueError(
            f"Table {table_key!r} annotates no element, so its rows have no place. Link it with "
            "`sdata.set_table_annotates_spatialelement(...)`."
        )
    if table.n_obs == 0:
        raise ValueError(f"Table {table_key!r} is empty.")
    regions = list(dict.fromkeys(table.obs[attrs["region_key"]].astype(str)))
    return regions, str(attrs["region_key"]), str(attrs["instance_key"])


def _image_keys(image_key: str | Mapping[str, str] | None, regions: list[str]) -> Mapping[str, str]:
    if not isinstance(image_key, Mapping):
        return {} if image_key is None else dict.fromkeys(regions, image_key)
    for region in image_key:
        require_key(
            dict.fromkeys(regions), region, where="the annotated elements", hint="`image_key` is a dict by element."
        )
    return image_key


def _bare_copy(table: AnnData) -> AnnData:
    """Copy of the table without slots that this call writes; the table itself stays as it is."""
    from anndata import AnnData

    uns = {key: value for key, value in table.uns.items() if key != Key.uns.SPATIAL}
    obsm = {key: value for key, value in table.obsm.items() if key != Key.obsm.SPATIAL}
    pairwise = {"obsp": dict(table.obsp), "varp": dict(table.varp)}
    rest = {"varm": dict(table.varm), "layers": dict(table.layers), **pairwise}
    counts = None if table.X is None else as_counts(table.X)
    with repeats_allowed():
        return AnnData(counts, obs=table.obs, var=table.var, uns=uns, obsm=obsm, **rest).copy()


# --- elements and transformations --------------------------------------------------------------------------------


def _elements(sdata: SpatialData) -> dict[str, Any]:
    return {**sdata.shapes, **sdata.points, **sdata.labels}


def _systems(element: Any) -> dict[str, Any]:
    from spatialdata.transformations import get_transformation

    found = get_transformation(element, get_all=True)
    return found if isinstance(found, dict) else {}


def _matrix(transformation: Any) -> np.ndarray:
    """(3, 3) matrix on (x, y, 1)."""
    return np.asarray(transformation.to_affine_matrix(_AXES, _AXES), dtype=np.float64)


def _enlargement(matrix: np.ndarray) -> float:
    """Mean factor on lengths."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def _shared_system(element: Any, image: Any, wanted: str | None) -> str | None:
    shared = [name for name in _systems(element) if name in _systems(image)]
    if wanted is not None:
        return wanted if wanted in shared else None
    return "global" if "global" in shared else next(iter(shared), None)


def _own_system(element: Any, region: str, wanted: str | None) -> str:
    systems = _systems(element)
    if wanted is not None:
        require_key(systems, wanted, where=f"the coordinate systems of {region!r}")
        return wanted
    system = "global" if "global" in systems else next(iter(systems))
    logger.warning(
        "No image shares a coordinate system with '%s': its coordinates are in units of '%s'. Pass `image_key=...`.",
        region,
        system,
    )
    return system


def _find_place(sdata: SpatialData, element: Any, region: str, image_key: str | None, wanted: str | None) -> _Place:
    """Choose the image and the coordinate system in between."""
    if image_key is not None:
        require_key(sdata.images, image_key, where="sdata.images")
    candidates = []
    for key in [image_key] if image_key is not None else sdata.images:
        image = sdata.images[key]
        system = _shared_system(element, image, wanted)
        if system is None or (image_key is None and _finest(image).sizes.get("c", 1) not in (3, 4)):
            continue
        to_pixels = np.linalg.inv(_matrix(_systems(image)[system]))
        per_unit = _enlargement(_matrix(_systems(element)[system])) * _enlargement(to_pixels)
        candidates.append(_Place(system, to_pixels, key, per_unit))
    if not candidates and (image_key is not None or (wanted is not None and len(sdata.images))):
        images = {key: list(_systems(image)) for key, image in sdata.images.items()}
        lacking = "no coordinate system" if wanted is None else f"not the coordinate system {wanted!r}"
        whom = "any RGB image" if image_key is None else f"the image {image_key!r}"
        raise KeyError(
            f"Element {region!r} (coordinate systems {list(_systems(element))}) shares {lacking} with {whom}. Images "
            f"and their systems: {images}. Pass another `image_key` or `coordinate_system`."
        )
    if not candidates:
        return _Place(_own_system(element, region, wanted), np.eye(3))
    best = max(candidates, key=lambda candidate: candidate.pixels_per_unit)
    if len(candidates) > 1:
        logger.info(
            "Of the images %s, '%s' has the finest pixels.", listing(c.image_key for c in candidates), best.image_key
        )
    return best


def _finest(image: Any) -> DataArray:
    """Return the finest level of an image."""
    from spatialdata import get_pyramid_levels
    from xarray import DataArray

    return image if isinstance(image, DataArray) else get_pyramid_levels(image, n=0)


def _centroids(element: Any, system: str, instances: np.ndarray, region: str) -> np.ndarray:
    """(n, 2) centroids in a coordinate system, in the order of the table's rows."""
    import spatialdata

    table = spatialdata.get_centroids(element, coordinate_system=system).compute()
    rows = table.index.get_indexer(instances)
    if (rows < 0).any():
        lost = instances[rows < 0]
        raise ValueError(
            f"{len(lost)} of {len(instances)} rows of the table name instances that element {region!r} does not have: "
            f"{listing(lost, 5)}; it has {listing(table.index, 5)}."
        )
    return table.loc[:, list(_AXES)].to_numpy(dtype=np.float64)[rows]


def _array_factors(
    element: Any, region: str, place: _Place, obs: pd.DataFrame, coordinates: np.ndarray
) -> dict[str, float]:
    """Return what the element tells of its array: the size of Visium HD bins, the diameter of Visium spots."""
    found = _HD_REGION.search(region)  # as spatialdata-io names them
    if found:
        return {"bin_size_um": float(found.group(1))}
    # Circles elsewhere are cells, whose size is no measure.
    radius = np.asarray(element["radius"]) if "radius" in getattr(element, "columns", ()) else np.array([])
    if not len(radius) or np.ptp(radius) > 0.01 * radius.mean() or find_grid(obs, coordinates).kind != "hexagonal":
        return {}
    system = _matrix(_systems(element)[place.system])
    return {"spot_diameter_fullres": float(2 * radius.mean() * _enlargement(system) * _enlargement(place.to_pixels))}


# --- the image ---------------------------------------------------------------------------------------------------


def _entry(
    sdata: SpatialData, place: _Place, factors: dict[str, float], microns: str | None, max_pixels: int
) -> dict[str, Any]:
    """Return ``uns["spatial"][library]``."""
    images: dict[str, np.ndarray] = {}
    metadata = {"coordinate_system": place.system}
    if place.image_key:
        metadata["image"] = place.image_key
        element = sdata.images[place.image_key]
        if microns is not None:
            where = f"the coordinate systems of image {place.image_key!r}"
            to_microns = require_key(_systems(element), microns, where=where, hint="`microns` names one of them.")
            factors["microns_per_pixel"] = _enlargement(_matrix(to_microns))
        stored = _stored_path(sdata, place.image_key)
        if stored is not None:
            metadata["source_image_path"] = str(stored)
        else:
            images[PICTURE_KEY] = _take_over(element, place.image_key, max_pixels)
            factors[f"tissue_{PICTURE_KEY}_scalef"] = 1.0
    return {"images": images, "scalefactors": factors, "metadata": metadata}


def _stored_path(sdata: SpatialData, key: str) -> Path | None:
    """Folder of an image in a zarr store on this machine, if it still is the image in the object."""
    if sdata.path is None:
        return None
    folder = Path(str(sdata.path)) / "images" / key
    if not folder.is_dir():
        return None
    from stalign.slide import open_image

    sizes = _finest(sdata.images[key]).sizes
    with open_image(folder) as image:
        same = (image.height, image.width) == (sizes["y"], sizes["x"])
    return folder.resolve() if same else None


def _take_over(element: Any, key: str, max_pixels: int) -> np.ndarray:
    pixels = _finest(element)
    height, width = pixels.sizes["y"], pixels.sizes["x"]
    if height * width > max_pixels:
        raise ValueError(
            f"Image {key!r} of {height} × {width} pixels would be taken into memory (limit max_pixels={max_pixels}). "
            "Write the object with `sdata.write(...)` and pass the path of the store: its image is then referenced."
        )
    axes = ("y", "x", "c") if "c" in pixels.dims else ("y", "x")
    return to_rgb_uint8(np.asarray(pixels.transpose(*axes).values))
