from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import stalign as sta
from stalign._cli import app
from stalign.train._shards import open_shards

SIZES = ("--n-neighbors", 6, "--spot-um", 100, "--niche-um", 200, "--spot-pixels", 8, "--niche-pixels", 12)


@pytest.fixture
def run():
    """Run a command in this process; settings are put back."""
    verbosity, progress = sta.settings.verbosity, sta.settings.progress
    yield lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
    sta.settings.verbosity, sta.settings.progress = verbosity, progress


@pytest.fixture
def slides(hexagonal, tmp_path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    for name, patient in (("A", "one"), ("B", "two")):
        slide = hexagonal.copy()
        slide.obs["patient"] = patient
        slide.write_h5ad(folder / f"{name}.h5ad")
    return folder


@pytest.fixture
def genes(tmp_path) -> Path:
    file = tmp_path / "genes.txt"
    file.write_text("EPCAM\nCD3E\nERBB2\n")
    return file


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def test_prepare_says_what_there_is(run, slides, genes, tmp_path):
    out = tmp_path / "shards"
    arguments = (slides, "--out", out, "--vocabulary", genes, *SIZES, "--no-progress")
    result = run("prepare", *arguments)
    assert result.exit_code == 0, result.output
    shards = open_shards(out)
    assert f"2 sections (2 with an image), 162 spots, 2 patients, {shards.bytes:,} bytes" in result.stdout
    again = run("--verbosity", "INFO", "prepare", *arguments, "--verify")
    assert again.exit_code == 0
    assert f"Every file of {out} is what was written." in again.stdout


def test_options_reach_the_shards(run, slides, genes, tmp_path):
    out, table = tmp_path / "shards", tmp_path / "patients.csv"
    table.write_text("section,patient\nA,three\n")
    result = run("prepare", slides, "--out", out, "--vocabulary", genes, *SIZES, "--patients", table, "--mpp", "A=0.5")
    assert result.exit_code == 0, result.output
    shards = open_shards(out)
    assert shards.geometry._asdict() == {
        "n_neighbors": 6,
        "spot_um": 100.0,
        "niche_um": 200.0,
        "spot_pixels": 8,
        "niche_pixels": 12,
    }
    assert shards.entries["A"].patient == "three"
    assert '"mpp": 0.5' in (out / "A" / "meta.json").read_text()
    assert '"mpp": null' in (out / "B" / "meta.json").read_text()


def test_verify_alone_names_what_is_damaged(run, slides, genes, tmp_path):
    out = tmp_path / "shards"
    run("prepare", slides, "--out", out, "--vocabulary", genes, *SIZES)
    assert run("prepare", "--out", out, "--verify").exit_code == 0
    file = out / "B" / "niche_image.npy"
    pixels = np.load(file)
    pixels[0, 0, 0, 0] ^= 1
    np.save(file, pixels)
    result = run("prepare", "--out", out, "--verify")
    assert result.exit_code == 2
    assert "section 'B'" in result.stderr
    assert "niche_image.npy" in result.stderr


def test_what_cannot_be(run, slides, tmp_path):
    out = tmp_path / "shards"
    refused(run("prepare", slides), "Pass --out")
    refused(run("prepare", "--out", out), "Name the slides to prepare, or --verify")
    refused(run("prepare", "--out", out, "--verify"), "holds no shards")
    refused(run("prepare", slides, "--out", out, "--set", "seed=1"), "--set changes a config")
    refused(run("prepare", slides, "--out", out, "--mpp", "0.5", "--mpp", "A=1"), "either one number for all")
    refused(run("prepare", slides, "--out", out, "--mpp", "A=x"), "NUMBER or SECTION=NUMBER")
    refused(run("prepare", tmp_path / "none", "--out", out), "There is no file or folder")
    refused(run("prepare", slides, "--config", tmp_path / "c.toml", "--mpp", "1"), "--mpp, INPUTS cannot be given")
    refused(run("prepare", "--config", tmp_path / "none.toml"), "There is no config")
    assert not out.exists()


def test_a_config_is_prepared_and_encoded(run, slides, tmp_path, monkeypatch):
    monkeypatch.setattr("stalign.genes.protein_coding_genes", lambda: ("EPCAM", "CD3E", "ERBB2"))
    config = tmp_path / "run.toml"
    config.write_text(
        """
        out = "model"
        [data]
        root = "elsewhere"
        train = ["A.h5ad"]
        validation = ["B.h5ad"]
        [network.changes]
        n_neighbors = 6
        width = 8
        n_tokens = 2
        bypass = false
        spot_patch = {um = 100.0, pixels = 8}
        niche_patch = {um = 200.0, pixels = 12}
        spot_image = {encoder = "timm", args = {model = "resnet10t", model_args = {channels = [8, 8, 8, 8]}}}
        niche_image = {encoder = "timm", args = {model = "resnet10t"}, frozen = true}
        spot_gene = {args = {dim = 8, hidden = 8}}
        niche_gene = {args = {dim = 8, hidden = 8}}
        fusion = {heads = 2, head_dim = 4, hidden = 8}
        heads = {hidden = 8, out = 8}
        [augment]
        views = 2
        """
    )
    out = tmp_path / "shards"
    arguments = ("--config", config, "--set", f"data.root={slides}", "--out", out, "--no-progress")
    result = run("prepare", *arguments, "--verify")
    assert result.exit_code == 0, result.output
    assert "2 sections (2 with an image), 162 spots" in result.stdout
    made = {file.name.split("-")[0] for file in (out / "A" / "cache").glob("*.npy")}
    assert made == {"clusters", "niche_gene", "niche_image", "spot_gene"}
    assert np.load(next((out / "A" / "cache").glob("niche_image*.npy"))).shape == (81, 2, 512)
    assert np.load(next((out / "B" / "cache").glob("niche_image*.npy"))).shape == (81, 1, 512)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.npy")}
    assert run("prepare", *arguments).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.npy")} == before
