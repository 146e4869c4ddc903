"""Every reader, from the files of the instrument or collection to an ``.h5ad`` and back: same places, scale, pixels."""

from __future__ import annotations

import logging
import re

import anndata
import numpy as np
import pytest
import tifffile

import stalign as sta


@pytest.fixture
def slide_file(tmp_path):
    """Write the full-resolution image of a section."""

    def write(section, name):
        tifffile.imwrite(tmp_path / name, section.image, tile=(128, 128), compression="zlib", photometric="rgb")
        return tmp_path / name

    return write


@pytest.fixture
def store(visium, tmp_path):
    """A SpatialData store with spots, a table and an image of two levels."""
    sd = pytest.importorskip("spatialdata")
    pd = pytest.importorskip("pandas")
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    shapes = ShapesModel.parse(visium.xy, geometry=0, radius=65.0, index=pd.RangeIndex(54))
    image = Image2DModel.parse(visium.image.transpose(2, 0, 1), dims=("c", "y", "x"), scale_factors=[2])
    obs = pd.DataFrame(
        {"region": "spots", "instance": np.arange(54), "array_row": visium.rows, "array_col": visium.cols},
        index=visium.barcodes,
    )
    obs["region"] = obs["region"].astype("category")
    table = anndata.AnnData(visium.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=list("ABCDE")))
    table = TableModel.parse(table, region="spots", region_key="region", instance_key="instance")
    path = tmp_path / "slide.zarr"
    sd.SpatialData(images={"he": image}, shapes={"spots": shapes}, tables={"table": table}).write(path)
    return path


@pytest.fixture(params=["visium", "older visium", "visium_hd", "hest", "stimage", "spatialdata"])
def reader(request, visium, bins, legacy, slide_file):
    """A call that reads a folder, the section it shows, µm between its spots, and how far pixels may be off."""
    value = request.getfixturevalue
    if request.param in ("visium", "older visium"):
        folder = value("visium_folder" if request.param == "visium" else "older_visium_folder")
        return lambda: sta.io.read_visium(folder, source_image=slide_file(visium, "he.tif")), visium, 100.0, 0
    if request.param == "visium_hd":
        folder = value("hd_folder")
        return lambda: sta.io.read_visium_hd(folder, source_image=slide_file(bins, "he.btf")), bins, 8.0, 0
    if request.param == "hest":
        folder = value("hest")
        return lambda: sta.io.read_hest(folder), visium, 100.0, 12  # a JPEG
    if request.param == "stimage":
        folder = value("collection")
        return lambda: sta.io.read_stimage1k4m(folder, "Human_Breast_ST_A1"), legacy, 200.0, 0
    folder = value("store")
    return lambda: sta.io.from_spatialdata(folder), visium, 100.0, 0


def test_round_trip(reader, tmp_path, caplog):
    read, section, pitch, tolerance = reader
    with caplog.at_level(logging.INFO, logger="stalign"):
        adata = read()
    # It says what it found: spots, image, scale and where the scale is from.
    height, width = section.image.shape[:2]
    n_spots = len(section.xy)
    said = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("Read '"))
    assert re.search(rf"{n_spots} spots on a (hexagonal|square) grid × {len(section.genes)} genes", said)
    assert f"of {width} × {height} (width × height) pixels" in said
    mpp = re.search(r"([\d.]+) µm per full-resolution pixel, from the spot pitch", said)
    assert float(mpp.group(1)) == pytest.approx(0.5, rel=1e-2)

    geometry = {"n_neighbors": 6, "spot_um": pitch / 2, "niche_um": 3 * pitch}
    file = tmp_path / "slide.h5ad"
    adata.write_h5ad(file)
    back = anndata.read_h5ad(file)
    for slide in (adata, back):
        sta.pp.extract_niches(slide, **geometry)
        entry = next(iter(slide.uns["stalign"]["niche"]["libraries"].values()))
        assert entry["mpp"] == pytest.approx(0.5, rel=1e-2)
        assert (entry["mpp_source"], entry["pitch_um"], entry["image"]) == ("pitch", pitch, "path")
        centre = sta.pp.get_patches(slide, size=16)[:, 8, 8].astype(int)
        np.testing.assert_allclose(centre, section.colours, atol=tolerance)
    np.testing.assert_array_equal(back.obsm["spatial"], adata.obsm["spatial"])
    np.testing.assert_allclose(back.obsm["spatial"], section.xy, atol=0.5 if tolerance else 1e-6)
    np.testing.assert_array_equal(back.X.toarray(), section.counts.toarray())
    assert list(back.obs_names) == list(adata.obs_names)
    assert list(back.var_names) == list(adata.var_names)
    assert (back.obsp["niche_connectivities"] != adata.obsp["niche_connectivities"]).nnz == 0
