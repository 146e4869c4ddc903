"""The same code on a GPU: embeddings as on the CPU, whichever way the slide is read."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import tifffile
import torch

import stalign as sta
from stalign import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda:0"
FLOAT32, BF16 = 1e-4, 2e-2


@pytest.fixture(scope="module")
def unit_model(make_tiny) -> models.STAlign:
    """All of whose outputs have unit norm."""
    return make_tiny(unit_fused=True)


def embed(adata: ad.AnnData, model, device: str, **options) -> ad.AnnData:
    out = adata.copy()
    sta.tl.embed(out, model=model, device=device, progress=False, **options)
    assert out.uns["stalign"]["embed"]["device"] == device
    return out


def assert_within(found: ad.AnnData, expected: ad.AnnData, tolerance: float) -> None:
    """No unit vector lies farther than ``tolerance`` from its counterpart."""
    names = sorted(name for name in expected.obsm if name.startswith("X_stalign"))
    assert names == sorted(name for name in found.obsm if name.startswith("X_stalign"))
    for name in names:
        ours, theirs = (np.asarray(slide.obsm[name], dtype=np.float64) for slide in (found, expected))
        np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-3)
        assert np.linalg.norm(ours - theirs, axis=1).max() <= tolerance, name


@pytest.mark.parametrize(("amp", "tolerance"), [("off", FLOAT32), ("bf16", BF16)])
def test_as_on_the_cpu(slide, unit_model, amp, tolerance):
    expected = embed(slide, unit_model, "cpu")
    found = embed(slide, unit_model, DEVICE, amp=amp)
    assert found.uns["stalign"]["embed"]["dtype"] == {"off": "float32", "bf16": "bfloat16"}[amp]
    assert_within(found, expected, tolerance)


@pytest.mark.parametrize(("amp", "tolerance"), [("off", FLOAT32), ("bf16", BF16)])
def test_bundled_model_as_on_the_cpu(amp, tolerance):
    slide = sta.datasets.synthetic_visium(n_rows=14, n_cols=14)
    outputs = ("image", "gene")  # the ones of unit norm
    expected = embed(slide, "stalign-mini", "cpu", outputs=outputs)
    assert_within(embed(slide, "stalign-mini", DEVICE, outputs=outputs, amp=amp), expected, tolerance)


@pytest.mark.parametrize("side", ["image", "gene"])
def test_one_side_alone(slide, unit_model, side):
    options = {"modalities": side, "outputs": side}
    assert_within(embed(slide, unit_model, DEVICE, **options), embed(slide, unit_model, "cpu", **options), FLOAT32)


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"batch_size": 16, "num_workers": 3}, {"num_workers": 0}])
def test_neither_batches_nor_threads_change_anything(slide, unit_model, options):
    """Threads read ahead of the device; what they pin is not written again before it was copied."""
    expected = embed(slide, unit_model, "cpu")
    for _ in range(3):
        assert_within(embed(slide, unit_model, DEVICE, **options), expected, FLOAT32)


def test_streaming_from_a_file(slide, unit_model, tmp_path):
    """A slide on disk, counts backed, image in tiles."""
    image = slide.uns["spatial"]["S1"]["images"].pop("hires")
    tifffile.imwrite(tmp_path / "he.tif", image, tile=(64, 64), compression="deflate", photometric="rgb")
    slide.uns["spatial"]["S1"]["metadata"] = {"source_image_path": str(tmp_path / "he.tif")}
    expected = embed(slide, unit_model, "cpu")
    slide.write_h5ad(tmp_path / "slide.h5ad")
    backed = ad.read_h5ad(tmp_path / "slide.h5ad", backed="r")
    sta.tl.embed(backed, model=unit_model, device=DEVICE, batch_size=16, num_workers=2, progress=False)
    assert_within(backed, expected, FLOAT32)


def test_the_model_is_as_it_was(slide, unit_model):
    before = {name: tensor.clone() for name, tensor in unit_model.state_dict().items()}
    embed(slide, unit_model, DEVICE)
    assert unit_model.device.type == "cpu"
    for name, tensor in unit_model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous() or tensor.ndim != 4
        assert torch.equal(tensor, before[name]), name


def test_out_of_memory_halves_the_batch(slide, unit_model, monkeypatch, caplog):
    expected = embed(slide, unit_model, "cpu")
    forward = type(unit_model).forward

    def greedy(self, **inputs):
        if len(next(iter(inputs.values()))) > 20:
            torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
        return forward(self, **inputs)

    monkeypatch.setattr(type(unit_model), "forward", greedy)
    found = embed(slide, unit_model, DEVICE, batch_size=64)
    assert "out of memory" in caplog.text
    assert_within(found, expected, FLOAT32)


def test_many_slides(slide, unit_model, tmp_path):
    slide.write_h5ad(tmp_path / "slide.h5ad")
    results = {}
    for device in ("cpu", DEVICE):
        out = tmp_path / device.replace(":", "_")
        table = sta.tl.embed_many(
            tmp_path / "slide.h5ad", out=out, model=unit_model, device=device, progress=False, errors="raise"
        )
        results[device] = ad.read_h5ad(table["result"][0])
    assert_within(results[DEVICE], results["cpu"], FLOAT32)
