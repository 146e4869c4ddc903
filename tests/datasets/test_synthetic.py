from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData, read_h5ad
from sklearn.linear_model import LogisticRegression

import stalign as sta

GEOMETRY = {"n_neighbors": 18, "spot_um": 100.0, "niche_um": 400.0}


@pytest.fixture(scope="module")
def section() -> AnnData:
    return sta.datasets.synthetic_visium()


def test_what_is_there(section):
    assert 1000 <= section.n_obs <= 1500
    assert 600 <= section.n_vars <= 1000
    assert section.X.format == "csr"
    assert (section.X.data == np.rint(section.X.data)).all()
    assert section.obs_names.is_unique
    assert section.var_names.is_unique
    assert {"ERBB2", "KRT8", "CD3E", "MS4A1", "COL1A1", "ADIPOQ"} <= set(section.var_names)
    assert section.var["gene_ids"].str.match(r"^ENSG\d{11}$").all()
    assert section.uns["synthetic"] is True
    assert (section.obs["region"].value_counts() >= 50).all()
    np.testing.assert_allclose(section.obsm["region_fraction"].sum(axis=1), 1, rtol=1e-5)


def test_scale_is_consistent(section):
    adata = section.copy()
    sta.pp.extract_niches(adata, **GEOMETRY)
    entry = adata.uns["stalign"]["niche"]["libraries"]["synthetic_visium"]
    assert entry["grid"] == "hexagonal"
    assert entry["mpp"] == pytest.approx(0.5, rel=1e-6)
    assert entry["mpp_candidates"]["spot_diameter"] == pytest.approx(0.5, rel=1e-6)
    assert 1500 <= entry["image_width"] <= 2000
    sta.pp.extract_niches(adata, image_key="lowres", **GEOMETRY)


def test_the_seed_decides(section):
    again = sta.datasets.synthetic_visium()
    assert (again.X != section.X).nnz == 0
    image = section.uns["spatial"]["synthetic_visium"]["images"]["hires"]
    np.testing.assert_array_equal(again.uns["spatial"]["synthetic_visium"]["images"]["hires"], image)
    other = sta.datasets.synthetic_visium(n_rows=12, n_cols=12, seed=1)
    assert other.n_obs < 144
    third = sta.datasets.synthetic_visium(n_rows=12, n_cols=12, seed=2)
    assert other.shape != third.shape or (other.X != third.X).nnz


def test_markers_follow_the_truth(section):
    counts = section.X.toarray()
    share = counts / counts.sum(axis=1, keepdims=True)
    region = section.obs["region"].to_numpy()
    for gene, home in {"ERBB2": "tumour", "CD3E": "immune", "COL1A1": "stroma", "ADIPOQ": "adipose"}.items():
        values = share[:, section.var_names.get_loc(gene)]
        assert values[region == home].mean() > 3 * values[region != home].mean()


def test_regions_look_different(section):
    """Colour statistics of the patches alone tell the regions apart, across the section."""
    adata = section.copy()
    sta.pp.extract_niches(adata, **GEOMETRY)
    patches = sta.pp.get_patches(adata, size=32).reshape(adata.n_obs, -1, 3) / 255
    features = np.hstack([patches.mean(axis=1), patches.std(axis=1)])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    left = adata.obsm["spatial"][:, 1] < np.median(adata.obsm["spatial"][:, 1])
    region = adata.obs["region"].to_numpy().astype(str)
    model = LogisticRegression(max_iter=2000).fit(features[left], region[left])
    assert model.score(features[~left], region[~left]) > 0.75


def test_it_can_be_written(section, tmp_path):
    section.write_h5ad(tmp_path / "a.h5ad")
    assert read_h5ad(tmp_path / "a.h5ad").shape == section.shape


def test_refusals():
    with pytest.raises(ValueError, match="at least 4"):
        sta.datasets.synthetic_visium(n_rows=2)
    with pytest.raises(ValueError, match="n_cols"):
        sta.datasets.synthetic_visium(n_cols=0)
