from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch

from stalign import models
from stalign.models import STAlign
from stalign.models._config import Geometry
from stalign.train import _data, _features, _shards
from stalign.train._config import AugmentConfig
from stalign.train._data import initial_clusters
from stalign.train._features import FrozenEncoders, encode_section, encode_sections
from stalign.train._sections import save_sections
from stalign.train._shards import open_shards

GENES = tuple(f"G{i}" for i in range(60))
GEOMETRY = Geometry(n_neighbors=6, spot_um=100.0, niche_um=200.0, spot_pixels=16, niche_pixels=16)
AUGMENT = AugmentConfig(gain=0.2, shift=0.3, flips=True)


@pytest.fixture
def write_shards(tmp_path):
    """Write sections to a folder of shards."""
    return partial(save_sections, tmp_path / "shards", genes=GENES, geometry=GEOMETRY)


def make_model(*, frozen: tuple[str, ...] = ("niche_image",), gene=None, seed: int = 0, **changes) -> STAlign:
    torch.manual_seed(seed)
    args = {"model": "resnet10t", "model_args": {"channels": [8, 8, 8, 8]}}
    image = {"encoder": "timm", "args": args, "tokens": {"kind": "linear"}}
    gene = gene or {"encoder": "slide-profile", "args": {"dim": 16, "hidden": 16}}
    config = models.config("mini").updated(
        name="tiny",
        n_tokens=2,
        width=16,
        spot_patch={"pixels": 16},
        niche_patch={"pixels": 16},
        spot_image={**image, "frozen": "spot_image" in frozen},
        niche_image={**image, "frozen": "niche_image" in frozen},
        spot_gene=gene,
        niche_gene=gene,
        fusion={"heads": 2, "head_dim": 8, "hidden": 8},
        heads={"hidden": 16, "out": 16},
        bypass=False,
    )
    return STAlign(config.updated(changes), genes=GENES).train()


def encode(model, section, **changes):
    return encode_section(model, section, **{"n_clusters": 3, "seed": 0, "progress": False, **changes})


def same(a, b):
    for name in ("spot_gene", "niche_gene", "clusters", "spot_feature", "niche_feature"):
        one, other = getattr(a, name), getattr(b, name)
        if one is None or other is None:
            assert one is other is None
        else:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


# --- what is made ----------------------------------------------------------------------------------------------------


def test_inputs_of_the_network(sections):
    model = make_model()
    encoded = encode(model, sections[0])
    spot, niche = model.preprocess_genes(sections[0].counts, connectivities=sections[0].connectivities)
    np.testing.assert_array_equal(encoded.spot_gene, spot)
    np.testing.assert_array_equal(encoded.niche_gene, niche)
    np.testing.assert_array_equal(encoded.clusters, initial_clusters(niche, 3, seed=0))
    assert encoded.spot_gene.dtype == np.float32
    assert encoded.clusters.dtype == np.int64
    assert encoded.spot_feature is None
    assert encoded.niche_feature.shape == (48, 1, model.encoder("niche_image").dim)
    without = encode(model, sections[2])
    assert without.niche_feature is None


def test_features_stand_for_the_pixels(sections):
    model = make_model()
    encoded = encode(model, sections[0])
    model.eval()
    pixels = model.preprocess_niche_image(sections[0].niche_image, colour=sections[0].colour)
    features = torch.from_numpy(encoded.niche_feature[:, 0].astype(np.float32))
    with torch.inference_mode():
        from_pixels, from_features = (model(niche_image=x).niche_image for x in (pixels, features))
    torch.testing.assert_close(from_features, from_pixels, rtol=5e-3, atol=5e-3)
    assert (from_pixels - from_pixels.mean(dim=0)).abs().max() > 0.05


def test_the_colour_is_the_one_to_normalise_with(sections):
    assert encode(make_model(), sections[0]).section.colour is sections[0].colour
    fixed = encode(make_model(colour="fixed"), sections[0])
    assert fixed.section.colour is None
    assert sections[0].colour is not None
    assert not np.array_equal(fixed.niche_feature, encode(make_model(), sections[0]).niche_feature)


@pytest.mark.parametrize("batch_size", [1, 7, 48])
def test_batches_do_not_change_features(sections, batch_size):
    model = make_model()
    whole = encode(model, sections[0], views=3, augment=AUGMENT, batch_size=100).niche_feature.astype(np.float32)
    parts = encode(model, sections[0], views=3, augment=AUGMENT, batch_size=batch_size).niche_feature
    np.testing.assert_allclose(parts.astype(np.float32), whole, rtol=5e-3, atol=5e-3)


