"""Windows of a TIFF: only the tiles or strips that a window touches are decoded."""

from __future__ import annotations

import os
import re
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np

from stalign._logging import logger
from stalign.slide._cache import TileCache
from stalign.slide._convert import check_dtype, ycbcr_to_rgb
from stalign.slide._image import check_whole, pixel_limit
from stalign.slide._tiles import TiledImage, TileGrid
from stalign.slide._units import UM_PER_UNIT, is_credible, number, same_sides

_UM_PER_RESOLUTION_UNIT = {2: 25_400.0, 3: 10_000.0}
_BAND_ROWS = 64
"""Strips are decoded in bands of at least this many rows, so that a row of pixels is not a piece of its own."""

# Values of TIFF tags.
_UNCOMPRESSED = 1
_NEW_JPEG = 7
_JPEG = (6, _NEW_JPEG, 33007, 34892)
_JPEG_2000 = (33003, 33004, 33005, 34712)
_APERIO_YCBCR = 33003
_PLAIN = (_UNCOMPRESSED, 5, 8, 32773, 32946, 34925, 34926, 50000, 50013)
"""Compressions of bytes, which know nothing of colours."""
_WHITE_IS_ZERO, _PALETTE, _CMYK, _YCBCR = 0, 3, 5, 6
_PHOTOMETRICS = {_PALETTE: "indices into a palette", _CMYK: "CMYK colours", 8: "CIELAB colours", 4: "a mask"}
_SEPARATE_PLANES = 2
_CODESTREAM = b"\xff\x4f\xff\x51"
_REDUCED = 1


class TiffImage(TiledImage):
    """A TIFF on disk: flat or pyramidal, tiled or striped, chunky or planar, classic or BigTIFF.

    Parameters
    ----------
    path
        The file.
    max_pixels
        Largest single strip or tile; ``None`` takes ``settings.max_image_pixels``.
    cache
        Where decoded tiles are kept; ``None`` takes the one that all images share.

    Raises
    ------
    ValueError
        If the file is not complete, if its levels disagree, or if its pixels cannot be read as RGB.
    """

    def __init__(self, path: str | Path, *, max_pixels: int | None = None, cache: TileCache | None = None) -> None:
        self.path = Path(path)
        limit = pixel_limit(max_pixels)
        self._file = _open(self.path)
        try:
            pages = _pages(self._file, self.path)
            for page in pages:
                _check_complete(page, self.path)
                _check_page(page, self.path)
            self._levels = [_Level(page) for page in pages]
            for level in self._levels:
                check_whole(self.path.name, level.piece_size, limit, level.piece)
            super().__init__(
                self.path.name,
                [level.grid for level in self._levels],
                mpp=_metadata_mpp(self._file, pages[0]),
                cache=cache,
            )
            self._reader = _Reader()
            if pages[0].dtype == np.uint16:
                self._divisor = self._find_divisor()
        except BaseException:
            self._file.close()
            raise

    def _raw(self, level: int, row: int, column: int) -> tuple[np.ndarray, int]:
        try:
            return self._levels[level].read(self._reader, row, column)
        except (RuntimeError, ValueError, OSError) as error:
            raise self._damaged(level, row, column, error) from error

    def _decode(self, level: int, row: int, column: int) -> tuple[np.ndarray, int]:
        pixels, size = super()._decode(level, row, column)
        return (255 - pixels if self._levels[level].page.photometric == _WHITE_IS_ZERO else pixels), size

    def close(self) -> None:
        """Close the file and release its tiles."""
        super().close()
        self._file.close()


def _open(path: Path) -> Any:
    import tifffile

    try:
        return tifffile.TiffFile(path)
    except (tifffile.TiffFileError, struct.error) as error:
        raise ValueError(f"'{path.name}' cannot be read as a TIFF: {error}. Is the file complete?") from error


