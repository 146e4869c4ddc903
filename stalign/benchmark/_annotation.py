"""Names for spots: by marker genes, after labelled sections, and from a few labelled spots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from stalign.benchmark import _features as features
from stalign.benchmark import _metrics as metrics
from stalign.benchmark._markers import MARKERS
from stalign.benchmark._methods import wanted
from stalign.benchmark._rows import BLOCKS, DRAWS, Row, percentile_interval
from stalign.benchmark._section import UNDETERMINED

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.benchmark._section import Section
    from stalign.models import STAlign

TASK: Final = "annotation"
FEW_SHOT: Final = "few-shot"
SHOTS: Final = (1, 5, 10, 50)
N_DRAWS: Final = 10
_SIDES: Final[dict[str, Literal["fused", "gene", "image"]]] = {
    "stalign": "fused",
    "stalign-gene": "gene",
    "stalign-image": "image",
}


def annotation(
    section: Section,
    references: Sequence[Section] = (),
    *,
    model: STAlign,
    markers: Mapping[str, Sequence[str]] = MARKERS,
    methods: Sequence[str] | None = None,
) -> list[Row]:
    """Name the spots of a section with no training, by marker genes and after labelled sections.

    Parameters
    ----------
    section
        With labels. Spots called ``"undetermined"``, or whose label has no markers (is not among the labels of the
        references), are not scored and their labels not offered.
    references
        Labelled sections of other patients; together they give the prototypes.
    model
        The model.
    markers
        Marker genes by label.
    methods
        Names or patterns of :data:`stalign.benchmark.METHODS`.

    Returns
    -------
    Rows of macro-F1 over the labels offered, of its ratio to the better of two ways to guess (``guessing_bar``),
    the largest class everywhere and answers drawn by the shares of the classes, and for the model's answers of the
    expected calibration error of their confidence. None for a section with fewer than two labels.

    Examples
    --------
    >>> import stalign as sta
    >>> from stalign.benchmark import Section, annotation
    >>> section = Section.of(sta.datasets.synthetic_visium(n_rows=12, n_cols=12), label_key="region")
    >>> markers = {"tumour": ["ERBB2", "KRT8"], "immune": ["CD3E", "PTPRC"], "stroma": ["COL1A1", "DCN"]}
    >>> model = sta.models.load("stalign-mini")
    >>> rows = annotation(section, model=model, markers=markers, methods=["prior"])
    >>> round(rows[0].value, 3)
    0.333
    """
    rows: list[Row] = []
    if section.labels is None:
        return rows
    offered = {label: list(markers[label]) for label in _offered(section, markers)}
    if len(offered) > 1:
        rows += _by_markers(section, offered, model, methods)
    others = [other for other in references if other.labels is not None]
    known = sorted({label for other in others for label in np.unique(other.names)})
    shared = _offered(section, known)
    if len(shared) > 1:
        rows += _by_reference(section, others, shared, model, methods)
    return rows


def _offered(section: Section, known: Mapping[str, Sequence[str]] | Sequence[str]) -> list[str]:
    return [str(label) for label in np.unique(section.names) if label in known and label != UNDETERMINED]


def _score(section: Section, what: str, method: str, found: np.ndarray, offered: Sequence[str]) -> list[Row]:
    """Macro-F1 over the spots with a label offered, and its ratio to guessing."""
    place = {label: number for number, label in enumerate(offered)}
    truth = np.array([place.get(label, -1) for label in section.names], dtype=np.int64)
    answer = np.array([place.get(label, len(offered)) for label in found], dtype=np.int64)
    kept = truth >= 0
    blocks = np.unique(section.blocks[kept], return_inverse=True)[1]
    tables = _square(metrics.contingency(truth[kept], answer[kept], blocks), len(offered))
    bar = max(metrics.guessing_bar(tables.sum(axis=(0, 2))))
    value = float(metrics.macro_f1(tables.sum(axis=0)))
    low, high = metrics.block_interval(metrics.macro_f1, tables)
    end = (BLOCKS, int(kept.sum()))
    return [
        Row(TASK, f"macro-F1, {what}", section.name, method, value, None, low, high, *end),
        Row(
            *(TASK, f"macro-F1 over guessing, {what}", section.name, method),
            *(value / bar, None, low / bar, high / bar),
            *end,
        ),
    ]


def _score_annotation(section: Section, what: str, method: str, offered: Sequence[str]) -> list[Row]:
    """Scores of what the model has just written, and how far its confidence is from how often it is right."""
    from stalign.tl._calibration import reliability

    found = section.adata.obs["stalign_annotation"].astype(str).to_numpy()
    confidence = section.adata.obs["stalign_annotation_confidence"].to_numpy()
    kept = np.isin(section.names, list(offered)) & np.isfinite(confidence)
    rows = _score(section, what, method, found, offered)
    if kept.any():
        error = reliability(confidence[kept], found[kept] == section.names[kept]).ece
        rows.append(Row(TASK, f"calibration error, {what}", section.name, method, error, n=int(kept.sum())))
    return rows


def _square(tables: np.ndarray, n: int) -> np.ndarray:
    """Give tables all classes as rows, and all answers and "another" as columns."""
    full = np.zeros((len(tables), n, n + 1))
    full[:, : tables.shape[1], : tables.shape[2]] = tables
    return full


def _guessing(section: Section, what: str, offered: Sequence[str], methods: Sequence[str] | None) -> list[Row]:
    counts = [int((section.names == label).sum()) for label in offered]
    values = dict(zip(("majority", "prior"), metrics.guessing_bar(counts), strict=True))
    return [
        Row(TASK, f"macro-F1, {what}", section.name, method, value, n=sum(counts))
        for method, value in values.items()
        if wanted(method, methods)
    ]


def _by_markers(
    section: Section, offered: Mapping[str, Sequence[str]], model: STAlign, methods: Sequence[str] | None
) -> list[Row]:
    from stalign import tl

    labels = list(offered)
    rows = _guessing(section, "markers", labels, methods)
    if wanted("marker-z", methods):
        rows += _score(section, "markers", "marker-z", marker_scores(section, offered), labels)
    for method, modality in _SIDES.items():
        if wanted(method, methods) and (modality != "image" or section.has_image):
            key = section.embed(model)
            tl.zero_shot_annotate(section.adata, dict(offered), modality=modality, model=model, use_rep=key)
            rows += _score_annotation(section, "markers", method, labels)
    return rows


def marker_scores(section: Section, markers: Mapping[str, Sequence[str]]) -> np.ndarray:
    """(n,) label whose markers have the highest mean z-score within the section; genes not measured are left out."""
    log, names = section.log_expression(), section.adata.var_names
    scores = np.full((log.shape[0], len(markers)), -np.inf)
    for number, genes in enumerate(markers.values()):
        columns = names.get_indexer([gene for gene in genes if gene in names])
        if len(columns):
            scores[:, number] = features.z_scores(log[:, columns].toarray()).mean(axis=1)
    return np.array(list(markers))[scores.argmax(axis=1)]


def _by_reference(
    section: Section,
    references: Sequence[Section],
    shared: Sequence[str],
    model: STAlign,
    methods: Sequence[str] | None,
) -> list[Row]:
    from stalign import tl

    rows = _guessing(section, "reference", shared, methods)
    if wanted("expression-prototypes", methods):
        found = expression_prototypes(section, references, shared)
        rows += _score(section, "reference", "expression-prototypes", found, shared)
    for method, modality in _SIDES.items():
        sides = [other.side(model, modality) for other in references] if wanted(method, methods) else []
        own = section.side(model, modality) if sides else None
        there = [(other, side) for other, side in zip(references, sides, strict=False) if side is not None]
        labels = {label for other, _ in there for label in np.unique(other.names)}
        if own is None or not set(shared) <= labels:
            continue
        joined = _joined(there, shared, section.embed(model), modality)
        tl.zero_shot_annotate(
            section.adata,
            reference=joined,
            label_key="label",
            modality=modality,
            model=model,
            use_rep=section.embed(model),
        )
        rows += _score_annotation(section, "reference", method, shared)
    return rows


def _joined(
    references: Sequence[tuple[Section, np.ndarray]], shared: Sequence[str], key: str, modality: str
) -> AnnData:
    """One AnnData of the labelled spots of all references, each centred by its own mean."""
    import pandas as pd
    from anndata import AnnData

    from stalign._keys import Key

    values = np.vstack([side - side.mean(axis=0) for _, side in references]).astype(np.float32)
    labels = np.concatenate([section.names for section, _ in references]).astype(str)
    kept = np.isin(labels, list(shared))
    obs = pd.DataFrame({"label": labels[kept]}, index=[str(number) for number in range(int(kept.sum()))])
    joined = AnnData(obs=obs, obsm={Key.embedding(modality, key): values[kept]})
    joined.uns[Key.UNS] = {Key.embed_record(key): references[0][0].adata.uns[Key.UNS][Key.embed_record(key)]}
    return joined


def expression_prototypes(section: Section, references: Sequence[Section], shared: Sequence[str]) -> np.ndarray:
    """(n,) label of the nearest class mean of the references, by cosine.

    Over the 2,000 genes of all of them that vary most in the section; z-scores within every section.
    """
    names = section.adata.var_names
    for other in references:
        names = names[names.isin(other.adata.var_names)]
    own = section.log_expression()[:, section.adata.var_names.get_indexer(names)]
    best = np.argsort(-features.variance(own), kind="stable")[:2000]
    chosen = names[best]
    scores = np.vstack(
        [
            features.z_scores(other.log_expression()[:, other.adata.var_names.get_indexer(chosen)].toarray(), 10)
            for other in references
        ]
    )
    labels = np.concatenate([other.names for other in references])
    prototypes = np.stack([scores[labels == label].mean(axis=0) for label in shared])
    query = features.z_scores(own[:, best].toarray(), 10)
    unit = [values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) for values in (query, prototypes)]
    return np.array(list(shared))[(unit[0] @ unit[1].T).argmax(axis=1)]


# --- few labelled spots ------------------------------------------------------------------------------------------


def few_shot(
    section: Section,
    *,
    model: STAlign,
    shots: Sequence[int] = SHOTS,
    n_draws: int = N_DRAWS,
    methods: Sequence[str] | None = None,
) -> list[Row]:
    """Logistic regression on a few labelled spots of each class of the section, scored on the others.

    Parameters
    ----------
    section
        With labels. ``"undetermined"``, and classes of fewer than four spots, are left out; of a class with fewer than
        twice as many spots as asked for, half are taken.
    model
        The model.
    shots
        Labelled spots of each class.
    n_draws
        How often the labelled spots are drawn; all methods get the same.
    methods
        Names or patterns of :data:`stalign.benchmark.METHODS`.

    Returns
    -------
    Rows of macro-F1 and balanced accuracy over the spots that were not drawn: the mean of the draws, and their 2.5 and
    97.5 percentiles. Every representation is reduced to 30 components and scaled by one number. Spots near a labelled
    one resemble it, so these figures are about one section, not about new ones.

    Examples
    --------
    >>> import stalign as sta
    >>> from stalign.benchmark import Section, few_shot
    >>> section = Section.of(sta.datasets.synthetic_visium(n_rows=12, n_cols=12), label_key="region")
    >>> rows = few_shot(section, model=sta.models.load("stalign-mini"), shots=[5], n_draws=2, methods=["pca"])
    >>> [row.metric for row in rows]
    ['macro-F1, 5 a class', 'balanced accuracy, 5 a class']
    """
    if section.labels is None:
        return []
    names, counts = np.unique(section.names, return_counts=True)
    classes = [str(name) for name, count in zip(names, counts, strict=True) if count >= 4 and name != UNDETERMINED]
    if len(classes) < 2:
        return []
    place = {label: number for number, label in enumerate(classes)}
    truth = np.array([place.get(label, -1) for label in section.names], dtype=np.int64)
    rows = []
    for method, values in _representations(section, model, methods).items():
        scores = features.components(values, 30)
        scores = scores / max(float(np.sqrt(scores.var(axis=0).mean())), 1e-12)
        for n in shots:
            rows += _few_shot(section, method, scores, truth, n, n_draws)
    return rows


def _representations(section: Section, model: STAlign, methods: Sequence[str] | None) -> dict[str, np.ndarray]:
    found = {}
    for name, extract in (("pca", features.pca), ("pca-niche", features.pca_beside_niche)):
        if wanted(name, methods):
            found[name] = extract(section)
    if wanted("colour", methods) and section.has_image:
        found["colour"] = features.colour(section, model)
    for name, part in _SIDES.items():
        side = section.side(model, part) if wanted(name, methods) else None
        if side is not None:
            found[name] = side
    return found


def _few_shot(section: Section, method: str, values: np.ndarray, truth: np.ndarray, n: int, n_draws: int) -> list[Row]:
    from sklearn.linear_model import LogisticRegression

    n_classes = int(truth.max()) + 1
    measures = {"macro-F1": metrics.macro_f1, "balanced accuracy": metrics.balanced_accuracy}
    found: dict[str, list[float]] = {name: [] for name in measures}
    n_scored = 0
    for draw in range(n_draws):
        known = draw_spots(truth, n, seed=draw)
        rest = np.setdiff1d(np.flatnonzero(truth >= 0), known)
        fitted = LogisticRegression(max_iter=1000).fit(values[known], truth[known])
        table = _square(metrics.contingency(truth[rest], fitted.predict(values[rest])), n_classes)
        for name, measure in measures.items():
            found[name].append(float(measure(table)[0]))
        n_scored = len(rest)
    return [
        Row(
            *(FEW_SHOT, f"{name}, {n} a class", section.name, method, float(np.mean(drawn)), None),
            *percentile_interval(np.array(drawn)),
            *(DRAWS, n_scored),
        )
        for name, drawn in found.items()
    ]


def draw_spots(classes: np.ndarray, n: int, *, seed: int) -> np.ndarray:
    """Draw ``n`` spots of each class, at most half of them.

    Parameters
    ----------
    classes
        (n,) number of each spot's class; negative for spots to leave out.
    n
        How many.
    seed
        Of the draw.

    Returns
    -------
    Positions, sorted.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for number in np.unique(classes[classes >= 0]):
        spots = np.flatnonzero(classes == number)
        drawn.append(rng.choice(spots, min(n, len(spots) // 2), replace=False))
    return np.sort(np.concatenate(drawn))
