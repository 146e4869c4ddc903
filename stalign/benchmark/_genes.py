"""Genes from histology, and the search across modalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from stalign.benchmark import _features as features
from stalign.benchmark import _metrics as metrics
from stalign.benchmark._methods import wanted
from stalign.benchmark._rows import BLOCKS, GENES, Row

if TYPE_CHECKING:
    from stalign.benchmark._section import Section
    from stalign.models import STAlign

TASK: Final = "genes"
RETRIEVAL: Final = "retrieval"
N_GENES: Final = 50
_MIN_SHARE: Final = 0.1
_HEST_COMPONENTS: Final = 256
_SHARES: Final = (0.01, 0.05, 0.1)
_BARS: Final = ("mean", "ridge-colour", "ridge-random-encoder")


class Prediction(NamedTuple):
    """A test section's task: what is measured, and the training sections' expression of the same genes."""

    genes: list[str]
    measured: np.ndarray
    training: list[np.ndarray]


def top_genes(sections: Sequence[Section], n: int = N_GENES) -> list[str]:
    """Genes that vary most over the spots of all sections together.

    As HEST-benchmark chooses them (Jaume et al., NeurIPS 2024): genes that all sections measured and at least 10 % of
    each section's spots express; variance of log1p of normalised counts over all spots.

    Parameters
    ----------
    sections
        Training and test sections.
    n
        How many.

    Raises
    ------
    ValueError
        If fewer than two genes are shared.
    """
    shared = sections[0].adata.var_names
    for section in sections[1:]:
        shared = shared[shared.isin(section.adata.var_names)]
    first, second, total = np.zeros(len(shared)), np.zeros(len(shared)), 0
    common = np.ones(len(shared), dtype=bool)
    for section in sections:
        part = section.log_expression()[:, section.adata.var_names.get_indexer(shared)]
        common &= np.bincount(part.indices, minlength=len(shared)) >= _MIN_SHARE * part.shape[0]
        first += np.asarray(part.sum(axis=0)).ravel()
        second += np.asarray(part.multiply(part).sum(axis=0)).ravel()
        total += part.shape[0]
    if common.sum() < 2:
        names = ", ".join(section.name for section in sections)
        raise ValueError(f"{names} have {int(common.sum())} genes in common that 10 % of the spots express: no task.")
    spread = np.where(common, second / total - (first / total) ** 2, -np.inf)
    best = np.argsort(-spread, kind="stable")[: min(n, int(common.sum()))]
    return [str(gene) for gene in shared[best]]


def expression_of(section: Section, genes: Sequence[str]) -> np.ndarray:
    """(n, genes) log1p of counts per 10,000, dense."""
    return section.log_expression()[:, section.adata.var_names.get_indexer(list(genes))].toarray()


def genes(
    test: Section,
    training: Sequence[Section],
    *,
    model: STAlign,
    n_genes: int = N_GENES,
    methods: Sequence[str] | None = None,
) -> list[Row]:
    """Predict the most variable genes of a section from its image, after training sections of other patients.

    Parameters
    ----------
    test
        With an image; its counts are used for choosing the genes and for scoring.
    training
        Sections with images and counts, to fit the regressions on.
    model
        The model.
    n_genes
        How many genes (those that vary most, over all sections together).
    methods
        Names or patterns of :data:`stalign.benchmark.METHODS`.

    Returns
    -------
    Rows of the mean over genes of Pearson's correlation over spots and of the mean squared error, in log1p of counts
    per 10,000, with intervals over genes; and for the model's methods the share of the genes that are above a plain
    method in correlation and below it in error. A prediction that does not vary correlates 0. None without images.

    Examples
    --------
    >>> import stalign as sta
    >>> from stalign.benchmark import Section, genes
    >>> first, second = (
    ...     Section.of(sta.datasets.synthetic_visium(n_rows=12, n_cols=12, seed=seed), f"slide {seed}")
    ...     for seed in (0, 1)
    ... )
    >>> model = sta.models.load("stalign-mini")
    >>> rows = genes(first, [second], model=model, methods=["mean"])
    >>> [(row.metric, row.n) for row in rows]
    [('Pearson r', 50), ('MSE', 50)]
    """
    training = [section for section in training if section.has_image]
    if not test.has_image or not training:
        return []
    chosen = top_genes([test, *training], n_genes)
    task = Prediction(chosen, expression_of(test, chosen), [expression_of(section, chosen) for section in training])
    names = [name for name in _PREDICTORS if wanted(name, methods)]
    model_rows = [name for name in names if name.startswith("stalign")]
    needed = [*names, *(bar for bar in _BARS if model_rows and bar not in names)]
    errors = {}
    for name in needed:
        predicted = _PREDICTORS[name](test, training, task, model)
        errors[name] = (
            metrics.pearson(predicted, task.measured),
            metrics.mean_squared_errors(predicted, task.measured),
        )
    rows = []
    for name in names:
        for metric, values in zip(("Pearson r", "MSE"), errors[name], strict=True):
            rows.append(_over_genes(test, metric, name, values))
    for name in model_rows:
        rows += [_over_genes(test, metric, name, values) for metric, values in _shares(errors, name)]
    return rows


def _over_genes(test: Section, metric: str, method: str, values: np.ndarray) -> Row:
    low, high = metrics.mean_interval(values)
    return Row(TASK, metric, test.name, method, float(values.mean()), None, low, high, GENES, len(values))


def _shares(errors: dict[str, tuple[np.ndarray, np.ndarray]], method: str) -> list[tuple[str, np.ndarray]]:
    """Genes, one by one, above each plain method in correlation, in error, and above mean and ridge in both."""
    r, mse = errors[method]
    found = []
    for bar in _BARS:
        found.append((f"share of genes: r above {bar}", (r > errors[bar][0]).astype(float)))
        found.append((f"share of genes: MSE below {bar}", (mse < errors[bar][1]).astype(float)))
    both = np.logical_and.reduce([(r > errors[bar][0]) & (mse < errors[bar][1]) for bar in ("mean", "ridge-colour")])
    found.append(("share of genes: r above and MSE below both mean and ridge-colour", both.astype(float)))
    return found


# --- predictors --------------------------------------------------------------------------------------------------


def _mean(test: Section, training: Sequence[Section], task: Prediction, model: STAlign) -> np.ndarray:
    return np.broadcast_to(np.vstack(task.training).mean(axis=0), task.measured.shape)


def _ridge(extract: Callable[[Section, STAlign], np.ndarray]) -> Callable[..., np.ndarray]:
    """Ridge regression on sections centred one by one; the mean of the training sections is added."""

    def predict(test: Section, training: Sequence[Section], task: Prediction, model: STAlign) -> np.ndarray:
        from sklearn.linear_model import RidgeCV

        x = np.vstack([features.z_scores(extract(section, model)) for section in training])
        y = np.vstack([values - values.mean(axis=0) for values in task.training])
        fitted = RidgeCV(alphas=np.logspace(-1, 6, 15)).fit(x, y)
        return fitted.predict(features.z_scores(extract(test, model))) + np.vstack(task.training).mean(axis=0)

    return predict


def _hest(extract: Callable[[Section, STAlign], np.ndarray]) -> Callable[..., np.ndarray]:
    """HEST-benchmark's protocol, with an intercept, without which the squared error would be that of the mean."""

    def predict(test: Section, training: Sequence[Section], task: Prediction, model: STAlign) -> np.ndarray:
        from sklearn.decomposition import PCA
        from sklearn.linear_model import Ridge
        from sklearn.preprocessing import StandardScaler

        known = np.vstack([extract(section, model) for section in training])
        scaler = StandardScaler().fit(known)
        pca = PCA(min(_HEST_COMPONENTS, *known.shape), random_state=0).fit(scaler.transform(known))
        x, new = (pca.transform(scaler.transform(values)) for values in (known, extract(test, model)))
        fitted = Ridge(alpha=100 / (x.shape[1] * len(task.genes)), solver="lsqr", max_iter=1000)
        return fitted.fit(x, np.vstack(task.training)).predict(new)

    return predict


