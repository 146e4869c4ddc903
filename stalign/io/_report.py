"""What was read: spots, genes, image and scale, checked and said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import get_coordinates, get_library_codes
from stalign.slide._grid import find_grid
from stalign.slide._image import PICTURE_SUFFIXES, picture_size
from stalign.slide._section import section_scale
from stalign.slide._source import ImageSource, find_sources

if TYPE_CHECKING:
    from anndata import AnnData

_SOURCES = {
    "user": "as passed",
    "pitch": "from the spot pitch",
    "microns_per_pixel": "from the metadata",
    "image": "from the image file",
    "spot_diameter": "from the spot diameter, good to about 10 %",
}
_SIZE_TOLERANCE = 0.02
_OUTSIDE_TOLERANCE = 0.01


def report(adata: AnnData, *, library_key: str | None = None) -> None:
    """Check scale and image of every library as :func:`stalign.pp.extract_niches` will find them, and log them.

    Contradictions are warnings here: expression can be used without an image.

    Parameters
    ----------
    adata
        As a reader returns it.
    library_key
        Column of ``obs`` that names each spot's library.
    """
    coordinates = get_coordinates(adata)
    codes, names = get_library_codes(adata, library_key)
    sources = find_sources(adata, names, None, None, library_key)
    for code, name in enumerate(names):
        here = codes == code
        _report_one(adata, here, coordinates[here], sources[name], name)


def _report_one(adata: AnnData, here: np.ndarray, coordinates: np.ndarray, source: ImageSource, name: str) -> None:
    entry = adata.uns[Key.uns.SPATIAL][name]
    obs = adata.obs if here.all() else adata.obs.loc[here]
    grid = find_grid(obs, coordinates)
    size_hw, image_mpp = _look_at(source)
    metadata = entry.get("metadata", {})
    scale, _ = section_scale(
        obs,
        grid,
        entry.get("scalefactors", {}),
        technology=str(metadata.get("technology", "")),
        image_mpp=None if image_mpp is None else image_mpp * source.scale,
        has_image=False,
        library=name,
    )
    logger.info(
        "Read '%s': %d spots on a %s grid × %d genes; %s; %s.",
        name,
        len(coordinates),
        grid.kind,
        adata.n_vars,
        _image_words(source, size_hw),
        "scale unknown: pass `mpp=...` to `stalign.pp.extract_niches`"
        if np.isnan(scale.mpp)
        else f"{scale.mpp:.4g} µm per full-resolution pixel, {_SOURCES[scale.source]}",
    )
    if size_hw is not None:
        _check_size(source, size_hw, entry, name)
        _check_extent(source, size_hw, coordinates, name)


def _look_at(source: ImageSource) -> tuple[tuple[int, int] | None, float | None]:
    """Return height, width and µm per pixel of the image; of a PNG or JPEG only the header is read."""
    if source.kind == "none":
        return None, None
    if source.kind == "path" and Path(source.path).suffix.lower() in PICTURE_SUFFIXES:
        width, height = picture_size(Path(source.path))
        return (height, width), None
    image = source.open()
    if image is None:
        return None, None
    with image:
        return (image.height, image.width), image.mpp


def _image_words(source: ImageSource, size_hw: tuple[int, int] | None) -> str:
    if size_hw is None:
        return "no image"
    what = f"image '{source.key}'" if source.kind == "uns" else f"image '{Path(source.path).name}'"
    return f"{what} of {size_hw[1]} × {size_hw[0]} (width × height) pixels"


def _check_size(source: ImageSource, size_hw: tuple[int, int], entry: Mapping[str, Any], name: str) -> None:
    """Compare a full-resolution file with the size that a small copy and its scale factor imply."""
    if source.kind != "path":
        return
    for key, picture in entry.get("images", {}).items():
        factor = entry.get("scalefactors", {}).get(f"tissue_{key}_scalef")
        if not factor:
            continue
        implied = np.array(picture.shape[:2]) / factor
        if (np.abs(implied / np.array(size_hw) - 1) > _SIZE_TOLERANCE).any():
            logger.warning(
                "Library '%s': '%s' has %d × %d (width × height) pixels, but the image '%s' and its scale factor imply "
                "%.0f × %.0f. Is it the image that the coordinates belong to?",
                name,
                Path(source.path).name,
                size_hw[1],
                size_hw[0],
                key,
                implied[1],
                implied[0],
            )
        return


def _check_extent(source: ImageSource, size_hw: tuple[int, int], coordinates: np.ndarray, name: str) -> None:
    extent = np.array([size_hw[1], size_hw[0]]) / source.scale
    outside = ((coordinates < 0) | (coordinates > extent)).any(axis=1)
    if outside.sum() <= _OUTSIDE_TOLERANCE * len(coordinates):
        return
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    logger.warning(
        "Library '%s': %d of %d spots lie outside the image: they span x %.0f to %.0f, y %.0f to %.0f; the image "
        "covers x 0 to %.0f, y 0 to %.0f full-resolution pixels.",
        name,
        outside.sum(),
        len(coordinates),
        *(low[0], high[0], low[1], high[1]),
        *extent,
    )
