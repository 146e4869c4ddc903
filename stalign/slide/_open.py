"""Open pixels wherever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stalign.slide._image import PICTURE_SUFFIXES, ArrayImage, SlideImage, check_whole, open_picture, pixel_limit
from stalign.slide._lazy import LazyImage, is_named, is_tree, open_named, open_tree, open_zarr
from stalign.slide._openslide import ONLY_SUFFIXES, PREFERRED_SUFFIXES, OpenSlideImage, has_openslide

_TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".svs", ".qptiff", ".lsm", *PREFERRED_SUFFIXES)


def open_image(source: Any, *, max_pixels: int | None = None) -> SlideImage:
    """Open pixels wherever they are.

    Parameters
    ----------
    source
        One of

        - a NumPy array or memory map, a zarr or dask array;
        - an image of SpatialData: an ``xarray.DataArray`` with axes ``c``, ``y``, ``x``, or a ``DataTree`` of scales;
        - the path of a TIFF (flat or pyramidal, tiled or striped; OME-TIFF, BigTIFF, SVS and other dialects), of a
          zarr array or OME-Zarr image, of a NumPy file, of a PNG or JPEG;
        - the path of another scanner's format (MIRAX, Hamamatsu, Ventana, DICOM, …), read through OpenSlide (the extra
          ``wsi``).
    max_pixels
        Largest picture, or single strip, tile or chunk, that is decoded at once; ``None`` takes
        ``settings.max_image_pixels``.

    Returns
    -------
    A :class:`SlideImage`; close it, or use it in a ``with`` block.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, if the pixels cannot be read as RGB, or if more than ``max_pixels`` would have to be
        decoded at once.
    ImportError
        If the format needs OpenSlide and it is not installed.
    TypeError
        If ``source`` is something else.

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.slide import open_image
    >>> with open_image(np.zeros((300, 200, 3), dtype=np.uint8)) as image:
    ...     image.height, image.width
    (300, 200)
    """
    if isinstance(source, SlideImage):
        return source
    if isinstance(source, np.memmap):
        return LazyImage([source], name=Path(str(source.filename or "memory map")).name, max_pixels=max_pixels)
    if isinstance(source, np.ndarray):
        return ArrayImage(source)
    if isinstance(source, (str, Path)):
        return _open_path(Path(source).expanduser(), max_pixels)
    if is_tree(source):
        return open_tree(source, max_pixels)
    if is_named(source):
        return open_named(source, max_pixels)
    if all(hasattr(source, name) for name in ("shape", "dtype", "__getitem__")):
        return LazyImage([source], max_pixels=max_pixels)
    raise TypeError(
        f"Cannot open {type(source).__name__} as an image. Pass a NumPy, zarr or dask array, an image of SpatialData, "
        "or a path to a TIFF, zarr, PNG or JPEG."
    )


def _open_path(path: Path, max_pixels: int | None) -> SlideImage:
    if not path.exists():
        raise FileNotFoundError(f"No image at '{path}'. Pass the path of a TIFF, zarr, PNG or JPEG.")
    suffix = path.suffix.lower()
    if path.is_dir():
        return open_zarr(path, max_pixels)
    if suffix in PICTURE_SUFFIXES:
        return _open_picture(path, max_pixels)
    if suffix == ".npy":
        return _open_numpy(path, max_pixels)
    if suffix in ONLY_SUFFIXES or (suffix in PREFERRED_SUFFIXES and has_openslide()):
        return OpenSlideImage(path, max_pixels=max_pixels)
    if suffix in _TIFF_SUFFIXES or _looks_like_tiff(path):
        from stalign.slide._tiff import TiffImage

        return TiffImage(path, max_pixels=max_pixels)
    raise ValueError(
        f"'{path.name}' is none of the formats that can be read: TIFF ({', '.join(_TIFF_SUFFIXES)}), zarr, .npy, "
        f"{', '.join(PICTURE_SUFFIXES)}, and through OpenSlide {', '.join(ONLY_SUFFIXES)}. Convert it to a tiled TIFF."
    )


def _looks_like_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _open_numpy(path: Path, max_pixels: int | None) -> SlideImage:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"'{path.name}' cannot be read as a NumPy array: {error}. Is the file complete?") from error
    return LazyImage([array], name=path.name, max_pixels=max_pixels)


def _open_picture(path: Path, max_pixels: int | None) -> ArrayImage:
    with open_picture(path) as picture:
        width, height = picture.size
        check_whole(path.name, (height, width), pixel_limit(max_pixels))
        if picture.mode == "1":
            raise ValueError(f"'{path.name}' is a 1-bit picture, a mask rather than an image. Pass an RGB image.")
        try:
            array = np.asarray(picture.convert("RGBA") if picture.mode in ("P", "PA", "LA") else picture)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"'{path.name}' cannot be decoded: {error}. Is the file complete?") from error
    if picture.mode == "CMYK":
        raise ValueError(f"'{path.name}' stores CMYK colours. Save it as RGB.")
    return ArrayImage(array)
