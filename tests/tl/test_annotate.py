from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import stalign as sta
from stalign.tl import _annotate, _prompts

annotate = sta.tl.zero_shot_annotate


def names(adata: ad.AnnData, key: str = "stalign_annotation") -> np.ndarray:
    return adata.obs[key].astype(str).to_numpy()


def accuracy(adata: ad.AnnData, key: str = "stalign_annotation") -> float:
    return float((names(adata, key) == adata.obs["truth"].astype(str)).mean())


def bare(values: np.ndarray, **obs: object) -> ad.AnnData:
    """AnnData with nothing but a fused embedding."""
    adata = ad.AnnData(obs=pd.DataFrame(obs, index=[f"s{i}" for i in range(len(values))]))
    adata.obsm["X_stalign"] = np.asarray(values, dtype=np.float32)
    return adata


# --- marker genes ------------------------------------------------------------------------------------------------


def test_slots(embedded, markers):
    assert annotate(embedded, markers) is None
    column = embedded.obs["stalign_annotation"]
    assert list(column.cat.categories) == list(markers)
    score = embedded.obsm["stalign_annotation_score"]
    assert isinstance(score, pd.DataFrame)
    assert score.shape == (120, 3)
    assert list(score.columns) == list(markers)
    assert list(score.index) == list(embedded.obs_names)
    assert set(score.dtypes) == {np.dtype(np.float32)}
    np.testing.assert_allclose(score.sum(axis=1), 1, atol=1e-5)
    confidence = embedded.obs["stalign_annotation_confidence"]
    assert confidence.dtype == np.float32
    np.testing.assert_array_equal(confidence, score.max(axis=1))
    np.testing.assert_array_equal(names(embedded), score.columns.to_numpy()[score.to_numpy().argmax(axis=1)])
    record = embedded.uns["stalign"]["annotation"]
    assert record["source"] == "markers"
    assert record["labels"] == list(markers)
    assert record["sides"] == ["image", "gene"]
    assert record["adapted_to_slide"] is True
    assert record["model"] == "tiny"
    assert record["sha256"] == embedded.uns["stalign"]["embed"]["sha256"]
    assert record["markers"][1] == ", ".join(sorted(markers["immune"]))  # in the order of the vocabulary


def test_planted_markers_are_found(embedded, markers):
    annotate(embedded, markers, modality="gene")
    assert accuracy(embedded) > 0.9


def test_order_of_labels_does_not_matter(embedded, markers):
    annotate(embedded, markers, modality="gene")
    annotate(embedded, dict(reversed(markers.items())), modality="gene", key_added="reversed")
    np.testing.assert_array_equal(names(embedded), names(embedded, "reversed"))


def test_one_gene_as_a_string_an_alias_and_an_unknown_one(embedded, caplog):
    annotate(embedded, {"tumour": ["HER2", "nonsense"], "immune": "PTPRC"}, modality="gene")
    assert embedded.uns["stalign"]["annotation"]["markers"] == ["ERBB2", "PTPRC"]
    assert "['nonsense']" in caplog.text


def test_scores_are_cosines_with_the_prompts(embedded, tiny, markers):
    """The whole chain by hand, one side: prompt inputs through the gene side, cosine, z-score, softmax."""
    index = _prompts.match_markers(markers, tiny.genes)
    codes = np.zeros(embedded.n_obs, dtype=np.intp)
    prompts, adapted = _prompts.prompt_embeddings(embedded, tiny, index, codes, key="X_stalign")
    assert adapted
    assert prompts.shape == (1, 3, 128)
    np.testing.assert_allclose(np.linalg.norm(prompts, axis=2), 1, atol=1e-5)
    cosine = embedded.obsm["X_stalign_gene"] @ prompts[0].T
    z = (cosine - cosine.mean(axis=0)) / cosine.std(axis=0)
    expected = torch.softmax(torch.from_numpy(z) / 0.5, dim=1).numpy()
    annotate(embedded, markers, modality="gene", temperature=0.5)
    np.testing.assert_allclose(embedded.obsm["stalign_annotation_score"], expected, atol=1e-3)


