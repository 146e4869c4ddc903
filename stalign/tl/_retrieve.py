"""Search across modalities: which expression belongs to this histology, and the other way round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from stalign._keys import Key
from stalign._validate import check_adata, check_choice, check_positive
from stalign.tl._neighbours import nearest
from stalign.tl._slots import check_same_space, embed_record, present, read_embedding, unit_rows

if TYPE_CHECKING:
    from anndata import AnnData

_DIRECTIONS = ("image->gene", "gene->image")


class Retrieval(NamedTuple):
    """Nearest spots across modalities.

    Attributes
    ----------
    indices
        (n_query, k) int64 positions in the reference, the nearest first; -1 for a query that lacks its side.
    scores
        (n_query, k) float32 cosines; NaN where there is no index.
    recall
        Share of the queries whose own spot is among the ``k``, where the query is the reference; else ``None``. Chance
        is k / n.
    """

    indices: np.ndarray
    scores: np.ndarray
    recall: float | None


def retrieve(
    query: AnnData,
    reference: AnnData,
    *,
    direction: Literal["image->gene", "gene->image"] = "image->gene",
    k: int = 10,
    use_rep: str = Key.obsm.EMBEDDING,
) -> Retrieval:
    """Find the spots of a reference whose one side is nearest to the other side of the query's spots.

    Parameters
    ----------
    query, reference
        After :func:`stalign.tl.embed` with the same model. They may be the same object: then every spot's other side is
        looked for among all spots, and ``recall`` tells how often it is found.
    direction
        Which side of the query is compared with which side of the reference.
    k
        How many spots to return for each query.
    use_rep
        ``key_added`` of :func:`stalign.tl.embed`.

    Returns
    -------
    :class:`Retrieval`. Nothing is written.

    Raises
    ------
    KeyError
        If a side is missing.
    ValueError
        If two models made the embeddings, or the reference has fewer than ``k`` spots with that side.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.tl.embed(adata)  # doctest: +SKIP
    >>> sta.tl.retrieve(adata, adata, k=50).recall  # doctest: +SKIP
    """
    check_adata(query)
    check_adata(reference)
    check_choice("direction", direction, _DIRECTIONS)
    k = check_positive("k", k, integer=True)
    ours, theirs = direction.split("->")
    same = query is reference
    queries = read_embedding(query, ours, use_rep, what="query")
    keys = read_embedding(reference, theirs, use_rep, what="reference")
    if not same:
        check_same_space(
            embed_record(query, use_rep), embed_record(reference, use_rep), our_name="query", their_name="reference"
        )
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"The query's {ours} side has {queries.shape[1]} dimensions, the reference's {theirs} side "
            f"{keys.shape[1]}: two models made them. Embed both with the same one."
        )
    rows, columns = np.flatnonzero(present(queries)), np.flatnonzero(present(keys))
    if k > len(columns):
        raise ValueError(f"k is {k}, but the reference has {len(columns)} spots with the {theirs} side. Lower k.")
    found = nearest(unit_rows(queries[rows]), unit_rows(keys[columns]), k)
    indices = np.full((query.n_obs, k), -1, dtype=np.int64)
    scores = np.full((query.n_obs, k), np.nan, dtype=np.float32)
    indices[rows], scores[rows] = columns[found.indices], found.scores
    return Retrieval(indices, scores, _recall(indices, rows, columns) if same else None)


def _recall(indices: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """Share of the spots with both sides that found themselves."""
    both = np.intersect1d(rows, columns)
    return float((indices[both] == both[:, None]).any(axis=1).mean()) if len(both) else float("nan")
