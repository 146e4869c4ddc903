"""Where a library's image is: passed, in a file, or in ``uns``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import check_positive, listing, require_key
from stalign.slide._image import SlideImage
from stalign.slide._lazy import is_tree, plain_array
from stalign.slide._open import open_image

if TYPE_CHECKING:
    from anndata import AnnData

PASSED_KEY = "stalign"
"""Key of ``uns["spatial"][library]["images"]`` under which a passed array is kept."""


@dataclass
class ImageSource:
    """Where a library's image is, before it is opened.

    Attributes
    ----------
    kind
        ``"uns"``, ``"path"`` or ``"none"``.
    key, path
        Key in ``uns["spatial"][library]["images"]``, or the file.
    scale
        Image pixels per full-resolution pixel.
    pixels
        The array itself, where it is at hand.
    passed
        Whether the user passed the array, so that it has to be kept.
    """

    kind: str = "none"
    key: str = ""
    path: str = ""
    scale: float = float("nan")
    pixels: Any = None
    passed: bool = False

    def open(self) -> SlideImage | None:
        """Open the image, ``None`` if there is none."""
        if self.kind == "none":
            return None
        return open_image(self.path if self.kind == "path" else self.pixels)


def by_library(argument: str, value: Any, names: list[str]) -> Mapping[str, Any]:
    """Spread an argument that may be one value for all libraries or a dict by library."""
    if not isinstance(value, Mapping) or is_tree(value):
        return {} if value is None else dict.fromkeys(names, value)
    for name in value:
        require_key(dict.fromkeys(names), name, where="the libraries", hint=f"`{argument}` is a dict by library.")
    return value


def find_sources(
    adata: AnnData, names: list[str], image: Any, image_key: str | None, library_key: str | None
) -> dict[str, ImageSource]:
    """Find every library's image: what is passed, the file that ``uns`` names, or the finest picture in ``uns``."""
    spatial = adata.uns.get(Key.uns.SPATIAL, {})
    if image is not None and (not isinstance(image, Mapping) or is_tree(image)) and len(names) > 1:
        raise ValueError(
            f"One image for {len(names)} libraries: {listing(names)}. Pass a dict, `image={{library: image, ...}}`."
        )
    passed = by_library("image", image, names)
    if library_key is not None and spatial and not passed and not set(names) & set(spatial):
        raise KeyError(
            f"None of the libraries in `adata.obs[{library_key!r}]`, {listing(names)}, has an entry in "
            f"`adata.uns['spatial']`. Available: {listing(spatial)}. Rename either, or pass `image=...`."
        )
    sources = {}
    for name in names:
        if name in passed:
            sources[name] = _passed_source(passed[name], spatial.get(name, {}), image_key, name)
        else:
            sources[name] = _uns_source(spatial.get(name, {}), image_key, name)
        if spatial and name not in spatial and name not in passed:
            logger.warning(
                "Library '%s' has no entry in `uns['spatial']` (available: %s): taken as having no image.",
                name,
                listing(spatial),
            )
    return sources


def _scale_factor(scalefactors: Mapping[str, Any], key: str, library: str) -> float:
    factor = require_key(
        scalefactors,
        f"tissue_{key}_scalef",
        where=f"adata.uns['spatial'][{library!r}]['scalefactors']",
        hint=f"Without it the pixels of image {key!r} cannot be found: add it, or pass `image=...`.",
    )
    return check_positive(f"tissue_{key}_scalef of library {library!r}", factor)


def _passed_source(image: Any, spatial: Mapping[str, Any], image_key: str | None, library: str) -> ImageSource:
    scale = 1.0 if image_key is None else _scale_factor(spatial.get("scalefactors", {}), image_key, library)
    if isinstance(image, (str, Path)):
        return ImageSource("path", path=str(Path(image).expanduser().resolve()), scale=scale)
    if isinstance(image, SlideImage):
        raise TypeError(f"`image` is an open {type(image).__name__}: pass the array or the path it was opened from.")
    stored = _zarr_path(image) or _numpy_path(image)
    if stored:
        return ImageSource("path", path=stored, scale=scale)
    return ImageSource("uns", key=PASSED_KEY, scale=scale, pixels=plain_array(image), passed=True)


def _zarr_path(image: Any) -> str:
    """Folder of a zarr array on disk, so that its name is kept and not its pixels; empty for anything else."""
    store = getattr(image, "store", None)
    root = getattr(store, "root", None) or getattr(store, "path", None)
    folder = Path(str(root)) / str(getattr(image, "path", "")) if root else None
    return str(folder.resolve()) if folder is not None and folder.is_dir() else ""


def _numpy_path(image: Any) -> str:
    """Name of the NumPy file that an array is a map of, so that its pixels are not copied; empty for anything else."""
    if not isinstance(image, np.memmap) or Path(str(image.filename)).suffix != ".npy":
        return ""
    path = Path(str(image.filename)).resolve()
    whole = np.load(path, mmap_mode="r", allow_pickle=False)
    same = whole.shape == image.shape and whole.dtype == image.dtype and whole.offset == image.offset
    return str(path) if same and whole.strides == image.strides else ""


def _uns_source(spatial: Mapping[str, Any], image_key: str | None, library: str) -> ImageSource:
    images = spatial.get("images", {})
    scalefactors = spatial.get("scalefactors", {})
    path = _source_path(spatial)
    if image_key is None and path:
        return ImageSource("path", path=path, scale=1.0)
    if not images:
        if image_key is not None:
            where = f"adata.uns['spatial'][{library!r}]['images']"
            require_key(images, image_key, where=where, hint="Pass `image=...`, or leave `image_key` out.")
        return ImageSource()
    if image_key is None:
        image_key = _finest(images, scalefactors)
    where = f"adata.uns['spatial'][{library!r}]['images']"
    hint = f"Pass `image_key={next(iter(images))!r}` or `image=...`."
    pixels = require_key(images, image_key, where=where, hint=hint)
    return ImageSource("uns", key=image_key, scale=_scale_factor(scalefactors, image_key, library), pixels=pixels)


def _source_path(spatial: Mapping[str, Any]) -> str:
    metadata = spatial.get("metadata", {})
    path = metadata.get("source_image_path") if isinstance(metadata, Mapping) else None
    path = path.decode() if isinstance(path, bytes) else path
    if not isinstance(path, (str, Path)) or not str(path):
        return ""
    if not Path(path).expanduser().exists():
        logger.info("The image named by `source_image_path`, '%s', does not exist.", path)
        return ""
    return str(Path(path).expanduser().resolve())


def _finest(images: Mapping[str, Any], scalefactors: Mapping[str, Any]) -> str:
    """Key of the image with the largest scale factor; the first key where no image has one."""
    factors = {key: float(scalefactors.get(f"tissue_{key}_scalef", 0.0)) for key in images}
    return max(factors, key=lambda key: factors[key])
