"""Fit the prediction head in closed form on the frozen aligned embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from scipy.special import ndtri

from stalign._logging import logger
from stalign.genes import normalise_log1p
from stalign.models._config import PredictionConfig
from stalign.models._conformal import LEVELS, MAX_RESIDUALS, conformal_quantiles
from stalign.models._heads import GenePrediction
from stalign.models._network import STAlign
from stalign.train._config import PredictionFitConfig
from stalign.train._data import EncodedSection
from stalign.train._evaluate import embed_section

T = TypeVar("T")

# A gene is worth predicting where at least this share of a section's spots expresses it …
_MIN_DETECTED = 0.05
# … in sections of at least this many patients, fewer where fewer patients have an image.
_MIN_PATIENTS = 2


# Shares of the niche's mean in a prediction that are tried.
_NICHE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class _Fitted(NamedTuple):
    """(n, d) features of the spots and their means over the niches, (n, genes) expression, and which were measured."""

    features: np.ndarray
    niche_features: np.ndarray
    expression: np.ndarray
    measured: np.ndarray


class _Moments(NamedTuple):
    """X'X / n and X'Y / n of a section, centred, and which genes it measured."""

    gram: np.ndarray
    cross: np.ndarray
    measured: np.ndarray


class _Choice(NamedTuple):
    """Penalty, share of the niche's mean, and (genes,) root of the mean squared residual on what was left out."""

    penalty: float
    niche_share: float
    spread: np.ndarray


def fit_prediction(model: STAlign, sections: Sequence[EncodedSection], config: PredictionFitConfig) -> STAlign:
    """Give the model a prediction head: ridge regression from its image embeddings to log-normalised expression.

    Features and expression are centred within each section, so that what is learned is the variation over tissue and
    not the difference between slides; each section counts alike, however many spots it has. What is predicted for a
    spot is averaged with what is predicted over its niche. The ridge penalty, the share of the niche, the residual
    spread and the half-widths of prediction intervals come from leaving out one patient at a time. A gene a section did
    not measure takes nothing from that section.

    Parameters
    ----------
    model
        A trained model.
    sections
        Training sections; those with an image are used, or as many of them as the config says.
    config
        Number of genes and penalties.

    Returns
    -------
    The same model in evaluation mode, on the CPU; without a head if there is no image or no gene to predict.
    """
    imaged = imaged_sections(sections, config.max_sections)
    gene_index = choose_genes(imaged, config.n_genes) if imaged and config.n_genes else np.array([], dtype=np.int64)
    if not len(gene_index):
        logger.info(
            "No prediction head: %s.", "no gene is well detected" if imaged and config.n_genes else "none asked"
        )
        return model.cpu().eval()
    # A model whose niche has tokens in place of an embedding predicts from the spot alone.
    inputs = ("spot_image", "niche_image") if model.config.heads.niche else ("spot_image",)
    fitted = [_prepare(model, section, gene_index, inputs, config.max_spots) for section in imaged]
    patients = [section.section.patient for section in imaged]
    choice = _choose(fitted, patients, config.penalties)
    weight = _ridge([_moments(section) for section in fitted], choice.penalty)
    scale = np.sqrt(_pooled_mean([(f.expression - f.expression.mean(axis=0)) ** 2 for f in fitted], fitted))
    scale[scale == 0] = 1.0
    head_config = PredictionConfig(
        n_genes=len(gene_index), inputs=inputs, levels=LEVELS, niche_share=choice.niche_share
    )
    half_widths = _half_widths(fitted, patients, choice)
    head = GenePrediction(model.config.heads.out, head_config)
    values = {
        "net.weight": (weight / scale).T,
        "net.bias": np.zeros(len(gene_index)),
        "gene_index": gene_index,
        "mean": _pooled_mean([f.expression for f in fitted], fitted),
        "scale": scale,
        "sd": choice.spread,
        "half_widths": half_widths,
        "centre": np.mean([f.features.mean(axis=0) for f in fitted], axis=0),
    }
    head.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in values.items()})
    model.prediction = head
    model.config = replace(model.config, prediction=head_config)
    logger.info(
        "Prediction head: %d genes, ridge penalty %g, share of the niche %g.",
        *(len(gene_index), choice.penalty, choice.niche_share),
    )
    return model.cpu().eval()


