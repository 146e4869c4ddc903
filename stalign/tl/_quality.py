"""How far a spot is from what the model knows, and how well its image and its genes agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import check_adata, listing
from stalign.genes._rows import CountRows
from stalign.slide._appearance import tissue_share
from stalign.slide._colour import spread_over_slide
from stalign.slide._library import PatchReader, niche_graph
from stalign.tl._slots import describe, embed_record, present, recorded_model, unit_rows
from stalign.tl._working import NicheArguments, WorkingCopy, working_copy

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from stalign.genes import GeneMatch
    from stalign.models import STAlign
    from stalign.models._familiarity import Familiarity, SectionSample

DEFAULT_MODEL = "stalign-mini"
_SIDES = ("image", "gene")
# Spots whose counts or patches are held at once.
_COUNT_ROWS = 4096
_PATCH_ROWS = 1024
# Mismatched pairs of a spot: with all spots of its library, or with so many of them.
_MAX_PAIRS = 4096
_PAIR_ROWS = 1024
# Spots of a reference that statistics are taken from.
_REFERENCE_SPOTS = 1000


class _Slide(NamedTuple):
    """What of a slide is looked at; ``counts`` and ``match`` are ``None`` without counts."""

    working: WorkingCopy
    reader: PatchReader
    counts: CountRows | None
    graph: csr_matrix


class _Result(NamedTuple):
    """(n,) float32 columns of ``obs`` by their name, and what goes into ``uns``."""

    columns: dict[str, np.ndarray]
    params: dict[str, Any]


def quality(
    adata: AnnData,
    *,
    model: str | Path | STAlign | None = None,
    reference: AnnData | Sequence[AnnData] | None = None,
    modalities: Sequence[str] = _SIDES,
    layer: str | None = None,
    library_key: str | None = None,
    use_rep: str = Key.obsm.EMBEDDING,
    key_added: str = Key.QUALITY,
    copy: bool = False,
) -> AnnData | None:
    """Measure how far each spot is from what the model knows, and whether its image and genes belong together.

    Three questions, one column each:

    - *Has the model seen the like?* The spot's and its niche's log-normalised expression is compared with the mean and
      the leading components of the training spots, over the genes that both have, and the spot's patch by its colours,
      stain direction and texture. All of it is absolute, not relative to the slide, so that a foreign slide shows.
    - *Do image and genes agree?* The cosine of the spot's own pair of embeddings, among those of the slide's mismatched
      pairs.
    - *Is there tissue?* The share of the spot's patch that is not glass.

    What is missing for this (niches, embeddings) is worked out here and not kept; run :func:`stalign.tl.embed` first to
    have it.

    Parameters
    ----------
    adata
        Spots with raw counts, an image, or both; in memory or backed.
    model
        What :func:`stalign.tl.embed` takes. ``None`` is the model that embedded the spots, else ``"stalign-mini"``.
    reference
        One or several AnnData that count as known in place of the model's training spots: slides of the tissue and the
        technology that are expected. Needed for a model that was saved without statistics. A column ``patient`` in
        their ``obs`` tells which of them belong together.
    modalities
        What to use of what is there.
    layer
        Layer with the raw counts, also of the reference; ``None`` is the one that was embedded, else ``X``.
    library_key
        Column of ``obs`` that names each spot's library; ``None`` is what the niches were made with.
    use_rep
        ``key_added`` of :func:`stalign.tl.embed`.
    key_added
        Prefix of the slots written.
    copy
        Return a new object instead of writing to ``adata``.

    Returns
    -------
    ``None``, or with ``copy=True`` a new AnnData, with float32 columns

    - ``obs["stalign_ood"]``: -log₁₀ of the share of held-out training spots that are as far, genes and image taken
      together: 1 is one spot in ten, 2 one in a hundred, and so on, by a normal tail beyond what was seen. Half of the
      held-out spots are of patients that were left out of the statistics, so that an ordinary slide of a new patient
      has values below 1
    - ``obs["stalign_ood_gene"]``, ``obs["stalign_ood_image"]``: the same of one side; NaN without it
    - ``obs["stalign_agreement"]``: the share of the slide's mismatched pairs (the spot's image with other spots' genes,
      and the other way round) that agree less than the spot's own pair; 0.5 by chance, NaN without both sides
    - ``obs["stalign_tissue"]``: share of the spot patch that is tissue rather than glass; NaN without an image
    - ``uns["stalign"]["quality"]``: parameters, model, number of shared genes, and medians per library

    Raises
    ------
    ValueError
        If the model has no statistics and no ``reference`` is passed, if the slide shares too few genes with them, and
        for slides with neither image nor counts.
    KeyError
        If a layer or a column is not there.

    Notes
    -----
    The score says that a spot is unlike the training spots, not that something is wrong with it: a healthy tissue that
    the model was not trained on is far, too.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.tl.quality(adata)  # doctest: +SKIP
    >>> adata.obs[["stalign_ood", "stalign_agreement", "stalign_tissue"]].describe()  # doctest: +SKIP
    """
    from stalign._validate import check_choices

    check_adata(adata)
    modalities = check_choices("modalities", modalities, _SIDES)
    network = _network(adata, model, use_rep)
    record = embed_record(adata, use_rep)
    if layer is None:
        layer = str(record.get("layer", "")) or None
    known = _known(network, reference, layer, record)
    with ExitStack() as stack:
        slide, match = _open(stack, adata, network, modalities, layer, library_key, record)
        result = _measure(adata, slide, match, network, known, modalities, use_rep, layer, record)
    params = {**result.params, "reference": "training spots" if reference is None else "passed", "key_added": key_added}

    out = adata.copy() if copy else adata
    _write(out, _Result(result.columns, params), key_added)
    return out if copy else None


# --- what is known ------------------------------------------------------------------------------------------------


def _network(adata: AnnData, model: Any, use_rep: str) -> STAlign:
    from stalign.tl._runtime import resolve_model

    record = embed_record(adata, use_rep)
    if model is None and record:
        return recorded_model(adata, None, use_rep)
    return resolve_model(DEFAULT_MODEL if model is None else model)


def _known(network: STAlign, reference: Any, layer: str | None, record: Mapping[str, Any]) -> Familiarity:
    """Return the statistics that spots are compared with."""
    from anndata import AnnData

    from stalign.models._familiarity import fit_familiarity

    if reference is None:
        if network.familiarity is None:
            raise ValueError(
                f"Model {network.config.name!r} was saved without statistics of its training spots. Pass "
                "`reference=...`, slides that count as known, or add them once by "
                "`sta.train.add_familiarity(model, sections, out)`."
            )
        return network.familiarity
    slides = [reference] if isinstance(reference, AnnData) else list(reference)
    if not slides:
        raise ValueError("reference is empty: pass at least one AnnData.")
    samples: list[SectionSample] = []
    for number, slide in enumerate(slides):
        check_adata(slide)
        samples += _sample(slide, network, layer, record, f"reference {number}")
    known = fit_familiarity(samples)
    if known is None:
        raise ValueError(
            f"The {len(slides)} references have neither an image nor enough counts of the model's genes to be compared "
            "with."
        )
    return known


def _sample(
    adata: AnnData, network: STAlign, layer: str | None, record: Mapping[str, Any], name: str
) -> Iterator[SectionSample]:
    """Yield what statistics are taken from, library by library."""
    from stalign.models._familiarity import SectionSample

    with ExitStack() as stack:
        slide, _ = _open(stack, adata, network, _SIDES, layer, None, record)
        reader = slide.reader
        for code, library in enumerate(reader.libraries):
            here = np.flatnonzero(reader.codes == code)
            if not len(here):
                continue
            rows = here[np.sort(spread_over_slide(reader.coordinates[here], _REFERENCE_SPOTS))]
            spot = niche = measured = None
            if slide.counts is not None:
                spot, niche = _counts_of(slide.counts, slide.graph, rows)
                measured = _measured(slide.counts, here)
            yield SectionSample(
                patient=_patient(adata, here) or f"{name}, {library}",
                spot=spot,
                niche=niche,
                measured=measured,
                patches=_patches(reader, network, rows) if reader.has_image[here[0]] else None,
            )


def _patient(adata: AnnData, rows: np.ndarray) -> str:
    if "patient" not in adata.obs:
        return ""
    names = adata.obs["patient"].iloc[rows].dropna().astype(str).unique()
    return str(names[0]) if len(names) == 1 else ""


# --- what there is ------------------------------------------------------------------------------------------------


def _open(
    stack: ExitStack,
    adata: AnnData,
    network: STAlign,
    modalities: Sequence[str],
    layer: str | None,
    library_key: str | None,
    record: Mapping[str, Any],
) -> tuple[_Slide, GeneMatch | None]:
    from stalign.tl._compute import check_something, match_genes, raw_counts

    raw = raw_counts(adata, layer) if "gene" in modalities else None
    working = working_copy(
        adata, network.geometry, NicheArguments(library_key=library_key), use_image="image" in modalities
    )
    reader = stack.enter_context(PatchReader(working.adata))
    if "image" not in modalities:
        reader.has_image = np.zeros(adata.n_obs, dtype=bool)
    match = match_genes(
        adata,
        network,
        raw,
        str(record.get("gene_symbols", "")) or None,
        str(record.get("organism", "")) or None,
        any_image=bool(reader.has_image.any()),
    )
    check_something(adata, reader, reader.has_image, match, modalities)
    counts = None if match is None else stack.enter_context(CountRows(raw, match))
    return _Slide(working, reader, counts, niche_graph(working.adata)), match


def _blocks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _counts_of(counts: CountRows, graph: csr_matrix, rows: np.ndarray) -> tuple[csr_matrix, csr_matrix]:
    """Return the counts of some spots, and the sums over their niches."""
    from scipy.sparse import csr_matrix

    from stalign.models._familiarity import neighbour_sum

    part = graph[rows]
    spots = np.union1d(part.indices, rows)
    values = counts(spots)
    columns = np.searchsorted(spots, part.indices).astype(np.int32)
    within = csr_matrix((part.data, columns, part.indptr), shape=(len(rows), len(spots)))
    return values[np.searchsorted(spots, rows)], neighbour_sum(within, values)


def _measured(counts: CountRows, rows: np.ndarray) -> np.ndarray:
    """(n_vocabulary,) bool: genes of which a library has a count. One that was joined to others may lack many."""
    found = np.zeros(counts.shape[1], dtype=bool)
    for block in _blocks(rows, _COUNT_ROWS):
        found[np.unique(counts(block).indices)] = True
    return found


def _patches(reader: PatchReader, network: STAlign, rows: np.ndarray) -> np.ndarray:
    return reader.read(rows, network.geometry.spot_um, network.geometry.spot_pixels)


# --- the measures -------------------------------------------------------------------------------------------------


def _measure(
    adata: AnnData,
    slide: _Slide,
    match: GeneMatch | None,
    network: STAlign,
    known: Familiarity,
    modalities: Sequence[str],
    use_rep: str,
    layer: str | None,
    record: Mapping[str, Any],
) -> _Result:
    from stalign.models._familiarity import joined_tail, tail

    reader = slide.reader
    distance = {side: np.full(adata.n_obs, np.nan) for side in _SIDES}
    tissue = np.full(adata.n_obs, np.nan, dtype=np.float32)
    libraries: dict[str, dict[str, Any]] = {}
    for code, library in enumerate(reader.libraries):
        here = np.flatnonzero(reader.codes == code)
        if not len(here):
            continue
        libraries[library] = {"n_spots": len(here)}
        if slide.counts is not None and known.knows_genes:
            libraries[library]["n_shared_genes"] = _gene_side(slide, known, here, library, distance["gene"])
        if reader.has_image[here[0]]:
            _image_side(reader, network, known, here, library, distance["image"], tissue)
    if np.isnan(distance["gene"]).all() and np.isnan(distance["image"]).all():
        raise ValueError(
            "Nothing can be compared: the statistics are of "
            f"{'genes' if known.knows_genes else 'images'}, which the slide lacks. Pass `reference=...` "
            "slides that have what this one has."
        )
    tails = {side: tail(values) for side, values in distance.items()}
    columns = {
        "ood": joined_tail(list(tails.values())),
        **{f"ood_{side}": values for side, values in tails.items()},
        "agreement": _agreement(adata, slide, network, use_rep, layer, modalities, record, match),
        "tissue": tissue,
    }
    columns = {name: values.astype(np.float32) for name, values in columns.items()}
    for library, entry in libraries.items():
        rows = reader.codes == reader.libraries.index(library)
        for name, values in columns.items():
            there = values[rows & ~np.isnan(values)]
            if len(there):
                entry[f"median_{name}"] = float(np.median(there))
    params = {"modalities": list(modalities), "layer": layer or "", "libraries": libraries, **_model_params(network)}
    return _Result(columns, params)


def _model_params(network: STAlign) -> dict[str, str]:
    from stalign.tl._runtime import identify

    identity = identify(network)
    return {"model": identity.name, "sha256": identity.sha256}


def _gene_side(slide: _Slide, known: Familiarity, rows: np.ndarray, library: str, out: np.ndarray) -> int:
    """Fill in the distances of a library's expression, and return the number of genes they are over."""
    from stalign.models._familiarity import MIN_GENES

    counts = slide.counts
    if counts is None:
        return 0
    measured = _measured(counts, rows)
    shared = known.n_shared(measured)
    if shared < MIN_GENES:
        if not slide.reader.has_image[rows[0]] or not known.knows_images:
            raise ValueError(
                f"Library {library!r} has counts of {shared} of the {known.config.n_genes} genes that spots are "
                f"compared by; at least {MIN_GENES} are needed. Pass `reference=...` slides with the same genes, "
                "or check the gene names with `sta.pp.match_genes`."
            )
        logger.warning("Library %r shares %d genes with what is known: its genes are not compared.", library, shared)
        return shared
    for block in _blocks(rows, _COUNT_ROWS):
        out[block] = known.gene_distance(*_counts_of(counts, slide.graph, block), measured)
    return shared


