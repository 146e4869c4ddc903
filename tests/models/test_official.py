from __future__ import annotations

import argparse
import json
import os

import numpy as np
import pytest
import torch

from stalign import models

pytestmark = pytest.mark.reference

BASE = 51000
TOLERANCE = 5e-5
NAMES = {
    "spot_image": "local_img_feature",
    "spot_gene": "local_gene_feature",
    "niche_image": "global_img_feature",
    "niche_gene": "global_gene_feature",
    "spot": "local_feature",
    "niche": "global_feature",
}


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "reference" / "stalign_official"


@pytest.fixture(scope="module")
def state(folder, fill, read_shapes):
    return fill(read_shapes((folder / "state_dict_keys.txt").read_text()), BASE)


@pytest.fixture(scope="module")
def model(state):
    return models.from_official(state)


def test_recipe(folder, state):
    keys = sorted(state)
    for key, check in json.loads((folder / "fill_checks.json").read_text()).items():
        assert keys[check["k"]] == key
        np.testing.assert_allclose(state[key].flatten()[:3], np.float32(check["first3"]), rtol=1e-7)


def test_outputs(folder, model):
    inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / "expected.npz")
    with torch.inference_mode():
        output = model(
            spot_image=torch.from_numpy(inputs["local_img"]),
            spot_gene=torch.from_numpy(inputs["local_gene"]),
            niche_image=torch.from_numpy(inputs["global_img"]),
            niche_gene=torch.from_numpy(inputs["global_gene"]),
        )
    for ours, theirs in NAMES.items():
        np.testing.assert_allclose(getattr(output, ours), expected[theirs], rtol=0, atol=TOLERANCE, err_msg=ours)
    assert output.niche_image.shape == output.niche_gene.shape == (3, 8, 512)


def test_intermediates(folder, model):
    inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / "intermediates.npz")
    with torch.inference_mode():
        features = model.encoder("spot_image")(torch.from_numpy(inputs["local_img"]))
        tokens = model.branches["spot_gene"](torch.from_numpy(inputs["local_gene"]))
    np.testing.assert_allclose(features, expected["resnet_out"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(tokens, expected["gene_local_tokens"], rtol=0, atol=TOLERANCE)


def test_size(model):
    assert sum(p.numel() for p in model.parameters()) == 395_289_858
    assert model.config.name == "published"


def test_genes_are_not_known(model):
    from scipy import sparse

    counts = sparse.csr_matrix((2, 0), dtype=np.float32)
    with pytest.raises(ValueError, match="do not say which genes"):
        model.encoder("niche_gene").preprocess(counts)
    with pytest.raises(ValueError, match="no scGPT checkpoint is attached"):
        model.encoder("spot_gene").preprocess(counts)


def test_prefix_and_wrapper_make_no_difference(state, tmp_path):
    """Only the mapping of names is looked at here: building the network three times would take a minute."""
    from stalign.models import _torchfile

    for wrapped in (
        {"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        {"state_dict": state},
        {f"module.{key}": value for key, value in state.items()},
    ):
        assert _torchfile.unwrap(wrapped, what="it").keys() == state.keys()
    small = {f"module.{key}": torch.zeros(2) for key in ("a", "b")}
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": small, "args": argparse.Namespace(lr=0.1), "epoch": 7}, file)
    assert set(_torchfile.unwrap(_torchfile.read_torch(file), what="it")) == {"a", "b"}


def test_missing_and_foreign_keys(state):
    broken = dict(state)
    broken["img_local.unknown"] = broken.pop("local_mlp.0.weight")
    with pytest.raises(ValueError, match=r"1 keys are missing: \['local_mlp\.0\.weight'\].*'img_local\.unknown'"):
        models.from_official(broken)


def test_shape(state):
    broken = {**state, "local_mlp.2.bias": torch.zeros(512)}
    with pytest.raises(ValueError, match=r"'local_mlp\.2\.bias' is \(512,\) instead of \(1024,\)"):
        models.from_official(broken)


def test_another_architecture(shared):
    with pytest.raises(ValueError, match=r"823 keys are missing.*48 keys do not belong"):
        models.from_official(shared / "reference" / "uni_tiny" / "pytorch_model.bin")


class Payload:
    """Harmless code that a careless reader would run."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_is_not_executed(tmp_path):
    file, trap = tmp_path / "checkpoint.pth", tmp_path / "executed"
    torch.save({"model": {"weight": torch.zeros(1)}, "extra": Payload(str(trap))}, file)
    with pytest.raises(ValueError, match="is refused"):
        models.from_official(file)
    assert not trap.exists()


def test_truncated_file(tmp_path, shared):
    file = tmp_path / "checkpoint.pth"
    file.write_bytes((shared / "reference" / "uni_tiny" / "pytorch_model.bin").read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"checkpoint\.pth.*(truncated|damaged)"):
        models.from_official(file)


@pytest.mark.parametrize(("content", "message"), [(b"", "empty"), (b"hello" * 100, "damaged|truncated")])
def test_not_a_checkpoint(tmp_path, content, message):
    file = tmp_path / "checkpoint.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        models.from_official(file)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        models.from_official(tmp_path / "nothing.pth")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "lr": 0.1}, {}])
def test_no_state_dict(tmp_path, content):
    file = tmp_path / "checkpoint.pth"
    torch.save(content, file)
    with pytest.raises(ValueError, match="state dict"):
        models.from_official(file)
