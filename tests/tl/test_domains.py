from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from stalign.tl import _domains
from stalign.tl._domains import spatial_domains

SIZES = (60, 40, 20)
TRUTH = np.repeat([0, 1, 2], SIZES)


def blobs(seed: int = 0, dimensions: int = 8) -> ad.AnnData:
    """Three groups of spots, far apart; domain numbers by size are TRUTH."""
    rng = np.random.default_rng(seed)
    centres = 5 * np.eye(3, dimensions)
    adata = ad.AnnData(obs=pd.DataFrame(index=[f"s{i}" for i in range(len(TRUTH))]))
    adata.obsm["X_stalign"] = (centres[TRUTH] + 0.3 * rng.normal(size=(len(TRUTH), dimensions))).astype(np.float32)
    return adata


def codes(adata, key="stalign_domain"):
    return adata.obs[key].cat.codes.to_numpy()


@pytest.mark.parametrize("method", ["gmm", "kmeans", "leiden"])
def test_known_groups(method):
    adata = blobs()
    assert spatial_domains(adata, 3, method=method) is None
    column = adata.obs["stalign_domain"]
    assert column.cat.categories.tolist() == ["0", "1", "2"]
    np.testing.assert_array_equal(codes(adata), TRUTH)
    record = adata.uns["stalign"]["domains"]
    assert record["sizes"].tolist() == list(SIZES)
    assert record["n_domains"] == 3
    assert record["converged"] is True
    assert record["params"]["method"] == method


@pytest.mark.parametrize("method", ["gmm", "kmeans", "leiden"])
def test_order_of_spots_does_not_matter(method):
    rng = np.random.default_rng(3)
    adata = blobs()
    # No clear groups: here the start decides.
    adata.obsm["X_stalign"] = rng.normal(size=(adata.n_obs, 6)).astype(np.float32)
    order = rng.permutation(adata.n_obs)
    shuffled = adata[order].copy()
    for data in (adata, shuffled):
        spatial_domains(data, 5, method=method)
    np.testing.assert_array_equal(codes(adata)[order], codes(shuffled))


def test_order_with_ties_in_the_first_columns():
    X = np.array([[0, 0, 0, 0, 2.0], [0, 0, 0, 0, 1.0], [-1, 0, 0, 0, 3.0]])
    np.testing.assert_array_equal(_domains._canonical_order(X), [2, 1, 0])
    np.testing.assert_array_equal(_domains._canonical_order(X[:, :2][:2]), [0, 1])


def test_leiden_without_a_number():
    adata = blobs()
    spatial_domains(adata, method="leiden", resolution=0.05)
    assert adjusted_rand_score(TRUTH, codes(adata)) == 1
    assert adata.uns["stalign"]["domains"]["params"]["n_domains"] == 0


def test_fit_on_a_sample(monkeypatch):
    monkeypatch.setattr(_domains, "_MAX_FIT", 50)
    adata = blobs()
    for method in ("gmm", "kmeans"):
        spatial_domains(adata, 3, method=method)
        np.testing.assert_array_equal(codes(adata), TRUTH)


def test_libraries_on_their_own():
    adata = blobs()
    adata.obs["slide"] = np.where(np.arange(adata.n_obs) % 2 == 0, "A", "B")
    spatial_domains(adata, 3, library_key="slide")
    column = adata.obs["stalign_domain"]
    assert column.cat.categories.tolist() == ["A_0", "A_1", "A_2", "B_0", "B_1", "B_2"]
    for name in "AB":
        inside = (adata.obs["slide"] == name).to_numpy()
        assert column[inside].str.startswith(name).all()
        assert adjusted_rand_score(TRUTH[inside], column[inside]) == 1


def chain(n: int) -> sparse.csr_matrix:
    return sparse.diags([np.ones(n - 1), np.ones(n), np.ones(n - 1)], [-1, 0, 1], format="csr", dtype=np.float32)


