"""Encoders of images and of expression, made by name."""

from __future__ import annotations

from stalign.models.encoders._base import GeneEncoder, ImageEncoder
from stalign.models.encoders._registry import (
    GENE_ENCODERS,
    IMAGE_ENCODERS,
    EncoderEntry,
    build_gene_encoder,
    build_image_encoder,
)
from stalign.models.encoders._scgpt import ScGPT
from stalign.models.encoders._weights import load_image_encoder

__all__ = [
    "GENE_ENCODERS",
    "IMAGE_ENCODERS",
    "EncoderEntry",
    "GeneEncoder",
    "ImageEncoder",
    "ScGPT",
    "build_gene_encoder",
    "build_image_encoder",
    "load_image_encoder",
]