def test_prompts_without_counts_are_the_models_own(embedded, tiny, markers, caplog):
    embedded.X = None
    annotate(embedded, markers, modality="gene")
    assert embedded.uns["stalign"]["annotation"]["adapted_to_slide"] is False
    assert "not adapted to the slide" in caplog.text
    index = _prompts.match_markers(markers, tiny.genes)
    inputs = [
        torch.from_numpy(np.stack([tiny.encoder(name).prompt(genes) for genes in index.values()]))
        for name in ("spot_gene", "niche_gene")
    ]
    with torch.inference_mode():
        expected = tiny(spot_gene=inputs[0], niche_gene=inputs[1]).gene.numpy()
    codes = np.zeros(embedded.n_obs, dtype=np.intp)
    prompts, _ = _prompts.prompt_embeddings(embedded, tiny, index, codes, key="X_stalign")
    np.testing.assert_allclose(prompts[0], expected, atol=1e-5)


def test_fused_is_the_mean_of_both_sides(embedded, tiny, markers):
    index = _prompts.match_markers(markers, tiny.genes)
    codes = np.zeros(embedded.n_obs, dtype=np.intp)
    prompts, _ = _prompts.prompt_embeddings(embedded, tiny, index, codes, key="X_stalign")
    total = np.zeros((120, 3))
    for side in ("image", "gene"):
        cosine = embedded.obsm[f"X_stalign_{side}"] @ prompts[0].T
        total += (cosine - cosine.mean(axis=0)) / cosine.std(axis=0)
    z = (total - total.mean(axis=0)) / total.std(axis=0)
    annotate(embedded, markers)
    expected = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(embedded.obsm["stalign_annotation_score"], expected, atol=1e-3)


def test_gene_only_and_image_only(slide, tiny, markers):
    for modality, missing in (("gene", "image"), ("image", "gene")):
        adata = sta.tl.embed(slide, model=tiny, modalities=(modality,), progress=False, copy=True)
        annotate(adata, markers, model=tiny)
        assert adata.uns["stalign"]["annotation"]["sides"] == [modality]
        before = adata.copy()
        with pytest.raises(KeyError, match=rf"X_stalign_{missing}'\]` is missing: the slide was embedded without"):
            annotate(adata, markers, model=tiny, modality=missing)
        assert names(adata).tolist() == names(before).tolist()


def test_threshold(embedded, markers):
    annotate(embedded, markers)
    confidence = embedded.obs["stalign_annotation_confidence"].to_numpy()
    certain = names(embedded)
    cut = float(np.median(confidence))
    annotate(embedded, markers, threshold=cut)
    column = embedded.obs["stalign_annotation"]
    assert list(column.cat.categories) == [*markers, "unassigned"]
    np.testing.assert_array_equal(names(embedded), np.where(confidence < cut, "unassigned", certain))
    assert embedded.uns["stalign"]["annotation"]["threshold"] == cut
    annotate(embedded, markers, threshold=0.0)
    assert list(embedded.obs["stalign_annotation"].cat.categories) == list(markers)


def test_temperature_changes_no_name(embedded, markers):
    annotate(embedded, markers)
    certain, confidence = names(embedded), embedded.obs["stalign_annotation_confidence"].to_numpy()
    annotate(embedded, markers, temperature=0.1)
    np.testing.assert_array_equal(names(embedded), certain)
    assert (embedded.obs["stalign_annotation_confidence"] >= confidence - 1e-6).all()


def test_order_of_spots(embedded, markers):
    order = np.random.default_rng(0).permutation(embedded.n_obs)
    shuffled = embedded[order].copy()
    annotate(embedded, markers)
    annotate(shuffled, markers)
    np.testing.assert_allclose(
        shuffled.obsm["stalign_annotation_score"], embedded.obsm["stalign_annotation_score"].iloc[order], atol=1e-3
    )


