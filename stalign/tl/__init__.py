"""Tools: embed slides, find domains, name spots, predict expression, search across modalities, tell what is foreign."""

from __future__ import annotations

from stalign.tl._annotate import zero_shot_annotate
from stalign.tl._calibration import Calibration, calibration
from stalign.tl._domains import spatial_domains
from stalign.tl._embed import embed
from stalign.tl._many import embed_many
from stalign.tl._predict import predict_expression
from stalign.tl._quality import quality
from stalign.tl._retrieve import Retrieval, retrieve

__all__ = [
    "Calibration",
    "Retrieval",
    "calibration",
    "embed",
    "embed_many",
    "predict_expression",
    "quality",
    "retrieve",
    "spatial_domains",
    "zero_shot_annotate",
]
