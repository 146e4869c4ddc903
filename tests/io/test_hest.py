from __future__ import annotations

import json
import logging

import anndata
import numpy as np
import pytest

import stalign as sta
from stalign.slide import ScaleWarning

GEOMETRY = {"n_neighbors": 6, "spot_um": 50.0, "niche_um": 200.0}


def change(folder, **values):
    file = folder / "metadata" / "TENX95.json"
    content = json.loads(file.read_text())
    content.update(values)
    file.write_text(json.dumps(content))


def test_layout_of_the_result(hest, visium):
    before = {file: file.stat().st_mtime_ns for file in hest.rglob("*")}
    adata = sta.io.read_hest(hest, "TENX95")
    assert {file: file.stat().st_mtime_ns for file in hest.rglob("*")} == before
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), visium.counts.toarray())
    np.testing.assert_allclose(adata.obsm["spatial"], np.rint(visium.xy))
    assert adata.var_names.is_unique
    assert list(adata.uns["spatial"]) == ["TENX95"]
    entry = adata.uns["spatial"]["TENX95"]
    assert list(entry["images"]) == ["downscaled_fullres"]
    assert entry["metadata"]["source_image_path"] == str(hest / "wsis" / "TENX95.tif")
    assert entry["metadata"]["organ"] == "Breast"
    assert not {"patient", "treatment_comment"} & set(entry["metadata"])
    assert entry["scalefactors"]["microns_per_pixel"] == 0.5


def test_scale_and_patches(hest, visium, recwarn):
    adata = sta.io.read_hest(hest)
    sta.pp.extract_niches(adata, **GEOMETRY)
    entry = adata.uns["stalign"]["niche"]["libraries"]["TENX95"]
    assert entry["mpp_candidates"] == pytest.approx(
        {"pitch": 0.5, "microns_per_pixel": 0.5, "image": 0.5, "spot_diameter": 0.5}, rel=1e-2
    )
    assert entry["image"] == "path"
    assert not [warning for warning in recwarn if warning.category is ScaleWarning]
    patches = sta.pp.get_patches(adata, size=16)
    np.testing.assert_allclose(patches[:, 8, 8].astype(int), visium.colours, atol=12)  # JPEG


def test_says_what_it_found(hest, visium, caplog):
    with caplog.at_level(logging.INFO, logger="stalign"):
        sta.io.read_hest(hest)
    height, width = visium.image.shape[:2]
    assert f"image 'TENX95.tif' of {width} × {height}" in caplog.text
    assert "from the spot pitch" in caplog.text


def test_pixel_sizes_that_disagree(hest):
    change(hest, pixel_size_um_embedded=0.25)
    with pytest.warns(ScaleWarning, match=r"estimated 0\.5 .*the image says 0\.25"):
        adata = sta.io.read_hest(hest)
    assert adata.uns["spatial"]["TENX95"]["scalefactors"]["microns_per_pixel"] == 0.5


@pytest.mark.parametrize("estimated", [None, "", float("nan"), 0, -1])
def test_only_the_embedded_pixel_size(hest, estimated):
    change(hest, pixel_size_um_estimated=estimated, pixel_size_um_embedded=0.5)
    adata = sta.io.read_hest(hest)
    assert adata.uns["spatial"]["TENX95"]["scalefactors"]["microns_per_pixel"] == 0.5


def test_pitch_of_the_metadata(hest):
    """An array of another pitch than Visium's: the metadata says so."""
    change(hest, inter_spot_dist=150.0, pixel_size_um_estimated=0.75, pixel_size_um_embedded=None)
    (hest / "wsis" / "TENX95.tif").unlink()
    adata = sta.io.read_hest(hest)
    sta.pp.extract_niches(adata, **GEOMETRY)
    entry = adata.uns["stalign"]["niche"]["libraries"]["TENX95"]
    assert entry["mpp"] == pytest.approx(0.75, rel=1e-2)
    assert entry["pitch_um"] == 150.0


def test_without_the_slide(hest, caplog):
    (hest / "wsis" / "TENX95.tif").unlink()
    with caplog.at_level(logging.WARNING, logger="stalign"):
        adata = sta.io.read_hest(hest)
    assert "TENX95.tif" in caplog.text
    sta.pp.extract_niches(adata, **GEOMETRY)
    assert adata.uns["stalign"]["niche"]["libraries"]["TENX95"]["image_key"] == "downscaled_fullres"


def test_without_metadata(hest, recwarn):
    (hest / "metadata" / "TENX95.json").unlink()
    adata = sta.io.read_hest(hest)
    sta.pp.extract_niches(adata, **GEOMETRY)
    entry = adata.uns["stalign"]["niche"]["libraries"]["TENX95"]
    assert entry["mpp_candidates"]["spot_diameter"] == pytest.approx(0.5)
    assert not [warning for warning in recwarn if warning.category is ScaleWarning]


def test_slide_somewhere_else(hest, tmp_path):
    moved = (hest / "wsis" / "TENX95.tif").rename(tmp_path / "moved.tif")
    adata = sta.io.read_hest(hest, source_image=moved, library_id="A")
    assert adata.uns["spatial"]["A"]["metadata"]["source_image_path"] == str(moved)


def test_survives_writing(hest, tmp_path):
    adata = sta.io.read_hest(hest)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert anndata.read_h5ad(tmp_path / "a.h5ad").uns["spatial"]["TENX95"]["metadata"]["technology"] == "Visium"


def test_unknown_sample(hest):
    with pytest.raises(FileNotFoundError, match=r"'TENX96' is not in .*\['TENX95'\]\. Did you mean 'TENX95'"):
        sta.io.read_hest(hest, "TENX96")


def test_several_samples(hest):
    (hest / "st" / "MISC1.h5ad").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 samples: \['MISC1', 'TENX95'\]"):
        sta.io.read_hest(hest)
    with pytest.raises(ValueError, match=r"MISC1\.h5ad' cannot be read as an AnnData file"):
        sta.io.read_hest(hest, "MISC1")


def test_another_folder(hest):
    with pytest.raises(FileNotFoundError, match=r"looked for 'st/<id>\.h5ad'.*It holds \['TENX95.tif'\]"):
        sta.io.read_hest(hest / "wsis")


def test_truncated_files(hest):
    for file in ("st/TENX95.h5ad", "wsis/TENX95.tif"):
        content = (hest / file).read_bytes()
        (hest / file).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"TENX95.*omplete"):
            sta.io.read_hest(hest)
        (hest / file).write_bytes(content)
