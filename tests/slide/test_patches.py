from __future__ import annotations

import numpy as np
import pytest
import tifffile
import zarr

from stalign.slide import inside_fraction, open_image, read_patches


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8)


def test_whole_pixels_are_copied(noise):
    patch = read_patches(open_image(noise), np.array([[120.0, 70.0]]), 20.0, 20)
    np.testing.assert_array_equal(patch[0], noise[60:80, 110:130])


def test_shrinking_averages(noise):
    patch = read_patches(open_image(noise), np.array([[120.0, 70.0]]), 30.0, 10)[0]
    expected = noise[55:85, 105:135].reshape(10, 3, 10, 3, 3).mean(axis=(1, 3))
    assert np.abs(patch - expected).max() <= 0.51


def test_fractions_of_a_pixel():
    ramp = np.repeat(np.arange(0, 200, dtype=np.uint8)[None, :, None], 100, axis=0).repeat(3, axis=2)
    image = open_image(ramp)
    # Pixel i covers [i, i + 1) and has value i: the mean over [a, b) of a ramp is (a + b) / 2 - 0.5.
    patch = read_patches(image, np.array([[50.5, 50.0]]), 4.0, 2)[0, 0, :, 0]
    assert patch.tolist() == [49, 51]
    patch = read_patches(image, np.array([[50.0, 50.0]]), 2.0, 4)[0, 0, :, 0]  # enlarged: 48.75, 49.25, 49.75, 50.25
    assert patch.tolist() == [49, 49, 50, 50]


def test_x_is_the_column():
    image = np.full((100, 300, 3), 255, dtype=np.uint8)
    image[10:20, 200:210] = (255, 0, 0)
    patch = read_patches(open_image(image), np.array([[205.0, 15.0]]), 10.0, 5)
    assert (patch == (255, 0, 0)).all()


def test_padding_takes_the_background():
    image = np.full((100, 100, 3), (240, 238, 242), dtype=np.uint8)
    image[:20, :20] = (100, 20, 90)
    patch = read_patches(open_image(image), np.array([[0.0, 0.0]]), 20.0, 20)[0]
    assert (patch[10:, 10:] == (100, 20, 90)).all()
    assert (patch[:10] == (240, 238, 242)).all()
    assert (patch[:, :10] == (240, 238, 242)).all()
    far = read_patches(open_image(image), np.array([[-500.0, 900.0]]), 20.0, 8)
    assert (far == (240, 238, 242)).all()


def test_inside_fraction():
    centers = np.array([[50, 50], [0, 50], [0, 0], [200, 100], [-30, 50], [195, 50]], dtype=float)
    share = inside_fraction((100, 200), centers, 20.0)
    np.testing.assert_allclose(share, [1, 0.5, 0.25, 0.25, 0, 0.75])
    assert share.dtype == np.float32
    np.testing.assert_allclose(inside_fraction((100, 200), np.array([[100.0, 50.0]]), 400.0), [0.5 * 0.25])


@pytest.mark.parametrize(("size", "pixels"), [(22.1, 32), (40.3, 16), (150.0, 16)])
def test_order_and_chunks_change_nothing(noise, tmp_path, size, pixels):
    centers = np.random.default_rng(1).uniform(-20, 520, (300, 2))
    tifffile.imwrite(tmp_path / "a.tif", noise, photometric="rgb", tile=(64, 64))
    store = zarr.open(str(tmp_path / "a.zarr"), mode="w", shape=noise.shape, chunks=(64, 64, 3), dtype="uint8")
    store[:] = noise
    whole = {}
    for source in (noise, tmp_path / "a.tif", store):
        with open_image(source) as image:
            level = 0 if source is not noise else None
            whole[str(source)[:20]] = everything = read_patches(image, centers, size, pixels, level=level)
            order = np.random.default_rng(2).permutation(300)
            np.testing.assert_array_equal(
                read_patches(image, centers[order], size, pixels, level=level), everything[order]
            )
            parts = [read_patches(image, part, size, pixels, level=level) for part in np.array_split(centers, 7)]
            np.testing.assert_array_equal(np.concatenate(parts), everything)
            one = read_patches(image, centers[5:6], size, pixels, level=level)
            np.testing.assert_array_equal(one[0], everything[5])
    if size < 2 * 2 * pixels:  # before averaged levels of an array come in, all sources give the same
        first, *others = whole.values()
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_pyramid_gives_what_the_full_image_gives(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 255, (50, 60, 3))
    full = np.kron(blocks, np.ones((16, 16, 1))).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "p.tif") as tif:
        tif.write(full, photometric="rgb", tile=(128, 128), subifds=1)
        tif.write(full[::4, ::4], photometric="rgb", tile=(128, 128), subfiletype=1)
    centers = np.array([[320.0, 160.0], [640.0, 480.0]])
    with open_image(tmp_path / "p.tif") as image:
        assert image.level_for(128 / 16) == 1
        coarse = read_patches(image, centers, 128.0, 16)
        np.testing.assert_array_equal(coarse, read_patches(image, centers, 128.0, 16, level=0))
        np.testing.assert_array_equal(coarse[0, ::2, ::2], blocks[6:14, 16:24])


def test_large_shrinking_uses_averages():
    checks = np.zeros((2048, 2048, 3), dtype=np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 200
    patch = read_patches(open_image(checks), np.array([[1000.3, 999.7]]), 1000.0, 8)
    assert np.abs(patch.astype(int) - 100).max() <= 1


def test_empty_and_refusals(noise):
    image = open_image(noise)
    assert read_patches(image, np.empty((0, 2)), 10.0, 8).shape == (0, 8, 8, 3)
    with pytest.raises(ValueError, match=r"\(n, 2\)"):
        read_patches(image, np.zeros((3, 3)), 10.0, 8)
    with pytest.raises(ValueError, match="finite"):
        read_patches(image, np.array([[np.nan, 0.0]]), 10.0, 8)
    with pytest.raises(ValueError, match="size must be"):
        read_patches(image, np.zeros((1, 2)), 0.0, 8)
    with pytest.raises(ValueError, match="level=7"):
        read_patches(image, np.zeros((1, 2)), 5.0, 8, level=7)
