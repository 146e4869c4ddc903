from __future__ import annotations

import json
import logging

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

import stalign as sta

sd = pytest.importorskip("spatialdata")
from spatialdata.models import Image2DModel, PointsModel, ShapesModel, TableModel  # noqa: E402
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation, set_transformation  # noqa: E402

GEOMETRY = {"n_neighbors": 6, "spot_um": 50.0, "niche_um": 200.0}

# The circles are in µm with an offset; "global" has 0.25 µm pixels and is turned by 90°: (x, y) -> (-y, x).
TURN = np.array([[0.0, -1.0, 5000.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
TO_GLOBAL = TURN @ np.diag([4.0, 4.0, 1.0]) @ np.array([[1.0, 0, -70.0], [0, 1.0, -30.0], [0, 0, 1.0]])
# Image pixels are 0.5 µm, not turned: global = TURN @ (2 * pixels).
IMAGE_TO_GLOBAL = TURN @ np.diag([2.0, 2.0, 1.0])


def affine(matrix):
    return Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))


@pytest.fixture
def sdata(visium):
    microns = visium.xy * 0.5 + [70.0, 30.0]
    shapes = ShapesModel.parse(microns, geometry=0, radius=32.5, index=pd.Index(np.arange(100, 154)))
    set_transformation(shapes, affine(TO_GLOBAL), "global")
    image = Image2DModel.parse(
        visium.image.transpose(2, 0, 1), dims=("c", "y", "x"), c_coords=["r", "g", "b"], scale_factors=[2]
    )
    set_transformation(image, affine(IMAGE_TO_GLOBAL), "global")
    small = Image2DModel.parse(visium.image[2::4, 2::4].transpose(2, 0, 1), dims=("c", "y", "x"))
    set_transformation(small, Sequence([Scale([4.0, 4.0], axes=("x", "y")), affine(IMAGE_TO_GLOBAL)]), "global")
    mask = Image2DModel.parse(visium.image[..., :1].transpose(2, 0, 1), dims=("c", "y", "x"))
    obs = pd.DataFrame(
        {"region": "spots", "instance": np.arange(100, 154), "array_row": visium.rows, "array_col": visium.cols},
        index=visium.barcodes,
    )
    obs["region"] = obs["region"].astype("category")
    table = anndata.AnnData(visium.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=list("ABCDE")))
    # The table's rows stand in another order than the shapes.
    table = table[::-1].copy()
    table.obsm["spatial"] = np.zeros((54, 2))
    table = TableModel.parse(table, region="spots", region_key="region", instance_key="instance")
    images = {"small": small, "he": image, "mask": mask}
    return sd.SpatialData(images=images, shapes={"spots": shapes}, tables={"table": table})


def test_spots_in_pixels_of_the_finest_image(sdata, visium, caplog):
    with caplog.at_level(logging.INFO, logger="stalign"):
        adata = sta.io.from_spatialdata(sdata)
    assert "'he' has the finest pixels" in caplog.text
    np.testing.assert_allclose(adata.obsm["spatial"], visium.xy[::-1], atol=1e-6)
    np.testing.assert_array_equal(adata.X.toarray(), visium.counts.toarray()[::-1])
    entry = adata.uns["spatial"]["spots"]
    np.testing.assert_array_equal(entry["images"]["hires"], visium.image)
    assert entry["scalefactors"] == pytest.approx({"spot_diameter_fullres": 130.0, "tissue_hires_scalef": 1.0})
    assert entry["metadata"] == {"coordinate_system": "global", "image": "he"}


