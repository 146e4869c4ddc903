"""Embeddings of AnnData opened from a file: in the file, in a store beside it, and after interruptions."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import stalign as sta
from stalign.tl import _results, _sinks
from stalign.tl._forward import _Passes

PARTS = ("X_stalign", "X_stalign_spot", "X_stalign_niche", "X_stalign_image", "X_stalign_gene")


@pytest.fixture
def file(slide, tmp_path) -> Path:
    slide.write_h5ad(tmp_path / "slide.h5ad")
    return tmp_path / "slide.h5ad"


def backed(file: Path, mode: str = "r") -> ad.AnnData:
    return ad.read_h5ad(file, backed=mode)


def embed(adata: ad.AnnData, model, **kwargs) -> ad.AnnData:
    sta.tl.embed(adata, model=model, progress=False, **{"batch_size": 16, **kwargs})
    return adata


def values(adata: ad.AnnData) -> dict[str, np.ndarray]:
    return {name: np.asarray(adata.obsm[name]) for name in adata.obsm if name.startswith("X_")}


def check(adata: ad.AnnData, expected: ad.AnnData, atol: float = 1e-5) -> None:
    found = values(adata)
    assert set(found) == set(PARTS)
    for name, matrix in found.items():
        np.testing.assert_allclose(matrix, expected.obsm[name], rtol=0, atol=atol, err_msg=name)


@pytest.fixture
def count_spots(monkeypatch) -> list[int]:
    """Spots that go through the network."""
    seen: list[int] = []
    run = _Passes._run

    def counted(self, batch, images, genes, part):
        result = run(self, batch, images, genes, part)
        seen.append(len(result.spots))
        return result

    monkeypatch.setattr(_Passes, "_run", counted)
    return seen


# --- where the results are ---------------------------------------------------------------------------------------


def test_read_only_gets_a_store_beside_it(file, tiny_folder, embedded):
    before = file.read_bytes()
    adata = embed(backed(file), tiny_folder)
    check(adata, embedded)
    store = file.with_name("slide.X_stalign.zarr")
    assert adata.uns["stalign"]["embed"]["store"] == str(store)
    assert file.read_bytes() == before
    assert sorted(path.name for path in file.parent.iterdir()) == [store.name, file.name]
    assert adata.isbacked
    assert adata.X[:3].nnz > 0


def test_the_store_is_an_anndata(file, tiny_folder, embedded):
    embed(backed(file), tiny_folder)
    alone = ad.read_zarr(file.with_name("slide.X_stalign.zarr"))
    check(alone, embedded, atol=1e-5)
    assert alone.obs_names.equals(embedded.obs_names)
    assert alone.n_vars == 0
    assert alone.uns["stalign"]["embed"]["sha256"] == embedded.uns["stalign"]["embed"]["sha256"]
    assert (alone.obsp["niche_connectivities"] != embedded.obsp["niche_connectivities"]).nnz == 0
    np.testing.assert_array_equal(alone.obs["niche_n_spots"], embedded.obs["niche_n_spots"])


def test_matrices_of_a_store_survive(file, tiny_folder, embedded, tmp_path):
    adata = embed(backed(file), tiny_folder)
    part = adata[np.arange(20)[::-1]]
    np.testing.assert_allclose(np.asarray(part.obsm["X_stalign"]), embedded.obsm["X_stalign"][:20][::-1], atol=1e-5)
    check(adata.to_memory(), embedded)
    assert isinstance(adata.to_memory().obsm["X_stalign"], np.ndarray)
    check(adata.copy(tmp_path / "copy.h5ad"), embedded)
    adata.write_h5ad(tmp_path / "written.h5ad")
    again = ad.read_h5ad(tmp_path / "written.h5ad")
    check(again, embedded)
    assert isinstance(again.obsm["X_stalign"], np.ndarray)


def test_what_follows_takes_a_store(file, tiny_folder, embedded, markers):
    adata = embed(backed(file), tiny_folder)
    for one in (adata, embedded):
        sta.tl.zero_shot_annotate(one, markers)
        sta.tl.spatial_domains(one, 3)
    score = "stalign_annotation_score"
    np.testing.assert_allclose(adata.obsm[score].to_numpy(), embedded.obsm[score].to_numpy(), atol=1e-4)
    assert (adata.obs["stalign_annotation"] == embedded.obs["stalign_annotation"]).mean() > 0.99


def test_writable_gets_them_in_its_file(file, tiny_folder, embedded):
    adata = embed(backed(file, "r+"), tiny_folder)
    check(adata, embedded)
    assert adata.uns["stalign"]["embed"]["store"] == ""
    assert adata.isbacked
    assert adata.X[:3].nnz > 0
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    adata.file.close()
    again = ad.read_h5ad(file)
    check(again, embedded)
    assert (again.X != embedded.X).nnz == 0
    assert (again.obsp["niche_connectivities"] != embedded.obsp["niche_connectivities"]).nnz == 0
    for column in ("array_row", "truth", "niche_n_spots", "niche_in_image"):
        np.testing.assert_array_equal(again.obs[column], embedded.obs[column])
    assert list(again.obs.columns) == list(embedded.obs.columns)
    assert again.uns["stalign"]["niche"]["libraries"]["S1"]["mpp"] == pytest.approx(5.0)
    assert again.uns["stalign"]["embed"]["model"] == "tiny"
    pixels, expected = (one.uns["spatial"]["S1"]["images"]["hires"] for one in (again, embedded))
    np.testing.assert_array_equal(pixels, expected)


def test_again_into_the_same_file(file, tiny_folder, make_tiny, embedded):
    embed(backed(file, "r+"), make_tiny(3)).file.close()
    adata = embed(backed(file, "r+"), tiny_folder, outputs=["fused", "gene"])
    adata.file.close()
    again = ad.read_h5ad(file)
    assert set(values(again)) == {"X_stalign", "X_stalign_gene"}
    np.testing.assert_allclose(again.obsm["X_stalign"], embedded.obsm["X_stalign"], atol=1e-5)


def test_a_passed_image_is_kept_in_the_file(file, tiny_folder, slide, embedded):
    pixels = slide.uns["spatial"]["S1"]["images"]["hires"]
    embed(backed(file, "r+"), tiny_folder, image=pixels).file.close()
    again = embed(ad.read_h5ad(file), tiny_folder)
    check(again, embedded)


def test_a_store_for_data_in_memory(slide, tiny_folder, embedded, tmp_path):
    adata = embed(slide, tiny_folder, store=tmp_path / "out.zarr")
    check(adata, embedded)
    assert isinstance(adata.obsm["X_stalign"], np.ndarray)
    adata.copy().write_h5ad(tmp_path / "slide.h5ad")
    check(ad.read_h5ad(tmp_path / "slide.h5ad"), embedded)
    check(ad.read_zarr(tmp_path / "out.zarr"), embedded)


def test_a_store_in_place_of_the_file(file, tiny_folder, embedded, tmp_path):
    before = file.read_bytes()
    adata = embed(backed(file, "r+"), tiny_folder, store=str(tmp_path / "out.zarr"))
    check(adata, embedded)
    adata.file.close()
    assert file.read_bytes() == before


def test_another_key_has_a_store_of_its_own(file, tiny_folder, make_tiny):
    adata = embed(backed(file), tiny_folder)
    embed(adata, make_tiny(2), key_added="X_other")
    assert (file.with_name("slide.X_other.zarr")).is_dir()
    assert np.abs(np.asarray(adata.obsm["X_other_image"]) - np.asarray(adata.obsm["X_stalign_image"])).max() > 1e-3


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_half_precision(file, tiny_folder, embedded, mode):
    adata = embed(backed(file, mode), tiny_folder, dtype="float16")
    assert {matrix.dtype for matrix in values(adata).values()} == {np.dtype(np.float16)}
    check(adata, embedded, atol=2e-3)


# --- what must not matter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [sparse.csc_matrix, lambda X: X.toarray(), lambda X: X.astype(np.int32)])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_kind_of_matrix_in_the_file(slide, tiny_folder, embedded, tmp_path, form, mode):
    slide.X = form(slide.X)
    slide.write_h5ad(tmp_path / "slide.h5ad", compression="gzip")
    check(embed(backed(tmp_path / "slide.h5ad", mode), tiny_folder), embedded)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [7, 500])
def test_batches_and_threads(file, tiny_folder, embedded, num_workers, batch_size):
    check(embed(backed(file), tiny_folder, num_workers=num_workers, batch_size=batch_size), embedded)


def test_libraries_with_and_without_image(two_libraries, tiny, tmp_path):
    two_libraries.uns["spatial"]["A"]["images"] = {}
    two_libraries.write_h5ad(tmp_path / "two.h5ad")
    expected = embed(two_libraries, tiny, library_key="library")
    adata = embed(backed(tmp_path / "two.h5ad"), tiny, library_key="library")
    check(adata, expected)
    inside = (adata.obs["library"] == "A").to_numpy()
    assert np.isnan(np.asarray(adata.obsm["X_stalign_image"])[inside]).all()
    assert np.isfinite(np.asarray(adata.obsm["X_stalign_image"])[~inside]).all()


# --- going on ----------------------------------------------------------------------------------------------------


def stop_after(monkeypatch, n: int) -> None:
    """Stop the n-th write of rows, as a person would."""
    write, calls = _sinks.FolderSink.write, []

    def stops(self, rows, values):
        calls.append(1)
        if len(calls) > n:
            raise KeyboardInterrupt
        write(self, rows, values)

    monkeypatch.setattr(_sinks.FolderSink, "write", stops)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_interrupted_work_goes_on(file, tiny_folder, embedded, monkeypatch, snapshot, caplog, count_spots, mode):
    adata = backed(file, mode)
    before, content = snapshot(adata.to_memory()), file.read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            embed(adata, tiny_folder)
    assert snapshot(adata.to_memory()) == before
    assert file.read_bytes() == content
    count_spots.clear()
    embed(adata, tiny_folder, batch_size=10)
    assert sum(count_spots) == 120 - 3 * 16
    assert "48 of 120 spots are done" in caplog.text
    check(adata, embedded)
    assert not list(file.parent.glob("*.unfinished"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda adata, kwargs: kwargs.update(modalities=("gene",)), "modalities"),
        (lambda adata, kwargs: kwargs.update(mpp=4.95), "niches|images"),
        (lambda adata, kwargs: kwargs.update(amp="bf16"), "precision"),
        (lambda adata, kwargs: kwargs.update(dtype="float16"), "precision"),
        (lambda adata, kwargs: adata.obsm["spatial"].__iadd__(1.0), "spots"),
        (lambda adata, kwargs: adata.uns["spatial"]["S1"]["images"]["hires"].__setitem__((0, 0), 9), "images"),
    ],
)
def test_what_changed_is_begun_anew(slide, tiny, tmp_path, monkeypatch, caplog, count_spots, change, word):
    store = tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            embed(slide.copy(), tiny, store=store)
    kwargs: dict = {}
    change(slide, kwargs)
    count_spots.clear()
    embed(slide, tiny, store=store, **kwargs)
    assert sum(count_spots) == 120
    assert "begun anew" in caplog.text
    assert any(one in caplog.text for one in word.split("|"))
    alone = embed(slide.copy(), tiny, **kwargs)
    for name, matrix in values(alone).items():
        np.testing.assert_allclose(np.asarray(slide.obsm[name]), matrix, atol=1e-5)


def test_other_counts_and_another_model_are_seen(slide, tiny, make_tiny, tmp_path, caplog, count_spots):
    store = tmp_path / "out.zarr"
    embed(slide.copy(), tiny, store=store)
    other = slide.copy()
    other.X[3, 5] += 1
    for adata, model, word in ((other, tiny, "the counts"), (slide, make_tiny(4), "the model")):
        caplog.clear()
        count_spots.clear()
        embed(adata.copy(), model, store=store)
        assert f"{word} changed" in caplog.text or word in caplog.text
        assert sum(count_spots) == 120


def test_a_finished_store_is_taken_as_it_is(file, tiny_folder, embedded, count_spots, caplog):
    embed(backed(file), tiny_folder)
    count_spots.clear()
    adata = embed(backed(file), tiny_folder, batch_size=50)
    assert count_spots == []
    assert "already" in caplog.text
    check(adata, embedded)
    assert adata.uns["stalign"]["niche"]["libraries"]["S1"]["n_spots"] == 120


@pytest.mark.parametrize("damage", ["missing", "cut", "rubbish"])
def test_a_damaged_store_is_made_anew(file, tiny_folder, embedded, count_spots, caplog, damage):
    embed(backed(file), tiny_folder)
    folder = file.with_name("slide.X_stalign.zarr") / "obsm" / "X_stalign"
    chunk = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:100] if damage == "cut" else b"rubbish" * 50)
    count_spots.clear()
    check(embed(backed(file), tiny_folder), embedded)
    assert sum(count_spots) == 120
    assert "damaged" in caplog.text


@pytest.mark.parametrize("damage", ["note", "no note", "rows", "no rows"])
def test_damaged_work_is_begun_anew(file, tiny_folder, embedded, monkeypatch, count_spots, caplog, damage):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            embed(backed(file), tiny_folder)
    folder = file.with_name("slide.X_stalign.zarr.unfinished")
    note, rows = folder / "progress.json", folder / "fused.rows"
    assert json.loads(note.read_text())["done"] == 48
    if damage == "note":
        note.write_text('{"done": 1')
    elif damage == "rows":
        os.truncate(rows, rows.stat().st_size // 2)
    else:
        {"no note": note, "no rows": rows}[damage].unlink()
    count_spots.clear()
    check(embed(backed(file), tiny_folder), embedded)
    assert sum(count_spots) == 120
    assert "begun anew" in caplog.text


SCRIPT = """
import sys
import anndata as ad
import stalign as sta
from stalign.tl import _forward, _sinks

