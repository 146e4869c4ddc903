"""What the readers share: files that must be there and be whole, and values that survive ``write_h5ad``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix, issparse

from stalign._logging import logger
from stalign._validate import listing, near

if TYPE_CHECKING:
    from anndata import AnnData

PIXEL_COLUMNS = ("pxl_col_in_fullres", "pxl_row_in_fullres")
"""Space Ranger's names of x and y in ``obs``; kept, so that swapped coordinates can be told from a turned array."""


def require_folder(path: str | Path) -> Path:
    """Return the folder, or say that there is none."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    if not folder.is_dir():
        raise NotADirectoryError(f"'{folder}' is a file; pass the folder that holds it.")
    return folder


def contents(folder: Path) -> str:
    """Write what a folder holds for an error message; subfolders end with a slash."""
    if not folder.is_dir():
        return "nothing: there is no such folder"
    return listing(sorted(item.name + ("/" if item.is_dir() else "") for item in folder.iterdir()))


def require_image(path: str | Path) -> Path:
    """Return the absolute path of an image that exists, without opening it."""
    image = Path(path).expanduser()
    if not image.exists():
        beside = [item.name for item in image.parent.iterdir()] if image.parent.is_dir() else []
        raise FileNotFoundError(
            f"There is no image '{image}'. Beside it: {listing(sorted(beside))}.{near(image.name, beside)}"
        )
    return image.resolve()


@contextmanager
def whole(file: Path, what: str) -> Iterator[None]:
    """Turn what a library says about a damaged file into an error that names the file."""
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"'{file}' cannot be read as {what}: {error}. Is the file complete? Compare its size with the source."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    with whole(file, "JSON"):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' holds a JSON {type(content).__name__}, not an object with names and values.")
    return content


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the entries that ``uns`` can hold: text, numbers and truth values; no empty ones."""
    kept = {str(key): _scalar(value) for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None}


def _scalar(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, (str, bool, int, float)) else None


def number(values: Mapping[str, Any], key: str) -> float | None:
    """Return a positive number, ``None`` where it is absent, empty or senseless."""
    value = values.get(key)
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found) and found > 0 and not isinstance(value, bool) else None


def as_counts(matrix: Any) -> csr_matrix:
    """Return an expression matrix as CSR float32, without a copy where it is one."""
    if not issparse(matrix):
        matrix = np.asarray(matrix)
    return csr_matrix(matrix, dtype=np.float32)


@contextmanager
def repeats_allowed() -> Iterator[None]:
    """Hold back AnnData's note on repeated gene names where :func:`unique_genes` follows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")
        yield


def unique_genes(adata: AnnData) -> None:
    """Make gene names unique as scanpy does, and say so."""
    if adata.var_names.is_unique:
        return
    names = adata.var_names[adata.var_names.duplicated()].unique()
    adata.var_names_make_unique()
    logger.info("Made %d repeated gene names by numbering: %s.", len(names), listing(names, 5))


def unique_spots(names: Iterable[str], file: Path) -> None:
    """Refuse spot names that occur twice."""
    import pandas as pd

    index = pd.Index(names)
    if not index.is_unique:
        repeated = index[index.duplicated()].unique()
        raise ValueError(f"'{file}' names {len(repeated)} spots more than once: {listing(repeated, 5)}.")
