"""What a model is made of, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from stalign.models._config import BRANCHES

if TYPE_CHECKING:
    from torch import nn

    from stalign.models._network import STAlign


class Part(NamedTuple):
    """One part of a model; ``flops`` are those of a forward pass of one spot, two per multiply-add."""

    name: str
    encoder: str
    parameters: int
    trainable: int
    flops: int
    megabytes: float


class Summary(NamedTuple):
    """Parts of a model and their sums; its text is a table.

    Attributes
    ----------
    name
        Name of the config.
    parts
        Branches, fusion networks, heads, and the prediction head where there is one.
    parameters, trainable
        Numbers of parameters.
    flops
        Floating-point operations of one spot's forward pass, two per multiply-add.
    megabytes
        Memory of parameters and buffers.
    """

    name: str
    parts: tuple[Part, ...]
    parameters: int
    trainable: int
    flops: int
    megabytes: float

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("part", "encoder", "parameters", "trainable", "frozen", "GFLOPs/spot", "MB")]
        total = Part("total", "", self.parameters, self.trainable, self.flops, self.megabytes)
        for part in (*self.parts, total):
            numbers = (part.parameters, part.trainable, part.parameters - part.trainable)
            costs = (f"{part.flops / 1e9:.3f}", f"{part.megabytes:.1f}")
            rows.append((part.name, part.encoder, *(f"{number:,}" for number in numbers), *costs))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            values = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join([*names, *values]))
        return "\n".join([f"STAlign {self.name!r}", *lines])


def _flops(model: STAlign) -> dict[str, int]:
    """FLOPs of each part, counted on a copy without data: shapes are all it takes."""
    from torch.utils.flop_counter import FlopCounterMode

    from stalign.models._network import STAlign

    geometry = model.geometry
    with torch.device("meta"):
        copy = STAlign(model.config, model.genes).eval()
        inputs = {
            "spot_image": torch.empty(1, 3, geometry.spot_pixels, geometry.spot_pixels),
            "niche_image": torch.empty(1, 3, geometry.niche_pixels, geometry.niche_pixels),
            "spot_gene": torch.empty(1, copy.encoder("spot_gene").input_dim),
            "niche_gene": torch.empty(1, copy.encoder("niche_gene").input_dim),
        }
        for name in ("spot_image", "niche_image"):
            size = copy.encoder(name).size
            if size is not None:  # preprocess resamples to it
                inputs[name] = torch.empty(1, 3, size, size)
        counts: dict[str, int] = {}
        with torch.no_grad():
            tokens = {}
            for name in BRANCHES:
                with FlopCounterMode(display=False) as counter:
                    tokens[name] = copy.branches[name](inputs[name])
                counts[name] = counter.get_total_flops()
            for scale in ("spot", "niche"):
                fusion = copy.spot_fusion if scale == "spot" else copy.niche_fusion
                with FlopCounterMode(display=False) as counter:
                    tokens[scale] = fusion(tokens[f"{scale}_image"], tokens[f"{scale}_gene"])
                counts[f"{scale}_fusion"] = counter.get_total_flops()
            embeddings = dict(tokens)
            with FlopCounterMode(display=False) as counter:
                for name, head in copy.heads.items():
                    embeddings[name] = head(tokens[name])
            counts["heads"] = counter.get_total_flops()
            if copy.prediction is not None:
                with FlopCounterMode(display=False) as counter:
                    copy.prediction([embeddings[name] for name in copy.prediction.inputs])
                counts["prediction"] = counter.get_total_flops()
    return counts


def _part(name: str, module: nn.Module, encoder: str, flops: int) -> Part:
    parameters = list(module.parameters())
    tensors = [*parameters, *module.buffers()]
    return Part(
        name=name,
        encoder=encoder,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        flops=flops,
        megabytes=sum(t.numel() * t.element_size() for t in tensors) / 2**20,
    )


def summarise(model: STAlign) -> Summary:
    """Summarise ``model``; see :meth:`STAlign.summary`."""
    flops = _flops(model)
    modules: dict[str, nn.Module] = {name: model.branches[name] for name in BRANCHES}
    modules |= {"spot_fusion": model.spot_fusion, "niche_fusion": model.niche_fusion, "heads": model.heads}
    if model.prediction is not None:
        modules["prediction"] = model.prediction
    if len(model.missing_tokens):
        modules["missing_tokens"] = model.missing_tokens
    parts = tuple(
        _part(name, module, model.config.branch(name).encoder if name in BRANCHES else "", flops.get(name, 0))
        for name, module in modules.items()
    )
    return Summary(
        name=model.config.name,
        parts=parts,
        parameters=sum(part.parameters for part in parts),
        trainable=sum(part.trainable for part in parts),
        flops=sum(part.flops for part in parts),
        megabytes=sum(part.megabytes for part in parts),
    )