file, model, mode, kill_after = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
_sinks._NOTE_EVERY = 0.0
n = 0
run = _forward._Passes._run

def counted(self, batch, images, genes, part):
    global n
    result = run(self, batch, images, genes, part)
    n += len(result.spots)
    if n > kill_after:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return result

_forward._Passes._run = counted
adata = ad.read_h5ad(file, backed=mode)
sta.tl.embed(adata, model=model, progress=False, batch_size=16)
print("spots", n)
"""


def run_script(tmp_path: Path, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sta.__file__).parents[1])}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **kwargs)  # noqa: S603


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_killed_in_the_middle(file, tiny_folder, embedded, tmp_path, mode):
    (tmp_path / "scripts").mkdir()
    content = file.read_bytes()
    killed = run_script(tmp_path / "scripts", file, tiny_folder, mode, 70)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert file.read_bytes() == content
    rest = run_script(tmp_path / "scripts", file, tiny_folder, mode, 10_000)
    assert rest.returncode == 0, rest.stderr
    # The passes of 64 spots were through before the one that was killed; all or all but the last are in the folder.
    assert rest.stdout.split() == ["spots", "56"]
    result = ad.read_h5ad(file) if mode == "r+" else ad.read_zarr(file.with_name("slide.X_stalign.zarr"))
    check(result, embedded)


def test_nothing_done_leaves_nothing(file, tiny, monkeypatch):
    from stalign.tl._expression import Expression

    def fails(self):
        raise MemoryError("no room for the genes")

    monkeypatch.setattr(Expression, "fit", fails)
    with pytest.raises(MemoryError):
        embed(backed(file), tiny)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_only_one_process_at_a_time(file, tiny_folder, tiny, monkeypatch):
    pytest.importorskip("fcntl")
    folder = file.with_name("slide.X_stalign.zarr.unfinished")
    first = _sinks.FolderSink(folder, 120, "float32", {})
    with pytest.raises(RuntimeError, match=r"Another process is at work in .*unfinished.*store="):
        embed(backed(file), tiny_folder)
    first.close()
    embed(backed(file), tiny_folder)


# --- a full disk, and other refusals -----------------------------------------------------------------------------


LIMITED = """
import resource, sys
import anndata as ad
import stalign as sta

