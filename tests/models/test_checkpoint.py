from __future__ import annotations

import json
import shutil

import pytest
import torch

from stalign import models
from stalign.models import ModelCard


@pytest.fixture
def saved(tiny, tmp_path):
    return tiny.save(tmp_path / "model", card=ModelCard(description="For tests.", licence_weights="CC BY 4.0"))


def test_round_trip_is_bit_exact(tiny, saved, tiny_inputs):
    random_state = torch.get_rng_state()
    loaded = models.load(saved)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not loaded.training
    assert loaded.config == tiny.config
    assert loaded.genes == tiny.genes
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in tiny.state_dict().items())
    with torch.inference_mode():
        before, after = tiny(**tiny_inputs), loaded(**tiny_inputs)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_folder_contents(saved, genes):
    assert sorted(file.name for file in saved.iterdir()) == [
        "README.md",
        "config.json",
        "genes.txt",
        "model.safetensors",
    ]
    assert (saved / "genes.txt").read_text() == "".join(f"{gene}\n" for gene in genes)
    card = (saved / "README.md").read_text()
    assert "For tests." in card
    assert "Weights: CC BY 4.0" in card
    assert list(saved.parent.iterdir()) == [saved]
    assert models.vocabulary(saved) == genes
    assert models.geometry(saved).n_neighbors == 6


def test_provenance_and_revision(saved):
    model = models.load(saved)
    assert len(model.provenance.sha256) == 64
    assert model.provenance.revision == model.provenance.sha256[:12]
    assert model.card.description == "For tests."
    assert models.load(saved, revision=model.provenance.revision).provenance == model.provenance
    with pytest.raises(ValueError, match="has revision"):
        models.load(saved, revision="0000")


def test_colour_normalisation_travels(saved):
    args = json.loads((saved / "config.json").read_text())["model"]["spot_image"]["args"]
    assert len(args["mean"]) == len(args["std"]) == 3


def test_half_precision(tiny, tmp_path):
    with torch.no_grad():
        tiny.prediction.mean.fill_(1e6)  # more than half precision holds
    small, large = tiny.save(tmp_path / "half", dtype="float16"), tiny.save(tmp_path / "full")
    assert (small / "model.safetensors").stat().st_size < 0.7 * (large / "model.safetensors").stat().st_size
    loaded = models.load(small)
    for key, value in tiny.state_dict().items():
        other = loaded.state_dict()[key]
        assert other.dtype == value.dtype
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-6)
    assert torch.equal(loaded.prediction.mean, tiny.prediction.mean)
    # A second trip changes nothing any more.
    again = models.load(loaded.save(tmp_path / "again", dtype="float16"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_buffers_are_weights(tiny, tmp_path):
    tiny.prediction.gene_index.copy_(torch.tensor([5, 0, 3, 1]))
    loaded = models.load(tiny.save(tmp_path / "model"))
    assert loaded.predicted_genes == ("PTPRC", "CD3E", "KRT8", "EPCAM")


def test_existing_folder(tiny, saved, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        tiny.save(saved)
    before = models.load(saved).provenance.sha256
    with torch.no_grad():
        tiny.prediction.mean.add_(1)
    tiny.save(saved, overwrite=True)
    assert models.load(saved).provenance.sha256 != before
    assert [f.name for f in saved.parent.iterdir()] == ["model"]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="does not hold a model"):
        tiny.save(other, overwrite=True)
    assert (other / "chapter.txt").exists()


def test_failed_save_leaves_nothing(tiny, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_truncated_weights(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is not a readable safetensors file.*truncated or corrupt"
    ):
        models.load(saved)


def test_flipped_bit_is_noticed(saved):
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"SHA-256 .* recorded"):
        models.load(saved)


def test_edited_vocabulary_is_noticed(saved):
    text = (saved / "genes.txt").read_text().replace("CD3E", "CD3D")
    (saved / "genes.txt").write_text(text)
    with pytest.raises(ValueError, match=r"genes\.txt is not the file that was saved"):
        models.load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "genes.txt"])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        models.load(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"model": ', "not valid JSON"), ("[]", "no 'model' entry"), ('{"model": {}, "format": 9}', "format 9")],
)
def test_damaged_config(saved, text, message):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        models.load(saved)


def _edit(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def test_config_with_unknown_key(saved):
    _edit(saved, lambda content: content["model"].update(n_neighbours=6))
    with pytest.raises(ValueError, match=r"unknown key 'n_neighbours'.*Did you mean 'n_neighbors'"):
        models.load(saved)


def test_weights_of_another_architecture(saved):
    _edit(saved, lambda content: content["model"]["heads"].update(out=7))
    with pytest.raises(ValueError, match="tensors have another shape"):
        models.load(saved)
    _edit(saved, lambda content: content["model"].update(missing="tokens"))
    with pytest.raises(ValueError, match=r"keys are missing.*missing_tokens"):
        models.load(saved)


def test_not_a_number_is_refused(tiny, tmp_path):
    with torch.no_grad():
        tiny.heads["spot"].mlp[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        models.load(tiny.save(tmp_path / "model"))


def test_file_in_place_of_a_folder(saved):
    with pytest.raises(ValueError, match="from_official"):
        models.load(saved / "model.safetensors")


def test_hub_id(saved, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "hub" / "snapshots" / "abc123"
    shutil.copytree(saved, snapshot)
    asked = []

    def download(repo, file, **kwargs):
        asked.append((repo, file, kwargs["revision"], kwargs["local_files_only"]))
        return str(snapshot / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = models.load("lab/model", revision="v1", local_files_only=True)
    assert model.provenance[:2] == ("lab/model", "abc123")
    assert ("lab/model", "model.safetensors", "v1", True) in asked


def test_hub_offline(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    import stalign

    monkeypatch.setattr(stalign.settings, "_cache_dir", tmp_path)
    with pytest.raises(FileNotFoundError, match="local_files_only=True"):
        models.load("lab/model", local_files_only=True)
