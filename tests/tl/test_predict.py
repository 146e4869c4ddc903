from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import stalign as sta
from stalign import genes as sg
from stalign.tl import _predict

predict = sta.tl.predict_expression
GENES = ["ERBB2", "CD3E", "COL1A1", "EPCAM", "PTPRC"]


def linear_slide(n: int = 400, *, seed: int = 0, shift: float = 0.0, weights: np.ndarray | None = None) -> ad.AnnData:
    """Embeddings at random; log-expression of five genes is linear in the image side, the gene side is the same.

    The last of six genes takes most of the counts, so that the totals hardly vary.
    """
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 4)) / 2
    if weights is None:
        weights = np.random.default_rng(99).normal(size=(4, len(GENES)))
    log = 2.5 + 0.5 * X @ weights
    counts = rng.poisson(np.column_stack([np.expm1(log) * 10, np.full(n, 1e5)]).clip(0))
    adata = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=[*GENES, "FILLER"]))
    adata.obs_names = [f"s{seed}_{i}" for i in range(n)]
    for side in ("image", "gene"):
        adata.obsm[f"X_stalign_{side}"] = (X + shift).astype(np.float32)
    return adata


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def log_normalised(adata: ad.AnnData, name: str) -> np.ndarray:
    counts = np.asarray(adata.X.todense() if sparse.issparse(adata.X) else adata.X, dtype=np.float64)
    return np.log1p(counts[:, adata.var_names.get_loc(name)] / counts.sum(axis=1) * 1e4)


# --- the model's head --------------------------------------------------------------------------------------------


def test_head_slots(embedded, tiny):
    assert predict(embedded) is None
    layer = embedded.layers["stalign_predicted"]
    assert layer.shape == (120, 240)
    assert layer.dtype == np.float32
    there = np.isin(embedded.var_names, tiny.predicted_genes)
    assert there.sum() == 30
    assert np.isfinite(layer[:, there]).all()
    assert np.isnan(layer[:, ~there]).all()
    assert "stalign_predicted" not in embedded.obsm
    sd = embedded.obsm["stalign_predicted_sd"]
    assert list(sd.columns) == list(tiny.predicted_genes)
    assert list(sd.index) == list(embedded.obs_names)
    np.testing.assert_allclose(sd.to_numpy(), np.tile(np.linspace(0.1, 1, 30), (120, 1)), rtol=1e-6)
    assert set(sd.dtypes) == {np.dtype(np.float32)}
    r = embedded.var["stalign_predicted_r"]
    assert r.dtype == np.float32
    np.testing.assert_array_equal(r.notna(), there)
    record = embedded.uns["stalign"]["prediction"]
    assert record["method"] == "head"
    assert record["units"] == "log1p of counts per 10,000"
    assert record["genes"].tolist() == list(tiny.predicted_genes)
    assert record["model"] == "tiny"


def test_head_is_the_models_on_the_centred_slide(embedded, tiny):
    predict(embedded)
    image = torch.from_numpy(embedded.obsm["X_stalign_image"])
    halves = [torch.nn.functional.normalize(image[:, part], dim=1) for part in (slice(0, 64), slice(64, 128))]
    features = torch.cat(halves, dim=1)
    with torch.inference_mode():
        expected = tiny.prediction.mean + tiny.prediction.scale * tiny.prediction.net(features - features.mean(dim=0))
    columns = embedded.var_names.get_indexer(list(tiny.predicted_genes))
    np.testing.assert_allclose(embedded.layers["stalign_predicted"][:, columns], expected.numpy(), atol=1e-5)


def test_head_agrees_with_the_model_on_few_spots(embedded, tiny, caplog):
    """Below 30 spots nothing is centred on the slide, and the answer is that of ``model.predict``."""
    part = embedded[:20].copy()
    predict(part)
    assert "20 spots are too few" in caplog.text
    image = torch.from_numpy(part.obsm["X_stalign_image"])
    with torch.inference_mode():
        expected = tiny.prediction([image[:, :64], image[:, 64:]]).numpy()
    columns = part.var_names.get_indexer(list(tiny.predicted_genes))
    np.testing.assert_allclose(part.layers["stalign_predicted"][:, columns], expected, atol=1e-5)


