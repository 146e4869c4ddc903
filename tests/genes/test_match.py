from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest

from stalign.genes import GeneMatch, match_names
from stalign.genes._build import build_tables
from stalign.genes._tables import DATA, HGNC_FILE, ORTHOLOGS_FILE, hgnc, orthologs

ENSG = {"TP53": "ENSG00000141510", "EGFR": "ENSG00000146648", "JPT1": "ENSG00000189159"}


def one(name: str, vocabulary: list[str], **kwargs) -> tuple[str, str]:
    match = match_names([name], vocabulary, **kwargs)
    return match.genes[0], match.how[0]


@pytest.mark.parametrize(
    ("name", "gene", "how"),
    [
        ("TP53", "TP53", "symbol"),
        (" TP53 ", "TP53", "symbol"),
        ("HN1", "JPT1", "previous"),
        ("SELM", "SELENOM", "alias"),
        ("HER2", "ERBB2", "alias"),
        ("P53", "TP53", "alias"),
        ("C1ORF43", "C1orf43", "symbol"),
        ("c1orf43", "C1orf43", ""),
        ("tp53", "TP53", ""),
        ("ENSG00000141510", "TP53", "ensembl"),
        ("ENSG00000141510.17", "TP53", "ensembl"),
        ("ENSG00000141510.17_PAR_Y", "TP53", "ensembl"),
        ("ENSG0000014151", "TP53", ""),
        ("ENSG00000141510x", "TP53", ""),
        ("notagene", "TP53", ""),
        ("", "TP53", ""),
    ],
)
def test_human_names(name, gene, how):
    assert one(name, [gene]) == (gene if how else "", how)


def test_order_and_kinds_in_a_vocabulary():
    match = match_names(["HN1", "TP53", "ENSG00000146648.19", "nothing"], ["EGFR", "JPT1"])
    assert match.index.tolist() == [1, -1, 0, -1]
    assert match.index.dtype == np.intp
    assert match.how.tolist() == ["previous", "", "ensembl", ""]
    assert match.genes.tolist() == ["JPT1", "", "EGFR", ""]
    assert (match.n_matched, match.n_covered, match.coverage) == (2, 2, 1.0)


def test_shared_alias_is_not_used():
    # SEPT2 is a previous symbol of SEPTIN2 and an alias of SEPTIN6.
    match = match_names(["SEPT2"], ["SEPTIN2", "SEPTIN6"])
    assert match.index.tolist() == [-1]
    assert match.how.tolist() == ["ambiguous"]
    assert match.report()["n_ambiguous"] == 1
    assert match.report()["ambiguous"].tolist() == ["SEPT2"]


def test_ensembl_id_settles_a_shared_alias():
    match = match_names(["SEPT2", "SEPT2"], ["SEPTIN2", "SEPTIN6"], ensembl=["ENSG00000168385.5", None])
    assert match.genes.tolist() == ["SEPTIN2", ""]
    assert match.how.tolist() == ["ensembl", "ambiguous"]


def test_ensembl_id_outranks_a_synonym_but_not_a_symbol():
    vocabulary = ["JPT1", "TP53", "EGFR"]
    assert one("HN1", vocabulary, ensembl=[ENSG["EGFR"]]) == ("EGFR", "ensembl")
    assert one("HN1", vocabulary, ensembl=[ENSG["JPT1"]]) == ("JPT1", "previous")
    assert one("HN1", vocabulary, ensembl=["ENSG99999999999"]) == ("JPT1", "previous")
    assert one("TP53", vocabulary, ensembl=[ENSG["EGFR"]]) == ("TP53", "symbol")


def test_ensembl_column_may_have_gaps():
    ids = pd.Series([None, np.nan, ENSG["TP53"]])
    assert match_names(["x", "y", "z"], ["TP53"], ensembl=ids).genes.tolist() == ["", "", "TP53"]


def test_approved_symbol_beats_alias():
    table = hgnc()
    assert not set(table.symbol) & (set(table.previous) | set(table.alias))
    # HGNC gives the alias AGT to AGXT; the approved symbol AGT means angiotensinogen.
    assert one("AGT", ["AGXT"]) == ("", "")
    assert one("AGT", ["AGXT", "AGT"]) == ("AGT", "symbol")


def test_old_symbols_in_the_vocabulary():
    assert one("JPT1", ["HN1"]) == ("HN1", "previous")
    assert one(ENSG["JPT1"], ["HN1"]) == ("HN1", "ensembl")
    # The same string wins; any other name of the gene goes to the approved symbol.
    match = match_names(["HN1", "JPT1", ENSG["JPT1"]], ["HN1", "JPT1"])
    assert match.genes.tolist() == ["HN1", "JPT1", "JPT1"]


def test_exact_string_wins_even_where_it_is_shared():
    assert one("SEPT2", ["SEPTIN2", "SEPT2"]) == ("SEPT2", "symbol")
    assert one("<pad>", ["<pad>", "TP53"]) == ("<pad>", "symbol")


def test_mouse_only_when_asked():
    names = ["Actb", "Erbb2", "mt-Co1", "Zfp612"]
    vocabulary = ["ACTB", "ERBB2", "MT-CO1", "ZNF23"]
    assert match_names(names, vocabulary).n_matched == 0
    match = match_names(names[:3], vocabulary, organism="mouse")
    assert match.genes.tolist() == ["ACTB", "ERBB2", "MT-CO1"]
    assert set(match.how) == {"ortholog"}
    assert one("ENSMUSG00000029580", vocabulary) == ("", "")
    assert one("ENSMUSG00000029580", vocabulary, organism="mouse") == ("", "")


