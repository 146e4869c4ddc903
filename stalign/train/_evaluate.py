"""Embed whole sections and measure retrieval, for validation and for the prediction head."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from stalign.models._network import STAlign
from stalign.train._data import EncodedSection


class SectionEmbedding(NamedTuple):
    """(n, d) float32, unit norm: the aligned pair of a section, each spot beside its niche; ``None`` where absent."""

    image: np.ndarray | None
    gene: np.ndarray | None


def embed_section(model: STAlign, encoded: EncodedSection, *, batch_size: int = 512) -> SectionEmbedding:
    """Embed a section in evaluation mode."""
    section, was_training = encoded.section, model.training
    model.eval()
    images: list[np.ndarray] = []
    genes: list[np.ndarray] = []
    with torch.inference_mode():
        for start in range(0, len(section), batch_size):
            rows = slice(start, start + batch_size)
            inputs = {"spot_gene": encoded.spot_gene[rows], "niche_gene": encoded.niche_gene[rows]}
            if section.spot_image is not None and section.niche_image is not None:
                inputs["spot_image"] = model.preprocess_spot_image(section.spot_image[rows], colour=section.colour)
                inputs["niche_image"] = model.preprocess_niche_image(section.niche_image[rows], colour=section.colour)
            output = model(**{name: x.to(model.device) for name, x in inputs.items()})
            for joined, parts in ((output.image, images), (output.gene, genes)):
                if joined is not None:
                    parts.append(joined.cpu().numpy())
    model.train(was_training)
    return SectionEmbedding(
        image=np.concatenate(images) if images else None, gene=np.concatenate(genes) if genes else None
    )


def recall_at(query: np.ndarray, key: np.ndarray, *, share: float) -> float:
    """Share of queries whose own key is among the nearest ``share`` of all keys; by chance, ``share``."""
    similarity = query @ key.T
    rank = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
    return float((rank < share * len(key)).mean())
