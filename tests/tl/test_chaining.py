"""What the functions write is what scanpy, squidpy and AnnData's files take; and the main job on real sections."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import squidpy as sq
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score

import stalign as sta


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def done(embedded, markers) -> ad.AnnData:
    """The planted section after all four calls."""
    sta.tl.spatial_domains(embedded, 3)
    sta.tl.zero_shot_annotate(embedded, markers)
    sta.tl.predict_expression(embedded)
    return embedded


def squidpy_graph(adata: ad.AnnData, library_key: str | None = None) -> None:
    """squidpy's own neighbours under squidpy's own names, through the function that is current."""
    if hasattr(sq.gr, "spatial_neighbors_grid"):
        sq.gr.spatial_neighbors_grid(adata, n_neighs=6, library_key=library_key)
    else:
        sq.gr.spatial_neighbors(adata, coord_type="grid", n_neighs=6, library_key=library_key)


def test_domains_are_the_bands(done):
    assert adjusted_rand_score(done.obs["truth"], done.obs["stalign_domain"]) > 0.5


def test_neighbors_and_leiden(done):
    sc.pp.neighbors(done, use_rep="X_stalign", n_neighbors=8)
    assert done.obsp["connectivities"].shape == (120, 120)
    sc.tl.leiden(done, flavor="igraph", n_iterations=2, directed=False)
    assert done.obs["leiden"].nunique() > 1
    sc.tl.rank_genes_groups(done, "stalign_domain", method="t-test")  # a categorical like any other


@pytest.mark.parametrize("key", ["stalign_annotation", "stalign_domain"])
def test_neighbourhood_enrichment(done, key):
    """On squidpy's own graph with its own names, and on the niches: bands are next to themselves."""
    squidpy_graph(done)
    for kwargs in ({}, {"connectivity_key": "niche"}):
        sq.gr.nhood_enrichment(done, cluster_key=key, n_perms=50, seed=0, show_progress_bar=False, **kwargs)
        z = done.uns[f"{key}_nhood_enrichment"]["zscore"]
        assert z.shape == (3, 3)
        assert (np.diag(z) > 0).all()
    assert done.obsp["niche_connectivities"].shape == (120, 120)  # both graphs live side by side


def test_other_statistics_of_squidpy(done):
    squidpy_graph(done)
    done.layers["filled"] = np.nan_to_num(done.layers["stalign_predicted"])
    predicted = list(done.var_names[done.var["stalign_predicted_r"].notna()][:3])
    sq.gr.spatial_autocorr(done, genes=predicted, layer="filled", mode="moran", n_perms=None)
    assert np.isfinite(done.uns["moranI"]["I"]).all()
    sq.gr.interaction_matrix(done, "stalign_annotation")


def test_plots_of_squidpy(done):
    sq.pl.spatial_scatter(done, color=["stalign_domain", "stalign_annotation", "stalign_annotation_confidence"])
    gene = done.var_names[done.var["stalign_predicted_r"].notna()][0]
    sq.pl.spatial_scatter(done, color=gene, layer="stalign_predicted")


def test_two_libraries_through_everything(two_libraries, tiny_folder, markers, tmp_path):
    two_libraries.obs["library"] = two_libraries.obs["library"].astype("category")  # squidpy wants it so
    sta.tl.embed(two_libraries, model=tiny_folder, library_key="library", progress=False)
    sta.tl.spatial_domains(two_libraries, 3, library_key="library")
    sta.tl.zero_shot_annotate(two_libraries, markers, threshold=0.4)
    sta.tl.predict_expression(two_libraries)
    squidpy_graph(two_libraries, "library")
    sq.gr.nhood_enrichment(two_libraries, "stalign_annotation", n_perms=20, seed=0, show_progress_bar=False)
    sq.pl.spatial_scatter(two_libraries, color="stalign_domain", library_key="library")
    two_libraries.write_h5ad(tmp_path / "two.h5ad")
    back = ad.read_h5ad(tmp_path / "two.h5ad")
    sta.tl.zero_shot_annotate(back, markers, threshold=0.4)
    assert back.obs["stalign_annotation"].tolist() == two_libraries.obs["stalign_annotation"].tolist()


