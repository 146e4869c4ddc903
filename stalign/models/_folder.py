"""The files of a model folder that can be read without torch."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
GENES = "genes.txt"
_HINT = "A model folder is what `model.save(folder)` writes: model.safetensors, config.json, genes.txt."


def bundled_folder() -> Path:
    """Folder with the models that come with the package."""
    return Path(str(files("stalign.models"))) / "_bundled"


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    folder = bundled_folder()
    return sorted(f.name for f in folder.iterdir() if (f / CONFIG).is_file()) if folder.is_dir() else []


def require_file(path: Path) -> Path:
    """Return ``path`` if the file is there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}. {_HINT}")
    return path


def read_config_file(folder: Path) -> dict[str, Any]:
    """Read and check ``config.json`` of a model folder."""
    path = require_file(folder / CONFIG)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). It is truncated or corrupt.") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{path} is not the config of a stalign model: it has no 'model' entry. {_HINT}")
    if content.get("format", 1) != 1:
        raise ValueError(
            f"{path} has format {content['format']!r}; this version of stalign reads format 1. Update stalign."
        )
    return content


def read_genes_file(folder: Path) -> tuple[str, ...]:
    """Read ``genes.txt`` of a model folder, one symbol a line."""
    path = require_file(folder / GENES)
    try:
        return tuple(line for line in path.read_text(encoding="utf-8").split("\n") if line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). It is corrupt.") from error
