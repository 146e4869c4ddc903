"""Where embeddings go while they are made: into memory, or into a folder from which interrupted work goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import numpy as np

from stalign._logging import logger
from stalign._validate import DISK_FULL

_FORMAT = 1
_PROGRESS = "progress.json"
_LOCK = "lock"
# Rows that are copied, filled or handed on in one go.
_ROWS = 16384
# Seconds between two notes of how far the work has come.
_NOTE_EVERY = 2.0


class Sink(ABC):
    """Takes the rows of every output as they are made, in the order of the plan.

    Attributes
    ----------
    done
        Spots, in the order of the plan, whose embeddings are there already.
    """

    done: int = 0

    @abstractmethod
    def write(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Take (m, d) float32 embeddings, by name of the output, of the spots at the positions ``rows``."""


class MemorySink(Sink):
    """One matrix for each output, made when its first rows come; rows that never come are NaN."""

    def __init__(self, n_obs: int, dtype: str) -> None:
        self._n_obs = n_obs
        self._dtype = np.dtype(dtype)
        self.matrices: dict[str, np.ndarray] = {}

    def write(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Take the embeddings of some spots."""
        for name, block in values.items():
            if name not in self.matrices:
                self.matrices[name] = np.full((self._n_obs, block.shape[1]), np.nan, dtype=self._dtype)
            self.matrices[name][rows] = block
        self.done += len(rows)


class FolderSink(Sink):
    """A working folder: one file for each output, and a note of how far the work has come.

    The folder of interrupted work is taken up where it stopped if it is about the same thing; otherwise it is emptied.
    What is noted as done is in the files, whatever happens to the process.

    Parameters
    ----------
    folder
        It is made if it is not there.
    n_obs
        Rows of every output.
    dtype
        ``"float32"`` or ``"float16"``.
    fingerprint
        What the result depends on, by the words for it.
    fill
        Whether some rows of some outputs will never come; they are NaN.
    """

    def __init__(
        self, folder: Path, n_obs: int, dtype: str, fingerprint: Mapping[str, str], *, fill: bool = True
    ) -> None:
        self.folder = folder
        self._fill = fill
        self._n_obs = n_obs
        self._dtype = np.dtype(dtype)
        self._fingerprint = dict(fingerprint)
        self._files: dict[str, IO[bytes]] = {}
        self._noted = 0.0
        self.widths: dict[str, int] = {}
        with explained(folder, "the working folder"):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder / _LOCK)
            self._take_up()

    def _take_up(self) -> None:
        earlier = read_note(self.folder / _PROGRESS)
        if earlier is not None and earlier.get("format") == _FORMAT:
            changed = difference(earlier.get("fingerprint", {}), self._fingerprint)
            if not changed and self._complete(earlier):
                self.done, self.widths = int(earlier["done"]), {k: int(v) for k, v in earlier["widths"].items()}
                logger.info("Going on in '%s': %d of %d spots are done.", self.folder, self.done, self._n_obs)
                return
            why = f"{changed} changed" if changed else "its files are damaged"
            logger.warning("The unfinished work in '%s' is begun anew: %s.", self.folder, why)
        elif any(path.name != _LOCK for path in self.folder.iterdir()):
            logger.warning("The unfinished work in '%s' is begun anew: its note is missing or damaged.", self.folder)
        for path in self.folder.iterdir():
            if path.name == _PROGRESS or path.suffix == ".rows":
                path.unlink()

    def _complete(self, note: Mapping[str, Any]) -> bool:
        widths = note.get("widths", {})
        sizes = {name: self._n_obs * int(width) * self._dtype.itemsize for name, width in widths.items()}
        there = all(self._path(name).is_file() and self._path(name).stat().st_size == sizes[name] for name in sizes)
        return there and 0 <= int(note.get("done", -1)) <= self._n_obs and (bool(sizes) or note["done"] == 0)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.rows"

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Take the embeddings of some spots."""
        with explained(self.folder, f"the embeddings, of which those of {self.done} of {self._n_obs} spots are kept"):
            for name, block in values.items():
                self._write(name, rows, block)
            self.done += len(rows)
            if time.monotonic() - self._noted > _NOTE_EVERY or self.done == self._n_obs:
                self._note()

    def _write(self, name: str, rows: np.ndarray, block: np.ndarray) -> None:
        file = self._file(name, block.shape[1])
        order = np.argsort(rows, kind="stable")
        rows, block = rows[order], np.ascontiguousarray(block[order], dtype=self._dtype)
        width = block.shape[1] * self._dtype.itemsize
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
            file.seek(int(rows[part[0]]) * width)
            _write_all(file, memoryview(block[part[0] : part[-1] + 1].tobytes()))

    def _file(self, name: str, width: int) -> IO[bytes]:
        if name not in self._files:
            path = self._path(name)
            if name not in self.widths:
                self._make(path, width)
                self.widths[name] = width
            self._files[name] = path.open("r+b", buffering=0)
        return self._files[name]

    def _make(self, path: Path, width: int) -> None:
        """Make a file: the room for all rows is taken before the first is there."""
        with path.open("wb") as file:
            if not self._fill and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self._n_obs * width * self._dtype.itemsize)
                return
            for start in range(0, self._n_obs, _ROWS):
                file.write(np.full((min(_ROWS, self._n_obs - start), width), np.nan, dtype=self._dtype).tobytes())

    def _note(self) -> None:
        """Say how far the work has come; the rows themselves are on the disk before."""
        for file in self._files.values():
            os.fsync(file.fileno())
        note = {"format": _FORMAT, "done": self.done, "widths": self.widths, "fingerprint": self._fingerprint}
        temporary = self.folder / f"{_PROGRESS}.new"
        temporary.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.folder / _PROGRESS)
        self._noted = time.monotonic()

    # -- reading -----------------------------------------------------------------------------------------------------

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, (m, d) rows) of an output, in the order of the spots."""
        width = self.widths[name]
        with self._path(name).open("rb") as file:
            for start in range(0, self._n_obs, _ROWS):
                rows = min(_ROWS, self._n_obs - start)
                yield start, np.fromfile(file, dtype=self._dtype, count=rows * width).reshape(rows, width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers."""
        return self._dtype

    def close(self) -> None:
        """Close the files, and note what is done; with nothing done, nothing is left."""
        if self.done == 0:
            self.remove()
            return
        if self._files:
            with explained(self.folder, "the note of how far the work has come"):
                self._note()
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder; its embeddings are somewhere else by now."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exception: object) -> None:
        if exc_type is not None and issubclass(exc_type, OSError):
            # What was noted last stands; another note may be what the disk has no room for.
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._lock.close()
            return
        self.close()