def test_pearson_r(embedded, tiny):
    predict(embedded)
    for name in tiny.predicted_genes[:4]:
        column = embedded.var_names.get_loc(name)
        r = pearson(embedded.layers["stalign_predicted"][:, column], log_normalised(embedded, name))
        assert embedded.var["stalign_predicted_r"].iloc[column] == pytest.approx(r, abs=1e-4)


def test_genes_that_are_not_in_var_go_to_obsm(embedded, tiny):
    inside, outside = tiny.predicted_genes[3], tiny.predicted_genes[7]
    whole = predict(embedded, copy=True)
    column = whole.var_names.get_loc(outside)
    part = embedded[:, embedded.var_names != outside].copy()
    predict(part, [outside, inside])
    frame = part.obsm["stalign_predicted"]
    assert list(frame.columns) == [outside]
    assert list(frame.index) == list(part.obs_names)
    np.testing.assert_allclose(frame[outside], whole.layers["stalign_predicted"][:, column], atol=1e-5)
    layer = part.layers["stalign_predicted"]
    assert np.isfinite(layer).all(axis=0).sum() == 1
    assert np.isfinite(layer[:, part.var_names.get_loc(inside)]).all()
    assert list(part.obsm["stalign_predicted_sd"].columns) == [outside, inside]
    assert part.var["stalign_predicted_r"].notna().sum() == 1


def test_only_genes_outside_var(embedded, tiny):
    name = tiny.predicted_genes[0]
    part = embedded[:, embedded.var_names != name].copy()
    predict(part, name)
    assert "stalign_predicted" not in part.layers
    assert "stalign_predicted_r" not in part.var
    assert list(part.obsm["stalign_predicted"].columns) == [name]


def test_no_var_at_all(slide, tiny):
    adata = ad.AnnData(obs=slide.obs, obsm=dict(slide.obsm), uns=slide.uns)
    sta.tl.embed(adata, model=tiny, progress=False)
    predict(adata, model=tiny)
    assert adata.obsm["stalign_predicted"].shape == (120, 30)
    assert np.isfinite(adata.obsm["stalign_predicted"]).all(axis=None)


def test_too_large_a_layer_becomes_a_frame(embedded, monkeypatch):
    expected = predict(embedded, copy=True)
    monkeypatch.setattr(_predict, "_MAX_LAYER", 100)
    predict(embedded)
    assert "stalign_predicted" not in embedded.layers
    frame = embedded.obsm["stalign_predicted"]
    assert frame.shape == (120, 30)
    for name in frame.columns[:3]:
        column = embedded.var_names.get_loc(name)
        np.testing.assert_allclose(frame[name], expected.layers["stalign_predicted"][:, column], atol=1e-6)
    assert embedded.var["stalign_predicted_r"].notna().sum() == 30


def test_alias_and_ensembl_of_a_gene(slide, make_tiny):
    model = make_tiny()
    place = model.genes.index("ERBB2")
    model.prediction.gene_index[0] = place
    sta.tl.embed(slide, model=model, progress=False)
    by_symbol = predict(slide, ["ERBB2"], model=model, copy=True).layers["stalign_predicted"][:, place]
    for name in ("HER2", "ENSG00000141736"):
        predict(slide, [name], model=model)
        np.testing.assert_array_equal(slide.layers["stalign_predicted"][:, place], by_symbol)


