from __future__ import annotations

import json
import logging
import os

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import stalign as sta
from stalign.pp import _prepare
from stalign.pp._prepare import find_slides, name_slides, prepare_config, prepare_shards, read_patients
from stalign.train import PretrainConfig
from stalign.train._shards import open_shards, verify_shards

GENES = ("EPCAM", "CD3E", "ERBB2", "KRT8")
SIZES = {"n_neighbors": 6, "spot_um": 100.0, "niche_um": 200.0, "spot_pixels": 8, "niche_pixels": 12}
OPTIONS = {"vocabulary": GENES, "geometry": SIZES, "progress": False}


@pytest.fixture
def cohort(hexagonal, tmp_path):
    """Two patients with a slide each, and one slide in a folder of its own with the name of another."""
    root = tmp_path / "slides"
    for folder, name, patient in (("p1", "A", "one"), ("p1", "B", "two"), ("p2", "B", "two")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        slide = hexagonal.copy()
        slide.obs["patient"] = patient
        slide.X.data[0] += len(list(root.rglob("*.h5ad")))
        slide.write_h5ad(root / folder / f"{name}.h5ad")
    return root


def prepared(folder) -> dict[str, int]:
    """When each section was written."""
    return {file.parent.name: file.stat().st_mtime_ns for file in sorted(folder.glob("*/meta.json"))}


# --- finding slides --------------------------------------------------------------------------------------------------


def test_files_and_folders(cohort):
    slides = find_slides([cohort / "p2" / "B.h5ad", cohort])
    assert [slide.path.relative_to(cohort).as_posix() for slide in slides] == ["p2/B.h5ad", "p1/A.h5ad", "p1/B.h5ad"]
    assert list(name_slides(slides)) == ["p2_B", "A", "p1_B"]


def test_what_is_no_slide(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"looked for .h5ad files, HEST-1k .* It holds \['notes.txt'\]"):
        find_slides([tmp_path])
    with pytest.raises(ValueError, match=r"a file must be an .h5ad"):
        find_slides([tmp_path / "notes.txt"])
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        find_slides([tmp_path / "none"])


def test_slides_that_cannot_be_told_apart(cohort):
    deeper = cohort / "other" / "p1"
    deeper.mkdir(parents=True)
    (cohort / "p1" / "A.h5ad").rename(deeper / "B.h5ad")
    with pytest.raises(ValueError, match=r"both be called 'p1_B'.*Rename one"):
        name_slides(find_slides([cohort]))


# --- preparing -------------------------------------------------------------------------------------------------------


def test_shards_hold_what_the_slides_do(cohort, tmp_path):
    shards = prepare_shards(cohort, tmp_path / "shards", **OPTIONS)
    assert list(shards.entries) == ["A", "p1_B", "p2_B"]
    assert shards.patients == ["one", "two"]
    assert shards.genes == GENES
    assert shards.geometry._asdict() == SIZES
    assert shards.select(["p2/*.h5ad", "A"]) == ["p2_B", "A"]
    section = shards.open(["A"])[0]
    adata = anndata.read_h5ad(cohort / "p1" / "A.h5ad")
    np.testing.assert_array_equal(section.counts[:, 1].toarray(), adata[:, "CD3E"].X.toarray())
    np.testing.assert_array_equal(section.counts[:, 2].toarray(), adata[:, "ERBB2"].X.toarray())
    sta.pp.extract_niches(adata, n_neighbors=6, spot_um=100.0, niche_um=200.0)
    np.testing.assert_array_equal(section.niche_image, sta.pp.get_patches(adata, level="niche", size=12))
    assert shards.bytes == sum(f.stat().st_size for f in shards.folder.glob("*/*.npy"))


def test_what_is_done_is_not_done_again(cohort, tmp_path):
    out = tmp_path / "shards"
    prepare_shards(cohort, out, **OPTIONS)
    first = prepared(out)
    prepare_shards(cohort, out, **OPTIONS)
    assert prepared(out) == first
    # Moved slides are the same slides.
    cohort.rename(tmp_path / "moved")
    prepare_shards(tmp_path / "moved", out, **OPTIONS)
    assert prepared(out) == first
    file = tmp_path / "moved" / "p1" / "A.h5ad"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    prepare_shards(tmp_path / "moved", out, **OPTIONS)
    changed = prepared(out)
    assert {name for name in first if first[name] != changed[name]} == {"A"}
    prepare_shards(tmp_path / "moved", out, patients={"p1_B": "three"}, **OPTIONS)
    again = prepared(out)
    assert {name for name in first if changed[name] != again[name]} == {"p1_B"}
    assert open_shards(out).entries["p1_B"].patient == "three"
    prepare_shards(tmp_path / "moved", out, patients={"p1_B": "three"}, overwrite=True, **OPTIONS)
    assert not set(again.values()) & set(prepared(out).values())


def test_a_damaged_or_interrupted_section_is_done_again(cohort, tmp_path, monkeypatch):
    out = tmp_path / "shards"
    prepare_shards(cohort, out, **OPTIONS)
    first = prepared(out)
    (out / "A" / "spot_image.npy").unlink()
    (out / "p1_B" / "meta.json").write_text("{")
    prepare_shards(cohort, out, **OPTIONS)
    assert verify_shards(out) == {}
    again = prepared(out)
    assert {name for name in first if first[name] != again[name]} == {"A", "p1_B"}

    run, done = _prepare._Job.run, []

    def interrupted(job):
        if len(done) == 1:
            raise KeyboardInterrupt
        run(job)
        done.append(job.name)

    monkeypatch.setattr(_prepare._Job, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(cohort, tmp_path / "other", **OPTIONS)
    # What was finished can be used, and is not done again.
    assert list(open_shards(tmp_path / "other").entries) == done == ["A"]
    before = prepared(tmp_path / "other")["A"]
    monkeypatch.setattr(_prepare._Job, "run", run)
    prepare_shards(cohort, tmp_path / "other", **OPTIONS)
    assert prepared(tmp_path / "other")["A"] == before
    assert len(open_shards(tmp_path / "other")) == 3


def test_a_new_slide_joins_the_others(cohort, tmp_path):
    out = tmp_path / "shards"
    prepare_shards(cohort / "p1" / "A.h5ad", out, **OPTIONS)
    assert list(prepare_shards(cohort / "p2" / "B.h5ad", out, **OPTIONS).entries) == ["A", "B"]
    with pytest.raises(ValueError, match=r"Section 'B' .* was prepared from .*p2/B.h5ad', and now .*p1/B.h5ad'"):
        prepare_shards(cohort / "p1" / "B.h5ad", out, **OPTIONS)


def test_other_settings_are_not_mixed(cohort, tmp_path, caplog):
    out = tmp_path / "shards"
    prepare_shards(cohort, out, **OPTIONS)
    other = {**OPTIONS, "geometry": {**SIZES, "niche_um": 300.0}}
    with pytest.raises(ValueError, match=r"niche_um 200.0 instead of 300.0"):
        prepare_shards(cohort, out, **other)
    with pytest.raises(ValueError, match="another vocabulary"):
        prepare_shards(cohort, out, **{**OPTIONS, "vocabulary": GENES[::-1]})
    with caplog.at_level(logging.WARNING, logger="stalign"):
        shards = prepare_shards(cohort / "p1" / "A.h5ad", out, overwrite=True, **other)
    assert list(shards.entries) == ["A"]
    assert "cut with another geometry" in caplog.text


def test_a_folder_with_something_else_is_left_alone(cohort, tmp_path):
    with pytest.raises(FileExistsError, match=r"holds no shards, but \['p1', 'p2'\]"):
        prepare_shards(cohort, cohort, **OPTIONS)
    assert not list(cohort.glob("*.json"))


def test_a_slide_that_fails_is_named_and_the_others_are_kept(cohort, tmp_path):
    broken = anndata.read_h5ad(cohort / "p1" / "B.h5ad")
    broken.X = broken.X * 0.5
    broken.write_h5ad(cohort / "p1" / "B.h5ad")
    out = tmp_path / "shards"
    with pytest.raises(ValueError, match=r"1 of 3 sections could not be prepared.* p1_B: `X of p1_B` must hold raw"):
        prepare_shards(cohort, out, **OPTIONS)
    assert list(open_shards(out).entries) == ["A", "p2_B"]
    assert list(prepare_shards(cohort, out, skip_failed=True, **OPTIONS).entries) == ["A", "p2_B"]
    assert not list(out.glob(".*partial"))


@pytest.mark.slow
def test_processes_make_the_same_shards(cohort, tmp_path):
    one = prepare_shards(cohort, tmp_path / "one", **OPTIONS)
    two = prepare_shards(cohort, tmp_path / "two", jobs=2, **OPTIONS)
    for file in sorted(one.folder.glob("*/*.npy")):
        assert file.read_bytes() == (two.folder / file.parent.name / file.name).read_bytes()
    assert (one.folder / "manifest.json").read_text() == (two.folder / "manifest.json").read_text()


def test_arguments(cohort, tmp_path):
    out = tmp_path / "shards"
    with pytest.raises(ValueError, match="jobs must be a positive integer"):
        prepare_shards(cohort, out, jobs=0, **OPTIONS)
    with pytest.raises(ValueError, match="organism must be one of"):
        prepare_shards(cohort, out, organism="rat", **OPTIONS)
    with pytest.raises(ValueError, match=r"geometry must be one of .*'niche_px'"):
        prepare_shards(cohort, out, vocabulary=GENES, geometry={"niche_px": 3})
    with pytest.raises(ValueError, match="spot_um must be a positive number"):
        prepare_shards(cohort, out, vocabulary=GENES, geometry={"spot_um": -1})
    with pytest.raises(ValueError, match=r"patients names none of the 3 sections: \['C'\]"):
        prepare_shards(cohort, out, patients={"C": "one"}, **OPTIONS)
    with pytest.raises(ValueError, match=r"more than once: \['CD3E'\]"):
        prepare_shards(cohort, out, vocabulary=["CD3E", "CD3E"])
    assert not out.exists()


def test_a_vocabulary_in_a_file(cohort, tmp_path):
    (tmp_path / "genes.txt").write_text("EPCAM\nERBB2\n\n")
    shards = prepare_shards(
        cohort / "p1" / "A.h5ad", tmp_path / "s", vocabulary=tmp_path / "genes.txt", geometry=SIZES, progress=False
    )
    assert shards.genes == ("EPCAM", "ERBB2")


def test_a_table_of_patients(tmp_path):
    file = tmp_path / "patients.csv"
    file.write_text("patient,section\none,A\ntwo,B\n")
    assert read_patients(file) == {"A": "one", "B": "two"}
    file.write_text("patient,slide\none,A\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['section'\]. It has \['patient', 'slide'\]"):
        read_patients(file)
    with pytest.raises(FileNotFoundError, match="no table of patients"):
        read_patients(tmp_path / "none.csv")


# --- collections -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hest(hexagonal, tmp_path):
    root = tmp_path / "hest"
    for name in ("st", "metadata"):
        (root / name).mkdir(parents=True)
    for sample, patient, species in (("TENX1", "Patient 1", "Homo sapiens"), ("MISC2", None, "Mus musculus")):
        adata = hexagonal.copy()
        if species == "Mus musculus":
            adata.var_names = ["Erbb2", "Cd3e", "Col1a1", "Epcam"]
        entry = adata.uns["spatial"].pop("S1")
        picture = {"downscaled_fullres": entry["images"]["hires"]}
        factors = {"tissue_downscaled_fullres_scalef": 0.25, "spot_diameter_fullres": 110.0}
        adata.uns["spatial"]["ST"] = {"images": picture, "scalefactors": factors}
        adata.write_h5ad(root / "st" / f"{sample}.h5ad")
        metadata = {
            "st_technology": "Visium",
            "patient": patient,
            "dataset_title": "A study",
            "species": species,
            "pixel_size_um_estimated": 0.5,
            "inter_spot_dist": 100.0,
        }
        (root / "metadata" / f"{sample}.json").write_text(json.dumps(metadata))
    return root


def test_hest(hest, tmp_path):
    shards = prepare_shards(hest, tmp_path / "shards", **OPTIONS)
    assert list(shards.entries) == ["MISC2", "TENX1"]
    # A patient's number means something within a study; a study without patients is one.
    assert [entry.patient for entry in shards.entries.values()] == ["A study", "A study: Patient 1"]
    assert all(entry.has_image for entry in shards.entries.values())
    mouse, human = shards.open()
    assert mouse.counts[:, 2].sum() == human.counts[:, 2].sum() == sum(range(81))
    assert shards.select(["st/TENX1.h5ad"]) == ["TENX1"]


def test_stimage(hexagonal, tmp_path):
    folder = tmp_path / "STimage" / "Visium"
    for name in ("coord", "gene_exp", "image"):
        (folder / name).mkdir(parents=True)
    xy = hexagonal.obsm["spatial"]
    for slide in ("Human_Brain_Somebody_2020_Visium_1", "Human_Brain_Somebody_2020_Visium_2", "Human_Heart"):
        names = [f"{slide}_{i}" for i in range(len(xy))]
        coord = pd.DataFrame({"yaxis": xy[:, 1], "xaxis": xy[:, 0], "r": 65.0}, index=names)
        coord.to_csv(folder / "coord" / f"{slide}_coord.csv")
        counts = pd.DataFrame(hexagonal.X.toarray(), index=names, columns=list(hexagonal.var_names))
        counts.to_csv(folder / "gene_exp" / f"{slide}_count.csv")
        Image.fromarray(np.full((2000, 2000, 3), 200, np.uint8)).save(folder / "image" / f"{slide}.png")
    shards = prepare_shards(tmp_path / "STimage", tmp_path / "shards", **OPTIONS)
    assert [entry.patient for entry in shards.entries.values()] == ["Human_Brain_Somebody_2020"] * 2 + ["Human_Heart"]
    assert [slide.name for slide in find_slides([folder])] == list(shards.entries)
    # A picture that was deleted since is no reason to prepare the slide again without it.
    before = prepared(shards.folder)
    (folder / "image" / "Human_Heart.png").unlink()
    assert prepare_shards(tmp_path / "STimage", shards.folder, **OPTIONS).entries["Human_Heart"].has_image
    assert prepared(shards.folder) == before


# --- for a training config -------------------------------------------------------------------------------------------


def config(root, out, **data) -> PretrainConfig:
    changes = {
        "n_neighbors": 6,
        "spot_patch": {"um": 100.0, "pixels": 8},
        "niche_patch": {"um": 200.0, "pixels": 12},
    }
    return PretrainConfig.from_dict(
        {
            "out": str(out),
            "data": {"root": str(root), "train": ["p1/*.h5ad"], "validation": ["p2/B.h5ad"], **data},
            "network": {"name": "tiny", "changes": changes},
        }
    )


@pytest.fixture
def protein_coding(monkeypatch):
    """A vocabulary of which four genes are enough."""
    monkeypatch.setattr("stalign.genes.protein_coding_genes", lambda: GENES)


def test_sections_of_a_config(cohort, tmp_path, protein_coding):
    run = config(cohort, tmp_path / "model")
    folder = prepare_config(run)
    assert folder == tmp_path / "model.shards"
    shards = open_shards(folder)
    assert [shards.select([pattern]) for pattern in (*run.data.train, *run.data.validation)] == [
        ["A", "p1_B"],
        ["p2_B"],
    ]
    first = prepared(folder)
    prepare_config(run)
    assert prepared(folder) == first
    # The run's own folder follows the config.
    wider = PretrainConfig.from_dict(
        {**run.to_dict(), "network": {"changes": {**run.network.changes, "n_neighbors": 18}}}
    )
    prepare_config(wider)
    assert open_shards(folder).geometry.n_neighbors == 18
    with pytest.raises(ValueError, match="n_neighbors 18 instead of 6"):
        prepare_config(config(cohort, tmp_path / "other", shards=str(folder)))


def test_shards_are_enough_without_the_slides(cohort, tmp_path, protein_coding):
    folder = prepare_config(config(cohort, tmp_path / "model"))
    run = config(tmp_path / "nowhere", tmp_path / "model", shards=str(folder))
    assert prepare_config(run) == folder
    with pytest.raises(FileNotFoundError, match=r"matches 'p3/\*.h5ad'"):
        prepare_config(config(tmp_path / "nowhere", tmp_path / "model", shards=str(folder), train=["p3/*.h5ad"]))
    with pytest.raises(FileNotFoundError, match=r"data.train: no file matches"):
        prepare_config(config(tmp_path / "nowhere", tmp_path / "new"))
