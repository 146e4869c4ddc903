"""The tables of gene names that ship with the package: HGNC, and mouse-human orthologs from MGI (``_data/NOTICE``)."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

DATA: Final = Path(__file__).parent / "_data"
HGNC_FILE: Final = "hgnc.tsv.gz"
ORTHOLOGS_FILE: Final = "mouse_human_orthologs.tsv.gz"

# ENSG00000141510, ENSG00000141510.17, and GENCODE's ENSG00000182378.14_PAR_Y.
_HUMAN_ENSEMBL = re.compile(r"ENSG(\d{11})(?:\.\d+)?(?:_PAR_Y)?", re.ASCII)

SHARED: Final = -1
"""Stands for the gene of a name that two approved genes share."""


class Hgnc(NamedTuple):
    """HGNC as lookups; a gene is its row number, :data:`SHARED` says that a name belongs to more than one.

    ``symbol``, ``previous`` and ``alias`` look a name up as it is written; ``folded`` looks up the upper-case form of
    names that HGNC writes in mixed case (``C1ORF112``), with the kind of name beside the gene. ``protein_coding`` lists
    symbols.
    """

    symbols: list[str]
    symbol: dict[str, int]
    previous: dict[str, int]
    alias: dict[str, int]
    ensembl: dict[int, int]
    folded: dict[str, tuple[int, str]]
    protein_coding: list[str]


def _read_rows(file_name: str) -> list[list[str]]:
    text = gzip.decompress((DATA / file_name).read_bytes()).decode()
    return [line.split("\t") for line in text.splitlines()]


def unique_owner(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """Return for each name its only owner, or None where two owners share it; empty names are skipped."""
    owners: dict[str, str | None] = {}
    for name, owner in pairs:
        if name and owners.setdefault(name, owner) != owner:
            owners[name] = None
    return owners


def _add(names: Iterable[str], gene: int, table: dict[str, int]) -> None:
    for name in names:
        if name and table.setdefault(name, gene) != gene:
            table[name] = SHARED


def _settle_synonyms(previous: dict[str, int], alias: dict[str, int]) -> None:
    """Make a previous symbol of one gene that is an alias of another shared in both tables."""
    for name in previous.keys() & alias.keys():
        if previous[name] != alias[name]:
            previous[name] = alias[name] = SHARED


def _fold(symbol: dict[str, int], previous: dict[str, int], alias: dict[str, int]) -> dict[str, tuple[int, str]]:
    """Look-up by the upper-case form of the names in mixed case: symbols first, then unshared synonyms."""
    folded: dict[str, tuple[int, str]] = {}
    synonyms: dict[str, tuple[int, str]] = {}
    for kind, table, target in (
        ("symbol", symbol, folded),
        ("previous", previous, synonyms),
        ("alias", alias, synonyms),
    ):
        for name, gene in table.items():
            upper = name.upper()
            if upper != name and target.setdefault(upper, (gene, kind))[0] != gene:
                target[upper] = (SHARED, kind)
    return synonyms | folded


@lru_cache(maxsize=1)
def hgnc() -> Hgnc:
    """Return the HGNC table, read once."""
    symbols: list[str] = []
    previous: dict[str, int] = {}
    alias: dict[str, int] = {}
    ensembl: dict[int, int] = {}
    protein_coding: list[str] = []
    for gene, (approved, prev_names, alias_names, number, kind) in enumerate(_read_rows(HGNC_FILE)):
        symbols.append(approved)
        if kind == "p":
            protein_coding.append(approved)
        _add(prev_names.split("|"), gene, previous)
        _add(alias_names.split("|"), gene, alias)
        if number and ensembl.setdefault(int(number), gene) != gene:
            ensembl[int(number)] = SHARED
    _settle_synonyms(previous, alias)
    symbol = {name: gene for gene, name in enumerate(symbols)}
    return Hgnc(symbols, symbol, previous, alias, ensembl, _fold(symbol, previous, alias), protein_coding)


def protein_coding_genes() -> tuple[str, ...]:
    """Return the approved symbols of all protein-coding genes of HGNC, those of lymphocyte receptors included.

    Returns
    -------
    Symbols, in the order of the table.

    Examples
    --------
    >>> from stalign.genes import protein_coding_genes
    >>> "ERBB2" in protein_coding_genes()
    True
    """
    return tuple(hgnc().protein_coding)


class Orthologs(NamedTuple):
    """Approved human symbol of a mouse symbol: as written, and by its upper-case form where that is unique."""

    exact: dict[str, str]
    folded: dict[str, str | None]


@lru_cache(maxsize=1)
def orthologs() -> Orthologs:
    """Return the one-to-one mouse-human orthologs, read once."""
    exact = dict(_read_rows(ORTHOLOGS_FILE))
    return Orthologs(exact, unique_owner((mouse.upper(), human) for mouse, human in exact.items()))


def human_ensembl_number(name: str) -> int | None:
    """Return the number of a human Ensembl gene id, with or without version; None for any other string."""
    found = _HUMAN_ENSEMBL.fullmatch(name)
    return int(found[1]) if found else None
