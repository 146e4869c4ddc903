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
