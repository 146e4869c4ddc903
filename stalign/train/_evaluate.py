"""Embed whole sections and measure retrieval, alignment, uniformity and domains, for validation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from stalign.models._network import STAlign
from stalign.train._data import EncodedSection

# Rows of a similarity matrix held at once, and spots that stand for a large section where all pairs are looked at.
_ROWS = 2048
_SAMPLE = 4096
_KMEANS_RUNS = 5


class SectionEmbedding(NamedTuple):
    """A section's (n, d) float32 embeddings; ``None`` where an input was absent.

    Attributes
    ----------
    image, gene
        The aligned pair, unit norm, each spot beside its niche.
    fused
        Spot and niche, each fused.
    spot_image
        The image side of the spots alone, unit norm.
    """

    image: np.ndarray | None
    gene: np.ndarray | None
    fused: np.ndarray | None
    spot_image: np.ndarray | None


def embed_section(model: STAlign, encoded: EncodedSection, *, batch_size: int = 512) -> SectionEmbedding:
    """Embed a section in evaluation mode."""
    was_training = model.training
    model.eval()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SectionEmbedding._fields}
    with torch.inference_mode():
        for start in range(0, len(encoded), batch_size):
            inputs = inputs_of(model, encoded, slice(start, start + batch_size))
            output = model(**{name: x.to(model.device) for name, x in inputs.items()})
            spot = output.spot_image
            found = {
                "image": output.image,
                "gene": output.gene,
                "fused": model.embedding(output, "fused"),
                "spot_image": None if spot is None else torch.nn.functional.normalize(spot.float(), dim=-1),
            }
            for name, embedding in found.items():
                if embedding is not None:
                    parts[name].append(embedding.float().cpu().numpy())
    model.train(was_training)
    return SectionEmbedding(**{name: np.concatenate(blocks) if blocks else None for name, blocks in parts.items()})


def inputs_of(model: STAlign, encoded: EncodedSection, rows: slice | np.ndarray) -> dict[str, torch.Tensor]:
    section = encoded.section
    inputs = {name: _tensor(getattr(encoded, name)[rows]) for name in ("spot_gene", "niche_gene")}
    if not section.has_image:
        return inputs
    for scale in ("spot", "niche"):
        features = getattr(encoded, f"{scale}_feature", None)
        if features is not None:
            inputs[f"{scale}_image"] = _tensor(features[rows][:, 0])
            continue
        preprocess = model.encoder(f"{scale}_image").preprocess
        pixels = np.asarray(getattr(section, f"{scale}_image")[rows])
        inputs[f"{scale}_image"] = preprocess(pixels, colour=section.colour)
    return inputs


def _tensor(values: Any) -> torch.Tensor:
    # A copy: what is mapped from a shard is read-only, which torch does not know.
    return torch.from_numpy(np.array(values, dtype=np.float32))


# -- measures ---------------------------------------------------------------------------------------------------------


def recall_at(query: np.ndarray, key: np.ndarray, *, share: float) -> float:
    """Share of queries whose own key is among the nearest ``share`` of all keys; by chance, ``share``."""
    return float((_ranks(query, key) < share * len(key)).mean())


def _ranks(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Number of keys that are nearer to a query than its own."""
    ranks = np.empty(len(query), dtype=np.int64)
    for start in range(0, len(query), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(query)))
        similarity = query[rows] @ key.T
        ranks[rows] = (similarity > similarity[np.arange(len(rows)), rows][:, None]).sum(axis=1)
    return ranks


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared distance of the two sides of a pair (Wang and Isola 2020, arXiv 2005.10242, with α = 2).

    Parameters
    ----------
    x, y
        (n, d) unit vectors; row i of one belongs to row i of the other. 0 is best.
    """
    return float(np.square(x - y).sum(axis=1).mean())


def uniformity(x: np.ndarray) -> float:
    """Logarithm of the mean Gaussian potential of all pairs (Wang and Isola 2020, arXiv 2005.10242, with t = 2).

    Parameters
    ----------
    x
        (n, d) unit vectors. 0 if all are the same, the lower the more they spread; of more than 4,096, an even sample.
    """
    if len(x) < 2:
        return 0.0
    if len(x) > _SAMPLE:
        x = x[np.linspace(0, len(x) - 1, _SAMPLE).round().astype(np.intp)]
    x = x.astype(np.float64)
    squared = np.clip(2 - 2 * (x @ x.T), 0, None)
    pairs = squared[np.triu_indices(len(x), k=1)]
    return float(np.log(np.exp(-2 * pairs).mean()))


def adjusted_rand_index(first: np.ndarray, second: np.ndarray) -> float:
    """Agreement of two partitions, corrected for chance (Hubert and Arabie 1985); 1 for the same, 0 by chance.

    Parameters
    ----------
    first, second
        (n,) labels of any kind.
    """
    _, rows = np.unique(first, return_inverse=True)
    _, columns = np.unique(second, return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1), dtype=np.int64)
    np.add.at(table, (rows, columns), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) // 2).sum())

    together, in_rows, in_columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    whole = pairs(np.array([len(rows)]))
    expected = in_rows * in_columns / whole if whole else 0.0
    largest = (in_rows + in_columns) / 2
    # Both partitions are one block, or all blocks are single spots: they are the same.
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def domain_ari(fused: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> float | None:
    """Agreement of k-means domains of the fused embedding with labels of the tissue.

    Parameters
    ----------
    fused
        (n, d) fused embeddings.
    labels
        (n,) names, empty for spots without one, which are left out. There are as many domains as names.
    seed
        Of k-means; the best of five starts counts.

    Returns
    -------
    The adjusted Rand index; ``None`` with fewer than two names.
    """
    labels = np.asarray(labels).astype(str)
    known = labels != ""
    names = np.unique(labels[known])
    if len(names) < 2:
        return None
    values = fused[known].astype(np.float64)
    fits = [_kmeans(values, len(names), seed + run) for run in range(_KMEANS_RUNS)]
    domains = min(fits, key=lambda fit: fit[0])[1]
    return adjusted_rand_index(domains, labels[known])


def _kmeans(values: np.ndarray, k: int, seed: int) -> tuple[float, np.ndarray]:
    centres, domains = kmeans2(values, k, minit="++", seed=seed, iter=30)
    return float(np.square(values - centres[domains]).sum()), domains


def measure(model: STAlign, encoded: EncodedSection) -> dict[str, float]:
    """Measure one section the model was not trained on.

    Parameters
    ----------
    model
        The model.
    encoded
        The section.

    Returns
    -------
    What can be measured of: ``recall_at_1_percent``, ``…_5_…``, ``…_10_…`` of image → gene retrieval within the
    section, ``alignment``, ``uniformity`` (mean of both sides), and ``domain_ari`` where there are labels.
    """
    embedded = embed_section(model, encoded)
    found: dict[str, float] = {}
    if embedded.image is not None and embedded.gene is not None:
        ranks = _ranks(embedded.image, embedded.gene)
        for percent in (1, 5, 10):
            found[f"recall_at_{percent}_percent"] = float((ranks < percent / 100 * len(ranks)).mean())
        found["alignment"] = alignment(embedded.image, embedded.gene)
        found["uniformity"] = (uniformity(embedded.image) + uniformity(embedded.gene)) / 2
    labels = getattr(encoded.section, "labels", None)
    if labels is not None and embedded.fused is not None:
        ari = domain_ari(embedded.fused, labels)
        if ari is not None:
            found["domain_ari"] = ari
    return found
