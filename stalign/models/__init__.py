"""Models: the network, its configs, encoders and checkpoints.

Names that need torch are imported when first used, so that the geometry and the vocabulary of a model are cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stalign.models._config import (
    BranchConfig,
    FamiliarityConfig,
    FusionConfig,
    Geometry,
    HeadsConfig,
    ModelConfig,
    PatchConfig,
    PredictionConfig,
    Provenance,
    TokenConfig,
)
from stalign.models._registry import Available, available, config, geometry, load, vocabulary

if TYPE_CHECKING:
    from stalign.models import encoders
    from stalign.models._assemble import assemble
    from stalign.models._checkpoint import ModelCard
    from stalign.models._fusion import ABFN
    from stalign.models._network import STAlign, STAlignOutput
    from stalign.models._official import from_official
    from stalign.models._summary import Summary

__all__ = [
    "ABFN",
    "Available",
    "BranchConfig",
    "FamiliarityConfig",
    "FusionConfig",
    "Geometry",
    "HeadsConfig",
    "ModelCard",
    "ModelConfig",
    "PatchConfig",
    "PredictionConfig",
    "Provenance",
    "STAlign",
    "STAlignOutput",
    "Summary",
    "TokenConfig",
    "assemble",
    "available",
    "config",
    "encoders",
    "from_official",
    "geometry",
    "load",
    "vocabulary",
]

_LAZY = {
    "ABFN": "_fusion",
    "ModelCard": "_checkpoint",
    "STAlign": "_network",
    "STAlignOutput": "_network",
    "Summary": "_summary",
    "assemble": "_assemble",
    "from_official": "_official",
}


def __getattr__(name: str) -> Any:
    if name == "encoders":
        return importlib.import_module("stalign.models.encoders")
    if name in _LAZY:
        return getattr(importlib.import_module(f"stalign.models.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'stalign.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
