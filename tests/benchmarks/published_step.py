"""The published training step, as a baseline: every spot and five negatives of it through the whole network.

Written from a description of what the released code does. As released it stops at its first step, since the global
image and gene features reach the loss as (n, 8, 512); here they are flattened. Nothing is frozen; each of the six
batches passes all of the network with gradient, what the loss does not use of the negatives (their local image, global
image and local fused embeddings) included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stalign.models import STAlign
from stalign.train.losses import info_nce

N_NEGATIVES = 5
ALPHA, BETA, TEMPERATURE = 0.3, 0.3, 0.1
LR, LR_BATCH, WEIGHT_DECAY = 5e-4, 256, 0.04


class Spots(NamedTuple):
    """Inputs of the network: two images (n, 3, side, side), two expression vectors.

    The niche's image may be the (n, dim) features of its encoder.
    """

    spot_image: torch.Tensor
    spot_gene: torch.Tensor
    niche_image: torch.Tensor
    niche_gene: torch.Tensor


def random_spots(model: STAlign, n: int, *, features: bool, seed: int) -> Spots:
    """Make inputs of the shapes that a model takes."""
    generator = torch.Generator().manual_seed(seed)
    small, large = model.geometry.spot_pixels, model.geometry.niche_pixels
    niche = (model.encoder("niche_image").dim,) if features else (3, large, large)
    widths = [model.encoder(name).input_dim for name in ("spot_gene", "niche_gene")]
    shapes = ((3, small, small), (widths[0],), niche, (widths[1],))
    return Spots(*(torch.randn((n, *shape), generator=generator) for shape in shapes))


def published_loss(model: STAlign, positives: Spots, negatives: list[Spots]) -> torch.Tensor:
    """Six passes, three contrasts; the negatives come from the side of the key."""
    found = model(**positives._asdict())
    others = [model(**spots._asdict()) for spots in negatives]

    def contrast(query: str, key: str) -> torch.Tensor:
        against = torch.stack([getattr(other, key).flatten(1) for other in others], dim=1)
        return info_nce(
            getattr(found, query).flatten(1), getattr(found, key).flatten(1), against, temperature=TEMPERATURE
        )

    return (
        ALPHA * contrast("spot_image", "spot_gene")
        + BETA * contrast("niche_image", "niche_gene")
        + (1 - ALPHA - BETA) * contrast("spot", "niche")
    )


class PublishedStep:
    """The optimiser's step around it: AdamW on every parameter, no decay on vectors."""

    def __init__(self, model: STAlign, batch_size: int) -> None:
        self.model = model.requires_grad_(True).train()
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=LR * batch_size / LR_BATCH, weight_decay=WEIGHT_DECAY)

    def __call__(self, positives: Spots, negatives: list[Spots]) -> float:
        loss = published_loss(self.model, positives, negatives)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())
