"""Files of a run, written so that an interruption or a full disk leaves the earlier ones as they were."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from stalign._validate import DISK_FULL

# What libraries that write by themselves say of these.
_FULL_TEXTS = ("no space left", "disk quota", "file too large", "storagefull", "filetoolarge", "quotaexceeded")


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it.

    Parameters
    ----------
    path
        The file; an earlier one is intact until the new one is complete.
    write
        Called with the open file.

    Raises
    ------
    OSError
        If the disk is full, naming ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_full_named(path):
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as :func:`write_whole` does."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values as :func:`write_whole` does."""
    write_whole(path, lambda file: torch.save(state, file))


def read_state(path: Path) -> dict[str, Any]:
    """Read what :func:`write_state` wrote; no pickled code is executed.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    from stalign.models._torchfile import read_torch

    state = read_torch(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not the state of a run.")
    return state


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Say which file did not fit on the disk, whatever the library that wrote it raises.

    Raises
    ------
    OSError
        With ``errno`` and the path, if the disk, a quota or a limit on the size of files was reached.
    """
    try:
        yield
    except Exception as error:
        code = _full_code(error)
        if code is None:
            raise
        raise OSError(
            code,
            f"Disk full ({os.strerror(code)}): the file could not be written, an earlier one is intact. Free some "
            "space and run the same command again, it goes on from the last checkpoint",
            str(path),
        ) from error


def _full_code(error: BaseException) -> int | None:
    """Return the code of a full disk in an error or in what it came from."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_FULL:
            return seen.errno
        if any(text in str(seen).lower() for text in _FULL_TEXTS):
            return errno.ENOSPC
        seen = seen.__cause__ or seen.__context__
    return None
