"""Counts over a vocabulary, some spots at a time, wherever the matrix is: in memory or in a file."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from scipy import sparse

from stalign._logging import logger
from stalign.genes._counts import is_stored_dense, is_stored_sparse, sparse_parts
from stalign.genes._match import GeneMatch

# Values of a sparse matrix that are held at once: 8 bytes each.
_BLOCK = 1 << 21
# Decoded blocks of a file that are kept, in values.
_CACHE = 1 << 25
# A matrix of columns up to this many values is turned into one of rows in memory, a larger one on disk.
_IN_MEMORY = 1 << 25
# A file is read this many times over before its values are laid out anew.
_TIMES_OVER = 4


class CountRows:
    """Rows of a count matrix, carried over to a model's vocabulary as they are asked for.

    The matrix is never copied as a whole, and never dense: rows of a CSR or dense matrix are cut out, those of a file
    are read in blocks. A CSC matrix, or a file whose rows are wanted in an order that would read it again and again,
    is laid out anew in a temporary file.

    Parameters
    ----------
    X
        CSR, CSC or dense matrix (n_spots, n_names) in memory, or what ``adata.X`` is for an AnnData opened with
        ``backed``: a sparse or dense matrix in an HDF5 file or zarr store.
    match
        Match of the data's names to the vocabulary, from :func:`~stalign.genes.match_names`.

    Attributes
    ----------
    shape
        (n_spots, n_vocabulary).

    Raises
    ------
    ValueError
        If ``X`` has not one column for each name.
    TypeError
        If ``X`` is none of these.
    """

    def __init__(self, X: Any, match: GeneMatch) -> None:
        if X.shape[1] != len(match.names):
            raise ValueError(f"counts has {X.shape[1]} columns, but {len(match.names)} names were matched.")
        self.shape = (int(X.shape[0]), len(match.vocabulary))
        self._selector = match.selector()
        self._source = _open_rows(X)

    def __call__(self, index: np.ndarray) -> sparse.csr_matrix:
        """Return the counts of some spots over the vocabulary.

        Parameters
        ----------
        index
            (m,) positions of spots.

        Returns
        -------
        CSR float32 (m, n_vocabulary) in the order of ``index``; indices are not sorted.
        """
        index = np.asarray(index, dtype=np.intp)
        return sparse.csr_matrix(self._source.rows(index) @ self._selector)

    def close(self) -> None:
        """Drop what was laid out on disk."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def digest(X: Any) -> str:
    """Return the SHA-256 of a matrix's values and their places, as stored; a file is read block by block."""
    result = hashlib.sha256(f"{tuple(X.shape)} {getattr(X, 'format', 'dense')}".encode())
    if sparse.issparse(X) or is_stored_sparse(X):
        parts = sparse_parts(X)
        for part in (np.asarray(parts["indptr"], dtype=np.int64), parts["indices"], parts["data"]):
            for start in range(0, part.shape[0], _BLOCK):
                block = np.asarray(part[start : start + _BLOCK])
                result.update((block if block.dtype.kind == "f" else block.astype(np.int64)).tobytes())
        return result.hexdigest()
    step = max(1, _BLOCK // max(1, X.shape[1]))
    for start in range(0, X.shape[0], step):
        result.update(np.asarray(X[start : start + step]).tobytes())
    return result.hexdigest()


# --- where the rows come from ------------------------------------------------------------------------------------


class _Rows(ABC):
    """Rows over the data's own names, as CSR float32."""

    @abstractmethod
    def rows(self, index: np.ndarray) -> sparse.csr_matrix:
        """Return (m, n_names) CSR float32."""

    def close(self) -> None:
        """Release what is held."""
        return None


def _open_rows(X: Any) -> _Rows:
    if sparse.issparse(X):
        stored: Any = X
        if stored.format == "csr":
            return _Memory(stored)
        if stored.nnz <= _IN_MEMORY:
            return _Memory(stored.tocsr())
        return _Spool.of_columns(sparse_parts(stored), stored.shape)
    if is_stored_sparse(X):
        if X.format == "csc":
            return _Spool.of_columns(sparse_parts(X), X.shape)
        return _File(X)
    if isinstance(X, np.ndarray):
        return _Memory(X)
    if is_stored_dense(X):
        return _DenseFile(X)
    raise TypeError(f"Counts must be a CSR, CSC or dense matrix in memory or in a file, got {type(X).__name__}.")


class _Memory(_Rows):
    def __init__(self, X: Any) -> None:
        self._matrix = X

    def rows(self, index: np.ndarray) -> sparse.csr_matrix:
        consecutive = len(index) > 0 and index[-1] - index[0] == len(index) - 1 and bool((np.diff(index) == 1).all())
        part = self._matrix[index[0] : index[-1] + 1] if consecutive else self._matrix[index]
        return sparse.csr_matrix(part, dtype=np.float32)


class _DenseFile(_Rows):
    """Rows of a dense matrix in a file, which are read in their order there."""

    def __init__(self, X: Any) -> None:
        self._matrix = X

    def rows(self, index: np.ndarray) -> sparse.csr_matrix:
        sorted_index, back = np.unique(index, return_inverse=True)
        parts = [_no_rows(self._matrix.shape[1])]
        for run in _runs(sorted_index):
            step = max(1, _BLOCK // max(1, self._matrix.shape[1]))
            for start in range(run.start, run.stop, step):
                block = np.asarray(self._matrix[start : min(start + step, run.stop)])
                parts.append(sparse.csr_matrix(block, dtype=np.float32))
        return sparse.vstack(parts, format="csr")[back]


def _no_rows(n_columns: int) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.empty((0, n_columns), dtype=np.float32))


def _runs(index: np.ndarray) -> Iterator[slice]:
    """Split sorted, distinct positions into runs of consecutive ones."""
    if not len(index):
        return
    breaks = np.flatnonzero(np.diff(index) > 1) + 1
    for part in np.split(index, breaks):
        yield slice(int(part[0]), int(part[-1]) + 1)


class _Blocks(_Rows):
    """Rows of a CSR matrix in a file, read in blocks of which the last used are kept."""

    def __init__(self, parts: dict[str, Any], shape: tuple[int, int]) -> None:
        self._parts = parts
        self._shape = shape
        self._indptr = np.asarray(parts["indptr"][...], dtype=np.int64)
        per_row = max(1.0, float(self._indptr[-1]) / max(1, shape[0]))
        self._step = int(np.clip(_BLOCK / per_row, 1, 1 << 16))
        self.n_blocks = -(-shape[0] // self._step)
        self.n_read = 0
        self._kept: OrderedDict[int, sparse.csr_matrix] = OrderedDict()
        self._lock = Lock()

    def block(self, number: int) -> sparse.csr_matrix:
        """Return one block of rows, from the file if it is not at hand."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            block = self.read(number)
            self._kept[number] = block
            while sum(kept.nnz for kept in self._kept.values()) > _CACHE and len(self._kept) > 1:
                self._kept.popitem(last=False)
            return block

    def read(self, number: int) -> sparse.csr_matrix:
        """Read one block of rows from the file."""
        self.n_read += 1
        start, stop = number * self._step, min((number + 1) * self._step, self._shape[0])
        low, high = int(self._indptr[start]), int(self._indptr[stop])
        data = np.asarray(self._parts["data"][low:high], dtype=np.float32)
        indices = np.asarray(self._parts["indices"][low:high], dtype=np.int32)
        indptr = self._indptr[start : stop + 1] - low
        return sparse.csr_matrix((data, indices, indptr), shape=(stop - start, self._shape[1]))

    def rows(self, index: np.ndarray) -> sparse.csr_matrix:
        number = index // self._step
        order = np.argsort(number, kind="stable")
        parts = [_no_rows(self._shape[1])]
        for part in np.split(order, np.flatnonzero(np.diff(number[order])) + 1) if len(order) else ():
            first = int(number[part[0]])
            parts.append(self.block(first)[index[part] - first * self._step])
        back = np.empty(len(order), dtype=np.intp)
        back[order] = np.arange(len(order))
        return sparse.vstack(parts, format="csr")[back]

    def close(self) -> None:
        self._kept.clear()


class _File(_Rows):
    """A CSR matrix in a file; laid out anew where its blocks would be read over and over."""

    def __init__(self, X: Any) -> None:
        self._shape = tuple(X.shape)
        self._rows: _Blocks | _Spool = _Blocks(sparse_parts(X), self._shape)

    def rows(self, index: np.ndarray) -> sparse.csr_matrix:
        source = self._rows
        if isinstance(source, _Blocks) and source.n_read > _TIMES_OVER * source.n_blocks + 8:
            # Spots that are near each other on the slide are far apart in the file, which is larger than what is kept.
            logger.info("The counts' rows are not in the order of the slide: they are laid out in a temporary file.")
            self._rows = source = _Spool.of_rows(source, self._shape)
        return source.rows(index)

    def close(self) -> None:
        self._rows.close()


class _Spool(_Rows):
    """A CSR matrix in a temporary folder, uncompressed, so that any row is read at once."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="stalign-counts-"))
        self._shape = shape
        self._indptr = np.zeros(1, dtype=np.int64)

    @classmethod
    def of_rows(cls, blocks: _Blocks, shape: tuple[int, int]) -> Self:
        """Copy a file of rows."""
        spool = cls(shape)
        spool._fill(blocks.read(number) for number in range(blocks.n_blocks))
        blocks.close()
        return spool

    @classmethod
    def of_columns(cls, parts: dict[str, Any], shape: tuple[int, int]) -> Self:
        """Turn a matrix of columns into one of rows: its values are dealt out to bands of rows first."""
        spool = cls(shape)
        spool._fill(spool._bands(parts))
        return spool

    def _fill(self, blocks: Iterator[sparse.csr_matrix]) -> None:
        try:
            self._append(blocks)
        except OSError as error:
            self.close()
            raise OSError(
                error.errno,
                f"The counts cannot be laid out by spots in the temporary folder '{self._folder}' ({error.strerror}). "
                "Name a place with more room in the environment variable TMPDIR, or save the counts as CSR.",
            ) from error
        except BaseException:
            self.close()
            raise

    def _append(self, blocks: Iterator[sparse.csr_matrix]) -> None:
        lengths = [np.zeros(1, dtype=np.int64)]
        with (self._folder / "data").open("wb") as data, (self._folder / "indices").open("wb") as indices:
            for block in blocks:
                data.write(block.data.astype(np.float32, copy=False).tobytes())
                indices.write(block.indices.astype(np.int32, copy=False).tobytes())
                lengths.append(np.diff(block.indptr))
        self._indptr = np.cumsum(np.concatenate(lengths))

    def _bands(self, parts: dict[str, Any]) -> Iterator[sparse.csr_matrix]:
        """Yield bands of rows of a matrix of columns, which is read once."""
        indptr = np.asarray(parts["indptr"][...], dtype=np.int64)
        n_bands = max(1, -(-int(indptr[-1]) // _BLOCK))
        height = max(1, -(-self._shape[0] // n_bands))
        n_bands = -(-self._shape[0] // height)
        entry = np.dtype([("row", np.int32), ("column", np.int32), ("value", np.float32)])
        for start in range(0, int(indptr[-1]), _BLOCK):
            stop = min(start + _BLOCK, int(indptr[-1]))
            entries = np.empty(stop - start, dtype=entry)
            entries["row"] = parts["indices"][start:stop]
            entries["column"] = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
            entries["value"] = parts["data"][start:stop]
            band = entries["row"] // height
            order = np.argsort(band, kind="stable")
            for part in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
                with (self._folder / f"band-{band[part[0]]}").open("ab") as file:
                    file.write(entries[part].tobytes())
        for number in range(n_bands):
            path = self._folder / f"band-{number}"
            entries = np.fromfile(path, dtype=entry) if path.exists() else np.empty(0, dtype=entry)
            path.unlink(missing_ok=True)
            rows = min(height, self._shape[0] - number * height)
            place = (entries["row"] - number * height, entries["column"])
            yield sparse.csr_matrix((entries["value"], place), shape=(rows, self._shape[1]), dtype=np.float32)

    def rows(self, index: np.ndarray) -> sparse.csr_matrix:
        lengths = self._indptr[index + 1] - self._indptr[index]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        place = np.repeat(self._indptr[index] - indptr[:-1], lengths) + np.arange(indptr[-1])
        values = [self._gather(name, dtype, place) for name, dtype in (("data", np.float32), ("indices", np.int32))]
        return sparse.csr_matrix((*values, indptr), shape=(len(index), self._shape[1]))

    def _gather(self, name: str, dtype: Any, place: np.ndarray) -> np.ndarray:
        # Mapped anew each time, so that the pages do not pile up in the process's memory.
        path = self._folder / name
        if path.stat().st_size == 0:
            return np.empty(0, dtype=dtype)
        return np.array(np.memmap(path, dtype=dtype, mode="r")[place])

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
