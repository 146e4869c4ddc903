from __future__ import annotations

import errno
import json
import logging
import os
import shutil

import anndata as ad
import numpy as np
import pytest

import stalign as sta
from stalign.io._slides import leftovers, replacing, slide_name
from stalign.tl import _many

COLUMNS = ["slide", "result", "status", "n_spots", "seconds", "error", "worker"]


@pytest.fixture
def files(make_planted, tmp_path):
    """Three slides of different sizes, as files."""
    paths = []
    for number, rows in enumerate((5, 6, 7)):
        paths.append(tmp_path / f"slide.{number}.h5ad")
        make_planted(f"S{number}", seed=number, n_rows=rows, n_cols=8).write_h5ad(paths[-1])
    return paths


@pytest.fixture
def many(tiny_folder, tmp_path):
    """Call with the small model into ``tmp_path/out``."""

    def call(slides, **changes):
        arguments = {"out": tmp_path / "out", "model": tiny_folder, "progress": False, **changes}
        return sta.tl.embed_many(slides, **arguments)

    return call


@pytest.fixture
def calls(monkeypatch):
    """The slides that are embedded, in order."""
    seen = []
    real = _many._embed_file
    monkeypatch.setattr(
        _many, "_embed_file", lambda task, *rest, **how: (seen.append(task.slide.name), real(task, *rest, **how))[1]
    )
    return seen


def states(folder):
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.iterdir()}


# --- what comes out ----------------------------------------------------------------------------------------------


def test_each_result_is_what_embed_gives(files, many, tiny_folder, same, tmp_path):
    before = {file: file.read_bytes() for file in files}
    table = many(files, outputs=["fused", "gene"], batch_size=16)
    assert list(table.columns) == COLUMNS
    assert table["slide"].tolist() == [str(file) for file in files]
    assert table["status"].tolist() == ["done"] * 3
    assert table["n_spots"].tolist() == [40, 48, 56]
    assert (table["seconds"] > 0).all()
    assert table["error"].tolist() == table["worker"].tolist() == [""] * 3
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [f"slide.{n}.h5ad" for n in range(3)]
    for file, result in zip(files, table["result"], strict=True):
        expected = ad.read_h5ad(file)
        sta.tl.embed(expected, model=tiny_folder, outputs=["fused", "gene"], progress=False)
        found = ad.read_h5ad(result)
        same(found, expected)
        assert (found.X != expected.X).nnz == 0
    assert {file: file.read_bytes() for file in files} == before


def test_one_slide_and_other_containers(make_planted, many, tmp_path, same):
    """A path alone, an AnnData in zarr."""
    slide = make_planted()
    slide.write_h5ad(tmp_path / "a.h5ad")
    slide.write_zarr(tmp_path / "b.zarr")
    table = many(tmp_path / "a.h5ad")
    other = many([str(tmp_path / "b.zarr")])
    assert (len(table), len(other)) == (1, 1)
    same(ad.read_h5ad(table["result"][0]), ad.read_h5ad(other["result"][0]))


def test_names_of_results(tmp_path):
    for name, expected in [("a.b.h5ad", "a.b"), ("run_1/outs", "run_1"), ("c.zarr", "c"), ("folder", "folder")]:
        assert slide_name(tmp_path / name) == expected


def test_rows_are_reported_as_they_come(files, many):
    rows = []
    table = many(files, on_result=rows.append)
    assert [row._asdict() for row in rows] == table.to_dict("records")


def test_loaded_model(files, many, tiny):
    """A model in memory that was never saved, in this process."""
    assert many(files[:1], model=tiny)["status"].tolist() == ["done"]
    assert many(files[:1], model=tiny)["status"].tolist() == ["skipped"]


# --- going on after an interruption ------------------------------------------------------------------------------


