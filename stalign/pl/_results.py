"""Annotations and predicted expression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import issparse

from stalign._keys import Key
from stalign._validate import check_adata, listing, near, require_key
from stalign.pl._spatial import Panel, colour_options, colour_values, draw, gene_column, get_slides, panel_title

if TYPE_CHECKING:
    from anndata import AnnData

_TARGET_SUM = 1e4
UNITS = "log1p of counts per 10,000"


class Look(NamedTuple):
    """How one result of :func:`stalign.tl.quality` is drawn; ``high`` is the least upper end of its colours."""

    title: str
    label: str
    cmap: str
    high: float
    is_share: bool


QUALITY_LOOKS = {
    "ood": Look(
        "Far from what the model knows", "1: as far as one training spot in 10, 2: in 100", "inferno", 2.0, False
    ),
    "agreement": Look("Image and genes agree", "share of mismatched pairs that agree less", "viridis", 1.0, True),
    "tissue": Look("Tissue in the patch", "share of the patch that is tissue", "cividis", 1.0, True),
}


def annotation(
    adata: AnnData,
    *,
    key: str = Key.obs.ANNOTATION,
    confidence_key: str | None = None,
    library_key: str | None = None,
    library_id: str | None = None,
    size: float = 1.0,
    **kwargs: Any,
) -> np.ndarray:
    """Show the labels of spots beside the confidence in them.

    Parameters
    ----------
    adata
        After :func:`stalign.tl.zero_shot_annotate`.
    key
        Labels in ``obs``.
    confidence_key
        Confidence in ``obs``; ``None`` takes ``"<key>_confidence"``.
    library_key, library_id, size
        As in :func:`stalign.pl.spatial`.
    **kwargs
        For :func:`squidpy.pl.spatial_scatter`.

    Returns
    -------
    Array of Axes: labels and confidence of the first library, then of the next.

    Raises
    ------
    KeyError
        If the labels or the confidence are not there.

    Examples
    --------
    >>> import stalign as sta
    >>> sta.pl.annotation(adata)  # doctest: +SKIP
    """
    check_adata(adata)
    confidence_key = f"{key}_confidence" if confidence_key is None else confidence_key
    hint = "Run `stalign.tl.zero_shot_annotate` first, or pass `key=...`."
    for name in (key, confidence_key):
        require_key(adata.obs, name, where="adata.obs", hint=hint)
    labels, confidence = colour_values(adata, key), colour_values(adata, confidence_key)
    slides = get_slides(adata, library_key, library_id, None, Key.obsm.SPATIAL)
    panels = []
    for slide in slides:
        own = labels.iloc[slide.index], confidence.iloc[slide.index]
        colors = colour_options(adata, labels, "viridis")
        panels.append(Panel(slide, own[0], panel_title(slide, key, len(slides)), colors))
        colors = {"cmap": "magma", "vmin": 0.0, "vmax": 1.0}
        panels.append(Panel(slide, own[1], panel_title(slide, "confidence", len(slides)), colors, "share of the label"))
    return np.atleast_1d(np.asarray(draw(panels, ncols=2, size=size, **kwargs), dtype=object))


def expression(
    adata: AnnData,
    gene: str,
    *,
    layer: str | None = None,
    predicted_key: str = Key.layers.PREDICTED,
    library_key: str | None = None,
    library_id: str | None = None,
    size: float = 1.0,
    cmap: str = "magma",
    **kwargs: Any,
) -> np.ndarray:
    """Show a gene as measured beside the gene as predicted from histology.

    Measured counts are shown as log(1 + counts per 10,000); values that are no counts are shown as they are. The title
    gives the Pearson correlation over the spots of the library.

    Parameters
    ----------
    adata
        After :func:`stalign.tl.predict_expression`.
    gene
        A gene that was predicted; if it was not measured, only the prediction is shown.
    layer
        Layer of the measured values; ``None`` takes ``X``.
    predicted_key
        Prediction in ``layers`` or, as a DataFrame, in ``obsm``.
    library_key, library_id, size, cmap
        As in :func:`stalign.pl.spatial`.
    **kwargs
        For :func:`squidpy.pl.spatial_scatter`.

    Returns
    -------
    Array of Axes: measured and predicted of the first library, then of the next.

    Raises
    ------
    KeyError
        If the gene was not predicted.
    TypeError
        If ``gene`` is no name.

    Examples
    --------
    >>> import stalign as sta
    >>> sta.pl.expression(adata, "ERBB2")  # doctest: +SKIP
    """
    check_adata(adata)
    if not isinstance(gene, str):
        raise TypeError(f"gene must be the name of one gene, got {gene!r}. Call pl.expression once for each gene.")
    predicted = predicted_values(adata, gene, predicted_key)
    measured, measured_units = None, ""
    if gene in adata.var_names:
        matrix = adata.X if layer is None else require_key(adata.layers, layer, where="adata.layers")
        measured = measured_values(adata, gene, matrix)
        measured_units = UNITS if _is_counts(matrix) else ""
    slides = get_slides(adata, library_key, library_id, None, Key.obsm.SPATIAL)
    panels = []
    for slide in slides:
        guess = predicted.iloc[slide.index]
        text = panel_title(slide, f"{gene} predicted", len(slides))
        if measured is not None:
            truth = measured.iloc[slide.index]
            title = panel_title(slide, f"{gene} measured", len(slides))
            panels.append(Panel(slide, truth, title, value_range(truth, cmap), measured_units))
            text += f", r = {pearson(truth.to_numpy(), guess.to_numpy()):.2f}"
        panels.append(Panel(slide, guess, text, value_range(guess, cmap), UNITS))
    drawn = draw(panels, ncols=2 if measured is not None else 4, size=size, **kwargs)
    return np.atleast_1d(np.asarray(drawn, dtype=object))


def quality(
    adata: AnnData,
    *,
    key_added: str = Key.QUALITY,
    library_key: str | None = None,
    library_id: str | None = None,
    size: float = 1.0,
    **kwargs: Any,
) -> np.ndarray:
    """Show where to trust the results less: far from what the model knows, image against genes, tissue in the patch.

    Parameters
    ----------
    adata
        After :func:`stalign.tl.quality`.
    key_added
        Prefix of the columns, as in :func:`stalign.tl.quality`.
    library_key, library_id, size
        As in :func:`stalign.pl.spatial`.
    **kwargs
        For :func:`squidpy.pl.spatial_scatter`.

    Returns
    -------
    Array of Axes: the columns that have values, of the first library, then of the next. Shares are drawn from 0 to 1,
    the distance from 0 to at least 2 (as far as one training spot in a hundred).

    Raises
    ------
    KeyError
        If no column is there.

    Examples
    --------
    >>> import stalign as sta
    >>> sta.pl.quality(adata)  # doctest: +SKIP
    """
    check_adata(adata)
    there = {what: Key.quality(what, key_added) for what in QUALITY_LOOKS}
    there = {what: key for what, key in there.items() if key in adata.obs and adata.obs[key].notna().any()}
    if not there:
        raise KeyError(
            f"None of {listing(Key.quality(what, key_added) for what in QUALITY_LOOKS)} is in `adata.obs` with values. "
            "Run `stalign.tl.quality` first."
        )
    slides = get_slides(adata, library_key, library_id, None, Key.obsm.SPATIAL)
    panels = []
    for slide in slides:
        for what, key in there.items():
            look = QUALITY_LOOKS[what]
            low, high = quality_limits(adata.obs[key], look)
            values = adata.obs[key].iloc[slide.index].astype(np.float64).rename(key)
            title = panel_title(slide, look.title, len(slides))
            panels.append(Panel(slide, values, title, {"cmap": look.cmap, "vmin": low, "vmax": high}, look.label))
    return np.atleast_1d(np.asarray(draw(panels, ncols=len(there), size=size, **kwargs), dtype=object))


def quality_limits(values: pd.Series, look: Look) -> tuple[float, float]:
    """Ends of the colours, the same for all libraries: a slide that the model knows well should look like one."""
    if look.is_share:
        return 0.0, 1.0
    finite = values[np.isfinite(values.to_numpy(dtype=np.float64))]
    return 0.0, max(look.high, float(np.percentile(finite, 99))) if len(finite) else look.high


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of finite pairs; NaN where either does not vary."""
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def predicted_values(adata: AnnData, gene: str, key: str) -> pd.Series:
    """Take the prediction from the layer where it holds the gene, else from the table in ``obsm``."""
    if key in adata.layers and gene in adata.var_names:
        values = gene_column(adata.layers[key], adata.var_names.get_loc(gene))
        if np.isfinite(values).any():
            return pd.Series(values, index=adata.obs_names, name=gene)
    table = adata.obsm.get(key)
    if isinstance(table, pd.DataFrame) and gene in table:
        return table[gene].rename(gene)
    if key not in adata.layers and table is None:
        raise KeyError(
            f"No predicted expression: `adata.layers[{key!r}]` and `adata.obsm[{key!r}]` are missing. "
            "Run `stalign.tl.predict_expression` first."
        )
    genes = list(table.columns) if isinstance(table, pd.DataFrame) else list(adata.var_names)
    raise KeyError(f"Gene {gene!r} was not predicted. Available: {listing(genes)}.{near(gene, genes)}")


def measured_values(adata: AnnData, gene: str, matrix: Any) -> pd.Series:
    """Return a gene of (n_obs, n_vars) ``matrix``; counts as log1p of counts per 10,000, anything else as it is."""
    values = gene_column(matrix, adata.var_names.get_loc(gene))
    if _is_counts(matrix):
        totals = np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
        values = np.log1p(values / np.maximum(totals, 1) * _TARGET_SUM)
    return pd.Series(values, index=adata.obs_names, name=gene)


def _is_counts(matrix: Any) -> bool:
    values = np.asarray(getattr(matrix, "data", matrix) if issparse(matrix) else matrix)
    return bool(values.size == 0 or (values.min() >= 0 and np.array_equal(values, np.rint(values))))


def value_range(values: pd.Series, cmap: str) -> dict[str, Any]:
    """Colour limits that a few extreme spots do not set."""
    finite = values[np.isfinite(values)]
    if finite.empty:
        return {"cmap": cmap}
    low, high = np.percentile(finite, [1, 99])
    if high <= low:
        low, high = float(finite.min()), float(finite.max())
    return {"cmap": cmap, "vmin": float(low), "vmax": float(high) if high > low else float(low) + 1.0}
