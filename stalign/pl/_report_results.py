"""What a report shows: taken from the AnnData where it is there, worked out on the side where it is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd

from stalign._keys import Key
from stalign._logging import logger, one_line
from stalign._validate import require_key
from stalign.genes import input_kind, library_size
from stalign.slide._library import find_niche_record, niche_graph, recorded_libraries

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import STAlign

DEFAULT_DOMAINS: Final = 7
DEFAULT_GENES: Final = 3
TOP_GENES: Final = 5
LOW_COVERAGE: Final = 0.5
_MARKER_SPOTS: Final = 20_000
_MARKER_P: Final = 0.05
_ALL_GENES_SPOTS: Final = 20_000
_SHUFFLES: Final = 200
_ENRICHMENT_SPOTS: Final = 200_000
_FEW_SPOTS: Final = 30
QUALITY: Final = tuple(Key.quality(what) for what in ("ood", "agreement", "tissue"))
# Spots that are farther than 99 of 100 spots that the model was trained on, and the share of them that is said.
_FAR: Final = 2.0
_FAR_SHARE: Final = 0.25


class Options(NamedTuple):
    """What the call asked for."""

    n_domains: int | None
    markers: Mapping[str, Sequence[str]] | None
    genes: tuple[str, ...] | None
    model: Any
    image: Any
    mpp: Any
    layer: str | None
    library_key: str | None
    device: Any
    batch_size: int | None


@dataclass
class Results:
    """What the page is written from. ``adata`` is a copy whose slots may be set; its arrays are the caller's."""

    adata: AnnData
    model: STAlign | None
    counts: Any
    embedded_before: bool = False
    genes_asked: bool = False
    domains_made: bool = False
    predicted_made: bool = False
    genes: list[str] = field(default_factory=list)
    correlations: np.ndarray = field(default_factory=lambda: np.empty(0))
    markers: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def record(self) -> Mapping[str, Any]:
        """What was recorded about the embedding."""
        return embedding_record(self.adata)

    @property
    def niche(self) -> Mapping[str, Any]:
        """What was recorded about the niches; empty if that is gone."""
        return find_niche_record(self.adata) or {}

    @property
    def has_names(self) -> bool:
        """Whether spots are annotated."""
        return Key.obs.ANNOTATION in self.adata.obs

    def has_image(self, library: str) -> bool:
        """Whether the image that the niches were cut from is still where it was."""
        entry = self.niche.get("libraries", {}).get(library, {})
        if entry.get("image", "none") == "path":
            return Path(str(entry["image_path"])).exists()
        images = self.adata.uns.get(Key.uns.SPATIAL, {}).get(library, {}).get("images", {})
        return entry.get("image", "none") == "uns" and str(entry["image_key"]) in images

    def warn(self, text: str) -> None:
        """Keep what a reader must know."""
        self.notes.append(("warning", text))

    def note(self, text: str) -> None:
        """Keep what is good to know."""
        self.notes.append(("note", text))


def embedding_record(adata: AnnData) -> Mapping[str, Any]:
    """Return what was recorded about the embedding; empty if that is gone."""
    from stalign.tl._slots import embed_record

    return embed_record(adata)