def _neighbours_colour(test: Section, training: Sequence[Section], task: Prediction, model: STAlign) -> np.ndarray:
    from sklearn.neighbors import KNeighborsRegressor

    known = np.vstack([features.colour(section, model) for section in training])
    fitted = KNeighborsRegressor(min(50, len(known))).fit(known, np.vstack(task.training))
    return fitted.predict(features.colour(test, model))


def _model(method: str) -> Callable[..., np.ndarray]:
    """``tl.predict_expression``; what the head does not know has the mean of the training sections."""

    def predict(test: Section, training: Sequence[Section], task: Prediction, model: STAlign) -> np.ndarray:
        test.embed(model)
        values = np.array(_mean(test, training, task, model), dtype=np.float64)
        if method == "head":
            known = np.isin(task.genes, list(model.predicted_genes))
            if known.any():
                values[:, known] = predict_with_head(test, model, np.array(task.genes)[known].tolist())
            return values
        return _predict(test, model, task.genes, method=method, reference=[_embedded(s, model) for s in training])

    return predict


def _embedded(section: Section, model: STAlign) -> object:
    section.embed(model)
    return section.adata


def predict_with_head(section: Section, model: STAlign, names: Sequence[str]) -> np.ndarray:
    """(n, genes) prediction of the model's head, which sees no counts."""
    section.embed(model)
    return _predict(section, model, names)


