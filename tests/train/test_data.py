from __future__ import annotations

import numpy as np
import pytest
import torch

from stalign.train._config import AugmentConfig
from stalign.train._data import Batches, EncodedSection, Section, augment_images, initial_clusters


def encoded(section: Section, dim: int = 5) -> EncodedSection:
    n = len(section)
    values = torch.arange(n * dim, dtype=torch.float32).reshape(n, dim)
    return EncodedSection(section, values, values + 0.5, torch.arange(n) % 3)


def scaled(patches: np.ndarray, *, colour) -> torch.Tensor:
    return torch.from_numpy(patches).permute(0, 3, 1, 2).float()


def batches(sections, **changes) -> Batches:
    options = {
        "steps": 20,
        "batch_size": 16,
        "augment": AugmentConfig(gain=0, shift=0, flips=False, gene_noise=0, drop_modality=0),
        "image_sections": 1.0,
        "preprocess": {"spot_image": scaled, "niche_image": scaled},
        "seed": 0,
    }
    return Batches([encoded(s) for s in sections], **{**options, **changes})


def test_modalities_of_a_batch_belong_to_the_same_spots(sections):
    stream = batches(sections[:1])
    batch = stream.batch(3)
    rows = (batch.spot_gene[:, 0] / 5).long()
    assert torch.equal(batch.clusters, rows % 3)
    assert torch.equal(batch.niche_gene, batch.spot_gene + 0.5)
    assert torch.equal(batch.spot_image, scaled(sections[0].spot_image[rows.numpy()], colour=None))
    assert len(rows.unique()) == 16


def test_a_step_depends_on_seed_and_number_alone(sections):
    first, again = batches(sections), batches(sections)
    list(first)
    for step in (0, 7):
        assert torch.equal(first.batch(step).spot_gene, again.batch(step).spot_gene)
    assert not torch.equal(first.batch(0).profile, first.batch(1).profile)


def test_a_batch_is_one_slide_and_no_image_is_none(sections):
    libraries = set()
    for batch in batches(sections):
        libraries.add(batch.library)
        assert (batch.spot_image is None) == (batch.library == "c")
    assert libraries == {"a", "b", "c"}


def test_left_out_modalities(sections):
    stream = batches(sections[:1], steps=60, augment=AugmentConfig(drop_modality=0.3))
    absent = [(b.spot_image is None, b.spot_gene is None) for b in stream]
    assert (True, False) in absent
    assert (False, True) in absent
    assert (True, True) not in absent


def test_flips_keep_the_colours(sections):
    config = AugmentConfig(gain=0, shift=0, flips=True)
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    turned = augment_images(images, config, rng=np.random.default_rng(1), generator=torch.Generator())
    assert torch.equal(turned.flatten(2).sort().values, images.flatten(2).sort().values)


def test_clusters_find_the_two_halves(sections):
    profile = np.repeat([[0.0, 1.0], [5.0, -3.0]], 10, axis=0)
    labels = initial_clusters(profile + np.random.default_rng(0).normal(0, 0.1, profile.shape), 2, seed=0)
    assert len(set(labels[:10])) == 1
    assert len(set(labels[10:])) == 1
    assert labels[0] != labels[-1]


def test_section_parts_must_fit(sections):
    section = sections[0]
    with pytest.raises(ValueError, match="niche graph"):
        Section("x", "x", section.counts, section.connectivities[:5])
    with pytest.raises(ValueError, match="5 spot_image patches for 48 spots"):
        Section("x", "x", section.counts, section.connectivities, spot_image=section.spot_image[:5])
