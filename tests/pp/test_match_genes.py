from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from stalign.genes import protein_coding_genes
from stalign.genes._tables import orthologs
from stalign.pp._genes import match_genes, resolve_genes

VOCABULARY = ["TP53", "JPT1", "SELENOM", "EGFR", "ERBB2"]


def section(names, **var) -> ad.AnnData:
    X = sparse.csr_matrix(np.arange(1, 3 * len(names) + 1, dtype=np.float32).reshape(3, -1))
    return ad.AnnData(X, var=pd.DataFrame(var, index=pd.Index(names, dtype=object)))


def snapshot(adata):
    return adata.var.copy(), list(adata.uns), adata.X.toarray().copy()


def assert_unchanged(adata, before):
    pd.testing.assert_frame_equal(adata.var, before[0])
    assert list(adata.uns) == before[1]
    np.testing.assert_array_equal(adata.X.toarray(), before[2])


@pytest.fixture
def adata():
    return section(["TP53", "HN1", "JPT1", "SELM", "ENSG00000146648.19", "unknown"])


def test_writes_symbols_and_report(adata):
    assert match_genes(adata, model=VOCABULARY) is None
    assert adata.var["stalign_gene"].tolist() == ["TP53", "JPT1", "JPT1", "SELENOM", "EGFR", ""]
    report = adata.uns["stalign"]["genes"]
    assert (report["n_vars"], report["n_matched"]) == (6, 5)
    assert (report["n_vocabulary"], report["n_covered"], report["coverage"]) == (5, 4, 0.8)
    assert report["how"] == {"symbol": 2, "previous": 1, "alias": 1, "ensembl": 1, "ortholog": 0}
    assert report["unmatched"].tolist() == ["unknown"]
    assert report["summed"].tolist() == ["JPT1 = HN1 + JPT1"]
    total, unmatched = np.arange(1, 19).sum(), 6 + 12 + 18
    assert report["share_of_counts"] == pytest.approx(1 - unmatched / total)
    assert report["params"]["organism"] == "human"


def test_survives_a_file(adata, tmp_path):
    match_genes(adata, model=VOCABULARY)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert back.var["stalign_gene"].tolist() == adata.var["stalign_gene"].tolist()
    report, expected = back.uns["stalign"]["genes"], adata.uns["stalign"]["genes"]
    assert report["coverage"] == expected["coverage"]
    assert list(report["ambiguous"]) == []
    assert list(report["summed"]) == list(expected["summed"])
    # What was chosen is found again.
    assert resolve_genes(back, VOCABULARY).n_matched == 5


def test_keeps_other_results(adata):
    adata.uns["stalign"] = {"niche": {"params": {}}}
    match_genes(adata, model=VOCABULARY)
    assert set(adata.uns["stalign"]) == {"niche", "genes"}


def test_copy_and_key(adata):
    before = snapshot(adata)
    result = match_genes(adata, model=VOCABULARY, key_added="gene", copy=True)
    assert_unchanged(adata, before)
    assert result.var["gene"].iloc[0] == "TP53"
    assert result.uns["stalign"]["genes"]["params"]["key_added"] == "gene"


def test_gene_symbols_column():
    adata = section(["a", "b"], name=["HN1", "TP53"])
    match_genes(adata, model=VOCABULARY, gene_symbols="name")
    assert adata.var["stalign_gene"].tolist() == ["JPT1", "TP53"]
    # Later calls without arguments use the same column.
    assert resolve_genes(adata, VOCABULARY).genes.tolist() == ["JPT1", "TP53"]
    assert resolve_genes(adata, ["HN1"]).genes.tolist() == ["HN1", ""]


def test_categorical_symbols_with_gaps():
    adata = section(["a", "b"], name=pd.Categorical(["HN1", None]))
    match_genes(adata, model=VOCABULARY, gene_symbols="name")
    assert adata.var["stalign_gene"].tolist() == ["JPT1", ""]


@pytest.mark.parametrize("column", ["gene_id", "gene_ids", "Ensembl_ID"])
def test_id_column_helps_where_the_symbol_does_not(column):
    adata = section(["SEPT2", "x", "TP53"], **{column: ["ENSG00000168385", "ENSG00000146648", "ENSG00000146648"]})
    match_genes(adata, model=["SEPTIN2", "SEPTIN6", "EGFR", "TP53"])
    assert adata.var["stalign_gene"].tolist() == ["SEPTIN2", "EGFR", "TP53"]


def test_ids_in_var_names_beside_symbols():
    adata = section(["ENSG00000168385.3", "ENSG00000146648"], name=["SEPT2", "x"])
    match_genes(adata, model=["SEPTIN2", "SEPTIN6", "EGFR"], gene_symbols="name")
    assert adata.var["stalign_gene"].tolist() == ["SEPTIN2", "EGFR"]


