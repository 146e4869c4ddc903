from __future__ import annotations

import gzip
import json
import logging
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile

import stalign as sta

GEOMETRY = {"n_neighbors": 6, "spot_um": 50.0, "niche_um": 200.0}


def fingerprint(folder):
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")}


def test_layout_of_the_result(visium_folder, visium):
    before = fingerprint(visium_folder)
    adata = sta.io.read_visium(visium_folder)
    assert fingerprint(visium_folder) == before
    assert adata.shape == (54, 5)
    assert list(adata.obs_names) == visium.barcodes
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), visium.counts.toarray())
    # x is the column, y the row; the section is wider than high.
    np.testing.assert_allclose(adata.obsm["spatial"], visium.xy)
    assert np.ptp(adata.obsm["spatial"][:, 0]) > 1.5 * np.ptp(adata.obsm["spatial"][:, 1])
    np.testing.assert_allclose(adata.obs["pxl_col_in_fullres"], visium.xy[:, 0])
    assert list(adata.obs["array_row"]) == list(visium.rows)
    assert list(adata.obs["array_col"]) == list(visium.cols)
    assert list(adata.uns["spatial"]) == ["V1_Section"]
    entry = adata.uns["spatial"]["V1_Section"]
    assert entry["metadata"]["chemistry_description"] == "Spatial 3' v1"
    height, width = visium.image.shape[:2]
    assert entry["images"]["hires"].shape == (height // 4, width // 4, 3)


def test_same_as_squidpy(visium_folder):
    import squidpy as sq

    ours, theirs = sta.io.read_visium(visium_folder), sq.read.visium(visium_folder)
    np.testing.assert_allclose(ours.obsm["spatial"], theirs.obsm["spatial"])
    assert (ours.X != theirs.X).nnz == 0
    assert ours.var["gene_ids"].tolist() == theirs.var["gene_ids"].tolist()
    entry, other = ours.uns["spatial"]["V1_Section"], theirs.uns["spatial"]["V1_Section"]
    assert entry["scalefactors"] == other["scalefactors"]
    for key in ("hires", "lowres"):
        np.testing.assert_array_equal(entry["images"][key], other["images"][key])
    for column in ("in_tissue", "array_row", "array_col"):
        assert ours.obs[column].tolist() == theirs.obs[column].tolist()


def test_positions_without_a_header(older_visium_folder, visium):
    adata = sta.io.read_visium(older_visium_folder)
    np.testing.assert_allclose(adata.obsm["spatial"], visium.xy)


def test_repeated_gene_names_are_numbered(visium_folder, caplog):
    with caplog.at_level(logging.INFO, logger="stalign"):
        adata = sta.io.read_visium(visium_folder)
    assert list(adata.var_names) == ["ERBB2", "CD3E", "TBCE", "TBCE-1", "EPCAM"]
    assert "TBCE" in caplog.text


def test_says_what_it_found(visium_folder, visium, caplog):
    with caplog.at_level(logging.INFO, logger="stalign"):
        sta.io.read_visium(visium_folder)
    height, width = visium.image.shape[:2]
    assert "54 spots on a hexagonal grid × 5 genes" in caplog.text
    assert f"{width // 4} × {height // 4} (width × height)" in caplog.text
    assert "0.5 µm per full-resolution pixel, from the spot pitch" in caplog.text


def test_scale_and_patches_from_the_small_image(visium_folder, visium):
    adata = sta.io.read_visium(visium_folder)
    sta.pp.extract_niches(adata, **GEOMETRY)
    entry = adata.uns["stalign"]["niche"]["libraries"]["V1_Section"]
    assert entry["mpp"] == pytest.approx(0.5)
    assert entry["mpp_source"] == "pitch"
    assert entry["image_key"] == "hires"
    patches = sta.pp.get_patches(adata, size=16)
    np.testing.assert_allclose(patches[:, 8, 8], visium.colours, atol=2)


def test_full_resolution_image_is_referenced(visium_folder, visium, tmp_path):
    source = tmp_path / "tissue.tif"
    tifffile.imwrite(source, visium.image, tile=(256, 256), compression="zlib", photometric="rgb")
    adata = sta.io.read_visium(visium_folder, source_image=source, library_id="A1")
    assert adata.uns["spatial"]["A1"]["metadata"]["source_image_path"] == str(source)
    sta.pp.extract_niches(adata, **GEOMETRY)
    entry = adata.uns["stalign"]["niche"]["libraries"]["A1"]
    assert (entry["image"], entry["image_scale"]) == ("path", 1.0)
    np.testing.assert_array_equal(sta.pp.get_patches(adata, size=16)[:, 8, 8], visium.colours)


def test_a_wrong_image_is_noticed(visium_folder, visium, tmp_path, caplog):
    source = tmp_path / "other.tif"
    tifffile.imwrite(source, visium.image[:200], photometric="rgb")
    with caplog.at_level(logging.WARNING, logger="stalign"):
        sta.io.read_visium(visium_folder, source_image=source)
    assert "imply" in caplog.text
    assert "lie outside the image" in caplog.text


def test_survives_writing(visium_folder, tmp_path):
    adata = sta.io.read_visium(visium_folder)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = anndata.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_allclose(back.obsm["spatial"], adata.obsm["spatial"])


def test_one_small_image_is_enough(visium_folder):
    (visium_folder / "spatial" / "tissue_hires_image.png").unlink()
    adata = sta.io.read_visium(visium_folder)
    assert list(adata.uns["spatial"]["V1_Section"]["images"]) == ["lowres"]


def test_no_image_is_no_error(visium_folder, caplog):
    for key in ("hires", "lowres"):
        (visium_folder / "spatial" / f"tissue_{key}_image.png").unlink()
    with caplog.at_level(logging.INFO, logger="stalign"):
        adata = sta.io.read_visium(visium_folder)
    assert "no image" in caplog.text
    assert adata.n_obs == 54


def test_matrix_as_text(visium_folder, visium):
    from scipy.io import mmwrite

    (visium_folder / "filtered_feature_bc_matrix.h5").unlink()
    folder = visium_folder / "filtered_feature_bc_matrix"
    folder.mkdir()
    features = pd.DataFrame({"id": range(5), "name": visium.genes, "type": "Gene Expression"})
    features.to_csv(folder / "features.tsv.gz", sep="\t", header=False, index=False)
    pd.Series(visium.barcodes).to_csv(folder / "barcodes.tsv.gz", header=False, index=False)
    with gzip.open(folder / "matrix.mtx.gz", "wb") as handle:
        mmwrite(handle, visium.counts.T.astype(int))
    adata = sta.io.read_visium(visium_folder)
    np.testing.assert_array_equal(adata.X.toarray(), visium.counts.toarray())
    assert list(adata.uns["spatial"]) == ["sample"]
    assert adata.var_names.is_unique


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        ("filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix.h5"),
        ("spatial/scalefactors_json.json", "spatial/scalefactors_json.json"),
        ("spatial/tissue_positions.csv", "spatial/tissue_positions_list.csv"),
    ],
)
def test_missing_files(visium_folder, remove, named):
    (visium_folder / remove).rename(visium_folder / "moved.txt")
    with pytest.raises(FileNotFoundError, match=r"moved\.txt") as raised:
        sta.io.read_visium(visium_folder)
    assert named in str(raised.value)
    assert "Looked for" in str(raised.value)


