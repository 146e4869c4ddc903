"""Fit the prediction head in closed form on the frozen aligned embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

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
from stalign.train._programmes import Coexpression, Programmes, coexpression, find_programmes

T = TypeVar("T")

# A gene is worth predicting where at least this share of a section's spots expresses it …
_MIN_DETECTED = 0.05
# … in sections of at least this many patients, fewer where fewer patients have an image.
_MIN_PATIENTS = 2

# Penalty, programmes and share of the niche are chosen by as many genes, those that vary most. The others are mostly
# noise, which is predicted best by predicting nothing.
_CHOICE_GENES = 300
# Shares of the niche's mean in a prediction that are tried.
_NICHE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class _Fitted(NamedTuple):
    """(n, d) features of the spots and their means over the niches, (n, genes) expression, and which were measured.

    ``weight`` is one over the number of sections of the patient: near replicates are not independent.
    """

    features: np.ndarray
    niche_features: np.ndarray
    expression: np.ndarray
    measured: np.ndarray
    weight: float = 1.0

    def of_genes(self, genes: np.ndarray) -> _Fitted:
        """Return the same of some genes."""
        return self._replace(expression=self.expression[:, genes], measured=self.measured[genes])


class _Moments(NamedTuple):
    """X'X / n and X'Y / n of a section about the slide's means, the variances of Y, and which genes it measured."""

    gram: np.ndarray
    cross: np.ndarray
    variance: np.ndarray
    measured: np.ndarray
    weight: float


class _Choice(NamedTuple):
    """What errs least on what is left out."""

    penalty: float
    niche_share: float
    n_programmes: int


class _Fold(NamedTuple):
    """One group of what is left out in turn, and what all the others say."""

    held: list[_Fitted]
    others: list[_Fitted]
    moments: list[_Moments]
    programmes: Programmes | None

    def weight(self, choice: _Choice) -> np.ndarray:
        """Return the (features, genes) weights that the others give."""
        return _confine(_ridge(self.moments, choice.penalty), self.programmes, choice.n_programmes)


class _Coexpressed(NamedTuple):
    """How genes vary together on each section, with an image or without, and whose sections these are."""

    sections: list[Coexpression]
    patients: list[str]

    def programmes(self, n: int, *, without: str | None = None) -> Programmes | None:
        """Return the programmes of all patients but the one of that name; None where nobody is left."""
        kept = [i for i, patient in enumerate(self.patients) if patient != without]
        return find_programmes([self.sections[i] for i in kept], [self.patients[i] for i in kept], n)


