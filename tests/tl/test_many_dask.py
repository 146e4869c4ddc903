"""Slides on a real Dask cluster of two worker processes, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import stalign as sta
from stalign.tl import _many

distributed = pytest.importorskip("distributed")

PATIENCE = 60.0


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=None
    ) as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster) as client:
        client.wait_for_workers(2, timeout=PATIENCE)
        yield client


@pytest.fixture(scope="module")
def folder(make_planted, tmp_path_factory) -> Path:
    """Five slides, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(5):
        slide = make_planted(f"S{number}", seed=number, n_rows=5, n_cols=6 + number)
        # With the model's niches at hand, no worker has to import squidpy, which takes longer than the slide.
        sta.pp.extract_niches(slide, n_neighbors=6, spot_um=80.0, niche_um=240.0)
        slide.write_h5ad(folder / f"{number}.h5ad")
    return folder


@pytest.fixture(scope="module")
def slides(folder) -> list[Path]:
    return sorted(folder.glob("*.h5ad"))


@pytest.fixture(scope="module")
def serial(slides, tiny_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("serial")
    sta.tl.embed_many(slides, out=out, model=tiny_folder, progress=False)
    return out


def journal(out: Path, number: int) -> list[dict]:
    file = out / "journal" / f"{number}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def count(out: Path, number: int, event: str) -> int:
    return sum(line["event"] == event for line in journal(out, number))


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def assert_same_files(out: Path, serial: Path, same) -> None:
    for file in sorted(serial.glob("*.h5ad")):
        ours, theirs = ad.read_h5ad(out / file.name), ad.read_h5ad(file)
        same(ours, theirs, atol=1e-6)
        assert json.loads(ours.uns["stalign"]["job"]) == json.loads(theirs.uns["stalign"]["job"])
        assert (ours.X != theirs.X).nnz == 0
        np.testing.assert_array_equal(ours.obs_names, theirs.obs_names)
    assert sorted(file.name for file in out.glob("*.h5ad")) == sorted(file.name for file in serial.glob("*.h5ad"))


def on_workers(client, function: Callable[[], object]) -> dict[str, object]:
    """Run a function on every worker; one that was killed just before may be listed for a moment longer."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return client.run(function)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def pause_before_renaming(client, release: Path) -> None:
    """Let every worker stop between writing the temporary file and renaming it, until ``release`` exists."""

    def patch() -> None:
        import time
        from pathlib import Path

        from anndata import AnnData

        real = AnnData.write_h5ad

        def paused(self, path, **options):
            real(self, path, **options)
            while not Path(release).exists():
                time.sleep(0.02)

        AnnData.write_h5ad = paused

    on_workers(client, patch)


def die_after_writing(client, name: str, mark: Path, *, before: bool = False) -> None:
    """Let the worker that has the slide ``name`` be killed once its result has its name; once only, by ``mark``."""

    def patch() -> None:
        import os
        import signal
        from pathlib import Path

        import stalign.io._slides as module

        real = module.write_slide

        def deadly(adata, path):
            mine = path.name == name and not Path(mark).exists()
            if mine:
                Path(mark).touch()
            if mine and before:
                os.kill(os.getpid(), signal.SIGKILL)
            real(adata, path)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)

        module.write_slide = deadly

    on_workers(client, patch)


def test_a_worker_is_killed_in_the_middle(client, slides, serial, tiny_folder, tmp_path, same):
    out, release = tmp_path / "out", tmp_path / "release"
    pause_before_renaming(client, release)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(sta.tl.embed_many, slides, out=out, client=client, model=tiny_folder, progress=False)
        try:
            # Both workers have written a temporary file each, and nothing is finished.
            wait_until(lambda: run.done() or len(list(out.glob(".*.tmp"))) == 2)
            victims = [number for number in range(5) if journal(out, number)]
            assert len(victims) == 2
            assert not list(out.glob("*.h5ad"))
            victim = victims[0]
            os.kill(journal(out, victim)[0]["pid"], signal.SIGKILL)
        finally:
            release.touch()
        table = run.result(timeout=PATIENCE)
    # Nothing is lost …
    assert table["slide"].tolist() == [str(slide) for slide in slides]
    assert table["status"].tolist() == ["done"] * 5
    assert table["n_spots"].tolist() == [30, 35, 40, 45, 50]
    assert (table["worker"] != "").all()
    assert_same_files(out, serial, same)
    # … nothing is done twice …
    assert [count(out, number, "finished") for number in range(5)] == [1] * 5
    assert [count(out, number, "started") for number in range(5)] == [1 + (number == victim) for number in range(5)]
    assert journal(out, victim)[0]["worker"] != journal(out, victim)[-1]["worker"]
    # … and the half-written file of the one that died is gone.
    assert not list(out.glob(".*"))

    # The same again, on the cluster and in one process: all is there.
    for again in (client, None):
        table = sta.tl.embed_many(slides, out=out, client=again, model=tiny_folder, progress=False)
        assert table["status"].tolist() == ["skipped"] * 5
    assert [count(out, number, "started") for number in range(5)] == [1 + (number == victim) for number in range(5)]


def test_a_worker_is_killed_between_writing_and_saying_so(client, slides, serial, tiny_folder, tmp_path):
    """The task goes to another worker, which finds the new result and does not take the older one for it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "1.h5ad").write_bytes((serial / "1.h5ad").read_bytes())
    old = (out / "1.h5ad").stat().st_ino
    die_after_writing(client, "1.h5ad", tmp_path / "mark")
    table = sta.tl.embed_many(slides[:2], out=out, client=client, model=tiny_folder, progress=False, overwrite=True)
    assert table["status"].tolist() == ["done", "skipped"]
    assert (tmp_path / "mark").exists()
    assert (out / "1.h5ad").stat().st_ino != old
    assert [line["event"] for line in journal(out, 1)] == ["started"]
    assert ad.read_h5ad(out / "1.h5ad").n_obs == 35