def imaged_sections(sections: Sequence[EncodedSection], limit: int) -> list[EncodedSection]:
    """Return the sections with an image; of more than ``limit``, those spread over their order, hence over patients."""
    imaged = [section for section in sections if section.section.has_image]
    return [imaged[i] for i in spread_rows(len(imaged), limit)]


def spread_rows(n: int, limit: int) -> np.ndarray:
    """Return at most ``limit`` of ``n`` places, spread evenly."""
    return np.linspace(0, n - 1, limit).round().astype(np.intp) if n > limit else np.arange(n)


def choose_genes(sections: Sequence[EncodedSection], n_genes: int) -> np.ndarray:
    """Return places in the vocabulary of the genes that vary most within sections, among those well detected.

    Parameters
    ----------
    sections
        Sections with an image.
    n_genes
        How many at most.
    """
    patients = sorted({section.section.patient for section in sections})
    n_vocabulary = sections[0].section.counts.shape[1]
    detected = np.zeros((len(patients), n_vocabulary), dtype=bool)
    variance = np.zeros(n_vocabulary)
    for encoded in sections:
        expression = normalise_log1p(encoded.section.counts)
        share = np.bincount(expression.indices, minlength=n_vocabulary) / len(encoded)
        detected[patients.index(encoded.section.patient)] |= share >= _MIN_DETECTED
        mean = np.asarray(expression.mean(axis=0)).ravel()
        variance += np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    candidates = np.flatnonzero(detected.sum(axis=0) >= min(_MIN_PATIENTS, len(patients)))
    best = candidates[np.argsort(-variance[candidates], kind="stable")][:n_genes]
    return np.sort(best)


def _prepare(
    model: STAlign, section: EncodedSection, gene_index: np.ndarray, inputs: Sequence[str], max_spots: int
) -> _Fitted:
    embedded = embed_section(model, section)
    # The head gets unit vectors side by side: for spot and niche √2 times the joined unit vector.
    embedding = embedded.image if len(inputs) == 2 else embedded.spot_image
    if embedding is None:
        raise ValueError(f"Section {section.section.name!r} has no image.")
    n = len(section)
    rows = spread_rows(n, max_spots)
    counts = section.section.counts
    expression = normalise_log1p(counts if n <= max_spots else counts[rows])[:, gene_index].toarray()
    expression = expression.astype(np.float64)
    features = embedding.astype(np.float64) * np.sqrt(len(inputs))
    return _Fitted(
        features=features[rows],
        niche_features=(section.section.connectivities[rows] @ features),
        expression=expression,
        measured=np.asarray(expression.any(axis=0)),
    )


def _pooled_mean(values: list[np.ndarray], fitted: Sequence[_Fitted]) -> np.ndarray:
    """Mean of (n, genes) values over the sections that measured each gene, each section counting alike."""
    total = sum(v.mean(axis=0) * f.measured for v, f in zip(values, fitted, strict=True))
    n_sections = sum(f.measured.astype(np.float64) for f in fitted)
    return np.divide(total, n_sections, out=np.zeros_like(total), where=n_sections > 0)


def _moments(section: _Fitted) -> _Moments:
    features, n = section.features - section.features.mean(axis=0), len(section.features)
    cross = features.T @ (section.expression - section.expression.mean(axis=0)) / n
    return _Moments(features.T @ features / n, cross, section.measured)