def test_loaded_model_and_bundled_name(adata, monkeypatch):
    class Model:
        genes = tuple(VOCABULARY)

    match_genes(adata, model=Model())
    assert adata.uns["stalign"]["genes"]["params"]["model"] == "Model"
    import stalign.models

    monkeypatch.setattr(stalign.models, "vocabulary", lambda name: tuple(VOCABULARY))
    match_genes(adata)
    assert adata.uns["stalign"]["genes"]["params"]["model"] == "stalign-mini"
    with pytest.raises(TypeError, match="model must be"):
        match_genes(adata, model=3)


def test_mouse_is_refused_and_hinted_at():
    names = list(orthologs().exact)[1000:1600]
    adata = section(names)
    before = snapshot(adata)
    vocabulary = protein_coding_genes()
    with pytest.raises(ValueError, match=r"cover \d+ of the \d+ genes.*First unmatched names: \['.*organism='mouse'"):
        match_genes(adata, model=vocabulary)
    assert_unchanged(adata, before)
    with pytest.warns(UserWarning, match="genes that the model knows"):
        match_genes(adata, model=vocabulary, organism="mouse")
    assert adata.uns["stalign"]["genes"]["how"]["ortholog"] > 500
    with pytest.warns(UserWarning, match="genes that the model knows"):
        assert resolve_genes(adata, vocabulary).n_matched > 500


@pytest.mark.parametrize(
    ("names", "kwargs", "message"),
    [
        (["ENSMUSG00000029580", "ENSMUSG00000029581"], {}, "mouse Ensembl ids"),
        (["AAACCCTTTGGG-1", "AAACCCTTTGGC-1"], {}, r"no gene names.*gene_symbols.*\['name'\].*`gene_symbols='name'`"),
        (["0", "1"], {}, r"no gene names.*gene_symbols='name'"),
        (["ASDF", "QWER"], {"organism": "mouse"}, "look like human"),
        (["foo_1", "bar_2"], {}, "gene_symbols='name'"),
    ],
)
def test_hints(names, kwargs, message):
    adata = section(names, name=["TP53", "EGFR"])
    before = snapshot(adata)
    with pytest.raises(ValueError, match=message):
        match_genes(adata, model=VOCABULARY, **kwargs)
    assert_unchanged(adata, before)


def test_floor():
    vocabulary = list(protein_coding_genes())
    few = section(vocabulary[:49])
    with pytest.raises(ValueError, match="at least 50 genes or 5%"):
        match_genes(few, model=vocabulary)
    with pytest.warns(UserWarning, match=r"cover 49 of"):
        match_genes(few, model=vocabulary, min_genes=10)
    # The floor that was set holds for later calls.
    with pytest.warns(UserWarning, match=r"cover 49 of"):
        resolve_genes(few, vocabulary)
    with pytest.warns(UserWarning, match=r"cover 300 of"):
        match_genes(section(vocabulary[:300]), model=vocabulary)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match_genes(section(vocabulary[:6000]), model=vocabulary)


def test_share_of_counts_needs_counts(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.3
    match_genes(adata, model=VOCABULARY)
    assert np.isnan(adata.uns["stalign"]["genes"]["share_of_counts"])
    match_genes(adata, model=VOCABULARY, layer="counts")
    assert 0 < adata.uns["stalign"]["genes"]["share_of_counts"] < 1
    adata.X = None
    match_genes(adata, model=VOCABULARY)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"organism": "rat"}, ValueError, "organism"),
        ({"gene_symbols": "nmae"}, KeyError, r"nmae.*adata\.var.*name"),
        ({"layer": "counts"}, KeyError, r"counts.*adata\.layers"),
        ({"min_genes": 0}, ValueError, "min_genes"),
        ({"min_coverage": 2}, ValueError, "min_coverage"),
        ({"model": []}, ValueError, "vocabulary is empty"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    adata = section(["TP53", "EGFR"], name=["TP53", "EGFR"])
    before = snapshot(adata)
    with pytest.raises(error, match=message):
        match_genes(adata, **{"model": VOCABULARY, **kwargs})
    assert_unchanged(adata, before)


def test_not_an_anndata():
    with pytest.raises(TypeError, match="AnnData"):
        match_genes(np.zeros((2, 2)), model=VOCABULARY)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "n_matched"), [("her2st/C1", 15_000), ("dlpfc/151510", 480), ("crc_visium/CRC_16", 19_000)]
)
@pytest.mark.filterwarnings("ignore:The data cover")
def test_real_sections(shared, name, n_matched):
    adata = ad.read_h5ad(shared / "data" / f"{name}.h5ad")
    match_genes(adata, model=protein_coding_genes())
    report = adata.uns["stalign"]["genes"]
    assert report["n_matched"] >= n_matched
    assert report["share_of_counts"] > 0.9
    if name == "her2st/C1":
        assert adata.var.loc[["HN1", "SELM"], "stalign_gene"].tolist() == ["JPT1", "SELENOM"]
