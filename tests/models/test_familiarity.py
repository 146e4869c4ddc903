from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from stalign.models._config import FamiliarityConfig
from stalign.models._familiarity import (
    MIN_GENES,
    Familiarity,
    SectionSample,
    fit_familiarity,
    joined_tail,
    neighbour_sum,
    tail,
)

N_GENES = 300


def tissue(seed: int, n_genes: int = N_GENES) -> np.ndarray:
    """Mean expression of a kind of tissue: genes over three orders of magnitude."""
    rate = np.random.default_rng(seed).lognormal(0, 1.8, n_genes)
    return rate / rate.sum()


def section(rate: np.ndarray, patient: str, *, seed: int, n: int = 120, image: bool = True) -> SectionSample:
    rng = np.random.default_rng(seed)
    own = rate * rng.lognormal(0, 0.2, len(rate))  # a patient of their own
    spots = rng.poisson(4000 * own / own.sum() * rng.lognormal(0, 0.3, (n, len(rate)))).astype(np.float32)
    spots = sparse.csr_matrix(spots)
    ring = sparse.csr_matrix(sum(np.roll(np.eye(n, dtype=np.float32), k, axis=1) for k in range(-3, 4)))
    noise = rng.normal(0, 15, (n, 8, 8, 1))
    colour = np.array([185, 115, 165]) + rng.normal(0, 8, 3)
    patches = (colour + noise).clip(0, 255).astype(np.uint8) if image else None
    return SectionSample(patient, spots, neighbour_sum(ring, spots), np.asarray(spots.sum(axis=0)).ravel() > 0, patches)


@pytest.fixture(scope="module")
def training() -> list[SectionSample]:
    return [section(tissue(0), name, seed=number) for number, name in enumerate("abcd")]


@pytest.fixture(scope="module")
def familiarity(training) -> Familiarity:
    found = fit_familiarity(training)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def unseen() -> SectionSample:
    return section(tissue(0), "new", seed=99)


def genes_of(familiarity: Familiarity, sample: SectionSample) -> np.ndarray:
    return familiarity.gene_distance(sample.spot, sample.niche, sample.measured)


def test_another_patient_is_near_and_another_tissue_is_far(familiarity, unseen):
    near, far = genes_of(familiarity, unseen), genes_of(familiarity, section(tissue(1), "x", seed=5))
    assert np.median(near) < 2.5
    assert far.min() > near.max()


def test_shuffled_genes_are_far(familiarity, unseen):
    order = np.random.default_rng(0).permutation(N_GENES)
    shuffled = unseen._replace(
        spot=unseen.spot[:, order], niche=unseen.niche[:, order], measured=unseen.measured[order]
    )
    assert genes_of(familiarity, shuffled).min() > genes_of(familiarity, unseen).max()


def test_an_inverted_image_is_far(familiarity, unseen):
    real, inverted = (familiarity.image_distance(patches) for patches in (unseen.patches, 255 - unseen.patches))
    assert inverted.min() > real.max()


def test_a_panel_of_genes_is_enough(familiarity, unseen):
    panel = np.zeros(N_GENES, dtype=bool)
    panel[np.random.default_rng(3).permutation(N_GENES)[:120]] = True

    def on_panel(sample):
        keep = sparse.diags(panel.astype(np.float32)).tocsr()
        return sample._replace(spot=(sample.spot @ keep).tocsr(), niche=(sample.niche @ keep).tocsr(), measured=panel)

    near, far = (genes_of(familiarity, on_panel(s)) for s in (unseen, section(tissue(1), "x", seed=5)))
    assert far.min() > np.median(near)
    assert (far > near.max()).mean() > 0.9


def test_distances_depend_on_the_spot_alone(familiarity, unseen):
    whole = genes_of(familiarity, unseen)
    order = np.random.default_rng(0).permutation(120)
    some = unseen._replace(spot=unseen.spot[order[:7]], niche=unseen.niche[order[:7]])
    np.testing.assert_allclose(genes_of(familiarity, some), whole[order[:7]], rtol=1e-6)