def test_the_folder_above(visium_folder):
    with pytest.raises(FileNotFoundError, match=r"Pass '.*outs'"):
        sta.io.read_visium(visium_folder.parent)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        sta.io.read_visium(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        sta.io.read_visium(tmp_path / "file")


def test_missing_source_image(visium_folder, tmp_path):
    (tmp_path / "tissue.tif").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'tissue\.tif'"):
        sta.io.read_visium(visium_folder, source_image=tmp_path / "tisue.tif")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_matrix(visium_folder, share):
    file = visium_folder / "filtered_feature_bc_matrix.h5"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="Is the file complete"):
        sta.io.read_visium(visium_folder)


def test_another_kind_of_h5(visium_folder):
    import h5py

    with h5py.File(visium_folder / "molecule_info.h5", "w") as handle:
        handle["count"] = np.arange(3)
    with pytest.raises(ValueError, match=r"no group 'matrix'.*'count'"):
        sta.io.read_visium(visium_folder, counts_file="molecule_info.h5")
    file = visium_folder / "filtered_feature_bc_matrix.h5"
    with h5py.File(file, "a") as handle:
        del handle["matrix"]["indptr"]
    with pytest.raises(ValueError, match="lacks \\['indptr'\\]"):
        sta.io.read_visium(visium_folder)


def test_broken_json(visium_folder):
    file = visium_folder / "spatial" / "scalefactors_json.json"
    file.write_text(file.read_text()[:-5])
    with pytest.raises(ValueError, match=r"scalefactors_json\.json' cannot be read as JSON"):
        sta.io.read_visium(visium_folder)


def test_truncated_picture(visium_folder):
    file = visium_folder / "spatial" / "tissue_hires_image.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"tissue_hires_image\.png' cannot be read as an image"):
        sta.io.read_visium(visium_folder)


def test_positions_of_another_slide(visium_folder):
    file = visium_folder / "spatial" / "tissue_positions.csv"
    table = pd.read_csv(file)
    table["barcode"] = "X" + table["barcode"]
    table.to_csv(file, index=False)
    with pytest.raises(ValueError, match="54 of 54 spots of the count matrix have no position"):
        sta.io.read_visium(visium_folder)


