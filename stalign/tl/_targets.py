"""Where the embeddings of a call end up: in memory, in the AnnData's own file, or in a zarr store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign.tl._results import (
    attach,
    check_store,
    result_table,
    store_beside,
    working_folder,
    write_into_file,
    write_store,
)
from stalign.tl._sinks import FolderSink
from stalign.tl._slots import PARTS

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.tl._compute import Embedded, OpenSink


class Target:
    """Memory, where the embeddings are as they are made."""

    place: str = ""
    """The store, for the record."""

    @property
    def open(self) -> OpenSink | None:
        """What opens the sink; ``None`` for memory."""
        return None

    def finish(self, result: Embedded, uns: Mapping[str, Any], *, with_image: bool) -> Mapping[str, np.ndarray]:
        """Put the embeddings where they belong, and return what goes into ``obsm``, by output."""
        return result.matrices

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None


class _OnDisk(Target):
    """Embeddings that are made in a working folder, from which interrupted work goes on."""

    def __init__(self, adata: AnnData, path: Path, key_added: str, dtype: str) -> None:
        self._adata = adata
        self._path = path
        self._key = key_added
        self._dtype = dtype
        self._sink: FolderSink | None = None
        self._fingerprint: dict[str, str] = {}

    @property
    def open(self) -> OpenSink | None:
        return self._open

    def _open(self, fingerprint: Mapping[str, str], some_missing: bool) -> FolderSink | None:
        self._fingerprint = dict(fingerprint)
        folder = working_folder(self._path)
        self._sink = FolderSink(folder, self._adata.n_obs, self._dtype, fingerprint, fill=some_missing)
        return self._sink

    def _names(self, result: Embedded) -> dict[str, str]:
        return {part: Key.embedding(part, self._key) for part in result.record["outputs"]}

    def __exit__(self, exc_type: Any = None, *exception: Any) -> None:
        if self._sink is not None:
            self._sink.__exit__(exc_type, *exception)


class _Store(_OnDisk):
    """A zarr store."""

    def __init__(self, adata: AnnData, path: Path, key_added: str, dtype: str) -> None:
        super().__init__(adata, path, key_added, dtype)
        check_store(path)
        self.place = str(path)
        self._there: dict[str, Any] | None = None

    def _open(self, fingerprint: Mapping[str, str], some_missing: bool) -> FolderSink | None:
        names = {part: Key.embedding(part, self._key) for part in PARTS}
        self._there = attach(self._path, fingerprint, names, self._adata.n_obs)
        self._fingerprint = dict(fingerprint)
        return None if self._there is not None else super()._open(fingerprint, some_missing)

    def finish(self, result: Embedded, uns: Mapping[str, Any], *, with_image: bool) -> Mapping[str, Any]:
        names = self._names(result)
        matrices = self._there or {}
        if self._sink is not None:
            working = result.working
            table = result_table(self._adata, working.adata if working.is_new else self._adata, uns)
            matrices = write_store(self._path, table, self._sink, names, self._fingerprint)
            self._sink.remove()
            logger.info("The embeddings are in '%s'.", self._path)
        found = {part: matrices[part] for part in names if part in matrices}
        # What is in memory is copied, subset and changed, which an array on disk does not know how to.
        return found if self._adata.isbacked else {part: np.asarray(matrix) for part, matrix in found.items()}


class _OwnFile(_OnDisk):
    """The file of an AnnData opened with ``backed="r+"``."""

    def __enter__(self) -> Self:
        # Open for reading alone meanwhile: a process that dies then leaves nothing behind in the file.
        self._adata.file.close()
        self._adata.file.open(filemode="r")
        return self

    def __exit__(self, exc_type: Any = None, *exception: Any) -> None:
        self._adata.file.close()
        self._adata.file.open(filemode="r+")
        super().__exit__(exc_type, *exception)

    def finish(self, result: Embedded, uns: Mapping[str, Any], *, with_image: bool) -> Mapping[str, Any]:
        if self._sink is None:  # cannot happen: the sink is opened before anything is embedded
            raise RuntimeError("The working folder was never opened.")
        working = result.working
        table = result_table(self._adata, working.adata if working.is_new else None, uns)
        if working.is_new and with_image and Key.uns.SPATIAL in working.adata.uns:
            table.uns[Key.uns.SPATIAL] = working.adata.uns[Key.uns.SPATIAL]
        stale = [Key.embedding(part, self._key) for part in PARTS]
        matrices = write_into_file(self._adata, table, self._sink, self._names(result), stale)
        self._sink.remove()
        logger.info("The embeddings are in '%s'.", self._path)
        return matrices


def choose_target(
    adata: AnnData, store: str | Path | None, key_added: str, dtype: str = "float32", *, copy: bool = False
) -> Target:
    """Return where the embeddings of a call go.

    Parameters
    ----------
    adata
        The slide.
    store
        The zarr store that the user wants.
    key_added
        Prefix of the slots.
    dtype
        Type of the numbers.
    copy
        Whether a new AnnData is wanted.

    Raises
    ------
    ValueError
        For a view of a backed AnnData, and for a copy of one, which would need a file of its own.
    FileExistsError
        If ``store`` is something else.
    """
    if adata.isbacked and (copy or adata.is_view):
        what = "`copy=True` needs" if copy else "A view cannot be written to: it needs"
        raise ValueError(
            f"{what} a file of its own, since the AnnData is backed by '{adata.filename}'. Use "
            "`adata.copy(filename)` or `adata.to_memory()`, and embed that."
        )
    if store is not None:
        return _Store(adata, Path(store).expanduser().absolute(), key_added, dtype)
    if not adata.isbacked:
        return Target()
    file = Path(str(adata.filename)).absolute()
    if adata.file._filemode == "r+":
        return _OwnFile(adata, file, key_added, dtype)
    return _Store(adata, store_beside(file, key_added), key_added, dtype)
