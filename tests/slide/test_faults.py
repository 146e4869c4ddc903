"""Bad images: each is refused with a message that names the thing, the value and the way out."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

import stalign
from stalign.slide import open_image, read_patches
from stalign.slide._library import PatchReader


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Blocks of 8 pixels in colours of their own."""
    return np.kron(np.random.default_rng(0).integers(0, 255, (75, 100, 3)), np.ones((8, 8, 1))).astype(np.uint8)


@pytest.fixture
def limit():
    """Set ``settings.max_image_pixels`` for one test."""
    before = stalign.settings.max_image_pixels
    yield lambda value: setattr(stalign.settings, "max_image_pixels", value)
    stalign.settings.max_image_pixels = before


def read_everything(path: Path) -> None:
    with open_image(path) as image:
        for level in range(len(image.level_downsamples)):
            image.read_region(level, 0, 0, *image.level_size(level))


# --- files that are not whole ------------------------------------------------------------------------------------

KINDS = {
    "tiles": {"tile": (64, 64), "compression": "jpeg"},
    "strips": {"rowsperstrip": 16, "compression": "lzw"},
    "one strip": {"rowsperstrip": 600},
}


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_at_any_byte(tmp_path, pixels, kind, bigtiff):
    whole, cut = tmp_path / "whole.tif", tmp_path / "cut.tif"
    with tifffile.TiffWriter(whole, bigtiff=bigtiff) as tif:
        tif.write(pixels, photometric="rgb", subifds=1, **KINDS[kind])
        tif.write(pixels[::2, ::2], photometric="rgb", subfiletype=1, **KINDS[kind])
    data = whole.read_bytes()
    read_everything(whole)
    for size in (*range(0, 300, 13), *np.linspace(300, len(data) - 2, 30).astype(int)):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"'cut\.tif'"):
            read_everything(cut)
    for share in (0.3, 0.9):
        cut.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=r"'cut\.tif' (ends after|lists).*not complete"):
            open_image(cut)


@pytest.mark.parametrize("kind", ["rgb.png", "rgb.jpg", "array.npy"])
def test_truncated_pictures(tmp_path, pixels, kind):
    path = tmp_path / kind
    if kind.endswith("npy"):
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    read_everything(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"'{kind}'.*complete"):
        open_image(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"'{kind}'.*complete"):
        open_image(path)


def overwrite_tile(path: Path, number: int, make) -> None:
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        offset, size = page.dataoffsets[number], page.databytecounts[number]
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = make(bytes(data[offset : offset + size]))
    path.write_bytes(data)


DAMAGES = {
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: np.random.default_rng(1).bytes(len(data)),
    "cut": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
}


@pytest.mark.parametrize(
    ("compression", "damage"),
    [
        *((compression, damage) for compression in ("jpeg", "deflate", "zstd") for damage in DAMAGES),
        *(("jpeg2000", damage) for damage in ("zeros", "noise")),  # one that is cut is a coarser picture by design
    ],
)
def test_a_damaged_tile_is_named(tmp_path, pixels, compression, damage):
    path = tmp_path / "bad.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64), compression=compression)
    overwrite_tile(path, 2 * 13 + 3, DAMAGES[damage])
    with open_image(path) as image:
        image.read_region(0, 0, 0, 128, 800)  # the rest can be read
        for _ in range(2):  # a failure is no result that is kept
            with pytest.raises(
                ValueError, match=r"'bad\.tif'.*level 0, tile \(2, 3\).*rows 128 to 191 and columns 192 to 255"
            ):
                read_patches(image, np.array([[30.0, 30.0], [210.0, 150.0]]), 20.0, 10)


def test_a_damaged_strip_is_named(tmp_path, pixels):
    path = tmp_path / "bad.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=100, compression="deflate")
    overwrite_tile(path, 4, DAMAGES["zeros"])
    with open_image(path) as image, pytest.raises(ValueError, match=r"'bad\.tif'.*rows 400 to 499"):
        image.read_region(0, 390, 0, 20, 20)