file, model, mode, limit, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
adata = ad.read_h5ad(file, backed=mode)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    sta.tl.embed(adata, model=model, progress=False, batch_size=batch)
except OSError as error:
    print(error.errno, error.strerror)
    print("untouched" if "X_stalign" not in adata.obsm and "stalign" not in adata.uns else "touched")
    print(adata.X[:2].shape)
    sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files here")
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_no_room_for_the_rows(file, tiny_folder, embedded, tmp_path, mode):
    """A file may not be larger than a few rows: nothing is lost, and nothing is half there."""
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "limited.py"
    script.write_text(LIMITED)
    content = file.read_bytes()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sta.__file__).parents[1])}
    command = [sys.executable, str(script), str(file), str(tiny_folder), mode, "20000", "16"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)  # noqa: S603
    assert done.returncode == 3, done.stderr
    assert str(errno.EFBIG) in done.stdout
    assert "There is no room for the embeddings" in done.stdout
    assert "outputs=('fused',)" in done.stdout
    assert "untouched" in done.stdout
    assert "(2, 240)" in done.stdout
    assert file.read_bytes() == content
    check(embed(backed(file, mode), tiny_folder), embedded)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_full_while_embedding(file, tiny_folder, embedded, monkeypatch, snapshot, count_spots, mode):
    adata = backed(file, mode)
    before, content = snapshot(adata.to_memory()), file.read_bytes()
    write, calls = _sinks._write_all, []

    def fills_up(handle, block):
        calls.append(1)
        if len(calls) > 5 * 30:
            full_disk()
        write(handle, block)

    with monkeypatch.context() as patch:
        patch.setattr(_sinks, "_write_all", fills_up)
        patch.setattr(_sinks, "_NOTE_EVERY", 0.0)
        with pytest.raises(OSError, match=r"no room for .* those of \d+ of 120 spots are kept") as error:
            embed(adata, tiny_folder)
    assert error.value.errno == errno.ENOSPC
    assert snapshot(adata.to_memory()) == before
    assert file.read_bytes() == content
    kept = int(str(error.value).split("those of ")[1].split()[0])
    assert 0 < kept < 120
    count_spots.clear()
    check(embed(adata, tiny_folder), embedded)
    assert sum(count_spots) == 120 - kept


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_full_at_the_end(file, tiny_folder, embedded, monkeypatch, snapshot, count_spots, mode):
    adata = backed(file, mode)
    before, content = snapshot(adata.to_memory()), file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(_results, "_fill", full_disk)
        with pytest.raises(OSError, match=r"There is no room for .*The data are as they were"):
            embed(adata, tiny_folder)
    assert snapshot(adata.to_memory()) == before
    assert file.read_bytes() == content
    left = sorted(path.name for path in file.parent.iterdir())
    assert len(left) == 2
    assert left[0].endswith(".unfinished") or left[1].endswith(".unfinished")
    count_spots.clear()
    check(embed(adata, tiny_folder), embedded)
    assert count_spots == []  # all that was left to do was to write it


