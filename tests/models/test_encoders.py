from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import sparse

import stalign
from stalign.models.encoders import IMAGE_ENCODERS, build_gene_encoder, build_image_encoder, load_image_encoder
from stalign.models.encoders._vit import ViT

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


@pytest.fixture(scope="module")
def uni_tiny(shared):
    return shared / "reference" / "uni_tiny"


@pytest.fixture
def tiny_vit():
    torch.manual_seed(0)
    return build_image_encoder("uni", **TINY).eval()


@pytest.mark.reference
def test_uni_features(uni_tiny):
    encoder = load_image_encoder("uni", weights=uni_tiny, **TINY)
    expected = np.load(uni_tiny / "expected.npz")
    with torch.inference_mode():
        square = encoder(torch.from_numpy(expected["images"]))
        oblong = encoder(torch.from_numpy(expected["images_48x40"]))
    np.testing.assert_allclose(square, expected["features"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(oblong, expected["features_48x40"], rtol=0, atol=1e-5)
    assert len(encoder.provenance.sha256) == 64


@pytest.mark.reference
def test_public_uni_fits(shared, read_shapes):
    """The list of what the public file holds is exactly what the encoder takes."""
    lines = (shared / "reference" / "uni_state_dict_keys.txt").read_text()
    public = {
        key: shape for key, shape in read_shapes(lines).items() if "." in key or key in ("cls_token", "pos_embed")
    }
    with torch.device("meta"):
        own = build_image_encoder("uni").backbone.state_dict()
    assert {key: tuple(value.shape) for key, value in own.items()} == public


def test_published_front_end_pools_to_the_vits_size(tiny_vit):
    encoder = build_image_encoder("uni", front="published", **TINY).eval()
    assert encoder.size is None
    assert encoder(torch.randn(2, 3, 20, 50)).shape == (2, 48)
    assert set(dict(encoder.front.named_parameters())) == {"norm.weight", "norm.bias", "conv.weight", "conv.bias"}
    assert [module is encoder.vit for module in encoder.frozen_modules()] == [True]
    # With an identity in front it is the fixed one.
    encoder.vit.load_state_dict(tiny_vit.vit.state_dict())
    with torch.no_grad():
        encoder.front.conv.weight.zero_()
        encoder.front.conv.weight[range(3), range(3), 1, 1] = 1
        encoder.front.conv.bias.zero_()
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(encoder(x), tiny_vit(x), atol=1e-4, rtol=1e-4)


# Published sizes of the models; those of Phikon v2 are UNI's.
@pytest.mark.parametrize(
    ("name", "dim", "millions"),
    [
        ("uni", 1024, 303),
        ("uni2-h", 1536, 681),
        ("virchow2", 2560, 631),
        ("h-optimus-0", 1536, 1135),
        ("phikon-v2", 1024, 303),
    ],
)
def test_foundation_models(name, dim, millions):
    with torch.device("meta"):
        encoder = build_image_encoder(name)
        assert encoder(torch.empty(1, 3, 224, 224)).shape == (1, dim)
    assert encoder.dim == dim
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == millions
    assert IMAGE_ENCODERS[name].licence
    assert IMAGE_ENCODERS[name].hub
    assert encoder.licence == IMAGE_ENCODERS[name].licence


def test_preprocess():
    encoder = build_image_encoder("uni", **TINY)
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    x = encoder.preprocess(pixels)
    assert x.shape == (2, 3, 32, 32)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    assert encoder.preprocess(pixels[:, :20, :20]).shape == (2, 3, 32, 32)
    assert encoder.preprocess(torch.from_numpy(pixels)).shape == (2, 3, 32, 32)
    pixels.flags.writeable = False
    torch.testing.assert_close(encoder.preprocess(pixels), x)
    assert encoder.preprocess(pixels[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8, 3)), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)]
)
def test_preprocess_refuses(bad):
    with pytest.raises(ValueError, match="must be \\(n, height, width, 3\\) uint8"):
        build_image_encoder("test_resnet").preprocess(bad)


