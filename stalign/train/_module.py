"""The training step, as a Lightning module."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning
import torch

from stalign.models._network import STAlign, STAlignOutput
from stalign.train._config import ObjectiveConfig, OptimiserConfig
from stalign.train._data import Batch
from stalign.train._distributed import any_rank, gather_rows, own_rows, share_batch_norm, world
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


class _Neighbourhood:
    """What all processes know of a whole batch: which spots are negatives of which, and which are of one slide."""

    def __init__(self, batch: Batch, mode: str, generator: torch.Generator) -> None:
        clusters, slides = gather_rows(batch.clusters), gather_rows(batch.slides)
        n = len(clusters)
        mine = own_rows()
        self.positive = torch.arange(n, device=clusters.device)[mine]
        self.negatives = negative_mask(clusters, mode, slides=slides, generator=generator)[mine]
        self.same_slide: torch.Tensor | None = None
        self.weight = 1.0
        if bool((slides != slides[0]).any()):
            same = slides[:, None] == slides[None, :]
            self.same_slide = same[mine]
            # A process may hold more or fewer of the pairs than its share.
            self.weight = float(self.same_slide.sum() * world().size / same.sum())


class Alignment(lightning.LightningModule):
    """The three alignments of arXiv 2411.16793, plus the optional structure term.

    With several processes each computes the loss of its own spots against the spots of all, so that the mean over
    processes is the loss of the whole batch, and so are the gradients.

    Parameters
    ----------
    model
        The network.
    objective, optimiser
        Settings; those of the optimiser in steps.
    seed
        Seed of negatives and rotations.
    accumulate
        Batches that make one step.
    start
        Steps that were taken before, by the run that this one goes on from.
    mixed
        Whether the network runs in mixed precision; the losses never do.
    """

    def __init__(
        self,
        model: STAlign,
        *,
        objective: ObjectiveConfig,
        optimiser: OptimiserConfig,
        seed: int,
        accumulate: int = 1,
        start: int = 0,
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.optimiser_config = optimiser
        self.seed = seed
        self.accumulate = accumulate
        self.start = start
        self.mixed = mixed
        self.terms: dict[str, torch.Tensor] = {}

    @property
    def step(self) -> int:
        """Steps taken so far, in this run and in the one it goes on from."""
        return self.start + self.global_step

    def setup(self, stage: str) -> None:
        """Let batch normalisation see the whole batch when several processes share it."""
        if world().size > 1:
            share_batch_norm(self.model, self.trainer.strategy.root_device)

    # -- loss --------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_index: int) -> torch.Tensor:
        """Return the loss of one batch; its terms stay in ``terms``."""
        number = self.step * self.accumulate + batch_index % self.accumulate
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        output = self.model(
            spot_image=batch.spot_image,
            spot_gene=batch.spot_gene,
            niche_image=batch.niche_image,
            niche_gene=batch.niche_gene,
        )
        with self._full_precision():
            around = _Neighbourhood(batch, self.objective.negatives, generator)
            terms = self.alignment_terms(output, around)
            if self.objective.structure:
                terms["structure"] = self.objective.structure * self._structure(output, batch, around)
        if self.objective.structure and self.objective.rotated:
            weight = self.objective.structure * self.objective.rotated
            terms["rotated"] = weight * self._rotated_structure(batch, around, generator)
        if not terms:
            # Without its image or its genes a batch has nothing to align, unless both fused embeddings are compared.
            parts = [p.sum() for p in self.model.parameters() if p.requires_grad]
            terms["none"] = 0.0 * torch.stack(parts).sum()
        loss = torch.stack(list(terms.values())).sum()
        self._check_finite(loss, terms, batch.library)
        self.terms = {name: term.detach() for name, term in {**terms, "loss": loss}.items() if name != "none"}
        return loss

    def _full_precision(self) -> AbstractContextManager[Any]:
        """Exponentials of similarities over a temperature need more digits than mixed precision has."""
        return torch.autocast(self.device.type, enabled=False) if self.mixed else nullcontext()

    def _check_finite(self, loss: torch.Tensor, terms: dict[str, torch.Tensor], library: str) -> None:
        # Asked of all processes, so that they stop together.
        if not any_rank(not bool(torch.isfinite(loss)), loss.device):
            return
        here = not bool(torch.isfinite(loss))
        what = f"{float(loss.detach())}" if here else "not finite in another process"
        values = {name: float(term.detach()) for name, term in terms.items()}
        raise FloatingPointError(
            f"The loss is {what} at step {self.step}, on a batch of library {library!r}"
            f"{f' ({values})' if here else ''}. Lower `optimiser.lr`, or look at that section."
        )

    def alignment_terms(self, output: STAlignOutput, around: _Neighbourhood) -> dict[str, torch.Tensor]:
        """Return the weighted terms α·L_spot, β·L_niche, (1 - α - β)·L_cross that output and objective allow."""
        alpha, beta = self.objective.alpha, self.objective.beta
        pairs = {
            "spot": (alpha, output.spot_image, output.spot_gene),
            "niche": (beta, output.niche_image, output.niche_gene),
            "cross": (1 - alpha - beta, output.spot, output.niche),
        }
        return {
            name: weight * self._contrast(query.flatten(1).float(), key.flatten(1).float(), around)
            for name, (weight, query, key) in pairs.items()
            if getattr(self.objective, name) and query is not None and key is not None
        }

    def _contrast(self, query: torch.Tensor, key: torch.Tensor, around: _Neighbourhood) -> torch.Tensor:
        def towards(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            temperature = self.objective.temperature
            return masked_info_nce(
                x, gather_rows(y), around.negatives, positive=around.positive, temperature=temperature
            )

        loss = towards(query, key)
        return (loss + towards(key, query)) / 2 if self.objective.symmetric else loss

    def _structure(self, output: STAlignOutput, batch: Batch, around: _Neighbourhood) -> torch.Tensor:
        if output.spot is None or output.niche is None:
            raise ValueError("The structure term needs both fused embeddings.")
        unit = self.model.config.unit_fused
        losses = [
            structure_loss(
                embedding.float(),
                profile,
                unit=unit,
                against=None if world().size == 1 else (gather_rows(embedding.float()), gather_rows(profile)),
                mask=around.same_slide,
            )
            for embedding, profile in ((output.spot, batch.spot_profile), (output.niche, batch.niche_profile))
        ]
        loss = losses[0] + losses[1]
        return loss if around.weight == 1.0 else around.weight * loss

    def _rotated_structure(self, batch: Batch, around: _Neighbourhood, generator: torch.Generator) -> torch.Tensor:
        """Structure of profiles in which every gene has another direction; half of the time beside the slide's images.

        An image that has nothing to do with the genes must not bend their geometry.
        """
        rotation = random_rotation(batch.niche_profile.shape[1], generator).to(batch.niche_profile)
        spot = batch.spot_profile if batch.spot_gene is None else batch.spot_gene
        with_image = bool(torch.rand((), generator=generator) < 0.5)
        output = self.model(
            spot_image=batch.spot_image if with_image else None,
            spot_gene=spot @ rotation,
            niche_image=batch.niche_image if with_image else None,
            niche_gene=batch.niche_profile @ rotation,
        )
        with self._full_precision():
            return self._structure(output, batch, around)

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
        # In mixed precision Lightning does not clip the gradients of fused optimisers.
        fused = self.optimiser_config.fused and not self.mixed
        return torch.optim.AdamW(groups, lr=self.optimiser_config.lr, fused=fused)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Set learning rate and weight decay of the step."""
        lr, decay = schedule(self.step, self.optimiser_config)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = lr
            group["weight_decay"] = decay if group["decays"] else 0.0
