"""Predict expression from histology."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import check_adata, check_choice, check_positive, listing, require_key
from stalign.genes import check_counts, input_kind, library_size, match_names, normalise_log1p, row_normalise
from stalign.models._conformal import LEVELS, MAX_RESIDUALS, conformal_quantiles, half_width
from stalign.slide._library import find_niche_record
from stalign.tl._neighbours import nearest
from stalign.tl._prompts import near_genes
from stalign.tl._reference import reference_embedding
from stalign.tl._slots import (
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

    import torch
    from anndata import AnnData

    from stalign.models import STAlign

METHODS = ("head", "retrieval", "ridge")
UNITS = "log1p of counts per 10,000"
_HALVES = ("spot_image", "niche_image")
# A dense layer of more values than this (1 GB of float32) is not made: a DataFrame holds the predicted genes alone.
_MAX_LAYER = 2**28
# Without `genes`, so many of a reference's genes are predicted: those that vary most.
_DEFAULT_GENES = 1000
_PENALTIES = np.logspace(-4, 3, 29)
_ROWS = 4096
# Below so many spots a slide is compared with the mean of the training slides instead of its own.
_MIN_SLIDE = 30


class _Prediction(NamedTuple):
    """(n, genes) float32 means and standard deviations, the genes' names, and what goes into ``uns``.

    ``half_width`` (genes,) is that of the prediction intervals, ``None`` where none were asked for.
    """

    mean: np.ndarray
    sd: np.ndarray
    genes: list[str]
    params: dict[str, Any]
    half_width: np.ndarray | None = None


class _Reference(NamedTuple):
    """Reference spots: (m, d) embedding and (m, genes) log-normalised expression, CSR.

    For prediction intervals also the (m, d) image side, NaN where there is none, and the patient or library of each
    spot.
    """

    embedding: np.ndarray
    expression: sparse.csr_matrix
    image: np.ndarray | None = None
    groups: np.ndarray | None = None


def predict_expression(
    adata: AnnData,
    genes: Sequence[str] | str | None = None,
    *,
    reference: AnnData | Sequence[AnnData] | None = None,
    method: Literal["head", "retrieval", "ridge"] = "head",
    k: int = 50,
    temperature: float = 0.05,
    interval: float | None = None,
    layer: str | None = None,
    use_rep: str = Key.obsm.EMBEDDING,
    model: str | Path | STAlign | None = None,
    library_key: str | None = None,
    key_added: str = Key.layers.PREDICTED,
    copy: bool = False,
) -> AnnData | None:
    """Predict expression from the histology of spots and niches.

    - ``"head"``: the model's own head, trained with it; no reference is needed. What it says of a spot is averaged with
      what it says over the spot's niche, in the share that was best on training patients left out. A head of few
      training patients may be confined to a few programmes of genes that vary together, as that of ``stalign-mini`` is.
    - ``"retrieval"``: the mean of the ``k`` reference spots whose gene side is nearest to the spot's image side,
      weighted by a softmax of their cosines (Xie et al., BLEEP, NeurIPS 2023).
    - ``"ridge"``: ridge regression from the reference's image side to its expression; the penalty is chosen by
      generalised cross-validation (Golub, Heath and Wahba, Technometrics 21:215, 1979).

    ``"head"`` and ``"ridge"`` centre the image side of every library first: they say where on a slide a gene is higher
    or lower, and take its mean from the training or the reference slides. A library of fewer than 30 spots is compared
    with the mean of those slides instead of its own, and says so in the log.

    Parameters
    ----------
    adata
        After :func:`stalign.tl.embed`, with an image.
    genes
        What to predict: symbols, earlier symbols, aliases or Ensembl ids. ``None``: all genes of the head, or the 1,000
        of the reference that vary most.
    reference
        Slides with raw counts (and an image, for ``"ridge"``), embedded with the same model; they are embedded here,
        and not changed, where they are not.
    method
        See above.
    k, temperature
        Neighbours of ``"retrieval"`` and temperature of their weights.
    interval
        Coverage of prediction intervals, 0.5 to 0.99, e.g. 0.9; ``None`` makes none. Split-conformal, gene by gene:
        from the residuals on training patients that were left out in turn (``"head"``, stored with the model), or on
        the reference's patients or libraries left out in turn (of a single one, quarters). The stated coverage holds
        for spots that could as well have been among the held-out ones. Another patient, scanner or laboratory can
        differ from them as a whole, and is then covered less (or more) often: see ``coverage``.
    layer
        Raw counts of ``adata``, to compare with, and of the references; ``None`` is ``X``.
    use_rep
        ``key_added`` of :func:`stalign.tl.embed`.
    model
        The model that embedded the spots; ``None`` loads the one that ``uns`` names.
    library_key
        Column of ``obs`` that names each spot's library; ``None`` is what the niches were made with.
    key_added
        Name of the slots written.
    copy
        Return a new object instead of writing to ``adata``.

    Returns
    -------
    ``None``, or with ``copy=True`` a new AnnData, with predictions in log1p of counts per 10,000:

    - ``layers["stalign_predicted"]``: (n_obs, n_vars) float32 for the genes that are in ``var``, NaN for all others
    - ``obsm["stalign_predicted"]``: DataFrame (n_obs, genes) float32 for genes that are not in ``var``, and for all of
      them where the layer would have more than 2²⁸ values
    - ``obsm["stalign_predicted_sd"]``: DataFrame (n_obs, genes) float32, the spread of the residuals (of the
      neighbours with ``"retrieval"``)
    - ``obsm["stalign_predicted_lower"]``, ``obsm["stalign_predicted_upper"]``: with ``interval``, DataFrames (n_obs,
      genes) float32, ends of the intervals; none lies below 0
    - ``var["stalign_predicted_r"]``: float32, Pearson correlation with the measured expression over all embedded spots;
      NaN for genes that are not predicted or constant. Only where there are raw counts
    - ``uns["stalign"]["prediction"]``: method, units, genes, parameters, model; with ``interval`` and raw counts
      ``coverage``, the share of measured values inside their intervals, over all spots and genes, and
      ``coverage_quartiles``, those of the genes' own shares

    Spots of libraries without an image are NaN.

    Raises
    ------
    KeyError
        If the image side of the embedding is missing.
    ValueError
        For a model without a head, a gene that cannot be predicted, a method without its reference, an ``interval`` of
        a head that has none or of a reference without an image.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.tl.embed(adata)  # doctest: +SKIP
    >>> sta.tl.predict_expression(adata, genes=["ERBB2"])  # doctest: +SKIP
    """
    check_adata(adata)
    check_choice("method", method, METHODS)
    k = check_positive("k", k, integer=True)
    check_positive("temperature", temperature)
    _check_interval(interval)
    wanted = _check_genes(genes)
    embedding = read_embedding(adata, "image", use_rep)
    there = present(embedding)
    codes = spot_libraries(adata, library_key)[there]
    measured = _measured(adata, layer)
    if method == "head":
        if reference is not None:
            raise ValueError("method='head' takes no reference. Pass `method='retrieval'` or `method='ridge'`.")
        result = _by_head(adata, embedding, there, wanted, use_rep, model, codes, interval)
    else:
        parts = _references(adata, reference, method, wanted, layer, use_rep, model, with_groups=interval is not None)
        result = (
            _by_retrieval(embedding[there], *parts, k=k, temperature=temperature)
            if method == "retrieval"
            else _by_ridge(embedding[there], *parts, codes=codes)
        )
        if interval is not None:
            predict = partial(_retrieved, k=k, temperature=temperature) if method == "retrieval" else _regressed
            result = result._replace(half_width=_cross_fitted(parts[0], predict, interval))
    result = _spread(result, there)
    columns = _columns(adata, result.genes, embed_record(adata, use_rep))
    correlation = None if measured is None else _correlations(result.mean, measured, columns, there)
    if interval is not None:
        result.params["interval"] = float(interval)
        if measured is not None and (columns >= 0).any():
            result.params.update(_coverage(result, measured, columns, there))

    out = adata.copy() if copy else adata
    _write(out, result, columns, correlation, key_added)
    return out if copy else None


def _check_genes(genes: Any) -> list[str] | None:
    if genes is None:
        return None
    wanted = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
    if not wanted:
        raise ValueError("genes is empty: name at least one gene, or leave it out.")
    return list(dict.fromkeys(wanted))


def _check_interval(interval: Any) -> None:
    if interval is None:
        return
    if isinstance(interval, bool) or not isinstance(interval, (int, float, np.number)):
        raise TypeError(f"interval must be a coverage such as 0.9, got {interval!r}.")
    if not LEVELS[0] <= interval <= LEVELS[-1]:
        raise ValueError(f"interval must be a coverage from {LEVELS[0]} to {LEVELS[-1]}, got {interval!r}.")


def _spread(result: _Prediction, there: np.ndarray) -> _Prediction:
    """Put the rows of the embedded spots among those of all spots."""
    if there.all():
        return result
    shape = (len(there), len(result.genes))
    mean, sd = np.full(shape, np.nan, dtype=np.float32), np.full(shape, np.nan, dtype=np.float32)
    mean[there], sd[there] = result.mean, result.sd
    return result._replace(mean=mean, sd=sd)


# --- the model's head --------------------------------------------------------------------------------------------


def _by_head(
    adata: AnnData,
    embedding: np.ndarray,
    there: np.ndarray,
    wanted: list[str] | None,
    use_rep: str,
    model: Any,
    codes: np.ndarray,
    interval: float | None,
) -> _Prediction:
    import torch

    from stalign.tl._runtime import inference

    embedding = embedding[there]
    network = recorded_model(adata, model, use_rep)
    head = network.prediction
    other = "Pass `reference=...` with `method='retrieval'` or `method='ridge'`."
    if head is None:
        raise ValueError(f"Model {network.config.name!r} has no prediction head. {other}")
    unusable = [name for name in head.inputs if name not in _HALVES]
    if unusable:
        raise ValueError(
            f"The head of model {network.config.name!r} needs {listing(unusable)}, not images alone. {other}"
        )
    if interval is not None and not head.levels:
        raise ValueError(
            f"The head of model {network.config.name!r} was saved without the residuals that intervals are made from. "
            f"Leave out `interval`. {other}"
        )
    symbols = network.predicted_genes
    if wanted is None:
        names, index = list(symbols), np.arange(len(symbols))
    else:
        organism = _organism(embed_record(adata, use_rep))
        names, index = wanted, match_names(wanted, symbols, organism=organism).index
        _refuse_unknown(wanted, index, symbols, f"The head of model {network.config.name!r} predicts", other)
    mean = np.empty((len(embedding), len(names)), dtype=np.float32)
    graph = _niche_graph(adata, there) if head.niche_share else None
    with inference(network, torch.device("cpu")):
        for code in np.unique(codes):
            slide = np.flatnonzero(codes == code)
            features = head.features(_halves(embedding[slide], network.config.heads.out, head.inputs))
            # A slide with too few spots has no mean of its own to be compared with.
            centre = None if _is_too_small(len(slide), "training") else features.mean(dim=0)
            niches = None if graph is None else row_normalise(graph[slide][:, slide])
            for start in range(0, len(slide), _ROWS):
                rows = slice(start, start + _ROWS)
                mixed = _mix(features, niches, rows, head.niche_share)
                mean[slide[rows]] = head.from_features(mixed, centre=centre).numpy()[:, index]
    sd = np.broadcast_to(head.sd.cpu().numpy()[index].astype(np.float32), mean.shape)
    half = None if interval is None else half_width(head.half_widths.cpu().numpy(), head.levels, interval)[index]
    return _Prediction(mean, sd, names, {"method": "head", **model_params(embed_record(adata, use_rep))}, half)


def _niche_graph(adata: AnnData, there: np.ndarray) -> sparse.csr_matrix | None:
    """Return the niche graph of the embedded spots, self included; ``None`` where it is gone, and says so."""
    record = find_niche_record(adata)
    key = Key.connectivities(Key.NICHE if record is None else str(record["params"]["key_added"]))
    if key not in adata.obsp:
        logger.warning(
            "`adata.obsp[%r]` is gone: predictions are those of single spots, not averaged over niches, and less "
            "exact. Run `sta.pp.extract_niches(adata)` to have it again.",
            key,
        )
        return None
    graph = sparse.csr_matrix(adata.obsp[key])
    return graph if there.all() else graph[there][:, there]


def _mix(features: torch.Tensor, niches: sparse.csr_matrix | None, rows: slice, share: float) -> torch.Tensor:
    """Return some rows of the features, their niches' mean in the place of a share of them."""
    import torch

    if niches is None:
        return features[rows]
    return (1 - share) * features[rows] + share * torch.from_numpy(niches[rows] @ features.numpy())


