from __future__ import annotations

import numpy as np
import pytest
import torch

from stalign.models.encoders import build_image_encoder
from stalign.models.encoders._filter_bank import N_STATISTICS, colour_texture


def stripes(n: int, across: bool, seed: int = 0) -> torch.Tensor:
    """Grey patches with stripes that run down, or across, at random places."""
    rng = np.random.default_rng(seed)
    phase = rng.integers(0, 8, n)
    wave = np.sin((np.arange(24)[None] + phase[:, None]) * np.pi / 4)
    image = np.repeat(wave[:, None, :], 24, axis=1)
    image = image.transpose(0, 2, 1) if across else image
    noise = rng.normal(0, 0.1, (n, 3, 24, 24))
    return torch.from_numpy((np.repeat(image[:, None], 3, axis=1) + noise).astype(np.float32)).contiguous()


@pytest.fixture(scope="module")
def learned():
    encoder = build_image_encoder("filter-bank", n_filters=16, share=4.0).eval()
    encoder.learn([stripes(100, True), stripes(60, False, seed=1)], seed=0)
    return encoder


def test_features_are_of_unit_scale_over_the_slides(learned):
    parts = [learned(stripes(100, True)), learned(stripes(60, False, seed=1))]
    mean = torch.stack([part.mean(dim=0) for part in parts]).mean(dim=0)
    assert learned.dim == N_STATISTICS + 32
    assert mean.abs().max() < 0.05
    second = torch.stack([(part**2).mean(dim=0) for part in parts]).mean(dim=0)
    torch.testing.assert_close(second[:N_STATISTICS], torch.ones(N_STATISTICS), atol=0.1, rtol=0)


def test_learned_filters_tell_directions_apart(learned):
    down, across = learned(stripes(50, False, seed=5)), learned(stripes(50, True, seed=6))
    apart = (down.mean(dim=0) - across.mean(dim=0))[N_STATISTICS:].abs()
    assert apart.max() > 3 * down[:, N_STATISTICS:].std(dim=0).max()


def test_learning_depends_on_the_seed_alone(learned):
    again = build_image_encoder("filter-bank", n_filters=16, share=4.0)
    again.learn([stripes(100, True), stripes(60, False, seed=1)], seed=0)
    torch.testing.assert_close(again.filters, learned.filters)
    other = build_image_encoder("filter-bank", n_filters=16, share=4.0)
    other.learn([stripes(100, True), stripes(60, False, seed=1)], seed=1)
    assert not torch.allclose(other.filters, learned.filters, atol=1e-3)


def test_batches_do_not_matter(learned):
    images = stripes(9, True, seed=3)
    torch.testing.assert_close(torch.cat([learned(images[:4]), learned(images[4:])]), learned(images))


def test_statistics_alone():
    encoder = build_image_encoder("filter-bank", n_filters=0)
    images = stripes(30, True)
    encoder.learn([images], seed=0)
    assert encoder(images).shape == (30, N_STATISTICS)
    assert torch.isfinite(encoder(torch.zeros(2, 3, 24, 24))).all()


def test_learning_from_nothing_changes_nothing():
    encoder = build_image_encoder("filter-bank", n_filters=2)
    encoder.learn([], seed=0)
    assert not encoder.filters.any()


def test_patches_smaller_than_a_filter_are_refused():
    encoder = build_image_encoder("filter-bank", n_filters=2, kernel=6)
    with pytest.raises(ValueError, match="4 × 4 pixels are smaller than the filters, 6"):
        encoder.learn([torch.zeros(3, 3, 4, 4)], seed=0)


@pytest.mark.parametrize("argument", ["kernel", "stride", "share"])
def test_arguments_must_be_positive(argument):
    with pytest.raises(ValueError, match=argument):
        build_image_encoder("filter-bank", **{argument: 0})


def test_what_is_extreme_is_cut(learned):
    assert learned(1000 * stripes(4, True)).abs().max() <= 5


def test_there_is_nothing_for_a_gradient(learned):
    assert not list(learned.parameters())
    assert {"filters", "offset", "scale"} <= set(learned.state_dict())


def test_colour_texture_of_a_ramp():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    mean, sd, gradient = colour_texture(ramp)[0].view(3, 3)
    torch.testing.assert_close(mean, torch.full((3,), 1.5))
    torch.testing.assert_close(sd, torch.full((3,), float(np.repeat(np.arange(4), 4).std(ddof=1))))
    torch.testing.assert_close(gradient, torch.full((3,), 0.5))
