"""Match the gene names of a data set to the genes a model knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
import pandas as pd
from scipy import sparse

from stalign._validate import check_choice, listing
from stalign.genes._tables import SHARED, Hgnc, hgnc, human_ensembl_number, orthologs

ORGANISMS: Final = ("human", "mouse")
HOW: Final = ("symbol", "previous", "alias", "ensembl", "ortholog")
"""Ways in which a name can match, see :class:`GeneMatch`."""

AMBIGUOUS: Final = "ambiguous"
_STRENGTH: Final = {how: rank for rank, how in enumerate(HOW)}
_SHOWN: Final = 20


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Which gene of a vocabulary each name of a data set stands for.

    Attributes
    ----------
    names
        The data set's names, as given, shape (n_names,).
    vocabulary
        The model's genes, shape (n_vocabulary,).
    index
        Position in the vocabulary of each name, -1 where none was found, shape (n_names,), intp.
    how
        Kind of match of each name, shape (n_names,): ``"symbol"`` (the string itself, or both are the approved symbol
        up to case), ``"previous"`` or ``"alias"`` (one of the two is such a name of the gene), ``"ensembl"``,
        ``"ortholog"``; ``"ambiguous"`` for a name that was not used because two genes share it, ``""`` for one that was
        not found.

    Examples
    --------
    >>> from stalign.genes import match_names
    >>> match = match_names(["HN1", "TP53", "ENSG00000146648.19"], ["EGFR", "JPT1"])
    >>> match.index
    array([ 1, -1,  0])
    >>> match.how
    array(['previous', '', 'ensembl'], dtype=object)
    """

    names: np.ndarray
    vocabulary: np.ndarray
    index: np.ndarray
    how: np.ndarray

    @property
    def matched(self) -> np.ndarray:
        """Whether each name was matched, shape (n_names,), bool."""
        return self.index >= 0

    @property
    def n_matched(self) -> int:
        """Number of names that were matched."""
        return int(self.matched.sum())

    @cached_property
    def names_per_gene(self) -> np.ndarray:
        """Number of names that map to each gene of the vocabulary, shape (n_vocabulary,), intp."""
        return np.bincount(self.index[self.matched], minlength=len(self.vocabulary))

    @property
    def covered(self) -> np.ndarray:
        """Whether each gene of the vocabulary was found, shape (n_vocabulary,), bool."""
        return self.names_per_gene > 0

    @property
    def n_covered(self) -> int:
        """Number of genes of the vocabulary that were found."""
        return int(self.covered.sum())

    @property
    def coverage(self) -> float:
        """Share of the vocabulary that was found."""
        return self.n_covered / len(self.vocabulary)

    @property
    def genes(self) -> np.ndarray:
        """Vocabulary symbol of each name, an empty string where there is none, shape (n_names,), str."""
        # Position -1 falls on the empty string put at the end.
        return np.append(self.vocabulary, "").astype(object)[self.index]

    def summed(self) -> dict[str, list[str]]:
        """Return the genes that several names map to, with these names; their counts are summed."""
        several = np.flatnonzero(self.matched & (self.names_per_gene[self.index] > 1))
        groups: dict[str, list[str]] = {}
        for position in several:
            groups.setdefault(self.vocabulary[self.index[position]], []).append(self.names[position])
        return groups

    def selector(self) -> sparse.csr_matrix:
        """Return the 0/1 matrix that carries counts over the names to counts over the vocabulary.

        Returns
        -------
        CSR float32 of shape (n_names, n_vocabulary): ``counts @ selector`` sums the names of one gene.
        """
        matched = self.matched
        indptr = np.concatenate([[0], np.cumsum(matched)])
        columns = self.index[matched]
        shape = (len(self.names), len(self.vocabulary))
        return sparse.csr_matrix((np.ones(len(columns), dtype=np.float32), columns, indptr), shape=shape)

    def report(self, limit: int = _SHOWN) -> dict[str, Any]:
        """Return the coverage in types that survive ``write_h5ad``.

        Parameters
        ----------
        limit
            How many names are listed of each kind.

        Returns
        -------
        Dictionary with ``n_names``, ``n_matched`` (names), ``n_vocabulary``, ``n_covered`` (vocabulary genes that were
        found), ``coverage`` (their share), ``how`` (number of names by kind of match), ``n_unmatched``, ``unmatched``
        (first names), ``n_ambiguous`` and ``ambiguous`` (first names not used because two genes share them),
        ``n_summed`` (genes to which several names map) and ``summed`` (the first, as ``"JPT1 = HN1 + JPT1"``).
        """
        counts = Counter(self.how.tolist())
        unmatched = self.names[~self.matched]
        ambiguous = self.names[self.how == AMBIGUOUS]
        summed = self.summed()
        return {
            "n_names": len(self.names),
            "n_matched": self.n_matched,
            "n_vocabulary": len(self.vocabulary),
            "n_covered": self.n_covered,
            "coverage": self.coverage,
            "how": {how: counts.get(how, 0) for how in HOW},
            "n_unmatched": len(unmatched),
            "unmatched": _as_strings(unmatched[:limit]),
            "n_ambiguous": len(ambiguous),
            "ambiguous": _as_strings(ambiguous[:limit]),
            "n_summed": len(summed),
            "summed": _as_strings([f"{gene} = {' + '.join(names)}" for gene, names in list(summed.items())[:limit]]),
        }