def test_any_timm_name():
    encoder = build_image_encoder("test_vit").eval()
    assert encoder.size == 160  # this one has a fixed size
    assert encoder(encoder.preprocess(np.zeros((1, 32, 32, 3), np.uint8))).shape == (1, encoder.dim)
    assert build_image_encoder("timm", model="test_resnet").dim == build_image_encoder("test_resnet").dim
    stated = build_image_encoder("test_resnet", mean=[0.5, 0.5, 0.5], std=[1, 1, 1])
    assert stated.resolved_args() == {"mean": [0.5] * 3, "std": [1.0] * 3}


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("unni", {}, "Unknown image encoder 'unni'.*Did you mean"),
        ("resnet50", {"sizes": 3}, "no argument 'sizes'.*Did you mean 'size'"),
        ("timm", {"model": "hf-hub:someone/something"}, "fetched from the network"),
        ("timm", {"model": "resnet5000"}, "timm cannot make 'resnet5000'"),
        ("uni", {"front": "publishd"}, "Did you mean 'published'"),
        ("test_resnet", {"std": [1, 0, 1]}, "std must be positive"),
        ("test_resnet", {"mean": [1, 0]}, "mean must be three finite numbers"),
    ],
)
def test_unknown_names_and_arguments(name, args, message):
    with pytest.raises(ValueError, match=message):
        build_image_encoder(name, **args)


# -- weights ---------------------------------------------------------------------------------------------------------


def test_local_safetensors_and_folder(tiny_vit, tmp_path):
    save_file(tiny_vit.vit.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        encoder = load_image_encoder("uni", weights=path, **TINY)
        x = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(encoder(x), tiny_vit(x), rtol=0, atol=0)


def test_timm_classifier_is_dropped(tmp_path):
    import timm

    network = timm.create_model("test_resnet", num_classes=10)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    encoder = load_image_encoder("test_resnet", weights=tmp_path)
    assert torch.equal(encoder.network.conv1[0].weight, network.conv1[0].weight)


def test_dinov2_names(tiny_vit, tmp_path):
    state = {}
    for key, value in tiny_vit.vit.state_dict().items():
        value = value.clone()
        if ".attn.qkv." in key:
            block, kind = key.split(".")[1], key.split(".")[-1]
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"encoder.layer.{block}.attention.attention.{part}.{kind}"] = piece.clone()
            continue
        for ours, theirs in (
            ("blocks.", "encoder.layer."),
            (".attn.proj.", ".attention.output.dense."),
            (".ls1.gamma", ".layer_scale1.lambda1"),
            (".ls2.gamma", ".layer_scale2.lambda1"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
        ):
            key = key.replace(ours, theirs)
        state["layernorm" + key[4:] if key.startswith("norm.") else key] = value
    state["embeddings.mask_token"] = torch.zeros(1, 48)
    save_file(state, tmp_path / "model.safetensors")
    encoder = load_image_encoder("phikon-v2", weights=tmp_path, **TINY)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(x), tiny_vit(x), rtol=0, atol=0)


