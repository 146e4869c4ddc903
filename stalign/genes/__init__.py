"""Gene names and expression: matching to a vocabulary, normalisation, aggregation over niches."""

from __future__ import annotations

from stalign.genes._counts import (
    aggregate,
    check_counts,
    input_kind,
    library_size,
    niche_mean,
    normalise_log1p,
    row_normalise,
)
from stalign.genes._gmt import (
    GeneSetCoverage,
    gene_set_coverage,
    hallmark,
    parse_gmt,
    read_gmt,
    select_sets,
)
from stalign.genes._match import GeneMatch, match_names
from stalign.genes._tables import protein_coding_genes

__all__ = [
    "GeneMatch",
    "GeneSetCoverage",
    "aggregate",
    "check_counts",
    "gene_set_coverage",
    "hallmark",
    "input_kind",
    "library_size",
    "match_names",
    "niche_mean",
    "normalise_log1p",
    "parse_gmt",
    "protein_coding_genes",
    "read_gmt",
    "row_normalise",
    "select_sets",
]
