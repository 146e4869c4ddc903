"""Preprocessing: niches, patches and gene names, and slides made ready for training."""

from __future__ import annotations

from stalign.pp._genes import match_genes
from stalign.pp._niches import extract_niches
from stalign.pp._patches import get_patches
from stalign.pp._prepare import prepare_shards

__all__ = ["extract_niches", "get_patches", "match_genes", "prepare_shards"]
