"""Match the genes of an AnnData to those a model knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import check_adata, check_choice, require_key
from stalign.genes._counts import input_kind
from stalign.genes._match import ORGANISMS, GeneMatch
from stalign.genes._resolve import check_coverage, match_adata, resolve_genes

__all__ = ["get_vocabulary", "match_genes", "resolve_genes"]

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import STAlign


def match_genes(
    adata: AnnData,
    *,
    model: str | Path | STAlign | Sequence[str] = "stalign-mini",
    gene_symbols: str | None = None,
    organism: str = "human",
    layer: str | None = None,
    min_genes: int = 50,
    min_coverage: float = 0.05,
    key_added: str = Key.var.GENE,
    copy: bool = False,
) -> AnnData | None:
    """Match gene names to a model's vocabulary, offline, and report the coverage.

    Approved symbols, previous symbols, aliases (never one that two genes share) and Ensembl ids with or without version
    are understood, see :func:`stalign.genes.match_names`. Ensembl ids are taken from ``var_names``, or, for names that
    are no approved symbol, from the first column of ``var`` called ``gene_id``, ``gene_ids``, ``ensembl_id``,
    ``ensembl_ids``, ``ensembl``, ``ensembl_gene_id`` or ``feature_id`` that holds human Ensembl ids. What is chosen
    here also holds for later calls on the same AnnData, such as :func:`stalign.tl.embed`.

    Parameters
    ----------
    adata
        Any AnnData with genes in ``var``.
    model
        Name or folder of a model, a loaded model, or the vocabulary itself.
    gene_symbols
        Column of ``var`` that holds the gene symbols; ``var_names`` by default.
    organism
        ``"human"``, or ``"mouse"`` for mouse symbols that are to be carried over to their one-to-one human orthologs.
    layer
        Layer with the counts for ``share_of_counts``; ``X`` by default.
    min_genes, min_coverage
        Floor: at least so many genes of the vocabulary, or at least this share of it, must be found. Reaching one of
        the two is enough, so that panels of a few hundred genes pass (with a warning).
    key_added
        Column of ``var`` that is written.
    copy
        Return a copy instead of writing into ``adata``.

    Returns
    -------
    ``None``, or the copy. Writes:

    - ``var["stalign_gene"]``: symbol of the vocabulary each gene stands for, ``""`` where there is none, (n_vars,), str
    - ``uns["stalign"]["genes"]``: ``params``; ``n_vars``, ``n_matched`` (of these), ``n_vocabulary``, ``n_covered`` and
      ``coverage`` (number and share of vocabulary genes found); ``how`` (matched names by kind: symbol, previous,
      alias, ensembl, ortholog); ``share_of_counts`` (share of all counts that lies in matched genes, NaN without raw
      counts); ``n_unmatched``, ``unmatched`` (the first names); ``n_ambiguous``, ``ambiguous`` (names that two genes
      share, not used); ``n_summed``, ``summed`` (genes several names map to, whose counts are summed)

    Raises
    ------
    ValueError
        Below the floor; the message says what was matched and what was not. ``adata`` is not changed.
    KeyError
        If ``gene_symbols`` is no column of ``var`` or ``layer`` no layer.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.pp.match_genes(adata)  # doctest: +SKIP
    >>> adata.uns["stalign"]["genes"]["coverage"]  # doctest: +SKIP
    """
    check_choice("organism", organism, ORGANISMS)
    check_adata(adata)
    vocabulary, model_name = get_vocabulary(model)
    match = match_adata(adata, vocabulary, gene_symbols, organism)
    check_coverage(adata, match, gene_symbols, organism, min_genes, min_coverage)
    report = match.report()
    report["n_vars"] = report.pop("n_names")
    report["share_of_counts"] = _share_of_counts(adata, match, layer)
    report["params"] = {
        "model": model_name,
        "gene_symbols": gene_symbols or "",
        "organism": organism,
        "layer": layer or "",
        "min_genes": int(min_genes),
        "min_coverage": float(min_coverage),
        "key_added": key_added,
    }

    adata = adata.copy() if copy else adata
    adata.var[key_added] = pd.Series(match.genes, index=adata.var_names, dtype=object)
    adata.uns[Key.UNS] = {**adata.uns.get(Key.UNS, {}), Key.uns.GENES: report}
    logger.info(
        "Matched %d of %d genes to %d of the %d that the model knows (%.1f %%). Added `var['%s']`, `uns['%s']['%s']`.",
        match.n_matched,
        len(match.names),
        match.n_covered,
        len(match.vocabulary),
        100 * match.coverage,
        key_added,
        Key.UNS,
        Key.uns.GENES,
    )
    return adata if copy else None


def get_vocabulary(model: Any) -> tuple[list[str], str]:
    """Return the genes of a model, given by name, folder, object or as the genes themselves, and what it is called."""
    if isinstance(model, str | Path):
        from stalign.models import vocabulary

        return list(vocabulary(model)), str(model)
    genes = getattr(model, "genes", None)
    if genes is not None:
        return list(genes), str(getattr(getattr(model, "config", None), "name", type(model).__name__))
    if isinstance(model, Iterable):
        return list(model), "vocabulary"
    raise TypeError(
        f"model must be a name, a folder, a loaded model or a sequence of gene symbols, got {type(model).__name__}."
    )


def _share_of_counts(adata: AnnData, match: GeneMatch, layer: str | None) -> float:
    counts = adata.X if layer is None else require_key(adata.layers, layer, where="adata.layers")
    if counts is None or input_kind(counts) != "counts":
        return float("nan")
    totals = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    return float(totals[match.matched].sum() / totals.sum()) if totals.sum() > 0 else float("nan")
