"""Embeddings of a reference: those it has, or made on the fly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign.tl._slots import embed_record, read_embedding, recorded_model, spot_libraries

if TYPE_CHECKING:
    from anndata import AnnData


class ReferenceEmbedding(NamedTuple):
    """(n, d) float32 of one output, each spot's library, and the record of the embedding."""

    values: np.ndarray
    codes: np.ndarray
    record: Mapping[str, Any]


def reference_embedding(
    reference: AnnData,
    part: str,
    record: Mapping[str, Any],
    model: Any,
    *,
    key: str = Key.obsm.EMBEDDING,
    query: AnnData,
    layer: str | None = None,
) -> ReferenceEmbedding:
    """Return one output of a reference's embedding; where the same model has not embedded it, it is embedded here.

    Parameters
    ----------
    reference
        It is not changed.
    part
        ``"fused"``, ``"image"``, ``"gene"``, ….
    record
        The query's embedding record.
    model
        The model that the user passed, or ``None``.
    key
        ``key_added`` of the embeddings.
    query
        The query, whose record names the model.
    layer
        Layer of the reference with raw counts.
    """
    theirs = embed_record(reference, key)
    same = not theirs or not record or str(theirs["sha256"]) == str(record["sha256"])
    if Key.embedding(part, key) in reference.obsm and same:
        return ReferenceEmbedding(
            read_embedding(reference, part, key, what="reference"), spot_libraries(reference), theirs
        )
    from stalign.tl._compute import compute_embedding
    from stalign.tl._embed import make_run
    from stalign.tl._working import NicheArguments

    logger.info("The reference is not embedded by the query's model: embedding it (it is not changed).")
    result = compute_embedding(
        reference,
        recorded_model(query, model, key),
        modalities=("image", "gene"),
        outputs=(part,),
        niches=NicheArguments(),
        layer=layer,
        gene_symbols=None,
        organism=None,
        run=make_run(),
    )
    if part not in result.matrices:
        kept = " and ".join(result.record["modalities"])
        raise ValueError(f"The reference was embedded from its {kept} alone: it has no output {part!r}.")
    return ReferenceEmbedding(result.matrices[part], spot_libraries(result.working.adata), result.record)