def match_names(
    names: Iterable[Any],
    vocabulary: Iterable[str],
    *,
    ensembl: Sequence[Any] | np.ndarray | pd.Series | None = None,
    organism: str = "human",
) -> GeneMatch:
    """Match gene names to a vocabulary, offline.

    The names of both sides are brought to their HGNC gene and joined there, so that either side may use an older
    symbol. A human name is looked up in this order, and the first that knows it decides:

    1. the vocabulary itself: the same string always matches;
    2. approved symbols;
    3. Ensembl gene ids (the name itself, or ``ensembl``), with or without version;
    4. previous symbols and aliases. One that two approved genes share is not used.

    Case is respected (``Actb`` is a mouse symbol), except that a name all in upper case finds one that HGNC writes in
    mixed case (``C1ORF43`` is C1orf43) where only one gene can be meant.

    With ``organism="mouse"``, names are mouse symbols and are carried over by the one-to-one orthologs of MGI. Their
    case is ignored where that is unambiguous. There is no table of mouse Ensembl ids: use the column of symbols.

    Parameters
    ----------
    names
        Names of the data's genes.
    vocabulary
        Names of the model's genes: unique, human.
    ensembl
        Ensembl gene id of each name, where known; decides for names that are not an approved symbol.
    organism
        Organism of the data, ``"human"`` or ``"mouse"``.

    Returns
    -------
    :class:`GeneMatch`, with one entry for each name.

    Raises
    ------
    ValueError
        If the vocabulary is empty or repeats a gene, or ``ensembl`` and ``names`` differ in length.

    Notes
    -----
    Names from HGNC, snapshot of October 2024 (CC0); orthologs from Mouse Genome Informatics (CC BY 4.0).

    Examples
    --------
    >>> from stalign.genes import match_names
    >>> match_names(["SELM", "Actb"], ["ACTB", "SELENOM"]).genes
    array(['SELENOM', ''], dtype=object)
    >>> match_names(["Actb", "Erbb2"], ["ACTB", "ERBB2"], organism="mouse").genes
    array(['ACTB', 'ERBB2'], dtype=object)
    """
    check_choice("organism", organism, ORGANISMS)
    given = _clean("names", names)
    genes = _check_vocabulary(vocabulary if isinstance(vocabulary, tuple) else tuple(_clean("vocabulary", vocabulary)))
    ids = [""] * len(given) if ensembl is None else _clean("ensembl", ensembl)
    if len(ids) != len(given):
        raise ValueError(f"ensembl must hold one id for each name: got {len(ids)} ids for {len(given)} names.")

    index, how = _match(tuple(given), tuple(ids), genes, organism)
    return GeneMatch(np.array(given, dtype=object), np.array(genes, dtype=object), index.copy(), how.copy())