def test_a_damaged_zarr_chunk_is_named(tmp_path, pixels):
    store = zarr.open(str(tmp_path / "a.zarr"), mode="w", shape=pixels.shape, chunks=(300, 400, 3), dtype="uint8")
    store[:] = pixels
    chunk = max(
        (path for path in (tmp_path / "a.zarr").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    chunk.write_bytes(np.random.default_rng(0).bytes(chunk.stat().st_size))
    with open_image(tmp_path / "a.zarr") as image, pytest.raises(ValueError, match=r"'a\.zarr'.*level 0, tile \("):
        image.read_region(0, 0, 0, 600, 800)


# --- pyramids ----------------------------------------------------------------------------------------------------


def write_levels(path: Path, levels: list[np.ndarray], *, sub: bool = True) -> None:
    with tifffile.TiffWriter(path) as tif:
        for number, level in enumerate(levels):
            kind = "rgb" if level.ndim == 3 else "minisblack"
            options = {"subifds": len(levels) - 1} if sub and number == 0 else {"subfiletype": int(number > 0)}
            tif.write(level, photometric=kind, tile=(64, 64), **options)


@pytest.mark.parametrize("sub", [True, False])
def test_levels_of_another_aspect(tmp_path, pixels, sub):
    write_levels(tmp_path / "a.tif", [pixels, pixels[::2, ::4]], sub=sub)
    with pytest.raises(ValueError, match=r"'a\.tif' disagree.*600 × 800.*300 × 200.*level 0 alone"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("lost", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_levels_may_lose_a_pixel_to_rounding(tmp_path, pixels, lost):
    odd = pixels[:599, :797]
    small = odd[::2, ::2][: 300 - lost[0], : 399 - lost[1]]
    write_levels(tmp_path / "a.tif", [odd, small])
    with open_image(tmp_path / "a.tif") as image:
        assert len(image.level_downsamples) == 2
        assert image.level_downsamples[1] == pytest.approx(2, rel=0.01)


def test_levels_of_another_type(tmp_path, pixels):
    write_levels(tmp_path / "a.tif", [pixels, pixels[::2, ::2, 0]])
    with pytest.raises(ValueError, match=r"'a\.tif' disagree.*3 channels of uint8, level 1 1 of uint8"):
        open_image(tmp_path / "a.tif")


def test_levels_of_a_zarr_that_disagree(tmp_path, pixels):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    for name, level in (("0", pixels), ("1", pixels[::2, ::3])):
        group.create_array(name, shape=level.shape, dtype="uint8", chunks=(64, 64, 3))[...] = level
    group.attrs["multiscales"] = [{"datasets": [{"path": "0"}, {"path": "1"}]}]
    with pytest.raises(ValueError, match=r"'a\.zarr' disagree.*level 1 300 × 267"):
        open_image(tmp_path / "a.zarr")
    group.attrs["multiscales"] = [{"datasets": [{"path": "1"}, {"path": "0"}]}]
    with pytest.raises(ValueError, match=r"'a\.zarr' disagree.*level 1 has 600 × 800 pixels, more than level 0"):
        open_image(tmp_path / "a.zarr")


def test_a_level_that_shows_something_else(tmp_path):
    rng = np.random.default_rng(3)
    picture = np.kron(rng.integers(40, 250, (64, 64, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    centers = rng.uniform(300, 700, (20, 2))
    write_levels(tmp_path / "good.tif", [picture, picture[::2, ::2]])
    write_levels(tmp_path / "cut-out.tif", [picture, picture[:512, :512]])
    with open_image(tmp_path / "good.tif") as image:
        read_patches(image, centers, 64.0, 32)
    with open_image(tmp_path / "cut-out.tif") as image:
        read_patches(image, centers, 32.0, 32)  # level 0 is what it is
        with pytest.raises(ValueError, match=r"'cut-out\.tif' disagree: level 1 \(512 × 512 pixels\) shows something"):
            read_patches(image, centers, 64.0, 32)


def test_empty_glass_is_no_disagreement(tmp_path):
    noise = np.random.default_rng(0).integers(238, 243, (512, 512, 3)).astype(np.uint8)
    other = np.random.default_rng(1).integers(238, 243, (256, 256, 3)).astype(np.uint8)
    write_levels(tmp_path / "a.tif", [noise, other])
    with open_image(tmp_path / "a.tif") as image:
        assert read_patches(image, np.array([[200.0, 200.0]]), 64.0, 32).shape == (1, 32, 32, 3)


# --- pixels that are no picture ----------------------------------------------------------------------------------


def test_one_bit(tmp_path, pixels):
    mask = pixels[..., 0] > 100
    tifffile.imwrite(tmp_path / "bits.tif", mask)
    Image.fromarray(mask).save(tmp_path / "bits.png")
    np.save(tmp_path / "bits.npy", mask)
    store = zarr.open(str(tmp_path / "bits.zarr"), mode="w", shape=mask.shape, chunks=(64, 64), dtype=bool)
    store[:] = mask
    for source in (mask, store, *(tmp_path / f"bits.{kind}" for kind in ("tif", "png", "npy", "zarr"))):
        with pytest.raises(ValueError, match=r"1-bit.*RGB"):
            open_image(source)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_sixteen_channels(tmp_path, planar):
    many = np.zeros((128, 144, 16) if planar == "contig" else (16, 128, 144), dtype=np.uint8)
    options = {"photometric": "minisblack", "planarconfig": planar, "tile": (64, 64), "metadata": None}
    tifffile.imwrite(tmp_path / "many.tif", many, **options)
    store = zarr.open(str(tmp_path / "many.zarr"), mode="w", shape=many.shape, chunks=many.shape, dtype="uint8")
    store[:] = many
    for source in (many, store, tmp_path / "many.tif", tmp_path / "many.zarr"):
        with pytest.raises(ValueError, match=r"16(,|\)| channels|.*axes).*RGB"):
            open_image(source)


def test_named_sixteen_channels():
    xarray = pytest.importorskip("xarray")
    with pytest.raises(ValueError, match=r"16 channels.*multiplexed"):
        open_image(xarray.DataArray(np.zeros((16, 50, 60), np.uint8), dims=("c", "y", "x")))
    with pytest.raises(ValueError, match=r"no single plane.*'z': 5"):
        open_image(xarray.DataArray(np.zeros((5, 50, 60), np.uint8), dims=("z", "y", "x")))
    with pytest.raises(ValueError, match="axes named 'y' and 'x'"):
        open_image(xarray.DataArray(np.zeros((50, 60), np.uint8), dims=("rows", "columns")))


def test_colours_that_are_not_rgb(tmp_path, pixels):
    cmyk = np.concatenate([pixels, pixels[..., :1]], axis=2)
    tifffile.imwrite(tmp_path / "cmyk.tif", cmyk, photometric="separated", tile=(64, 64))
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "cmyk.jpg")
    for name in ("cmyk.tif", "cmyk.jpg"):
        with pytest.raises(ValueError, match=f"'{name}' stores CMYK.*RGB"):
            open_image(tmp_path / name)
    tifffile.imwrite(tmp_path / "lut.tif", pixels[..., 0], colormap=np.zeros((3, 256), np.uint16), photometric=3)
    with pytest.raises(ValueError, match="palette"):
        open_image(tmp_path / "lut.tif")
    tifffile.imwrite(
        tmp_path / "coarse.tif",
        pixels,
        photometric="ycbcr",
        compression="lzw",
        tile=(64, 64),
        extratags=[(530, "H", 2, (2, 2), True)],
    )
    with tifffile.TiffFile(tmp_path / "coarse.tif") as file:
        coarse = file.pages.first.subsampling == (2, 2)
    if coarse:
        with pytest.raises(ValueError, match=r"'coarse\.tif' stores YCbCr"):
            open_image(tmp_path / "coarse.tif")


def test_several_planes(tmp_path, pixels):
    tifffile.imwrite(tmp_path / "z.tif", np.stack([pixels] * 3), photometric="rgb", metadata={"axes": "ZYXS"})
    with pytest.raises(ValueError, match=r"'z\.tif' holds 3 planes.*ZYXS"):
        open_image(tmp_path / "z.tif")


# --- paths and stores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nowhere.tif", "nowhere.svs", "nowhere.mrxs", "nowhere.zarr", "nowhere.png", "no.npy"]
)
def test_no_such_path(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=name):
        open_image(str(tmp_path / name))


def test_unknown_kind(tmp_path):
    (tmp_path / "a.xyz").write_text("no image")
    with pytest.raises(ValueError, match=r"'a\.xyz'.*TIFF.*OpenSlide.*Convert"):
        open_image(tmp_path / "a.xyz")


def test_zarr_without_multiscales(tmp_path, pixels):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_array("he", shape=pixels.shape, dtype="uint8", chunks=(64, 64, 3))[...] = pixels
    with pytest.raises(ValueError, match=r"a\.zarr' is not an image: .*'multiscales'.*\['he'\].*path of one array"):
        open_image(tmp_path / "a.zarr")
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr" / "he").read_region(0, 0, 0, 600, 800), pixels)
    group.attrs["multiscales"] = [{"datasets": [{"path": "he"}, {"path": "gone"}]}]
    with pytest.raises(ValueError, match=r"'gone', which is not there.*he"):
        open_image(tmp_path / "a.zarr")
    zarr.open_group(str(tmp_path / "empty.zarr"), mode="w")
    with pytest.raises(ValueError, match=r"empty\.zarr' is not an image"):
        open_image(tmp_path / "empty.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder' is neither a zarr array nor a zarr group"):
        open_image(tmp_path / "folder")


# --- decompression bombs -----------------------------------------------------------------------------------------


def png_bomb(path: Path, side: int) -> None:
    """A black picture of ``side`` × ``side`` in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_png_bomb(tmp_path, limit):
    png_bomb(tmp_path / "bomb.png", 60_000)
    with pytest.raises(ValueError, match=r"'bomb\.png' has 60000 × 60000 .*limit of 1000000000.*max_image_pixels"):
        open_image(tmp_path / "bomb.png")
    assert Image.MAX_IMAGE_PIXELS  # Pillow's own guard is as it was


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_limit_of_pictures(tmp_path, pixels, limit, name):
    Image.fromarray(pixels).save(tmp_path / name)
    assert open_image(tmp_path / name, max_pixels=480_000).width == 800
    with pytest.raises(ValueError, match=r"600 × 800.*479999"):
        open_image(tmp_path / name, max_pixels=479_999)
    limit(479_999)
    with pytest.raises(ValueError, match=r"600 × 800.*479999"):
        open_image(tmp_path / name)
    assert open_image(tmp_path / name, max_pixels=480_000).width == 800
    with pytest.raises(ValueError, match="max_pixels must be a positive integer"):
        open_image(tmp_path / name, max_pixels=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "deflate", "rowsperstrip": 600}, "600 × 800"),
        ({"compression": "deflate", "rowsperstrip": 300}, "strips of 300 × 800"),
        ({"compression": "deflate", "tile": (512, 512)}, "tiles of 512 × 512"),
    ],
)
def test_limit_of_single_pieces_of_a_tiff(tmp_path, pixels, limit, options, message):
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **options)
    limit(200_000)
    with pytest.raises(ValueError, match=rf"'a\.tif' has {message} pixels.*max_pixels"):
        open_image(tmp_path / "a.tif")
    open_image(tmp_path / "a.tif", max_pixels=10**6).close()


@pytest.mark.parametrize("options", [{"tile": (64, 64)}, {"rowsperstrip": 10, "compression": "lzw"}, {}])
def test_what_is_read_in_pieces_has_no_limit(tmp_path, pixels, limit, options):
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **options)
    limit(60_000)
    read_everything(tmp_path / "a.tif")


def test_tile_whose_data_claim_more_than_the_file(tmp_path, pixels):
    bomb = imagecodecs.jpeg8_encode(np.zeros((1024, 1024, 3), np.uint8))
    tiles = [imagecodecs.jpeg8_encode(np.ascontiguousarray(pixels[:64, :64]))] * 3 + [bomb]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(
            iter(tiles),
            shape=(128, 128, 3),
            dtype=np.uint8,
            tile=(64, 64),
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
        )
    with open_image(tmp_path / "a.tif") as image:
        image.read_region(0, 0, 0, 64, 128)
        with pytest.raises(ValueError, match=r"tile \(1, 1\).*claim 1024 × 1024 pixels where 64 × 64"):
            image.read_region(0, 64, 64, 8, 8)


def test_limit_of_chunks(tmp_path, limit):
    store = zarr.open(str(tmp_path / "a.zarr"), mode="w", shape=(9000, 9000, 3), chunks=(9000, 9000, 3), dtype="uint8")
    limit(10**6)
    for source in (store, tmp_path / "a.zarr"):
        with pytest.raises(ValueError, match=r"chunks of 9000 × 9000 pixels.*max_image_pixels"):
            open_image(source)
    small = zarr.open(str(tmp_path / "b.zarr"), mode="w", shape=(9000, 9000, 3), chunks=(512, 512, 3), dtype="uint8")
    assert open_image(small).read_region(0, 8990, 8990, 10, 10).shape == (10, 10, 3)


# --- images and patches ------------------------------------------------------------------------------------------


def test_image_smaller_than_one_patch(hexagonal):
    library = hexagonal.uns["spatial"]["S1"]
    stalign.pp.extract_niches(hexagonal)
    with PatchReader(hexagonal) as reader:
        assert reader.read(np.arange(3), 400.0, 16).shape == (3, 16, 16, 3)
        with pytest.raises(
            ValueError, match=r"'S1' has 480 × 520 pixels, less than one patch of 1000 µm, which is 500 "
        ):
            reader.read(np.arange(3), 1000.0, 16)
    library["images"]["hires"] = library["images"]["hires"][:20, :20]
    with (
        PatchReader(hexagonal) as reader,
        pytest.raises(ValueError, match=r"20 × 20 pixels, less than one patch of 112 µm, which is 56 pixels.*mpp"),
    ):
        reader.read(np.arange(3), 112.0, 16)
