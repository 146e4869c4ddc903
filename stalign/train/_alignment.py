"""Refit the image sides in closed form: what the image of a spot says about its expression on patients left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn

from stalign._logging import logger
from stalign.models._heads import ProjectionHead
from stalign.models._network import STAlign
from stalign.models._tokens import LinearTokens
from stalign.train._config import AlignmentFitConfig
from stalign.train._data import EncodedSection
from stalign.train._evaluate import inputs_of, recall_at
from stalign.train._prediction import imaged_sections, spread_rows

_RECALL_SHARE = 0.05
_BATCH = 512


class _Pair(NamedTuple):
    """One scale of a section: (n, d) what the image is mapped from, and (n, out) the gene side that it is to meet."""

    features: np.ndarray
    target: np.ndarray


class _Map(NamedTuple):
    """(d, out) weights, and (d,) features that are mapped to zero."""

    weight: np.ndarray
    centre: np.ndarray


def fit_alignment(model: STAlign, sections: Sequence[EncodedSection], config: AlignmentFitConfig) -> STAlign:
    """Fit the image heads anew: ridge regression from the image encoders' features to the gene sides.

    A contrast between the spots of few patients learns what tells these patients' spots apart, and little of it holds
    for the next patient. So the gene sides of a model with a bypass are taken back to the profiles that they started
    from (those of other models stay as they are), and the image sides are fitted to them. Where the tokens are a linear
    image of the encoder's features, the ridge's penalty is on the features, so that the tokens' own lengths and
    directions, which that contrast has learned, have no say; elsewhere it is on the tokens. The ridge is centred within
    each section, each section counts alike, and its penalty is the one with the best mean recall of a spot's own gene
    side, with each patient left out in turn.

    Parameters
    ----------
    model
        A trained model whose image heads are linear.
    sections
        Training sections; those with an image are used, or as many of them as the config says.
    config
        Whether to, and the penalties.

    Returns
    -------
    The same model, on the CPU, in evaluation mode.

    Raises
    ------
    ValueError
        If an image head is not one linear layer.
    """
    model = model.cpu().eval()
    imaged = imaged_sections(sections, config.max_sections)
    if not config.enabled or not imaged:
        return model
    scales = _scales(model)
    heads = check_alignable(model)
    if model.config.bypass:
        for scale in scales:
            cast("ProjectionHead", model.heads[f"{scale}_gene"]).start_at_zero()
    pairs = [[_pair(model, section, scale, config.max_spots) for scale in scales] for section in imaged]
    penalty = _choose_penalty(pairs, [section.section.patient for section in imaged], config.penalties)
    for scale, layer, found, of_scale in zip(
        scales, heads, _fit(pairs, penalty), zip(*pairs, strict=True), strict=True
    ):
        fitted = _as_long_as_target(found, of_scale)
        weight, bias = fitted.weight, -fitted.centre @ fitted.weight
        tokens = _linear_tokens(model, scale)
        if tokens is not None:
            weight, bias = _through(tokens, weight, bias)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight.T))
            layer.bias.copy_(torch.from_numpy(bias))
    logger.info("Image sides: fitted to the gene sides of %d sections, ridge penalty %g.", len(imaged), penalty)
    return model


def check_alignable(model: STAlign) -> list[nn.Linear]:
    """Return the layers of the image heads, spot and niche.

    Raises
    ------
    ValueError
        If an image head is not one linear layer.
    """
    layers = []
    for name in (f"{scale}_image" for scale in _scales(model)):
        head = cast("ProjectionHead", model.heads[name])
        if not isinstance(head.mlp, nn.Linear) or head.skip is not None:
            raise ValueError(
                f"alignment.enabled needs heads of one linear layer, but that of {name} has a hidden layer. Leave out "
                "`heads.hidden` and `heads.skip` in `network.changes`, or set `alignment.enabled = false`."
            )
        layers.append(head.mlp)
    return layers


def _scales(model: STAlign) -> tuple[str, ...]:
    # A model whose niche has tokens in place of an embedding aligns the spot alone.
    return ("spot", "niche") if model.config.heads.niche else ("spot",)


def _as_long_as_target(fitted: _Map, pairs: Sequence[_Pair]) -> _Map:
    """Undo what the penalty takes from the length of the embeddings.

    Directions stay. Weights that a large penalty has made tiny would lose theirs in half precision.
    """
    predicted = sum(float(((pair.features - fitted.centre) @ fitted.weight).std()) for pair in pairs)
    wanted = sum(float((pair.target - pair.target.mean(axis=0)).std()) for pair in pairs)
    return fitted._replace(weight=fitted.weight * (wanted / predicted if predicted > 0 else 1.0))


def _linear_tokens(model: STAlign, scale: str) -> nn.Linear | None:
    """Return the map from an image encoder's features to the tokens, where the head can undo it."""
    tokens = model.branch(f"{scale}_image").tokens
    head = cast("ProjectionHead", model.heads[f"{scale}_image"])
    if not isinstance(tokens, LinearTokens) or head.pool != "flatten":
        return None
    return tokens.proj if tokens.proj.in_features <= tokens.proj.out_features else None