# Slides of one study share their genes, and a model its vocabulary.
@lru_cache(maxsize=4)
def _match(
    given: tuple[str, ...], ids: tuple[str, ...], genes: tuple[str, ...], organism: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the place in the vocabulary and the kind of match of each name."""
    table = hgnc()
    position, join = _index_vocabulary(genes)
    resolve = _resolve_mouse if organism == "mouse" else _resolve_human
    index = np.full(len(given), -1, dtype=np.intp)
    how = np.full(len(given), "", dtype=object)
    for number, (name, identifier) in enumerate(zip(given, ids, strict=True)):
        if name in position:
            index[number], how[number] = position[name], "symbol"
            continue
        gene, kind = resolve(name, identifier, table)
        if gene == SHARED:
            how[number] = kind
        elif gene in join:
            index[number], kind_in_vocabulary = join[gene]
            how[number] = kind if kind != "symbol" else kind_in_vocabulary
    return index, how


def _clean(what: str, names: Iterable[Any]) -> list[str]:
    """Return names as stripped strings, empty where missing."""
    if isinstance(names, str | bytes):
        raise TypeError(f"{what} must be a sequence of strings, got the single string {names!r}.")
    names = list(names)
    if all(type(name) is str for name in names):
        return [name.strip() for name in names]
    missing = pd.isna(values := pd.Series(names, dtype=object)).to_numpy()
    return ["" if skip else str(value).strip() for value, skip in zip(values, missing, strict=True)]


@lru_cache(maxsize=4)
def _check_vocabulary(vocabulary: tuple[str, ...]) -> tuple[str, ...]:
    genes = tuple(_clean("vocabulary", vocabulary))
    if not genes:
        raise ValueError("The vocabulary is empty: a model needs at least one gene.")
    if len(set(genes)) < len(genes) or "" in genes:
        repeated = [gene for gene, count in Counter(genes).items() if count > 1 or not gene]
        raise ValueError(
            f"The vocabulary must hold each gene once and no empty names, got {listing(repeated, 5)} repeatedly."
        )
    return genes


@lru_cache(maxsize=4)
def _index_vocabulary(genes: tuple[str, ...]) -> tuple[dict[str, int], dict[int, tuple[int, str]]]:
    """Return the position of each name of the vocabulary, and (position, kind of name) of each HGNC gene.

    The strongest name stands for the gene.
    """
    table = hgnc()
    join: dict[int, tuple[int, str]] = {}
    for position, name in enumerate(genes):
        gene, kind = _resolve_human(name, "", table)
        if gene != SHARED and (gene not in join or _STRENGTH[kind] < _STRENGTH[join[gene][1]]):
            join[gene] = (position, kind)
    return {gene: number for number, gene in enumerate(genes)}, join


def _resolve_human(name: str, identifier: str, table: Hgnc) -> tuple[int, str]:
    """Return the HGNC gene of a human name and the kind of the name; (SHARED, why) where there is no one gene."""
    if name in table.symbol:
        return table.symbol[name], "symbol"
    gene, kind = _resolve_synonym(name, table)
    if kind == "symbol":
        return gene, kind
    for text in (identifier, name):
        number = human_ensembl_number(text) if text.startswith("ENSG") else None
        by_id = table.ensembl.get(number, SHARED) if number is not None else SHARED
        # The id outranks a synonym; where both name the same gene the synonym is reported.
        if by_id not in (SHARED, gene):
            return by_id, "ensembl"
    return gene, kind


def _resolve_synonym(name: str, table: Hgnc) -> tuple[int, str]:
    gene = table.previous.get(name)
    kind = "previous"
    if gene is None:
        gene, kind = table.alias.get(name), "alias"
    if gene is None and name in table.folded:  # only names all in upper case are keys
        gene, kind = table.folded[name]
    if gene is None:
        return SHARED, ""
    return (gene, kind) if gene != SHARED else (SHARED, AMBIGUOUS)


def _resolve_mouse(name: str, identifier: str, table: Hgnc) -> tuple[int, str]:
    """As :func:`_resolve_human`, for a mouse symbol; ``identifier`` is not used, there is no table of mouse ids."""
    pairs = orthologs()
    human = pairs.exact.get(name)
    if human is None:
        upper = name.upper()
        human = pairs.folded.get(upper)
        if human is None:
            return SHARED, AMBIGUOUS if upper in pairs.folded else ""
    return table.symbol[human], "ortholog"


def _as_strings(values: Iterable[str]) -> np.ndarray:
    # Strings of fixed width: an empty list would come back from a file as an array of floats.
    return np.array(list(values), dtype=str)
