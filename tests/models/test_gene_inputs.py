from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp

from stalign.models import _gene_inputs
from stalign.models._gene_inputs import GeneInputs
from stalign.models.encoders import build_gene_encoder

GENES = tuple(f"G{i}" for i in range(60))
SETS = {"first": GENES[:30], "second": GENES[25:]}


@pytest.fixture(scope="module")
def slide() -> tuple[sp.csr_matrix, sp.csr_matrix]:
    rng = np.random.default_rng(0)
    near = np.abs(np.subtract.outer(np.arange(90), np.arange(90))) <= 3
    rate = np.where((np.arange(90) < 45)[:, None] == (np.arange(60) < 30)[None], 4.0, 1.0)
    graph = sp.csr_matrix((near / near.sum(axis=1, keepdims=True)).astype(np.float32))
    return sp.csr_matrix(rng.poisson(rate).astype(np.float32)), graph


def profile():
    return build_gene_encoder("slide-profile", vocabulary=GENES, dim=16, hidden=8, n_components=3)


def pathways():
    return build_gene_encoder(
        "pathway-transformer", vocabulary=GENES, n_pathways=2, n_genes=None, gene_sets=SETS, layers=1, hidden=[8, 8]
    )


def made(spot, niche, slide, statistics, asked=None):
    """Inputs of a model of which nothing but the two gene encoders is there."""
    counts, graph = slide
    encoders = {"spot_gene": spot, "niche_gene": niche}

    def read(rows: np.ndarray) -> sp.csr_matrix:
        if asked is not None:
            asked.append(len(rows))
        return counts[rows]

    return GeneInputs(SimpleNamespace(encoder=encoders.__getitem__), read, graph, statistics)


def test_a_profile_is_that_of_the_whole_slide(slide, monkeypatch):
    monkeypatch.setattr(_gene_inputs, "_BLOCK", 40)
    encoder, asked = profile(), []
    statistics = encoder.fit(slide[0], connectivities=slide[1])
    inputs = made(encoder, encoder, slide, (statistics, statistics), asked)
    rows = np.array([70, 3, 44])
    spot, niche = inputs(rows)
    for level, found in (("spot", spot), ("niche", niche)):
        whole = encoder.preprocess(slide[0], connectivities=slide[1], statistics=statistics, level=level)
        np.testing.assert_allclose(found, whole[rows], atol=1e-5)
    assert asked == [40, 40, 10]
    inputs(np.arange(90))
    assert asked == [40, 40, 10]


def test_two_encoders_alike_reduce_a_block_once(slide, monkeypatch):
    encoder, calls = profile(), []
    statistics = encoder.fit(slide[0], connectivities=slide[1])
    reduce = encoder.reduce
    monkeypatch.setattr(encoder, "reduce", lambda *args, **kwargs: calls.append(1) or reduce(*args, **kwargs))
    made(encoder, encoder, slide, (statistics, statistics))(np.arange(5))
    assert len(calls) == 1


def test_statistics_of_their_own_are_kept_apart(slide):
    spot, niche = profile(), build_gene_encoder("slide-profile", vocabulary=GENES, dim=16, n_components=2)
    statistics = tuple(encoder.fit(slide[0], connectivities=slide[1]) for encoder in (spot, niche))
    found = made(spot, niche, slide, statistics)(np.arange(90))
    np.testing.assert_allclose(
        found[0], spot.preprocess(slide[0], connectivities=slide[1], statistics=statistics[0], level="spot"), atol=1e-5
    )
    np.testing.assert_allclose(
        found[1], niche.preprocess(slide[0], connectivities=slide[1], statistics=statistics[1]), atol=1e-5
    )


@pytest.mark.parametrize("rows", [np.array([80, 2, 41]), np.arange(90), np.array([5])])
def test_encoders_that_see_a_niche_read_no_more_than_that(slide, rows):
    encoder, asked = pathways(), []
    spot, niche = made(encoder, encoder, slide, (None, None), asked)(rows)
    np.testing.assert_allclose(spot, encoder.preprocess(slide[0])[rows], atol=1e-6)
    np.testing.assert_allclose(niche, encoder.preprocess(slide[0], connectivities=slide[1])[rows], atol=1e-5)
    assert max(asked) <= 7 * len(rows)


def test_kinds_of_encoders_go_together(slide):
    profiles, sets = profile(), pathways()
    statistics = profiles.fit(slide[0], connectivities=slide[1])
    spot, niche = made(sets, profiles, slide, (None, statistics))(np.array([7, 60]))
    np.testing.assert_allclose(spot, sets.preprocess(slide[0])[[7, 60]], atol=1e-6)
    whole = profiles.preprocess(slide[0], connectivities=slide[1], statistics=statistics)
    np.testing.assert_allclose(niche, whole[[7, 60]], atol=1e-5)


def test_encoders_without_the_three_steps_say_so():
    encoder = pathways()
    with pytest.raises(NotImplementedError, match="PathwayTransformer"):
        encoder.reduce(sp.csr_matrix((1, 60)), statistics=None)
