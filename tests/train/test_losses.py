from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from stalign.train.losses import info_nce, masked_info_nce, negative_mask, structure_loss


@pytest.mark.reference
def test_equals_published_loss(shared):
    folder = shared / "reference" / "stalign_official"
    features = {key: torch.from_numpy(value) for key, value in np.load(folder / "loss_features.npz").items()}
    expected = json.loads((folder / "loss_expected.json").read_text())
    spot = info_nce(features["spot_image"], features["spot_gene"], features["spot_gene_neg"])
    niche = info_nce(features["niche_image"], features["niche_gene"], features["niche_gene_neg"])
    cross = info_nce(features["spot_fused"], features["niche_fused"], features["niche_fused_neg"])
    assert float(spot) == pytest.approx(expected["spot"], abs=1e-6)
    assert float(niche) == pytest.approx(expected["niche"], abs=1e-6)
    assert float(cross) == pytest.approx(expected["cross"], abs=1e-6)
    assert float(0.3 * spot + 0.3 * niche + 0.4 * cross) == pytest.approx(expected["total"], abs=1e-6)


def test_equal_vectors_give_chance_level():
    ones = torch.ones(4, 8)
    assert float(info_nce(ones, ones, torch.ones(4, 5, 8))) == pytest.approx(math.log(6))
    assert float(info_nce(ones, ones)) == pytest.approx(math.log(4))


def test_length_of_vectors_is_irrelevant():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 5, generator=generator)
    assert float(info_nce(query, key)) == pytest.approx(float(info_nce(3 * query, 0.1 * key)), abs=1e-6)


@pytest.mark.parametrize(
    ("query", "key", "negatives"),
    [
        ((3, 4), (3, 5), None),
        ((3, 4), (2, 4), None),
        ((3, 4, 1), (3, 4, 1), None),
        ((3, 4), (3, 4), (3, 4)),
        ((3, 4), (3, 4), (2, 5, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(query, key, negatives):
    with pytest.raises(ValueError, match="must be"):
        info_nce(torch.ones(query), torch.ones(key), None if negatives is None else torch.ones(negatives))


def test_masked_loss_equals_gathered_negatives():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 9, 7, generator=generator)
    clusters = torch.arange(9) % 3
    mask = negative_mask(clusters, "paper", generator=generator)
    gathered = torch.stack([key[row] for row in mask])
    assert gathered.shape == (9, 2, 7)
    assert float(masked_info_nce(query, key, mask)) == pytest.approx(float(info_nce(query, key, gathered)), abs=1e-6)


def test_paper_negatives_are_one_of_each_other_cluster():
    clusters = torch.tensor([0, 0, 1, 1, 2, 2, 2, 5])
    mask = negative_mask(clusters, "paper", generator=torch.Generator().manual_seed(0))
    for row, own in zip(mask, clusters, strict=True):
        assert sorted(clusters[row].tolist()) == [c for c in (0, 1, 2, 5) if c != int(own)]


def test_masked_negatives_are_all_of_other_clusters():
    clusters = torch.tensor([0, 0, 1])
    assert negative_mask(clusters, "masked").tolist() == [
        [False, False, True],
        [False, False, True],
        [True, True, False],
    ]
    assert negative_mask(clusters, "in_batch").sum() == 6


def test_unknown_negatives_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'masked'"):
        negative_mask(torch.zeros(3), "maskd")


def test_structure_loss_is_zero_for_a_rotation():
    generator = torch.Generator().manual_seed(0)
    profile = torch.randn(10, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert float(structure_loss(profile @ rotation, profile)) == pytest.approx(0.0, abs=1e-10)
    assert float(structure_loss(nn.functional.relu(profile), profile)) > 0.01


def test_structure_loss_with_lengths_sees_a_change_of_scale():
    profile = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    same = profile / 6**0.5
    assert float(structure_loss(same, profile, unit=False)) == pytest.approx(0.0, abs=1e-10)
    assert float(structure_loss(2 * same, profile, unit=False)) > 0.1
    assert float(structure_loss(2 * same, profile)) == pytest.approx(0.0, abs=1e-10)


# -- several slides, several processes ---------------------------------------------------------------------------------


def test_negatives_are_of_the_same_slide():
    clusters = torch.tensor([0, 1, 0, 1, 2])
    slides = torch.tensor([0, 0, 1, 1, 1])
    masked = negative_mask(clusters, "masked", slides=slides)
    assert masked.nonzero().tolist() == [[0, 1], [1, 0], [2, 3], [2, 4], [3, 2], [3, 4], [4, 2], [4, 3]]
    assert torch.equal(negative_mask(clusters, "paper", slides=slides), masked)  # one spot a cluster and slide
    assert negative_mask(clusters, "in_batch", slides=slides).sum() == 20


def test_paper_negatives_of_several_slides_are_one_of_each_other_cluster():
    clusters, slides = torch.arange(24) % 3, torch.arange(24) // 12
    mask = negative_mask(clusters, "paper", slides=slides, generator=torch.Generator().manual_seed(0))
    for row, (own, slide) in enumerate(zip(clusters, slides, strict=True)):
        assert sorted(clusters[mask[row]].tolist()) == [c for c in range(3) if c != int(own)]
        assert (slides[mask[row]] == slide).all()


def test_one_slide_draws_the_same_as_no_slide():
    clusters = torch.arange(12) % 3
    masks = [
        negative_mask(clusters, "paper", slides=slides, generator=torch.Generator().manual_seed(3))
        for slides in (None, torch.full((12,), 5))
    ]
    assert torch.equal(*masks)


def test_parts_of_a_batch_average_to_the_whole():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 8, 5, generator=generator)
    mask = negative_mask(torch.arange(8) % 3, "masked")
    whole = masked_info_nce(query, key, mask)
    parts = [
        masked_info_nce(query[rows], key, mask[rows], positive=torch.arange(8)[rows])
        for rows in (slice(0, None, 2), slice(1, None, 2))
    ]
    assert float(torch.stack(parts).mean()) == pytest.approx(float(whole), abs=1e-6)
    # The positive is no negative of its own, and without naming it these parts are something else.
    assert float(masked_info_nce(query[1::2], key[1::2], mask[1::2, 1::2])) != pytest.approx(float(parts[1]))


def test_mask_must_fit():
    with pytest.raises(ValueError, match=r"mask must be \(n, m\) = \(3, 4\)"):
        masked_info_nce(torch.ones(3, 2), torch.ones(4, 2), torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.parametrize("unit", [True, False])
def test_structure_of_parts_averages_to_the_whole(unit):
    generator = torch.Generator().manual_seed(2)
    embedding, profile = torch.randn(6, 4, generator=generator), torch.randn(6, 9, generator=generator)
    whole = structure_loss(embedding, profile, unit=unit)
    parts = [
        structure_loss(embedding[rows], profile[rows], unit=unit, against=(embedding, profile))
        for rows in (slice(0, None, 2), slice(1, None, 2))
    ]
    assert float(torch.stack(parts).mean()) == pytest.approx(float(whole), rel=1e-5)


def test_structure_counts_marked_pairs_only():
    generator = torch.Generator().manual_seed(2)
    embedding, profile = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    slides = torch.tensor([0, 0, 0, 1, 1, 1])
    mask = slides[:, None] == slides[None, :]
    by_slide = [structure_loss(embedding[slides == s], profile[slides == s]) for s in (0, 1)]
    assert float(structure_loss(embedding, profile, mask=mask)) == pytest.approx(float(sum(by_slide)) / 2, rel=1e-5)
