"""Arrays outside memory: zarr, dask, memory maps, and the images of SpatialData."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stalign._validate import listing
from stalign.slide._cache import TileCache
from stalign.slide._convert import CHANNELS, check_dtype, pixel_layout
from stalign.slide._image import ArrayImage, SlideImage, check_whole, pixel_limit
from stalign.slide._tiles import TiledImage, TileGrid
from stalign.slide._units import UM_PER_UNIT, same_sides

_TILE = 512
"""Tiles of arrays that are not stored in chunks."""
_SMALL_CHUNK = 256
"""Chunks smaller than this are read several at a time: each read of a store costs some fixed time."""
_AXES = {2: "yxc", 0: "cyx", -1: "yx"}


class LazyImage(TiledImage):
    """Levels that are array-likes outside memory (zarr, dask, memory maps): only the chunks asked for are read.

    Parameters
    ----------
    levels
        Array-likes from fine to coarse, all of one layout.
    axes
        Names of the axes, such as ``"cyx"`` or ``"tczyx"``; axes other than ``c``, ``y`` and ``x`` must have length 1.
        ``None`` takes the channel axis from the shape.
    mpp
        µm per pixel of the first, where known.
    name
        For messages.
    max_pixels
        Largest single chunk; ``None`` takes ``settings.max_image_pixels``.
    cache
        Where decoded chunks are kept; ``None`` takes the one that all images share.
    """

    def __init__(
        self,
        levels: Sequence[Any],
        *,
        axes: Sequence[str] | None = None,
        mpp: float | None = None,
        name: str = "array",
        max_pixels: int | None = None,
        cache: TileCache | None = None,
    ) -> None:
        self._arrays = list(levels)
        check_dtype(self._arrays[0].dtype)
        self._axes = [_axes(array, axes, name) for array in self._arrays]
        limit = pixel_limit(max_pixels)
        grids = []
        for array, names in zip(self._arrays, self._axes, strict=True):
            rows, columns = (_edges(array, names.index(axis)) for axis in "yx")
            grid = TileGrid(np.asarray(rows), np.asarray(columns))
            check_whole(name, grid.tile_size, limit, "chunks of ")
            grids.append(grid)
        super().__init__(name, grids, mpp=mpp, cache=cache)
        kept = "".join(axis for axis in self._axes[0] if axis in "cyx")
        self._channel_axis = kept.find("c")
        if np.dtype(self._arrays[0].dtype) == np.uint16:
            self._divisor = self._find_divisor()

    def _raw(self, level: int, row: int, column: int) -> tuple[np.ndarray, int]:
        top, left, height, width = self._grids[level, 1].window(row, column)
        parts = {"y": slice(top, top + height), "x": slice(left, left + width), "c": slice(None)}
        try:
            part = self._arrays[level][tuple(parts.get(axis, 0) for axis in self._axes[level])]
            # The threads are ours: a scheduler of threads or of machines underneath would fight with them.
            raw = part.compute(scheduler="synchronous") if hasattr(part, "compute") else np.asarray(part)
        except (RuntimeError, ValueError, OSError) as error:
            raise self._damaged(level, row, column, error) from error
        return raw, raw.nbytes


def _axes(array: Any, axes: Sequence[str] | None, name: str) -> tuple[str, ...]:
    """Return the checked names of an array's axes, one letter each."""
    shape = tuple(int(side) for side in array.shape)
    if axes is None:
        return tuple(_AXES[pixel_layout(shape).channel_axis])
    names = tuple(axes)
    sizes = dict(zip(names, shape, strict=True))
    if "y" not in sizes or "x" not in sizes or 0 in shape:
        raise ValueError(f"'{name}' has axes {listing(names)} of shape {shape}; an image needs 'y' and 'x', not empty.")
    deep = {axis: size for axis, size in sizes.items() if axis not in "cyx" and size != 1}
    if deep:
        raise ValueError(f"'{name}' is no single plane: its axes are {sizes}. Pass one plane of it.")
    if sizes.get("c", 1) not in CHANNELS:
        raise ValueError(
            f"'{name}' has {sizes['c']} channels (axes {sizes}); expected 1 (grey), 3 (RGB) or 4 (RGBA). A multiplexed "
            "image must be reduced to RGB first."
        )
    return names