def _image_side(
    reader: PatchReader,
    network: STAlign,
    known: Familiarity,
    rows: np.ndarray,
    library: str,
    out: np.ndarray,
    tissue: np.ndarray,
) -> None:
    """Fill in the distances of a library's pixels, and the share of tissue."""
    background = tuple(int(value) for value in reader.opened(library).background)
    for block in _blocks(rows, _PATCH_ROWS):
        patches = _patches(reader, network, block)
        if known.knows_images:
            out[block] = known.image_distance(patches)
        tissue[block] = tissue_share(patches, background)  # type: ignore[arg-type]


def _agreement(
    adata: AnnData,
    slide: _Slide,
    network: STAlign,
    use_rep: str,
    layer: str | None,
    modalities: Sequence[str],
    record: Mapping[str, Any],
    match: GeneMatch | None,
) -> np.ndarray:
    result = np.full(adata.n_obs, np.nan)
    if match is None or not slide.reader.has_image.any():
        return result
    image, gene = _aligned_pair(adata, network, use_rep, layer, slide, record)
    there = present(image) & present(gene)
    for code in np.unique(slide.reader.codes[there]):
        rows = np.flatnonzero((slide.reader.codes == code) & there)
        result[rows] = pair_agreement(image[rows], gene[rows], slide.reader.coordinates[rows])
    return result