def test_genes_of_a_mouse_slide(slide, tiny):
    model = tiny
    name = next(gene for gene in model.predicted_genes if gene in ("ERBB2", "CD3E", "COL1A1", "EPCAM", "PTPRC", "KRT8"))
    slide.var_names = [gene.capitalize() for gene in slide.var_names]
    sta.tl.embed(slide, model=model, organism="mouse", progress=False)
    for wanted in (name, name.capitalize()):
        predict(slide, [wanted], model=model)
        finite = np.isfinite(slide.layers["stalign_predicted"]).all(axis=0)
        assert list(slide.var_names[finite]) == [name.capitalize()]
        assert "stalign_predicted" not in slide.obsm


def test_names_in_a_column_of_var(slide, tiny):
    wanted = list(tiny.predicted_genes[:2])
    slide.var["symbol"] = slide.var_names.to_numpy()
    slide.var_names = [f"g{number}" for number in range(slide.n_vars)]
    sta.tl.embed(slide, model=tiny, gene_symbols="symbol", progress=False)
    predict(slide, wanted, model=tiny)
    finite = np.isfinite(slide.layers["stalign_predicted"]).all(axis=0)
    assert set(slide.var.loc[finite, "symbol"]) == set(wanted)


def test_an_earlier_prediction_does_not_stay(embedded, tiny):
    part = embedded[:, embedded.var_names != tiny.predicted_genes[0]].copy()
    predict(part)
    assert "stalign_predicted" in part.obsm
    predict(part, [tiny.predicted_genes[1]])
    assert "stalign_predicted" not in part.obsm
    assert np.isfinite(part.layers["stalign_predicted"]).all(axis=0).sum() == 1


def test_no_counts_no_correlation(embedded, caplog):
    embedded.layers["counts"] = embedded.X.copy()
    embedded.X = sg.normalise_log1p(embedded.X)
    predict(embedded)
    assert "stalign_predicted_r" not in embedded.var
    assert "looks log1p" in caplog.text
    predict(embedded, layer="counts")
    assert embedded.var["stalign_predicted_r"].notna().sum() == 30


def test_libraries_are_centred_each(two_libraries, tiny, make_planted):
    sta.tl.embed(two_libraries, model=tiny, library_key="library", progress=False)
    predict(two_libraries, model=tiny)
    alone = make_planted("A", seed=1)
    sta.tl.embed(alone, model=tiny, progress=False)
    predict(alone, model=tiny)
    together = two_libraries[alone.obs_names].layers["stalign_predicted"]
    np.testing.assert_allclose(together, alone.layers["stalign_predicted"], atol=1e-3)
    # The records may be lost, as in a concatenation: then the column is named.
    kept = two_libraries.layers["stalign_predicted"]
    del two_libraries.uns["stalign"], two_libraries.uns["spatial"]
    predict(two_libraries, model=tiny, library_key="library")
    np.testing.assert_allclose(two_libraries.layers["stalign_predicted"], kept, atol=1e-6)


def test_library_without_image_is_nan(two_libraries, tiny):
    two_libraries.uns["spatial"]["B"]["images"] = {}
    sta.tl.embed(two_libraries, model=tiny, library_key="library", progress=False)
    predict(two_libraries, model=tiny)
    inside = (two_libraries.obs["library"] == "A").to_numpy()
    columns = two_libraries.var_names.get_indexer(list(tiny.predicted_genes))
    predicted = two_libraries.layers["stalign_predicted"][:, columns]
    assert np.isfinite(predicted[inside]).all()
    assert np.isnan(predicted[~inside]).all()
    np.testing.assert_array_equal(two_libraries.obsm["stalign_predicted_sd"].isna().all(axis=1), ~inside)
    name = tiny.predicted_genes[1]
    r = pearson(predicted[inside, 1], log_normalised(two_libraries, name)[inside])
    assert two_libraries.var.loc[name, "stalign_predicted_r"] == pytest.approx(r, abs=1e-4)


@pytest.mark.parametrize("convert", [sparse.csc_matrix, lambda X: X.toarray(), lambda X: X.astype(np.int32)])
def test_kind_of_matrix(embedded, convert):
    expected = predict(embedded, copy=True)
    embedded.X = convert(embedded.X)
    predict(embedded)
    np.testing.assert_allclose(embedded.var["stalign_predicted_r"], expected.var["stalign_predicted_r"], atol=1e-5)


