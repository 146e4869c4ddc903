from __future__ import annotations

import json
import logging
import pickle
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stalign.models._config import Geometry
from stalign.train._sections import save_sections
from stalign.train._shards import (
    CACHE,
    DamagedShardError,
    ShardWriter,
    cached,
    check_name,
    folder_lock,
    open_shards,
    verify_shards,
    write_array,
)

GENES = tuple(f"G{i}" for i in range(60))
GEOMETRY = Geometry(n_neighbors=6, spot_um=100.0, niche_um=200.0, spot_pixels=16, niche_pixels=16)


@pytest.fixture
def write_shards(tmp_path):
    """Write sections to a folder of shards."""
    return partial(save_sections, tmp_path / "shards", genes=GENES, geometry=GEOMETRY)


@pytest.fixture
def labelled(sections):
    sections[0].labels = np.where(np.arange(len(sections[0])) < 24, "stroma", "")
    return sections


# --- what comes back -------------------------------------------------------------------------------------------------


def test_a_section_comes_back_as_it_was(labelled, write_shards):
    shards = open_shards(write_shards(labelled))
    assert list(shards.entries) == ["a", "b", "c"]
    for before, after in zip(labelled, shards.open(), strict=True):
        assert (after.name, after.patient, len(after)) == (before.name, before.patient, len(before))
        for name in ("counts", "connectivities"):
            old, new = getattr(before, name), getattr(after, name)
            assert (new.dtype, new.shape) == (old.dtype, old.shape)
            assert (old != new).nnz == 0
        for name in ("spot_image", "niche_image", "labels"):
            old, new = getattr(before, name), getattr(after, name)
            if old is None:
                assert new is None
                continue
            assert isinstance(new, np.memmap)
            np.testing.assert_array_equal(new, old)
            assert new.dtype == old.dtype
        assert after.has_image == before.has_image
        if before.colour is None:
            assert after.colour is None
        else:
            np.testing.assert_array_equal(after.colour, before.colour)


def test_opening_reads_nothing_and_keeps_nothing_open(sections, write_shards):
    opened = open_shards(write_shards(sections)).open()
    assert len(pickle.dumps(opened)) < 8000
    again = pickle.loads(pickle.dumps(opened))  # noqa: S301 - written one line above
    np.testing.assert_array_equal(again[0].spot_image, sections[0].spot_image)
    handles = Path("/proc/self/fd")
    if handles.is_dir():
        before = len(list(handles.iterdir()))
        for section in opened * 20:
            assert section.counts.nnz
            assert len(section.connectivities.data)
        assert len(list(handles.iterdir())) == before


def test_a_mapped_array_cannot_be_changed(sections, write_shards):
    section = open_shards(write_shards(sections)).open(["a"])[0]
    with pytest.raises(ValueError, match="read-only"):
        section.spot_image[0] = 0


def test_a_section_without_counts(write_shards, sections):
    empty = sections[2]
    empty.counts = empty.counts * 0
    empty.counts.eliminate_zeros()
    assert open_shards(write_shards([empty])).open()[0].counts.nnz == 0


# --- choosing --------------------------------------------------------------------------------------------------------


def test_patterns_match_the_end_of_the_source_or_the_name(sections, write_shards):
    shards = open_shards(write_shards(sections))
    assert shards.select(["b/*", "a/a"]) == ["b", "a"]
    assert shards.select(["?/[ac]"]) == ["a", "c"]
    assert shards.select(["**/b", "*"]) == ["b", "a", "c"]
    assert shards.select(["c"]) == ["c"]
    with pytest.raises(FileNotFoundError, match=r"matches 'd/\*'.*a/a"):
        shards.select(["d/*"])


def test_sections_of_patients(sections, write_shards):
    sections[2].patient = "a"
    shards = open_shards(write_shards(sections))
    assert shards.of_patients(["a"]) == ["a", "c"]
    assert shards.patients == ["a", "b"]
    with pytest.raises(ValueError, match=r"patient 'd'. Patients: \['a', 'b'\]"):
        shards.of_patients(["d"])


def test_shards_of_another_network_are_refused(sections, write_shards):
    shards = open_shards(write_shards(sections))
    shards.check(shards.geometry, shards.genes)
    with pytest.raises(ValueError, match=r"niche_um 200.0 instead of 400.0"):
        shards.check(shards.geometry._replace(niche_um=400.0), shards.genes)
    with pytest.raises(ValueError, match="another vocabulary"):
        shards.check(shards.geometry, shards.genes[::-1])


# --- damage ----------------------------------------------------------------------------------------------------------


def remove(folder):
    (folder / "spot_image.npy").unlink()


def shorten(folder):
    file = folder / "niche_image.npy"
    file.write_bytes(file.read_bytes()[:-7])


def break_json(folder):
    (folder / "meta.json").write_text('{"format": 1, "na')


def change_meta(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "patient": "someone else"}))


def lose(folder):
    folder.rename(folder.with_name("elsewhere"))


DAMAGES = [
    (remove, r"spot_image.npy' is missing"),
    (shorten, r"niche_image.npy' has [\d,]+ bytes instead of"),
    (break_json, r"meta.json' cannot be read as JSON"),
    (change_meta, r"meta.json' is not the one that the manifest names"),
    (lose, r"meta.json' is missing"),
]