def _through(tokens: nn.Linear, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn a map of features into the shortest one of tokens that says the same."""
    to_tokens = tokens.weight.detach().double().numpy().T
    of_tokens = np.linalg.pinv(to_tokens) @ weight
    return of_tokens, bias - tokens.bias.detach().double().numpy() @ of_tokens


def _pair(model: STAlign, section: EncodedSection, scale: str, max_spots: int) -> _Pair:
    rows = spread_rows(len(section), max_spots)
    branch, head = model.branch(f"{scale}_image"), cast("ProjectionHead", model.heads[f"{scale}_image"])
    linear = _linear_tokens(model, scale) is not None
    features, target = [], []
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            inputs = inputs_of(model, section, rows[start : start + _BATCH])
            image = inputs[f"{scale}_image"]
            features.append((branch.encode(image) if linear else head.pooled(branch(image))).float().numpy())
            output = model(**{name: inputs[name] for name in ("spot_gene", "niche_gene")})
            target.append(getattr(output, f"{scale}_gene").float().numpy())
    return _Pair(np.concatenate(features).astype(np.float64), np.concatenate(target).astype(np.float64))


def _fit(pairs: Sequence[Sequence[_Pair]], penalty: float) -> list[_Map]:
    """One map for each scale. The penalty is in units of the features' mean variance."""
    maps = []
    for scale in zip(*pairs, strict=True):
        centred = [pair.features - pair.features.mean(axis=0) for pair in scale]
        gram = sum(x.T @ x / len(x) for x in centred)
        cross = sum(x.T @ (p.target - p.target.mean(axis=0)) / len(x) for x, p in zip(centred, scale, strict=True))
        strength = max(penalty * np.trace(gram) / len(gram), 1e-12)
        weight = np.linalg.solve(gram + strength * np.eye(len(gram)), cross)
        maps.append(_Map(weight, np.mean([pair.features.mean(axis=0) for pair in scale], axis=0)))
    return maps


def _choose_penalty(pairs: Sequence[Sequence[_Pair]], patients: Sequence[str], penalties: Sequence[float]) -> float:
    """Return the penalty with the best recall on patients (of a single one: sections) left out in turn."""
    groups: Sequence[object] = patients if len(set(patients)) > 1 else range(len(pairs))
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        return float(np.median(penalties))
    recalls = np.zeros((len(penalties), len(names)))
    for column, left in enumerate(names):
        kept = [pair for pair, group in zip(pairs, groups, strict=True) if group != left]
        held = [pair for pair, group in zip(pairs, groups, strict=True) if group == left]
        for row, penalty in enumerate(penalties):
            maps = _fit(kept, penalty)
            recalls[row, column] = np.mean([_recall(section, maps) for section in held])
    return float(penalties[int(recalls.mean(axis=1).argmax())])


def _recall(scales: Sequence[_Pair], maps: Sequence[_Map]) -> float:
    image = [_unit((pair.features - fitted.centre) @ fitted.weight) for pair, fitted in zip(scales, maps, strict=True)]
    return recall_at(np.hstack(image), np.hstack([_unit(pair.target) for pair in scales]), share=_RECALL_SHARE)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
