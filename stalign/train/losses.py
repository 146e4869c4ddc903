"""Losses of the three alignments, with negatives from other clusters of the same slide."""

from __future__ import annotations

import torch
from torch import nn

from stalign._validate import check_choice

NEGATIVES = ("paper", "masked", "in_batch")
# A logit that takes no part in a softmax, in any float type.
_OFF = -1e4


def info_nce(
    query: torch.Tensor,
    key: torch.Tensor,
    negatives: torch.Tensor | None = None,
    *,
    temperature: float = 0.1,
) -> torch.Tensor:
    """InfoNCE of paired embeddings (van den Oord et al. 2018, arXiv 1807.03748).

    Parameters
    ----------
    query, key
        (n, d); row i of ``key`` is the positive of row i of ``query``. Scaled to unit norm here.
    negatives
        (n, k, d), the k negatives of each query. ``None``: the other rows of ``key``.
    temperature
        Divides the cosine similarities.

    Returns
    -------
    Scalar: the mean cross-entropy of the positive among positive and negatives.

    Raises
    ------
    ValueError
        If the shapes do not fit each other.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(3)
    >>> float(info_nce(x, x)) < 1e-3
    True
    """
    if query.ndim != 2 or query.shape != key.shape:
        raise ValueError(
            f"query and key must be (n, d) of equal shape, got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    query, key = nn.functional.normalize(query, dim=-1), nn.functional.normalize(key, dim=-1)
    if negatives is None:
        logits = query @ key.T
        target = torch.arange(len(query), device=query.device)
    else:
        if negatives.ndim != 3 or negatives.shape[0] != len(query) or negatives.shape[2] != query.shape[1]:
            raise ValueError(
                f"negatives must be (n, k, d) = ({len(query)}, k, {query.shape[1]}), got {tuple(negatives.shape)}."
            )
        positive = (query * key).sum(dim=-1, keepdim=True)
        logits = torch.cat(
            [positive, torch.einsum("nd,nkd->nk", query, nn.functional.normalize(negatives, dim=-1))], dim=1
        )
        target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return nn.functional.cross_entropy(logits / temperature, target)


def negative_mask(
    clusters: torch.Tensor, mode: str = "masked", *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Say which spots of a batch from one slide are negatives of which.

    Parameters
    ----------
    clusters
        (n,) expression cluster of each spot.
    mode
        ``"paper"``: exactly one random spot from each other cluster, as in arXiv 2411.16793; ``"masked"``: every spot
        of every other cluster; ``"in_batch"``: every other spot.
    generator
        Source of the random choice of ``"paper"``.

    Returns
    -------
    (n, n) bool; row i marks the negatives of spot i. The diagonal is False.
    """
    check_choice("negatives", mode, NEGATIVES)
    n = len(clusters)
    if mode == "in_batch":
        return ~torch.eye(n, dtype=torch.bool, device=clusters.device)
    other = clusters[:, None] != clusters[None, :]
    if mode == "masked":
        return other
    chosen = torch.zeros_like(other)
    rows = torch.arange(n, device=clusters.device)
    for cluster in clusters.unique():
        members = torch.nonzero(clusters == cluster).flatten()
        # Drawn on the CPU, so that a seed gives the same negatives on every device.
        pick = torch.randint(len(members), (n,), generator=generator).to(members.device)
        chosen[rows, members[pick]] = True
    return chosen & other


def masked_info_nce(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, *, temperature: float = 0.1
) -> torch.Tensor:
    """InfoNCE whose negatives are the rows of ``key`` that ``mask`` (n, n) marks.

    Equal to :func:`info_nce` with those rows gathered into ``negatives``, without a second forward pass for them.
    """
    logits = nn.functional.normalize(query, dim=-1) @ nn.functional.normalize(key, dim=-1).T / temperature
    keep = mask | torch.eye(len(mask), dtype=torch.bool, device=mask.device)
    return nn.functional.cross_entropy(logits.masked_fill(~keep, _OFF), torch.arange(len(logits), device=logits.device))


def structure_loss(embedding: torch.Tensor, profile: torch.Tensor, *, unit: bool = True) -> torch.Tensor:
    """Mean squared difference of the similarities within a batch, before and after the network.

    It asks the embedding to keep the geometry of the smoothed expression profiles (similarity distillation).

    Parameters
    ----------
    embedding
        (n, d) output of the network.
    profile
        (n, p) niche expression profiles of the same spots, with a mean norm of sqrt(p).
    unit
        Compare cosines. Otherwise inner products, so that lengths are kept, too; a profile of mean norm then asks for
        an embedding of norm one.

    Returns
    -------
    Scalar.
    """
    if unit:
        embedding, profile = nn.functional.normalize(embedding, dim=-1), nn.functional.normalize(profile, dim=-1)
    else:
        profile = profile / profile.shape[1] ** 0.5
    return nn.functional.mse_loss(embedding @ embedding.T, profile @ profile.T)
