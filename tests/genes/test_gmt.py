from __future__ import annotations

import pytest

from stalign.genes._gmt import gene_set_coverage, hallmark, parse_gmt, read_gmt, select_sets

TEXT = "# comment\nFIRST\tnote\tA\tB\tA\n\nSECOND\t\tC\t\tD\t\n"


def test_read(tmp_path):
    file = tmp_path / "sets.gmt"
    file.write_text(TEXT)
    assert read_gmt(file) == {"FIRST": ("A", "B"), "SECOND": ("C", "D")}


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    file = tmp_path / "sets.gmt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT[10:].replace("\n", "\r\n").encode())
    assert read_gmt(file) == {"FIRST": ("A", "B"), "SECOND": ("C", "D")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FIRST\tnote\n", "line 1: gene set 'FIRST' is empty"),
        ("FIRST\tnote\t\t \n", "line 1: gene set 'FIRST' is empty"),
        ("FIRST\tx\tA\nFIRST\tx\tB\n", "line 2: gene set 'FIRST' is there already, in line 1"),
        ("FIRST x A B\n", "line 1: 'FIRST x A B' has no tabs"),
        ("\tnote\tA\n", "line 1: the gene set has no name"),
        ("\n# nothing\n", "holds no gene sets"),
    ],
)
def test_malformed(text, message):
    with pytest.raises(ValueError, match=message):
        parse_gmt(text)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GMT file"):
        read_gmt(tmp_path / "nothing.gmt")
    (tmp_path / "binary.gmt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_gmt(tmp_path / "binary.gmt")


def test_hallmark():
    sets = hallmark()
    assert len(sets) == 25
    assert len({gene for genes in sets.values() for gene in genes}) == 2343
    assert "VEGFA" in sets["HALLMARK_ANGIOGENESIS"]


def test_select():
    chosen = select_sets(hallmark(), ["HALLMARK_HYPOXIA", "HALLMARK_ANGIOGENESIS"])
    assert list(chosen) == ["HALLMARK_HYPOXIA", "HALLMARK_ANGIOGENESIS"]
    with pytest.raises(ValueError, match="Did you mean 'HALLMARK_HYPOXIA'"):
        select_sets(hallmark(), ["HALLMARK_HYPOXA"])
    with pytest.raises(ValueError, match="once each"):
        select_sets(hallmark(), [])


def test_coverage():
    sets = {"first": ("A", "B"), "second": ("B", "C", "D", "E")}
    coverage = gene_set_coverage(sets, ["A", "B", "C", "D"])
    assert coverage == (5, 4, {"first": 1.0, "second": 0.75}, ("E",))
    with pytest.raises(ValueError, match=r"1 of 2 gene sets have less than 80% .* 'second' with 75%"):
        gene_set_coverage(sets, ["A", "B", "C", "D"], minimum=0.8)
