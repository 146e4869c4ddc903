from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from stalign.genes import normalise_log1p
from stalign.models.encoders import build_gene_encoder
from stalign.models.encoders._kernels import learn_weights, smooth
from stalign.models.encoders._slide_profile import STEPS, _cut, _moments, autocorrelation, gene_table

GENES = tuple(f"G{i}" for i in range(200))


def strip(n: int = 120, reach: int = 4, seed: int = 0) -> tuple[sp.csr_matrix, sp.csr_matrix, np.ndarray]:
    """A strip of spots in three layers; 20 genes a layer are up there, the other 140 are noise."""
    rng = np.random.default_rng(seed)
    layer = np.arange(n) * 3 // n
    rate = np.full((n, len(GENES)), 1.0)
    for number in range(3):
        rate[np.ix_(layer == number, range(20 * number, 20 * number + 20))] = 4.0
    near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= reach
    graph = sp.csr_matrix(near / near.sum(axis=1, keepdims=True))
    return sp.csr_matrix(rng.poisson(rate).astype(np.float32)), graph, layer


@pytest.fixture(scope="module")
def encoder():
    return build_gene_encoder("slide-profile", vocabulary=GENES, dim=64, hidden=16, n_components=4)


def test_niche_profiles_tell_the_layers_apart(encoder):
    counts, graph, layer = strip()
    profile = encoder.preprocess(counts, connectivities=graph)
    assert profile.shape == (120, 64)
    assert profile.dtype == np.float32
    unit = profile / np.linalg.norm(profile, axis=1, keepdims=True)
    inner = (np.arange(120) % 40 > 5) & (np.arange(120) % 40 < 34)
    similarity = (unit @ unit.T)[np.ix_(inner, inner)]
    same = np.equal.outer(layer[inner], layer[inner])
    assert similarity[same].min() > similarity[~same].max()


def test_weights_prefer_genes_that_vary_over_tissue(encoder):
    counts, graph, _ = strip()
    slide = encoder.fit(counts, connectivities=graph)[0]
    strength = np.linalg.norm(slide.gene_map, axis=1)
    spatial = slide.genes < 60
    assert spatial.sum() == 60
    # Of the 140 others, chance puts half on the spatial side.
    assert 50 < (~spatial).sum() < 90
    assert strength[spatial].mean() > 2 * strength[~spatial].mean()


def test_genes_may_have_to_be_clear_of_chance():
    counts, graph, _ = strip()
    made = build_gene_encoder("slide-profile", vocabulary=GENES, dim=64, n_components=4, min_z=1.5)
    genes = made.fit(counts, connectivities=graph)[0].genes
    assert (genes < 60).sum() == 60
    # One in seven of the 140 others passes by chance at one and a half standard errors, at most.
    assert (genes >= 60).sum() < 20


@pytest.mark.parametrize("min_z", [-1.0, np.nan, True])
def test_bad_standard_errors_are_refused(min_z):
    with pytest.raises(ValueError, match="min_z"):
        build_gene_encoder("slide-profile", vocabulary=GENES, min_z=min_z)


def test_power_says_how_much_the_genes_that_stand_out_rule():
    counts, graph, _ = strip()
    shares = []
    for power in (0.25, 1.0, 2.0):
        made = build_gene_encoder("slide-profile", vocabulary=GENES, dim=64, n_components=4, power=power)
        strength = np.linalg.norm(made.fit(counts, connectivities=graph)[0].gene_map, axis=1)
        shares.append(np.sort(strength)[-10:].sum() / strength.sum())
    assert shares[0] < shares[1] < shares[2]


def test_profiles_are_centred_and_of_unit_scale(encoder):
    counts, graph, _ = strip()
    profile = encoder.preprocess(counts, connectivities=graph)
    np.testing.assert_allclose(profile.mean(axis=0), 0, atol=1e-3)
    assert np.linalg.norm(profile, axis=1).mean() == pytest.approx(np.sqrt(64), rel=1e-4)