def _aligned_pair(
    adata: AnnData, network: STAlign, use_rep: str, layer: str | None, slide: _Slide, record: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the aligned embeddings: those that are there, or made on the fly."""
    from stalign.tl._compute import compute_embedding
    from stalign.tl._embed import make_run
    from stalign.tl._runtime import identify

    names = [Key.embedding(side, use_rep) for side in _SIDES]
    if record and str(record["sha256"]) == identify(network).sha256 and all(name in adata.obsm for name in names):
        image, gene = (np.asarray(adata.obsm[name], dtype=np.float32) for name in names)
        return image, gene
    if record:
        logger.info("The embedding of %s does not hold both sides of this model: they are made.", describe(record))
    params = slide.working.adata.uns[Key.UNS][Key.uns.NICHE]["params"]
    made = compute_embedding(
        adata,
        network,
        modalities=_SIDES,
        outputs=_SIDES,
        niches=NicheArguments(library_key=str(params["library_key"]) or None),
        layer=layer,
        gene_symbols=str(record.get("gene_symbols", "")) or None,
        organism=str(record.get("organism", "")) or None,
        run=make_run(),
    ).matrices
    return made["image"], made["gene"]


def pair_agreement(image: np.ndarray, gene: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Share of a slide's mismatched pairs that agree less than each spot's own pair.

    The cosine of a spot's image and genes is compared with those of its image and other spots' genes, and of its genes
    and other spots' images; ties count half.

    Parameters
    ----------
    image, gene
        (n, d) aligned embeddings.
    coordinates
        (n, 2) positions: of more than 4,096 spots, as many spread over the slide are paired with.

    Returns
    -------
    (n,) float64 between 0 and 1; NaN for a single spot.
    """
    n = len(image)
    if n < 2:
        return np.full(n, np.nan)
    image, gene = (unit_rows(values.astype(np.float32)) for values in (image, gene))
    own = np.einsum("ij,ij->i", image, gene)
    others = np.sort(spread_over_slide(coordinates, _MAX_PAIRS))
    result = np.empty(n)
    for rows in _blocks(np.arange(n), _PAIR_ROWS):
        mismatched = rows[:, None] != others
        less = np.zeros(len(rows))
        for query, keys in ((image, gene), (gene, image)):
            cosine = query[rows] @ keys[others].T
            # The same product may differ in its last bits.
            gap = own[rows, None] - cosine
            less += ((gap > 1e-6) * mismatched).sum(axis=1) + 0.5 * ((np.abs(gap) <= 1e-6) & mismatched).sum(axis=1)
        result[rows] = less / (2 * mismatched.sum(axis=1))
    return result


# --- writing ------------------------------------------------------------------------------------------------------


def _write(adata: AnnData, result: _Result, key_added: str) -> None:
    names = [Key.quality(what, key_added) for what in result.columns]
    for name, values in zip(names, result.columns.values(), strict=True):
        adata.obs[name] = values
    adata.uns[Key.UNS] = {**adata.uns.get(Key.UNS, {}), Key.uns.QUALITY: result.params}
    logger.info(
        "Added %s, `uns['%s']['%s']`.", listing([f"obs: {name}" for name in names], 9), Key.UNS, Key.uns.QUALITY
    )