def test_libraries_are_as_alone(two_libraries, make_planted, tiny, markers):
    sta.tl.embed(two_libraries, model=tiny, library_key="library", progress=False)
    annotate(two_libraries, markers, model=tiny)
    alone = make_planted("A", seed=1)
    sta.tl.embed(alone, model=tiny, progress=False)
    annotate(alone, markers, model=tiny)
    together = two_libraries.obsm["stalign_annotation_score"].loc[alone.obs_names]
    np.testing.assert_allclose(together, alone.obsm["stalign_annotation_score"], atol=1e-3)


def test_library_without_image_is_unassigned_by_image(two_libraries, tiny, markers, caplog):
    two_libraries.uns["spatial"]["B"]["images"] = {}
    sta.tl.embed(two_libraries, model=tiny, library_key="library", progress=False)
    annotate(two_libraries, markers, model=tiny, modality="image")
    inside = (two_libraries.obs["library"] == "A").to_numpy()
    assert set(names(two_libraries)[~inside]) == {"unassigned"}
    assert "unassigned" not in names(two_libraries)[inside]
    assert np.isnan(two_libraries.obsm["stalign_annotation_score"][~inside]).all(axis=None)
    assert two_libraries.obs["stalign_annotation_confidence"][~inside].isna().all()
    assert "63 spots lack the modality" in caplog.text
    annotate(two_libraries, markers, model=tiny)  # fused: by the side that is there
    assert "unassigned" not in names(two_libraries)


def test_mouse_markers_of_a_mouse_slide(slide, tiny):
    slide.var_names = [name.capitalize() for name in slide.var_names]
    sta.tl.embed(slide, model=tiny, organism="mouse", progress=False)
    annotate(slide, {"immune": ["Cd3e", "Ptprc"], "stroma": ["Col1a1"]}, model=tiny, modality="gene")
    assert slide.uns["stalign"]["annotation"]["markers"] == ["CD3E, PTPRC", "COL1A1"]


# --- an annotated reference --------------------------------------------------------------------------------------


def test_prototypes_by_hand():
    reference = bare([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], kind=["a", "a", "b", "b"])
    query = bare([[5, 1], [1, 5], [5, 2], [2, 6]])
    annotate(query, "kind", reference=reference, temperature=1.0)
    assert names(query).tolist() == ["a", "b", "a", "b"]
    record = query.uns["stalign"]["annotation"]
    assert record["source"] == "reference"
    assert record["label_key"] == "kind"
    assert record["labels"] == ["a", "b"]
    assert record["n_reference"].tolist() == [2, 2]
    X = reference.obsm["X_stalign"] - reference.obsm["X_stalign"].mean(axis=0)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    prototypes = np.stack([X[:2].mean(axis=0), X[2:].mean(axis=0)])
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    Q = query.obsm["X_stalign"] - query.obsm["X_stalign"].mean(axis=0)
    cosine = Q / np.linalg.norm(Q, axis=1, keepdims=True) @ prototypes.T
    z = (cosine - cosine.mean(axis=0)) / cosine.std(axis=0)
    expected = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(query.obsm["stalign_annotation_score"], expected, atol=1e-5)


def test_shift_between_slides_does_not_matter():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    values = np.eye(3, 6)[labels] + 0.1 * rng.normal(size=(90, 6))
    reference = bare(values, kind=pd.Categorical.from_codes(labels, ["z", "y", "x"]))
    query = bare(values + 7 * rng.normal(size=6))
    annotate(query, label_key="kind", reference=reference)
    assert list(query.obs["stalign_annotation"].cat.categories) == ["z", "y", "x"]  # as in the reference
    assert names(query).tolist() == reference.obs["kind"].astype(str).tolist()


@pytest.mark.parametrize("modality", ["fused", "image", "gene"])
def test_planted_reference(embedded, make_planted, snapshot, modality):
    reference = make_planted("R", seed=5)
    before = snapshot(reference)
    annotate(embedded, "truth", reference=reference, modality=modality)
    assert accuracy(embedded) > 0.9
    assert snapshot(reference) == before  # embedded on the side


