"""What needs no network does not ask for one."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from stalign import models


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network is off")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_bundled_models():
    if not models.available().models:
        pytest.skip("no model is bundled")
    for name in models.available().models:
        model = models.load(name)
        assert models.load(name, revision=model.provenance.revision, local_files_only=True).genes == model.genes


def test_folders(tiny, tmp_path):
    assert models.load(tiny.save(tmp_path / "model")).genes == tiny.genes


@pytest.mark.reference
def test_local_encoders(shared):
    folder = shared / "reference"
    encoder = models.encoders.load_image_encoder("uni", weights=folder / "uni_tiny")
    assert encoder.preprocess(np.zeros((1, 40, 40, 3), dtype=np.uint8)).shape == (1, 3, 32, 32)
    assert models.encoders.ScGPT.from_folder(folder / "scgpt_tiny" / "ckpt_flash").dim == 32


@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224", "uni", "phikon-v2"])
def test_architectures_are_built_without_weights(name):
    import torch

    with torch.device("meta"):
        assert models.encoders.build_image_encoder(name).dim > 0