def _ridge(moments: Sequence[_Moments], penalty: float) -> np.ndarray:
    """Solve the ridge regression; (features, genes). The penalty is in units of the features' mean variance."""
    measured = np.array([section.measured for section in moments])
    n_features = len(moments[0].gram)
    weight = np.zeros((n_features, measured.shape[1]))
    # Genes measured by the same sections share one system of equations.
    patterns, member = np.unique(measured, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        if not pattern.any():
            continue
        columns = np.flatnonzero(member.ravel() == number)
        used = [section for section, there in zip(moments, pattern, strict=True) if there]
        gram = sum(section.gram for section in used)
        strength = penalty * np.trace(gram) / n_features
        cross = sum(section.cross[:, columns] for section in used)
        weight[:, columns] = np.linalg.solve(gram + max(strength, 1e-12) * np.eye(n_features), cross)
    return weight


def _choose(fitted: Sequence[_Fitted], patients: Sequence[str], penalties: Sequence[float]) -> _Choice:
    """Return the penalty and the share of the niche with the least squared error on what is left out in turn."""
    if not penalties:
        raise ValueError("penalties is empty.")
    parts, groups = _parts(fitted, patients)
    moments = [_moments(part) for part in parts]
    best: _Choice | None = None
    for penalty in penalties:
        weights = {left: _ridge(_others(moments, groups, left), penalty) for left in dict.fromkeys(groups)}
        for share in _NICHE_SHARES:
            squares = [
                (part.expression - part.expression.mean(axis=0) - _centred(part, share) @ weights[group]) ** 2
                for part, group in zip(parts, groups, strict=True)
            ]
            spread = np.sqrt(_pooled_mean(squares, parts))
            if best is None or (spread**2).mean() < (best.spread**2).mean():
                best = _Choice(float(penalty), share, spread)
    return cast("_Choice", best)


def _centred(section: _Fitted, share: float) -> np.ndarray:
    """Features mixed with those of the niche, less the mean over the slide."""
    mixed = (1 - share) * section.features + share * section.niche_features
    return np.asarray(mixed - section.features.mean(axis=0))


def _parts(fitted: Sequence[_Fitted], patients: Sequence[str]) -> tuple[list[_Fitted], list[object]]:
    """Return what is left out in turn: sections by patient, those of a single patient by section, else quarters."""
    if len(set(patients)) > 1:
        return list(fitted), list(patients)
    parts = list(fitted) if len(fitted) > 1 else _quarters(fitted[0])
    return parts, list(range(len(parts)))


def _others(values: Sequence[T], groups: Sequence[object], left: object) -> list[T]:
    return [value for value, group in zip(values, groups, strict=True) if group != left]


def _quarters(fitted: _Fitted) -> list[_Fitted]:
    rows = np.array_split(np.arange(len(fitted.features)), min(4, max(2, len(fitted.features) // 2)))
    return [
        _Fitted(fitted.features[part], fitted.niche_features[part], fitted.expression[part], fitted.measured)
        for part in rows
    ]


def _half_widths(fitted: Sequence[_Fitted], patients: Sequence[str], choice: _Choice) -> np.ndarray:
    """Return (levels, genes) half-widths of intervals, from patients (else sections, else quarters) left out in turn.

    The residuals are those of the prediction as a whole, mean included, since a new slide's mean is predicted, too.
    """
    parts, groups = _parts(fitted, patients)
    moments = [_moments(part) for part in parts]
    limit = max(20, MAX_RESIDUALS // len(parts))
    residuals, valid = [], []
    for part, group in zip(parts, groups, strict=True):
        others = _others(parts, groups, group)
        mean = _pooled_mean([other.expression for other in others], others)
        rows = np.unique(np.linspace(0, len(part.features) - 1, min(len(part.features), limit)).round().astype(np.intp))
        weight = _ridge(_others(moments, groups, group), choice.penalty)
        predicted = mean + _centred(part, choice.niche_share)[rows] @ weight
        residuals.append(np.abs(part.expression[rows] - predicted).astype(np.float32))
        valid.append(part.measured & np.any([other.measured for other in others], axis=0))
    quantiles = conformal_quantiles(residuals, LEVELS, valid=valid, groups=groups)
    # A gene that only one patient has: as if its residuals within that patient were normal.
    normal = np.outer(ndtri((1 + np.array(LEVELS)) / 2), choice.spread)
    return np.where(np.isnan(quantiles), normal, quantiles).astype(np.float32)