def test_round_trip_of_everything(done, tmp_path, snapshot):
    done.write_h5ad(tmp_path / "done.h5ad")
    back = ad.read_h5ad(tmp_path / "done.h5ad")
    assert list(back.obs.columns) == list(done.obs.columns)
    for column in done.obs:
        assert back.obs[column].dtype == done.obs[column].dtype
        assert back.obs[column].tolist() == done.obs[column].tolist()
    for name, value in done.obsm.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(back.obsm[name], value)
        else:
            np.testing.assert_array_equal(back.obsm[name], value)
            assert back.obsm[name].dtype == value.dtype
    np.testing.assert_array_equal(back.layers["stalign_predicted"], done.layers["stalign_predicted"])
    assert (back.obsp["niche_connectivities"] != done.obsp["niche_connectivities"]).nnz == 0
    assert set(back.uns["stalign"]) == set(done.uns["stalign"])
    same_tree(back.uns["stalign"], done.uns["stalign"])


def same_tree(read: dict, written: dict) -> None:
    """What comes back from a file: the same keys and values, lists as arrays."""
    assert set(read) == set(written)
    for key, value in written.items():
        if isinstance(value, dict):
            same_tree(read[key], value)
        elif isinstance(value, float):
            assert float(read[key]) == value or (np.isnan(value) and np.isnan(read[key]))
        else:
            assert np.asarray(read[key]).tolist() == np.asarray(value).tolist(), key


def test_results_of_sections_are_concatenated(make_planted, tiny_folder, markers):
    """Embed apart, put together: nothing but the matrices is needed for domains over both."""
    parts = [make_planted(name, seed=seed) for name, seed in (("A", 1), ("B", 2))]
    for part in parts:
        sta.tl.embed(part, model=tiny_folder, progress=False)
    both = ad.concat(parts)
    sta.tl.spatial_domains(both, 3)
    sta.tl.zero_shot_annotate(both, markers, model=tiny_folder, library_key="library")
    assert both.obs["stalign_annotation"].notna().all()
    assert sta.tl.retrieve(both, parts[0], k=3).indices.shape == (240, 3)


# --- real sections, the bundled model ----------------------------------------------------------------------------

TUMOUR_IMMUNE = {
    "tumour": ["ERBB2", "EPCAM", "KRT8", "KRT18", "KRT19"],
    "immune": ["CD3E", "PTPRC", "MS4A1", "CD79A", "CD2"],
    "stroma": ["COL1A1", "COL1A2", "COL3A1", "DCN", "LUM"],
}
CORTEX = {
    "grey": ["SNAP25", "NRGN", "SYT1", "CAMK2A", "ENC1"],
    "white": ["MBP", "PLP1", "MOBP", "MAG", "CNP"],
}


def four_calls(adata: ad.AnnData, n_domains: int, labels: dict[str, list[str]]) -> ad.AnnData:
    """With no argument beyond the data, the number of domains and the labels."""
    sta.tl.embed(adata)
    sta.tl.spatial_domains(adata, n_domains)
    sta.tl.zero_shot_annotate(adata, labels)
    if "X_stalign_image" in adata.obsm:
        sta.tl.predict_expression(adata)
    return adata


def check_sane(adata: ad.AnnData, n_domains: int, labels: dict[str, list[str]]) -> None:
    n = adata.n_obs
    X = adata.obsm["X_stalign"]
    assert np.isfinite(X).all()
    spread = np.linalg.svd(X - X.mean(axis=0), compute_uv=False) ** 2
    assert spread.sum() ** 2 / (spread**2).sum() > 2  # effective dimensions: no collapse
    sizes = adata.obs["stalign_domain"].value_counts()
    assert len(sizes) == n_domains
    assert sizes.max() < 0.9 * n
    score = adata.obsm["stalign_annotation_score"]
    np.testing.assert_allclose(score.sum(axis=1), 1, atol=1e-4)
    shares = adata.obs["stalign_annotation"].value_counts(normalize=True)
    assert set(shares.index) == set(labels)
    assert shares.min() > 0.03  # every label somewhere


