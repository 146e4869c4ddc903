"""Figures: what the model sees, and what came out."""

from __future__ import annotations

from stalign.pl._niches import niches
from stalign.pl._reliability import reliability
from stalign.pl._report import report
from stalign.pl._results import annotation, expression, quality
from stalign.pl._spatial import spatial
from stalign.pl._training import training

__all__ = ["annotation", "expression", "niches", "quality", "reliability", "report", "spatial", "training"]