def test_finished_slides_are_skipped(files, many, calls, tmp_path):
    many(files[:2])
    before = states(tmp_path / "out")
    table = many(files)
    assert calls == ["slide.0.h5ad", "slide.1.h5ad", "slide.2.h5ad"]
    assert table["status"].tolist() == ["skipped", "skipped", "done"]
    assert table["n_spots"].tolist() == [40, 48, 56]
    assert table["seconds"].isna().tolist() == [True, True, False]
    after = states(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_interrupted_in_the_middle(files, many, monkeypatch, tmp_path):
    real = ad.AnnData.write_h5ad

    def half(self, path, **options):
        if "slide.1" in str(path):
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        real(self, path, **options)

    monkeypatch.setattr(ad.AnnData, "write_h5ad", half)
    with pytest.raises(KeyboardInterrupt):
        many(files)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["slide.0.h5ad"]
    monkeypatch.undo()
    assert many(files)["status"].tolist() == ["skipped", "done", "done"]


def test_what_killed_processes_left_is_not_used_and_goes(files, many, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    left = [out / f".slide.{number}.h5ad.0123abcd.tmp" for number in (0, 9)]
    for file in left:
        file.write_bytes(b"half")
    assert many(files)["status"].tolist() == ["done"] * 3
    assert not left[0].exists()
    assert left[1].exists()  # of a slide that is none of these


def test_leftovers_are_of_this_name_alone(tmp_path):
    path = tmp_path / "slide.h5ad"
    with replacing(path) as temporary, replacing(tmp_path / "slide.2.h5ad") as other:
        temporary.touch()
        other.touch()
        assert leftovers(path) == [temporary]
        assert not list(tmp_path.glob("*.h5ad"))  # which pathlib would find if only a dot set them apart
    assert leftovers(path) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"outputs": ["fused"]}, r"outputs=\['fused', 'gene', .* and not \['fused'\]"),
        ({"amp": "bf16"}, "amp='off' and not 'bf16'"),
        ({"modalities": "gene"}, r"modalities=.* and not \['gene'\]"),
        ({"mpp": {"S0": 5.0}}, r"mpp=None and not {'S0': 5\.0}"),
    ],
)
def test_results_of_other_options_are_refused(files, many, calls, tmp_path, change, reason):
    many(files[:1])
    before = states(tmp_path / "out")
    with pytest.raises(FileExistsError, match=rf"slide\.0\.h5ad exists, and was made with {reason}.*overwrite=True"):
        many(files, **change)
    assert states(tmp_path / "out") == before  # nothing was computed, not even the new ones
    assert calls == ["slide.0.h5ad"]


def test_how_it_is_computed_does_not_matter(files, many, calls):
    many(files[:1], batch_size=7, outputs=["gene", "fused"])
    table = many(files[:1], batch_size=40, num_workers=1, device="cpu", outputs=("fused", "gene"), retries=3)
    assert table["status"].tolist() == ["skipped"]


def test_settings_count_like_options(files, many, monkeypatch):
    many(files[:1], amp="bf16")
    monkeypatch.setattr(sta.settings, "amp", "bf16")
    assert many(files[:1])["status"].tolist() == ["skipped"]


def test_results_of_another_model_or_slide_are_refused(files, many, make_tiny, tmp_path):
    many(files[:1])
    with pytest.raises(FileExistsError, match="was made by another model"):
        many(files[:1], model=make_tiny(seed=1))
    os.utime(files[0], ns=(1, 1))
    with pytest.raises(FileExistsError, match="has changed since"):
        many(files[:1])


