"""ST-Align for AnnData: histology and gene expression aligned at the level of spots and niches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stalign import _logging
from stalign._settings import settings

if TYPE_CHECKING:
    from stalign import benchmark, datasets, genes, io, models, pl, pp, slide, tl, train

__version__ = "0.1.0"

# Rooms are imported when first used: torch, squidpy and matplotlib cost seconds, `import stalign` should not.
_ROOMS = ("benchmark", "datasets", "genes", "io", "models", "pl", "pp", "slide", "tl", "train")

__all__ = ["__version__", "settings", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"stalign.{name}")
    raise AttributeError(f"module 'stalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