def test_embedded_reference_gives_the_same(embedded, make_planted, tiny_folder):
    reference = make_planted("R", seed=5)
    annotate(embedded, "truth", reference=reference, key_added="aside")
    sta.tl.embed(reference, model=tiny_folder, progress=False)
    annotate(embedded, "truth", reference=reference, key_added="before")
    np.testing.assert_allclose(embedded.obsm["aside_score"], embedded.obsm["before_score"], atol=1e-4)


def test_reference_of_another_model_is_embedded_again(embedded, make_planted, make_tiny, snapshot, caplog):
    reference = make_planted("R", seed=5)
    sta.tl.embed(reference, model=make_tiny(3), progress=False)
    before = snapshot(reference)
    annotate(embedded, "truth", reference=reference)
    assert accuracy(embedded) > 0.9
    assert "not embedded by the query's model" in caplog.text
    assert snapshot(reference) == before


def test_unlabelled_spots_of_the_reference_are_left_out(embedded, make_planted):
    reference = make_planted("R", seed=5)
    full = reference.copy()
    reference.obs["truth"] = reference.obs["truth"].where(np.arange(120) % 3 > 0)
    annotate(embedded, "truth", reference=reference)
    assert accuracy(embedded) > 0.9
    assert sum(embedded.uns["stalign"]["annotation"]["n_reference"]) == 80
    full.obs["truth"] = full.obs["truth"].where(full.obs["truth"] != "immune")
    annotate(embedded, "truth", reference=full)
    assert embedded.uns["stalign"]["annotation"]["labels"] == ["tumour", "stroma"]


# --- elsewhere ---------------------------------------------------------------------------------------------------


def test_copy_and_key_added(embedded, markers, snapshot):
    before = snapshot(embedded)
    result = annotate(embedded, markers, key_added="kind", copy=True)
    assert snapshot(embedded) == before
    assert {"kind", "kind_confidence"} <= set(result.obs)
    assert "kind_score" in result.obsm
    assert result.uns["stalign"]["annotation"]["key_added"] == "kind"


@pytest.mark.filterwarnings("ignore:.*[Ss]lash.*", "ignore::FutureWarning")
def test_round_trip(embedded, markers, tmp_path):
    labels = {**markers, "T/NK cells": ["CD3E", "CD2"]}  # a slash is a path in HDF5
    annotate(embedded, labels, threshold=0.3)
    embedded.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert names(back).tolist() == names(embedded).tolist()
    assert list(back.obs["stalign_annotation"].cat.categories) == list(
        embedded.obs["stalign_annotation"].cat.categories
    )
    pd.testing.assert_frame_equal(back.obsm["stalign_annotation_score"], embedded.obsm["stalign_annotation_score"])
    record, expected = back.uns["stalign"]["annotation"], embedded.uns["stalign"]["annotation"]
    assert set(record) == set(expected)
    assert list(record["labels"]) == expected["labels"]
    assert list(record["markers"]) == expected["markers"]
    annotate(back, labels, threshold=0.3)
    assert names(back).tolist() == names(embedded).tolist()


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((), {}, ValueError, r"labels is missing: pass a dict of marker genes, or `reference"),
        (({},), {}, ValueError, "labels is empty"),
        ((["ERBB2"],), {}, TypeError, r"must be a dict of marker genes by label, got list.*Example"),
        (("truth",), {}, ValueError, r"column 'truth' of which AnnData\? Pass `reference"),
        (({"a": []},), {}, ValueError, "Label 'a' has no markers"),
        (
            ({"a": ["CD3e2"], "b": ["ERBB2"]},),
            {},
            ValueError,
            r"No marker of label 'a'.*\['CD3e2'\].*'CD3E' for 'CD3e2'",
        ),
        (({"unassigned": ["ERBB2"]},), {}, ValueError, r"'unassigned' cannot be a label.*Rename"),
        (({"a": ["ERBB2"]},), {"modality": "genes"}, ValueError, r"modality must be one of .*'genes'.*mean 'gene'"),
        (({"a": ["ERBB2"]},), {"threshold": 1.5}, ValueError, r"threshold must be a share between 0 and 1, got 1\.5"),
        (({"a": ["ERBB2"]},), {"temperature": 0}, ValueError, "temperature must be a positive number, got 0"),
        (({"a": ["ERBB2"]},), {"use_rep": "X_other"}, KeyError, r"'X_other_gene'\]` is missing: run `sta\.tl\.embed"),
        (({"a": ["ERBB2"]},), {"library_key": "slide"}, KeyError, r"'slide' not found in `adata\.obs`.*'library'"),
        (({"a": ["ERBB2"]},), {"label_key": "truth"}, ValueError, "column 'truth' of which AnnData"),
    ],
)
def test_bad_arguments(embedded, snapshot, args, kwargs, error, message):
    before = snapshot(embedded)
    with pytest.raises(error, match=message):
        annotate(embedded, *args, **kwargs)
    assert snapshot(embedded) == before


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((), {}, ValueError, r"Which column of `reference\.obs` holds the labels\? Pass `label_key"),
        (("kind",), {}, KeyError, r"'kind' not found in `reference\.obs`.*Available: .*'truth'"),
        ((), {"label_key": "nothing"}, ValueError, r"`reference\.obs\['nothing'\]` holds no label: all 120"),
        (("truth",), {"label_key": "library"}, ValueError, r"labels='truth' and label_key='library' name two columns"),
        (({"a": ["ERBB2"]},), {}, TypeError, r"With a reference, labels is the name of a column .*got dict"),
    ],
)
def test_bad_references(embedded, make_planted, snapshot, args, kwargs, error, message):
    reference = make_planted("R")
    reference.obs["nothing"] = np.nan
    before = snapshot(embedded), snapshot(reference)
    with pytest.raises(error, match=message):
        annotate(embedded, *args, reference=reference, **kwargs)
    assert (snapshot(embedded), snapshot(reference)) == before