def ari(adata: ad.AnnData) -> float:
    """Domains against the annotation; the labels are looked at here and nowhere else."""
    known = ~adata.obs["annotation"].astype(str).isin(["undetermined", "NA", "nan"])
    return adjusted_rand_score(adata.obs["annotation"][known], adata.obs["stalign_domain"][known])


def score_follows(adata: ad.AnnData, label: str, genes: list[str]) -> float:
    """Rank correlation of a label's score with the niche mean of its markers' log-normalised counts."""
    expression = sta.genes.normalise_log1p(adata.X)[:, adata.var_names.get_indexer(genes)]
    mean = np.asarray(sta.genes.niche_mean(adata.obsp["niche_connectivities"], expression).mean(axis=1)).ravel()
    return float(spearmanr(adata.obsm["stalign_annotation_score"][label], mean)[0])


@pytest.fixture(scope="module")
def breast(real_section) -> ad.AnnData:
    return four_calls(real_section("her2st/A1"), 5, TUMOUR_IMMUNE)


@pytest.fixture(scope="module")
def cortex(real_section) -> ad.AnnData:
    return four_calls(real_section("dlpfc/151673"), 7, CORTEX)


@pytest.mark.real
def test_breast_with_image(breast):
    check_sane(breast, 5, TUMOUR_IMMUNE)
    record = breast.uns["stalign"]["embed"]
    assert record["model"] == "stalign-mini"
    assert record["modalities"] == ["image", "gene"]
    assert record["genes"]["coverage"] > 0.5
    # Four in five spots are one class, so that the index is low and unsteady here; domains at random stay below 0.08.
    assert ari(breast) > 0.1
    assert score_follows(breast, "tumour", TUMOUR_IMMUNE["tumour"]) > 0.2
    r = breast.var["stalign_predicted_r"].dropna()
    assert len(r) > 50
    predicted = breast.layers["stalign_predicted"][:, breast.var["stalign_predicted_r"].notna()]
    assert np.isfinite(predicted).all()
    assert r.median() > 0.0


@pytest.mark.real
@pytest.mark.slow
def test_cortex_with_8513_genes(cortex):
    assert cortex.n_vars == 8513
    check_sane(cortex, 7, CORTEX)
    assert ari(cortex) > 0.15
    assert score_follows(cortex, "white", CORTEX["white"]) > 0.3
    white = cortex.obs["annotation"].astype(str) == "WM"
    named = cortex.obs["stalign_annotation"] == "white"
    assert (named & white).sum() / white.sum() > 0.5


@pytest.mark.real
def test_breast_without_image(real_section):
    adata = four_calls(real_section("her2st/D1"), 4, TUMOUR_IMMUNE)
    check_sane(adata, 4, TUMOUR_IMMUNE)
    assert adata.uns["stalign"]["embed"]["modalities"] == ["gene"]
    assert "X_stalign_image" not in adata.obsm
    assert score_follows(adata, "tumour", TUMOUR_IMMUNE["tumour"]) > 0.2
    with pytest.raises(KeyError, match="embedded without an image"):
        sta.tl.predict_expression(adata)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("section", "floor"), [("breast", 0.1), ("cortex", 0.15)])
def test_the_floors_are_above_chance(section, floor, request):
    """The same domains handed out at random never reach what is asked of the embedding."""
    adata = request.getfixturevalue(section).copy()
    rng = np.random.default_rng(0)
    domains = adata.obs["stalign_domain"].to_numpy()
    by_chance = []
    for _ in range(50):
        adata.obs["stalign_domain"] = rng.permutation(domains)
        by_chance.append(ari(adata))
    assert max(by_chance) < floor
