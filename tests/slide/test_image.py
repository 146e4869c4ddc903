from __future__ import annotations

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from stalign.slide import ArrayImage, open_image

SHAPE = (600, 800, 3)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Blocks of 8 pixels, so that a level of 1/2 or 1/4 is known exactly."""
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 255, (75, 100, 3)), np.ones((8, 8, 1))).astype(np.uint8)


LAYOUTS = {
    "one strip": {"rowsperstrip": 600},
    "strips": {"rowsperstrip": 64, "compression": "lzw"},
    "tiles": {"tile": (128, 256)},
    "deflate": {"tile": (128, 128), "compression": "deflate", "predictor": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiff_window(tmp_path, pixels, layout):
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **LAYOUTS[layout])
    with open_image(tmp_path / "a.tif") as image:
        assert (image.height, image.width) == SHAPE[:2]
        np.testing.assert_array_equal(image.read_region(0, 100, 130, 300, 500), pixels[100:400, 130:630])
        np.testing.assert_array_equal(image.read_region(0, 0, 0, 600, 800), pixels)


def test_tiff_planar_and_grey_and_16_bit(tmp_path, pixels):
    planar = tmp_path / "planar.tif"
    tifffile.imwrite(planar, np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate", tile=(128, 128))
    grey = tmp_path / "grey.tif"
    tifffile.imwrite(grey, pixels[..., 0], photometric="minisblack", tile=(128, 128))
    deep = tmp_path / "deep.tif"
    tifffile.imwrite(deep, pixels.astype(np.uint16) * 257, photometric="rgb", tile=(128, 128))
    for path, expected in ((planar, pixels), (deep, pixels), (grey, np.repeat(pixels[..., :1], 3, axis=2))):
        with open_image(path) as image:
            np.testing.assert_array_equal(image.read_region(0, 5, 9, 200, 300), expected[5:205, 9:309])


def write_pyramid(path, pixels, style, **options):
    levels = [pixels, pixels[::2, ::2], pixels[::4, ::4]]
    with tifffile.TiffWriter(path) as tif:
        common = {"photometric": "rgb", "tile": (64, 64), **options}
        tif.write(levels[0], **common, **({"subifds": 2} if style == "sub-pages" else {}))
        for level in levels[1:]:
            tif.write(level, **common, subfiletype=1)
    return levels


@pytest.mark.parametrize("style", ["sub-pages", "pages"])
def test_tiff_pyramid(tmp_path, pixels, style):
    levels = write_pyramid(tmp_path / "p.tif", pixels, style)
    with open_image(tmp_path / "p.tif") as image:
        assert image.level_downsamples == (1.0, 2.0, 4.0)
        for number, level in enumerate(levels):
            np.testing.assert_array_equal(image.read_region(number, 7, 11, 100, 120), level[7:107, 11:131])
        assert image.level_for(1.0) == 0
        assert image.level_for(3.9) == 1
        assert image.level_for(4.0) == 2


def test_label_page_is_no_level(tmp_path, pixels):
    with tifffile.TiffWriter(tmp_path / "l.tif") as tif:
        tif.write(pixels, photometric="rgb", tile=(64, 64))
        tif.write(pixels[:300, :300], photometric="rgb", tile=(64, 64))
    with open_image(tmp_path / "l.tif") as image:
        assert image.level_downsamples == (1.0,)


def test_only_touched_tiles_are_decoded(tmp_path, pixels):
    write_pyramid(tmp_path / "p.tif", pixels, "sub-pages")
    with open_image(tmp_path / "p.tif") as image:
        image.read_region(0, 64, 64, 64, 65)  # of the second row of tiles the second, and one column of the third
        assert image.counters.tiles_decoded == 2
        assert image.counters.bytes_read == 2 * 64 * 64 * 3
        image.read_region(0, 70, 70, 20, 20)
        assert image.counters.tiles_decoded == 2


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (50_800, 50_800), "resolutionunit": "INCH"}, 0.5),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (20_000, 10_000), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (20_000, 20_000), "resolutionunit": "NONE"}, None),
        ({"description": "Aperio Image Library v1\n|AppMag = 40|MPP = 0.2520", "metadata": None}, 0.252),
        ({"resolution": (2, 2), "imagej": True, "metadata": {"unit": "um"}}, 0.5),
        ({}, None),
    ],
)
def test_tiff_metadata(tmp_path, pixels, options, mpp):
    layout = {} if options.get("imagej") else {"photometric": "rgb"}
    tifffile.imwrite(tmp_path / "m.tif", pixels, **layout, **options)
    with open_image(tmp_path / "m.tif") as image:
        assert image.mpp == (None if mpp is None else pytest.approx(mpp))


@pytest.mark.parametrize(("unit", "value"), [("µm", 0.5), ("nm", 500.0), ("mm", 0.0005)])
def test_ome_metadata(tmp_path, pixels, unit, value):
    sizes = {f"PhysicalSize{a}": value for a in "XY"} | {f"PhysicalSize{a}Unit": unit for a in "XY"}
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, photometric="rgb", metadata={"axes": "YXS", **sizes})
    with open_image(tmp_path / "a.ome.tif") as image:
        assert image.mpp == pytest.approx(0.5)


def test_zarr_arrays_and_ome_zarr(tmp_path, pixels):
    store = zarr.open(str(tmp_path / "a.zarr"), mode="w", shape=SHAPE, chunks=(64, 64, 3), dtype="uint8")
    store[:] = pixels
    for source in (store, tmp_path / "a.zarr", str(tmp_path / "a.zarr")):
        image = open_image(source)
        np.testing.assert_array_equal(image.read_region(0, 3, 5, 90, 80), pixels[3:93, 5:85])
    group = zarr.open_group(str(tmp_path / "o.zarr"), mode="w")
    for number, step in enumerate((1, 2)):
        level = np.moveaxis(pixels[::step, ::step], 2, 0)
        array = group.create_array(str(number), shape=level.shape, dtype="uint8")
        array[:] = level
    group.attrs["multiscales"] = [{"datasets": [{"path": "0"}, {"path": "1"}]}]
    image = open_image(tmp_path / "o.zarr")
    assert image.level_downsamples == (1.0, 2.0)
    np.testing.assert_array_equal(image.read_region(1, 3, 5, 90, 80), pixels[::2, ::2][3:93, 5:85])


def test_png(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(open_image(tmp_path / "a.png").read_region(0, 0, 0, 600, 800), pixels)
    with pytest.raises(ValueError, match="max_pixels"):
        open_image(tmp_path / "a.png", max_pixels=1000)


def test_array_levels_are_averages():
    array = np.zeros((513, 300, 3), dtype=np.uint8)
    array[::2] = 100
    image = ArrayImage(array)
    assert image.level_downsamples == (1.0, 2.0)
    assert image.level_size(1) == (257, 150)
    assert (image.read_region(1, 0, 0, 256, 150) == 50).all()


def test_background_is_the_bright_mode():
    array = np.full((200, 300, 3), (242, 240, 244), dtype=np.uint8)
    array[50:150, 50:250] = (180, 60, 140)
    assert open_image(array).background.tolist() == [242, 240, 244]
    dim = np.full((200, 300, 3), (150, 155, 152), dtype=np.uint8)
    dim[20:150, 20:250] = (90, 40, 80)
    assert open_image(dim).background.tolist() == [150, 155, 152]
    assert open_image(np.full((50, 50, 3), (180, 60, 140), dtype=np.uint8)).background.tolist() == [255, 255, 255]


def test_thumbnail(tmp_path, pixels):
    levels = write_pyramid(tmp_path / "p.tif", pixels, "pages")
    with open_image(tmp_path / "p.tif") as image:
        small, factor = image.thumbnail(400)
        np.testing.assert_array_equal(small, levels[1])
        assert factor == 2
        assert image.thumbnail(300)[0].shape == (225, 300, 3)


def test_refusals(tmp_path, pixels):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tif"):
        open_image(tmp_path / "nowhere.tif")
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.txt"):
        open_image(tmp_path / "text.txt")
    (tmp_path / "broken.tif").write_bytes(b"no tiff at all")
    with pytest.raises(ValueError, match="complete"):
        open_image(tmp_path / "broken.tif")
    (tmp_path / "broken.png").write_bytes(b"no png at all")
    with pytest.raises(ValueError, match="complete"):
        open_image(tmp_path / "broken.png")
    with pytest.raises(TypeError, match="int"):
        open_image(3)
    image = open_image(pixels)
    with pytest.raises(ValueError, match="does not lie inside"):
        image.read_region(0, 590, 0, 20, 20)
    with pytest.raises(ValueError, match="level=9"):
        image.read_region(9, 0, 0, 1, 1)