def _is_too_small(n_spots: int, others: str) -> bool:
    """Whether a library is compared with the mean of other slides; says so."""
    if n_spots >= _MIN_SLIDE:
        return False
    logger.info("%d spots are too few for a mean of their own: compared with that of the %s slides.", n_spots, others)
    return True


def _halves(embedding: np.ndarray, width: int, inputs: Sequence[str]) -> list[torch.Tensor]:
    """Return the spot's and the niche's image embeddings, which the joined vector holds side by side."""
    import torch

    halves = {"spot_image": embedding[:, :width], "niche_image": embedding[:, width:]}
    return [torch.from_numpy(unit_rows(halves[name])) for name in inputs]


def _refuse_unknown(wanted: Sequence[str], index: np.ndarray, known: Sequence[str], what: str, way_out: str) -> None:
    unknown = [gene for gene, place in zip(wanted, index, strict=True) if place < 0]
    if unknown:
        raise ValueError(
            f"{what} {len(known)} genes; {listing(unknown)} {'is' if len(unknown) == 1 else 'are'} not among them."
            f"{near_genes(unknown, known)} {way_out}"
        )


# --- references --------------------------------------------------------------------------------------------------


def _references(
    adata: AnnData,
    reference: Any,
    method: str,
    wanted: list[str] | None,
    layer: str | None,
    use_rep: str,
    model: Any,
    *,
    with_groups: bool,
) -> tuple[list[_Reference], list[str], dict[str, Any]]:
    """Return every reference's spots, the genes, and parameters for ``uns``."""
    slides = _as_list(reference, method)
    if any(slide is adata for slide in slides):
        logger.warning("The reference is the slide itself: the predictions have seen what they are compared with.")
    record = embed_record(adata, use_rep)
    names = _most_variable(slides, layer) if wanted is None else wanted
    side = "image" if method == "ridge" else "gene"
    parts = []
    for number, slide in enumerate(slides):
        embedded = reference_embedding(slide, side, record, model, key=use_rep, query=adata, layer=layer)
        check_same_space(record, embedded.record, our_name="adata", their_name=f"reference {number}")
        known = list(slide.var_names)
        index = match_names(names, known).index
        _refuse_unknown(names, index, known, f"Reference {number} has", "Leave these genes out.")
        kept = present(embedded.values)
        expression = _log_normalised(_reference_counts(slide, layer, number), index)
        part = _Reference(embedded.values[kept], sparse.csr_matrix(expression[np.flatnonzero(kept)]))
        if with_groups:
            image = embedded.values
            if side == "gene":
                image = reference_embedding(slide, "image", record, model, key=use_rep, query=adata, layer=layer).values
            part = part._replace(image=image[kept], groups=_patients(slide, embedded.codes, number)[kept])
        parts.append(part)
    params = {
        "method": method,
        "n_references": len(slides),
        "n_reference_spots": int(sum(len(part.embedding) for part in parts)),
        **model_params(record),
    }
    return parts, names, params