def test_type_of_the_counts_plays_no_part(familiarity, unseen):
    as_int = unseen._replace(spot=unseen.spot.astype(np.int64), niche=unseen.niche.astype(np.float64))
    np.testing.assert_allclose(genes_of(familiarity, as_int), genes_of(familiarity, unseen), rtol=1e-6)


def test_scale_is_that_of_held_out_spots(training, familiarity):
    values = np.concatenate([genes_of(familiarity, sample) for sample in training])
    # Seen spots are nearer than held-out ones, whose mean is 0 and standard deviation 1.
    assert -3 < values.mean() < 0.5
    assert familiarity.gene_scale[:, 1].min() > 0


def test_an_empty_spot_has_no_distance(familiarity, unseen):
    empty = unseen.spot.copy()
    empty.data[: empty.indptr[1]] = 0
    values = familiarity.gene_distance(empty, unseen.niche, unseen.measured)
    assert np.isnan(values[0])
    assert not np.isnan(values[1:]).any()


def test_too_few_shared_genes(familiarity, unseen):
    few = np.zeros(N_GENES, dtype=bool)
    few[: MIN_GENES // 2] = True
    with pytest.raises(ValueError, match=f"shares {MIN_GENES // 2} of the"):
        familiarity.gene_distance(unseen.spot, unseen.niche, few)


@pytest.mark.parametrize("n", [1, 2])
def test_few_sections_of_one_patient(n):
    found = fit_familiarity([section(tissue(0), "a", seed=number) for number in range(n)])
    near, far = (genes_of(found, section(tissue(kind), "x", seed=5)) for kind in (0, 1))
    assert np.isfinite(near).all()
    assert far.min() > np.median(near)


def test_one_side_alone(training):
    no_image = fit_familiarity([sample._replace(patches=None) for sample in training])
    assert no_image.knows_genes
    assert not no_image.knows_images
    no_genes = fit_familiarity([SectionSample(s.patient, None, None, None, s.patches) for s in training])
    assert no_genes.knows_images
    assert not no_genes.knows_genes
    assert fit_familiarity([SectionSample("a", None, None, None, None)]) is None


def test_half_precision_changes_next_to_nothing(familiarity, unseen):
    half = Familiarity(familiarity.config)
    half.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in familiarity.state_dict().items()}
    )
    np.testing.assert_allclose(genes_of(half, unseen), genes_of(familiarity, unseen), atol=0.05)
    np.testing.assert_allclose(
        half.image_distance(unseen.patches), familiarity.image_distance(unseen.patches), atol=0.1
    )


def test_fit_is_the_same_each_time(training, familiarity):
    again = fit_familiarity(training)
    for name, value in familiarity.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_tails():
    np.testing.assert_allclose(tail(np.array([-40.0, 0.0, 1.2816, 3.0902])), [0, np.log10(2), 1, 3], atol=1e-3)
    assert np.isfinite(tail(np.array([1e3]))).all()
    # Fisher's method of p = 0.01 and 0.1: P(chi² with 4 degrees > -2 ln 0.001) = 0.00791.
    np.testing.assert_allclose(joined_tail([np.array([2.0]), np.array([1.0])]), -np.log10(0.00791), atol=1e-3)
    np.testing.assert_array_equal(joined_tail([np.array([np.nan, np.nan]), np.array([1.5, np.nan])]), [1.5, np.nan])


def test_sum_of_niches_ignores_weights():
    graph = sparse.csr_matrix(np.array([[0.5, 0.5, 0], [0, 1.0, 0]], dtype=np.float32))
    counts = sparse.csr_matrix(np.array([[1.0, 2], [3, 4], [5, 6]]))
    np.testing.assert_array_equal(neighbour_sum(graph, counts).toarray(), [[4, 6], [3, 4]])


@pytest.mark.parametrize(
    ("values", "what"), [({"n_genes": -1}, "n_genes"), ({"n_genes": 5, "n_components": 0}, "n_comp")]
)
def test_bad_configs(values, what):
    with pytest.raises(ValueError, match=what):
        FamiliarityConfig(**values)
