"""Files that commands read and write."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stalign.io._slides import read_slide, replacing, write_slide

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_output", "read_markers", "read_slide", "replacing", "write_figure", "write_slide"]


def check_output(path: Path, *, overwrite: bool) -> Path:
    """Refuse to replace a file unless asked to."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Pass --overwrite to replace it, or another --out.")
    return path


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure and close it."""
    import matplotlib.pyplot as plt

    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120, bbox_inches="tight")
    plt.close(figure)


def read_markers(path: Path) -> dict[str, list[str]]:
    """Read labels and their marker genes from JSON, TOML (``label = ["GENE", ...]``) or GMT."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    suffix = path.suffix.lower()
    if suffix == ".gmt":
        from stalign.genes import read_gmt

        return {name: list(genes) for name, genes in read_gmt(path).items()}
    text = path.read_text(encoding="utf-8")
    try:
        content: Any = {".json": json.loads, ".toml": tomllib.loads}[suffix](text)
    except KeyError:
        raise ValueError(f"Markers are read from .json, .toml or .gmt, got {path.name!r}.") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not valid {suffix[1:].upper()}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path} must hold labels and their genes, such as {{"tumour": ["ERBB2", "KRT8"]}}.')
    for label, genes in content.items():
        if not isinstance(genes, list) or not all(isinstance(gene, str) for gene in genes):
            raise ValueError(f"{path}: label {label!r} must have a list of gene names, got {genes!r}.")
    return content
