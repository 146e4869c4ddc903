"""The training step, as a Lightning module."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch

from stalign.models._network import STAlign, STAlignOutput
from stalign.train._config import ObjectiveConfig, OptimiserConfig
from stalign.train._data import Batch, EncodedSection
from stalign.train.losses import masked_info_nce, negative_mask, structure_loss


def schedule(step: int, config: OptimiserConfig) -> tuple[float, float]:
    """Return learning rate and weight decay of a step: linear warm-up then cosine, and a cosine from low to high."""
    progress = min(step / max(config.steps, 1), 1.0)
    decay = (
        config.weight_decay_end
        + (config.weight_decay - config.weight_decay_end) * (1 + math.cos(math.pi * progress)) / 2
    )
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup, decay
    after = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * min(after, 1.0))) / 2, decay


def random_rotation(dim: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random (dim, dim) orthogonal matrix."""
    return torch.linalg.qr(torch.randn((dim, dim), generator=generator))[0]


class Alignment(lightning.LightningModule):
    """The three alignments of arXiv 2411.16793, plus the optional structure term.

    Parameters
    ----------
    model
        The network.
    objective, optimiser
        Settings.
    validation
        Sections whose image → gene retrieval is measured.
    seed
        Seed of negatives and rotations.
    """

    def __init__(
        self,
        model: STAlign,
        *,
        objective: ObjectiveConfig,
        optimiser: OptimiserConfig,
        validation: list[EncodedSection],
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.optimiser_config = optimiser
        self.validation = validation
        self.seed = seed

    # -- loss --------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_index: int) -> torch.Tensor:
        """Return the loss of one batch, and log its terms."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        output = self.model(
            spot_image=batch.spot_image,
            spot_gene=batch.spot_gene,
            niche_image=batch.niche_image,
            niche_gene=batch.niche_gene,
        )
        terms = self.alignment_terms(output, batch.clusters, generator)
        if self.objective.structure:
            terms["structure"] = self.objective.structure * self._structure(output, batch.profile)
            if self.objective.rotated:
                weight = self.objective.structure * self.objective.rotated
                terms["rotated"] = weight * self._rotated_structure(batch, generator)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            values = {name: float(term) for name, term in terms.items()}
            raise FloatingPointError(
                f"The loss is {float(loss)} at step {self.global_step}, on a batch of library {batch.library!r}: "
                f"{values}. Lower `optimiser.lr`, or look at that section."
            )
        self.log_dict({f"train/{name}": term for name, term in terms.items()}, batch_size=len(batch.clusters))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.clusters))
        return loss

    def alignment_terms(
        self, output: STAlignOutput, clusters: torch.Tensor, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Return the weighted terms α·L_spot, β·L_niche, (1 - α - β)·L_cross that the output allows."""
        alpha, beta = self.objective.alpha, self.objective.beta
        mask = negative_mask(clusters, self.objective.negatives, generator=generator)
        pairs = {
            "spot": (alpha, output.spot_image, output.spot_gene),
            "niche": (beta, output.niche_image, output.niche_gene),
            "cross": (1 - alpha - beta, output.spot, output.niche),
        }
        return {
            name: weight * self._contrast(query.flatten(1), key.flatten(1), mask)
            for name, (weight, query, key) in pairs.items()
            if query is not None and key is not None
        }

    def _contrast(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        temperature = self.objective.temperature
        loss = masked_info_nce(query, key, mask, temperature=temperature)
        if self.objective.symmetric:
            loss = (loss + masked_info_nce(key, query, mask, temperature=temperature)) / 2
        return loss

    def _structure(self, output: STAlignOutput, profile: torch.Tensor) -> torch.Tensor:
        if output.spot is None or output.niche is None:
            raise ValueError("The structure term needs both fused embeddings.")
        unit = self.model.config.unit_fused
        return structure_loss(output.spot, profile, unit=unit) + structure_loss(output.niche, profile, unit=unit)

    def _rotated_structure(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Structure of profiles in which every gene has another direction; half of the time beside the slide's images.

        An image that has nothing to do with the genes must not bend their geometry.
        """
        rotation = random_rotation(batch.profile.shape[1], generator).to(batch.profile)
        spot = batch.profile if batch.spot_gene is None else batch.spot_gene
        with_image = bool(torch.rand((), generator=generator) < 0.5)
        output = self.model(
            spot_image=batch.spot_image if with_image else None,
            spot_gene=spot @ rotation,
            niche_image=batch.niche_image if with_image else None,
            niche_gene=batch.profile @ rotation,
        )
        return self._structure(output, batch.profile)

    # -- validation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: int, batch_index: int) -> None:
        """Log recall@5 % of image → gene retrieval within one held-out section."""
        from stalign.train._evaluate import embed_section, recall_at

        section = self.validation[batch]
        embedded = embed_section(self.model, section)
        if embedded.image is not None and embedded.gene is not None:
            recall = recall_at(embedded.image, embedded.gene, share=0.05)
            self.log(f"validation/{section.section.name}/recall_at_5_percent", recall, batch_size=1)

    # -- optimiser ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; no weight decay on biases, norms and other vectors."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim >= 2]
        vectors = [p for p in trained if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "decays": True},
            {"params": vectors, "decays": False, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.optimiser_config.lr)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Set learning rate and weight decay of the step."""
        lr, decay = schedule(self.global_step, self.optimiser_config)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = lr
            group["weight_decay"] = decay if group["decays"] else 0.0
