from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner

import stalign as sta
from stalign._cli import app
from stalign._cli._files import read_markers, replacing
from stalign._logging import one_line

COMMANDS = (
    *("demo", "embed", "annotate", "predict", "report", "benchmark"),
    *("prepare", "pretrain", "finetune", "convert", "doctor"),
)


@pytest.fixture
def run():
    """Run a command in this process; logging and settings are put back."""
    verbosity = sta.settings.verbosity
    yield lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
    sta.settings.verbosity = verbosity


@pytest.fixture(scope="module")
def slide() -> anndata.AnnData:
    return sta.datasets.synthetic_visium(n_rows=12, n_cols=12)


@pytest.fixture
def slide_file(slide, tmp_path) -> Path:
    file = tmp_path / "slide.h5ad"
    slide.write_h5ad(file)
    return file


def assert_one_line(result, *parts: str) -> None:
    """Exit code 2 and a single readable line on stderr, with no traceback."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    for part in parts:
        assert part in lines[0]


# --- the application ---------------------------------------------------------------------------------------------


def test_help_lists_every_command(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert f"stalign {command}" in result.output.split("Example", 1)[1]


def test_every_command_is_summed_up_in_a_line(run):
    for command in app.registered_commands:
        first = (command.help or "").split("\n\n")[0]
        assert first.endswith("."), command.callback
        assert "\n" not in first
        assert len(first) <= 100, first


def test_exit_codes_are_documented(run):
    words = " ".join(run("--help").output.split())
    for part in ("0 done", "1 a check of `doctor` failed", "2 the input or the call was wrong", "130 stopped"):
        assert part in words


def test_a_fault_of_the_package_is_1_and_ctrl_c_is_130(run, monkeypatch):
    def fail(error):
        def examine(say):
            raise error

        monkeypatch.setattr("stalign._cli._doctor.examine", examine)
        return run("doctor")

    fault = fail(ZeroDivisionError("a fault"))
    assert fault.exit_code == 1
    assert isinstance(fault.exception, ZeroDivisionError)
    assert fail(KeyboardInterrupt()).exit_code == 130


def test_version(run):
    assert run("--version").output.strip() == f"stalign {sta.__version__}"


def test_python_m_stalign():
    environment = {**os.environ, "PYTHONPATH": str(Path(sta.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "stalign", "--version"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0
    assert done.stdout.strip() == f"stalign {sta.__version__}"


def test_unknown_command_and_missing_argument(run):
    assert run("embedd").exit_code == 2
    assert run("embed").exit_code == 2


def test_one_line_joins_lines_and_unwraps_key_errors():
    assert one_line(ValueError("first\n  second")) == "first second"
    assert one_line(KeyError("Key 'a' not found")) == "Key 'a' not found"
    assert one_line(ValueError()) == "ValueError"


def test_debug_shows_the_traceback(run, tmp_path):
    result = run("--debug", "annotate", tmp_path / "none.h5ad", "--markers", tmp_path / "none.json")
    assert isinstance(result.exception, FileNotFoundError)


def test_bad_verbosity(run):
    assert_one_line(run("--verbosity", "LOUD", "doctor"), "verbosity", "LOUD")


# --- files -------------------------------------------------------------------------------------------------------


def test_replacing_leaves_the_old_file_when_the_block_fails(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("old")

    def write_half() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.json", '{"tumour": ["ERBB2", "KRT8"], "immune": ["CD3E"]}'),
        ("m.toml", 'tumour = ["ERBB2", "KRT8"]\nimmune = ["CD3E"]\n'),
        ("m.gmt", "tumour\tna\tERBB2\tKRT8\nimmune\tna\tCD3E\n"),
    ],
)
def test_markers_in_three_formats(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_markers(tmp_path / name) == {"tumour": ["ERBB2", "KRT8"], "immune": ["CD3E"]}


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("m.json", "{", "not valid JSON"),
        ("m.toml", "a = [", "not valid TOML"),
        ("m.json", "[]", "labels and their genes"),
        ("m.json", '{"tumour": "ERBB2"}', "'tumour'"),
        ("m.csv", "a,b", "m.csv"),
    ],
)
def test_bad_markers(tmp_path, name, text, part):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=part):
        read_markers(tmp_path / name)


# --- commands on bad input ---------------------------------------------------------------------------------------


def test_embed_refuses_what_is_not_there(run, tmp_path):
    assert_one_line(run("embed", tmp_path / "none.h5ad", "--out", tmp_path / "out"), "none.h5ad")
    assert not (tmp_path / "out").exists()


def test_embed_refuses_an_unknown_model_and_a_foreign_file(run, slide_file, tmp_path):
    result = run("embed", slide_file, "--out", tmp_path / "out", "--model", "stalign-maxi")
    assert_one_line(result, "Unknown model 'stalign-maxi'")
    text = tmp_path / "slide.txt"
    text.write_text("no slide")
    assert_one_line(run("embed", text, "--out", tmp_path / "out"), "slide.txt", ".h5ad")


def test_embed_refuses_to_overwrite_and_to_mix_up_names(run, slide_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "slide.h5ad").write_text("mine")
    assert_one_line(run("embed", slide_file, "--out", out), "exists", "--overwrite")
    assert (out / "slide.h5ad").read_text() == "mine"
    twin = tmp_path / "other" / "slide.h5ad"
    twin.parent.mkdir()
    twin.write_text("")
    assert_one_line(run("embed", slide_file, twin, "--out", tmp_path / "new"), "same name")


def test_predict_with_an_unknown_gene(run, slide_file):
    assert_one_line(run("predict", slide_file, "--genes", "NOSUCHGENE"), "NOSUCHGENE")
    assert not slide_file.with_name("slide_stalign.h5ad").exists()


def test_annotate_with_unknown_markers(run, slide_file, tmp_path):
    markers = tmp_path / "markers.json"
    markers.write_text('{"a": ["NOSUCHGENE"], "b": ["NEITHERTHIS"]}')
    assert_one_line(run("annotate", slide_file, "--markers", markers), "NOSUCHGENE")


def test_annotate_needs_markers_or_a_reference(run, slide_file):
    assert_one_line(run("annotate", slide_file), "--markers", "--reference")


def test_pretrain_without_config_and_with_an_unknown_key(run, tmp_path):
    assert_one_line(run("pretrain", tmp_path / "none.toml"), "none.toml")
    config = tmp_path / "run.toml"
    config.write_text('[data]\nroot = "."\ntrain = ["*.h5ad"]\n')
    assert_one_line(run("pretrain", config, "--set", "optimiser.stepz=3"), "stepz")
    assert_one_line(run("pretrain", config, "--set", f"data.root={tmp_path}"), "*.h5ad")


def test_convert_refuses_a_damaged_checkpoint(run, tmp_path):
    file = tmp_path / "checkpoint.pth"
    file.write_bytes(b"no checkpoint")
    assert_one_line(run("convert", file, tmp_path / "out"), "checkpoint.pth")
    assert not (tmp_path / "out").exists()


# --- commands that work ------------------------------------------------------------------------------------------


def test_the_bundled_model_is_there():
    assert "stalign-mini" in sta.models.available().models


def test_embed_two_slides_where_one_fails(run, slide, slide_file, tmp_path):
    broken = tmp_path / "broken.h5ad"
    bad = slide.copy()
    bad.obsm["spatial"][0] = np.nan
    bad.write_h5ad(broken)
    result = run("embed", slide_file, broken, "--out", tmp_path / "out", "--no-progress", "--outputs", "fused,gene")
    assert result.exit_code == 2
    assert "broken.h5ad" in result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["slide.h5ad"]
    embedded = anndata.read_h5ad(tmp_path / "out" / "slide.h5ad")
    assert set(embedded.obsm) >= {"X_stalign", "X_stalign_gene"}
    assert "X_stalign_image" not in embedded.obsm


def test_embed_goes_on_where_it_stopped(run, slide, slide_file, tmp_path):
    other = tmp_path / "other.h5ad"
    slide.write_h5ad(other)
    arguments = ["--out", tmp_path / "out", "--no-progress", "--outputs", "fused"]
    assert run("embed", slide_file, *arguments).exit_code == 0
    finished = (tmp_path / "out" / "slide.h5ad").stat().st_mtime_ns
    result = run("embed", slide_file, other, *arguments)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()[-2:]
    assert first.endswith(f"slide.h5ad ({slide.n_obs:,} spots, finished before)")
    assert "other.h5ad" in second
    assert "finished before" not in second
    assert (tmp_path / "out" / "slide.h5ad").stat().st_mtime_ns == finished
    assert_one_line(run("embed", slide_file, *arguments, "--modalities", "gene"), "modalities", "--overwrite")
    assert run("embed", slide_file, *arguments, "--modalities", "gene", "--overwrite").exit_code == 0
    assert anndata.read_h5ad(tmp_path / "out" / "slide.h5ad").uns["stalign"]["embed"]["modalities"] == ["gene"]


def test_embed_refuses_a_wrong_cluster_and_several_slides_for_an_image(run, slide_file, tmp_path):
    pytest.importorskip("distributed")
    out = tmp_path / "out"
    assert_one_line(run("embed", slide_file, "--out", out, "--dask", "local:none"), "local:N", "local:none")
    twin = tmp_path / "twin.h5ad"
    twin.write_text("")
    assert_one_line(run("embed", slide_file, twin, "--out", out, "--image", "he.tif"), "--image belongs to one slide")
    assert not out.exists()


def test_annotate_and_predict_give_what_the_functions_give(run, slide, slide_file, tmp_path):
    markers = {"tumour": ["ERBB2", "KRT8"], "immune": ["CD3E", "PTPRC"], "adipose": ["ADIPOQ", "PLIN1"]}
    (tmp_path / "markers.json").write_text(json.dumps(markers))
    result = run("annotate", slide_file, "--markers", tmp_path / "markers.json")
    assert result.exit_code == 0, result.output
    named = slide_file.with_name("slide_stalign.h5ad")
    result = run("predict", named, "--genes", "ERBB2,KRT8", "--out", tmp_path / "predicted.h5ad")
    assert result.exit_code == 0, result.output
    written = anndata.read_h5ad(tmp_path / "predicted.h5ad")

    expected = slide.copy()
    sta.tl.embed(expected, progress=False)
    sta.tl.zero_shot_annotate(expected, markers)
    sta.tl.predict_expression(expected, ["ERBB2", "KRT8"])
    assert (written.obs["stalign_annotation"].astype(str) == expected.obs["stalign_annotation"].astype(str)).all()
    genes = ["ERBB2", "KRT8"]
    np.testing.assert_allclose(
        written[:, genes].layers["stalign_predicted"], expected[:, genes].layers["stalign_predicted"], atol=1e-5
    )


def test_demo_writes_figures_and_an_anndata(run, tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--n-rows", 14, "--n-cols", 14)
    assert result.exit_code == 0, result.output
    assert "SYNTHETIC" in result.output
    assert "adjusted Rand index" in result.output
    assert "Pearson r" in result.output
    names = {p.name for p in out.iterdir()}
    assert {"1_tissue.png", "2_niches.png", "3_domains.png", "4_annotation.png", "synthetic_visium.h5ad"} <= names
    assert not [name for name in names if "tmp" in name]
    written = anndata.read_h5ad(out / "synthetic_visium.h5ad")
    assert bool(written.uns["synthetic"])
    assert {"stalign_domain", "stalign_annotation", "stalign_annotation_confidence"} <= set(written.obs)


def test_doctor_passes(run):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "Everything works." in result.output
    assert "SHA-256" in result.output
    for part in ("system", "packages", "devices", "settings", "image readers", "cache folder", "models", "self-test"):
        assert f"ok   {part}" in result.output
    for package in ("lightning", "huggingface-hub", "openslide-python", "leidenalg", "distributed", "spatialdata-io"):
        assert package in result.output


def test_doctor_says_which_extras_are_missing_and_how_to_get_them(run, monkeypatch):
    from stalign._cli import _doctor

    known = _doctor._version
    monkeypatch.setattr(_doctor, "_version", lambda name: None if name in _doctor._OPTIONAL else known(name))
    monkeypatch.setattr(_doctor, "_self_test", lambda: ["skipped"])
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for extra in ("train", "hub", "wsi", "leiden", "dask", "spatialdata"):
        assert f"pip install 'stalign[{extra}]'" in result.output


def test_doctor_sees_a_reader_that_reads_wrongly(run, monkeypatch):
    from stalign.slide import ArrayImage

    monkeypatch.setattr("stalign._cli._doctor._self_test", lambda: ["skipped"])
    monkeypatch.setattr("stalign.slide.open_image", lambda path: ArrayImage(np.zeros((64, 96, 3), np.uint8)))
    result = run("doctor")
    assert result.exit_code == 1
    assert "a TIFF compressed with deflate came back with other pixels" in result.output
    assert "Failed: image readers." in result.output


def test_doctor_fails_with_exit_code_1(run, monkeypatch):
    monkeypatch.setattr("stalign._cli._doctor._REQUIRED", ("numpy", "no-such-package"))
    monkeypatch.setattr("stalign._cli._doctor._self_test", lambda: ["skipped"])
    result = run("doctor")
    assert result.exit_code == 1
    assert "no-such-package" in result.output
