from __future__ import annotations

import numpy as np
import pytest

from stalign.slide._appearance import APPEARANCE, appearance, tissue_share


def stained(n: int = 3, *, seed: int = 0) -> np.ndarray:
    """Pink and violet patches, as of haematoxylin and eosin."""
    noise = np.random.default_rng(seed).normal(0, 12, (n, 16, 16, 1))
    return (np.array([190, 120, 170]) + noise).clip(0, 255).astype(np.uint8)


def test_known_values_of_a_flat_patch():
    patch = np.full((1, 4, 4, 3), 0, dtype=np.uint8)
    patch[...] = (255, 51, 255)
    values = appearance(patch)[0]
    np.testing.assert_allclose(values[:3], [1, 0.2, 1], rtol=1e-6)
    np.testing.assert_allclose(values[3:9], np.log([0.01] * 3 + [0.005] * 3), rtol=1e-5)
    density = -np.log(0.2)
    np.testing.assert_allclose(values[9:], [0, 3 * density / (density + 0.05), np.log(density + 0.05)], rtol=1e-5)


def test_stain_absorbs_green_most_and_its_inverse_least():
    red, green = appearance(stained())[:, 9:11].T
    assert (green > red).all()
    assert (green > 1).all()
    red, green = appearance(255 - stained())[:, 9:11].T
    assert (green < red).all()
    assert (green < 1).all()


def test_gradient_tells_texture_from_blur():
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)
    blurred = np.repeat(np.repeat(sharp[:, ::8, ::8], 8, axis=1), 8, axis=2)
    assert (appearance(sharp)[0, 6:9] > appearance(blurred)[0, 6:9] + 1).all()


def test_each_patch_for_itself():
    patches = np.concatenate([stained(600), 255 - stained(5)])
    whole = appearance(patches)
    assert whole.shape == (605, APPEARANCE)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole[590:], appearance(patches[590:]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tissue_share(patches)[590:], tissue_share(patches[590:]))


def test_tissue_is_what_is_dark_or_coloured():
    patches = np.full((4, 10, 10, 3), 250, dtype=np.uint8)
    patches[1, :5] = (180, 90, 160)
    patches[2] = (120, 120, 120)
    patches[3] = (255, 225, 240)  # bright, but pink
    np.testing.assert_allclose(tissue_share(patches), [0, 0.5, 1, 1])


def test_glass_is_measured_by_the_slide_s_own_light():
    dim = np.full((1, 4, 4, 3), 185, dtype=np.uint8)
    assert tissue_share(dim)[0] == 1
    assert tissue_share(dim, (190, 190, 190))[0] == 0
    # A background as dark as tissue is none: the slide has no bare glass.
    assert tissue_share(np.full((1, 4, 4, 3), 90, dtype=np.uint8), (90, 90, 90))[0] == 1


@pytest.mark.parametrize("function", [appearance, tissue_share])
def test_bad_patches(function):
    with pytest.raises(ValueError, match=r"\(n, height, width, 3\)"):
        function(np.zeros((2, 4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        function(np.zeros((2, 4, 4, 3)))
    assert len(function(np.zeros((0, 4, 4, 3), dtype=np.uint8))) == 0
