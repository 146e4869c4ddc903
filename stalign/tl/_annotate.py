"""Name spots without training: by marker genes, or after an annotated reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import check_adata, check_choice, check_positive, require_key
from stalign.tl._calibration import best_temperature, reliability, shares
from stalign.tl._reference import reference_embedding
from stalign.tl._slots import (
    centre_by_library,
    check_same_space,
    embed_record,
    model_params,
    present,
    read_embedding,
    recorded_model,
    spot_libraries,
    unit_rows,
)

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from stalign.models import STAlign

UNASSIGNED = "unassigned"
_MODALITIES = ("fused", "image", "gene")
MARKER_TEMPERATURE = 1.0
"""Of scores by marker genes, in standard deviations: chosen on labelled training sections."""
REFERENCE_TEMPERATURE = 2.0
"""Of scores after a reference of one slide, at least: chosen on labelled training sections of other patients."""

# Parts of a reference that are left out in turn, and labelled spots below which there is nothing to learn from it.
_FOLDS = 4
_MIN_CALIBRATED = 30


class _Scores(NamedTuple):
    """(n, labels) scores, the labels, what goes into ``uns``, and the temperature that suits the scores."""

    values: np.ndarray
    labels: list[str]
    params: dict[str, Any]
    temperature: float = MARKER_TEMPERATURE


def zero_shot_annotate(
    adata: AnnData,
    labels: Mapping[str, Sequence[str] | str] | str | None = None,
    *,
    reference: AnnData | None = None,
    label_key: str | None = None,
    modality: Literal["fused", "image", "gene"] = "fused",
    threshold: float | None = None,
    temperature: float | None = None,
    use_rep: str = Key.obsm.EMBEDDING,
    model: str | Path | STAlign | None = None,
    library_key: str | None = None,
    key_added: str = Key.obs.ANNOTATION,
    copy: bool = False,
) -> AnnData | None:
    """Give every spot one of the labels, with no training.

    By marker genes: the gene side of the model embeds "these genes are high", and a label's score is the cosine with
    the spot's image side, its gene side, or the mean of those that are there. By reference: a label's prototype is the
    mean unit embedding of its spots in an annotated AnnData, every library centred first, since slides differ in their
    mean more than by tissue. Scores are standardised over the spots of each library, label by label, which makes labels
    comparable, and turned into shares by a softmax.

    Parameters
    ----------
    adata
        After :func:`stalign.tl.embed`.
    labels
        Marker genes by label, ``{"tumour": ["ERBB2", "KRT8"], "immune": ["CD3E", "PTPRC"]}``; with ``reference``, the
        column of its ``obs`` that holds the labels.
    reference
        Annotated AnnData, embedded with the same model; it is embedded here (and not changed) where it is not.
    label_key
        Another way to name the column of the reference.
    modality
        Which side of the spots is compared: with markers, ``"fused"`` is the mean of the sides that are there; with a
        reference, the matrix of that name.
    threshold
        Spots whose confidence is below are ``"unassigned"``.
    temperature
        Of the softmax, in standard deviations: the smaller, the more confident. The order of the labels does not
        depend on it. ``None`` calibrates: with a reference of several libraries, the temperature under which the
        labels of libraries left out in turn are most likely, but at least 1; of a single one, the same with quarters,
        but at least 2, since another slide is further away than another quarter is; with marker genes, 1. These two
        numbers were chosen on labelled sections of training patients. :func:`stalign.tl.calibration` measures how well
        it went.
    use_rep
        ``key_added`` of :func:`stalign.tl.embed`.
    model
        The model that embedded the spots; ``None`` loads the one that ``uns`` names.
    library_key
        Column of ``obs`` that names each spot's library; ``None`` is what the niches were made with.
    key_added
        Prefix of the slots written.
    copy
        Return a new object instead of writing to ``adata``.

    Returns
    -------
    ``None``, or with ``copy=True`` a new AnnData, with

    - ``obs["stalign_annotation"]``: categorical, labels in the order given
    - ``obs["stalign_annotation_confidence"]``: float32, share of the label
    - ``obsm["stalign_annotation_score"]``: DataFrame (n_obs, labels) float32, rows sum to 1; rows of NaN for spots that
      lack the modality
    - ``uns["stalign"]["annotation"]``: ``labels``, and in their order ``markers`` (known to the model, one string a
      label) or ``n_reference`` (spots); temperature, parameters, model; where the temperature was taken from a
      reference, ``reference_ece``, the expected calibration error on its left-out spots

    Raises
    ------
    KeyError
        If the embedding or the column of the reference is missing.
    ValueError
        For empty labels, a label without a marker that the model knows, and embeddings of another model.
    TypeError
        If ``labels`` is neither a dict nor the name of a column.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.tl.embed(adata)  # doctest: +SKIP
    >>> sta.tl.zero_shot_annotate(adata, {"tumour": ["ERBB2", "KRT8"], "immune": ["CD3E", "PTPRC"]})  # doctest: +SKIP
    """
    check_adata(adata)
    check_choice("modality", modality, _MODALITIES)
    if temperature is not None:
        temperature = check_positive("temperature", temperature)
    if threshold is not None and not 0 <= float(threshold) <= 1:
        raise ValueError(f"threshold must be a share between 0 and 1, got {threshold!r}.")
    codes = spot_libraries(adata, library_key)
    if reference is None:
        scores = _by_markers(adata, labels, label_key, modality, use_rep, model, codes)
    else:
        scores = _by_reference(adata, labels, reference, label_key, modality, use_rep, model, codes)
    if UNASSIGNED in scores.labels:
        raise ValueError(f"{UNASSIGNED!r} cannot be a label: it stands for spots without one. Rename it.")
    temperature = scores.temperature if temperature is None else float(temperature)
    scores.params["temperature"] = temperature

    out = adata.copy() if copy else adata
    _write(out, shares(standardise(scores.values, codes), temperature), scores, threshold, key_added)
    return out if copy else None


# --- scores ------------------------------------------------------------------------------------------------------


def _by_markers(
    adata: AnnData, labels: Any, label_key: str | None, modality: str, use_rep: str, model: Any, codes: np.ndarray
) -> _Scores:
    from stalign.tl._prompts import match_markers, prompt_embeddings

    if label_key is not None or isinstance(labels, str):
        column = labels if label_key is None else label_key
        raise ValueError(f"The column {column!r} of which AnnData? Pass `reference=...`, or a dict of marker genes.")
    markers = _check_markers(labels)
    sides = {side: read_embedding(adata, side, use_rep) for side in _sides(adata, modality, use_rep)}
    record = embed_record(adata, use_rep)
    network = recorded_model(adata, model, use_rep)
    index = match_markers(markers, network.genes, organism=str(record.get("organism", "")) or "human")
    prompts, adapted = prompt_embeddings(adata, network, index, codes, key=use_rep)
    scores = [standardise(_cosine(values, prompts, codes), codes) for values in sides.values()]
    params = {
        "source": "markers",
        "modality": modality,
        "sides": list(sides),
        # Lists beside `labels`: a label such as "T/NK" would be a path as a key in an .h5ad file.
        "markers": [", ".join(network.genes[place] for place in places) for places in index.values()],
        "adapted_to_slide": adapted,
    }
    return _Scores(_mean_of_present(scores), list(markers), {**params, **model_params(record)})


def _check_markers(labels: Any) -> dict[str, list[str]]:
    """Return marker genes by label as a dict of lists."""
    if labels is None:
        raise ValueError("labels is missing: pass a dict of marker genes, or `reference=...` with `label_key=...`.")
    if not isinstance(labels, Mapping):
        raise TypeError(
            f"labels must be a dict of marker genes by label, got {type(labels).__name__}. "
            "Example: {'tumour': ['ERBB2', 'KRT8'], 'immune': ['CD3E', 'PTPRC']}."
        )
    if not labels:
        raise ValueError("labels is empty: name at least one label, e.g. {'tumour': ['ERBB2', 'KRT8']}.")
    markers: dict[str, list[str]] = {}
    for label, genes in labels.items():
        genes = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
        if not genes:
            raise ValueError(f"Label {str(label)!r} has no markers.")
        if str(label) in markers:
            raise ValueError(f"Label {str(label)!r} occurs twice.")
        markers[str(label)] = genes
    return markers


def _sides(adata: AnnData, modality: str, use_rep: str) -> list[str]:
    """Return the sides that are compared with the prompts; for "fused" those that are there."""
    if modality != "fused":
        return [modality]
    there = [side for side in ("image", "gene") if Key.embedding(side, use_rep) in adata.obsm]
    return there or ["gene"]  # reading it says what to do


def _cosine(values: np.ndarray, prompts: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(n, labels) cosine of each spot with its library's prompts."""
    if values.shape[1] != prompts.shape[2]:
        raise ValueError(
            f"The embedding has {values.shape[1]} dimensions, the prompts have {prompts.shape[2]}: another model made "
            "it. Pass the model that did as `model=...`, or run `sta.tl.embed(adata, model=...)` again."
        )
    scores = np.empty((len(values), prompts.shape[1]), dtype=np.float32)
    for code in np.unique(codes):
        rows = np.flatnonzero(codes == code)
        scores[rows] = unit_rows(values[rows]) @ prompts[code].T
    return scores