def _as_list(reference: Any, method: str) -> list[AnnData]:
    from anndata import AnnData

    if reference is None:
        raise ValueError(
            f"method={method!r} needs `reference=...`: slides with raw counts, embedded by the same model."
        )
    slides = [reference] if isinstance(reference, AnnData) else list(reference)
    if not slides:
        raise ValueError("reference is empty: pass at least one AnnData.")
    for slide in slides:
        check_adata(slide)
    return slides


def _patients(slide: AnnData, codes: np.ndarray, number: int) -> np.ndarray:
    """Return who each spot is of: its patient where that is stated, else its library."""
    libraries = np.array([f"reference {number}, library {code}" for code in range(int(codes.max(initial=0)) + 1)])[
        codes
    ]
    if "patient" not in slide.obs:
        return libraries.astype(object)
    column = slide.obs["patient"].astype(object)
    return np.where(column.notna(), column.astype(str), libraries).astype(object)


def _reference_counts(slide: AnnData, layer: str | None, number: int) -> Any:
    name = f"reference {number}: " + ("X" if layer is None else f"layers[{layer!r}]")
    counts = slide.X if layer is None else require_key(slide.layers, layer, where=f"reference {number}: layers")
    if counts is None or slide.n_vars == 0:
        raise ValueError(f"Reference {number} has no counts: {slide.n_obs} spots × {slide.n_vars} genes.")
    check_counts(counts, name=name)
    return counts


