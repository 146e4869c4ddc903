"""Whether the distance from what a model knows tells foreign spots from real ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from stalign.models import STAlign

TASK: Final = "quality"
REAL: Final = "her2st/A1"
WRONG_TISSUE: Final = ("dlpfc/151510", "dlpfc/151673", "dlpfc/151674")
COLUMNS: Final = ("task", "metric", "section", "method", "seed", "value", "low", "high")
_DRAWS: Final = 200


def rows(
    data: str | Path,
    model: str | Path | STAlign = "stalign-mini",
    seeds: Sequence[int] = (0, 1, 2),
    *,
    real: str = REAL,
    wrong: Sequence[str] = WRONG_TISSUE,
) -> pd.DataFrame:
    """Measure how well :func:`stalign.tl.quality` separates foreign spots from those of a real slide.

    Parameters
    ----------
    data
        Folder with sections as ``<name>.h5ad``.
    model
        With statistics of its training spots.
    seeds
        Of the shuffled genes and the intervals.
    real
        A slide of a tissue that the model knows, with an image and counts, never trained on.
    wrong
        Slides of another tissue.

    Returns
    -------
    One row each for ``"wrong tissue"``, ``"inverted image"`` and ``"shuffled genes"`` (``method``), per section and
    seed: the area under the receiver operating characteristic of ``stalign_ood``, with a 95 % bootstrap interval over
    spots; and for the real slide the coverage of the head's 90 % prediction intervals, where it has them.
    """
    import pandas as pd
    from anndata import read_h5ad

    from stalign import models

    folder = Path(data)
    loaded = models.load(model) if isinstance(model, (str, Path)) else model
    slide = read_h5ad(folder / f"{real}.h5ad")
    known = _scores(slide, loaded)
    found: list[tuple[object, ...]] = []

    def add(method: str, section: str, foreign: np.ndarray, seed: int) -> None:
        found.append((TASK, "AUROC", section, method, seed, auroc(known, foreign), *_interval(known, foreign, seed)))

    elsewhere = {name: _scores(read_h5ad(folder / f"{name}.h5ad"), loaded) for name in wrong}
    upside_down = _scores(inverted(slide), loaded)
    for seed in seeds:
        for name, scores in elsewhere.items():
            add("wrong tissue", name, scores, seed)
        add("inverted image", real, upside_down, seed)
        add("shuffled genes", real, _scores(shuffled(slide, seed), loaded), seed)
    found += _coverage(slide, loaded, real)
    return pd.DataFrame(found, columns=list(COLUMNS))


def inverted(adata: AnnData) -> AnnData:
    """Return a copy whose images are their own negatives."""
    copy = adata.copy()
    for entry in copy.uns["spatial"].values():
        entry["images"] = {name: 255 - np.asarray(image) for name, image in entry.get("images", {}).items()}
    return copy


def shuffled(adata: AnnData, seed: int) -> AnnData:
    """Return a copy whose gene names have changed places."""
    copy = adata.copy()
    copy.var_names = np.random.default_rng(seed).permutation(adata.var_names.to_numpy())
    return copy


def auroc(real: np.ndarray, foreign: np.ndarray) -> float:
    """Chance that a foreign spot scores above a real one, ties counting half; spots without a score are left out."""
    from scipy.stats import rankdata

    real, foreign = (values[~np.isnan(values)].astype(np.float64) for values in (real, foreign))
    if not len(real) or not len(foreign):
        return float("nan")
    ranks = rankdata(np.concatenate([real, foreign]))[len(real) :]
    return float((ranks.sum() - len(foreign) * (len(foreign) + 1) / 2) / (len(real) * len(foreign)))


def _interval(real: np.ndarray, foreign: np.ndarray, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    draws = [auroc(rng.choice(real, len(real)), rng.choice(foreign, len(foreign))) for _ in range(_DRAWS)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _scores(adata: AnnData, model: STAlign) -> np.ndarray:
    from stalign import tl
    from stalign._keys import Key

    tl.quality(adata, model=model)
    return adata.obs[Key.quality("ood")].to_numpy()


def _coverage(adata: AnnData, model: STAlign, name: str) -> Iterator[tuple[object, ...]]:
    from stalign import tl

    if model.prediction is None or not model.prediction.levels:
        return
    tl.embed(adata, model=model)
    tl.predict_expression(adata, model=model, interval=0.9)
    record = adata.uns["stalign"]["prediction"]
    low, _, high = record["coverage_quartiles"]
    # Quartiles of the genes' own shares, not an interval of the mean.
    yield (TASK, "coverage of 90 % intervals", name, "head", 0, float(record["coverage"]), float(low), float(high))
