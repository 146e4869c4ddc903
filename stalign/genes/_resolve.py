"""Match the genes of an AnnData to a vocabulary, with errors that say what its names look like."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from stalign._keys import Key
from stalign._validate import check_positive, listing, require_key
from stalign.genes._match import GeneMatch, match_names

if TYPE_CHECKING:
    from anndata import AnnData

# Columns of `var` in which Ensembl ids are commonly kept (scanpy's `read_10x_h5`, CELLxGENE, HEST, Ensembl itself).
_ID_COLUMNS: Final = ("gene_id", "gene_ids", "ensembl_id", "ensembl_ids", "ensembl", "ensembl_gene_id", "feature_id")
# A panel covers little of a vocabulary and works; less than this share is worth a word.
_LOW_COVERAGE: Final = 0.2
_SHOWN: Final = 8

_PATTERNS: Final = {
    "mouse_id": re.compile(r"ENSMUSG\d{11}.*"),
    "mouse": re.compile(r"[A-Z][a-z0-9-]*[a-z][A-Za-z0-9-]*"),  # Actb, Gm1992, mt- aside
    "human": re.compile(r"[A-Z][A-Z0-9-]+|C\d+orf\d+|ENSG\d{11}.*"),
    "barcode": re.compile(r"[ACGTN]{8,}(-\d+)?"),
    "number": re.compile(r"\d+"),
}


def resolve_genes(
    adata: AnnData,
    vocabulary: Sequence[str],
    *,
    gene_symbols: str | None = None,
    organism: str | None = None,
    min_genes: int | None = None,
    min_coverage: float | None = None,
) -> GeneMatch:
    """Match the genes of an AnnData to a vocabulary without writing anything.

    Parameters
    ----------
    adata
        Any AnnData with genes in ``var``.
    vocabulary
        The model's genes.
    gene_symbols, organism, min_genes, min_coverage
        As in :func:`stalign.pp.match_genes`; ``None`` is what its last call on this AnnData was given, else
        its default.

    Returns
    -------
    :class:`stalign.genes.GeneMatch` with one entry for each of ``adata.var_names``.

    Raises
    ------
    ValueError
        Below the floor, as :func:`stalign.pp.match_genes`.
    """
    earlier = adata.uns.get(Key.UNS, {}).get(Key.uns.GENES, {}).get("params", {})
    gene_symbols = gene_symbols or str(earlier.get("gene_symbols", "")) or None
    organism = organism or str(earlier.get("organism", "human"))
    min_genes = int(earlier.get("min_genes", 50)) if min_genes is None else min_genes
    min_coverage = float(earlier.get("min_coverage", 0.05)) if min_coverage is None else min_coverage
    match = match_adata(adata, vocabulary, gene_symbols, organism)
    check_coverage(adata, match, gene_symbols, organism, min_genes, min_coverage)
    return match


def match_adata(adata: AnnData, vocabulary: Sequence[str], gene_symbols: str | None, organism: str) -> GeneMatch:
    """Match the names of an AnnData's genes, and its Ensembl ids where it has any."""
    names: Any = adata.var_names
    if gene_symbols is not None:
        names = require_key(adata.var, gene_symbols, where="adata.var", hint="Without it, `var_names` are matched.")
    return match_names(names, vocabulary, ensembl=_ensembl_ids(adata), organism=organism)


def _ensembl_ids(adata: AnnData) -> np.ndarray | None:
    """Return the Ensembl id of each gene from ``var_names`` or a column of ``var``, None where there is none."""
    columns = {str(column).lower(): column for column in reversed(adata.var.columns)}
    candidates = [adata.var[columns[name]] for name in _ID_COLUMNS if name in columns]
    for values in (*candidates, adata.var_names.to_series()):
        ids = values.astype(object)
        if ids.map(lambda value: isinstance(value, str) and value.startswith("ENSG")).any():
            return ids.to_numpy()
    return None


def check_coverage(
    adata: AnnData, match: GeneMatch, gene_symbols: str | None, organism: str, min_genes: int, min_coverage: float
) -> None:
    """Refuse a match below the floor, warn of one that is small."""
    check_positive("min_genes", min_genes, integer=True)
    if not 0 <= min_coverage <= 1:
        raise ValueError(f"min_coverage must be a share between 0 and 1, got {min_coverage!r}.")
    enough = match.n_covered >= min_genes or match.coverage >= min_coverage
    covered = f"{match.n_covered} of the {len(match.vocabulary)} genes that the model knows ({match.coverage:.1%})"
    if match.n_covered == 0 or not enough:
        where = "var_names" if gene_symbols is None else f"var[{gene_symbols!r}]"
        raise ValueError(
            f"The {len(match.names)} names in `adata.{where}` cover {covered}; at least {min_genes} genes or "
            f"{min_coverage:.0%} are needed (`min_genes`, `min_coverage`). "
            f"First unmatched names: {listing(match.names[~match.matched], _SHOWN)}. "
            f"{_hint(adata, match, gene_symbols, organism)}"
        )
    if match.coverage < _LOW_COVERAGE:
        warnings.warn(
            f"The data cover {covered}. Genes that are missing count as not expressed; expect weaker results than with "
            "the whole transcriptome.",
            UserWarning,
            stacklevel=3,
        )


def _looks_like(names: np.ndarray, pattern: str) -> bool:
    expression = _PATTERNS[pattern]
    return len(names) > 0 and sum(expression.fullmatch(name) is not None for name in names) > len(names) / 2


def _hint(adata: AnnData, match: GeneMatch, gene_symbols: str | None, organism: str) -> str:
    """Say what the names look like and which argument helps."""
    names = match.names
    better = _better_column(adata, match, gene_symbols, organism)
    use_column = f" `gene_symbols={better!r}` would match more." if better else ""
    if _looks_like(names, "mouse_id"):
        return (
            "The names are mouse Ensembl ids, for which there is no table: pass `organism='mouse'` and "
            "`gene_symbols=...`, the column of `adata.var` with mouse symbols. "
            f"Columns: {listing(adata.var.columns)}."
        )
    if organism == "human" and _looks_like(names, "mouse"):
        return "The names look like mouse symbols: pass `organism='mouse'` to use the one-to-one human orthologs."
    if _looks_like(names, "barcode") or _looks_like(names, "number"):
        return (
            "These are no gene names (spots must be rows, genes columns): pass `gene_symbols=...`, the column of "
            f"`adata.var` that holds them. Columns: {listing(adata.var.columns)}.{use_column}"
        )
    if organism == "mouse" and _looks_like(names, "human"):
        return "The names look like human ones: pass `organism='human'`."
    return (
        "Pass `gene_symbols=...` if a column of `adata.var` holds the symbols "
        f"(columns: {listing(adata.var.columns)}), or `organism='mouse'` for mouse data.{use_column}"
    )


def _better_column(adata: AnnData, match: GeneMatch, gene_symbols: str | None, organism: str) -> str:
    """Return the text column of ``var`` that matches most genes, empty if none does better."""
    best, covered = "", match.n_covered
    for column in adata.var.columns:
        values = adata.var[column]
        is_text = isinstance(values.dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(values.dtype)
        if column == gene_symbols or not is_text:
            continue
        found = match_names(values, match.vocabulary, organism=organism).n_covered
        if found > covered:
            best, covered = str(column), found
    return best
