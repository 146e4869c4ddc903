from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

import stalign as sta
from stalign.io import _stimage
from stalign.slide import ScaleWarning


def scale_of(adata, library, **geometry):
    sta.pp.extract_niches(adata, **{"n_neighbors": 6, "spot_um": 50.0, "niche_um": 200.0, **geometry})
    return adata.uns["stalign"]["niche"]["libraries"][library]


def test_legacy_st(collection, legacy, recwarn):
    adata = sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1")
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), legacy.counts.toarray())
    np.testing.assert_allclose(adata.obsm["spatial"], legacy.xy)
    assert list(adata.var_names) == legacy.genes
    assert list(adata.obs["array_col"]) == list(legacy.cols)
    assert list(adata.obs["array_row"]) == list(legacy.rows)
    entry = scale_of(adata, "Human_Breast_ST_A1", spot_um=100.0, niche_um=400.0)
    assert entry["mpp_candidates"] == pytest.approx({"pitch": 0.5, "spot_diameter": 0.5})
    assert (entry["mpp_source"], entry["pitch_um"], entry["image"]) == ("pitch", 200.0, "path")
    np.testing.assert_array_equal(sta.pp.get_patches(adata, size=16)[:, 8, 8], legacy.colours)
    assert not [warning for warning in recwarn if warning.category is ScaleWarning]


