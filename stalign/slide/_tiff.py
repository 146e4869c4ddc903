"""Windows of a TIFF: only the tiles or strips that a window touches are decoded."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np

from stalign._logging import logger
from stalign.slide._convert import channels_to_rgb, check_dtype, sixteen_bit_divisor, to_uint8
from stalign.slide._image import SlideImage, check_whole, natural_downsample

_UM_PER_UNIT = {
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
}
_UM_PER_RESOLUTION_UNIT = {2: 25_400.0, 3: 10_000.0}
# Printer's and screen's resolutions (72 to 1200 dots per inch) are not a microscope's.
_CREDIBLE_MPP = (0.01, 20.0)


class TiffImage(SlideImage):
    """A TIFF on disk: flat or pyramidal, tiled or striped, chunky or planar.

    Parameters
    ----------
    path
        The file.
    max_pixels
        Largest page that may be one single segment.
    """

    def __init__(self, path: str | Path, *, max_pixels: int) -> None:
        import tifffile

        super().__init__()
        self.path = Path(path)
        try:
            self._file = tifffile.TiffFile(self.path)
        except tifffile.TiffFileError as error:
            raise ValueError(f"'{self.path.name}' cannot be read as a TIFF: {error}. Is the file complete?") from error
        self._lock = threading.Lock()
        try:
            self._pages = _pyramid(self._file)
            for page in self._pages:
                _check_page(page, self.path)
                _check_complete(page, self.path)
                if len(page.dataoffsets) == page.samplesperpixel or len(page.dataoffsets) == 1:
                    check_whole(self.path, page.imagelength, page.imagewidth, max_pixels)
            self.height, self.width = self._pages[0].imagelength, self._pages[0].imagewidth
            sizes = [(page.imagelength, page.imagewidth) for page in self._pages]
            self.level_downsamples = tuple(natural_downsample(sizes[0], size) for size in sizes)
            self.mpp = _metadata_mpp(self._file, self._pages[0])
            self._divisor = self._sixteen_bits()
        except BaseException:
            self._file.close()
            raise

    def _sixteen_bits(self) -> int | None:
        page = self._pages[-1]
        if page.dtype != np.uint16:
            return None
        small = page.imagelength * page.imagewidth <= 4096**2
        return sixteen_bit_divisor(self._raw(page, 0, 0, page.imagelength, page.imagewidth)) if small else 257

    def level_size(self, level: int) -> tuple[int, int]:
        """Return (height, width) of a level."""
        return self._pages[level].imagelength, self._pages[level].imagewidth

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        page = self._pages[level]
        pixels = to_uint8(self._raw(page, top, left, height, width), self._divisor)
        if page.photometric == 0:  # white is zero
            pixels = 255 - pixels
        return channels_to_rgb(pixels, 2)

    def _raw(self, page: Any, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Decode the touched segments into (height, width, samples) of the file's own type."""
        samples = page.samplesperpixel
        # Scanners leave out tiles of empty slide: white, not black.
        fill = 255 if page.dtype == np.uint8 else np.iinfo(np.uint16).max if page.dtype == np.uint16 else 1.0
        out = np.full((height, width, samples), fill, dtype=page.dtype)
        for segment in _touched(page, top, left, height, width):
            data = self._segment_bytes(page, segment)
            if data is None:
                continue
            decoded, (plane, _, row, column, _), shape = page.decode(data, segment, jpegtables=page.jpegtables)
            if decoded is None:
                continue
            block = decoded[0, : shape[1], : shape[2]]
            # The part of the segment that lies in the window, in both frames.
            r0, r1 = max(row, top), min(row + block.shape[0], top + height)
            c0, c1 = max(column, left), min(column + block.shape[1], left + width)
            if r0 >= r1 or c0 >= c1:
                continue
            channel = slice(None) if block.shape[2] == samples else slice(plane, plane + 1)
            out[r0 - top : r1 - top, c0 - left : c1 - left, channel] = block[
                r0 - row : r1 - row, c0 - column : c1 - column
            ]
        return out

    def _segment_bytes(self, page: Any, segment: int) -> bytes | None:
        size = page.databytecounts[segment]
        if size == 0:
            return None
        with self._lock:
            handle = self._file.filehandle
            handle.seek(page.dataoffsets[segment])
            return handle.read(size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _segment_size(page: Any) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip or page.imagelength, page.imagelength), page.imagewidth