def test_majority_by_hand():
    #          lone 1 inside zeros; a border of two runs stays; a tie keeps the own label
    labels = np.array([0, 0, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(_domains._majority(labels, chain(8)), [0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(_domains._majority(np.array([1, 0]), chain(2)), [1, 0])


def test_refine():
    adata = blobs()
    adata.obsp["niche_connectivities"] = chain(adata.n_obs)
    X = adata.obsm["X_stalign"]
    X[10] = X[70]  # looks like group 1, lies in group 0
    spatial_domains(adata, 3)
    assert codes(adata)[10] == 1
    spatial_domains(adata, 3, refine=True)
    np.testing.assert_array_equal(codes(adata), TRUTH)


def test_refine_needs_the_graph():
    adata = blobs()
    with pytest.raises(KeyError, match=r"niche_connectivities.*extract_niches"):
        spatial_domains(adata, 3, refine=True)
    assert not adata.uns
    assert adata.obs.shape[1] == 0


def test_numbers_by_size():
    np.testing.assert_array_equal(_domains._by_size(np.array([7, 3, 3, 5])), [1, 0, 0, 2])


def test_copy_key_and_other_results(tmp_path):
    adata = blobs()
    adata.uns["stalign"] = {"genes": {"coverage": 1.0}}
    result = spatial_domains(adata, 3, key_added="d", copy=True, random_state=4)
    assert "d" not in adata.obs
    assert set(adata.uns["stalign"]) == {"genes"}
    assert set(result.uns["stalign"]) == {"genes", "domains"}
    result.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert back.obs["d"].tolist() == result.obs["d"].tolist()
    assert back.uns["stalign"]["domains"]["params"]["random_state"] == 4


def test_scale_and_shift_do_not_matter():
    adata = blobs(dimensions=3)
    adata.obsm["small"] = 1e-4 * adata.obsm["X_stalign"] + 1
    adata.obsm["frame"] = pd.DataFrame(adata.obsm["X_stalign"], index=adata.obs_names)
    adata.obsm["sparse"] = sparse.csr_matrix(adata.obsm["X_stalign"])
    for rep in ("small", "frame", "sparse"):
        spatial_domains(adata, 3, use_rep=rep)
        np.testing.assert_array_equal(codes(adata), TRUTH)


def test_fewer_domains_than_asked_for_is_said():
    adata = blobs()
    adata.obsm["X_stalign"] = np.repeat(np.eye(2), 60, axis=0)
    with pytest.warns(UserWarning, match=r"Found 2 domains instead of 4"):
        spatial_domains(adata, 4, method="gmm")


@pytest.mark.parametrize("method", ["gmm", "kmeans"])
def test_no_convergence_is_said(method, monkeypatch):
    monkeypatch.setattr(_domains, "_MAX_ITER", 1)
    adata = blobs()
    adata.obsm["X_stalign"] = np.random.default_rng(0).normal(size=(adata.n_obs, 6))
    with pytest.warns(UserWarning, match="converge"):
        spatial_domains(adata, 4, method=method, n_init=1)
    assert not adata.uns["stalign"]["domains"]["converged"]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((), {}, ValueError, "leiden"),
        ((1,), {}, ValueError, r"between 2 and the number of spots \(120\), got 1"),
        ((121,), {}, ValueError, "got 121"),
        ((2.5,), {}, ValueError, "got 2.5"),
        (("3",), {}, ValueError, "got '3'"),
        ((True,), {}, ValueError, "got True"),
        ((3,), {"method": "gm"}, ValueError, "gmm"),
        ((3,), {"use_rep": "X_stalign_imgae"}, KeyError, r"sta\.tl\.embed.*"),
        ((3,), {"use_rep": "X_pca"}, KeyError, "'X_stalign'"),
        ((3,), {"library_key": "slide"}, KeyError, "slide"),
        ((3,), {"n_components": 0}, ValueError, "n_components"),
        ((3,), {"n_init": 1.5}, ValueError, "n_init"),
        ((3,), {"random_state": -1}, ValueError, "random_state"),
    ],
)
def test_bad_arguments(args, kwargs, error, message):
    adata = blobs()
    with pytest.raises(error, match=message):
        spatial_domains(adata, *args, **kwargs)
    assert not adata.uns
    assert adata.obs.shape[1] == 0


def test_bad_embeddings():
    adata = blobs()
    adata.obsm["X_stalign"][5, 2] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values for 1 of 120 spots: \['s5'\]"):
        spatial_domains(adata, 3)
    adata.obsm["X_stalign"][:] = 1
    with pytest.raises(ValueError, match="same for all 120 spots"):
        spatial_domains(adata, 3)


def test_library_with_too_few_spots():
    adata = blobs()
    adata.obs["slide"] = ["A"] * 118 + ["B"] * 2
    with pytest.raises(ValueError, match=r"spots of library 'B' \(2\), got 3"):
        spatial_domains(adata, 3, library_key="slide")
