"""Readers: files and other containers to AnnData in the convention that the rest of the package expects."""

from __future__ import annotations

from stalign.io._hest import read_hest
from stalign.io._spaceranger import read_visium, read_visium_hd
from stalign.io._spatialdata import from_spatialdata
from stalign.io._stimage import read_stimage1k4m

__all__ = ["from_spatialdata", "read_hest", "read_stimage1k4m", "read_visium", "read_visium_hd"]