def _log_normalised(counts: Any, index: np.ndarray) -> sparse.csr_matrix:
    """log1p of counts per 10,000 of all genes, for some of them."""
    return normalise_log1p(counts[:, index], totals=library_size(counts))


def _most_variable(slides: Sequence[AnnData], layer: str | None) -> list[str]:
    """Names of the genes that all references have and that vary most within them."""
    shared = slides[0].var_names
    for slide in slides[1:]:
        shared = shared[shared.isin(slide.var_names)]
    if not len(shared):
        raise ValueError("The references have no gene in common: make their `var_names` agree, or pass `genes=...`.")
    variance = np.zeros(len(shared))
    for number, slide in enumerate(slides):
        expression = _log_normalised(
            _reference_counts(slide, layer, number), np.asarray(slide.var_names.get_indexer(shared))
        )
        mean = np.asarray(expression.mean(axis=0)).ravel()
        variance += np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    best = np.sort(np.argsort(-variance, kind="stable")[:_DEFAULT_GENES])
    return [str(name) for name in shared[best]]


def _by_retrieval(
    embedding: np.ndarray,
    parts: Sequence[_Reference],
    names: list[str],
    params: Mapping[str, Any],
    *,
    k: int,
    temperature: float,
) -> _Prediction:
    n = sum(len(part.embedding) for part in parts)
    if k > n:
        logger.info("The reference has %d spots: all of them are used (k=%d).", n, k)
        k = n
    mixing, expression = _mixing(embedding, parts, k=k, temperature=temperature)
    mean = (mixing @ expression).toarray().astype(np.float32)
    squares = (mixing @ expression.multiply(expression).tocsr()).toarray()
    sd = np.sqrt(np.maximum(squares - mean**2, 0)).astype(np.float32)
    return _Prediction(mean, sd, names, {**params, "k": int(k), "temperature": float(temperature)})