@pytest.fixture
def sharing(embedded):
    """The model of ``embedded``, loaded anew, with a share of the niche."""

    def load(share: float) -> sta.models.STAlign:
        model = sta.models.load(embedded.uns["stalign"]["embed"]["model_source"])
        model.prediction.niche_share = share
        return model

    return load


def test_head_averages_with_the_niche(embedded, sharing):
    alone = predict(embedded, copy=True).to_df("stalign_predicted").dropna(axis=1)
    mixed = predict(embedded, copy=True, model=sharing(0.25)).to_df("stalign_predicted")[alone.columns]
    graph = sg.row_normalise(sparse.csr_matrix(embedded.obsp["niche_connectivities"]))
    # The head is linear, so that averaging what it takes is averaging what it says.
    np.testing.assert_allclose(mixed, 0.75 * alone + 0.25 * (graph @ alone.to_numpy()), atol=1e-5)


def test_a_niche_ends_at_spots_without_an_image(embedded, sharing):
    model = sharing(1.0)
    gone = np.zeros(embedded.n_obs, dtype=bool)
    gone[:60] = True
    embedded.obsm["X_stalign_image"] = np.array(embedded.obsm["X_stalign_image"])
    embedded.obsm["X_stalign_image"][gone] = np.nan
    part = embedded[~gone].copy()
    predict(embedded, model=model)
    predict(part, model=model)
    np.testing.assert_allclose(embedded.layers["stalign_predicted"][~gone], part.layers["stalign_predicted"], atol=1e-5)
    assert np.isnan(embedded.layers["stalign_predicted"][gone]).all()


def test_a_niche_graph_that_is_gone_is_said(embedded, sharing, caplog):
    alone = predict(embedded, copy=True).layers["stalign_predicted"]
    del embedded.obsp["niche_connectivities"]
    with caplog.at_level("WARNING"):
        predict(embedded, model=sharing(0.5))
    assert "niche_connectivities" in caplog.text
    np.testing.assert_allclose(embedded.layers["stalign_predicted"], alone)


# --- ridge -------------------------------------------------------------------------------------------------------


def test_ridge_recovers_a_linear_relation():
    query, reference = linear_slide(seed=1), linear_slide(seed=2)
    predict(query, GENES, reference=reference, method="ridge")
    assert (query.var.loc[GENES, "stalign_predicted_r"] > 0.9).all()
    assert np.isnan(query.var.loc["FILLER", "stalign_predicted_r"])
    for name in GENES:
        column = query.var_names.get_loc(name)
        residual = log_normalised(query, name) - query.layers["stalign_predicted"][:, column]
        said = query.obsm["stalign_predicted_sd"][name]
        assert said.nunique() == 1
        assert residual.std() == pytest.approx(said.iloc[0], rel=0.25)
    record = query.uns["stalign"]["prediction"]
    assert record["method"] == "ridge"
    assert record["penalty"] > 0
    assert (record["n_references"], record["n_reference_spots"]) == (1, 400)


def test_ridge_does_not_learn_what_differs_between_slides():
    """Slides shifted as a whole, and a query shifted elsewhere: predictions as without shifts."""
    plain = linear_slide(seed=1)
    predict(plain, GENES, reference=[linear_slide(seed=2), linear_slide(seed=3)], method="ridge")
    shifted = linear_slide(seed=1, shift=9.0)
    references = [linear_slide(seed=2, shift=-5.0), linear_slide(seed=3, shift=3.0)]
    predict(shifted, GENES, reference=references, method="ridge")
    np.testing.assert_allclose(
        shifted.layers["stalign_predicted"][:, :5], plain.layers["stalign_predicted"][:, :5], atol=1e-3
    )
    assert shifted.uns["stalign"]["prediction"]["n_references"] == 2


