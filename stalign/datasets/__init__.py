"""Data to try things on."""

from __future__ import annotations

from stalign.datasets._synthetic import synthetic_visium

__all__ = ["synthetic_visium"]