def dense_profile(counts, graph, level, *, min_z, n_components=4, dim=64):
    """The formula written out, given the weights of the steps; no gene is left out by `n_genes` here."""
    dense = normalise_log1p(counts).toarray().astype(np.float64)
    dense = np.minimum(dense, dense.mean(axis=0) + 10 * dense.std(axis=0))
    off = graph.toarray() - np.diag(graph.diagonal())
    z = (dense - dense.mean(axis=0)) / dense.std(axis=0)
    moran = (z * (off @ z)).sum(axis=0) / off.sum()
    weight = np.maximum(moran - min_z * np.sqrt(((off + off.T) ** 2).sum() / 2) / off.sum(), 0) ** 0.25
    encoder = build_gene_encoder("slide-profile", vocabulary=GENES, dim=dim, n_components=n_components, min_z=min_z)
    slide = encoder.fit(counts, connectivities=graph)[0]
    walks = [np.linalg.matrix_power(graph.toarray(), step) for step in STEPS]

    def kernel(weights):
        return sum(w * walk for w, walk in zip(weights / weights.sum(), walks, strict=True))

    scaled = z * weight
    smooth_z = kernel(slide.niche_weights) @ scaled
    components = np.linalg.svd(smooth_z - smooth_z.mean(axis=0), full_matrices=False)[2][:n_components]
    left, _, right = np.linalg.svd(components @ gene_table(200, dim, 0), full_matrices=False)
    spread = kernel(slide.spot_weights if level == "spot" else slide.niche_weights) @ scaled @ components.T
    profile = (spread - spread.mean(axis=0)) @ left @ right
    return profile * np.sqrt(dim) / np.linalg.norm(profile, axis=1).mean()


@pytest.mark.parametrize("min_z", [0.0, 1.5])
@pytest.mark.parametrize("level", ["spot", "niche"])
def test_equals_the_formula_written_out_densely(level, min_z):
    # Two components: beyond those of the three layers there is only noise, which has no leading direction.
    encoder = build_gene_encoder("slide-profile", vocabulary=GENES, dim=64, n_components=2, min_z=min_z)
    counts, graph, _ = strip(seed=2)
    expected = dense_profile(counts, graph, level, min_z=min_z, n_components=2)
    found = encoder.preprocess(counts, connectivities=graph, level=level)
    np.testing.assert_allclose(found, expected, atol=2e-2)


def test_distances_are_those_of_the_leading_components(encoder):
    counts, graph, _ = strip(seed=5)
    statistics = encoder.fit(counts, connectivities=graph)
    scores = encoder.reduce(counts, statistics=statistics)
    spread = encoder.spread(scores, connectivities=graph, statistics=statistics, level="niche")
    profile = encoder.preprocess(counts, connectivities=graph, statistics=statistics)
    assert scores.shape == spread.shape == (120, 4)
    expected = np.linalg.norm(spread[0] - spread[50])
    assert np.linalg.norm(profile[0] - profile[50]) == pytest.approx(expected, rel=1e-4)


def test_deep_counts_are_averaged_less_than_shallow_ones(encoder):
    rng = np.random.default_rng(0)
    _, graph, layer = strip(n=600, seed=1)
    # Structure finer than a niche: every other spot is of the other kind.
    rate = np.where((np.arange(600) % 2 == 0)[:, None] == (np.arange(200) < 100)[None], 3.0, 1.0)
    rate *= np.where((layer == 1)[:, None] & (np.arange(200) % 2 == 0)[None], 3.0, 1.0)
    own = [
        encoder.fit(sp.csr_matrix(rng.poisson(depth * rate).astype(np.float32)), connectivities=graph)[0].spot_weights
        for depth in (20.0, 0.1)
    ]
    deep, shallow = (weights[0] / weights.sum() for weights in own)
    assert deep > shallow + 0.2


def test_genes_are_limited_to_the_most_spatial(encoder):
    counts, graph, _ = strip()
    few = build_gene_encoder("slide-profile", vocabulary=GENES, dim=64, n_components=4, n_genes=30)
    slide = few.fit(counts, connectivities=graph)[0]
    assert len(slide.genes) == 30
    assert (slide.genes < 60).all()