def test_another_model(embedded, make_tiny, markers, snapshot):
    before = snapshot(embedded)
    with pytest.raises(ValueError, match=r"was made by 'tiny' \(SHA-256 .*but the model is 'tiny' \(SHA-256"):
        annotate(embedded, markers, model=make_tiny(3))
    assert snapshot(embedded) == before


def test_model_that_was_never_saved(slide, tiny, markers):
    sta.tl.embed(slide, model=tiny, progress=False)
    with pytest.raises(ValueError, match=r"model in memory, 'tiny' .*never saved.*model="):
        annotate(slide, markers)
    annotate(slide, markers, model=tiny)


def test_embedding_that_names_no_model(embedded, markers, tiny, snapshot):
    del embedded.uns["stalign"]["embed"]
    before = snapshot(embedded)
    with pytest.raises(ValueError, match=r"\['embed'\]`, which names the model.*is missing.*model="):
        annotate(embedded, markers)
    assert snapshot(embedded) == before
    annotate(embedded, markers, model=tiny)


def test_failing_midway(embedded, make_planted, markers, monkeypatch, snapshot):
    before = snapshot(embedded)
    monkeypatch.setattr(_annotate, "shares", lambda logits, temperature: 1 / 0)
    for args, kwargs in (((markers,), {}), (("truth",), {"reference": make_planted("R")})):
        with pytest.raises(ZeroDivisionError):
            annotate(embedded, *args, **kwargs)
    assert snapshot(embedded) == before


def test_mean_of_the_sides_that_are_there():
    a, b = np.array([[1.0, 3], [np.nan, np.nan], [np.nan, np.nan]]), np.array([[3.0, 5], [2, 4], [np.nan, np.nan]])
    np.testing.assert_array_equal(_annotate._mean_of_present([a, b]), [[2, 4], [2, 4], [np.nan, np.nan]])


def test_standardise_by_library():
    scores = np.array([[1.0, 5], [3, 5], [10, 0], [30, 1], [np.nan, np.nan]])
    result = _annotate.standardise(scores, np.array([0, 0, 1, 1, 1]))
    np.testing.assert_array_equal(result, [[-1, 0], [1, 0], [-1, -1], [1, 1], [np.nan, np.nan]])
