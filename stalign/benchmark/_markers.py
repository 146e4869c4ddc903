"""Marker genes of the labelled tissues, from general knowledge of them; not tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

BREAST: Final[Mapping[str, Sequence[str]]] = {
    "invasive cancer": ["ERBB2", "KRT8", "KRT18", "KRT19", "EPCAM", "MUC1"],
    "cancer in situ": ["KRT14", "KRT5", "KRT17", "ACTA2", "MYLK", "KRT8"],
    "connective tissue": ["COL1A1", "COL1A2", "COL3A1", "DCN", "LUM", "FN1"],
    "adipose tissue": ["ADIPOQ", "FABP4", "PLIN1", "PLIN4", "LPL", "ADIRF"],
    "immune infiltrate": ["PTPRC", "CD3E", "CD52", "CD74", "IGKC", "MS4A1"],
    "breast glands": ["KRT15", "LTF", "SLPI", "PIGR", "KRT14", "AZGP1"],
}
CORTEX: Final[Mapping[str, Sequence[str]]] = {
    "L1": ["RELN", "AQP4", "GFAP", "FABP7"],
    "L2": ["HPCAL1", "CUX2", "LAMP5", "C1QL2"],
    "L3": ["FREM3", "CARTPT", "CUX2", "ADCYAP1"],
    "L4": ["RORB", "NEFM", "NEFH", "PCP4"],
    "L5": ["PCP4", "TRABD2A", "FEZF2", "ETV1"],
    "L6": ["NR4A2", "KRT17", "NTNG2", "CCN2"],
    "WM": ["MBP", "MOBP", "PLP1", "MAG"],
}
MARKERS: Final[Mapping[str, Sequence[str]]] = {**BREAST, **CORTEX}
"""Markers by label; only those of a section's own labels are used."""