def test_ridge_of_few_spots_uses_the_references_mean(caplog):
    query, reference = linear_slide(20, seed=1), linear_slide(seed=2)
    predict(query, GENES, reference=reference, method="ridge")
    assert "compared with that of the reference slides" in caplog.text
    assert (query.var.loc[GENES, "stalign_predicted_r"] > 0.8).all()


def test_solve_ridge_against_the_textbook():
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(60, 5)), rng.normal(size=(60, 3))
    Y[:, 0] += X @ np.arange(5)
    X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    weight, penalty, sd = _predict.solve_ridge(X.T @ X, X.T @ Y, (Y**2).sum(axis=0), 60)
    np.testing.assert_allclose(weight, np.linalg.solve(X.T @ X + penalty * np.eye(5), X.T @ Y), atol=1e-8)
    hat = X @ np.linalg.solve(X.T @ X + penalty * np.eye(5), X.T)
    freedom = np.trace(hat) + 1
    np.testing.assert_allclose(sd, np.sqrt(((Y - hat @ Y) ** 2).sum(axis=0) / (60 - freedom)), rtol=1e-6)


def test_ridge_with_constant_targets_and_features():
    reference = linear_slide(seed=2)
    reference.obsm["X_stalign_image"][:] = 1
    query = linear_slide(seed=1)
    predict(query, GENES, reference=reference, method="ridge")
    layer = query.layers["stalign_predicted"][:, :5]
    mean = [log_normalised(reference, name).mean() for name in GENES]
    np.testing.assert_allclose(layer, np.tile(mean, (400, 1)), atol=1e-3)


# --- retrieval ---------------------------------------------------------------------------------------------------


def test_retrieval_by_hand():
    """Two neighbours by cosine with softmax weights; the third spot is far off."""
    reference = ad.AnnData(
        sparse.csr_matrix(np.array([[50, 50], [10, 90], [0, 100]], dtype=np.float32)),
        var=pd.DataFrame(index=["ERBB2", "CD3E"]),
    )
    reference.obsm["X_stalign_gene"] = np.array([[1, 0], [0.6, 0.8], [-1, 0]], dtype=np.float32)
    query = ad.AnnData(obs=pd.DataFrame(index=["q"]))
    query.obsm["X_stalign_image"] = np.array([[2, 0]], dtype=np.float32)
    predict(query, ["ERBB2"], reference=reference, method="retrieval", k=2, temperature=0.4)
    weight = np.exp(np.array([1.0, 0.6]) / 0.4)
    weight /= weight.sum()
    values = np.log1p([5000.0, 1000.0])
    assert query.obsm["stalign_predicted"].loc["q", "ERBB2"] == pytest.approx(weight @ values, rel=1e-5)
    spread = np.sqrt(weight @ values**2 - (weight @ values) ** 2)
    assert query.obsm["stalign_predicted_sd"].loc["q", "ERBB2"] == pytest.approx(spread, rel=1e-3)


def test_retrieval_recovers_a_planted_relation():
    query, references = linear_slide(seed=1), [linear_slide(seed=2), linear_slide(seed=3)]
    predict(query, GENES, reference=references, method="retrieval", k=10)
    assert (query.var.loc[GENES, "stalign_predicted_r"] > 0.7).all()
    assert query.uns["stalign"]["prediction"]["k"] == 10
    assert query.uns["stalign"]["prediction"]["n_reference_spots"] == 800


def test_retrieval_with_fewer_spots_than_k(caplog):
    query, reference = linear_slide(seed=1), linear_slide(30, seed=2)
    predict(query, GENES, reference=reference, method="retrieval", k=50)
    assert query.uns["stalign"]["prediction"]["k"] == 30
    assert "all of them are used" in caplog.text


