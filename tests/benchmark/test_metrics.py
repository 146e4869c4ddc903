from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn import metrics as sk

from stalign.benchmark import _metrics as metrics


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 400)
    found = np.where(rng.random(400) < 0.6, truth, rng.integers(0, 6, 400))
    return truth, found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (metrics.adjusted_rand, sk.adjusted_rand_score),
        (metrics.normalised_mutual_information, sk.normalized_mutual_info_score),
        (metrics.homogeneity, sk.homogeneity_score),
        (metrics.balanced_accuracy, sk.balanced_accuracy_score),
    ],
)
@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_measures_of_labels_are_those_of_scikit_learn(labels, ours, theirs):
    table = metrics.contingency(*labels)
    assert table.shape == (1, 5, 6)
    assert ours(table)[0] == pytest.approx(theirs(*labels), abs=1e-12)


def test_macro_f1_counts_other_answers_as_wrong(labels):
    truth, found = labels
    expected = sk.f1_score(truth, found, average="macro", labels=np.arange(5))
    assert metrics.macro_f1(metrics.contingency(truth, found))[0] == pytest.approx(expected)


def test_a_class_that_was_not_drawn_does_not_count():
    table = np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert metrics.macro_f1(table) == 1.0
    assert metrics.balanced_accuracy(table) == 1.0


def test_the_same_division_and_one_block():
    same = metrics.contingency(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    lump = metrics.contingency(np.array([0, 0, 1, 1]), np.zeros(4, dtype=int))
    for measure in (metrics.adjusted_rand, metrics.normalised_mutual_information, metrics.homogeneity):
        assert measure(same)[0] == pytest.approx(1.0)
        assert measure(lump)[0] == pytest.approx(0.0)
    assert metrics.adjusted_rand(lump[:, :1] * 2)[0] == 1.0  # both are one block


def test_tables_of_blocks_add_up(labels):
    blocks = np.random.default_rng(1).integers(0, 7, 400)
    tables = metrics.contingency(*labels, blocks)
    assert tables.shape == (7, 5, 6)
    np.testing.assert_array_equal(tables.sum(axis=0), metrics.contingency(*labels)[0])
    low, high = metrics.block_interval(metrics.adjusted_rand, tables)
    value = metrics.adjusted_rand(tables.sum(axis=0))
    assert low < value < high
    assert high - low < 0.25


def test_intervals_of_what_does_not_vary_have_no_width():
    assert metrics.mean_interval(np.full(50, 0.3)) == pytest.approx((0.3, 0.3))
    assert metrics.mean_block_interval(np.full(8, 2.0), np.repeat([0, 1], 4)) == pytest.approx((2.0, 2.0))


def test_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.mean_interval(values)
    width = 2 * 1.96 * values.std() / np.sqrt(400)
    assert high - low == pytest.approx(width, rel=0.15)


def test_missing_values_are_left_out_of_a_mean_over_blocks():
    values = np.array([1.0, np.nan, 1.0, 1.0])
    assert metrics.mean_block_interval(values, np.array([0, 0, 1, 1])) == pytest.approx((1.0, 1.0))


def test_blocks_are_squares_whatever_the_order():
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(50), np.arange(50)))
    xy = np.column_stack([x, y]).astype(float)
    blocks = metrics.spatial_blocks(xy, 25)
    assert 25 <= blocks.max() + 1 <= 36
    order = np.random.default_rng(0).permutation(len(xy))
    shuffled = metrics.spatial_blocks(xy[order], 25)
    np.testing.assert_array_equal(shuffled, blocks[order])
    assert np.ptp(x[blocks == 0]) == np.ptp(y[blocks == 0]) < 12


def test_spots_on_a_line_have_blocks_too():
    blocks = metrics.spatial_blocks(np.column_stack([np.arange(100.0), np.zeros(100)]), 25)
    assert 20 <= blocks.max() + 1 <= 26


@pytest.mark.parametrize(("counts", "expected"), [([75, 25], (6 / 14, 0.5)), ([10, 10, 10, 10], (0.1, 0.25))])
def test_guessing_bar(counts, expected):
    assert metrics.guessing_bar(counts) == pytest.approx(expected)


def test_guessing_bar_is_what_guessing_reaches():
    counts = np.array([6000, 3000, 1000])
    truth = np.repeat(np.arange(3), counts)
    rng = np.random.default_rng(0)
    drawn = rng.choice(3, size=len(truth), p=counts / counts.sum())
    majority, prior = metrics.guessing_bar(counts)
    assert metrics.macro_f1(metrics.contingency(truth, drawn))[0] == pytest.approx(prior, abs=0.01)
    lump = np.zeros((3, 3))
    lump[:, 0] = counts
    assert metrics.macro_f1(lump) == pytest.approx(majority)


# --- space -------------------------------------------------------------------------------------------------------


@pytest.fixture
def halves():
    """Two halves of a 10 × 10 grid."""
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(10.0), np.arange(10.0)))
    return (x >= 5).astype(int), np.column_stack([x, y])


def test_coherence_of_two_halves(halves):
    domains, xy = halves
    agreement = metrics.neighbour_agreement(domains, xy, k=4)
    assert agreement[0] == 1.0
    assert 0.9 < agreement.mean() < 1.0
    assert metrics.abnormal_spots(domains, xy).sum() == 0
    # Neighbours on the grid are one step apart, in units of the standard deviation.
    np.testing.assert_allclose(metrics.chaos(domains, xy), 1 / xy[:, 0].std())


def test_coherence_of_a_lone_spot(halves):
    _, xy = halves
    domains = np.zeros(100, dtype=int)
    domains[44] = 1
    assert metrics.abnormal_spots(domains, xy).sum() == 1
    assert metrics.neighbour_agreement(domains, xy)[44] == 0
    distance = metrics.chaos(domains, xy)
    assert np.isnan(distance[44])
    assert np.isfinite(np.delete(distance, 44)).all()


def test_neighbours_leave_the_spot_out_even_where_spots_coincide():
    xy = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [5.0, 0.0], [6.0, 0.0]])
    index = metrics.neighbours(xy, 2)
    assert index.shape == (5, 2)
    assert not (index == np.arange(5)[:, None]).any()
    mean = metrics.neighbour_mean(xy, 2)
    np.testing.assert_allclose(mean.sum(axis=1), 1)
    assert (mean.diagonal() > 0).all()


# --- genes and pairs ---------------------------------------------------------------------------------------------


def test_pearson_is_that_of_scipy_and_zero_for_a_constant():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(60, 3))
    predicted = measured + rng.normal(size=(60, 3))
    predicted[:, 2] = 4.0
    expected = [pearsonr(predicted[:, j], measured[:, j]).statistic for j in (0, 1)]
    np.testing.assert_allclose(metrics.pearson(predicted, measured), [*expected, 0.0])
    np.testing.assert_allclose(metrics.mean_squared_errors(measured + 2, measured), 4.0)


def test_ranks_of_pairs():
    eye = np.eye(5)
    np.testing.assert_array_equal(metrics.pair_ranks(eye, eye), 0)
    np.testing.assert_array_equal(metrics.pair_ranks(eye, -eye), 4)
    # All the same: the middle of five ranks, so that nothing is found by chance.
    np.testing.assert_array_equal(metrics.pair_ranks(np.ones((5, 2)), np.ones((5, 2))), 2)


def test_ranks_do_not_depend_on_blocks_of_rows():
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(1500, 4)), rng.normal(size=(1500, 4))
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (queries, keys)]
    similarity = unit[0] @ unit[1].T
    expected = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
    np.testing.assert_array_equal(metrics.pair_ranks(queries, keys), expected)
