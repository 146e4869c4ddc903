from __future__ import annotations

import multiprocessing
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from stalign.models._config import Geometry
from stalign.train._config import AugmentConfig
from stalign.train._data import Batches, EncodedSection, Section, augment_images, hold_all_clusters, initial_clusters
from stalign.train._sections import save_sections
from stalign.train._shards import open_shards


@pytest.fixture
def write_shards(tmp_path):
    """Write sections to a folder of shards."""
    genes = tuple(f"G{i}" for i in range(60))
    geometry = Geometry(n_neighbors=6, spot_um=100.0, niche_um=200.0, spot_pixels=16, niche_pixels=16)
    return partial(save_sections, tmp_path / "shards", genes=genes, geometry=geometry)


def encoded(section: Section, dim: int = 5) -> EncodedSection:
    n = len(section)
    values = np.arange(n * dim, dtype=np.float32).reshape(n, dim)
    return EncodedSection(section, values, values + np.float32(0.5), np.arange(n) % 3)


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
    assert not torch.equal(first.batch(0).niche_profile, first.batch(1).niche_profile)


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


# --- several processes, workers, slides ------------------------------------------------------------------------------


def parts_of(batch):
    return {name: value for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batch_of_one(sections, world_size):
    options = {"batch_size": 17, "slides_per_batch": 2, "augment": AugmentConfig(drop_modality=0.2)}
    whole = batches(sections, **options)
    shares = [batches(sections, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for step in range(12):
        expected, found = whole.batch(step), [share.batch(step) for share in shares]
        n = len(expected.clusters) // world_size * world_size
        assert {len(batch.clusters) for batch in found} == {n // world_size}
        for name, value in parts_of(expected).items():
            joined = torch.stack([getattr(batch, name) for batch in found], dim=1).flatten(0, 1)
            if n == len(value):
                torch.testing.assert_close(joined, value, rtol=0, atol=0)
            else:
                assert len(joined) == n
        assert all(parts_of(batch).keys() == parts_of(expected).keys() for batch in found)


def test_a_share_of_an_even_batch_has_the_same_numbers(sections):
    whole = batches(sections, augment=AugmentConfig()).batch(4)
    share = batches(sections, augment=AugmentConfig(), rank=1, world_size=2).batch(4)
    for name, value in parts_of(share).items():
        assert torch.equal(value, getattr(whole, name)[1::2])


def test_too_many_processes_are_refused(sections):
    with pytest.raises(ValueError, match="Section 'a' has 48 spots, too few for 49"):
        batches(sections, world_size=49, batch_size=100)
    with pytest.raises(ValueError, match=r"batch_size \(16\) must be at least .* = 4 × 5"):
        batches(sections, world_size=4, slides_per_batch=5)
    with pytest.raises(ValueError, match="rank must be from 0 to"):
        batches(sections, world_size=2, rank=2)
    with pytest.raises(ValueError, match="no section"):
        batches([])


def test_a_batch_of_several_slides(sections):
    stream = batches(sections, slides_per_batch=2, batch_size=20)
    seen = set()
    for batch in stream:
        names = batch.library.split(", ")
        seen.add(batch.library)
        assert len(names) == len(batch.slides.unique())
        assert (batch.spot_image is None) == (names == ["c"])
        sizes = torch.bincount(batch.slides).tolist()
        assert sizes == ([10, 10] if len(names) == 2 else [20])
        rows = (batch.spot_gene[:, 0] / 5).long()
        assert torch.equal(batch.clusters, rows % 3)
        for number, name in enumerate(names):
            section = next(s for s in sections if s.name == name)
            own = batch.slides == number
            assert len(rows[own].unique()) == int(own.sum())
            if section.has_image:
                assert torch.equal(batch.spot_image[own], scaled(section.spot_image[rows[own].numpy()], colour=None))
    assert seen == {"a, b", "b, a", "c"}


def test_a_resumed_stream_goes_on_where_it_was(sections):
    everything = list(batches(sections, augment=AugmentConfig()))
    rest = list(batches(sections, augment=AugmentConfig(), start=13))
    assert len(rest) == 7
    for one, other in zip(everything[13:], rest, strict=True):
        assert one.library == other.library
        assert all(torch.equal(value, getattr(other, name)) for name, value in parts_of(one).items())


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_share_the_steps_in_order(sections, write_shards, start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    stored = open_shards(write_shards(sections)).open()
    stream = batches(stored, steps=5, start=1)
    stream.preprocess = {"spot_image": scaled, "niche_image": scaled} if start == "fork" else {}
    if start == "spawn":  # functions of a test module cannot be found by a process that starts afresh
        stream.sections = [s for s in stream.sections if not s.section.has_image]
        stream.probability = np.ones(1)
        stream._n_clusters = [3]
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context=start)
    found = list(loader)
    assert len(found) == 4
    for step, batch in enumerate(found, start=1):
        expected = stream.batch(step)
        assert batch.library == expected.library
        assert all(torch.equal(value, getattr(batch, name)) for name, value in parts_of(expected).items())


# --- clusters --------------------------------------------------------------------------------------------------------


def test_every_batch_holds_all_clusters(sections):
    rare = encoded(sections[0])
    rare.clusters = np.array([1, 2, 3] + [0] * 45)
    options = {
        "steps": 40,
        "augment": AugmentConfig(gain=0, shift=0, flips=False, gene_noise=0, drop_modality=0),
        "image_sections": 1.0,
        "preprocess": {"spot_image": scaled, "niche_image": scaled},
        "seed": 0,
    }
    for batch in Batches([rare], batch_size=6, **options):
        assert set(batch.clusters.tolist()) == {0, 1, 2, 3}
        rows = (batch.spot_gene[:, 0] / 5).long()
        assert len(rows.unique()) == 6
        assert torch.equal(batch.clusters, torch.from_numpy(rare.clusters)[rows])
    # Too small for all: as many as there is room for.
    clusters = [batch.clusters.tolist() for batch in Batches([rare], batch_size=3, **options)]
    assert all(len(set(c)) == 3 for c in clusters)
    assert {c for batch in clusters for c in batch} == {0, 1, 2, 3}
    plain = [set(b.clusters.tolist()) for b in Batches([rare], batch_size=6, stratified=False, **options)]
    assert any(len(c) < 4 for c in plain)


def test_a_draw_with_all_clusters_stays_as_it_is(sections):
    for one, other in zip(batches(sections), batches(sections, stratified=False), strict=True):
        assert len(one.clusters.unique()) == 3
        assert torch.equal(one.spot_gene, other.spot_gene)


def test_exchanged_spots_come_from_clusters_that_keep_one():
    clusters = np.repeat(np.arange(5), [40, 3, 3, 3, 1])
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rows = rng.choice(50, 8, replace=False)
        held = hold_all_clusters(rows.copy(), clusters, 5, rng)
        assert len(set(held)) == 8
        assert set(clusters[held]) == set(range(5))
        n_lacking = 5 - len(set(clusters[rows]))
        assert len(set(held) - set(rows)) == n_lacking


# --- features of a frozen encoder ------------------------------------------------------------------------------------


def with_features(section, n_views=3):
    result = encoded(section)
    n = len(section)
    spots, views = np.mgrid[:n, :n_views]
    result.niche_feature = np.stack([spots, views], axis=2).astype(np.float16)
    return result


def test_features_take_the_place_of_pixels_a_view_at_random(sections):
    def no_pixels(pixels, *, colour):
        raise AssertionError("pixels were read")

    stream = batches(sections[:2], augment=AugmentConfig(drop_modality=0), batch_size=12)
    stream.preprocess["niche_image"] = no_pixels
    stream.sections = [with_features(section) for section in sections[:2]]
    views = set()
    for batch in stream:
        rows = (batch.niche_profile[:, 0] / 5).long()
        assert batch.niche_image.dtype == torch.float32
        assert torch.equal(batch.niche_image[:, 0].long(), rows)
        views.update(batch.niche_image[:, 1].long().tolist())
        assert batch.spot_image.ndim == 4
    assert views == {0, 1, 2}
    stream.sections = [with_features(section, 1) for section in sections[:2]]
    assert stream.batch(0).niche_image[:, 1].max() == 0


def test_features_of_several_slides_and_processes(sections):
    options = {"slides_per_batch": 2, "batch_size": 16}
    whole = batches(sections[:2], **options)
    share = batches(sections[:2], rank=1, world_size=2, **options)
    for stream in (whole, share):
        stream.sections = [with_features(section) for section in sections[:2]]
    for step in range(5):
        assert torch.equal(share.batch(step).niche_image, whole.batch(step).niche_image[1::2])


def test_the_spots_of_a_step_do_not_change(sections):
    """What a seed stands for: the draws that the bundled model was trained with."""
    stream = batches(sections, augment=AugmentConfig())
    drawn = [
        (b.library, int((b.niche_profile[:, 0] / 5).sum()), round(float(b.spot_gene.sum()), 2))
        for b in map(stream.batch, range(4))
    ]
    assert drawn == [("b", 358, 9088.28), ("c", 362, 9183.34), ("a", 354, 8987.72), ("c", 370, 9386.67)]