def test_an_earlier_store_stays_until_the_new_one_is_there(file, tiny_folder, make_tiny, monkeypatch):
    first = values(embed(backed(file), tiny_folder))
    monkeypatch.setattr(_results, "_fill", full_disk)
    with pytest.raises(OSError, match="no room"):
        embed(backed(file), make_tiny(5))
    kept = ad.read_zarr(file.with_name("slide.X_stalign.zarr"))
    np.testing.assert_array_equal(kept.obsm["X_stalign"], first["X_stalign"])


def test_a_place_that_must_not_be_written_to(file, tiny_folder, monkeypatch):
    def refuses(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuses)
    with pytest.raises(PermissionError, match=r"unfinished' must not be written to.*store="):
        embed(backed(file), tiny_folder)


def test_a_store_that_is_something_else(slide, tiny, tmp_path, snapshot):
    before = snapshot(slide)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("precious")
    (tmp_path / "file.zarr").write_text("precious")
    ad.AnnData(np.ones((2, 2))).write_zarr(tmp_path / "counts.zarr")
    for name in ("notes", "file.zarr", "counts.zarr"):
        with pytest.raises(FileExistsError, match=rf"{name}' is there and holds no embeddings.*store="):
            embed(slide, tiny, store=tmp_path / name)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "precious"
    assert snapshot(slide) == before
    assert not list(tmp_path.glob("*.unfinished"))