def test_order_of_spots_is_irrelevant(encoder):
    counts, graph, _ = strip()
    order = np.random.default_rng(1).permutation(120)
    whole = encoder.preprocess(counts, connectivities=graph)
    shuffled = encoder.preprocess(counts[order], connectivities=graph[order][:, order])
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-4)


def test_libraries_do_not_touch_each_other(encoder):
    first, second = strip(seed=3), strip(n=90, seed=4)
    counts = sp.vstack([first[0], second[0]]).tocsr()
    graph = sp.block_diag([first[1], second[1]]).tocsr()
    both = encoder.preprocess(counts, connectivities=graph, library=np.repeat([0, 1], [120, 90]))
    np.testing.assert_allclose(both[:120], encoder.preprocess(first[0], connectivities=first[1]), atol=1e-4)
    np.testing.assert_allclose(both[120:], encoder.preprocess(second[0], connectivities=second[1]), atol=1e-4)


def test_statistics_are_reused(encoder):
    counts, graph, _ = strip()
    statistics = encoder.fit(counts, connectivities=graph)
    again = encoder.preprocess(counts, connectivities=graph, statistics=statistics)
    np.testing.assert_array_equal(again, encoder.preprocess(counts, connectivities=graph))


def test_prompt_points_to_spots_that_express_the_genes(encoder):
    counts, graph, layer = strip()
    profile = encoder.preprocess(counts, connectivities=graph)
    for number in range(3):
        prompt = encoder.prompt(np.arange(20 * number, 20 * number + 20))
        assert prompt.shape == (64,)
        similarity = profile @ prompt
        assert similarity[layer == number].mean() > similarity[layer != number].mean() + 1


@pytest.mark.parametrize("n_spots", [1, 2, 5])
def test_tiny_slides_give_finite_profiles(encoder, n_spots):
    counts, graph, _ = strip(n=n_spots, reach=1)
    assert np.isfinite(encoder.preprocess(counts, connectivities=graph)).all()
    assert np.isfinite(encoder.preprocess(counts)).all()


def test_empty_spots_give_finite_profiles(encoder):
    counts, graph, _ = strip()
    empty = sp.csr_matrix(counts.shape, dtype=np.float32)
    assert np.isfinite(encoder.preprocess(empty, connectivities=graph)).all()
    counts[7] = 0
    assert np.isfinite(encoder.preprocess(counts, connectivities=graph)).all()


def test_statistics_of_a_sample_stand_for_the_slide():
    counts, graph, _ = strip(n=600)
    whole = build_gene_encoder("slide-profile", vocabulary=GENES, dim=64, n_components=2)
    sampled = build_gene_encoder("slide-profile", vocabulary=GENES, dim=64, n_components=2, max_fit=300)
    a, b = (e.preprocess(counts, connectivities=graph) for e in (whole, sampled))
    correlation = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.median(correlation) > 0.95


def test_statistics_of_a_sample_do_not_depend_on_the_order_of_rows():
    counts, graph, _ = strip(n=600)
    # Spots of one total are told apart by nothing but their rows.
    more = sp.csr_matrix((np.arange(600.0), (np.arange(600), np.arange(600) % 200)), shape=counts.shape)
    counts = sp.csr_matrix(counts * 1000 + more, dtype=np.float32)
    order = np.random.default_rng(0).permutation(600)
    sampled = build_gene_encoder("slide-profile", vocabulary=GENES, dim=64, n_components=2, max_fit=300)
    whole = sampled.preprocess(counts, connectivities=graph)
    shuffled = sampled.preprocess(counts[order], connectivities=graph[order][:, order])
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-3)


def test_spots_are_reduced_each_by_itself(encoder):
    counts, graph, _ = strip(seed=6)
    statistics = encoder.fit(counts, connectivities=graph)
    rows = np.array([17, 3, 60])
    whole = encoder.reduce(counts, statistics=statistics)
    np.testing.assert_allclose(encoder.reduce(counts[rows], statistics=statistics), whole[rows], atol=1e-5)
    part = encoder.expand(whole[rows], statistics=statistics)
    np.testing.assert_allclose(part, encoder.expand(whole, statistics=statistics)[rows], atol=1e-5)