def test_what_the_collection_says_about_a_slide(collection, legacy):
    assert set(metadata_of(sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1"))) == {
        "technology",
        "source_image_path",
    }
    (collection / "meta").mkdir()
    table = pd.DataFrame(
        {
            "slide": ["Human_Brain_V1", "Human_Breast_ST_A1"],
            "species": ["human", "human"],
            "tissue": ["brain", "breast"],
            "tech": ["Visium", "ST"],
            "pmid": [1, 34650042],
            "title": [None, None],
        }
    )
    table.to_csv(collection / "meta" / "meta_all_gene02122025.csv", index=False)
    for path in (collection, collection / "ST"):
        metadata = metadata_of(sta.io.read_stimage1k4m(path, "Human_Breast_ST_A1"))
        assert (metadata["species"], metadata["tissue"], metadata["pmid"]) == ("human", "breast", 34650042)
        assert metadata["technology"] == "Spatial Transcriptomics"
        assert "title" not in metadata  # empty


def metadata_of(adata):
    return adata.uns["spatial"]["Human_Breast_ST_A1"]["metadata"]


def test_visium_pitch_without_array_positions(collection, visium):
    adata = sta.io.read_stimage1k4m(collection / "Visium", "Human_Brain_V1")
    assert "array_row" not in adata.obs
    assert adata.var_names.is_unique  # TBCE stands twice
    entry = scale_of(adata, "Human_Brain_V1")
    assert entry["mpp_candidates"] == pytest.approx({"pitch": 0.5, "spot_diameter": 0.5})
    np.testing.assert_array_equal(sta.pp.get_patches(adata, size=16)[:, 8, 8], visium.colours)


def test_the_radius_is_the_last_resort(collection, visium):
    """Every other spot is gone: no grid is recognised, and only the radius tells the scale."""
    for file in (collection / "Visium").rglob("*.csv"):
        table = pd.read_csv(file, index_col=0)
        keep = np.random.default_rng(1).random(54) < 0.45
        table.loc[[f"Human_Brain_V1_{b}" for b, k in zip(visium.barcodes, keep, strict=True) if k]].to_csv(file)
    entry = scale_of(sta.io.read_stimage1k4m(collection, "Human_Brain_V1"), "Human_Brain_V1")
    assert (entry["grid"], entry["mpp_source"]) == ("free", "spot_diameter")
    assert entry["mpp"] == pytest.approx(0.5)


def test_visium_hd_bins_are_in_the_names(collection, bins):
    adata = sta.io.read_stimage1k4m(collection, "Human_Colon_HD", technology="VisiumHD", library_id="HD")
    assert adata.uns["spatial"]["HD"]["scalefactors"]["bin_size_um"] == 8.0
    assert list(adata.obs["array_row"]) == list(bins.rows)
    entry = scale_of(adata, "HD", spot_um=4.0, niche_um=24.0)
    assert (entry["mpp"], entry["mpp_source"], entry["grid"]) == (pytest.approx(0.5), "pitch", "square")
    np.testing.assert_array_equal(sta.pp.get_patches(adata, size=8)[:, 4, 4], bins.colours)


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_streaming_changes_nothing(collection, legacy, monkeypatch, at_once):
    monkeypatch.setattr(_stimage, "_VALUES_AT_ONCE", at_once)
    adata = sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1")
    np.testing.assert_array_equal(adata.X.toarray(), legacy.counts.toarray())


def test_header_as_r_writes_it(collection, legacy):
    file = collection / "ST" / "gene_exp" / "Human_Breast_ST_A1_count.csv"
    file.write_text(file.read_text().removeprefix(","))
    adata = sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1")
    assert list(adata.var_names) == legacy.genes
    np.testing.assert_array_equal(adata.X.toarray(), legacy.counts.toarray())


def test_spots_in_one_table_only(collection, legacy, caplog):
    file = collection / "ST" / "coord" / "Human_Breast_ST_A1_coord.csv"
    pd.read_csv(file, index_col=0).iloc[:-3].to_csv(file)
    file = collection / "ST" / "gene_exp" / "Human_Breast_ST_A1_count.csv"
    pd.read_csv(file, index_col=0).iloc[:-2].to_csv(file)
    with caplog.at_level(logging.WARNING, logger="stalign"):
        adata = sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1")
    assert "left out 3 spots with counts but no coordinates, and 2 with coordinates but no counts" in caplog.text
    np.testing.assert_allclose(adata.obsm["spatial"], legacy.xy[3:-2])
    np.testing.assert_array_equal(adata.X.toarray(), legacy.counts.toarray()[3:-2])


def test_no_common_spots(collection):
    file = collection / "ST" / "coord" / "Human_Breast_ST_A1_coord.csv"
    pd.read_csv(file, index_col=0).rename(index=lambda name: "x" + name).to_csv(file)
    with pytest.raises(ValueError, match="share no spots"):
        sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1")


def test_without_the_picture(collection, caplog):
    (collection / "ST" / "image" / "Human_Breast_ST_A1.png").unlink()
    with caplog.at_level(logging.INFO, logger="stalign"):
        adata = sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1")
    assert "no image" in caplog.text
    assert scale_of(adata, "Human_Breast_ST_A1")["mpp"] == pytest.approx(0.5)


def test_unknown_slide(collection):
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'Human_Breast_ST_A1'"):
        sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A2")
    with pytest.raises(FileNotFoundError, match=r"\['Visium/coord'\]"):
        sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1", technology="Visium")


def test_unknown_technology(collection):
    with pytest.raises(ValueError, match=r"technology must be one of \['ST', 'Visium', 'VisiumHD'\]"):
        sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1", technology="visium")
    renamed = (collection / "ST").rename(collection / "breast")
    with pytest.raises(ValueError, match="Pass `technology"):
        sta.io.read_stimage1k4m(renamed, "Human_Breast_ST_A1")
    assert sta.io.read_stimage1k4m(renamed, "Human_Breast_ST_A1", technology="ST").n_obs == 40


def test_another_folder(collection):
    with pytest.raises(FileNotFoundError, match=r"'ST/coord/'.*It holds \['Human_Breast_ST_A1\.png'\]"):
        sta.io.read_stimage1k4m(collection / "ST" / "image", "Human_Breast_ST_A1")
    (collection / "ST" / "gene_exp" / "Human_Breast_ST_A1_count.csv").rename(collection / "counts.csv")
    with pytest.raises(FileNotFoundError, match="no counts"):
        sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1")


@pytest.mark.parametrize(
    ("table", "content", "match"),
    [
        ("coord", ",yaxis,xaxis\na,1,2\n", r"lacks the columns \['r'\]"),
        ("coord", ",yaxis,xaxis,r\na,1,2\n", "empty cells"),
        ("coord", ",yaxis,xaxis,r\na,1,two,3\n", "cannot be read as a table of coordinates"),
        ("coord", ",yaxis,xaxis,r\na,1,2,3\na,1,2,3\n", "more than once"),
        ("gene_exp", "", "header has 0 names"),
        ("gene_exp", ",A,B\ns,1,2\nt,1\n", "cannot be read as a table of counts"),
        ("gene_exp", ",A,B\ns,1,2\nt,1,inf\n", "infinite values near row 2"),
        ("gene_exp", ",A,B\ns,1,x\n", "cannot be read as a table of counts"),
        ("gene_exp", ",A,B\ns,1,2\ns,1,2\n", "more than once"),
    ],
)
def test_damaged_tables(collection, table, content, match):
    (file,) = (collection / "ST" / table).glob("*.csv")
    file.write_text(content)
    with pytest.raises(ValueError, match=match):
        sta.io.read_stimage1k4m(collection, "Human_Breast_ST_A1")
