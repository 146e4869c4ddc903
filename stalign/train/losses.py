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
    >>> from stalign.train.losses import info_nce
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
    clusters: torch.Tensor,
    mode: str = "masked",
    *,
    slides: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Say which spots of a batch are negatives of which.

    Parameters
    ----------
    clusters
        (n,) expression cluster of each spot, numbered within its slide.
    mode
        ``"paper"``: exactly one random spot from each other cluster of the slide, as in arXiv 2411.16793; ``"masked"``:
        every spot of every other cluster of the slide; ``"in_batch"``: every other spot, of other slides, too.
    slides
        (n,) number of each spot's slide; ``None`` if all are of one.
    generator
        Source of the random choice of ``"paper"``.

    Returns
    -------
    (n, n) bool; row i marks the negatives of spot i. The diagonal is False.

    Examples
    --------
    >>> import torch
    >>> from stalign.train.losses import negative_mask
    >>> negative_mask(torch.tensor([0, 0, 1])).tolist()
    [[False, False, True], [False, False, True], [True, True, False]]
    """
    check_choice("negatives", mode, NEGATIVES)
    n = len(clusters)
    if mode == "in_batch":
        return ~torch.eye(n, dtype=torch.bool, device=clusters.device)
    slides = torch.zeros_like(clusters) if slides is None else slides
    other = (clusters[:, None] != clusters[None, :]) & (slides[:, None] == slides[None, :])
    if mode == "masked":
        return other
    chosen = torch.zeros_like(other)
    rows = torch.arange(n, device=clusters.device)
    for slide, cluster in torch.stack([slides, clusters], dim=1).unique(dim=0):
        members = torch.nonzero((slides == slide) & (clusters == cluster)).flatten()
        # Drawn on the CPU, so that a seed gives the same negatives on every device.
        pick = torch.randint(len(members), (n,), generator=generator).to(members.device)
        chosen[rows, members[pick]] = True
    return chosen & other


def masked_info_nce(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor,
    *,
    positive: torch.Tensor | None = None,
    temperature: float = 0.1,
) -> torch.Tensor:
    """InfoNCE whose negatives are the rows of ``key`` that ``mask`` marks.

    Equal to :func:`info_nce` with those rows gathered into ``negatives``, without a second forward pass for them.

    Parameters
    ----------
    query
        (n, d).
    key
        (m, d): the keys of all processes that share a batch, or of this one.
    mask
        (n, m) bool, see :func:`negative_mask`.
    positive
        (n,) the row of ``key`` that belongs to each query; ``None``: row i to query i.
    temperature
        Divides the cosine similarities.

    Returns
    -------
    Scalar: the mean over the queries.

    Raises
    ------
    ValueError
        If the mask has another shape.

    Examples
    --------
    >>> import torch
    >>> from stalign.train.losses import masked_info_nce, negative_mask
    >>> embedding = torch.eye(3)
    >>> loss = masked_info_nce(embedding, embedding, negative_mask(torch.tensor([0, 0, 1])))
    >>> bool(loss < 0.001)
    True
    """
    if mask.shape != (len(query), len(key)):
        raise ValueError(f"mask must be (n, m) = ({len(query)}, {len(key)}), got {tuple(mask.shape)}.")
    positive = torch.arange(len(query), device=query.device) if positive is None else positive
    logits = nn.functional.normalize(query, dim=-1) @ nn.functional.normalize(key, dim=-1).T / temperature
    keep = mask.scatter(1, positive[:, None], torch.ones_like(positive, dtype=torch.bool)[:, None])
    return nn.functional.cross_entropy(logits.masked_fill(~keep, _OFF), positive)


def structure_loss(
    embedding: torch.Tensor,
    profile: torch.Tensor,
    *,
    unit: bool = True,
    against: tuple[torch.Tensor, torch.Tensor] | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared difference of the similarities within a batch, before and after the network.

    It asks the embedding to keep the geometry of the smoothed expression profiles (similarity distillation).

    Parameters
    ----------
    embedding
        (n, d) output of the network.
    profile
        (n, p) expression profiles of the same spots, or niches, with a mean norm of sqrt(p).
    unit
        Compare cosines. Otherwise inner products, so that lengths are kept, too; a profile of mean norm then asks for
        an embedding of norm one.
    against
        (m, d) embeddings and (m, p) profiles that the similarities are taken with; ``None``: the same spots.
    mask
        (n, m) bool, the pairs that count; ``None``: all.

    Returns
    -------
    Scalar: the mean over the pairs.

    Examples
    --------
    >>> import torch
    >>> from stalign.train.losses import structure_loss
    >>> profile = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> bool(structure_loss(3 * profile, profile) < 1e-6)
    True
    """

    def scale(values: torch.Tensor, norm: float) -> torch.Tensor:
        return nn.functional.normalize(values, dim=-1) if unit else values / norm

    norm = profile.shape[1] ** 0.5
    embedding, profile = scale(embedding, 1.0), scale(profile, norm)
    other, other_profile = embedding, profile
    if against is not None:
        other, other_profile = scale(against[0], 1.0), scale(against[1], norm)
    after, before = embedding @ other.T, profile @ other_profile.T
    if mask is not None:
        after, before = after[mask], before[mask]
    return nn.functional.mse_loss(after, before)