def test_view_zero_is_the_patch_and_the_others_are_not(sections):
    model = make_model()
    plain = encode(model, sections[0]).niche_feature
    views = encode(model, sections[0], views=3, augment=AUGMENT).niche_feature
    np.testing.assert_array_equal(views[:, 0], plain[:, 0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (views[:, one] != views[:, other]).any(axis=1).all()
    np.testing.assert_array_equal(encode(model, sections[0], views=3, augment=AUGMENT).niche_feature, views)
    assert not np.array_equal(encode(model, sections[0], views=3, augment=AUGMENT, seed=1).niche_feature, views)
    with pytest.raises(ValueError, match="views is 2, but no augmentation"):
        encode(model, sections[0], views=2, augment=AugmentConfig(gain=0, shift=0, flips=False))


def test_flips_of_a_view_keep_the_pixels(sections):
    draw = _features._ViewDraw(sections[0], "niche_image", 1, 0)
    images = torch.arange(48 * 3 * 4 * 4, dtype=torch.float32).reshape(48, 3, 4, 4)
    turned = draw.apply(images, slice(0, 48), AugmentConfig(gain=0, shift=0, flips=True))
    torch.testing.assert_close(turned.flatten(2).sort().values, images.flatten(2).sort().values)
    kept = (turned == images).flatten(1).all(dim=1)
    assert 0 < int(kept.sum()) < 24


def test_only_a_wholly_frozen_encoder_is_run_ahead():
    assert FrozenEncoders(make_model(), n_clusters=2, seed=0).is_cacheable("niche_image")
    assert not FrozenEncoders(make_model(), n_clusters=2, seed=0).is_cacheable("spot_image")
    vit = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    for front, expected in (("imagenet", True), ("published", False)):
        model = make_model(niche_image={"encoder": "uni", "args": {**vit, "front": front}})
        assert FrozenEncoders(model, n_clusters=2, seed=0).is_cacheable("niche_image") is expected


def test_the_model_is_left_as_it_was(sections):
    model = make_model()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.state_dict(keep_vars=True).items()}
    encode(model, sections[0])
    assert model.training
    assert not model.encoder("niche_image").training
    assert model.encoder("spot_image").training
    for name, value in model.state_dict(keep_vars=True).items():
        assert value.requires_grad == before[name][1]
        assert torch.equal(value, before[name][0])


def test_what_half_precision_cannot_hold_is_refused(sections, monkeypatch):
    model = make_model()
    encoder = model.encoder("niche_image")
    monkeypatch.setattr(encoder, "forward", lambda images: torch.full((len(images), encoder.dim), 1e6))
    with pytest.raises(ValueError, match=r"branch niche_image gives features of section 'a'.*largest 1e\+06"):
        encode(model, sections[0])


def test_another_vocabulary_is_refused(sections):
    sections[0].counts = sections[0].counts[:, :10]
    sections[0].__post_init__()
    with pytest.raises(ValueError, match="counts of 10 genes, the model a vocabulary of 60"):
        encode(make_model(), sections[0])


# --- block by block --------------------------------------------------------------------------------------------------

PATHWAYS = {
    "encoder": "pathway-transformer",
    "args": {"n_pathways": 2, "n_genes": None, "gene_sets": {"x": GENES[:4], "y": GENES[3:9]}, "layers": 1, "dim": 16},
    "tokens": {"kind": "none"},
}


@pytest.mark.parametrize(
    "gene", [None, PATHWAYS, {"encoder": "mlp", "args": {"hidden": [8], "dim": 16}}], ids=["profile", "pathways", "mlp"]
)
def test_blocks_do_not_change_gene_inputs(sections, monkeypatch, gene):
    model = make_model(gene=gene)
    whole = encode(model, sections[0])
    assert np.ptp(whole.niche_gene) > 0
    monkeypatch.setattr(_shards, "_BLOCK_BYTES", 7 * 4 * model.encoder("niche_gene").input_dim)
    parts = encode(model, sections[0])
    np.testing.assert_allclose(parts.spot_gene, whole.spot_gene, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(parts.niche_gene, whole.niche_gene, rtol=1e-4, atol=1e-5)


def test_clusters_of_a_large_slide_come_from_a_sample(monkeypatch):
    profile = np.repeat(np.array([[0.0, 1.0], [5.0, -3.0]], dtype=np.float32), 40, axis=0)
    profile += np.random.default_rng(0).normal(0, 0.1, profile.shape).astype(np.float32)
    monkeypatch.setattr(_data, "_MAX_CLUSTERED", 30)
    labels = initial_clusters(profile, 2, seed=0)
    assert (labels.dtype, len(labels)) == (np.int64, 80)
    assert len(set(labels[:40])) == len(set(labels[40:])) == 1
    assert labels[0] != labels[-1]


# --- kept on disk ----------------------------------------------------------------------------------------------------


def test_from_disk_as_from_memory(sections, write_shards):
    stored = open_shards(write_shards(sections)).open()
    model = make_model(frozen=("spot_image", "niche_image"))
    for before, after in zip(sections, stored, strict=True):
        encoded = encode(model, after, views=2, augment=AUGMENT)
        same(encoded, encode(model, before, views=2, augment=AUGMENT))
        assert isinstance(encoded.niche_gene, np.memmap)


def test_done_once(sections, write_shards, monkeypatch):
    section = open_shards(write_shards(sections)).open(["a"])[0]
    first = encode(make_model(), section)

    def fail(*args, **options):
        raise AssertionError("run again")

    model = make_model()
    for name in ("spot_gene", "niche_gene", "niche_image"):
        monkeypatch.setattr(model.encoder(name), "preprocess", fail)
    monkeypatch.setattr(model.encoder("niche_gene"), "fit", fail)
    same(encode(model, section), first)


def test_a_cache_belongs_to_encoder_weights_transform_and_views(sections, write_shards):
    section = open_shards(write_shards(sections)).open(["a"])[0]

    def files(model, **changes):
        encoded = encode(model, section, **changes)
        return [encoded.__dict__[name].name for name in ("spot_gene", "clusters", "niche_feature")]

    gene, clusters, feature = files(make_model())
    assert files(make_model()) == [gene, clusters, feature]
    assert files(make_model(), n_clusters=4)[0] == gene
    assert files(make_model(), n_clusters=4)[1] != clusters
    assert files(make_model(), seed=1)[1] != clusters
    assert files(make_model(), views=2, augment=AUGMENT)[2] != feature
    stronger = AugmentConfig(gain=0.4, shift=0.3, flips=True)
    assert files(make_model(), views=2, augment=AUGMENT) != files(make_model(), views=2, augment=stronger)
    # Other frozen weights are another encoder; of what trains, nothing is kept.
    assert files(make_model(seed=1)) == [gene, clusters, files(make_model(seed=1))[2]]
    assert files(make_model(seed=1))[2] != feature
    trained = make_model()
    with torch.no_grad():
        trained.encoder("spot_image").network.conv1[0].weight.add_(1)
        trained.encoder("spot_gene").adapter[1].weight.add_(1)
    assert files(trained) == [gene, clusters, feature]
    assert files(make_model(colour="fixed"))[2] != feature
    other = {"encoder": "slide-profile", "args": {"dim": 16, "hidden": 16, "n_components": 4}}
    assert files(make_model(gene=other))[0] != gene


def test_other_counts_are_other_inputs(sections, write_shards):
    section = open_shards(write_shards(sections)).open(["a"])[0]
    first = encode(make_model(), section)
    first_values = np.array(first.spot_gene)
    sections[0].counts = sections[0].counts * 2
    sections[0].counts.data[0] += 50
    section = open_shards(write_shards(sections)).open(["a"])[0]
    assert not np.array_equal(encode(make_model(), section).spot_gene, first_values)


def test_an_interrupted_section_is_encoded_again(sections, write_shards, monkeypatch):
    section = open_shards(write_shards(sections)).open(["a"])[0]
    model = make_model()
    encoder = model.encoder("niche_image")
    forward, calls = encoder.forward, []

    def interrupted(images):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return forward(images)

    monkeypatch.setattr(encoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(model, section, batch_size=10)
    monkeypatch.setattr(encoder, "forward", forward)
    np.testing.assert_array_equal(
        encode(model, section, batch_size=10).niche_feature, encode(model, sections[0], batch_size=10).niche_feature
    )


def test_processes_share_the_work(sections, write_shards, caplog):
    stored = open_shards(write_shards(sections)).open()
    order = []
    model = make_model()

    class Frozen(FrozenEncoders):
        def encode(self, section):
            order.append(section.name)
            return super().encode(section)

    options = {"n_clusters": 3, "seed": 0, "progress": False}
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, logger="stalign"):
        patch.setattr(_features, "FrozenEncoders", Frozen)
        encoded = encode_sections(model, stored, rank=1, world_size=2, **options)
    assert order == ["b", "a", "c"]
    assert [e.section.name for e in encoded] == ["a", "b", "c"]
    assert "features of niche_image" in caplog.text
