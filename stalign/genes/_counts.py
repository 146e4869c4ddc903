"""Look at expression matrices, normalise them, and average them over niches; sparse stays sparse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

from stalign._validate import check_positive
from stalign.genes._match import GeneMatch

# Values looked at in one go: keeps the temporaries of a million-bin matrix small.
_BLOCK = 1 << 22
# log1p of a library of a million counts in one gene is 13.8; normalised values that were not logged go far beyond.
_LOG1P_MAX = 14.0


def is_stored_sparse(X: Any) -> bool:
    """Whether this is a CSR or CSC matrix in an HDF5 file or zarr store, as ``adata.X`` of a backed AnnData is."""
    return not sparse.issparse(X) and hasattr(X, "group") and getattr(X, "format", None) in ("csr", "csc")


def is_stored_dense(X: Any) -> bool:
    """Whether this is a dense matrix of numbers in an HDF5 file or zarr store."""
    is_array = hasattr(X, "chunks") and len(getattr(X, "shape", ())) == 2 and hasattr(X, "__getitem__")
    return is_array and not isinstance(X, np.ndarray) and not hasattr(X, "dask") and np.dtype(X.dtype).kind in "biuf"


def sparse_parts(X: Any) -> dict[str, Any]:
    """Return ``data``, ``indices`` and ``indptr`` of a CSR or CSC matrix, in memory or in a file."""
    names = ("data", "indices", "indptr")
    return {name: X.group[name] if is_stored_sparse(X) else getattr(X, name) for name in names}


def check_counts(X: Any, *, name: str = "X") -> None:
    """Refuse a matrix that does not hold raw counts.

    Parameters
    ----------
    X
        CSR, CSC or dense matrix (n_spots, n_genes), in memory or, as in a backed AnnData, in a file.
    name
        Where the matrix comes from, for the message, e.g. ``"adata.X"``.

    Raises
    ------
    ValueError
        If a value is NaN, infinite, negative, or not whole. The message names the first such value and where it is.

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.genes import check_counts
    >>> check_counts(np.array([[0, 3], [2, 1]]), name="adata.X")
    """
    for start, values in _blocks(X):
        offence = _first_offence(values)
        if offence is not None:
            at, what = offence
            row, column = _locate(X, start + at)
            raise ValueError(
                f"`{name}` must hold raw counts (whole numbers, none negative), but it {what}: "
                f"{values[at]!s} at row {row}, column {column}. {_way_out(what)}"
            )


def _first_offence(values: np.ndarray) -> tuple[int, str] | None:
    """Return the position of the first value that is no count and what is wrong with it."""
    if values.dtype.kind in "bu":
        return None
    with np.errstate(invalid="ignore"):
        bad = ~((values >= 0) & (values == np.floor(values)) & (values < np.inf))
    if not bad.any():
        return None
    at = int(bad.argmax())
    value = values[at]
    if not np.isfinite(value):
        return at, "has NaN or infinite values"
    return at, "has negative values" if value < 0 else "has values that are not whole"


def _way_out(what: str) -> str:
    if what.startswith("has NaN"):
        return "Remove or repair these values first."
    kind = "scaled" if "negative" in what else "normalised"
    return (
        f"It looks {kind}. Pass the layer that holds the raw counts, e.g. `layer='counts'`, "
        "or put them back with `adata.X = adata.layers['counts']`."
    )


def _blocks(X: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the first value, flat values): the stored values of a sparse matrix, or all of a dense one."""
    if sparse.issparse(X) or is_stored_sparse(X):
        stored: Any = X
        if stored.format not in ("csr", "csc"):
            raise TypeError(f"Sparse matrices must be CSR or CSC, got {stored.format!r}. Convert it with `.tocsr()`.")
        data = sparse_parts(X)["data"]
        for start in range(0, data.shape[0], _BLOCK):
            yield start, np.asarray(data[start : start + _BLOCK])
        return
    values = X if is_stored_dense(X) else _dense(X)
    if 0 in values.shape:
        return
    rows = max(1, _BLOCK // values.shape[1])
    for row in range(0, values.shape[0], rows):
        yield row * values.shape[1], np.ascontiguousarray(values[row : row + rows]).ravel()


def _dense(X: Any) -> np.ndarray:
    if not isinstance(X, np.ndarray):
        raise TypeError(
            f"Expected a CSR, CSC or dense matrix in memory, got {type(X).__name__}. "
            "What is in a file is read with `adata.to_memory()`."
        )
    if X.ndim != 2 or X.dtype.kind not in "biuf":
        raise TypeError(f"Expected a matrix of numbers, got shape {X.shape} and dtype {X.dtype}.")
    return X


def _locate(X: Any, position: int) -> tuple[int, int]:
    """Return (row, column) of the value with this number in :func:`_blocks`."""
    if not (sparse.issparse(X) or is_stored_sparse(X)):
        row, column = divmod(position, X.shape[1])
        return int(row), int(column)
    parts = sparse_parts(X)
    major = int(np.searchsorted(parts["indptr"][...], position, side="right")) - 1
    minor = int(parts["indices"][position])
    return (major, minor) if X.format == "csr" else (minor, major)


def input_kind(X: Any) -> str:
    """Say what a matrix seems to hold, so that the transform can be recorded.

    Parameters
    ----------
    X
        CSR, CSC or dense matrix.

    Returns
    -------
    ``"counts"`` (whole numbers, none negative), ``"log1p"`` (none negative, none above 14), ``"normalised"`` (none
    negative, larger ones), ``"scaled"`` (some negative) or ``"invalid"`` (NaN or infinite values).

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.genes import input_kind
    >>> input_kind(np.array([[0.0, 1.4], [2.1, 0.0]]))
    'log1p'
    """
    whole, smallest, largest = True, 0.0, 0.0
    for _, values in _blocks(X):
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            return "invalid"
        smallest, largest = min(smallest, float(low)), max(largest, float(high))
        whole = whole and (values.dtype.kind in "bui" or bool((values == np.floor(values)).all()))
    if smallest < 0:
        return "scaled"
    if whole:
        return "counts"
    return "log1p" if largest <= _LOG1P_MAX else "normalised"


def library_size(X: Any) -> np.ndarray:
    """Return the sum of each row.

    Parameters
    ----------
    X
        CSR, CSC or dense matrix (n_spots, n_genes).

    Returns
    -------
    Shape (n_spots,), float64.

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.genes import library_size
    >>> library_size(np.array([[1, 0, 2], [0, 4, 0]])).tolist()
    [3.0, 4.0]
    """
    return np.asarray(X.sum(axis=1, dtype=np.float64)).ravel()


def aggregate(counts: Any, match: GeneMatch) -> sparse.csr_matrix:
    """Carry counts over the data's genes to counts over the vocabulary; names of one gene are summed.

    Parameters
    ----------
    counts
        CSR, CSC or dense matrix (n_spots, n_names).
    match
        Match of the data's names, from :func:`match_names`.

    Returns
    -------
    CSR float32 of shape (n_spots, n_vocabulary), with sorted indices; genes that were not found are zero.

    Raises
    ------
    ValueError
        If ``counts`` has not one column for each name.

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.genes import aggregate, match_names
    >>> match = match_names(["HER2", "ERBB2", "CD3E"], ["CD3E", "ERBB2"])  # HER2 is another name of ERBB2
    >>> aggregate(np.array([[1, 5, 2]]), match).toarray().tolist()
    [[2.0, 6.0]]
    """
    if counts.shape[1] != len(match.names):
        raise ValueError(f"counts has {counts.shape[1]} columns, but {len(match.names)} names were matched.")
    product = _csr(counts) @ match.selector()
    product.sort_indices()
    return product


def _csr(X: Any) -> sparse.csr_matrix:
    """Return the matrix as CSR float32; it may share its values with ``X``, so it is never changed in place."""
    matrix: Any = X if sparse.issparse(X) else _dense(X)
    return sparse.csr_matrix(matrix, dtype=np.float32)


def _scale_rows(matrix: sparse.csr_matrix, scale: np.ndarray) -> sparse.csr_matrix:
    """Return a new CSR float32 matrix with row i multiplied by ``scale[i]``."""
    factors = np.repeat(scale, np.diff(matrix.indptr))
    data = (matrix.data * factors).astype(np.float32)
    return sparse.csr_matrix((data, matrix.indices.copy(), matrix.indptr.copy()), shape=matrix.shape)


def normalise_log1p(counts: Any, *, target_sum: float = 1e4, totals: np.ndarray | None = None) -> sparse.csr_matrix:
    """Scale each spot to the same total and take log(1 + x).

    Parameters
    ----------
    counts
        CSR, CSC or dense matrix of counts (n_spots, n_genes).
    target_sum
        Total of each spot after scaling.
    totals
        Totals to divide by, shape (n_spots,), where the columns are only some of the genes; by default the rows' sums.

    Returns
    -------
    CSR float32 of shape (n_spots, n_genes). Spots with a total of zero stay zero.

    Raises
    ------
    ValueError
        If ``totals`` has the wrong shape or negative or non-finite values.

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.genes import normalise_log1p
    >>> normalise_log1p(np.array([[1, 3]]), target_sum=4).toarray()
    array([[0.6931472, 1.3862944]], dtype=float32)
    """
    check_positive("target_sum", target_sum)
    matrix = _csr(counts)
    sums = library_size(matrix) if totals is None else np.asarray(totals, dtype=np.float64)
    if sums.shape != (matrix.shape[0],):
        raise ValueError(f"totals must have shape ({matrix.shape[0]},), one for each spot, got {sums.shape}.")
    if not (np.isfinite(sums) & (sums >= 0)).all():
        raise ValueError("totals must be finite and not negative.")
    scale = np.divide(target_sum, sums, out=np.zeros_like(sums), where=sums > 0)
    result = _scale_rows(matrix, scale)
    np.log1p(result.data, out=result.data)
    return result


def row_normalise(connectivities: Any) -> sparse.csr_matrix:
    """Scale the rows of a graph to sum to one.

    Parameters
    ----------
    connectivities
        CSR, CSC or dense matrix (n_spots, n_spots) of non-negative weights; row i is the niche of spot i.

    Returns
    -------
    CSR float32 of the same shape; empty rows stay empty.

    Raises
    ------
    ValueError
        If a weight is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.genes import row_normalise
    >>> row_normalise(np.array([[1, 1], [0, 1]])).toarray().tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    matrix = _csr(connectivities)
    if not (np.isfinite(matrix.data) & (matrix.data >= 0)).all():
        raise ValueError("The weights of a niche graph must be finite and not negative.")
    sums = library_size(matrix)
    return _scale_rows(matrix, np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0))


def niche_mean(connectivities: Any, expression: Any) -> Any:
    """Average expression over niches.

    Parameters
    ----------
    connectivities
        Niche graph (n_spots, n_spots), the spot itself included; row i is the niche of spot i. Rows need not sum to 1.
    expression
        CSR, CSC or dense matrix (n_spots, n_genes).

    Returns
    -------
    Weighted mean of the rows of each niche, (n_spots, n_genes), float32: CSR for sparse expression, else dense.

    Raises
    ------
    ValueError
        If the two do not speak of the same spots.

    Examples
    --------
    >>> import numpy as np
    >>> from stalign.genes import niche_mean
    >>> niche_mean(np.array([[1, 1], [0, 1]]), np.array([[2.0, 0.0], [4.0, 6.0]])).tolist()
    [[3.0, 3.0], [4.0, 6.0]]
    """
    if connectivities.shape[1] != expression.shape[0]:
        raise ValueError(
            f"The niche graph is over {connectivities.shape[1]} spots, the expression over {expression.shape[0]}."
        )
    weights = row_normalise(connectivities)
    if not sparse.issparse(expression):
        return weights @ _dense(expression).astype(np.float32, copy=False)
    # By genes: the sums of a gene fit the processor's cache, and turning the result back sorts it for free.
    return ((_csr(expression).T.tocsr() @ weights.T.tocsr()).T).tocsr()