def test_weights_of_another_architecture(tmp_path, tiny_vit):
    save_file(tiny_vit.vit.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_image_encoder("uni", weights=tmp_path, **{**TINY, "depth": 2})
    with pytest.raises(ValueError, match="another shape"):
        load_image_encoder("uni", weights=tmp_path, **{**TINY, "img_size": 64})
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load_image_encoder("uni", weights=tmp_path, **TINY)


def test_missing_local_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_image_encoder("uni", weights=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds none of .*pytorch_model\.bin"):
        load_image_encoder("uni", weights=tmp_path)
    with pytest.raises(ValueError, match="no public weights"):
        load_image_encoder("resnet50-small")


def test_gated_model_without_access(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*args, **kwargs):
        raise hub.errors.GatedRepoError.__new__(hub.errors.GatedRepoError)

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(PermissionError, match=r"\(1\) accept its licence.*\(2\) log in.*\(3\).*weights='path/to"):
        load_image_encoder("uni2-h")


def test_offline_without_the_file(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(stalign.settings, "_cache_dir", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not in the cache.*\(3\) get pytorch_model\.bin elsewhere"):
        load_image_encoder("uni", local_files_only=True)


@pytest.mark.reference
def test_hub_file(monkeypatch, tmp_path, uni_tiny):
    hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    shutil.copyfile(uni_tiny / "pytorch_model.bin", snapshot / "pytorch_model.bin")
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, file, **kwargs: str(snapshot / file))
    encoder = load_image_encoder("uni", revision="main", **TINY)
    assert encoder.provenance.revision == "c0ffee"


def test_failed_load_leaves_the_encoder(tiny_vit, tmp_path):
    from stalign.models.encoders._weights import fill_image_encoder

    state = {key: value + 1 for key, value in tiny_vit.vit.state_dict().items()}
    state.pop("norm.bias")
    save_file(state, tmp_path / "model.safetensors")
    before = {key: value.clone() for key, value in tiny_vit.state_dict().items()}
    with pytest.raises(ValueError, match=r"norm\.bias"):
        fill_image_encoder(tiny_vit, "uni", tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in tiny_vit.state_dict().items())
    assert tiny_vit.provenance is None


def test_virchow_pooling():
    encoder = ViT(
        img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2, reg_tokens=2, mlp="swiglu", pool="cls+mean"
    )
    x = torch.randn(2, 3, 16, 16)
    tokens = encoder.eval().vit.forward_features(x)
    assert tokens.shape == (2, 1 + 2 + 4, 12)
    torch.testing.assert_close(encoder(x), torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], dim=1))


# -- genes -----------------------------------------------------------------------------------------------------------

SETS = {"first": ["A", "B"], "second": ["B", "C", "D"]}


@pytest.fixture
def pathway():
    args = {"hidden": [6, 5], "layers": 2, "heads": 2, "head_dim": 3, "feedforward": 7, "out_hidden": 5, "dim": 8}
    return build_gene_encoder(
        "pathway-transformer", vocabulary=["D", "X", "B", "A"], n_pathways=2, n_genes=None, gene_sets=SETS, **args
    ).eval()


def test_pathway_input(pathway):
    counts = sparse.csr_matrix(np.array([[1, 1, 1, 1], [0, 0, 10, 0]], dtype=np.float32))
    values = pathway.preprocess(counts).reshape(2, 2, 4)
    unit, full = np.log1p(2500), np.log1p(1e4)
    # genes A, B, C, D; C is not in the vocabulary
    np.testing.assert_allclose(values[0], [[unit, unit, 0, 0], [0, unit, 0, unit]], rtol=1e-6)
    np.testing.assert_allclose(values[1], [[0, full, 0, 0], [0, full, 0, 0]], rtol=1e-6)
    assert pathway(torch.from_numpy(values.reshape(2, 8))).shape == (2, 2, 8)
    niche = pathway.preprocess(counts, connectivities=sparse.csr_matrix(np.full((2, 2), 0.5, np.float32)))
    np.testing.assert_allclose(niche[0], values.mean(axis=0).ravel(), rtol=1e-6)


def test_pathway_prompt(pathway):
    prompt = pathway.prompt(np.array([0])).reshape(2, 4)
    np.testing.assert_allclose(prompt, [[0, 0, 0, 0], [0, 0, 0, np.log1p(1e4)]], rtol=1e-6)
    with pytest.raises(ValueError, match="None of the prompt's genes"):
        pathway.prompt(np.array([1]))


def test_pathway_genes_travel_with_the_weights(pathway):
    state = pathway.state_dict()
    assert state["gene_index"].tolist() == [3, 2, -1, 0]
    assert state["mask"].tolist() == [[1, 1, 0, 0], [0, 1, 1, 1]]


def test_pathway_sets_that_do_not_fit(pathway):
    with pytest.raises(ValueError, match="takes 2 gene sets with 4 genes in their union; got 1 sets with 2"):
        pathway.set_gene_sets({"first": ["A", "B"]})
    with pytest.raises(ValueError, match="None of the 4 genes"):
        pathway.set_gene_sets({"first": ["P", "Q"], "second": ["R", "S"]})
    with pytest.raises(ValueError, match="Did you mean 'HALLMARK_APOPTOSIS'"):
        pathway.set_gene_sets(["HALLMARK_APOPTOSS", "HALLMARK_HYPOXIA"])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_colours_and_textures_are_those_of_each_channel(memory_format):
    from stalign.models.encoders._colour_cnn import colour_texture

    images = torch.randn(3, 3, 7, 5, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(-2, -1))
    right = (images[..., :, 1:] - images[..., :, :-1]).abs().mean(dim=(-2, -1))
    expected = [images.mean(dim=(-2, -1)), images.std(dim=(-2, -1)), (down + right) / 2]
    torch.testing.assert_close(colour_texture(images), torch.cat(expected, dim=1))
