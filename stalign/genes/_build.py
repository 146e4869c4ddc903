"""Make the tables of gene names that ship in ``stalign/genes/_data``.

Run it after a new release of the sources::

    python -m stalign.genes._build hgnc.tsv.gz mouse_human_orthologs.tsv.gz

``hgnc.tsv.gz`` holds the columns ``symbol``, ``locus_group``, ``prev_symbol``, ``alias_symbol`` and ``ensembl_gene_id``
of the HGNC complete set; ``mouse_human_orthologs.tsv.gz`` the one-to-one pairs ``mouse``, ``human`` of MGI's homology
report. The output has no time stamp, so that the same sources give the same bytes. Update ``_data/NOTICE`` with the
date of the snapshot.
"""

from __future__ import annotations

import argparse
import gzip
import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from stalign.genes._tables import DATA, HGNC_FILE, ORTHOLOGS_FILE, unique_owner


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def _write(path: Path, rows: Iterable[tuple[str, ...]]) -> None:
    text = "".join("\t".join(row) + "\n" for row in rows)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    temporary.replace(path)


def _ortholog_pairs(orthologs: pd.DataFrame, hgnc: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (mouse, approved human symbol); MGI's human names are brought to HGNC's."""
    approved = set(hgnc["symbol"])
    synonyms = unique_owner(
        (name, symbol)
        for column in ("prev_symbol", "alias_symbol")
        for symbol, names in zip(hgnc["symbol"], hgnc[column], strict=True)
        for name in names.split("|")
    )
    pairs = []
    for mouse, human in zip(orthologs["mouse"], orthologs["human"], strict=True):
        # MGI writes the human mitochondrial genes without HGNC's prefix: mt-Co1 -> COX1 is MT-CO1.
        mitochondrial = "MT-" + mouse.removeprefix("mt-").upper() if mouse.startswith("mt-") else ""
        candidates = (mitochondrial, human, synonyms.get(human) or "")
        symbol = next((candidate for candidate in candidates if candidate in approved), None)
        if symbol is not None:
            pairs.append((mouse, symbol))
    humans = pd.Series([human for _, human in pairs])
    repeated = set(humans[humans.duplicated(keep=False)])
    return sorted(pair for pair in pairs if pair[1] not in repeated)


def _is_protein_coding(hgnc: pd.DataFrame) -> pd.Series:
    """Protein-coding genes, with those of immunoglobulins and T-cell receptors, which HGNC lists apart."""
    receptor = hgnc["symbol"].str.match(r"(IG[HKL]|TR[ABDG])[ACDEGJMV]") & (hgnc["locus_group"] == "other")
    return (hgnc["locus_group"] == "protein-coding gene") | receptor


def build_tables(hgnc_path: Path, orthologs_path: Path, folder: Path = DATA) -> None:
    """Write the compact HGNC and ortholog tables into ``folder``.

    Left out, because matching never uses them: synonyms that are an approved symbol of some gene (the approved symbol
    is meant) and those that are written like a mouse symbol (``Zfp105``; such names in a section speak of a mouse).
    """
    hgnc, orthologs = _read(hgnc_path), _read(orthologs_path)
    unused = set(hgnc["symbol"]) | set(orthologs["mouse"])

    def kept(names: str) -> str:
        return "|".join(name for name in names.split("|") if name and name not in unused)

    rows = sorted(
        # The species prefix and the leading zeros of the identifier carry nothing: ENSG00000121410 -> 121410.
        (symbol, kept(previous), kept(alias), ensembl.removeprefix("ENSG").lstrip("0"), "p" if is_protein else "")
        for symbol, previous, alias, ensembl, is_protein in zip(
            hgnc["symbol"],
            hgnc["prev_symbol"],
            hgnc["alias_symbol"],
            hgnc["ensembl_gene_id"],
            _is_protein_coding(hgnc),
            strict=True,
        )
    )
    _write(folder / HGNC_FILE, rows)
    _write(folder / ORTHOLOGS_FILE, _ortholog_pairs(orthologs, hgnc))


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Make the tables of gene names that ship with stalign.")
    parser.add_argument("hgnc", type=Path, help="HGNC complete set (tsv.gz)")
    parser.add_argument("orthologs", type=Path, help="one-to-one mouse-human pairs (tsv.gz)")
    parser.add_argument("--folder", type=Path, default=DATA, help="where the tables are written")
    arguments = parser.parse_args()
    build_tables(arguments.hgnc, arguments.orthologs, arguments.folder)


if __name__ == "__main__":
    main()