@pytest.mark.parametrize(("harm", "message"), DAMAGES)
def test_a_damaged_shard_is_named_and_skipped_only_on_request(sections, write_shards, caplog, harm, message):
    folder = write_shards(sections)
    harm(folder / "b")
    with pytest.raises(DamagedShardError, match=rf"1 of 3 shards .* Section 'b': .*{message}.*stalign prepare"):
        open_shards(folder)
    assert list(verify_shards(folder)) == ["b"]
    with caplog.at_level(logging.WARNING, logger="stalign"):
        shards = open_shards(folder, skip_damaged=True)
    assert list(shards.entries) == ["a", "c"]
    assert "Section 'b'" in caplog.text


def test_a_changed_byte_is_found_by_its_checksum(sections, write_shards):
    folder = write_shards(sections)
    assert verify_shards(folder) == {}
    file = folder / "a" / "counts_data.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    open_shards(folder)
    found = verify_shards(folder)
    assert list(found) == ["a"]
    assert "counts_data.npy' is not what was written" in found["a"]


def test_a_damaged_manifest_or_vocabulary_is_named(sections, write_shards, tmp_path):
    folder = write_shards(sections)
    genes = (folder / "genes.txt").read_text()
    (folder / "genes.txt").write_text(genes.replace("G1\n", "G1X\n"))
    with pytest.raises(DamagedShardError, match=r"genes.txt' is not the vocabulary"):
        open_shards(folder)
    (folder / "genes.txt").write_text(genes)
    manifest = (folder / "manifest.json").read_text()
    for content, message in (
        (manifest[:50], "cannot be read as JSON"),
        ('{"format": 1, "sections": []}', "is not a manifest of shards"),
        ("[1]", "holds a JSON list"),
    ):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(DamagedShardError, match=message):
            open_shards(folder)
    (folder / "manifest.json").write_text(manifest.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2; this version of stalign reads format 1"):
        open_shards(folder)
    with pytest.raises(FileNotFoundError, match=r"no manifest.json. `stalign prepare"):
        open_shards(tmp_path)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_blocks_of_any_length_make_the_same_file(tmp_path):
    values = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    whole = write_array(tmp_path / "whole.npy", values.shape, values.dtype, [values])
    parts = write_array(tmp_path / "parts.npy", values.shape, values.dtype, [values[:1], values[1:8], values[8:]])
    assert whole == parts
    assert (tmp_path / "whole.npy").stat().st_size == whole["bytes"]
    np.testing.assert_array_equal(np.load(tmp_path / "parts.npy"), values)


@pytest.mark.parametrize("blocks", [[np.zeros((3, 2))], [np.zeros((5, 2))], [np.zeros((4, 3))]])
def test_blocks_that_do_not_make_the_array_are_refused(tmp_path, blocks):
    (tmp_path / "x.npy").write_bytes(b"earlier")
    with pytest.raises(ValueError, match=r"x.npy: "):
        write_array(tmp_path / "x.npy", (4, 2), np.float64, blocks)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]
    assert (tmp_path / "x.npy").read_bytes() == b"earlier"


def test_an_interrupted_section_leaves_the_earlier_one(sections, write_shards):
    folder = write_shards(sections)

    def interrupted():
        yield np.zeros((1, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ShardWriter(folder, "a") as writer:
        writer.add_blocks("spot_image", (2, 2), np.float64, interrupted())
    assert verify_shards(folder) == {}
    assert sorted(item.name for item in folder.iterdir()) == [".lock", "a", "b", "c", "genes.txt", "manifest.json"]


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "manifest.json"])
def test_names_that_are_no_folders(name):
    with pytest.raises(ValueError, match="cannot be the name of a section"):
        check_name(name)


def test_a_locked_folder_makes_others_wait(tmp_path):
    pytest.importorskip("fcntl")
    order = []

    def other():
        with folder_lock(tmp_path):
            order.append("other")

    with folder_lock(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(timeout=0.2)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "other"]


# --- caches ----------------------------------------------------------------------------------------------------------


def test_a_cache_is_made_once_for_each_key(tmp_path):
    made = []

    def blocks():
        made.append(1)
        yield np.arange(4.0).reshape(2, 2)

    first = cached(tmp_path, "x", {"a": 1}, (2, 2), np.float64, blocks)
    assert cached(tmp_path, "x", {"a": 1}, (2, 2), np.float64, blocks) == first
    assert len(made) == 1
    assert cached(tmp_path, "x", {"a": 2}, (2, 2), np.float64, blocks) != first
    np.testing.assert_array_equal(np.load(first), [[0, 1], [2, 3]])
    assert json.loads(first.with_suffix(".json").read_text())["key"] == {"a": 1}


def test_an_interrupted_or_damaged_cache_is_made_again(tmp_path, caplog):
    def blocks(fail=False):
        yield np.zeros((1, 2))
        if fail:
            raise KeyboardInterrupt
        yield np.ones((1, 2))

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "x", {}, (2, 2), np.float64, lambda: blocks(fail=True))
    assert not list(tmp_path.glob("x*"))
    file = cached(tmp_path, "x", {}, (2, 2), np.float64, blocks)
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, logger="stalign"):
        cached(tmp_path, "x", {}, (2, 2), np.float64, blocks)
    assert "made again" in caplog.text
    np.testing.assert_array_equal(np.load(file), [[0, 0], [1, 1]])


def test_a_changed_byte_of_a_cache_is_found(sections, write_shards):
    folder = write_shards(sections)
    file = cached(folder / "c" / CACHE, "x", {}, (3,), np.int64, lambda: [np.arange(3)])
    assert verify_shards(folder) == {}
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    assert "Remove the file" in verify_shards(folder)["c"]