def test_mouse_case_and_old_human_vocabulary():
    assert one("ACTB", ["ACTG1"], organism="mouse") == ("", "")
    assert one("ERBB2", ["ERBB2"], organism="mouse") == ("ERBB2", "symbol")
    assert one("erbb2", ["ERBB2"], organism="mouse") == ("ERBB2", "ortholog")
    assert one("Jpt1", ["HN1"], organism="mouse") == ("HN1", "ortholog")


def test_mouse_names_hardly_match_as_human():
    mouse = list(orthologs().exact)
    match = match_names(mouse, list(hgnc().symbols))
    # What is left are names spelled alike in both, such as F3 and C3.
    assert match.n_matched < 20
    assert set(match.genes[match.matched]) <= set(mouse)


def test_sums_are_reported():
    match = match_names(["JPT1", "TP53", "HN1", ENSG["JPT1"]], ["TP53", "JPT1", "EGFR"])
    assert match.summed() == {"JPT1": ["JPT1", "HN1", ENSG["JPT1"]]}
    assert match.names_per_gene.tolist() == [1, 3, 0]
    report = match.report()
    assert report["n_summed"] == 1
    assert report["summed"].tolist() == ["JPT1 = JPT1 + HN1 + ENSG00000189159"]
    assert report["how"] == {"symbol": 2, "previous": 1, "alias": 0, "ensembl": 1, "ortholog": 0}
    assert (report["n_names"], report["n_vocabulary"], report["n_covered"]) == (4, 3, 2)


def test_report_lists_only_the_first():
    report = match_names([f"x{i}" for i in range(50)], ["TP53"]).report(limit=3)
    assert report["n_unmatched"] == 50
    assert report["unmatched"].tolist() == ["x0", "x1", "x2"]


def test_selector():
    selector = match_names(["HN1", "x", "JPT1", "TP53"], ["TP53", "EGFR", "JPT1"]).selector()
    assert selector.format == "csr"
    assert selector.dtype == np.float32
    np.testing.assert_array_equal(selector.toarray(), [[0, 0, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("names", "vocabulary", "kwargs", "error", "message"),
    [
        (["TP53"], [], {}, ValueError, "vocabulary is empty"),
        (["TP53"], ["TP53", "TP53"], {}, ValueError, "TP53"),
        (["TP53"], ["TP53", ""], {}, ValueError, "empty"),
        ("TP53", ["TP53"], {}, TypeError, "single string"),
        (["TP53"], "TP53", {}, TypeError, "single string"),
        (["TP53"], ["TP53"], {"ensembl": []}, ValueError, "0 ids for 1 names"),
        (["TP53"], ["TP53"], {"organism": "rat"}, ValueError, "human"),
    ],
)
def test_bad_input(names, vocabulary, kwargs, error, message):
    with pytest.raises(error, match=message):
        match_names(names, vocabulary, **kwargs)


def test_no_names():
    match = match_names([], ["TP53"])
    assert isinstance(match, GeneMatch)
    assert match.selector().shape == (0, 1)
    assert match.report()["n_matched"] == 0


def test_fast():
    table = hgnc()
    names = (table.symbols + list(table.previous))[:36_601]
    start = time.perf_counter()
    match_names(names, table.symbols)
    assert time.perf_counter() - start < 1.0  # about 0.1 s; the slack is for busy machines


def test_package_tables_come_from_the_sources(shared, tmp_path):
    build_tables(shared / "data" / "hgnc.tsv.gz", shared / "data" / "mouse_human_orthologs.tsv.gz", tmp_path)
    for name in (HGNC_FILE, ORTHOLOGS_FILE):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_every_synonym_of_hgnc(shared):
    """Against a plain reading of the table: unshared synonyms go to their gene, shared ones nowhere."""
    table = pd.read_csv(shared / "data" / "hgnc.tsv.gz", sep="\t", dtype=str, keep_default_na=False)
    long = pd.concat(
        table[["symbol", column]].assign(name=table[column].str.split("|")).explode("name")[["symbol", "name"]]
        for column in ("prev_symbol", "alias_symbol")
    ).drop_duplicates()
    mouse = set(orthologs().exact)
    long = long[(long["name"] != "") & ~long["name"].isin(table["symbol"]) & ~long["name"].isin(mouse)]
    owners = long.groupby("name")["symbol"].agg(["first", "size"])
    match = match_names(owners.index, table["symbol"])
    expected = owners["first"].where(owners["size"] == 1, "").to_numpy()
    np.testing.assert_array_equal(match.genes, expected)
    assert set(match.how[owners["size"] > 1]) == {"ambiguous"}


@pytest.mark.real
@pytest.mark.parametrize("name", ["her2st/C1", "dlpfc/151510"])
def test_real_sections(shared, name):
    import anndata

    adata = anndata.read_h5ad(shared / "data" / f"{name}.h5ad", backed="r")
    match = match_names(adata.var_names, hgnc().symbols)
    assert match.n_matched > 0.97 * adata.n_vars
    assert match.report()["how"]["previous"] > 0
    adata.file.close()