def test_a_slide_that_kills_its_workers_is_reported(cluster, client, slides, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    die_after_writing(client, "1.h5ad", tmp_path / "mark", before=True)
    table = sta.tl.embed_many(slides[:3], out=tmp_path / "out", client=client, model=tiny_folder, progress=False)
    assert table["status"].tolist() == ["done", "failed", "done"]
    assert "died" in table["error"][1]
    assert not (tmp_path / "out" / "1.h5ad").exists()


def test_failures_and_models(client, slides, tiny, tiny_folder, tmp_path):
    """Wrong input fails alone; the model is loaded once in a worker; one that was never saved cannot travel."""
    bad = ad.read_h5ad(slides[0])
    bad.obsm["spatial"][0] = np.nan
    bad.write_h5ad(tmp_path / "bad.h5ad")
    mixed = [tmp_path / "bad.h5ad", *slides]
    on_workers(client, lambda: sta.tl._many._loaded.cache_clear())
    out = tmp_path / "out"
    table = sta.tl.embed_many(mixed, out=out, client=client, model=tiny_folder, progress=False)
    assert table["status"].tolist() == ["failed"] + ["done"] * 5
    assert "NaN or infinite coordinates" in table["error"][0]
    loads = on_workers(client, lambda: sta.tl._many._loaded.cache_info().misses)
    assert set(loads.values()) <= {0, 1}
    assert sum(loads.values()) == table["worker"].nunique()
    with pytest.raises(ValueError, match="NaN or infinite coordinates"):
        sta.tl.embed_many(mixed, out=out, client=client, model=tiny_folder, progress=False, errors="raise")
    with pytest.raises(ValueError, match="was never saved"):
        sta.tl.embed_many(slides, out=out, client=client, model=tiny, progress=False)


def test_command(cluster, slides, serial, tiny_folder, tmp_path, same):
    from typer.testing import CliRunner

    from stalign._cli import app

    arguments = ["--out", tmp_path / "out", "--model", tiny_folder, "--dask", cluster.scheduler_address]
    result = CliRunner().invoke(app, [str(word) for word in ("embed", *slides, *arguments)])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("spots)") == 5
    assert_same_files(tmp_path / "out", serial, same)
    result = CliRunner().invoke(app, [str(word) for word in ("embed", *slides, *arguments)])
    assert result.stdout.count("finished before)") == 5


# --- without starting a cluster ----------------------------------------------------------------------------------


def test_local_workers_share_out_the_gpus(monkeypatch):
    """One worker per GPU, each of which sees its own; more workers take turns."""
    started = []
    monkeypatch.setattr(distributed, "SpecCluster", lambda **how: started.append(how))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-abc")
    for n_workers, expected in [(0, ["2", "GPU-abc"]), (3, ["2", "GPU-abc", "2"])]:
        _many._local_cluster(n_workers)
        workers = started.pop()["workers"]
        assert [spec["options"]["env"]["CUDA_VISIBLE_DEVICES"] for spec in workers.values()] == expected
        assert {spec["options"]["nthreads"] for spec in workers.values()} == {1}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    _many._local_cluster(0)
    workers = started.pop()["workers"]
    assert len(workers) == 1
    assert "CUDA_VISIBLE_DEVICES" not in workers[0]["options"]["env"]


@pytest.mark.parametrize("address", ["local:0", "local:two"])
def test_wrong_number_of_local_workers(address):
    with pytest.raises(ValueError, match="'local' or 'local:N'"), _many.open_client(address):
        pass