def _edges(array: Any, axis: int) -> list[int]:
    """Edges of an array's chunks along an axis."""
    length = int(array.shape[axis])
    chunks = getattr(array, "chunks", None)
    chunk = _TILE if chunks is None else chunks[axis]
    if isinstance(chunk, tuple):  # dask: the length of every chunk
        return [0, *np.cumsum(chunk).tolist()]
    step = chunk * -(-_SMALL_CHUNK // chunk)
    return [*range(0, length, step), length]


def is_named(source: Any) -> bool:
    """Whether something is an array with named axes, as xarray has it and SpatialData stores images."""
    return hasattr(source, "dims") and hasattr(source, "data") and hasattr(source, "dtype")


def is_tree(source: Any) -> bool:
    """Whether something is a tree of arrays by scale, as SpatialData stores pyramids."""
    return "scale0" in (getattr(source, "children", None) or ())


def open_named(source: Any, max_pixels: int | None) -> SlideImage:
    """Open an array with named axes."""
    axes = tuple(str(axis) for axis in source.dims)
    if not {"y", "x"} <= set(axes):
        raise ValueError(f"The image has axes {listing(axes)}; an image needs axes named 'y' and 'x'.")
    data = source.data
    if isinstance(data, np.ndarray) and not isinstance(data, np.memmap):
        return ArrayImage(plain_array(source))
    return LazyImage([data], axes=axes, name="image", max_pixels=max_pixels)


def open_tree(source: Any, max_pixels: int | None) -> SlideImage:
    """Open a pyramid whose levels are the children ``scale0``, ``scale1``, … of a tree."""
    scales = sorted((key for key in source.children if key.startswith("scale")), key=lambda key: int(key[5:]))
    arrays = [_variable(source, key) for key in scales]
    axes = tuple(str(axis) for axis in arrays[0].dims)
    return LazyImage([array.data for array in arrays], axes=axes, name="image", max_pixels=max_pixels)


def plain_array(source: Any) -> Any:
    """Return the finest array of an image of SpatialData, rows and columns first; anything else as it is.

    Slots of an AnnData hold arrays and no trees of them; coarser levels are averaged again from the finest.
    """
    if is_tree(source):
        source = _variable(source, "scale0")
    if not is_named(source):
        return source
    axes = _axes(source.data, tuple(str(axis) for axis in source.dims), "image")
    plane = source.data[tuple(slice(None) if axis in "cyx" else 0 for axis in axes)]
    kept = [axis for axis in axes if axis in "cyx"]
    return plane.transpose([kept.index(axis) for axis in "yxc" if axis in kept])


def _variable(tree: Any, scale: str) -> Any:
    """Return the one array of a scale."""
    variables = tree.children[scale].data_vars
    if len(variables) != 1:
        raise ValueError(f"Scale {scale!r} holds {listing(variables)}; an image has one array per scale.")
    return next(iter(variables.values()))


def open_zarr(path: Path, max_pixels: int | None) -> LazyImage:
    """Open a zarr array, or the OME-Zarr image in a group."""
    import zarr

    try:
        node = zarr.open(str(path), mode="r")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"The folder '{path}' is neither a zarr array nor a zarr group: {error}.") from error
    if hasattr(node, "shape"):
        return LazyImage([node], name=path.name, max_pixels=max_pixels)
    attributes = _ome(node)
    if "multiscales" not in attributes and "bioformats2raw.layout" in attributes and "0" in node:
        node = node["0"]  # the first of the images that bioformats2raw has written side by side
        attributes = _ome(node)
    scales = attributes.get("multiscales")
    if not scales:
        raise ValueError(
            f"The zarr group '{path}' is not an image: it has no 'multiscales' metadata. It holds "
            f"{listing(sorted(node.keys()))}. {_inside(node)}"
        )
    scale = scales[0]
    levels = []
    for dataset in scale["datasets"]:
        if dataset["path"] not in node:
            raise ValueError(
                f"The metadata of '{path}' name the level {dataset['path']!r}, which is not there. It holds "
                f"{listing(sorted(node.keys()))}. Was it copied to the end?"
            )
        levels.append(node[dataset["path"]])
    axes = [axis if isinstance(axis, str) else axis["name"] for axis in scale.get("axes", [])] or None
    return LazyImage(levels, axes=axes, mpp=_ome_mpp(scale), name=path.name, max_pixels=max_pixels)


def _ome(node: Any) -> dict[str, Any]:
    attributes = dict(node.attrs)
    return dict(attributes.get("ome", attributes))


def _inside(node: Any) -> str:
    """Say what to pass instead of a group that is no image."""
    if "images" in node:
        return f"For a SpatialData store pass one of its images: {listing(f'images/{key}' for key in node['images'])}."
    arrays = [key for key in node if hasattr(node[key], "shape")]
    return f"Pass the path of one array: {listing(arrays)}." if arrays else "Pass the path of an array or image in it."


def _ome_mpp(scale: Any) -> float | None:
    """µm per pixel of level 0 from an OME-Zarr's axes and transformations; ``None`` where they name no length."""
    axes = [axis for axis in scale.get("axes", []) if not isinstance(axis, str)]
    sizes = dict.fromkeys("yx", 1.0)
    for transformation in [*_scales(scale["datasets"][0]), *_scales(scale)]:
        for axis, factor in zip(axes, transformation, strict=False):
            if axis["name"] in sizes:
                sizes[axis["name"]] *= float(factor)
    units = {axis["name"]: UM_PER_UNIT.get(axis.get("unit", "")) for axis in axes}
    y, x = units.get("y"), units.get("x")
    return None if y is None or x is None else same_sides(y * sizes["y"], x * sizes["x"])


def _scales(holder: Any) -> Iterator[Sequence[float]]:
    for transformation in holder.get("coordinateTransformations", []):
        if transformation.get("type") == "scale":
            yield transformation["scale"]