def _predict(section: Section, model: STAlign, names: Sequence[str], **options: object) -> np.ndarray:
    from stalign import tl

    # Without counts: all predictions are in `obsm`, by name.
    blind = section.blind()
    tl.predict_expression(blind, list(names), model=model, **options)  # type: ignore[arg-type]
    return blind.obsm["stalign_predicted"][list(names)].to_numpy()


def _image_side(section: Section, model: STAlign) -> np.ndarray:
    side = section.side(model, "image")
    if side is None:
        raise ValueError(f"{section.name}: the embedding has no image side, though the section has an image.")
    return side


_PREDICTORS: Final[dict[str, Callable[..., np.ndarray]]] = {
    "mean": _mean,
    "ridge-colour": _ridge(features.colour),
    "ridge-random-encoder": _ridge(features.random_encoder),
    "neighbours-colour": _neighbours_colour,
    "hest-colour": _hest(features.colour),
    "hest-random-encoder": _hest(features.random_encoder),
    "hest-stalign": _hest(_image_side),
    "stalign-head": _model("head"),
    "stalign-retrieval": _model("retrieval"),
    "stalign-ridge": _model("ridge"),
}


# --- retrieval ---------------------------------------------------------------------------------------------------


def retrieval(
    section: Section,
    training: Sequence[Section] = (),
    *,
    model: STAlign,
    methods: Sequence[str] | None = None,
) -> list[Row]:
    """Search a section for the expression that belongs to a spot's image, and the other way round.

    Parameters
    ----------
    section
        With an image and counts.
    training
        Sections for the plain method: the ridge from colour and texture predicts 50 genes, and the spot is looked for
        whose measured genes (z-scores within the section) are nearest. Without them there is none.
    model
        The model.
    methods
        Names or patterns of :data:`stalign.benchmark.METHODS`.

    Returns
    -------
    Rows of recall at 1, 5 and 10 %: the share of spots whose own counterpart is among the nearest 1 % (5 %, 10 %) of
    all spots of the section, one spot at least. Ties count with the middle of their ranks. None without an image.

    Examples
    --------
    >>> import stalign as sta
    >>> from stalign.benchmark import Section, retrieval
    >>> section = Section.of(sta.datasets.synthetic_visium(n_rows=12, n_cols=12))
    >>> rows = retrieval(section, model=sta.models.load("stalign-mini"), methods=["chance"])
    >>> len(rows)
    6
    """
    if not section.has_image:
        return []
    n = section.adata.n_obs
    rows = []
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    training = [other for other in training if other.has_image]
    if training and wanted("ridge-colour", methods):
        chosen = top_genes([section, *training])
        task = Prediction(chosen, expression_of(section, chosen), [expression_of(s, chosen) for s in training])
        predicted = _PREDICTORS["ridge-colour"](section, training, task, model)
        pairs["ridge-colour"] = features.z_scores(predicted), features.z_scores(task.measured)
    if wanted("stalign", methods):
        image, gene = section.side(model, "image"), section.side(model, "gene")
        if image is not None and gene is not None:
            pairs["stalign"] = image, gene
    directions = ("image→gene", "gene→image")
    ranks = {
        (method, direction): metrics.pair_ranks(pair[number], pair[1 - number])
        for method, pair in pairs.items()
        for number, direction in enumerate(directions)
    }
    for share in _SHARES:
        k = max(1, round(share * n))
        for direction in directions:
            metric = f"recall@{100 * share:.0f}%, {direction}"
            if wanted("chance", methods):
                rows.append(Row(RETRIEVAL, metric, section.name, "chance", k / n, n=n))
            for method in pairs:
                hits = (ranks[method, direction] < k).astype(float)
                low, high = metrics.mean_block_interval(hits, section.blocks)
                rows.append(
                    Row(RETRIEVAL, metric, section.name, method, float(hits.mean()), None, low, high, BLOCKS, n)
                )
    return rows