def _mean_of_present(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the sides that a spot has; NaN where it has none."""
    stack = np.stack(scores)
    there = ~np.isnan(stack)
    total = np.where(there, stack, 0).sum(axis=0)
    n = there.sum(axis=0)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan).astype(np.float32)


def _by_reference(
    adata: AnnData,
    labels: Any,
    reference: AnnData,
    label_key: str | None,
    modality: str,
    use_rep: str,
    model: Any,
    codes: np.ndarray,
) -> _Scores:
    column = _label_column(labels, label_key)
    check_adata(reference)
    values = require_key(reference.obs, column, where="reference.obs", hint="It must hold the labels.")
    known = values.notna().to_numpy()
    if not known.any():
        raise ValueError(f"`reference.obs[{column!r}]` holds no label: all {len(values)} are missing.")
    if not known.all():
        logger.info("%d spots of the reference have no label and are left out.", int((~known).sum()))
    query = read_embedding(adata, modality, use_rep)
    record = embed_record(adata, use_rep)
    embedded = reference_embedding(reference, modality, record, model, key=use_rep, query=adata)
    check_same_space(record, embedded.record, our_name="adata", their_name="reference")
    if query.shape[1] != embedded.values.shape[1]:
        raise ValueError(
            f"`adata` is embedded in {query.shape[1]} dimensions, `reference` in {embedded.values.shape[1]}: two "
            "models made them. Embed both with the same one."
        )
    kept = known & present(embedded.values)
    if not kept.any():
        raise ValueError(f"No labelled spot of the reference has an embedding of modality={modality!r}.")
    centred = unit_rows(centre_by_library(embedded.values, embedded.codes))[kept]
    names, label_codes = _categories(values[kept])
    scores = unit_rows(centre_by_library(query, codes)) @ _prototypes(centred, label_codes, len(names)).T
    temperature, ece = _calibrated(centred, label_codes, len(names), embedded.codes[kept])
    params: dict[str, Any] = {
        "source": "reference",
        "modality": modality,
        "label_key": column,
        "n_reference": np.bincount(label_codes, minlength=len(names)),
    }
    if ece is not None:
        params["reference_ece"] = ece
    return _Scores(scores, names, {**params, **model_params(record)}, temperature)


def _prototypes(values: np.ndarray, labels: np.ndarray, n_labels: int) -> np.ndarray:
    """(n_labels, d) mean unit embedding of each label's spots, unit norm; zero for a label without any."""
    sums = np.zeros((n_labels, values.shape[1]), dtype=values.dtype)
    np.add.at(sums, labels, values)
    return unit_rows(sums)


def _calibrated(values: np.ndarray, labels: np.ndarray, n_labels: int, codes: np.ndarray) -> tuple[float, float | None]:
    """Return the temperature that suits spots of a reference that are left out in turn, and their calibration error.

    Libraries are left out; of a single one quarters, in the order of its spots. Where there is too little to learn
    from, the temperature is the least one and there is no error.
    """
    least = MARKER_TEMPERATURE if len(np.unique(codes)) > 1 else REFERENCE_TEMPERATURE
    if len(np.unique(codes)) == 1:
        codes = np.arange(len(codes)) * _FOLDS // len(codes)
    logits, truth = [], []
    for code in np.unique(codes):
        left = codes == code
        known = np.unique(labels[~left])
        if len(known) < n_labels or left.sum() < 2:
            continue
        prototypes = _prototypes(values[~left], labels[~left], n_labels)
        logits.append(standardise(values[left] @ prototypes.T, np.zeros(int(left.sum()), dtype=np.intp)))
        truth.append(labels[left])
    if sum(map(len, truth)) < _MIN_CALIBRATED or n_labels < 2:
        return least, None
    z, true = np.concatenate(logits), np.concatenate(truth)
    temperature = max(best_temperature(z, true), least)
    confidence = shares(z, temperature)
    return temperature, reliability(confidence.max(axis=1), z.argmax(axis=1) == true).ece


def _label_column(labels: Any, label_key: str | None) -> str:
    if labels is not None and not isinstance(labels, str):
        raise TypeError(
            f"With a reference, labels is the name of a column of its `obs`, got {type(labels).__name__}. Leave out "
            "`reference` to annotate by marker genes."
        )
    if labels is not None and label_key is not None and labels != label_key:
        raise ValueError(f"labels={labels!r} and label_key={label_key!r} name two columns. Pass one.")
    column = labels if label_key is None else label_key
    if column is None:
        raise ValueError("Which column of `reference.obs` holds the labels? Pass `label_key=...`.")
    return column


def _categories(values: pd.Series) -> tuple[list[str], np.ndarray]:
    """Return the labels, in the order of the categories if there is one, and each spot's number."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.cat.remove_unused_categories()
        return [str(name) for name in values.cat.categories], values.cat.codes.to_numpy()
    codes, names = pd.factorize(values.astype(str), sort=True)
    return [str(name) for name in names], codes


def standardise(scores: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Z-score of each column over the spots of each library; a column that does not vary becomes zero."""
    result = np.full(scores.shape, np.nan, dtype=np.float64)
    there = present(scores)
    for code in np.unique(codes[there]):
        rows = np.flatnonzero((codes == code) & there)
        values = scores[rows].astype(np.float64)
        centred, sd = values - values.mean(axis=0), values.std(axis=0)
        result[rows] = np.divide(centred, sd, out=np.zeros_like(centred), where=sd > 1e-7)
    return result


# --- writing -----------------------------------------------------------------------------------------------------


def _write(adata: AnnData, shares: np.ndarray, scores: _Scores, threshold: float | None, key_added: str) -> None:
    there = present(shares)
    confidence = np.full(len(shares), np.nan, dtype=np.float32)
    confidence[there] = shares[there].max(axis=1)
    best = np.full(len(shares), -1, dtype=np.intp)
    best[there] = shares[there].argmax(axis=1)
    low = ~there | (confidence < threshold if threshold is not None else False)
    names = list(scores.labels)
    if low.any():
        best[low] = len(names)
        names.append(UNASSIGNED)
    adata.obs[key_added] = pd.Categorical.from_codes(best, categories=pd.Index(names))
    adata.obs[f"{key_added}_confidence"] = confidence
    adata.obsm[f"{key_added}_score"] = pd.DataFrame(shares, index=adata.obs_names, columns=scores.labels)
    record = {**scores.params, "labels": list(scores.labels), "key_added": key_added}
    if threshold is not None:
        record["threshold"] = float(threshold)
    adata.uns[Key.UNS] = {**adata.uns.get(Key.UNS, {}), Key.uns.ANNOTATION: record}
    if (~there).any():
        logger.info("%d spots lack the modality and are %r.", int((~there).sum()), UNASSIGNED)
    logger.info(
        "Added `obs['%s']` (%d labels), `obs['%s_confidence']`, `obsm['%s_score']`, `uns['%s']['%s']`.",
        key_added,
        len(scores.labels),
        key_added,
        key_added,
        Key.UNS,
        Key.uns.ANNOTATION,
    )