def test_positions_cut_off(visium_folder):
    file = visium_folder / "spatial" / "tissue_positions.csv"
    file.write_text(file.read_text().rsplit(",", 3)[0])
    with pytest.raises(ValueError, match="empty cells"):
        sta.io.read_visium(visium_folder)
    file.write_text("barcode,in_tissue\nA,1\n")
    with pytest.raises(ValueError, match="has 2 columns"):
        sta.io.read_visium(visium_folder)


# --- Visium HD ---------------------------------------------------------------------------------------------------


def test_hd_layout(hd_folder, bins):
    adata = sta.io.read_visium_hd(hd_folder)
    assert adata.shape == (200, 3)
    np.testing.assert_allclose(adata.obsm["spatial"], bins.xy)
    np.testing.assert_array_equal(adata.X.toarray(), bins.counts.toarray())
    assert list(adata.obs["array_row"]) == list(bins.rows)
    assert list(adata.obs["array_col"]) == list(bins.cols)
    assert list(adata.uns["spatial"]) == ["colon"]
    factors = adata.uns["spatial"]["colon"]["scalefactors"]
    assert (factors["microns_per_pixel"], factors["bin_size_um"]) == (0.5, 8.0)


def test_hd_scale_and_patches(hd_folder, bins, tmp_path):
    source = tmp_path / "tissue.btf"
    tifffile.imwrite(source, bins.image, tile=(128, 128), bigtiff=True, photometric="rgb", compression="zlib")
    adata = sta.io.read_visium_hd(hd_folder / "binned_outputs", bin_size=8, source_image=source)
    sta.pp.extract_niches(adata, n_neighbors=8, spot_um=4.0, niche_um=24.0)
    entry = adata.uns["stalign"]["niche"]["libraries"]["colon"]
    assert entry["mpp"] == pytest.approx(0.5)
    assert entry["mpp_candidates"] == pytest.approx(
        {"pitch": 0.5, "microns_per_pixel": 0.5, "spot_diameter": 0.5}, rel=1e-6
    )
    assert (entry["grid"], entry["pitch_um"]) == ("square", 8.0)
    np.testing.assert_array_equal(sta.pp.get_patches(adata, size=8)[:, 4, 4], bins.colours)


def test_hd_turned_and_mirrored_array(hd_folder, bins):
    """Bins are numbered from whichever corner; that is no sign of swapped coordinates."""
    file = hd_folder / "binned_outputs" / "square_008um" / "spatial" / "tissue_positions.parquet"
    table = pd.read_parquet(file)
    table = table.rename(columns={"array_row": "array_col", "array_col": "array_row"})
    table.to_parquet(file, index=False)
    adata = sta.io.read_visium_hd(hd_folder)
    sta.pp.extract_niches(adata, n_neighbors=8, spot_um=4.0, niche_um=24.0)
    assert adata.uns["stalign"]["niche"]["libraries"]["colon"]["mpp"] == pytest.approx(0.5)


def test_hd_without_its_scale_factors(hd_folder):
    """The bin size is in the folder's name, and with the pitch it gives the scale."""
    file = hd_folder / "binned_outputs" / "square_008um" / "spatial" / "scalefactors_json.json"
    factors = json.loads(file.read_text())
    del factors["bin_size_um"], factors["microns_per_pixel"]
    file.write_text(json.dumps(factors))
    adata = sta.io.read_visium_hd(hd_folder)
    sta.pp.extract_niches(adata, n_neighbors=8, spot_um=4.0, niche_um=24.0)
    assert adata.uns["stalign"]["niche"]["libraries"]["colon"]["mpp_source"] == "pitch"


def test_hd_bin_size_that_is_not_there(hd_folder):
    with pytest.raises(ValueError, match=r"No bins of 4 µm.*\[8, 16\]"):
        sta.io.read_visium_hd(hd_folder, bin_size=4)
    with pytest.raises(ValueError, match="bin_size must be a positive integer"):
        sta.io.read_visium_hd(hd_folder, bin_size=0)


def test_hd_incomplete_folder(hd_folder):
    with pytest.raises(FileNotFoundError, match=r"filtered_feature_bc_matrix\.h5"):
        sta.io.read_visium_hd(hd_folder, bin_size=16)


def test_hd_truncated_parquet(hd_folder):
    file = hd_folder / "binned_outputs" / "square_008um" / "spatial" / "tissue_positions.parquet"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"tissue_positions\.parquet' cannot be read"):
        sta.io.read_visium_hd(hd_folder)


def test_the_two_are_told_apart(hd_folder, visium_folder):
    with pytest.raises(FileNotFoundError, match="read_visium_hd"):
        sta.io.read_visium(hd_folder)
    with pytest.raises(FileNotFoundError, match=r"io\.read_visium`"):
        sta.io.read_visium_hd(visium_folder)
    shutil.rmtree(visium_folder / "spatial")
    with pytest.raises(FileNotFoundError, match="is not a Visium HD output"):
        sta.io.read_visium_hd(visium_folder)