def test_the_genes_that_vary_most_without_names(monkeypatch):
    query, reference = linear_slide(seed=1), linear_slide(seed=2)
    monkeypatch.setattr(_predict, "_DEFAULT_GENES", 5)
    predict(query, reference=reference, method="ridge")
    assert set(query.uns["stalign"]["prediction"]["genes"]) == set(GENES)  # all but the one that hardly varies


def test_reference_is_embedded_on_the_side(embedded, make_planted, snapshot):
    for method in ("retrieval", "ridge"):
        reference = make_planted("R", seed=5)
        before = snapshot(reference)
        predict(embedded, ["ERBB2", "CD3E", "COL1A1"], reference=reference, method=method)
        assert snapshot(reference) == before
        assert embedded.var["stalign_predicted_r"].notna().sum() == 3
    # Colour tells the bands apart, and the bands have their markers: even a network with random weights carries it.
    assert (embedded.var["stalign_predicted_r"].dropna() > 0.5).all()


def test_order_of_spots(embedded, make_planted):
    reference = make_planted("R", seed=5)
    order = np.random.default_rng(0).permutation(embedded.n_obs)
    shuffled = embedded[order].copy()
    for method, kwargs in (("head", {}), ("ridge", {"reference": reference}), ("retrieval", {"reference": reference})):
        predict(embedded, method=method, **kwargs)
        predict(shuffled, method=method, **kwargs)
        a, b = embedded.layers["stalign_predicted"][order], shuffled.layers["stalign_predicted"]
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(np.nan_to_num(a), np.nan_to_num(b), atol=1e-3)


def test_the_slide_as_its_own_reference_is_said(caplog):
    query = linear_slide(seed=1)
    predict(query, GENES, reference=query, method="ridge")
    assert "have seen what they are compared with" in caplog.text


# --- elsewhere ---------------------------------------------------------------------------------------------------


def test_copy_and_key_added(embedded, snapshot):
    before = snapshot(embedded)
    result = predict(embedded, key_added="guess", copy=True)
    assert snapshot(embedded) == before
    assert "guess" in result.layers
    assert "guess_sd" in result.obsm
    assert "guess_r" in result.var
    assert result.uns["stalign"]["prediction"]["key_added"] == "guess"


@pytest.mark.parametrize("method", ["head", "retrieval", "ridge"])
def test_round_trip(embedded, make_planted, tiny, tmp_path, method):
    part = embedded[:, embedded.var_names != tiny.predicted_genes[0]].copy()
    genes = list(tiny.predicted_genes[:3])
    kwargs = {} if method == "head" else {"reference": make_planted("R", seed=5)}
    predict(part, genes, method=method, **kwargs)
    part.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(back.layers["stalign_predicted"], part.layers["stalign_predicted"])
    for name in ("stalign_predicted", "stalign_predicted_sd"):
        pd.testing.assert_frame_equal(back.obsm[name], part.obsm[name])
    np.testing.assert_array_equal(back.var["stalign_predicted_r"], part.var["stalign_predicted_r"])
    record = back.uns["stalign"]["prediction"]
    assert set(record) == set(part.uns["stalign"]["prediction"])
    assert list(record["genes"]) == genes


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (
            (["NOSUCH"],),
            {},
            ValueError,
            r"head of model 'tiny' predicts 30 genes; \['NOSUCH'\] is not among them.*ridge",
        ),
        (([],), {}, ValueError, "genes is empty"),
        ((), {"method": "heads"}, ValueError, r"method must be one of .*'heads'.*Did you mean 'head'"),
        ((), {"method": "ridge"}, ValueError, r"method='ridge' needs `reference="),
        ((), {"method": "retrieval", "reference": []}, ValueError, "reference is empty"),
        ((), {"k": 0}, ValueError, "k must be a positive integer, got 0"),
        ((), {"temperature": -1}, ValueError, "temperature must be a positive number, got -1"),
        ((), {"layer": "count"}, KeyError, r"'count' not found in `adata\.layers`.*'counts'"),
        ((), {"use_rep": "X_other"}, KeyError, r"'X_other_image'\]` is missing: run `sta\.tl\.embed"),
        ((), {"library_key": "slide"}, KeyError, r"'slide' not found in `adata\.obs`.*'library'"),
        ((), {"reference": "R"}, TypeError, r"Expected an AnnData, got str"),
    ],
)
def test_bad_arguments(embedded, snapshot, args, kwargs, error, message):
    embedded.layers["counts"] = embedded.X.copy()
    if kwargs.get("reference") == "R":
        kwargs = {"reference": "R", "method": "ridge"}
    before = snapshot(embedded)
    with pytest.raises(error, match=message):
        predict(embedded, *args, **kwargs)
    assert snapshot(embedded) == before