def fit_prediction(model: STAlign, sections: Sequence[EncodedSection], config: PredictionFitConfig) -> STAlign:
    """Give the model a prediction head: ridge regression from its image embeddings to log-normalised expression.

    Features and expression are centred within each section, so that what is learned is the variation over tissue and
    not the difference between slides; each patient counts alike, however many sections and spots they have. What is
    predicted is confined to the strongest programmes of genes that vary together over tissue, which sections without an
    image tell of, too; and what is predicted for a spot is averaged with what is predicted over its niche. The ridge
    penalty, the number of programmes, the share of the niche, the residual spread and the half-widths of prediction
    intervals come from leaving out one patient at a time. A gene a section did not measure takes nothing from that
    section.

    Parameters
    ----------
    model
        A trained model.
    sections
        Training sections, or as many of them as the config says: those with an image for the regression, all of them
        for the programmes.
    config
        Number of genes, and what is tried.

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
    patients = [section.section.patient for section in imaged]
    fitted = [
        _prepare(model, section, gene_index, inputs, config.max_spots)._replace(
            weight=1 / patients.count(section.section.patient)
        )
        for section in imaged
    ]
    coexpressed = _coexpressed(sections, gene_index, config) if any(config.programmes) else _Coexpressed([], [])
    n_programmes = max(config.programmes)
    folds = _folds(fitted, patients, coexpressed, n_programmes)
    choice = _choose(folds, config)
    weight = _ridge([_moments(section) for section in fitted], choice.penalty)
    weight = _confine(weight, coexpressed.programmes(n_programmes), choice.n_programmes)
    scale = np.sqrt(_pooled_mean([(f.expression - f.expression.mean(axis=0)) ** 2 for f in fitted], fitted))
    scale[scale == 0] = 1.0
    spread = _spread(folds, choice)
    head_config = PredictionConfig(
        n_genes=len(gene_index), inputs=inputs, levels=LEVELS, niche_share=choice.niche_share
    )
    half_widths = _half_widths(folds, choice, spread)
    head = GenePrediction(model.config.heads.out, head_config)
    values = {
        "net.weight": (weight / scale).T,
        "net.bias": np.zeros(len(gene_index)),
        "gene_index": gene_index,
        "mean": _pooled_mean([f.expression for f in fitted], fitted),
        "scale": scale,
        "sd": spread,
        "half_widths": half_widths,
        "centre": np.average([f.features.mean(axis=0) for f in fitted], axis=0, weights=[f.weight for f in fitted]),
    }
    head.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in values.items()})
    model.prediction = head
    model.config = replace(model.config, prediction=head_config)
    logger.info(
        "Prediction head: %d genes, ridge penalty %g, %s, share of the niche %g.",
        *(len(gene_index), choice.penalty),
        f"{choice.n_programmes} programmes of genes" if choice.n_programmes else "each gene for itself",
        choice.niche_share,
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


def _coexpressed(
    sections: Sequence[EncodedSection], gene_index: np.ndarray, config: PredictionFitConfig
) -> _Coexpressed:
    used = [sections[i].section for i in spread_rows(len(sections), config.max_sections)]
    found = []
    for section in used:
        expression = normalise_log1p(section.counts)[:, gene_index]
        rows = spread_rows(section.counts.shape[0], config.max_spots)
        found.append(coexpression(expression, section.connectivities[rows]))
    return _Coexpressed(found, [section.patient for section in used])


def _pooled_mean(values: list[np.ndarray], fitted: Sequence[_Fitted]) -> np.ndarray:
    """Mean of (genes,) means, or (n, genes) values, over those who measured the gene, each patient counting alike."""
    means = [value if value.ndim == 1 else value.mean(axis=0) for value in values]
    total = sum(mean * f.measured * f.weight for mean, f in zip(means, fitted, strict=True))
    weight = sum(f.measured * f.weight for f in fitted)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)


def _moments(section: _Fitted, niche_share: float = 0.0) -> _Moments:
    features, n = _centred(section, niche_share), len(section.features)
    expression = section.expression - section.expression.mean(axis=0)
    return _Moments(
        gram=features.T @ features / n,
        cross=features.T @ expression / n,
        variance=(expression**2).mean(axis=0),
        measured=section.measured,
        weight=section.weight,
    )


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
        gram = sum(section.weight * section.gram for section in used)
        strength = penalty * np.trace(gram) / n_features
        cross = sum(section.weight * section.cross[:, columns] for section in used)
        weight[:, columns] = np.linalg.solve(gram + max(strength, 1e-12) * np.eye(n_features), cross)
    return weight


def _confine(weight: np.ndarray, programmes: Programmes | None, n: int) -> np.ndarray:
    return programmes.confine(weight, n) if programmes is not None and n else weight


def _choose(folds: Sequence[_Fold], config: PredictionFitConfig) -> _Choice:
    """Return what has the least squared error on what is left out in turn."""
    # Without another patient's programmes nothing can be tried: the least that was asked for.
    testable = all(fold.programmes is not None for fold in folds)
    numbers = config.programmes if testable else [min(config.programmes)]
    genes = _most_variable(folds, _CHOICE_GENES)
    held = [[part.of_genes(genes) for part in fold.held] for fold in folds]
    moments = {share: [[_moments(part, share) for part in parts] for parts in held] for share in _NICHE_SHARES}
    best, least = _Choice(0.0, 0.0, 0), np.inf
    for penalty in config.penalties:
        free = [_ridge(fold.moments, penalty) for fold in folds]
        for number in numbers:
            weights = [_confine(w, fold.programmes, number)[:, genes] for w, fold in zip(free, folds, strict=True)]
            for share in _NICHE_SHARES:
                error = _pooled_error(held, moments[share], weights).mean()
                if error < least:
                    best, least = _Choice(float(penalty), share, number), error
    return best


def _most_variable(folds: Sequence[_Fold], n: int) -> np.ndarray:
    parts = [part for fold in folds for part in fold.held]
    variance = _pooled_mean([part.expression.var(axis=0) for part in parts], parts)
    return np.argsort(-variance, kind="stable")[:n]


def _spread(folds: Sequence[_Fold], choice: _Choice) -> np.ndarray:
    """Return (genes,) root of the mean squared residual on what is left out in turn."""
    held = [fold.held for fold in folds]
    moments = [[_moments(part, choice.niche_share) for part in parts] for parts in held]
    return np.sqrt(_pooled_error(held, moments, [fold.weight(choice) for fold in folds]))


def _pooled_error(
    held: Sequence[Sequence[_Fitted]], moments: Sequence[Sequence[_Moments]], weights: Sequence[np.ndarray]
) -> np.ndarray:
    """Return (genes,) mean squared residuals of one linear map for each group of parts, which it has not seen."""
    errors = [_squared_error(part, w) for group, w in zip(moments, weights, strict=True) for part in group]
    return _pooled_mean(errors, [part for group in held for part in group])


def _squared_error(held: _Moments, weight: np.ndarray) -> np.ndarray:
    """Return (genes,) mean squared residuals of a linear map, from the moments of a part."""
    explained = 2 * (weight * held.cross).sum(axis=0) - (weight * (held.gram @ weight)).sum(axis=0)
    return np.maximum(held.variance - explained, 0.0)


def _centred(section: _Fitted, share: float) -> np.ndarray:
    """Features mixed with those of the niche, less the mean over the slide."""
    mixed = (1 - share) * section.features + share * section.niche_features
    return np.asarray(mixed - section.features.mean(axis=0))


def _folds(
    fitted: Sequence[_Fitted], patients: Sequence[str], coexpressed: _Coexpressed, n_programmes: int
) -> list[_Fold]:
    """Leave out in turn: patients; of a single patient sections, else quarters.

    The programmes are always those of other patients: what genes do on near replicates is no test of them.
    """
    names = list(dict.fromkeys(patients))
    groups: list[list[_Fitted]]
    if len(names) > 1:
        groups = [[part for part, patient in zip(fitted, patients, strict=True) if patient == name] for name in names]
    else:
        groups = [[part] for part in (fitted if len(fitted) > 1 else _quarters(fitted[0]))]
        names = names * len(groups)
    moments = [[_moments(part) for part in group] for group in groups]
    return [
        _Fold(
            held=group,
            others=_all_but(groups, left),
            moments=_all_but(moments, left),
            programmes=coexpressed.programmes(n_programmes, without=name),
        )
        for left, (group, name) in enumerate(zip(groups, names, strict=True))
    ]


def _all_but(groups: Sequence[Sequence[T]], left: int) -> list[T]:
    return [value for number, group in enumerate(groups) for value in group if number != left]


def _quarters(fitted: _Fitted) -> list[_Fitted]:
    rows = np.array_split(np.arange(len(fitted.features)), min(4, max(2, len(fitted.features) // 2)))
    return [
        _Fitted(fitted.features[part], fitted.niche_features[part], fitted.expression[part], fitted.measured)
        for part in rows
    ]


def _half_widths(folds: Sequence[_Fold], choice: _Choice, spread: np.ndarray) -> np.ndarray:
    """Return (levels, genes) half-widths of intervals, from patients (else sections, else quarters) left out in turn.

    The residuals are those of the prediction as a whole, mean included, since a new slide's mean is predicted, too.
    """
    limit = max(20, MAX_RESIDUALS // sum(len(fold.held) for fold in folds))
    residuals, valid, groups = [], [], []
    for number, fold in enumerate(folds):
        mean = _pooled_mean([other.expression for other in fold.others], fold.others)
        weight = fold.weight(choice)
        known = np.any([other.measured for other in fold.others], axis=0)
        for part in fold.held:
            n = len(part.features)
            rows = np.unique(np.linspace(0, n - 1, min(n, limit)).round().astype(np.intp))
            predicted = mean + _centred(part, choice.niche_share)[rows] @ weight
            residuals.append(np.abs(part.expression[rows] - predicted).astype(np.float32))
            valid.append(part.measured & known)
            groups.append(number)
    quantiles = conformal_quantiles(residuals, LEVELS, valid=valid, groups=groups)
    # A gene that only one patient has: as if its residuals within that patient were normal.
    normal = np.outer(ndtri((1 + np.array(LEVELS)) / 2), spread)
    return np.where(np.isnan(quantiles), normal, quantiles).astype(np.float32)
