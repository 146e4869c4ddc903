"""Files written by ``torch.save``, read without executing anything in them."""

from __future__ import annotations

import argparse
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from stalign._validate import listing

WRAPPERS = ("model", "state_dict", "model_state_dict")
_CHUNK = 2**24


def _allow_namespace() -> Any:
    """Training checkpoints keep their command line in an ``argparse.Namespace``: plain data, allowed by name."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    return nullcontext() if safe_globals is None else safe_globals([argparse.Namespace])


def read_torch(path: Path) -> Any:
    """Read a file of ``torch.save`` as tensors and plain containers.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, is not such a file, or holds objects that would have to be executed to be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes). Fetch or copy it again.")
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_sums(path)
        with _allow_namespace():
            # Mapped, not read: a training checkpoint holds optimiser states several times the size of the weights.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds objects other than tensors and plain containers, which only "
            f"executing the file could read ({_first_line(error)}). Save its state dict alone, or as safetensors."
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        KeyError,
        IndexError,
        ValueError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(_damaged(path, size, error)) from error


def _check_sums(path: Path) -> None:
    """Compare the check sums in the file with its content, which PyTorch does not."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                while member.read(_CHUNK):
                    pass


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "global" in line.lower()]
    return (named or lines or [type(error).__name__])[0][:200]


def _damaged(path: Path, size: int, error: BaseException) -> str:
    return (
        f"{path} is not a readable PyTorch file ({_first_line(error)}). It is truncated or corrupt ({size} bytes), "
        "or of another kind; fetch or copy it again."
    )


def _is_state(content: Any) -> bool:
    is_filled = isinstance(content, Mapping) and bool(content)
    return is_filled and all(isinstance(value, torch.Tensor) for value in content.values())


def _only_state(content: Mapping[str, Any]) -> list[str]:
    """Name of the only state dict in a training checkpoint, as a list; empty if there is none or a choice."""
    states = [key for key, value in content.items() if _is_state(value)]
    return states if len(states) == 1 else []


def unwrap(content: Any, *, what: str) -> dict[str, torch.Tensor]:
    """Find the flat state dict in what a file holds, and take ``module.`` off its names.

    It may be bare, or stand under ``model``, ``state_dict``, ``model_state_dict``, or another name if it is the only
    one in the file.

    Raises
    ------
    ValueError
        If there is none.
    """
    state = content
    for _ in range(2):
        if isinstance(state, Mapping):
            inner = [key for key in WRAPPERS if isinstance(state.get(key), Mapping)] or _only_state(state)
            state = state[inner[0]] if inner else state
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{what} holds no state dict but {type(content).__name__}.")
    other = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise ValueError(
            f"{what} is not a state dict: {len(other)} of its {len(state)} entries are not tensors: "
            f"{listing(other, 5)}. A state dict may also stand under one of {list(WRAPPERS)}."
        )
    keys = [str(key) for key in state]
    prefix = "module." if all(key.startswith("module.") for key in keys) else ""
    return {str(key)[len(prefix) :]: value for key, value in state.items()}