def test_head_takes_no_reference(embedded, make_planted):
    with pytest.raises(ValueError, match=r"method='head' takes no reference\. Pass `method='retrieval'`"):
        predict(embedded, reference=make_planted("R"))


@pytest.mark.parametrize("inputs", [None, ("spot", "niche")])
def test_model_without_a_head_for_images(slide, make_tiny, inputs, snapshot):
    model = make_tiny(prediction=None if inputs is None else {"n_genes": 30, "inputs": inputs})
    sta.tl.embed(slide, model=model, progress=False)
    before = snapshot(slide)
    message = "has no prediction head" if inputs is None else r"needs \['spot', 'niche'\], not images alone"
    with pytest.raises(ValueError, match=rf"model 'tiny' {message}|Model 'tiny' {message}"):
        predict(slide, model=model)
    assert snapshot(slide) == before


def test_embedded_from_genes_alone(slide, tiny):
    sta.tl.embed(slide, model=tiny, modalities=("gene",), progress=False)
    with pytest.raises(KeyError, match=r"X_stalign_image'\]` is missing: the slide was embedded without an image"):
        predict(slide, model=tiny)


def test_embedded_without_that_output(slide, tiny):
    sta.tl.embed(slide, model=tiny, outputs=["fused"], progress=False)
    with pytest.raises(KeyError, match=r"outputs=\['fused'\].*'image' among them"):
        predict(slide, model=tiny)


def normalised(reference):
    reference.X = sg.normalise_log1p(reference.X)


def no_counts(reference):
    reference.X = None


def no_gene(reference):
    reference.var_names = [f"unheard-{number}" for number in range(reference.n_vars)]


def no_image(reference):
    reference.uns["spatial"]["R"]["images"] = {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (normalised, r"must hold raw counts.*not whole.*layer="),
        (no_counts, r"Reference 0 has no counts: 120 spots × 240 genes"),
        (no_gene, r"Reference 0 has 240 genes; \['ERBB2'\] is not among them\. Leave these genes out"),
        (no_image, r"embedded from its gene alone: it has no output 'image'"),
    ],
)
def test_bad_references(embedded, make_planted, snapshot, spoil, message):
    reference = make_planted("R")
    spoil(reference)
    before = snapshot(embedded), snapshot(reference)
    with pytest.raises(ValueError, match=message):
        predict(embedded, ["ERBB2"], reference=reference, method="ridge")
    assert (snapshot(embedded), snapshot(reference)) == before


def test_widths_that_differ(snapshot):
    query, reference = linear_slide(seed=1), linear_slide(seed=2)
    for side in ("image", "gene"):
        reference.obsm[f"X_stalign_{side}"] = reference.obsm[f"X_stalign_{side}"][:, :3]
    before = snapshot(query)
    for method in ("ridge", "retrieval"):
        with pytest.raises(ValueError, match=r"embedded in 4 dimensions, the reference in 3: two models"):
            predict(query, GENES, reference=reference, method=method)
    assert snapshot(query) == before


def test_failing_midway(embedded, tiny, monkeypatch, snapshot):
    before = snapshot(embedded)
    monkeypatch.setattr(_predict, "_correlations", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(embedded)
    assert snapshot(embedded) == before