def _write_all(file: IO[bytes], content: memoryview) -> None:
    """Write everything: a file without a buffer may take less at once."""
    while len(content):
        content = content[file.write(content) :]


def read_note(path: Path) -> dict[str, Any] | None:
    """Return what a note in JSON says; ``None`` if it is not there or damaged."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def difference(earlier: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Name what changed between two fingerprints; empty if nothing did."""
    names: Sequence[str] = [*now, *(name for name in earlier if name not in now)]
    return ", ".join(name for name in names if earlier.get(name) != now.get(name))


@contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Say what could not be written, and what to do, where the disk is full or does not let us."""
    try:
        yield
    except OSError as error:
        _explain(error, path, what)


def _explain(error: OSError, path: Path, what: str) -> NoReturn:
    if error.errno in DISK_FULL:
        folder = path if path.is_dir() else path.parent
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        raise OSError(
            error.errno,
            f"There is no room for {what}, in '{path}' ({free / 1e9:.1f} GB free, or a limit on the size of files). "
            "The data are as they were. Make room, or keep less (`outputs=('fused',)`, `dtype='float16'`), or say "
            "where there is room (`store=...`); the same call then goes on with what is done.",
        ) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise PermissionError(
            error.errno, f"'{path}' must not be written to ({error.strerror}). Pass `store=...`, a place that may be."
        ) from error
    raise error


def _locked(path: Path) -> IO[bytes]:
    """Open a file that only one process holds at a time; it is free again when that process ends, however."""
    file = path.open("ab")
    try:
        import fcntl
    except ImportError:  # not on Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"Another process is at work in '{path.parent}'. Wait for it, or pass another `store=...`."
        ) from None
    return file
