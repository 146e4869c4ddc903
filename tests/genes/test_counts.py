from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from stalign.genes import (
    _counts,
    aggregate,
    check_counts,
    input_kind,
    library_size,
    match_names,
    niche_mean,
    normalise_log1p,
    row_normalise,
)

FORMATS = [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, np.asarray]
COUNTS = np.array([[0, 3, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32)


@pytest.fixture(params=FORMATS, ids=["csr", "csc", "csr_array", "dense"])
def as_format(request):
    return request.param


def to_dense(X):
    return X.toarray() if sparse.issparse(X) else X


def test_counts_pass(as_format):
    check_counts(as_format(COUNTS))
    check_counts(as_format(COUNTS.astype(np.int64)))
    check_counts(as_format(np.zeros((2, 3))))
    check_counts(np.zeros((0, 4)))
    check_counts(np.zeros((4, 0)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"`adata.X`.*not whole: 0.5 at row 1, column 2\. It looks normalised.*layer='counts'"),
        (-2.0, r"negative values: -2.0 at row 1, column 2\. It looks scaled.*layer='counts'"),
        (np.nan, r"NaN or infinite values: nan at row 1, column 2"),
        (np.inf, r"NaN or infinite values: inf at row 1, column 2"),
    ],
)
def test_offences_are_named_and_located(as_format, value, message):
    X = COUNTS.copy()
    X[1, 2] = value
    with pytest.raises(ValueError, match=message):
        check_counts(as_format(X), name="adata.X")


def test_offence_in_a_later_block(monkeypatch, as_format):
    monkeypatch.setattr(_counts, "_BLOCK", 2)
    X = COUNTS.copy()
    X[2, 1] = 1.5
    with pytest.raises(ValueError, match="row 2, column 1"):
        check_counts(as_format(X))


@pytest.mark.parametrize("X", [sparse.coo_matrix(COUNTS), "X", np.array([["a"]]), np.zeros(3)])
def test_what_is_no_matrix(X):
    with pytest.raises(TypeError):
        check_counts(X)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([[0, 3], [2, 1]], "counts"),
        ([[0.0, 3.0]], "counts"),
        ([[0.0, 1.3]], "log1p"),
        ([[0.0, 130.2]], "normalised"),
        ([[-0.5, 1.3]], "scaled"),
        ([[np.nan, 1.0]], "invalid"),
        ([[np.inf, 1.0]], "invalid"),
    ],
)
def test_input_kind(as_format, values, kind):
    assert input_kind(as_format(np.array(values))) == kind


def test_library_size(as_format):
    sizes = library_size(as_format(COUNTS))
    assert sizes.dtype == np.float64
    np.testing.assert_array_equal(sizes, [4, 2, 0])


def test_normalise_log1p(as_format):
    X = as_format(COUNTS.copy())
    result = normalise_log1p(X, target_sum=100)
    assert result.format == "csr"
    assert result.dtype == np.float32
    expected = np.log1p([[0, 75, 0, 25], [100, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(result.toarray(), expected, rtol=1e-6)
    np.testing.assert_array_equal(to_dense(X), COUNTS)  # the input stays as it was


def test_normalise_with_given_totals():
    result = normalise_log1p(COUNTS, target_sum=10, totals=np.array([8, 20, 5]))
    np.testing.assert_allclose(result.toarray(), np.log1p(COUNTS * 10 / np.array([[8], [20], [5]])), rtol=1e-6)


@pytest.mark.parametrize("totals", [np.ones(2), np.ones((3, 1)), np.array([1, np.nan, 1]), np.array([1, -1, 1])])
def test_bad_totals(totals):
    with pytest.raises(ValueError, match="totals"):
        normalise_log1p(COUNTS, totals=totals)


@pytest.mark.parametrize("target_sum", [0, -1, np.nan, "x"])
def test_bad_target(target_sum):
    with pytest.raises(ValueError, match="target_sum"):
        normalise_log1p(COUNTS, target_sum=target_sum)


# Four spots in a row, each linked to its neighbours and itself, and one spot apart from all.
GRAPH = np.array(
    [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
    dtype=np.float32,
)
EXPRESSION = np.array([[6, 0], [0, 3], [3, 0], [0, 0], [5, 1]], dtype=np.float32)


def test_niche_mean_by_hand(as_format):
    result = niche_mean(sparse.csr_matrix(GRAPH), as_format(EXPRESSION))
    expected = [[3, 1.5], [3, 1], [1, 1], [1.5, 0], [5, 1]]
    np.testing.assert_allclose(to_dense(result), expected, rtol=1e-6)
    assert result.dtype == np.float32
    assert sparse.issparse(result) == sparse.issparse(as_format(EXPRESSION))


def test_niche_mean_equals_a_loop():
    rng = np.random.default_rng(0)
    graph = (rng.random((40, 40)) < 0.2).astype(np.float32)
    np.fill_diagonal(graph, 1)
    expression = rng.poisson(1.0, (40, 7)).astype(np.float32)
    loop = np.stack([expression[np.flatnonzero(row)].mean(axis=0) for row in graph])
    result = niche_mean(sparse.csr_matrix(graph), sparse.csr_matrix(expression))
    np.testing.assert_allclose(result.toarray(), loop, rtol=1e-5)
    again = niche_mean(row_normalise(sparse.csr_matrix(graph)), sparse.csr_matrix(expression))
    np.testing.assert_allclose(again.toarray(), loop, rtol=1e-5)


def test_row_normalise():
    graph = GRAPH.copy()
    graph[4] = 0
    given = sparse.csr_matrix(graph)
    result = row_normalise(given)
    assert result.format == "csr"
    assert result.dtype == np.float32
    np.testing.assert_allclose(library_size(result), [1, 1, 1, 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(given.toarray(), graph)


@pytest.mark.parametrize("weight", [-1, np.nan, np.inf])
def test_bad_weights(weight):
    graph = GRAPH.copy()
    graph[0, 1] = weight
    with pytest.raises(ValueError, match="weights"):
        row_normalise(graph)


def test_niche_mean_shapes():
    with pytest.raises(ValueError, match="over 5 spots, the expression over 3"):
        niche_mean(GRAPH, COUNTS)


def test_aggregate_sums_names_of_one_gene(as_format):
    match = match_names(["HN1", "nothing", "JPT1", "TP53"], ["TP53", "EGFR", "JPT1"])
    counts = np.array([[1, 9, 2, 4], [0, 9, 5, 0]], dtype=np.float32)
    result = aggregate(as_format(counts), match)
    assert result.format == "csr"
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result.toarray(), [[4, 0, 3], [0, 0, 5]])


def test_aggregate_shapes():
    with pytest.raises(ValueError, match="4 columns, but 1 names"):
        aggregate(COUNTS, match_names(["TP53"], ["TP53"]))
