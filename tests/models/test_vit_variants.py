"""Vision transformers in UNI's layout of other sizes, against a second implementation in plain PyTorch."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stalign.models.encoders import build_image_encoder, load_image_encoder

SIZES = [
    {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    {"img_size": 48, "patch_size": 16, "embed_dim": 40, "depth": 4, "num_heads": 5},
    {"img_size": 28, "patch_size": 14, "embed_dim": 36, "depth": 2, "num_heads": 6, "mlp_ratio": 2, "norm_eps": 1e-3},
]


def random_state(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4, norm_eps=1e-6):
    generator = torch.Generator().manual_seed(embed_dim)
    hidden = int(embed_dim * mlp_ratio)
    shapes = {
        "cls_token": (1, 1, embed_dim),
        "pos_embed": (1, (img_size // patch_size) ** 2 + 1, embed_dim),
        "patch_embed.proj.weight": (embed_dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (embed_dim,),
        "norm.weight": (embed_dim,),
        "norm.bias": (embed_dim,),
    }
    for block in range(depth):
        parts = {"norm1": None, "norm2": None, "attn.qkv": (3 * embed_dim, embed_dim), "attn.proj": (embed_dim,) * 2}
        parts |= {"mlp.fc1": (hidden, embed_dim), "mlp.fc2": (embed_dim, hidden)}
        for part, shape in parts.items():
            shapes[f"blocks.{block}.{part}.weight"] = shape or (embed_dim,)
            shapes[f"blocks.{block}.{part}.bias"] = shape[:1] if shape else (embed_dim,)
        shapes |= {f"blocks.{block}.ls{k}.gamma": (embed_dim,) for k in (1, 2)}
    return {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}


def plain_vit(state, images, *, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4, norm_eps=1e-6):
    def norm(x, name):
        return F.layer_norm(x, (embed_dim,), state[f"{name}.weight"], state[f"{name}.bias"], norm_eps)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch_size)
    height, width = x.shape[-2:]
    side = img_size // patch_size
    first, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    if (height, width) != (side, side):
        grid = grid.reshape(1, side, side, embed_dim).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        grid = grid.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + torch.cat([first, grid], dim=1)
    n, t, _ = x.shape
    for block in range(depth):
        name = f"blocks.{block}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.reshape(n, t, num_heads, -1).transpose(1, 2) for part in (q, k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(embed_dim / num_heads), dim=-1)
        attended = linear((weights @ v).transpose(1, 2).reshape(n, t, -1), f"{name}.attn.proj")
        x = x + state[f"{name}.ls1.gamma"] * attended
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + state[f"{name}.ls2.gamma"] * linear(hidden, f"{name}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def folder_of(path, size, state, *, nested):
    config = {"architecture": "vit_large_patch16_224", "model_args": {**size, "num_classes": 0}} if nested else size
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"pool": "cls token after final norm", **config}))
    torch.save(state, path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("nested", [False, True])
def test_folder_states_its_size(tmp_path, size, nested):
    state = random_state(**size)
    folder = folder_of(tmp_path / "vit", size, state, nested=nested)
    patch, side = size["patch_size"], size["img_size"]
    for weights in (folder, folder / "pytorch_model.bin"):
        encoder = load_image_encoder("uni", weights=weights)
        for shape in ((side, side), (side + patch, side), (2 * side, 3 * side), (patch, 2 * patch)):
            images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
            with torch.inference_mode():
                got, expected = encoder(images), plain_vit(state, images, **size)
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.reference
def test_tiny_uni_without_arguments(shared):
    folder = shared / "reference" / "uni_tiny"
    encoder, expected = load_image_encoder("uni", weights=folder), np.load(folder / "expected.npz")
    with torch.inference_mode():
        got = encoder(torch.from_numpy(expected["images"]))
    np.testing.assert_allclose(got, expected["features"], rtol=0, atol=1e-5)


def test_wrapped_and_prefixed_weights(tmp_path):
    size = SIZES[0]
    state = random_state(**size)
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    folder = folder_of(tmp_path / "vit", size, wrapped, nested=False)
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        got = load_image_encoder("uni", weights=folder)(images)
    torch.testing.assert_close(got, plain_vit(state, images, **size), rtol=0, atol=2e-5)


def test_arguments_go_before_the_folder(tmp_path):
    size = SIZES[0]
    folder = folder_of(tmp_path / "vit", size, random_state(**size), nested=False)
    with pytest.raises(ValueError, match=r"do not belong|are missing"):
        load_image_encoder("uni", weights=folder, depth=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1]", "must hold a JSON object"), ('{"depth": "3"}', "depth must be a number")],
)
def test_damaged_config(tmp_path, text, message):
    size = SIZES[0]
    folder = folder_of(tmp_path / "vit", size, random_state(**size), nested=False)
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_image_encoder("uni", weights=folder)


def test_patches_of_another_size():
    size = SIZES[0]
    encoder = build_image_encoder("uni", **size, size=64).eval()
    encoder.vit.load_state_dict(random_state(**size))
    images = encoder.preprocess(np.random.default_rng(0).integers(0, 256, (2, 50, 50, 3), dtype=np.uint8))
    assert images.shape == (2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), plain_vit(random_state(**size), images, **size), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="size must be a multiple of patch_size"):
        build_image_encoder("uni", **size, size=60)
    with pytest.raises(ValueError, match="multiples of 8 px"):
        encoder(torch.zeros(1, 3, 30, 32))


def test_published_front_end():
    """BatchNorm in evaluation mode, adaptive average pool, 3 × 3 convolution, for images of any size."""
    size = SIZES[0]
    encoder = build_image_encoder("uni", **size, front="published").eval()
    state = random_state(**size)
    encoder.vit.load_state_dict(state)
    front = encoder.front
    with torch.no_grad():
        front.norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
        front.norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
        for shape in ((20, 50), (32, 32), (70, 33)):
            images = torch.randn(2, 3, *shape)
            mean, variance = (x.view(1, 3, 1, 1) for x in (front.norm.running_mean, front.norm.running_var))
            x = F.adaptive_avg_pool2d((images - mean) / torch.sqrt(variance + 1e-5), 32)
            x = F.conv2d(x, front.conv.weight, front.conv.bias, padding=1)
            torch.testing.assert_close(encoder(images), plain_vit(state, x, **size), rtol=0, atol=5e-5)


def test_weights_that_are_not_numbers(tmp_path):
    size = SIZES[0]
    state = random_state(**size)
    state["norm.bias"][3] = torch.inf
    folder = folder_of(tmp_path / "vit", size, state, nested=False)
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        load_image_encoder("uni", weights=folder)
