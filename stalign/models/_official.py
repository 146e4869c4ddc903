"""Checkpoints of the authors' released code, read into the same network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stalign.models._checkpoint import check_state
from stalign.models._config import Provenance
from stalign.models._network import STAlign
from stalign.models._registry import config
from stalign.models._torchfile import read_torch, unwrap

_FUSION = {
    "cross_attn_x": "image_attention",
    "cross_attn_y": "gene_attention",
    "ffn_one": "image_feedforward",
    "ffn_two": "gene_feedforward",
    "ln_fuse": "norm",
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "out",
    "norm_q": "norm_query",
    "norm_kv": "norm_context",
}
_LAYER = {
    "0.norm": "norm1",
    "0.fn.to_qkv": "qkv",
    "0.fn.to_out.0": "proj",
    "1.norm": "norm2",
    "1.fn.net.0": "fc1",
    "1.fn.net.3": "fc2",
}
_HEADS = {"img_local_mlp": "spot_image", "gene_local_mlp": "spot_gene", "local_mlp": "spot", "global_mlp": "niche"}
_BOTTLENECK = {
    "residual_function.0": "conv1",
    "residual_function.1": "bn1",
    "residual_function.3": "conv2",
    "residual_function.4": "bn2",
    "residual_function.6": "conv3",
    "residual_function.7": "bn3",
    "shortcut.0": "downsample.0",
    "shortcut.1": "downsample.1",
}
# Buffers of ours that say which genes the inputs stand for; the published weights never do.
_OWN = ("branches.niche_gene.encoder.mask", "branches.niche_gene.encoder.gene_index")


def _invert(names: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}


def _official_key(key: str) -> str:
    """Name of one of our weights in the authors' state dict."""
    rules: list[tuple[str, Any]] = [
        (r"branches\.spot_image\.encoder\.resnet\.layer(\d)\.(\d)\.(\w+(?:\.\d)?)\.(\w+)", _resnet_block),
        (r"branches\.spot_image\.encoder\.resnet\.conv1\.(\w+)", r"img_local.local_img.0.resnet.conv1.0.\1"),
        (r"branches\.spot_image\.encoder\.resnet\.bn1\.(\w+)", r"img_local.local_img.0.resnet.conv1.1.\1"),
        (r"branches\.spot_image\.encoder\.resnet\.fc\.(\w+)", r"img_local.local_img.0.resnet.fc.\1"),
        (r"branches\.spot_image\.tokens\.conv\.(\w+)", r"img_local.local_img.1.conv1.\1"),
        (r"branches\.spot_gene\.tokens\.conv\.(\w+)", r"gene_local.conv1.\1"),
        (r"branches\.niche_image\.encoder\.front\.(.+)", r"img_global.global_img.0.\1"),
        (r"branches\.niche_image\.encoder\.vit\.(.+)", r"img_global.global_img.1.vit.\1"),
        (r"branches\.niche_image\.tokens\.conv\.(\w+)", r"img_global.global_img.2.conv1.\1"),
        (r"branches\.niche_gene\.encoder\.mix\.(.+)", r"gene_global.global_gene.0.mlp.\1"),
        (r"branches\.niche_gene\.encoder\.layers\.(\d+)\.(\w+)\.(\w+)", _gene_layer),
        (r"branches\.niche_gene\.encoder\.out\.(.+)", r"gene_global.global_gene.2.mlp.\1"),
        (r"(spot|niche)_fusion\.(.+)\.(\w+)", _fusion),
        (r"heads\.(\w+)\.mlp\.(.+)", lambda m: f"{_invert(_HEADS)[m[1]]}.{m[2]}"),
    ]
    for pattern, new in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return new(match) if callable(new) else match.expand(new)
    raise KeyError(f"No published name for {key!r}.")


def _resnet_block(match: re.Match[str]) -> str:
    stage, block, part, kind = match.groups()
    return f"img_local.local_img.0.resnet.conv{int(stage) + 1}_x.{block}.{_invert(_BOTTLENECK)[part]}.{kind}"


def _gene_layer(match: re.Match[str]) -> str:
    return f"gene_global.global_gene.1.layers.{match[1]}.{_invert(_LAYER)[match[2]]}.{match[3]}"


def _fusion(match: re.Match[str]) -> str:
    scale = {"spot": "local", "niche": "global"}[match[1]]
    names = _invert(_FUSION)
    first, _, rest = match[2].partition(".")
    middle = f".{names.get(rest, rest)}" if rest else ""
    return f"{scale}_fusion.{names[first]}{middle}.{match[3]}"


def official_names(model: STAlign) -> dict[str, str]:
    """Our name of every weight → the authors'."""
    return {key: _official_key(key) for key in model.state_dict() if key not in _OWN}


def from_official(source: str | Path | Mapping[str, Any], *, genes: Sequence[str] = ()) -> STAlign:
    """Read a checkpoint of the authors' released code (``dumbgoos/ST-Align``).

    Parameters
    ----------
    source
        A file written by their training script or by ``torch.save`` (read without executing anything in it), or a
        state dict; bare, under ``"model"`` or ``"state_dict"``, with or without ``"module."`` before the names.
    genes
        Vocabulary to attach, if it is known. The checkpoint names no genes: before counts can be embedded,
        ``model.encoder("niche_gene").set_gene_sets(...)`` and ``model.encoder("spot_gene").attach(...)`` must say what
        its inputs are.

    Returns
    -------
    The model of ``models.config("published")`` in evaluation mode; ``niche_image`` and ``niche_gene`` of its output
    are (n, 8, 512) tokens, as published.

    Raises
    ------
    ValueError
        If the file is damaged or refused, or keys are missing, foreign or of another shape.

    Examples
    --------
    >>> from stalign import models
    >>> models.from_official("checkpoint.pth").save("st-align")  # doctest: +SKIP
    """
    is_file = not isinstance(source, Mapping)
    what = str(source) if is_file else "The state dict"
    content = read_torch(Path(source).expanduser()) if is_file else source  # type: ignore[arg-type]
    state = unwrap(content, what=what)
    # Checked against shapes alone, then filled: no random numbers are drawn for 400 million weights.
    with torch.device("meta"):
        model = STAlign(config("published"), genes)
    names = official_names(model)
    shapes = model.state_dict()
    check_state(state, {theirs: shapes[ours] for ours, theirs in names.items()}, what=what)
    model.to_empty(device="cpu")
    own = model.state_dict()
    with torch.no_grad():
        for ours, theirs in names.items():
            own[ours].copy_(state[theirs])
        mask, gene_index = (own[key] for key in _OWN)
        mask.zero_()
        gene_index.fill_(-1)
    model.provenance = Provenance(name="published", folder=str(source) if is_file else "")
    for branch in ("spot_image", "niche_image"):
        model.encoder(branch).provenance = model.provenance
    return model.eval()