def _touched(page: Any, top: int, left: int, height: int, width: int) -> list[int]:
    """Return the numbers of the tiles or strips that a window touches, in the file's order."""
    tall, wide = _segment_size(page)
    rows, columns = -(-page.imagelength // tall), -(-page.imagewidth // wide)
    grid_rows = np.arange(top // tall, (top + height - 1) // tall + 1)
    grid_columns = np.arange(left // wide, (left + width - 1) // wide + 1)
    plane = (grid_rows[:, None] * columns + grid_columns).ravel()
    n_planes = page.samplesperpixel if page.planarconfig == 2 else 1
    return (np.arange(n_planes)[:, None] * rows * columns + plane).ravel().tolist()


def _pyramid(file: Any) -> list[Any]:
    """Return the pages of the first image from fine to coarse.

    Writers keep levels as sub-pages (OME-TIFF), as a series that tifffile knows (SVS and others) or as plain further
    pages, each a smaller copy of the first.
    """
    series = file.series[0]
    pages = [level.keyframe for level in series.levels]
    if len(series.levels[0].pages) > 1 and not _is_one_plane(series):
        raise ValueError(
            f"'{Path(file.filehandle.name).name}' holds {len(series.levels[0].pages)} planes (axes {series.axes}), "
            "not one RGB image. Save one RGB plane as TIFF."
        )
    if len(pages) == 1:
        pages += [page for page in map(_keyframe, list(file.pages)[1:]) if _is_copy(pages[0], page)]
    pages.sort(key=lambda page: -page.imagewidth)
    # The same level stored twice would make the choice of level arbitrary.
    return [page for i, page in enumerate(pages) if i == 0 or page.imagewidth < pages[i - 1].imagewidth]


def _is_one_plane(series: Any) -> bool:
    return all(size == 1 for axis, size in zip(series.axes, series.shape, strict=True) if axis not in "YXS")


def _keyframe(page: Any) -> Any:
    return page.aspage() if hasattr(page, "aspage") else page


def _is_copy(first: Any, page: Any) -> bool:
    """Whether a page is a smaller copy: same type and samples, same aspect to a pixel (labels and macros are not)."""
    if (
        page.dtype != first.dtype
        or page.samplesperpixel != first.samplesperpixel
        or page.imagewidth >= first.imagewidth
    ):
        return False
    factor = first.imagewidth / page.imagewidth
    return abs(first.imagelength / factor - page.imagelength) <= 1.5


def _check_page(page: Any, path: Path) -> None:
    if page.bitspersample == 1 or page.dtype is None:
        raise ValueError(
            f"'{path.name}' is a {page.bitspersample}-bit picture, a mask rather than an image. Pass an RGB image."
        )
    check_dtype(page.dtype)
    if page.photometric == 3:
        raise ValueError(f"'{path.name}' stores indices into a palette. Save it as RGB.")
    if page.samplesperpixel not in (1, 3, 4):
        raise ValueError(f"'{path.name}' has {page.samplesperpixel} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA).")


def _check_complete(page: Any, path: Path) -> None:
    """Refuse a file that ends before its pixels do, which an interrupted download leaves behind."""
    ends = np.asarray(page.dataoffsets, dtype=np.int64) + np.asarray(page.databytecounts, dtype=np.int64)
    size = path.stat().st_size
    if len(ends) and ends.max() > size:
        raise ValueError(
            f"'{path.name}' ends after {size} bytes, but its pixels reach to byte {int(ends.max())}: the file is not "
            "complete. Fetch or export it again."
        )


def _metadata_mpp(file: Any, page: Any) -> float | None:
    """µm per pixel from OME, Aperio, ImageJ or the TIFF tags, in that order; ``None`` if absent or not credible."""
    for source, read in (("OME", _ome_mpp), ("Aperio", _aperio_mpp), ("ImageJ", _imagej_mpp), ("TIFF", _tag_mpp)):
        mpp = read(file, page)
        if mpp is None:
            continue
        if _CREDIBLE_MPP[0] <= mpp <= _CREDIBLE_MPP[1]:
            return mpp
        logger.debug("Ignored a pixel size of %g µm in the %s metadata of '%s'.", mpp, source, file.filename)
    return None


def _same(x: float, y: float) -> float | None:
    """Mean of two pixel sizes, or ``None`` where pixels are not square or the numbers make no sense."""
    if not (np.isfinite([x, y]).all() and x > 0 and y > 0) or abs(x - y) > 0.01 * max(x, y):
        return None
    return (x + y) / 2


def _ome_mpp(file: Any, page: Any) -> float | None:
    if not file.is_ome or not file.ome_metadata:
        return None
    found = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", file.ome_metadata)
    if found is None:
        return None
    attributes = dict(re.findall(r'(\w+)="([^"]*)"', found.group(0)))
    sizes = []
    for axis in "XY":
        unit = _UM_PER_UNIT.get(attributes.get(f"PhysicalSize{axis}Unit", "µm"))
        value = _number(attributes.get(f"PhysicalSize{axis}"))
        if unit is None or value is None:
            return None
        sizes.append(unit * value)
    return _same(*sizes)


def _aperio_mpp(file: Any, page: Any) -> float | None:
    found = re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", page.description or "")
    return _number(found.group(1)) if found else None


def _imagej_mpp(file: Any, page: Any) -> float | None:
    metadata = file.imagej_metadata if file.is_imagej else None
    unit = _UM_PER_UNIT.get(str((metadata or {}).get("unit", "")).replace("\\u00B5", "µ"))
    density = _density(page)
    return None if unit is None or density is None else unit / density


def _tag_mpp(file: Any, page: Any) -> float | None:
    if file.is_imagej:
        return None
    tag = page.tags.get("ResolutionUnit")
    unit = _UM_PER_RESOLUTION_UNIT.get(2 if tag is None else int(tag.value))
    density = _density(page)
    return None if unit is None or density is None else unit / density


def _density(page: Any) -> float | None:
    """Pixels per unit from XResolution and YResolution."""
    values = []
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        if tag is None or tag.value[1] == 0 or tag.value[0] == 0:
            return None
        values.append(tag.value[0] / tag.value[1])
    return _same(*values)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