def test_views_and_copies_of_a_backed_slide_are_refused(file, tiny):
    adata = backed(file, "r+")
    with pytest.raises(ValueError, match=r"copy=True.*backed by .*slide\.h5ad.*to_memory\(\)"):
        embed(adata, tiny, copy=True)
    with pytest.raises(ValueError, match=r"A view cannot be written to.*to_memory\(\)"):
        embed(adata[:60], tiny)


def test_bad_counts_in_a_file(slide, tiny, tmp_path, snapshot):
    slide.X[5, 7] = 1.5
    slide.write_h5ad(tmp_path / "slide.h5ad")
    adata = backed(tmp_path / "slide.h5ad")
    with pytest.raises(ValueError, match=r"`adata\.X` must hold raw counts.*1\.5 at row 5, column 7"):
        embed(adata, tiny)
    assert not list(tmp_path.glob("*.unfinished"))


def test_bad_dtype(slide, tiny, snapshot):
    before = snapshot(slide)
    with pytest.raises(ValueError, match=r"dtype must be one of \['float32', 'float16'\], got 'float64'"):
        embed(slide, tiny, dtype="float64")
    assert snapshot(slide) == before


def test_the_note_is_not_written_all_the_time(tmp_path):
    sink = _sinks.FolderSink(tmp_path / "work", 1000, "float32", {"a": "1"}, fill=False)
    started = time.monotonic()
    for start in range(0, 900, 10):
        sink.write(np.arange(start, start + 10), {"fused": np.ones((10, 4), dtype=np.float32)})
    assert time.monotonic() - started < _sinks._NOTE_EVERY
    note = _sinks.read_note(tmp_path / "work" / "progress.json")
    assert note is not None
    assert note["done"] <= 20
    sink.close()
    again = _sinks.FolderSink(tmp_path / "work", 1000, "float32", {"a": "1"}, fill=False)
    assert again.done == 900
    again.close()
