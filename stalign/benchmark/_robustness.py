"""What becomes of the results when the stain, the depth or the genes are others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse

from stalign._keys import Key
from stalign.benchmark import _features as features
from stalign.benchmark import _metrics as metrics
from stalign.benchmark._domains import model_domains
from stalign.benchmark._genes import expression_of, predict_with_head, top_genes
from stalign.benchmark._methods import kmeans, tied_mixture, wanted
from stalign.benchmark._rows import Row
from stalign.benchmark._section import Section

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import STAlign

TASK: Final = "robustness"
_GAIN: Final = (0.75, 1.25)
_SHIFT: Final = (-0.05, 0.05)
_BASELINES: Final[dict[str, tuple[Callable[[Section], np.ndarray], Callable[..., np.ndarray]]]] = {
    "pca": (features.pca, kmeans),
    "smoothed-genes": (features.smoothed_genes, tied_mixture),
}


def shift_stain(image: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Change the optical density of each colour, ``gain`` · density + ``shift``.

    Parameters
    ----------
    image
        (height, width, 3 or more) uint8; further channels stay.
    gain, shift
        (3,), in units of the natural logarithm.

    Returns
    -------
    uint8 of the same shape.

    Examples
    --------
    >>> image = np.full((1, 1, 3), 128, dtype=np.uint8)
    >>> shift_stain(image, np.array([1.0, 2.0, 1.0]), np.zeros(3)).ravel().tolist()
    [128, 64, 128]
    """
    level = np.maximum(np.arange(256), 1) / 255
    changed = image.copy()
    for channel in range(3):
        density = np.maximum(-np.log(level) * gain[channel] + shift[channel], 0)
        table = np.rint(255 * np.exp(-density)).astype(np.uint8)
        changed[..., channel] = table[image[..., channel]]
    return changed


def thin_counts(counts: sparse.csr_matrix, share: float, *, seed: int) -> sparse.csr_matrix:
    """Keep every molecule with probability ``share`` (binomial thinning).

    Parameters
    ----------
    counts
        Sparse matrix of whole numbers.
    share
        Between 0 and 1.
    seed
        Of the draw.
    """
    thinned = sparse.csr_matrix(counts, copy=True)
    drawn = np.random.default_rng(seed).binomial(np.rint(thinned.data).astype(np.int64), share)
    thinned.data = drawn.astype(thinned.dtype)
    thinned.eliminate_zeros()
    return thinned


def _other_stain(adata: AnnData, seed: int) -> AnnData:
    rng = np.random.default_rng(seed)
    gain, shift = rng.uniform(*_GAIN, size=3), rng.uniform(*_SHIFT, size=3)
    changed = adata.copy()
    entries = {}
    for library, entry in adata.uns[Key.uns.SPATIAL].items():
        images = {key: shift_stain(np.asarray(image), gain, shift) for key, image in entry["images"].items()}
        entries[library] = {**entry, "images": images}
    changed.uns[Key.uns.SPATIAL] = entries
    return changed


def _half_counts(adata: AnnData, seed: int) -> AnnData:
    changed = adata.copy()
    changed.X = thin_counts(adata.X, 0.5, seed=seed)
    return changed


