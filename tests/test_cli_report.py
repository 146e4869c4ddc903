from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import stalign as sta
from stalign._cli import app


@pytest.fixture
def run():
    """Run ``stalign report`` in this process; logging and settings are put back."""
    verbosity = sta.settings.verbosity
    yield lambda *arguments: CliRunner().invoke(app, ["report", *[str(argument) for argument in arguments]])
    sta.settings.verbosity = verbosity


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory) -> Path:
    """An embedded slide, so that commands are quick."""
    adata = sta.datasets.synthetic_visium(n_rows=12, n_cols=12)
    sta.tl.embed(adata, progress=False)
    file = tmp_path_factory.mktemp("slides") / "my <slide>.h5ad"
    adata.write_h5ad(file)
    return file


def error_of(result) -> str:
    """The one line that says what is wrong."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_report_beside_the_slide(run, slide_file, tmp_path):
    markers = tmp_path / "markers.json"
    markers.write_text(json.dumps({"tumour <1>": ["ERBB2", "KRT8"], "immune": ["CD3E", "PTPRC"]}))
    before = slide_file.read_bytes()
    target = slide_file.with_suffix(".html")
    result = run(slide_file, "--domains", 3, "--markers", markers, "--genes", "ERBB2,COL1A1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{slide_file} -> {target} (")
    page = target.read_text(encoding="utf-8")
    assert "<h1>my &lt;slide&gt;</h1>" in page
    assert "tumour &lt;1&gt;" in page
    assert "ERBB2, predicted · r = " in page
    assert "COL1A1, predicted · r = " in page
    assert slide_file.read_bytes() == before
    assert sorted(path.suffix for path in slide_file.parent.iterdir()) == [".h5ad", ".html"]


def test_report_replaces_only_when_asked(run, slide_file, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("mine")
    assert "--overwrite" in error_of(run(slide_file, "--out", out))
    assert out.read_text() == "mine"
    assert "NOSUCHGENE" in error_of(run(slide_file, "--out", out, "--force", "--genes", "NOSUCHGENE"))
    assert out.read_text() == "mine"
    result = run(slide_file, "--out", out, "--force", "--title", "Another heading", "--domains", 2)
    assert result.exit_code == 0, result.output
    assert "<h1>Another heading</h1>" in out.read_text(encoding="utf-8")


def test_report_on_bad_input(run, slide_file, tmp_path):
    out = tmp_path / "page.html"
    assert "none.h5ad" in error_of(run(tmp_path / "none.h5ad", "--out", out))
    assert "is a folder" in error_of(run(slide_file, "--out", tmp_path))
    assert "none.json" in error_of(run(slide_file, "--out", out, "--markers", tmp_path / "none.json"))
    assert "stalign-maxi" in error_of(run(slide_file, "--out", out, "--model", "stalign-maxi"))
    assert run(slide_file, "--out", out, "--domains", 1).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_report_of_a_run_stands_beside_its_outs():
    from stalign._cli._report import _beside

    assert _beside(Path("/data/run_1/outs"), "run_1") == Path("/data/run_1/run_1.html")
    assert _beside(Path("/data/slide.zarr"), "slide") == Path("/data/slide.html")