def test_the_object_stays_as_it_was(sdata):
    before = sdata.tables["table"].copy()
    adata = sta.io.from_spatialdata(sdata)
    adata.X[0, 0] = 99
    adata.obs["instance"] = 0
    table = sdata.tables["table"]
    assert (table.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(table.obs, before.obs)
    assert "spatial" not in table.uns
    assert not table.obsm["spatial"].any()


def test_scale_and_patches(sdata, visium):
    adata = sta.io.from_spatialdata(sdata, library_id="A1")
    sta.pp.extract_niches(adata, **GEOMETRY)
    entry = adata.uns["stalign"]["niche"]["libraries"]["A1"]
    assert entry["mpp_candidates"] == pytest.approx({"pitch": 0.5, "spot_diameter": 0.5})
    np.testing.assert_array_equal(sta.pp.get_patches(adata, size=16)[:, 8, 8], visium.colours[::-1])


def test_a_chosen_image(sdata, visium):
    adata = sta.io.from_spatialdata(sdata, image_key="small")
    np.testing.assert_allclose(adata.obsm["spatial"], visium.xy[::-1] / 4, atol=1e-6)
    sta.pp.extract_niches(adata, **GEOMETRY)
    assert adata.uns["stalign"]["niche"]["libraries"]["spots"]["mpp"] == pytest.approx(2.0)
    np.testing.assert_allclose(sta.pp.get_patches(adata, size=8)[:, 4, 4], visium.colours[::-1], atol=2)


def test_an_image_in_a_store_is_referenced(sdata, visium, tmp_path):
    sdata.write(tmp_path / "slide.zarr")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "slide.zarr").rglob("*")}
    adata = sta.io.from_spatialdata(tmp_path / "slide.zarr")
    entry = adata.uns["spatial"]["spots"]
    assert entry["images"] == {}
    assert entry["metadata"]["source_image_path"] == str(tmp_path / "slide.zarr" / "images" / "he")
    sta.pp.extract_niches(adata, **GEOMETRY)
    assert adata.uns["stalign"]["niche"]["libraries"]["spots"]["image"] == "path"
    np.testing.assert_array_equal(sta.pp.get_patches(adata, size=16)[:, 8, 8], visium.colours[::-1])
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "slide.zarr").rglob("*")} == before
    adata.write_h5ad(tmp_path / "a.h5ad")


def test_microns(sdata):
    set_transformation(sdata.images["he"], Scale([0.5, 0.5], axes=("x", "y")), "microns")
    adata = sta.io.from_spatialdata(sdata, microns="microns")
    assert adata.uns["spatial"]["spots"]["scalefactors"]["microns_per_pixel"] == pytest.approx(0.5)
    with pytest.raises(KeyError, match=r"'micron' not found in `the coordinate systems of image 'he'`.*Did you mean"):
        sta.io.from_spatialdata(sdata, microns="micron")


def test_another_coordinate_system(sdata, visium):
    shift = Translation([10.0, -4.0], axes=("x", "y"))
    set_transformation(sdata.shapes["spots"], Scale([2.0, 2.0], axes=("x", "y")), "aligned")
    set_transformation(sdata.images["he"], shift, "aligned")
    adata = sta.io.from_spatialdata(sdata, coordinate_system="aligned", image_key="he")
    expected = 2 * (visium.xy[::-1] * 0.5 + [70.0, 30.0]) - [10.0, -4.0]
    np.testing.assert_allclose(adata.obsm["spatial"], expected, atol=1e-6)
    with pytest.raises(KeyError, match="shares not the coordinate system 'algned'"):
        sta.io.from_spatialdata(sdata, coordinate_system="algned")


def test_several_elements_become_libraries(sdata, visium):
    own = {"transformations": {"second": Identity()}}
    points = PointsModel.parse(visium.xy, **own)
    second = Image2DModel.parse(255 - visium.image.transpose(2, 0, 1), dims=("c", "y", "x"), **own)
    table = sdata.tables["table"].copy()
    other = table.copy()
    other.obs_names = "b" + other.obs_names
    other.obs["region"] = pd.Categorical(["dots"] * 54)
    other.obs["instance"] = other.obs["instance"] - 100
    both = anndata.concat([table, other])
    both.obs["region"] = both.obs["region"].astype("category")
    both = TableModel.parse(both, region=["spots", "dots"], region_key="region", instance_key="instance")
    images = {"he": sdata.images["he"], "second": second}
    joined = sd.SpatialData(
        images=images, shapes={"spots": sdata.shapes["spots"]}, points={"dots": points}, tables={"table": both}
    )
    adata = sta.io.from_spatialdata(joined)
    assert list(adata.uns["spatial"]) == ["spots", "dots"]
    np.testing.assert_allclose(adata.obsm["spatial"], np.concatenate([visium.xy[::-1]] * 2), atol=1e-6)
    sta.pp.extract_niches(adata, library_key="region", **GEOMETRY)
    patches = sta.pp.get_patches(adata, size=16)[:, 8, 8]
    np.testing.assert_array_equal(patches, np.concatenate([visium.colours[::-1], 255 - visium.colours[::-1]]))
    with pytest.raises(ValueError, match="One `library_id` for 2"):
        sta.io.from_spatialdata(joined, library_id="A")
    with pytest.raises(KeyError, match="the annotated elements"):
        sta.io.from_spatialdata(joined, image_key={"spot": "he"})