def _mixing(
    embedding: np.ndarray, parts: Sequence[_Reference], *, k: int, temperature: float
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Return (n, m) weights of the reference spots, and their (m, genes) expression."""
    keys = unit_rows(np.concatenate([part.embedding for part in parts]))
    expression = sparse.vstack([part.expression for part in parts], format="csr")
    _check_width(embedding, keys)
    k = min(k, len(keys))
    found = nearest(unit_rows(embedding), keys, k)
    weight = np.exp((found.scores - found.scores[:, :1]) / temperature)
    weight /= weight.sum(axis=1, keepdims=True)
    indptr = np.arange(0, weight.size + 1, k)
    return sparse.csr_matrix(
        (weight.ravel(), found.indices.ravel(), indptr), shape=(len(weight), len(keys))
    ), expression


def _retrieved(image: np.ndarray, parts: Sequence[_Reference], *, k: int, temperature: float) -> np.ndarray:
    mixing, expression = _mixing(image, parts, k=k, temperature=temperature)
    return (mixing @ expression).toarray()


def _check_width(embedding: np.ndarray, keys: np.ndarray) -> None:
    if embedding.shape[1] != keys.shape[1]:
        raise ValueError(
            f"`adata` is embedded in {embedding.shape[1]} dimensions, the reference in {keys.shape[1]}: two models "
            "made them. Embed both with the same one."
        )


def _by_ridge(
    embedding: np.ndarray,
    parts: Sequence[_Reference],
    names: list[str],
    params: Mapping[str, Any],
    *,
    codes: np.ndarray,
) -> _Prediction:
    """Ridge regression within slides: every slide is centred, so that what differs between slides is not learned."""
    _check_width(embedding, parts[0].embedding)
    fit = _fit_ridge(parts)
    mean = np.empty((len(embedding), len(names)), dtype=np.float32)
    for code in np.unique(codes):
        slide = codes == code
        small = _is_too_small(int(slide.sum()), "reference")
        centre = fit.feature_mean if small else embedding[slide].mean(axis=0)
        mean[slide] = fit.target_mean + (embedding[slide] - centre) @ fit.weight
    sd = np.broadcast_to(fit.residual.astype(np.float32), mean.shape)
    return _Prediction(mean, sd, names, {**params, "penalty": float(fit.penalty)})


class _Ridge(NamedTuple):
    """Weights (d, genes), the penalty, (genes,) residual spread, and the means of features and targets."""

    weight: np.ndarray
    penalty: float
    residual: np.ndarray
    feature_mean: np.ndarray
    target_mean: np.ndarray


def _fit_ridge(parts: Sequence[_Reference]) -> _Ridge:
    n = sum(len(part.embedding) for part in parts)
    if n < 3:
        raise ValueError(f"A ridge regression needs more than {n} reference spots with an image.")
    features = [part.embedding.astype(np.float64) for part in parts]
    feature_mean = np.concatenate(features).mean(axis=0)
    centred = [values - values.mean(axis=0) for values in features]
    gram = sum(values.T @ values for values in centred)
    # The features are centred, hence X'Y needs no centred Y, which would be dense.
    cross = sum((part.expression.T @ values).T for part, values in zip(parts, centred, strict=True))
    target_mean = np.asarray(sum(part.expression.sum(axis=0) for part in parts)).ravel() / n
    total = sum(_squares(part.expression) for part in parts)
    solved = solve_ridge(np.asarray(gram), np.asarray(cross), np.asarray(total), n, len(parts))
    return _Ridge(*solved, feature_mean, target_mean)


def _regressed(image: np.ndarray, parts: Sequence[_Reference]) -> np.ndarray:
    """Predict the spots of one slide."""
    fit = _fit_ridge(parts)
    return fit.target_mean + (image - image.mean(axis=0)) @ fit.weight


# --- prediction intervals ----------------------------------------------------------------------------------------


def _cross_fitted(
    parts: Sequence[_Reference], predict: Callable[[np.ndarray, Sequence[_Reference]], np.ndarray], interval: float
) -> np.ndarray:
    """Return (genes,) half-widths from the residuals of reference patients that are left out in turn.

    Parameters
    ----------
    parts
        References with image side and groups.
    predict
        From the image side of a patient's spots and the other patients' reference to their expression.
    interval
        Coverage.
    """
    held = _by_group(parts)
    limit = max(20, MAX_RESIDUALS // len(held))
    residuals = []
    for number, part in enumerate(held):
        others = [other for at, other in enumerate(held) if at != number]
        usable = np.flatnonzero(present(part.image))  # type: ignore[arg-type]
        if not len(usable):
            continue
        predicted = predict(part.image[usable], others)  # type: ignore[index]
        rows = np.unique(np.linspace(0, len(usable) - 1, min(len(usable), limit)).round().astype(np.intp))
        measured = part.expression[usable[rows]].toarray()
        residuals.append(np.abs(measured - predicted[rows]).astype(np.float32))
    if not residuals:
        raise ValueError(
            "interval needs references with an image, since the residuals are those of predictions from it. Leave out "
            "`interval`, or pass references with an image."
        )
    return conformal_quantiles(residuals, [interval], groups=list(range(len(residuals))))[0].astype(np.float64)


def _by_group(parts: Sequence[_Reference]) -> list[_Reference]:
    """Return the references cut by patient or library; the only one there is into quarters, in the order of spots."""
    joined = _Reference(
        np.concatenate([part.embedding for part in parts]),
        sparse.vstack([part.expression for part in parts], format="csr"),
        np.concatenate([part.image for part in parts]),  # type: ignore[misc]
        np.concatenate([part.groups for part in parts]),  # type: ignore[misc]
    )
    names = np.unique(joined.groups.astype(str))  # type: ignore[union-attr]
    rows = [np.flatnonzero(joined.groups.astype(str) == name) for name in names]  # type: ignore[union-attr]
    if len(rows) == 1:
        if len(rows[0]) < 8:
            raise ValueError(f"interval needs at least 8 reference spots, there are {len(rows[0])}.")
        rows = np.array_split(rows[0], 4)
    return [
        _Reference(joined.embedding[part], joined.expression[part], joined.image[part])  # type: ignore[index]
        for part in rows
    ]


def _ends(result: _Prediction) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, genes) float32 lower and upper ends; expression is never negative."""
    half = np.asarray(result.half_width, dtype=np.float32)
    return np.maximum(result.mean - half, 0), np.maximum(result.mean + half, 0)


def _coverage(result: _Prediction, counts: Any, columns: np.ndarray, there: np.ndarray) -> dict[str, Any]:
    """Return the share of measured values inside their intervals, of all and of the genes' quartiles."""
    here, rows = np.flatnonzero(columns >= 0), np.flatnonzero(there)
    measured = sparse.csr_matrix(_log_normalised(counts, columns[here])[rows])
    inside = np.zeros(len(here))
    lower, upper = _ends(result)
    for start in range(0, len(rows), _ROWS):
        block = slice(start, start + _ROWS)
        values = measured[block].toarray()
        places = np.ix_(rows[block], here)
        inside += ((values >= lower[places]) & (values <= upper[places])).sum(axis=0)
    share = inside / max(len(rows), 1)
    return {"coverage": float(share.mean()), "coverage_quartiles": np.quantile(share, [0.25, 0.5, 0.75])}


def _squares(expression: sparse.csr_matrix) -> np.ndarray:
    """Sum of squares of each gene about its mean."""
    mean = np.asarray(expression.mean(axis=0)).ravel()
    return np.asarray(expression.multiply(expression).sum(axis=0)).ravel() - expression.shape[0] * mean**2


def solve_ridge(
    gram: np.ndarray, cross: np.ndarray, total: np.ndarray, n: int, n_means: int = 1
) -> tuple[np.ndarray, float, np.ndarray]:
    """Solve a ridge regression whose one penalty is chosen by generalised cross-validation.

    Parameters
    ----------
    gram
        X'X of the centred features, (d, d).
    cross
        X'Y, (d, genes).
    total
        Sum of squares of each centred target, (genes,).
    n, n_means
        Number of spots, and of means that were subtracted.

    Returns
    -------
    Weights (d, genes), the penalty, and the standard deviation of the residuals (genes,).
    """
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0)
    projected = vectors.T @ cross
    scale = values.mean() if values.any() else 1.0
    varies = total > 1e-12 * max(float(total.max(initial=0.0)), 1e-12)
    best = (np.inf, scale, total, 0.0)
    for penalty in _PENALTIES * scale:
        shrunk = values + penalty
        freedom = float((values / shrunk).sum()) + n_means
        if freedom >= n:
            continue
        explained = (projected**2 * ((values + 2 * penalty) / shrunk**2)[:, None]).sum(axis=0)
        rest = np.maximum(total - explained, 0)
        # Genes are weighed by their own variance, or the few that vary most would choose for all.
        share = float(np.mean(rest[varies] / total[varies])) if varies.any() else 0.0
        score = share / (1 - freedom / n) ** 2
        if score < best[0]:
            best = (score, penalty, rest, freedom)
    _, penalty, rest, freedom = best
    weight = vectors @ (projected / (values + penalty)[:, None])
    return weight, penalty, np.sqrt(rest / (n - freedom))


