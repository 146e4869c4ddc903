"""The tidy table: one line for every value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

COLUMNS: Final = (
    *("task", "metric", "section", "method", "seed", "value", "low", "high", "interval", "n"),
    *("command", "model", "sha256", "version"),
)

BLOCKS: Final = "spatial blocks"
GENES: Final = "genes"
DRAWS: Final = "draws"
SPOTS: Final = "spots"


class Row(NamedTuple):
    """One value.

    Attributes
    ----------
    task, metric, section, method
        What was measured, on what, by which method.
    value
        The value.
    seed
        The seed it belongs to; ``None`` where nothing was random.
    low, high
        Ends of the 95 % interval; NaN where there is none.
    interval
        What was drawn again for it: ``"spatial blocks"``, ``"genes"``, ``"draws"`` (of
        labelled spots) or ``"spots"``.
    n
        Spots, genes or draws behind the value.
    """

    task: str
    metric: str
    section: str
    method: str
    value: float
    seed: int | None = None
    low: float = float("nan")
    high: float = float("nan")
    interval: str = ""
    n: int = 0


def to_frame(
    rows: Iterable[Row], *, command: str = "", model: str = "", sha256: str = "", version: str = ""
) -> pd.DataFrame:
    """Make the tidy table.

    Parameters
    ----------
    rows
        The values.
    command, model, sha256, version
        What is the same for all of them.

    Returns
    -------
    DataFrame with a column for each field of a row; ``seed`` is a nullable integer.

    Examples
    --------
    >>> from stalign.benchmark import Row, to_frame
    >>> to_frame([Row("domains", "ARI", "A1", "pca", 0.5)])["value"].tolist()
    [0.5]
    """
    import pandas as pd

    table = pd.DataFrame(list(rows), columns=list(Row._fields))
    table = table.assign(command=command, model=model, sha256=sha256, version=version)
    return typed(table[list(COLUMNS)])


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """Give the columns of a table, such as one read from a file, their types."""
    text = [name for name in COLUMNS if name not in ("seed", "value", "low", "high", "n")]
    table = table.astype({"seed": "Int64", "n": "Int64", "value": float, "low": float, "high": float})
    return table.assign(**{name: table[name].fillna("").astype(str) for name in text})


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles of what was drawn, NaN left out."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.percentile(kept, [2.5, 97.5])
    return float(low), float(high)
