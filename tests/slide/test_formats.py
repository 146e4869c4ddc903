"""Every kind of file that slides come in, written here and compared pixel by pixel."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr

from stalign.slide import ArrayImage, LazyImage, OpenSlideImage, TiffImage, open_image

HEIGHT, WIDTH = 500, 700
APERIO = "Aperio Image Library v12.0.0\r\n700x500 (64x64)|AppMag = 20|MPP = 0.5010"


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Smooth colours with an asymmetric mark; sides that no tile divides."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    picture = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, 128 + 100 * np.sin(x / 25) * np.cos(y / 40)], axis=-1)
    picture[40:70, 500:620] = (250, 20, 60)
    return picture.astype(np.uint8)


def ycbcr(rgb: np.ndarray) -> np.ndarray:
    """Full-range YCbCr by ITU-R BT.601."""
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return np.rint(np.stack([y, (b - y) / 1.772 + 128, (r - y) / 1.402 + 128], axis=-1)).clip(0, 255).astype(np.uint8)


def tiles_of(picture: np.ndarray, side: int) -> list[np.ndarray]:
    height, width = (-(-n // side) * side for n in picture.shape[:2])
    rest = ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0))
    padded = np.pad(picture, rest, mode="edge")
    return [padded[r : r + side, c : c + side] for r in range(0, height, side) for c in range(0, width, side)]


def same_windows(path: Path, expected: np.ndarray, atol: float = 0, level: int = 0) -> None:
    """Compare whole level, a window in the middle, one pixel, and the cut-off corner."""
    height, width = expected.shape[:2]
    with open_image(path) as image:
        assert image.level_size(level) == (height, width)
        for top, left, tall, wide in (
            (0, 0, height, width),
            (37, 101, height // 2, width // 3),
            (63, 64, 2, 1),
            (height - 5, width - 7, 5, 7),
        ):
            found = image.read_region(level, top, left, tall, wide)
            assert found.dtype == np.uint8
            wanted = expected[top : top + tall, left : left + wide]
            assert np.abs(found.astype(int) - wanted).max() <= atol


# --- TIFF --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "tiles": {"tile": (64, 96)},
    "strips": {"rowsperstrip": 32},
    "thin strips": {"rowsperstrip": 1},
    "odd strips": {"rowsperstrip": 7},
    "one strip": {"rowsperstrip": HEIGHT},
}
LOSSLESS = {
    "none": {},
    "deflate": {"compression": "deflate"},
    "deflate, predictor": {"compression": "deflate", "predictor": True},
    "lzw": {"compression": "lzw"},
    "lzw, predictor": {"compression": "lzw", "predictor": True},
    "zstd": {"compression": "zstd"},
    "packbits": {"compression": "packbits"},
    "jpeg 2000": {"compression": "jpeg2000", "compressionargs": {"reversible": True, "level": 0}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec", LOSSLESS)
def test_lossless(tmp_path, pixels, codec, layout):
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **LOSSLESS[codec], **LAYOUTS[layout])
    same_windows(tmp_path / "a.tif", pixels)


@pytest.mark.parametrize("layout", ["tiles", "strips", "one strip"])
@pytest.mark.parametrize("codec", ["none", "deflate", "lzw, predictor", "jpeg 2000"])
def test_planes(tmp_path, pixels, codec, layout):
    planes = np.moveaxis(pixels, 2, 0)
    options = {"photometric": "rgb", "planarconfig": "separate", **LOSSLESS[codec], **LAYOUTS[layout]}
    tifffile.imwrite(tmp_path / "a.tif", planes, **options)
    same_windows(tmp_path / "a.tif", pixels)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("layout", ["tiles", "strips", "one strip"])
def test_classic_and_big_in_both_byte_orders(tmp_path, pixels, bigtiff, byteorder, layout):
    path = tmp_path / ("a.btf" if bigtiff else "a.tiff")
    deep = pixels.astype(np.uint16) * 257
    tifffile.imwrite(path, deep, photometric="rgb", bigtiff=bigtiff, byteorder=byteorder, **LAYOUTS[layout])
    same_windows(path, pixels)


@pytest.mark.parametrize("layout", ["tiles", "strips"])
@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_jpeg_in_ycbcr(tmp_path, pixels, subsampling, layout):
    options = {"tile": (64, 96)} if layout == "tiles" else {"rowsperstrip": 32}
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels,
        photometric="rgb",  # tifffile then stores YCbCr
        compression="jpeg",
        compressionargs={"level": 95},
        subsampling=subsampling,
        **options,
    )
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages.first.photometric == tifffile.PHOTOMETRIC.YCBCR
    decoded = tifffile.imread(tmp_path / "a.tif")
    same_windows(tmp_path / "a.tif", decoded)
    assert np.abs(decoded.astype(int) - pixels).mean() < 3  # a wrong colour space is off by tens


@pytest.mark.parametrize("layout", ["tiles", "strips"])
def test_jpeg_in_rgb(tmp_path, pixels, layout):
    options = {"tile": (64, 96)} if layout == "tiles" else {"rowsperstrip": 32}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(pixels, photometric="rgb", compression="jpeg", compressionargs={"outcolorspace": "RGB"}, **options)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages.first.photometric == tifffile.PHOTOMETRIC.RGB
    same_windows(tmp_path / "a.tif", tifffile.imread(tmp_path / "a.tif"))
    with open_image(tmp_path / "a.tif") as image:
        assert np.abs(image.read_region(0, 0, 0, HEIGHT, WIDTH).astype(int) - pixels).mean() < 3


def split_tables(jpeg: bytes) -> tuple[bytes, bytes]:
    """Move quantisation and Huffman tables of a JPEG into a stream of their own, as the tag JPEGTables has them."""
    tables, rest, place = b"", jpeg[:2], 2
    while jpeg[place + 1] != 0xDA:  # until the scan begins
        length = 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if jpeg[place + 1] in (0xDB, 0xC4):
            tables += jpeg[place : place + length]
        else:
            rest += jpeg[place : place + length]
        place += length
    return b"\xff\xd8" + tables + b"\xff\xd9", rest + jpeg[place:]


def test_jpeg_with_shared_tables(tmp_path, pixels):
    coded = [
        split_tables(imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), level=90)) for tile in tiles_of(pixels, 64)
    ]
    assert len({tables for tables, _ in coded}) == 1
    tables = coded[0][0]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(
            iter([rest for _, rest in coded]),
            shape=pixels.shape,
            dtype=np.uint8,
            tile=(64, 64),
            photometric="ycbcr",
            compression="jpeg",
            subsampling=(2, 2),
            jpegtables=tables,
        )
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages.first.jpegtables == tables
    same_windows(tmp_path / "a.tif", tifffile.imread(tmp_path / "a.tif"))
    with open_image(tmp_path / "a.tif") as image:
        assert np.abs(image.read_region(0, 0, 0, HEIGHT, WIDTH).astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("layout", ["tiles", "strips", "one strip"])
@pytest.mark.parametrize("codec", ["none", "deflate", "lzw"])
@pytest.mark.parametrize("planes", [False, True])
def test_ycbcr_without_jpeg(tmp_path, pixels, codec, layout, planes):
    stored = ycbcr(pixels)
    options = {**LOSSLESS[codec], **LAYOUTS[layout], "extratags": [(530, "H", 2, (1, 1), True)]}
    stored, config = (np.moveaxis(stored, 2, 0), "separate") if planes else (stored, "contig")
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="ycbcr", planarconfig=config, **options)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages.first.photometric == tifffile.PHOTOMETRIC.YCBCR
    same_windows(tmp_path / "a.tif", pixels, atol=2)


def write_aperio(path: Path, shape: tuple[int, ...], compression: int, photometric: str, coded: list[bytes]) -> None:
    with tifffile.TiffWriter(path) as tif:
        tif.write(
            iter(coded),
            shape=shape,
            dtype=np.uint8,
            tile=(64, 64),
            photometric=photometric,
            compression=compression,
            description=APERIO,
            metadata=None,
        )


@pytest.mark.parametrize(
    ("compression", "photometric", "stored", "atol"),
    [(33005, "rgb", "rgb", 0), (33003, "rgb", "ycbcr", 2), (33003, "ycbcr", "ycbcr", 2), (34712, "ycbcr", "ycbcr", 2)],
)
def test_aperio_jpeg_2000(tmp_path, pixels, compression, photometric, stored, atol):
    """33003 is YCbCr whatever the tags say, 33005 RGB."""
    source = ycbcr(pixels) if stored == "ycbcr" else pixels
    coded = [
        imagecodecs.jpeg2k_encode(np.ascontiguousarray(t), level=0, codecformat="j2k", reversible=True, mct=False)
        for t in tiles_of(source, 64)
    ]
    write_aperio(tmp_path / "a.svs", pixels.shape, compression, photometric, coded)
    same_windows(tmp_path / "a.svs", pixels, atol=atol)
    with open_image(tmp_path / "a.svs") as image:
        assert isinstance(image, TiffImage)
        assert image.mpp == pytest.approx(0.501)


# 64 × 64 pixels, lossless, one Cb and Cr for two pixels of a row (as Aperio's 33003 has it): Y is 60 + 120 x / 64, 40
# more in every second 32 rows; Cb 90 + 80 y / 64; Cr 100 + 80 x / 64, all rounded down.
COARSE_COLOURS = base64.b64decode(
    "/0//UQAvAAAAAABAAAAAQAAAAAAAAAAAAAAAQAAAAEAAAAAAAAAAAAADBwEBBwIBBwIB/1IADAAAAAEABQQEAAH/XAATQEBISFBISFBISFBISFBI"
    "SFD/ZAAlAAFDcmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAADNAAH/k8+0FAeLd+npx9QGBuh/wPhDCP9/w+oEg+cGDQL/"
    "fwmoMKD5wQALb8PqAwACUX/B84SD5w4iGhBXDHZ4NZxkh6B8gIADbsHzgwAX18fA+QJB84sANqGZzwDUxuGgrImRATBFoD4QwCkgscD5AgAiHMd/"
    "wHwiQfOOAF+nx4lnaqrv+J776VVAMBqXwaAdEIQgJz/AfCIANqF5gMA6LB84wItiAaufxDDqjp7W1/wBhIS/oAkAyHpKf8A6KF+nx6Y//9k="
)


def coarse_colours() -> np.ndarray:
    y, x = np.mgrid[:64, :64].astype(float)
    luma = np.floor(60 + x * 120 // 64 + (y // 32 % 2) * 40)
    blue, red = 90 + y * 80 // 64 - 128, 100 + (x // 2) * 80 // 32 - 128
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=-1)
    return rgb.clip(0, 255)


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_aperio_jpeg_2000_with_coarse_colours(tmp_path, photometric):
    write_aperio(tmp_path / "a.svs", (192, 256, 3), 33003, photometric, [COARSE_COLOURS] * 12)
    same_windows(tmp_path / "a.svs", np.tile(coarse_colours(), (3, 4, 1)), atol=1.1)
    pytest.importorskip("openslide")
    with OpenSlideImage(tmp_path / "a.svs") as other, open_image(tmp_path / "a.svs") as image:
        windows = [source.read_region(0, 0, 0, 192, 256).astype(int) for source in (image, other)]
        assert np.abs(windows[0] - windows[1]).max() <= 1


@pytest.mark.parametrize("compression", ["deflate", "jpeg", "jpeg2000"])
@pytest.mark.parametrize("style", ["ome", "pages", "svs"])
def test_pyramids(tmp_path, pixels, style, compression):
    levels = [pixels, pixels[::2, ::2], pixels[::4, ::4]]
    path = tmp_path / {"ome": "a.ome.tif", "pages": "a.tif", "svs": "a.svs"}[style]
    common = {"photometric": "rgb", "tile": (64, 64), "compression": compression}
    if compression == "jpeg2000":
        common["compressionargs"] = {"reversible": True, "level": 0}
    with tifffile.TiffWriter(path, ome=style == "ome") as tif:
        first = {"subifds": 2} if style == "ome" else {"description": APERIO, "metadata": None}
        tif.write(levels[0], **common, **(first if style != "pages" else {}))
        if style == "svs":  # scanners keep a small picture between the levels
            tif.write(pixels[::7, ::7], photometric="rgb", metadata=None)
        for level in levels[1:]:
            reduced = {"subfiletype": 1} if style == "ome" else {"metadata": None}
            tif.write(level, **common, **reduced, **({"description": APERIO} if style == "svs" else {}))
    with open_image(path) as image:
        assert image.level_downsamples == (1.0, 2.0, 4.0)
    for number, level in enumerate(levels):
        if compression != "jpeg":
            same_windows(path, level, level=number)
            continue
        with open_image(path) as image:
            found = image.read_region(number, 0, 0, *level.shape[:2])
            assert np.abs(found.astype(int) - level).mean() < 4


def test_grey_inverted_alpha_and_float(tmp_path, pixels):
    grey = pixels[..., 0]
    tifffile.imwrite(tmp_path / "grey.tif", 255 - grey, photometric="miniswhite", tile=(64, 64), compression="lzw")
    same_windows(tmp_path / "grey.tif", np.repeat(grey[..., None], 3, axis=2))
    alpha = np.where(np.arange(WIDTH) < 300, 255, 0)[None, :, None].repeat(HEIGHT, axis=0).astype(np.uint8)
    rgba = np.concatenate([pixels, alpha], axis=2)
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], rowsperstrip=20)
    same_windows(tmp_path / "rgba.tif", np.where(alpha == 255, pixels, 255))
    tifffile.imwrite(tmp_path / "float.tif", (pixels / 255).astype(np.float32), photometric="rgb", tile=(64, 64))
    same_windows(tmp_path / "float.tif", pixels)


def test_tiles_that_were_left_out_are_white(tmp_path, pixels):
    coded = [imagecodecs.zlib_encode(np.ascontiguousarray(t).tobytes()) for t in tiles_of(pixels, 64)]
    coded[12] = b""
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(
            iter(coded),
            shape=pixels.shape,
            dtype=np.uint8,
            tile=(64, 64),
            photometric="rgb",
            compression="deflate",
        )
    expected = pixels.copy()
    expected[64:128, 64:128] = 255
    same_windows(tmp_path / "a.tif", expected)


def test_large_16_bit_image_that_holds_8_bits(tmp_path):
    deep = np.tile(np.arange(200, dtype=np.uint16), (5000, 25))
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="minisblack", tile=(512, 512), compression="deflate")
    with open_image(tmp_path / "a.tif") as image:
        assert image.read_region(0, 100, 40, 1, 3)[0, :, 0].tolist() == [40, 41, 42]


# --- arrays and stores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["yxc", "cyx"])
def test_memory_maps(tmp_path, pixels, layout):
    array = pixels if layout == "yxc" else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    np.save(tmp_path / "a.npy", array)
    mapped = np.memmap(tmp_path / "a.raw", dtype=np.uint8, mode="w+", shape=array.shape)
    mapped[...] = array
    for source in (tmp_path / "a.npy", np.load(tmp_path / "a.npy", mmap_mode="r"), mapped):
        with open_image(source) as image:
            assert isinstance(image, LazyImage)
            np.testing.assert_array_equal(image.read_region(0, 11, 23, 400, 600), pixels[11:411, 23:623])
    mapped[0, 0] = 3  # what was read is the reader's own, the user's array stays writeable


@pytest.mark.parametrize("layout", ["yxc", "cyx"])
@pytest.mark.parametrize("chunks", [(100, 130), (64, 64), (500, 700)])
def test_dask(pixels, layout, chunks):
    da = pytest.importorskip("dask.array")
    array = pixels if layout == "yxc" else np.moveaxis(pixels, 2, 0)
    lazy = da.from_array(array, chunks=(*chunks, 3) if layout == "yxc" else (1, *chunks))
    with open_image(lazy) as image:
        np.testing.assert_array_equal(image.read_region(0, 0, 0, HEIGHT, WIDTH), pixels)
        np.testing.assert_array_equal(image.read_region(0, 11, 23, 90, 8), pixels[11:101, 23:31])


def test_dask_chunks_are_computed_once(pixels):
    da = pytest.importorskip("dask.array")
    computed = []

    def look(block, block_info=None):
        if block_info:
            computed.append(block_info[None]["chunk-location"])
        return block

    lazy = da.from_array(pixels, chunks=(250, 350, 3)).map_blocks(look, dtype=np.uint8, meta=np.empty((0, 0, 0), "u1"))
    with open_image(lazy) as image:
        for left in range(0, 600, 40):
            image.read_region(0, 10, left, 100, 40)
    assert sorted(computed) == [(0, 0, 0), (0, 1, 0)]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("axes", ["yxc", "cyx", "tczyx"])
def test_ome_zarr(tmp_path, pixels, axes, zarr_format):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=zarr_format)
    levels = [pixels, pixels[::2, ::2]]
    for number, level in enumerate(levels):
        array = level if axes == "yxc" else np.moveaxis(level, 2, 0)
        array = array[None, :, None] if axes == "tczyx" else array
        stored = group.create_array(str(number), shape=array.shape, dtype="uint8", chunks=tuple(map(_chunk, axes)))
        stored[...] = array
    scales = [{"type": "scale", "scale": [f if axis in "yx" else 1.0 for axis in axes]} for f in (0.25, 0.5)]
    named = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in axes]
    multiscales = [
        {
            "axes": named,
            "datasets": [{"path": str(i), "coordinateTransformations": [scales[i]]} for i in range(2)],
        }
    ]
    attributes = {"multiscales": multiscales}
    group.attrs.update(attributes if zarr_format == 2 else {"ome": {"version": "0.5", **attributes}})
    with open_image(tmp_path / "a.zarr") as image:
        assert image.level_downsamples == (1.0, 2.0)
        assert image.mpp == pytest.approx(0.25)
    for number, level in enumerate(levels):
        same_windows(tmp_path / "a.zarr", level, level=number)


def _chunk(axis: str) -> int:
    return 96 if axis in "yx" else 1


def test_ome_zarr_as_bioformats2raw_writes_it(tmp_path, pixels):
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    image = root.create_group("0")
    stored = image.create_array("0", shape=(1, 3, 1, HEIGHT, WIDTH), chunks=(1, 1, 1, 128, 128), dtype="uint8")
    stored[...] = np.moveaxis(pixels, 2, 0)[None, :, None]
    image.attrs["multiscales"] = [{"axes": [{"name": a} for a in "tczyx"], "datasets": [{"path": "0"}]}]
    same_windows(tmp_path / "a.zarr", pixels)


def test_spatialdata_images(tmp_path, pixels):
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata.models import Image2DModel

    channels_first = np.moveaxis(pixels, 2, 0)
    flat = Image2DModel.parse(channels_first, dims=("c", "y", "x"))
    tree = Image2DModel.parse(channels_first, dims=("c", "y", "x"), scale_factors=[2, 2], chunks=(3, 128, 128))
    for source, n_levels in ((flat, 1), (tree, 3)):
        with open_image(source) as image:
            assert isinstance(image, LazyImage)
            assert len(image.level_downsamples) == n_levels
            np.testing.assert_array_equal(image.read_region(0, 11, 23, 400, 600), pixels[11:411, 23:623])
    with open_image(tree) as image:
        coarse = np.moveaxis(np.asarray(tree["scale1"]["image"].data), 0, 2)
        np.testing.assert_array_equal(image.read_region(1, 0, 0, *coarse.shape[:2]), coarse)
    spatialdata.SpatialData(images={"he": tree}).write(tmp_path / "sd.zarr")
    same_windows(tmp_path / "sd.zarr" / "images" / "he", pixels)
    with pytest.raises(ValueError, match=r"images/he"):
        open_image(tmp_path / "sd.zarr")


def test_named_axes_decide_and_not_the_shape(pixels):
    xarray = pytest.importorskip("xarray")
    narrow = np.ascontiguousarray(np.moveaxis(pixels[:, :4], 2, 0))  # (3, 500, 4) looks like RGBA, channels last
    with open_image(xarray.DataArray(narrow, dims=("c", "y", "x"))) as image:
        assert isinstance(image, ArrayImage)
        assert (image.height, image.width) == (HEIGHT, 4)
        np.testing.assert_array_equal(image.read_region(0, 0, 0, HEIGHT, 4), pixels[:, :4])
    turned = xarray.DataArray(np.moveaxis(pixels, 0, 1)[:, :, None], dims=("x", "y", "z", "c"))
    with open_image(turned) as image:
        np.testing.assert_array_equal(image.read_region(0, 0, 0, HEIGHT, WIDTH), pixels)


def test_images_that_an_anndata_is_given(tmp_path, hexagonal):
    """A memory map is remembered by its file, an image of SpatialData as one array; patches are those of the array."""
    import stalign as sta
    from stalign.slide._library import PatchReader

    pytest.importorskip("spatialdata")
    from spatialdata.models import Image2DModel

    array = np.kron(np.random.default_rng(0).integers(0, 255, (60, 65, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    first = np.moveaxis(array, 2, 0)
    sources = {
        "array": array,
        "map": np.load(tmp_path / "a.npy", mmap_mode="r"),
        "flat": Image2DModel.parse(first, dims=("c", "y", "x")),
        "tree": Image2DModel.parse(first, dims=("c", "y", "x"), scale_factors=[2]),
    }
    patches = {}
    for name, source in sources.items():
        adata = hexagonal.copy()
        sta.pp.extract_niches(adata, image=source, image_key="hires")
        adata = adata.copy()
        with PatchReader(adata) as reader:
            patches[name] = reader.read(np.arange(81), 112.0, 16)
        np.testing.assert_array_equal(patches[name], patches["array"])
        if name == "map":
            assert adata.uns["stalign"]["niche"]["libraries"]["S1"]["image"] == "path"


def test_spatialdata_and_xarray_are_not_imported():
    import subprocess

    code = (
        "import sys; from stalign.slide import open_image; import numpy as np; open_image(np.zeros((9, 9), np.uint8)); "
        "heavy = {'spatialdata', 'xarray', 'dask', 'openslide', 'torch', 'scanpy', 'squidpy'} & set(sys.modules); "
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603


# --- OpenSlide ---------------------------------------------------------------------------------------------------


def write_vendor_file(path: Path, pixels: np.ndarray) -> None:
    """A tiled TIFF is a slide to OpenSlide whatever its name."""
    with tifffile.TiffWriter(path) as tif:
        for step in (1, 2):
            tif.write(
                pixels[::step, ::step],
                photometric="rgb",
                tile=(64, 64),
                compression="deflate",
                subfiletype=int(step > 1),
                resolution=(20_000 / step, 20_000 / step),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


@pytest.mark.parametrize("suffix", [".bif", ".ndpi", ".scn"])
def test_openslide(tmp_path, pixels, suffix):
    pytest.importorskip("openslide")
    path = tmp_path / f"a{suffix}"
    write_vendor_file(path, pixels)
    same_windows(path, pixels)
    same_windows(path, pixels[::2, ::2], level=1)
    with open_image(path) as image:
        assert isinstance(image, OpenSlideImage)
        assert image.mpp == pytest.approx(0.5)
        assert image.level_downsamples == (1.0, 2.0)


def test_openslide_and_tifffile_agree_on_svs(tmp_path, pixels):
    pytest.importorskip("openslide")
    with tifffile.TiffWriter(tmp_path / "a.svs") as tif:
        common = {"photometric": "rgb", "tile": (64, 64), "compression": "jpeg", "description": APERIO}
        tif.write(pixels, **common, metadata=None)
        tif.write(pixels[::7, ::7], photometric="rgb", metadata=None)
        tif.write(pixels[::4, ::4], **common, metadata=None)
    with OpenSlideImage(tmp_path / "a.svs") as other, open_image(tmp_path / "a.svs") as image:
        assert isinstance(image, TiffImage)
        assert image.mpp == other.mpp == pytest.approx(0.501)
        assert image.level_downsamples == pytest.approx(other.level_downsamples, rel=0.01)
        for level in (0, 1):
            height, width = image.level_size(level)
            assert other.level_size(level) == (height, width)
            windows = [source.read_region(level, 0, 0, height, width).astype(int) for source in (image, other)]
            assert np.abs(windows[0] - windows[1]).mean() < 1


def test_without_openslide_the_extra_is_named(tmp_path, pixels, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    write_vendor_file(tmp_path / "a.mrxs", pixels)
    with pytest.raises(ImportError, match=r"a\.mrxs.*stalign\[wsi\]"):
        open_image(tmp_path / "a.mrxs")
    write_vendor_file(tmp_path / "a.scn", pixels)  # a dialect of TIFF can be read all the same
    with open_image(tmp_path / "a.scn") as image:
        assert isinstance(image, TiffImage)


def test_openslide_refuses_what_it_does_not_know(tmp_path):
    pytest.importorskip("openslide")
    (tmp_path / "a.mrxs").write_bytes(b"no slide at all")
    with pytest.raises(ValueError, match=r"a\.mrxs.*no format"):
        open_image(tmp_path / "a.mrxs")