def test_visium_hd_bins_by_name(sdata, bins):
    squares = ShapesModel.parse(bins.xy, geometry=0, radius=8.0)
    image = Image2DModel.parse(bins.image.transpose(2, 0, 1), dims=("c", "y", "x"))
    obs = pd.DataFrame({"region": "colon_square_008um", "instance": np.arange(200)}, index=bins.barcodes)
    obs["array_row"], obs["array_col"] = bins.rows, bins.cols
    table = anndata.AnnData(bins.counts.astype(np.float32), obs=obs)
    table = TableModel.parse(table, region="colon_square_008um", region_key="region", instance_key="instance")
    hd = sd.SpatialData(images={"he": image}, shapes={"colon_square_008um": squares}, tables={"square_008um": table})
    adata = sta.io.from_spatialdata(hd)
    sta.pp.extract_niches(adata, n_neighbors=8, spot_um=4.0, niche_um=24.0)
    entry = adata.uns["stalign"]["niche"]["libraries"]["colon_square_008um"]
    assert (entry["mpp"], entry["mpp_source"]) == (pytest.approx(0.5), "pitch")


def test_no_image(sdata, caplog):
    for key in list(sdata.images):
        del sdata.images[key]
    with caplog.at_level(logging.WARNING, logger="stalign"):
        adata = sta.io.from_spatialdata(sdata)
    assert "No image shares a coordinate system with 'spots'" in caplog.text
    sta.pp.extract_niches(adata, **GEOMETRY)
    assert adata.uns["stalign"]["niche"]["libraries"]["spots"]["pitch_um"] == 100.0


def test_instances_that_are_missing(sdata):
    sdata.tables["table"].obs["instance"] = np.arange(54)
    with pytest.raises(ValueError, match="54 of 54 rows of the table name instances that element 'spots' does not"):
        sta.io.from_spatialdata(sdata)


def test_choices_and_refusals(sdata, tmp_path, visium):
    with pytest.raises(KeyError, match=r"'tabel' not found in `sdata\.tables`.*Did you mean 'table'"):
        sta.io.from_spatialdata(sdata, table_key="tabel")
    with pytest.raises(KeyError, match=r"'hires' not found in `sdata\.images`"):
        sta.io.from_spatialdata(sdata, image_key="hires")
    with pytest.raises(ValueError, match="taken into memory"):
        sta.io.from_spatialdata(sdata, max_pixels=1000)
    with pytest.raises(TypeError, match="Expected a SpatialData object"):
        sta.io.from_spatialdata(sdata.tables["table"])
    with pytest.raises(FileNotFoundError, match="no SpatialData store"):
        sta.io.from_spatialdata(tmp_path / "nothing.zarr")
    sdata.tables["second"] = anndata.AnnData(visium.counts)
    with pytest.raises(ValueError, match=r"2 tables: \['table', 'second'\]"):
        sta.io.from_spatialdata(sdata)
    with pytest.raises(ValueError, match="annotates no element"):
        sta.io.from_spatialdata(sdata, table_key="second")


@pytest.mark.parametrize("kind", ["visium", "visium_hd"])
def test_agrees_with_our_reader_on_what_spatialdata_io_reads(kind, visium_folder, hd_folder, visium, bins):
    """The same Space Ranger folder by both ways: the same places on the image."""
    readers = pytest.importorskip("spatialdata_io")
    if kind == "visium":
        ours = sta.io.read_visium(visium_folder)
        sdata = readers.visium(visium_folder, dataset_id="A1")
    else:
        ours = sta.io.read_visium_hd(hd_folder)
        (hd_folder / "binned_outputs" / "square_016um").rmdir()
        # spatialdata-io also looks into this file; only the version of its format matters here.
        with h5py.File(hd_folder / "feature_slice.h5", "w") as handle:
            handle.attrs["metadata_json"] = json.dumps({"hd_layout_json": json.dumps({"file_format": "1.0"})})
        sdata = readers.visium_hd(hd_folder, dataset_id="A1", bin_size=8, load_all_images=False)
    theirs = sta.io.from_spatialdata(sdata)
    theirs = theirs[ours.obs_names].copy()
    np.testing.assert_array_equal(theirs.X.toarray(), ours.X.toarray())
    # The finest image of the folder is the hires picture.
    np.testing.assert_allclose(theirs.obsm["spatial"], ours.obsm["spatial"] / 4, atol=1e-6)
    patches = []
    for adata in (ours, theirs):
        sta.pp.extract_niches(adata, n_neighbors=6, spot_um=25.0, niche_um=50.0)
        patches.append(sta.pp.get_patches(adata, size=8))
    np.testing.assert_array_equal(*patches)
