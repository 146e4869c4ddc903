from __future__ import annotations

import errno
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from stalign.genes import _rows, aggregate, check_counts, input_kind, match_names
from stalign.genes._rows import CountRows, digest

NAMES = ["TP53", "HN1", "EGFR", "JPT1", "nothing", "ERBB2"]  # HN1 is JPT1: their counts are summed
VOCABULARY = ["ERBB2", "JPT1", "TP53", "EGFR", "CD3E"]
N = 57


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.poisson(0.6, (N, len(NAMES))).astype(np.float32)


@pytest.fixture(scope="module")
def match():
    return match_names(NAMES, VOCABULARY)


def expected(counts: np.ndarray) -> np.ndarray:
    return np.column_stack([counts[:, 5], counts[:, 1] + counts[:, 3], counts[:, 0], counts[:, 2], np.zeros(N)])


@pytest.fixture(
    params=["csr", "csc", "csr_array", "dense", "fortran", "int64", "file_csr", "file_csc", "file_dense", "zarr_csr"]
)
def matrix(request, counts, tmp_path):
    """The same counts in every form; those of a file as ``adata.X`` of a backed AnnData is."""
    kind = request.param
    forms = {
        "csr": sparse.csr_matrix,
        "csc": sparse.csc_matrix,
        "csr_array": sparse.csr_array,
        "dense": np.array,
        "fortran": np.asfortranarray,
        "int64": lambda X: sparse.csr_matrix(X.astype(np.int64)),
    }
    if kind in forms:
        yield forms[kind](counts)
        return
    form = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.array}[kind.split("_")[1]]
    adata = AnnData(form(counts))
    if kind.startswith("zarr"):
        zarr = pytest.importorskip("zarr")
        from anndata.io import sparse_dataset

        adata.write_zarr(tmp_path / "counts.zarr")
        yield sparse_dataset(zarr.open_group(str(tmp_path / "counts.zarr"), mode="r")["X"])
        return
    adata.write_h5ad(tmp_path / "counts.h5ad", compression="gzip")
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    yield backed.X
    backed.file.close()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few values, so that a small matrix takes many of them."""
    monkeypatch.setattr(_rows, "_BLOCK", 16)
    monkeypatch.setattr(_rows, "_CACHE", 40)
    monkeypatch.setattr(_rows, "_IN_MEMORY", 8)


@pytest.mark.parametrize("index", [np.arange(N), np.array([40, 3, 3, 56, 0]), np.array([], dtype=np.intp), [7]])
def test_rows(matrix, match, counts, index, small_blocks):
    with CountRows(matrix, match) as rows:
        assert rows.shape == (N, len(VOCABULARY))
        found = rows(index)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.toarray(), expected(counts)[np.asarray(index, dtype=np.intp)])


def test_are_those_of_the_whole_matrix(match, counts):
    X = sparse.csr_matrix(counts)
    with CountRows(X, match) as rows:
        np.testing.assert_array_equal(rows(np.arange(N)).toarray(), aggregate(X, match).toarray())


def test_a_file_is_not_read_over_and_over(match, counts, tmp_path, small_blocks, monkeypatch):
    AnnData(sparse.csr_matrix(counts)).write_h5ad(tmp_path / "counts.h5ad")
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    read = []
    monkeypatch.setattr(_rows._Blocks, "read", lambda self, n, of=_rows._Blocks.read: read.append(n) or of(self, n))
    with CountRows(backed.X, match) as rows:
        rng = np.random.default_rng(1)
        for _ in range(300):
            index = rng.integers(0, N, 3)
            np.testing.assert_array_equal(rows(index).toarray(), expected(counts)[index])
    n_blocks = max(read) + 1
    assert n_blocks > 3
    assert len(read) < 8 * n_blocks


def test_neighbouring_rows_read_a_file_once(match, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(_rows, "_BLOCK", 16)
    AnnData(sparse.csr_matrix(counts)).write_h5ad(tmp_path / "counts.h5ad")
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    with CountRows(backed.X, match) as rows:
        for start in range(N - 5):
            rows(np.arange(start, start + 5))
        assert rows._source._rows.n_read == rows._source._rows.n_blocks


def test_nothing_is_left_on_the_disk(match, counts, tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with CountRows(sparse.csc_matrix(counts), match) as rows:
        assert list(tmp_path.iterdir())
        rows(np.arange(3))
    assert not list(tmp_path.iterdir())


def test_a_full_temporary_folder_is_named(match, counts, tmp_path, small_blocks, monkeypatch):
    def full(self, parts):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(_rows._Spool, "_bands", full)
    with pytest.raises(OSError, match=r"temporary folder .*No space left.*TMPDIR") as error:
        CountRows(sparse.csc_matrix(counts), match)
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_empty_matrices(match):
    for form in (sparse.csr_matrix, sparse.csc_matrix, np.array):
        with CountRows(form(np.zeros((4, len(NAMES)), dtype=np.float32)), match) as rows:
            assert rows(np.array([3, 1])).nnz == 0


def test_bad_matrices(match, counts):
    with pytest.raises(ValueError, match="counts has 3 columns, but 6 names were matched"):
        CountRows(counts[:, :3], match)

    class Thing:
        shape = (N, len(NAMES))

    with pytest.raises(TypeError, match="in memory or in a file, got Thing"):
        CountRows(Thing(), match)


def test_digest_is_of_the_content(matrix, counts):
    assert digest(matrix) == digest(matrix)
    other = counts.copy()
    other[30, 2] += 1
    if isinstance(matrix, np.ndarray):
        assert digest(other) != digest(matrix)
    elif sparse.issparse(matrix):
        assert digest(type(matrix)(other)) != digest(matrix)


def test_digest_of_a_file_is_that_of_memory(counts, tmp_path):
    X = sparse.csr_matrix(counts)
    AnnData(X).write_h5ad(tmp_path / "counts.h5ad", compression="gzip")
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    assert digest(backed.X) == digest(X)


def test_digest_sees_the_places(counts):
    X = sparse.csr_matrix(counts)
    moved = X.copy()
    row = int(np.flatnonzero(np.diff(X.indptr) == 2)[0])
    at = X.indptr[row]
    moved.data[at], moved.data[at + 1] = 5, 7
    first = digest(moved)
    moved.data[at], moved.data[at + 1] = 7, 5
    assert digest(moved) != first


def test_counts_of_files_are_checked(matrix, counts):
    check_counts(matrix)
    assert input_kind(matrix) == "counts"


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.array])
def test_offences_in_a_file_are_located(form, counts, tmp_path: Path):
    bad = counts.copy()
    bad[30, 2] = 0.5
    AnnData(form(bad)).write_h5ad(tmp_path / "counts.h5ad")
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"`adata\.X`.*not whole: 0\.5 at row 30, column 2"):
        check_counts(backed.X, name="adata.X")
