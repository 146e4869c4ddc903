"""Measure a model beside plain methods: domains, genes, retrieval, names, few labels, robustness."""

from __future__ import annotations

from stalign.benchmark._annotation import annotation, few_shot
from stalign.benchmark._domains import domains
from stalign.benchmark._genes import genes, retrieval
from stalign.benchmark._markers import MARKERS
from stalign.benchmark._methods import METHODS
from stalign.benchmark._robustness import robustness
from stalign.benchmark._rows import Row, to_frame
from stalign.benchmark._run import TASKS, run
from stalign.benchmark._section import Section
from stalign.benchmark._table import to_markdown

__all__ = [
    "MARKERS",
    "METHODS",
    "TASKS",
    "Row",
    "Section",
    "annotation",
    "domains",
    "few_shot",
    "genes",
    "retrieval",
    "robustness",
    "run",
    "to_frame",
    "to_markdown",
]