def work_out(adata: AnnData, options: Options) -> Results:
    """Fill in what is missing, on a copy that shares the caller's arrays."""
    working = _shallow(adata)
    with _quiet():
        return _work_out(working, options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the functions say that they added to themselves: they add it to a copy."""
    level = logger.level
    logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def _work_out(working: AnnData, options: Options) -> Results:
    there = not _embed(working, options)
    results = Results(working, None, _counts(working, options.layer), there, options.genes is not None)
    results.model = _recorded_model(results)
    _domains(results, options)
    _names(results, options)
    _predictions(results, options)
    _quality(results, options)
    results.markers = marker_genes(results)
    _check(results)
    return results


def _shallow(adata: AnnData) -> AnnData:
    """Copy the slots, not what is in them: the functions called here replace slots and never write into arrays."""
    from anndata import AnnData

    copy = AnnData(
        adata.X,
        obs=adata.obs.copy(),
        var=adata.var.copy(),
        obsm=dict(adata.obsm),
        layers=dict(adata.layers),
        obsp=dict(adata.obsp),
        uns=dict(adata.uns),
    )
    if Key.UNS in adata.uns:
        copy.uns[Key.UNS] = dict(adata.uns[Key.UNS])
    return copy


def _embed(adata: AnnData, options: Options) -> bool:
    """Embed the slide unless this was done, with this model; return whether it was."""
    from stalign import tl
    from stalign.tl._runtime import identify, resolve_model

    if Key.obsm.EMBEDDING in adata.obsm and options.image is None and options.mpp is None:
        recorded = str(embedding_record(adata).get("sha256", ""))
        if options.model is None or identify(resolve_model(options.model)).sha256 == recorded:
            return False
    tl.embed(
        adata,
        model="stalign-mini" if options.model is None else options.model,
        image=options.image,
        mpp=options.mpp,
        layer=options.layer,
        library_key=options.library_key,
        device=options.device,
        batch_size=options.batch_size,
    )
    return True


def _counts(adata: AnnData, layer: str | None) -> Any:
    """Return the raw counts, ``None`` where there are none."""
    name = layer or str(embedding_record(adata).get("layer", ""))
    if name:
        return require_key(adata.layers, name, where="adata.layers")
    if adata.X is None or adata.n_vars == 0 or input_kind(adata.X) != "counts":
        return None
    return adata.X


def _recorded_model(results: Results) -> STAlign | None:
    """Load the model that made the embedding, without a network; a report can do without it, and says so."""
    from stalign import models

    source: str | Path = str(results.record.get("model_source", ""))
    if not source:
        results.note(
            "Which model made the embedding is not recorded, or it was never saved: its card and its prediction head "
            "are not used here."
        )
        return None
    try:
        model = models.load(source, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        results.warn(f"The model that made the embedding could not be loaded: {one_line(error)}")
        return None
    if model.provenance.sha256 != str(results.record["sha256"]):
        results.warn(
            f"The weights found as {source!r} are no longer those that made the embedding. Nothing is predicted with "
            "them; embed the slide again to use them."
        )
        return None
    return model


# --- domains, names, predictions -----------------------------------------------------------------------------------


def _domains(results: Results, options: Options) -> None:
    from stalign import tl

    adata = results.adata
    if options.n_domains is None and Key.obs.DOMAIN in adata.obs:
        adata.obs[Key.obs.DOMAIN] = _as_labels(adata.obs[Key.obs.DOMAIN])
        return
    n_domains = options.n_domains
    if n_domains is None:
        if adata.n_obs < 2:
            results.note("One spot has no domains.")
            return
        n_domains = int(np.clip(adata.n_obs // 10, 2, DEFAULT_DOMAINS))
        results.note(
            f"The number of domains was not given: {n_domains} were looked for, which says nothing about how many the "
            "tissue has."
        )
    tl.spatial_domains(adata, n_domains)
    results.domains_made = True
    if len(results.niche.get("libraries", {})) > 1:
        results.note(
            "Domains were found over all slides together. Slides differ in stain and depth, too, so a domain that only "
            "one slide has need not be a tissue that only it has."
        )
    if not bool(adata.uns[Key.UNS][Key.uns.DOMAINS]["converged"]):
        results.warn("The search for domains did not settle: another seed may give others.")


def _names(results: Results, options: Options) -> None:
    from stalign import tl

    adata = results.adata
    if options.markers is not None:
        tl.zero_shot_annotate(adata, options.markers, model=results.model)
    elif results.has_names:
        adata.obs[Key.obs.ANNOTATION] = _as_labels(adata.obs[Key.obs.ANNOTATION])


def _as_labels(values: pd.Series) -> pd.Series:
    """Text categories, in their order; spots without one are named as such."""
    values = values.astype("category").cat.remove_unused_categories()
    values = values.cat.rename_categories([str(name) for name in values.cat.categories])
    if values.isna().any():
        values = values.cat.add_categories(["not labelled"]).fillna("not labelled")
    return values


def _predictions(results: Results, options: Options) -> None:
    """Take the predictions that are there, or make them where the slide has an image and the model a head."""
    from stalign import tl

    adata, wanted = results.adata, options.genes
    there = _predicted_genes(adata)
    if not (there and (wanted is None or set(wanted) <= set(there))):
        if wanted is None and not _can_predict(results):
            return
        if Key.embedding("image") not in adata.obsm and wanted is not None:
            raise ValueError(
                f"genes={list(wanted)}: expression is predicted from histology, and this slide was embedded without an "
                "image. Leave out `genes`, or give the slide an image and embed it again."
            )
        tl.predict_expression(adata, _to_predict(results, wanted), model=results.model, layer=options.layer)
        results.predicted_made = True
        there = _predicted_genes(adata)
    if Key.var.PREDICTED_R in adata.var:
        results.correlations = adata.var[Key.var.PREDICTED_R].dropna().to_numpy(dtype=np.float64)
    results.genes = _shown_genes(results, there, wanted)


def _quality(results: Results, options: Options) -> None:
    """Measure how well the model knows this tissue where that is not known and the model can tell."""
    from stalign import tl

    adata = results.adata
    if any(key in adata.obs for key in QUALITY) or results.model is None:
        return
    try:
        tl.quality(adata, model=results.model, layer=options.layer)
    except (ValueError, KeyError, OSError) as error:
        # A model without statistics of its training spots, a slide that shares no genes with them, an image that moved.
        why = one_line(error).split(". ")[0].rstrip(".")
        results.note(f"How well the model knows this tissue is not said: {why}.")


def _can_predict(results: Results) -> bool:
    image = results.adata.obsm.get(Key.embedding("image"))
    return image is not None and results.model is not None and len(results.model.predicted_genes) > 0


def _to_predict(results: Results, wanted: tuple[str, ...] | None) -> list[str] | None:
    """All genes of the head for a slide of usual size, to say how the shown ones compare; a few for a large one."""
    if wanted is not None:
        return list(wanted)
    if results.adata.n_obs <= _ALL_GENES_SPOTS or results.model is None:
        return None
    measured = [gene for gene in results.model.predicted_genes if gene in results.adata.var_names]
    return most_variable(results, measured)[:DEFAULT_GENES] or list(results.model.predicted_genes[:DEFAULT_GENES])


def _predicted_genes(adata: AnnData) -> list[str]:
    record = adata.uns.get(Key.UNS, {}).get(Key.uns.PREDICTION, {})
    table = adata.obsm.get(Key.obsm.PREDICTED)
    own = [str(name) for name in table.columns] if isinstance(table, pd.DataFrame) else []
    if Key.layers.PREDICTED not in adata.layers:
        return own
    named = {str(gene) for gene in record.get("genes", ())}
    if Key.var.PREDICTED_R in adata.var:
        named |= set(adata.var_names[adata.var[Key.var.PREDICTED_R].notna()])
    return [*own, *[gene for gene in adata.var_names if gene in named and gene not in own]]


def _shown_genes(results: Results, there: list[str], wanted: tuple[str, ...] | None) -> list[str]:
    """Choose what is shown by how much it varies as measured, not by how well it is predicted."""
    adata = results.adata
    if wanted is not None:
        # What was asked for by an earlier symbol or an alias stands in the data under another name.
        return [gene for gene in wanted if gene in there] + [
            gene for gene in there if results.predicted_made and gene not in wanted
        ]
    if Key.var.PREDICTED_R in adata.var:
        there = list(adata.var_names[adata.var[Key.var.PREDICTED_R].notna()]) or there
    measured = [gene for gene in there if gene in adata.var_names]
    return most_variable(results, measured)[:DEFAULT_GENES] or there[:DEFAULT_GENES]


def log_counts(results: Results, columns: np.ndarray, rows: np.ndarray | None = None) -> Any:
    """Return log1p of counts per 10,000 of some genes, CSR (n, genes)."""
    from scipy import sparse

    counts = results.counts
    totals = np.asarray(library_size(counts), dtype=np.float64)
    part = counts[:, columns] if rows is None else counts[rows][:, columns]
    totals = totals if rows is None else totals[rows]
    scaled = sparse.diags(1e4 / np.maximum(totals, 1)) @ sparse.csr_matrix(part, dtype=np.float64)
    return sparse.csr_matrix(scaled).log1p()


def most_variable(results: Results, genes: Sequence[str]) -> list[str]:
    """Sort genes by the variance of their log-normalised counts, the largest first; empty without counts."""
    if results.counts is None or not genes:
        return []
    columns = results.adata.var_names.get_indexer(list(genes))
    values = log_counts(results, columns)
    mean = np.asarray(values.mean(axis=0)).ravel()
    variance = np.asarray(values.multiply(values).mean(axis=0)).ravel() - mean**2
    return [genes[i] for i in np.argsort(-variance, kind="stable")]


# --- marker genes ---------------------------------------------------------------------------------------------------


def marker_genes(results: Results) -> dict[str, list[tuple[str, float]]]:
    """Find for each domain the genes that are higher there than elsewhere: Welch's t-test on log-normalised counts.

    On at most 20,000 spots, drawn at random. Returns up to five genes a domain with their log2 fold change.
    """
    import scanpy as sc
    from anndata import AnnData

    adata = results.adata
    if results.counts is None or Key.obs.DOMAIN not in adata.obs:
        return {}
    rows = np.arange(adata.n_obs)
    if len(rows) > _MARKER_SPOTS:
        rows = np.sort(np.random.default_rng(0).choice(adata.n_obs, _MARKER_SPOTS, replace=False))
        results.note(f"Marker genes were worked out on {_MARKER_SPOTS:,} spots drawn at random.")
    domain = adata.obs[Key.obs.DOMAIN].iloc[rows].astype(str)
    sizes = domain.value_counts()
    groups = [name for name in adata.obs[Key.obs.DOMAIN].cat.categories if sizes.get(name, 0) >= 3]
    kept = domain.isin(groups).to_numpy()
    detected = np.asarray((results.counts[rows[kept]] > 0).sum(axis=0)).ravel()
    columns = np.flatnonzero(detected >= max(3, 0.01 * kept.sum()))
    if len(groups) < 2 or not len(columns):
        return {}
    small = AnnData(
        log_counts(results, columns, rows[kept]),
        obs=pd.DataFrame({"domain": pd.Categorical(domain[kept], categories=groups)}, index=domain.index[kept]),
        var=pd.DataFrame(index=adata.var_names[columns]),
    )
    small.uns["log1p"] = {}
    sc.tl.rank_genes_groups(small, "domain", method="t-test")
    ranked = small.uns["rank_genes_groups"]
    found: dict[str, list[tuple[str, float]]] = {}
    for name in groups:
        columns_of = zip(ranked["names"][name], ranked["logfoldchanges"][name], ranked["pvals_adj"][name], strict=True)
        best = [(str(gene), float(fold)) for gene, fold, p in columns_of if fold > 0 and p < _MARKER_P]
        found[str(name)] = best[:TOP_GENES]
    return found


# --- neighbourhoods -------------------------------------------------------------------------------------------------


def enrichment(adata: AnnData, column: str, rows: np.ndarray) -> tuple[list[str], np.ndarray] | None:
    """Compare how often names are neighbours with shuffled names: (names, z-scores), ``None`` where it cannot be said.

    Neighbours are the spots of a niche; :func:`squidpy.gr.nhood_enrichment` does the rest.
    """
    import squidpy as sq
    from anndata import AnnData
    from scipy import sparse

    values = adata.obs[column].iloc[rows].cat.remove_unused_categories()
    names = [str(name) for name in values.cat.categories]
    if find_niche_record(adata) is None or len(names) < 2 or len(rows) > _ENRICHMENT_SPOTS:
        return None
    graph = sparse.csr_matrix(niche_graph(adata)[rows][:, rows])
    graph = sparse.csr_matrix(graph - sparse.diags(graph.diagonal()))
    graph.eliminate_zeros()
    if graph.nnz == 0:
        return None
    bare = AnnData(obs=pd.DataFrame({"name": values.to_numpy()}, index=[str(i) for i in range(len(rows))]))
    bare.obs["name"] = bare.obs["name"].astype(pd.CategoricalDtype(names))
    bare.obsp["spatial_connectivities"] = graph
    with np.errstate(divide="ignore", invalid="ignore"):  # a pair that every shuffle counts alike has no z-score
        found = sq.gr.nhood_enrichment(
            bare, "name", n_perms=_SHUFFLES, seed=0, copy=True, n_jobs=1, show_progress_bar=False
        )
    return names, np.asarray(found[0], dtype=np.float64)


# --- what a reader must know ----------------------------------------------------------------------------------------


def _check(results: Results) -> None:
    for check in (_check_genes, _check_images, _check_scale, _check_spots, _check_names, _check_far, _check_origin):
        check(results)


def _check_genes(results: Results) -> None:
    genes = results.record.get("genes", {})
    used = list(results.record.get("modalities", ()))
    by_library = results.record.get("libraries", {})
    if genes and "coverage" in genes and float(genes["coverage"]) < LOW_COVERAGE:
        results.warn(
            f"Only {float(genes['coverage']):.0%} of the genes that the model knows were measured "
            f"({int(genes['n_covered']):,} of {int(genes['n_vocabulary']):,}): the gene side sees little."
        )
    if genes and int(genes.get("n_unmatched", 0)) > 0.5 * int(genes.get("n_names", 1)):
        results.warn(
            f"{int(genes['n_unmatched']):,} of {int(genes['n_names']):,} gene names were not recognised, such as "
            f"{', '.join(str(name) for name in list(genes['unmatched'])[:5])}."
        )
    if by_library and not any("gene" in entry["modalities"] for entry in by_library.values()):
        results.warn("There are no counts: everything here is read from the image alone.")
    elif used and "gene" not in used:
        results.note("The embedding was made without the counts, as asked.")
    if results.counts is not None:
        median = float(np.median(library_size(results.counts)))
        if median < 500:
            results.warn(
                f"Half of the spots have fewer than {median:,.0f} counts: single genes are noise at this depth."
            )


def _check_images(results: Results) -> None:
    entries = results.niche.get("libraries", {})
    without = [name for name, entry in entries.items() if entry["image"] == "none"]
    if without and len(without) == len(entries):
        results.warn("There is no image: everything here is read from the counts alone, and nothing is predicted.")
    elif without:
        results.warn(f"No image for {', '.join(without)}: read from the counts alone.")
    for name, entry in entries.items():
        if entry["image"] != "none" and not results.has_image(name):
            results.warn(
                f"The image of {name} that the embedding was made from is gone"
                + (f": {entry['image_path']}." if entry["image"] == "path" else " from the file.")
            )
    spot_um, pixels = results.record.get("spot_um"), results.record.get("spot_pixels")
    for name, entry in entries.items():
        if entry["image"] == "none" or not spot_um or not pixels:
            continue
        has, needs = float(entry["mpp"]) / float(entry["image_scale"]), float(spot_um) / float(pixels)
        if has > 1.1 * needs:
            results.warn(
                f"The image of {name} has {has:.2g} µm per pixel, the model looks at {needs:.2g}: its patches are "
                "enlarged and blurred. Pass the full-resolution image if there is one."
            )
    key = str(results.niche.get("params", {}).get("key_added", "niche"))
    inside = results.adata.obs.get(Key.niche_in_image(key))
    if inside is not None and results.niche:
        out = inside.to_numpy(dtype=np.float64)
        with_image = ~np.isin(_library_of(results), without)
        beyond = int((out[with_image] < 1).sum())
        if (out[with_image] <= 0).any():
            results.warn(f"Spots whose niche lies outside the image: {int((out[with_image] <= 0).sum()):,}.")
        if beyond:
            results.note(
                f"Niches that reach beyond the image: {beyond:,} of {int(with_image.sum()):,}. What is missing is "
                "filled with the colour of the background."
            )


def _library_of(results: Results) -> np.ndarray:
    codes, names = recorded_libraries(results.adata)
    return np.asarray(names, dtype=object)[codes]


def _check_scale(results: Results) -> None:
    from stalign.slide._scale import SPOT_DIAMETER_TOLERANCE, TOLERANCE

    for name, entry in results.niche.get("libraries", {}).items():
        for source, mpp in entry.get("mpp_candidates", {}).items():
            tolerance = SPOT_DIAMETER_TOLERANCE if source == "spot_diameter" else TOLERANCE
            if abs(float(mpp) / float(entry["mpp"]) - 1) > tolerance:
                results.warn(
                    f"Two sources of the scale of {name} differ: {SOURCES[str(entry['mpp_source'])]} gives "
                    f"{float(entry['mpp']):.4g} µm per pixel (used), {SOURCES.get(source, source)} {float(mpp):.4g}."
                )


SOURCES: Final = {
    "user": "what was passed",
    "pitch": "the distance between spots",
    "microns_per_pixel": "Space Ranger's scale",
    "image": "the image file's metadata",
    "spot_diameter": "the nominal spot diameter",
}


def _check_spots(results: Results) -> None:
    _, counts = np.unique(_library_of(results), return_counts=True) if results.niche else ([], np.array([9999]))
    if counts.min() < _FEW_SPOTS:
        results.warn(
            f"A library has {counts.min()} spots: what is relative to its own slide (names, predictions, domains) is "
            "shaky with so few."
        )
    if Key.obsm.EMBEDDING in results.adata.obsm and not results.record:
        results.warn("Nothing is recorded about how the embedding was made.")


def _check_names(results: Results) -> None:
    if not results.has_names:
        return
    from stalign.pl._colours import UNASSIGNED

    share = float((results.adata.obs[Key.obs.ANNOTATION].astype(str) == UNASSIGNED).mean())
    if share > 0.25:
        results.note(f"{share:.0%} of the spots stayed without a name.")


def _check_far(results: Results) -> None:
    far = results.adata.obs.get(QUALITY[0])
    if far is None:
        return
    known = far.to_numpy(dtype=np.float64)
    known = known[np.isfinite(known)]
    share = float((known > _FAR).mean()) if len(known) else 0.0
    if share > _FAR_SHARE:
        results.warn(
            f"{share:.0%} of the spots are unlike what the model was trained on: farther from it than 99 of 100 "
            "training spots. Look at the map under Quality before you rely on the rest."
        )


def _check_origin(results: Results) -> None:
    if bool(results.adata.uns.get("synthetic", False)):
        results.note("This slide is synthetic: it was generated, and is no patient's tissue.")
    if str(results.record.get("package_version", "")) not in ("", _version()):
        results.note(
            f"The embedding was made by stalign {results.record['package_version']}, this report by {_version()}."
        )


def _version() -> str:
    from stalign import __version__

    return __version__


def check_genes(genes: Any) -> tuple[str, ...] | None:
    """Return the genes that were asked for as a tuple."""
    if genes is None:
        return None
    wanted = (genes,) if isinstance(genes, str) else tuple(str(gene) for gene in genes)
    if not wanted:
        raise ValueError("genes is empty: name at least one gene, or leave it out.")
    return tuple(dict.fromkeys(wanted))
