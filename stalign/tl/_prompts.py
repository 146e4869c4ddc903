"""Marker genes of a label → where a spot that expresses them would lie in the aligned space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stalign._logging import logger
from stalign._validate import get_coordinates, listing
from stalign.genes import input_kind, match_names
from stalign.genes._rows import CountRows
from stalign.slide._library import find_niche_record, niche_graph, niche_record
from stalign.tl._expression import Expression
from stalign.tl._slots import embed_record, unit_rows

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from stalign.models import STAlign


def match_markers(
    markers: Mapping[str, Sequence[str]], vocabulary: Sequence[str], *, organism: str = "human"
) -> dict[str, np.ndarray]:
    """Return the places of every label's markers in the vocabulary.

    Raises
    ------
    ValueError
        If a label has no marker that the model knows; the message names them and the nearest symbols.
    """
    every = list(dict.fromkeys(gene for genes in markers.values() for gene in genes))
    match = match_names(every, vocabulary, organism=organism)
    place = dict(zip(every, match.index.tolist(), strict=True))
    index = {
        label: np.unique([place[gene] for gene in genes if place[gene] >= 0]).astype(np.intp)
        for label, genes in markers.items()
    }
    empty = [label for label, places in index.items() if not len(places)]
    if empty:
        label = empty[0]
        raise ValueError(
            f"No marker of label {label!r} is known to the model: {listing(markers[label])}."
            f"{near_genes(markers[label], vocabulary)} The model knows {len(vocabulary)} genes, as symbols, earlier "
            f"symbols, aliases or Ensembl ids. Labels without a known marker: {listing(empty)}."
        )
    unknown = [gene for gene in every if place[gene] < 0]
    if unknown:
        logger.warning("Markers the model does not know are left out: %s.", listing(unknown, 20))
    return index


def near_genes(genes: Sequence[str], vocabulary: Sequence[str]) -> str:
    """Return ``" Near symbols: 'CD3E' for 'CD3e'."`` for those that have one, else an empty string."""
    import difflib

    upper = {gene.upper(): gene for gene in vocabulary}
    found = {}
    for gene in list(genes)[:10]:
        close = difflib.get_close_matches(str(gene).upper(), list(upper), n=1)
        if close:
            found[gene] = upper[close[0]]
    if not found:
        return ""
    return " Near symbols: " + ", ".join(f"{symbol!r} for {gene!r}" for gene, symbol in found.items()) + "."


def prompt_embeddings(
    adata: AnnData, model: STAlign, index: Mapping[str, np.ndarray], codes: np.ndarray, *, key: str
) -> tuple[np.ndarray, bool]:
    """Embed every label's markers through the gene side of the model.

    An encoder that compares spots with their slide describes "these genes are high" best in terms of the slide: where
    the raw counts are still there, its statistics are taken from them.

    Parameters
    ----------
    adata
        After :func:`stalign.tl.embed`.
    model
        The model that embedded it.
    index
        Places of every label's markers in the vocabulary.
    codes
        (n_obs,) library of each spot.
    key
        ``key_added`` of the embedding.

    Returns
    -------
    (n_libraries, n_labels, d) float32 unit vectors in the space of ``obsm["X_stalign_gene"]``, and whether they were
    adapted to the slides.
    """
    encoders = model.encoder("spot_gene"), model.encoder("niche_gene")
    general = [np.stack([encoder.prompt(genes) for genes in index.values()]) for encoder in encoders]
    fitted = _fit(adata, model, codes, key=key)
    adapted = False
    embeddings = []
    for code in range(int(codes.max()) + 1):
        inputs = [values.copy() for values in general]
        for values, statistics in zip(inputs, fitted, strict=True):
            for row, genes in enumerate(index.values()):
                prompt = _slide_prompt(statistics.get(code), genes)
                if prompt is not None:
                    values[row] = prompt
                    adapted = True
        embeddings.append(_embed_genes(model, *inputs))
    return np.stack(embeddings), adapted


def _embed_genes(model: STAlign, spot: np.ndarray, niche: np.ndarray) -> np.ndarray:
    import torch

    from stalign.tl._runtime import inference

    with inference(model, torch.device("cpu")):
        output = model(
            spot_gene=torch.from_numpy(spot.astype(np.float32)), niche_gene=torch.from_numpy(niche.astype(np.float32))
        )
    joined = output.gene
    if joined is None:  # cannot happen: both gene inputs are there
        raise ValueError(f"Model {model.config.name!r} has no gene side.")
    return unit_rows(joined.numpy())


def _fit(adata: AnnData, model: STAlign, codes: np.ndarray, *, key: str) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return, by library, the statistics of the two gene encoders; empty without counts, or if they need none."""
    data = _slide_counts(adata, model, key)
    if data is None:
        return {}, {}
    counts, graph, coordinates = data
    with counts:
        fitted = Expression(model, counts, graph, codes, coordinates).fit()
    spot, niche = (
        {code: both[side].get(0) for code, both in fitted.items() if isinstance(both[side], Mapping)} for side in (0, 1)
    )
    return spot, niche


def _slide_counts(adata: AnnData, model: STAlign, key: str) -> tuple[CountRows, csr_matrix, np.ndarray] | None:
    """Return counts over the vocabulary, the model's niche graph and the coordinates; ``None`` if they are gone.

    The recorded graph may be that of another model that has embedded the slide since, or of more spots than are left:
    then it is worked out again.
    """
    from stalign.pp._genes import resolve_genes
    from stalign.tl._working import NicheArguments, working_copy

    record = embed_record(adata, key)
    niche = find_niche_record(adata)
    if "gene" not in list(record.get("modalities", [])) or niche is None:
        return None
    layer = str(record["layer"])
    raw = adata.layers.get(layer) if layer else adata.X
    if raw is None or str(niche["params"]["spatial_key"]) not in adata.obsm or input_kind(raw) != "counts":
        logger.info("The raw counts or the coordinates are gone: the prompts are not adapted to the slide.")
        return None
    working = working_copy(adata, model.geometry, NicheArguments(), use_image=False).adata
    graph = niche_graph(working)
    match = resolve_genes(
        adata,
        model.genes,
        gene_symbols=str(record["gene_symbols"]) or None,
        organism=str(record["organism"]) or None,
    )
    coordinates = get_coordinates(working, str(niche_record(working)["params"]["spatial_key"]))
    return CountRows(raw, match), graph, coordinates


def _slide_prompt(statistics: Any, genes: np.ndarray) -> np.ndarray | None:
    """Return the input that a slide-relative encoder gives a spot in which the genes are high, each counting the same.

    The rows of the encoder's map are what one gene adds to the input. ``None`` if the encoder knows nothing of the
    slide or the slide none of the genes.
    """
    if statistics is None or not hasattr(statistics, "gene_map"):
        return None
    rows = statistics.gene_map[np.isin(statistics.genes, genes)]
    total = unit_rows(rows).sum(axis=0)
    norm = float(np.linalg.norm(total))
    return (total * np.sqrt(len(total)) / norm).astype(np.float32) if norm > 0 else None