# --- measured expression -----------------------------------------------------------------------------------------


def _measured(adata: AnnData, layer: str | None) -> Any:
    """Return raw counts to compare with; ``None`` where there are none."""
    if layer is not None:
        counts = require_key(adata.layers, layer, where="adata.layers")
        check_counts(counts, name=f"adata.layers[{layer!r}]")
        return counts
    if adata.X is None or adata.n_vars == 0:
        return None
    kind = input_kind(adata.X)
    if kind != "counts":
        logger.info("`X` looks %s: no correlation with measured expression. Pass `layer=...` with raw counts.", kind)
        return None
    return adata.X


def _organism(record: Mapping[str, Any]) -> str:
    return str(record.get("organism", "")) or "human"


def _columns(adata: AnnData, genes: Sequence[str], record: Mapping[str, Any]) -> np.ndarray:
    """Return the column of ``var`` that holds each gene, -1 where there is none."""
    if adata.n_vars == 0:
        return np.full(len(genes), -1, dtype=np.intp)
    columns = match_names(genes, list(adata.var_names)).index.copy()
    # The other way round, too: the data's names may be those of a mouse, or stand in a column of their own.
    column = str(record.get("gene_symbols", ""))
    names = adata.var.get(column, adata.var_names)
    index = match_names(names, genes, organism=_organism(record)).index
    found, first = np.unique(index[index >= 0], return_index=True)
    missing = columns[found] < 0
    columns[found[missing]] = np.flatnonzero(index >= 0)[first[missing]]
    return columns


