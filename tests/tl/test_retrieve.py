from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import stalign as sta
from stalign.tl import _neighbours

retrieve = sta.tl.retrieve


def pair(image: np.ndarray, gene: np.ndarray) -> ad.AnnData:
    adata = ad.AnnData(obs=pd.DataFrame(index=[f"s{i}" for i in range(len(image))]))
    adata.obsm["X_stalign_image"] = np.asarray(image, dtype=np.float32)
    adata.obsm["X_stalign_gene"] = np.asarray(gene, dtype=np.float32)
    return adata


def test_by_hand():
    """Genes of spots 0, 1, 2 point to 0°, 90°, 180°; the images to 10°, 170° and 100°."""
    gene = np.array([[1, 0], [0, 2], [-3, 0]])
    angle = np.deg2rad([10, 170, 100])
    adata = pair(np.column_stack([np.cos(angle), np.sin(angle)]), gene)
    found = retrieve(adata, adata, k=2)
    np.testing.assert_array_equal(found.indices, [[0, 1], [2, 1], [1, 2]])
    np.testing.assert_allclose(found.scores, np.cos(np.deg2rad([[10, 80], [10, 80], [10, 80]])), atol=1e-6)
    assert found.indices.dtype == np.int64
    assert found.scores.dtype == np.float32
    assert found.recall == pytest.approx(1.0)  # own spots 0, 1, 2 are first, second, second
    assert retrieve(adata, adata, k=1).recall == pytest.approx(1 / 3)
    back = retrieve(adata, adata, k=1, direction="gene->image")
    np.testing.assert_array_equal(back.indices[:, 0], [0, 2, 1])
    assert back.recall == pytest.approx(1 / 3)


def test_recall_of_a_permutation():
    rng = np.random.default_rng(0)
    gene = rng.normal(size=(200, 16))
    own = rng.random(200) < 0.4
    image = gene.copy()
    others = np.flatnonzero(~own)
    image[others] = gene[np.roll(others, 1)]  # belongs to another spot
    adata = pair(image, gene)
    found = retrieve(pair(image, gene), adata, k=1)
    assert found.recall is None  # two objects
    np.testing.assert_array_equal(found.indices[own, 0], np.flatnonzero(own))
    np.testing.assert_array_equal(found.indices[others, 0], np.roll(others, 1))
    assert retrieve(adata, adata, k=1).recall == pytest.approx(own.mean())
    assert retrieve(adata, adata, k=200).recall == 1.0


def test_chance():
    rng = np.random.default_rng(1)
    adata = pair(rng.normal(size=(600, 8)), rng.normal(size=(600, 8)))
    assert retrieve(adata, adata, k=60).recall == pytest.approx(0.1, abs=0.04)


def test_spots_that_lack_a_side():
    rng = np.random.default_rng(2)
    gene = rng.normal(size=(10, 4))
    query, reference = pair(gene, gene), pair(gene, gene)
    query.obsm["X_stalign_image"][3] = np.nan
    reference.obsm["X_stalign_gene"][5] = np.nan
    found = retrieve(query, reference, k=9)
    assert (found.indices[3] == -1).all()
    assert np.isnan(found.scores[3]).all()
    rest = np.delete(found.indices, 3, axis=0)
    assert 5 not in rest
    assert sorted(rest[0]) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"k is 10, but the reference has 9 spots with the gene side\. Lower k"):
        retrieve(query, reference, k=10)
    both = pair(query.obsm["X_stalign_image"], reference.obsm["X_stalign_gene"])
    assert retrieve(both, both, k=1).recall == 1.0  # of the eight that have both


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    queries, keys = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(70, 8)).astype(np.float32)
    whole = _neighbours.nearest(queries, keys, 12)
    order = np.argsort(-(queries @ keys.T), axis=1)[:, :12]
    np.testing.assert_array_equal(whole.indices, order)
    monkeypatch.setattr(_neighbours, "_QUERY_BLOCK", 7)
    monkeypatch.setattr(_neighbours, "_KEY_BLOCK", 5)
    parts = _neighbours.nearest(queries, keys, 12)
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-6)


def test_after_embed(embedded, make_planted, tiny_folder, snapshot):
    reference = make_planted("R", seed=5)
    sta.tl.embed(reference, model=tiny_folder, progress=False)
    before = snapshot(embedded), snapshot(reference)
    found = retrieve(embedded, reference, k=5)
    assert isinstance(found, sta.tl.Retrieval)
    assert found.indices.shape == found.scores.shape == (120, 5)
    assert (np.diff(found.scores, axis=1) <= 1e-6).all()
    assert (snapshot(embedded), snapshot(reference)) == before


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"direction": "gene>image"},
            ValueError,
            r"direction must be one of .*'gene>image'.*Did you mean 'gene->image'",
        ),
        ({"k": 0}, ValueError, "k must be a positive integer, got 0"),
        ({"k": 121}, ValueError, "k is 121, but the reference has 120 spots"),
        (
            {"use_rep": "X_other"},
            KeyError,
            r"`query\.obsm\['X_other_image'\]` is missing: run `sta\.tl\.embed\(query\)`",
        ),
    ],
)
def test_bad_arguments(embedded, kwargs, error, message):
    with pytest.raises(error, match=message):
        retrieve(embedded, embedded, **kwargs)


def test_two_models(embedded, make_planted, make_tiny):
    reference = make_planted("R")
    sta.tl.embed(reference, model=make_tiny(3), progress=False)
    with pytest.raises(ValueError, match=r"`query` was embedded by 'tiny' .*`reference` by 'tiny' .*nothing in common"):
        retrieve(embedded, reference)


def test_no_record_is_taken_on_trust(embedded, caplog):
    other = embedded.copy()
    del other.uns["stalign"]
    retrieve(embedded, other)
    assert "`reference` does not record which model embedded it" in caplog.text


def test_missing_side(slide, tiny, embedded):
    sta.tl.embed(slide, model=tiny, modalities=("image",), progress=False)
    with pytest.raises(KeyError, match=r"`reference\.obsm\['X_stalign_gene'\]` is missing.*without raw counts"):
        retrieve(embedded, slide)
