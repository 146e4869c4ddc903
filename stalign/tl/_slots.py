"""Embeddings that :func:`stalign.tl.embed` left in an AnnData, and what is recorded about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import get_library_codes
from stalign.slide._library import find_niche_record, recorded_libraries

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import STAlign

PARTS = ("fused", "spot", "niche", "image", "gene")
_NEEDS = {"image": "an image", "gene": "raw counts"}


def embed_record(adata: AnnData, key: str = Key.obsm.EMBEDDING) -> Mapping[str, Any]:
    """Return what :func:`stalign.tl.embed` recorded about the embeddings ``key``; empty if nothing is there."""
    return adata.uns.get(Key.UNS, {}).get(Key.embed_record(key), {})


def read_embedding(adata: AnnData, part: str, key: str = Key.obsm.EMBEDDING, *, what: str = "adata") -> np.ndarray:
    """Return one matrix of :func:`stalign.tl.embed`.

    Parameters
    ----------
    adata
        After :func:`stalign.tl.embed`.
    part
        ``"fused"``, ``"spot"``, ``"niche"``, ``"image"`` or ``"gene"``.
    key
        ``key_added`` of the call that made it.
    what
        What the AnnData is called in messages.

    Returns
    -------
    (n_obs, d) float32; rows of NaN for spots whose library lacks that side.

    Raises
    ------
    KeyError
        If it is not there, with what to do about it.
    """
    name = Key.embedding(part, key)
    if name in adata.obsm:
        return np.asarray(adata.obsm[name], dtype=np.float32)
    missing = f"`{what}.obsm[{name!r}]` is missing"
    record = embed_record(adata, key)
    if not record:
        raise KeyError(f"{missing}: run `sta.tl.embed({what})` first.")
    kept = [str(output) for output in record["outputs"]]
    if part not in kept:
        raise KeyError(
            f"{missing}: the embedding was made with outputs={kept}. Run `sta.tl.embed({what}, outputs=...)` with "
            f"{part!r} among them."
        )
    raise KeyError(
        f"{missing}: the slide was embedded without {_NEEDS.get(part, 'it')}. This needs {_NEEDS.get(part, 'it')}: "
        f"run `sta.tl.embed({what})` again once it is there."
    )


def present(values: np.ndarray) -> np.ndarray:
    """(n,) bool: rows that are embedded."""
    return ~np.isnan(values).any(axis=1)


def check_same_space(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, our_name: str, their_name: str) -> None:
    """Refuse embeddings of two models; where nothing is recorded (as after a concatenation) they are taken on trust."""
    if not ours or not theirs:
        nameless = our_name if not ours else their_name
        logger.warning("`%s` does not record which model embedded it: taken to be the same model.", nameless)
        return
    if str(ours["sha256"]) != str(theirs["sha256"]):
        raise ValueError(
            f"`{our_name}` was embedded by {describe(ours)}, `{their_name}` by {describe(theirs)}: their spaces have "
            "nothing in common. Embed both with the same model."
        )


def describe(record: Mapping[str, Any]) -> str:
    """Name a model of an embedding record."""
    return f"{str(record['model'])!r} (SHA-256 {str(record['sha256'])[:12]}…)"


def model_params(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what a result records about the model of its embedding; empty if that is not known."""
    return {"model": str(record["model"]), "sha256": str(record["sha256"])} if record else {}


def recorded_model(adata: AnnData, model: Any, key: str) -> STAlign:
    """Return the model that made the embeddings ``key``: the one passed, checked, or the recorded one, loaded.

    Raises
    ------
    ValueError
        If the model is another one, or none is passed and the recorded one cannot be loaded.
    """
    from stalign.tl._runtime import identify, resolve_model

    record = embed_record(adata, key)
    if model is None:
        if not record:
            raise ValueError(
                f"`adata.uns[{Key.UNS!r}][{Key.embed_record(key)!r}]`, which names the model of the embedding, is "
                "missing. Pass `model=...`, or run `sta.tl.embed(adata)` again."
            )
        source = str(record["model_source"])
        if not source:
            raise ValueError(
                f"The embedding was made by a model in memory, {describe(record)}, which was never saved. Pass it as "
                "`model=...`."
            )
        model = source
    loaded = resolve_model(model)
    if record and identify(loaded).sha256 != str(record["sha256"]):
        identity = identify(loaded)
        raise ValueError(
            f"The embedding was made by {describe(record)}, but the model is {identity.name!r} (SHA-256 "
            f"{identity.sha256[:12]}…). Pass the model that made it, or run `sta.tl.embed(adata, model=...)` again."
        )
    return loaded


def spot_libraries(adata: AnnData, library_key: str | None = None) -> np.ndarray:
    """Return each spot's library number: by ``library_key``, else as the niche record says, else one library."""
    record = find_niche_record(adata)
    if library_key is None and record is not None:
        recorded = str(record["params"]["library_key"])
        if not recorded or recorded in adata.obs:
            return recorded_libraries(adata)[0]
    return get_library_codes(adata, library_key)[0]


def centre_by_library(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Subtract each library's mean of the rows that are there."""
    centred = np.array(values, dtype=np.float32)
    there = present(centred)
    for code in np.unique(codes[there]):
        rows = np.flatnonzero((codes == code) & there)
        centred[rows] -= centred[rows].mean(axis=0, dtype=np.float64).astype(np.float32)
    return centred


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Scale rows to unit norm; rows of zeros stay."""
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norm > 0, norm, 1)