def _fewer_genes(adata: AnnData, seed: int) -> AnnData:
    kept = np.random.default_rng(seed).permutation(adata.n_vars)[: adata.n_vars - adata.n_vars // 3]
    return adata[:, np.sort(kept)].copy()


_CHANGES: Final[dict[str, Callable[[AnnData, int], AnnData]]] = {
    "other stain": _other_stain,
    "half the counts": _half_counts,
    "a third of the genes missing": _fewer_genes,
}


def robustness(section: Section, *, model: STAlign, seed: int = 0, methods: Sequence[str] | None = None) -> list[Row]:
    """Change a section, and see what becomes of its domains and of the genes predicted from its image.

    Three changes: another stain (gain of 0.75 to 1.25 and shift of ±0.05 in the optical density of each colour, drawn
    from the seed), half the counts (binomial thinning), a third of the genes missing.

    Parameters
    ----------
    section
        With labels for the domains, with an image for the stain.
    model
        The model, its default embedding and its own head.
    seed
        Of the changes and of the clustering, before and after.
    methods
        Names or patterns of :data:`stalign.benchmark.METHODS`.

    Returns
    -------
    Rows, for each change, of the change of the domains' ARI with the labels, of the ARI of the domains before and
    after (1: nothing has changed), and of the change of the mean correlation over the section's 50 most variable genes
    that the head predicts. A change that cannot touch a method has no row.

    Examples
    --------
    >>> import stalign as sta
    >>> from stalign.benchmark import Section, robustness
    >>> section = Section.of(sta.datasets.synthetic_visium(n_rows=12, n_cols=12), label_key="region")
    >>> rows = robustness(section, model=sta.models.load("stalign-mini"), methods=["pca"])
    >>> rows[0].metric
    'ARI, untouched'
    """
    rows = []
    before = _domains(section, model, seed, methods)
    for method, found in before.items():
        rows.append(_row(section, "ARI, untouched", method, _ari(section.names, found), seed))
    r_before = _head_correlation(section, section, model, methods)
    if r_before is not None:
        rows.append(_row(section, "Pearson r of the head, untouched", "stalign-head", r_before, seed))
    for name, change in _CHANGES.items():
        is_stain = change is _other_stain
        if is_stain and not _has_pixels(section):
            continue
        # Only what comes from a stain can change by it: expression alone does not.
        touched = [method for method in before if not is_stain or method.startswith("stalign")]
        if not touched and not (is_stain and r_before is not None):
            continue
        changed = Section(section.name, change(_bare(section.adata), seed), section.labels)
        after = _domains(changed, model, seed, touched)
        for method, found in after.items():
            difference = _ari(section.names, found) - _ari(section.names, before[method])
            same = _ari(before[method], found)
            rows.append(_row(section, f"change of ARI: {name}", method, difference, seed))
            rows.append(_row(section, f"ARI before and after: {name}", method, same, seed))
        if is_stain and r_before is not None:
            r = _head_correlation(changed, section, model, methods)
            if r is not None:
                rows.append(
                    _row(section, f"change of Pearson r of the head: {name}", "stalign-head", r - r_before, seed)
                )
    return rows


def _row(section: Section, metric: str, method: str, value: float, seed: int) -> Row:
    return Row(TASK, metric, section.name, method, value, seed, n=section.adata.n_obs)


def _bare(adata: AnnData) -> AnnData:
    """Return the section without embeddings and niches, which would be those of the untouched one."""
    from anndata import AnnData

    return AnnData(
        adata.X,
        obs=adata.obs,
        var=adata.var,
        obsm={Key.obsm.SPATIAL: adata.obsm[Key.obsm.SPATIAL]},
        uns={key: value for key, value in adata.uns.items() if key != Key.UNS},
    )


def _has_pixels(section: Section) -> bool:
    entries = section.adata.uns.get(Key.uns.SPATIAL, {}).values()
    images = [image for entry in entries for image in entry.get("images", {}).values()]
    return bool(images) and all(np.asarray(image).dtype == np.uint8 for image in images)


def _domains(section: Section, model: STAlign, seed: int, methods: Sequence[str] | None) -> dict[str, np.ndarray]:
    if section.labels is None or section.n_classes < 2:
        return {}
    found = {
        name: cluster(extract(section), section.n_classes, seed)
        for name, (extract, cluster) in _BASELINES.items()
        if wanted(name, methods)
    }
    if wanted("stalign", methods):
        found["stalign"] = model_domains(section, model, ("image", "gene"), section.n_classes, seed)
    return found


def _ari(first: np.ndarray, second: np.ndarray) -> float:
    codes = [np.unique(values, return_inverse=True)[1] for values in (first, second)]
    return float(metrics.adjusted_rand(metrics.contingency(*codes))[0])


def _head_correlation(section: Section, truth: Section, model: STAlign, methods: Sequence[str] | None) -> float | None:
    """Mean correlation of the head's predictions for a section with the measured counts of another form of it."""
    if not section.has_image or not wanted("stalign-head", methods) or model.prediction is None:
        return None
    names = [name for name in top_genes([truth], truth.adata.n_vars) if name in set(model.predicted_genes)][:50]
    if not names:
        return None
    return float(metrics.pearson(predict_with_head(section, model, names), expression_of(truth, names)).mean())