def test_foreign_and_damaged_files_are_refused(files, many, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(files[0], out / files[0].name)
    (out / files[1].name).write_text("mine")
    with pytest.raises(FileExistsError, match=r"is no result of .*So it is with \['slide\.1\.h5ad'\]"):
        many(files)
    assert (out / files[1].name).read_text() == "mine"
    assert len(list(out.iterdir())) == 2


def test_a_truncated_result_is_refused(files, many):
    result = many(files[:1])["result"][0]
    content = open(result, "rb").read()  # noqa: PTH123, SIM115
    with open(result, "wb") as handle:  # noqa: PTH123
        handle.write(content[: len(content) // 2])
    with pytest.raises(FileExistsError, match="cannot be read as a result"):
        many(files[:1])


def test_overwrite_computes_again(files, many, calls, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / files[1].name).write_text("mine")
    many(files[:1])
    before = states(tmp_path / "out")
    assert many(files[:2], overwrite=True, outputs=["fused"])["status"].tolist() == ["done", "done"]
    after = states(tmp_path / "out")
    assert all(before[name] != after[name] for name in before)
    assert calls == ["slide.0.h5ad", "slide.0.h5ad", "slide.1.h5ad"]


# --- slides that fail --------------------------------------------------------------------------------------------


@pytest.fixture
def broken(files):
    """The second slide has a spot without a place."""
    bad = ad.read_h5ad(files[1])
    bad.obsm["spatial"][0] = np.nan
    bad.write_h5ad(files[1])
    return files


def test_a_slide_that_fails_stops_none_of_the_others(broken, many, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="stalign"):
        table = many(broken)
    assert table["status"].tolist() == ["done", "failed", "done"]
    assert "NaN or infinite coordinates" in table["error"][1]
    assert "\n" not in table["error"][1]
    assert table["n_spots"].isna().tolist() == [False, True, False]
    assert not (tmp_path / "out" / "slide.1.h5ad").exists()
    assert "slide.1.h5ad' failed" in caplog.text


def test_raise_stops_at_the_first(broken, many, tmp_path):
    with pytest.raises(ValueError, match="NaN or infinite coordinates"):
        many(broken, errors="raise")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["slide.0.h5ad"]


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (OSError(errno.EIO, "the file server is away"), 3),
        (OSError(errno.ENOSPC, "the disk is full"), 1),
        (FileNotFoundError(errno.ENOENT, "gone"), 1),
        (ValueError("wrong input"), 1),
        (RuntimeError("CUDA error"), 1),
    ],
)
def test_tried_again_where_that_can_help(files, many, monkeypatch, error, tries):
    waits, attempts = [], []

    def fail(task, model, *, progress):
        attempts.append(task.slide)
        raise error

    monkeypatch.setattr(_many.time, "sleep", waits.append)
    monkeypatch.setattr(_many, "_embed_file", fail)
    table = many(files[:1], retries=2)
    assert table["status"].tolist() == ["failed"]
    assert str(error) in table["error"][0]
    assert len(attempts) == tries
    assert waits == [1.0, 2.0][: tries - 1]


def test_a_second_try_that_works(files, many, monkeypatch):
    real, attempts = _many._embed_file, []

    def once(task, model, *, progress):
        attempts.append(task.slide)
        if len(attempts) == 1:
            raise OSError(errno.EIO, "the file server is away")
        return real(task, model, progress=progress)

    monkeypatch.setattr(_many.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(_many, "_embed_file", once)
    assert many(files[:1])["status"].tolist() == ["done"]
    assert len(attempts) == 2


def test_disk_full_keeps_what_is_finished(files, many, monkeypatch, tmp_path):
    real = ad.AnnData.write_h5ad

    def full(self, path, **options):
        if "slide.1" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, **options)

    monkeypatch.setattr(ad.AnnData, "write_h5ad", full)
    table = many(files)
    assert table["status"].tolist() == ["done", "failed", "done"]
    assert "No space left" in table["error"][1]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["slide.0.h5ad", "slide.2.h5ad"]


# --- wrong calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"output": ["fused"]}, TypeError, r"no option 'output'.*Did you mean 'outputs'"),
        ({"copy": True}, TypeError, "no option 'copy'"),
        ({"store": "x.zarr"}, TypeError, "no option 'store'"),
        ({"errors": "ignore"}, ValueError, "errors must be one of"),
        ({"retries": -1}, ValueError, "retries must be an integer >= 0"),
        ({"image": "he.tif"}, ValueError, "`image` belongs to one slide, got 3"),
        ({"model": "stalign-maxi"}, ValueError, "Unknown model 'stalign-maxi'"),
    ],
)
def test_wrong_calls(files, many, tmp_path, change, error, match):
    with pytest.raises(error, match=match):
        many(files, **change)
    assert not (tmp_path / "out").exists()


def test_slides_that_are_not_there_or_share_a_name(files, many, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad"):
        many([*files, tmp_path / "none.h5ad"])
    (tmp_path / "slide.0.zarr").mkdir()
    with pytest.raises(ValueError, match="same name"):
        many([*files, tmp_path / "slide.0.zarr"])
    with pytest.raises(ValueError, match="no slides"):
        many([])
    assert not (tmp_path / "out").exists()


def test_an_image_for_one_slide(make_planted, many, tmp_path, monkeypatch):
    """A relative path means the same as in this folder."""
    import tifffile

    slide = make_planted()
    tifffile.imwrite(tmp_path / "he.tif", slide.uns["spatial"]["S1"]["images"]["hires"], photometric="rgb")
    slide.write_h5ad(tmp_path / "slide.h5ad")
    monkeypatch.chdir(tmp_path)
    table = many("slide.h5ad", image="he.tif", out="out")
    assert table[["slide", "result"]].values.tolist() == [["slide.h5ad", os.path.join("out", "slide.h5ad")]]  # noqa: PTH118
    job = json.loads(ad.read_h5ad(tmp_path / "out" / "slide.h5ad").uns["stalign"]["job"])
    assert job["options"]["image"] == str(tmp_path / "he.tif")
    assert job["slide"] == str(tmp_path / "slide.h5ad")