def _correlations(mean: np.ndarray, counts: Any, columns: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Pearson correlation of each predicted gene with its log-normalised counts; NaN for genes not in ``var``."""
    result = np.full(len(columns), np.nan, dtype=np.float32)
    here = np.flatnonzero(columns >= 0)
    if not len(here) or there.sum() < 2:
        return result
    rows = np.flatnonzero(there)
    measured = sparse.csr_matrix(_log_normalised(counts, columns[here])[rows])
    predicted = mean[rows][:, here].astype(np.float64)
    predicted -= predicted.mean(axis=0)
    covariance = np.asarray(measured.T.multiply(predicted.T).sum(axis=1)).ravel()
    norm = np.sqrt((predicted**2).sum(axis=0) * np.maximum(_squares(measured), 0))
    result[here] = np.divide(covariance, norm, out=np.full(len(here), np.nan), where=norm > 1e-9)
    return result


# --- writing -----------------------------------------------------------------------------------------------------


def _write(
    adata: AnnData, result: _Prediction, columns: np.ndarray, correlation: np.ndarray | None, key_added: str
) -> None:
    as_layer = columns >= 0 if adata.n_obs * adata.n_vars <= _MAX_LAYER else np.zeros(len(columns), dtype=bool)
    name_sd, name_r = f"{key_added}_sd", f"{key_added}_r"
    for slots, name in ((adata.layers, key_added), (adata.obsm, key_added), (adata.var, name_r)):
        if name in slots:  # of an earlier call, perhaps with other genes
            del slots[name]
    added = []
    if as_layer.any():
        dense = np.full((adata.n_obs, adata.n_vars), np.nan, dtype=np.float32)
        dense[:, columns[as_layer]] = result.mean[:, as_layer]
        adata.layers[key_added] = dense
        added.append(f"`layers['{key_added}']`")
    names = np.asarray(result.genes, dtype=object)
    if not as_layer.all():
        adata.obsm[key_added] = pd.DataFrame(
            result.mean[:, ~as_layer], index=adata.obs_names, columns=list(names[~as_layer])
        )
        added.append(f"`obsm['{key_added}']`")
    adata.obsm[name_sd] = pd.DataFrame(np.array(result.sd), index=adata.obs_names, columns=result.genes)
    added.append(f"`obsm['{name_sd}']`")
    ends = {} if result.half_width is None else dict(zip(("lower", "upper"), _ends(result), strict=True))
    for end in ("lower", "upper"):
        name = f"{key_added}_{end}"
        if name in adata.obsm:  # of an earlier call
            del adata.obsm[name]
        if end in ends:
            adata.obsm[name] = pd.DataFrame(ends[end], index=adata.obs_names, columns=result.genes)
            added.append(f"`obsm['{name}']`")
    if correlation is not None and (columns >= 0).any():
        values = np.full(adata.n_vars, np.nan, dtype=np.float32)
        values[columns[columns >= 0]] = correlation[columns >= 0]
        adata.var[name_r] = values
        added.append(f"`var['{name_r}']`")
    record = {**result.params, "units": UNITS, "genes": np.array(result.genes, dtype=str), "key_added": key_added}
    adata.uns[Key.UNS] = {**adata.uns.get(Key.UNS, {}), Key.uns.PREDICTION: record}
    logger.info(
        "Predicted %d genes. Added %s, `uns['%s']['%s']`.",
        len(result.genes),
        ", ".join(added),
        Key.UNS,
        Key.uns.PREDICTION,
    )