class _Reader:
    """Bytes of a file, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, handle: Any, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            data = os.pread(handle.fileno(), size, offset)
            while len(data) < size and (more := os.pread(handle.fileno(), size - len(data), offset + len(data))):
                data += more  # one call gives two gigabytes at most
        else:
            with self._lock:
                handle.seek(offset)
                data = handle.read(size)
        if len(data) != size:
            raise ValueError(f"{size} bytes are expected at byte {offset}, {len(data)} are there")
        return data


class _Level:
    """One page: how it is cut into tiles, and how one of them is decoded.

    Tiles are the file's own. Strips are joined to bands; the rows of one uncompressed strip are read band by band.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        height, width = page.imagelength, page.imagewidth
        self._planes = page.samplesperpixel if page.planarconfig == _SEPARATE_PLANES else 1
        rows = min(page.rowsperstrip or height, height)
        self._rows_at_once = 0
        self._joined = 1
        if page.is_tiled:
            self.grid = TileGrid.regular(height, width, page.tilelength, page.tilewidth)
            self.piece = "tiles of "
        elif rows == height and _is_plain(page):
            self._rows_at_once = _BAND_ROWS
            self.grid = TileGrid.regular(height, width, _BAND_ROWS, width)
            self.piece = "strips of "
        else:
            while rows * self._joined < min(_BAND_ROWS, height):
                self._joined *= 2
            self.grid = TileGrid.regular(height, width, rows * self._joined, width)
            self.piece = "" if rows == height else "strips of "
        # What the codec has to decode at once.
        self.piece_size = (rows, width) if self._joined > 1 else self.grid.tile_size
        self._segment_rows = page.tilelength if page.is_tiled else rows
        self._per_row = self.grid.shape[1]
        self._per_plane = -(-height // self._segment_rows) * self._per_row
        self._is_jpeg_2000 = page.compression in _JPEG_2000
        self._to_rgb = _needs_conversion(page)

    def read(self, reader: _Reader, row: int, column: int) -> tuple[np.ndarray, int]:
        """Decode a tile to (height, width, samples) of the file's own type; also the number of bytes read."""
        top, _, height, width = self.grid.window(row, column)
        page = self.page
        # Scanners leave out tiles of empty slide: white, not black.
        white = 255 if page.dtype == np.uint8 else np.iinfo(np.uint16).max if page.dtype == np.uint16 else 1
        fill = 0 if page.photometric == _WHITE_IS_ZERO else white
        pixels: np.ndarray | None = None
        size = 0
        if self._rows_at_once:
            pixels, size = self._read_rows(reader, top, height)
        else:
            for plane in range(self._planes):
                for part in range(self._joined):
                    strip = row * self._joined + part
                    if strip * self._segment_rows >= page.imagelength:
                        break
                    number = plane * self._per_plane + strip * self._per_row + column
                    block, n_bytes = self._segment(reader, number)
                    size += n_bytes
                    if block is None:
                        continue
                    block = block[: min(height, page.imagelength - strip * self._segment_rows), :width]
                    if block.shape == (height, width, page.samplesperpixel):
                        pixels = block
                        break
                    if pixels is None:
                        pixels = np.full((height, width, page.samplesperpixel), fill, dtype=page.dtype)
                    start = part * self._segment_rows
                    planes = slice(None) if self._planes == 1 else slice(plane, plane + 1)
                    pixels[start : start + len(block), :, planes] = block
            if pixels is None:
                return np.full((height, width, page.samplesperpixel), fill, dtype=page.dtype), size
        return (ycbcr_to_rgb(pixels) if self._to_rgb and not self._is_jpeg_2000 else pixels), size

    def _read_rows(self, reader: _Reader, top: int, height: int) -> tuple[np.ndarray, int]:
        page = self.page
        samples = page.samplesperpixel // self._planes
        dtype = page.dtype.newbyteorder(page.parent.byteorder)
        row_bytes = page.imagewidth * samples * dtype.itemsize
        planes = [
            np.frombuffer(reader(page.parent.filehandle, offset + top * row_bytes, height * row_bytes), dtype)
            for offset in page.dataoffsets[: self._planes]
        ]
        shaped = [plane.reshape(height, page.imagewidth, samples) for plane in planes]
        return np.concatenate(shaped, axis=2).astype(page.dtype, copy=False), self._planes * height * row_bytes

    def _segment(self, reader: _Reader, number: int) -> tuple[np.ndarray | None, int]:
        """Decode one of the file's tiles or strips, (height, width, samples); ``None`` where it was left out."""
        page = self.page
        size = page.databytecounts[number]
        if size == 0:
            return None, 0
        data = reader(page.parent.filehandle, page.dataoffsets[number], size)
        _check_coded(page, data)
        decoded, _, shape = page.decode(data, number, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        if decoded is None:
            return None, size
        pixels = decoded[0, : shape[1], : shape[2]]
        if self._to_rgb and self._is_jpeg_2000 and not _has_coarse_colours(data):
            pixels = ycbcr_to_rgb(pixels)
        return pixels, size


def _is_plain(page: Any) -> bool:
    """Whether all pixels of a page, or of each of its planes, lie in the file as they are."""
    planes = page.samplesperpixel if page.planarconfig == _SEPARATE_PLANES else 1
    size = page.imagelength * page.imagewidth * page.samplesperpixel // planes * page.dtype.itemsize
    return (
        page.compression == _UNCOMPRESSED
        and min(page.databytecounts) >= size
        and page.predictor == 1
        and page.fillorder == 1
        and page.bitspersample in (8, 16, 32, 64)
    )


def _needs_conversion(page: Any) -> bool:
    """Whether decoding leaves YCbCr: where the codec does not know of colours, or sees one plane at a time."""
    if page.compression in _JPEG_2000:
        return (page.compression == _APERIO_YCBCR or page.photometric == _YCBCR) and page.samplesperpixel == 3
    if page.photometric != _YCBCR:
        return False
    return page.compression in _PLAIN or (page.compression in _JPEG and page.planarconfig == _SEPARATE_PLANES)


def _pages(file: Any, path: Path) -> list[Any]:
    """Return the pages of the first image from fine to coarse; a file that ends before its tables do is refused."""
    import tifffile

    try:
        return _pyramid(file, path)
    except (tifffile.TiffFileError, IndexError, KeyError, TypeError, struct.error) as error:
        raise ValueError(
            f"'{path.name}' cannot be read as a TIFF: {error or type(error).__name__}. Is the file complete?"
        ) from error


def _pyramid(file: Any, path: Path) -> list[Any]:
    """Return the pages of the first image from fine to coarse.

    Writers keep levels as sub-pages (OME-TIFF), as a series that tifffile knows (SVS and others) or as plain further
    pages, each a smaller copy of the first.
    """
    series = file.series[0]
    pages = [level.keyframe for level in series.levels]
    if len(series.levels[0].pages) > 1 and not _is_one_plane(series):
        raise ValueError(
            f"'{path.name}' holds {len(series.levels[0].pages)} planes (axes {series.axes}), not one RGB image. Save "
            "one RGB plane as TIFF."
        )
    others = list(pages[0].pages) if pages[0].subifds else []
    if len(pages) == 1:
        others += list(file.pages)[1:]
    if others:
        known = {page.offset for page in pages}
        others = [page for page in map(_keyframe, others) if page.offset not in known]
        pages += [page for page in others if _is_level(pages[0], page, labelled=series.kind in ("svs", "ndpi", "scn"))]
    _check_alike(pages, path)
    pages.sort(key=lambda page: -page.imagewidth)
    # The same level stored twice would make the choice of level arbitrary.
    return [page for i, page in enumerate(pages) if i == 0 or page.imagewidth < pages[i - 1].imagewidth]


def _is_one_plane(series: Any) -> bool:
    return all(size == 1 for axis, size in zip(series.axes, series.shape, strict=True) if axis not in "YXS")


def _keyframe(page: Any) -> Any:
    return page.aspage() if hasattr(page, "aspage") else page


def _is_level(first: Any, page: Any, *, labelled: bool) -> bool:
    """Whether a further page is a level.

    It is where it calls itself a smaller version of another page, which scanners do with labels too, or where it has
    the type and the aspect of the first to a pixel, which labels and macros do not.
    """
    if page.imagewidth >= first.imagewidth:
        return False
    if page.subfiletype & _REDUCED and not labelled:
        return True
    factor = first.imagewidth / page.imagewidth
    same = page.dtype == first.dtype and page.samplesperpixel == first.samplesperpixel
    return same and abs(first.imagelength / factor - page.imagelength) <= 1.5


def _check_alike(pages: list[Any], path: Path) -> None:
    first = pages[0]
    for level, page in enumerate(pages[1:], start=1):
        if page.dtype != first.dtype or page.samplesperpixel != first.samplesperpixel:
            raise ValueError(
                f"The levels of '{path.name}' disagree: level 0 has {first.samplesperpixel} channels of {first.dtype}, "
                f"level {level} {page.samplesperpixel} of {page.dtype}. Save the pyramid again, or level 0 alone."
            )


def _check_page(page: Any, path: Path) -> None:
    import tifffile

    if page.bitspersample == 1 or page.dtype is None:
        raise ValueError(
            f"'{path.name}' is a {page.bitspersample}-bit picture, a mask rather than an image. Pass an RGB image."
        )
    check_dtype(page.dtype)
    if page.photometric in _PHOTOMETRICS:
        raise ValueError(f"'{path.name}' stores {_PHOTOMETRICS[page.photometric]}. Save it as RGB.")
    if page.samplesperpixel not in (1, 3, 4):
        raise ValueError(f"'{path.name}' has {page.samplesperpixel} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA).")
    if page.photometric == _YCBCR and page.compression in _PLAIN and tuple(page.subsampling or (1, 1)) != (1, 1):
        raise ValueError(
            f"'{path.name}' stores YCbCr with one colour for {page.subsampling} pixels and no JPEG, which cannot be "
            "read. Save it as RGB or with JPEG."
        )
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise ValueError(
            f"'{path.name}' is compressed by {page.compression!r}, which cannot be decoded here. Save it with JPEG, "
            "deflate or LZW."
        )


def _check_complete(page: Any, path: Path) -> None:
    """Refuse a file that ends before its pixels do, which an interrupted download leaves behind."""
    ends = np.asarray(page.dataoffsets, dtype=np.int64) + np.asarray(page.databytecounts, dtype=np.int64)
    size = page.parent.filehandle.size
    if len(ends) and ends.max() > size:
        raise ValueError(
            f"'{path.name}' ends after {size} bytes, but its pixels reach to byte {int(ends.max())}: the file is not "
            "complete. Fetch or export it again."
        )
    tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    if not tall or not wide:
        return
    planes = page.samplesperpixel if page.planarconfig == _SEPARATE_PLANES else 1
    expected = planes * -(-page.imagelength // min(tall, page.imagelength)) * -(-page.imagewidth // wide)
    if len(ends) < expected:
        raise ValueError(
            f"'{path.name}' lists {len(ends)} of the {expected} tiles or strips that {page.imagelength} × "
            f"{page.imagewidth} pixels need: the file is not complete. Fetch or export it again."
        )


def _check_coded(page: Any, data: bytes) -> None:
    """Refuse a compressed tile that ends too early, or whose own header claims other sizes than the TIFF's.

    The codecs fill what is missing with grey, and take memory for whatever a header claims.
    """
    if page.jpegheader is not None:
        return
    if page.compression in _JPEG:
        if page.compression == _NEW_JPEG and b"\xff\xd9" not in data:
            raise ValueError("its JPEG data have no end")
        size = _jpeg_size(data)
    elif page.compression in _JPEG_2000 and data[:4] == _CODESTREAM:
        size = tuple(
            b - a for a, b in zip(struct.unpack(">2I", data[16:24]), struct.unpack(">2I", data[8:16]), strict=True)
        )
    else:
        return
    if page.is_tiled:
        limit = (page.tilewidth, page.tilelength)
    else:
        limit = (page.imagewidth, min(page.rowsperstrip, page.imagelength))
    if size is not None and (size[0] > 2 * limit[0] or size[1] > 2 * limit[1]):
        raise ValueError(f"its data claim {size[1]} × {size[0]} pixels where {limit[1]} × {limit[0]} are expected")


def _has_coarse_colours(data: bytes) -> bool:
    """Whether a JPEG 2000 stream has fewer colours than pixels; the codec then tells by itself that it is YCbCr."""
    return data[:4] == _CODESTREAM and data[46:48] != b"\1\1"


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in a JPEG's frame header; ``None`` where there is none."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">2H", data[place + 5 : place + 9])
            return width, height
        place += 2 + length
    return None


def _metadata_mpp(file: Any, page: Any) -> float | None:
    """µm per pixel from OME, Aperio, ImageJ or the TIFF tags, in that order; ``None`` if absent or not credible."""
    for source, read in (("OME", _ome_mpp), ("Aperio", _aperio_mpp), ("ImageJ", _imagej_mpp), ("TIFF", _tag_mpp)):
        mpp = read(file, page)
        if mpp is None:
            continue
        if is_credible(mpp):
            return mpp
        logger.debug("Ignored a pixel size of %g µm in the %s metadata of '%s'.", mpp, source, file.filename)
    return None


def _ome_mpp(file: Any, page: Any) -> float | None:
    if not file.is_ome or not file.ome_metadata:
        return None
    found = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", file.ome_metadata)
    if found is None:
        return None
    attributes = dict(re.findall(r'(\w+)="([^"]*)"', found.group(0)))
    sizes = []
    for axis in "XY":
        unit = UM_PER_UNIT.get(attributes.get(f"PhysicalSize{axis}Unit", "µm"))
        value = number(attributes.get(f"PhysicalSize{axis}"))
        if unit is None or value is None:
            return None
        sizes.append(unit * value)
    return same_sides(*sizes)


def _aperio_mpp(file: Any, page: Any) -> float | None:
    found = re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", page.description or "")
    return number(found.group(1)) if found else None


def _imagej_mpp(file: Any, page: Any) -> float | None:
    metadata = file.imagej_metadata if file.is_imagej else None
    unit = UM_PER_UNIT.get(str((metadata or {}).get("unit", "")).replace("\\u00B5", "µ"))
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
    return same_sides(*values)