@pytest.mark.parametrize("dense_above", [0.0, 0.5, 1.0])
def test_autocorrelation_is_morans_index(monkeypatch, dense_above):
    from stalign.models.encoders import _slide_profile

    monkeypatch.setattr(_slide_profile, "_DENSE", dense_above)
    monkeypatch.setattr(_slide_profile, "_BLOCK", 2000)
    counts, graph, _ = strip(seed=8)
    counts.data[np.random.default_rng(0).random(counts.nnz) < 0.5] = 0
    counts.eliminate_zeros()
    expression = normalise_log1p(counts)
    dense = expression.toarray().astype(np.float64)
    off = graph.toarray() - np.diag(graph.diagonal())
    z = (dense - dense.mean(axis=0)) / dense.std(axis=0)
    found, error = autocorrelation(graph.astype(np.float32), expression)
    np.testing.assert_allclose(found, (z * (off @ z)).sum(axis=0) / off.sum(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(error, np.sqrt(((off + off.T) ** 2).sum() / 2) / off.sum(), rtol=1e-5)
    _, sd = _moments(expression)
    np.testing.assert_allclose(sd, dense.std(axis=0), rtol=1e-4)


def test_autocorrelation_without_neighbours_is_zero():
    counts, _, _ = strip()
    found, error = autocorrelation(sp.identity(120, format="csr", dtype=np.float32), normalise_log1p(counts))
    assert not found.any()
    assert not error.any()


def test_standard_error_covers_genes_that_are_not_spatial():
    _, graph, _ = strip(n=600)
    noise = sp.csr_matrix(np.random.default_rng(0).poisson(2.0, (600, 200)).astype(np.float32))
    found, error = autocorrelation(graph.astype(np.float32), normalise_log1p(noise))
    # Two standard errors leave about one in 44 on each side.
    assert 0 < (found > 2 * error).mean() < 0.05


def test_cut_leaves_the_input_alone():
    values = sp.csr_matrix(np.array([[1.0, 9.0], [0.0, 3.0]]))
    assert _cut(values, np.array([5.0, 4.0])).toarray().tolist() == [[1, 4], [0, 3]]
    assert values.toarray().tolist() == [[1, 9], [0, 3]]


def test_directions_of_genes_are_fixed_and_nearly_orthogonal():
    table = gene_table(300, 256, 0)
    assert np.abs(np.linalg.norm(table, axis=1) - 1).max() < 0.25
    np.testing.assert_allclose(table[0, :3], gene_table(300, 256, 0)[0, :3])
    # The first numbers of the legacy generator with seed 0, which NumPy keeps for good.
    np.testing.assert_allclose(table[0, :2] * 16, [1.7640524, 0.4001572], rtol=1e-5)


def test_forward_is_residual(encoder):
    values = torch.randn(3, 64)
    encoder.eval()
    torch.nn.init.zeros_(encoder.adapter[-1].weight)
    torch.nn.init.zeros_(encoder.adapter[-1].bias)
    assert torch.equal(encoder(values), values)


def test_smoothing_is_a_weighted_sum_of_walks():
    _, graph, _ = strip()
    values = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    dense = graph.toarray()
    expected = 0.5 * values + 0.25 * np.linalg.matrix_power(dense, 4) @ values
    found = smooth(graph.astype(np.float32), values, STEPS, [0.5, 0, 0, 0.25, 0])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32
    assert not smooth(graph, values, STEPS, [0.0] * 5).any()


def test_learned_weights_find_the_kernel():
    _, graph, _ = strip()
    values = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
    target = smooth(graph.astype(np.float32), values, STEPS, [0.3, 0, 0.7, 0, 0])
    found = learn_weights(graph.astype(np.float32), values, 5 * target, STEPS)
    np.testing.assert_allclose(found, [0.3, 0, 0.7, 0, 0], atol=1e-2)


def test_weights_of_an_unpredictable_target_stay_at_the_shortest_step():
    _, graph, _ = strip()
    values = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
    np.testing.assert_allclose(learn_weights(graph.astype(np.float32), values, -values, STEPS), [1, 0, 0, 0, 0])
    np.testing.assert_allclose(learn_weights(graph.astype(np.float32), 0 * values, values, STEPS), [1, 0, 0, 0, 0])
