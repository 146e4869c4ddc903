"""Run a model over the spots of an AnnData, without writing to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stalign._logging import logger
from stalign._validate import check_choice, listing, require_key
from stalign.genes import GeneMatch, check_counts
from stalign.genes._rows import CountRows
from stalign.slide._library import PatchReader, niche_graph, niche_record
from stalign.slide._plan import tile_order
from stalign.tl._expression import Expression
from stalign.tl._fingerprint import fingerprint
from stalign.tl._forward import Batch, run_passes
from stalign.tl._runtime import ModelIdentity, auto_batch_size, auto_workers, identify, inference
from stalign.tl._sinks import MemorySink, Sink
from stalign.tl._working import NicheArguments, WorkingCopy, working_copy

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

    from stalign.models import Geometry, STAlign

MODALITIES = ("image", "gene")

OpenSink = Callable[[Mapping[str, str], bool], "Sink | None"]
"""From the fingerprint, and whether some rows will be missing, to the sink; ``None`` if all is there already."""


class Run(NamedTuple):
    """How the forward passes are made; ``None`` is what suits the model and the device."""

    device: torch.device
    amp: str
    batch_size: int | None
    num_workers: int | None
    progress: bool
    dtype: str = "float32"


class Embedded(NamedTuple):
    """Matrices by name of the output, the record for ``uns``, and the working copy with the niches.

    The matrices are empty where they went elsewhere.
    """

    matrices: dict[str, np.ndarray]
    record: dict[str, Any]
    working: WorkingCopy


def compute_embedding(
    adata: AnnData,
    model: STAlign,
    *,
    modalities: Sequence[str],
    outputs: Sequence[str],
    niches: NicheArguments,
    layer: str | None,
    gene_symbols: str | None,
    organism: str | None,
    run: Run,
    open_sink: OpenSink | None = None,
) -> Embedded:
    """Embed every spot; see :func:`stalign.tl.embed`. ``adata`` is not changed."""
    raw = raw_counts(adata, layer) if "gene" in modalities else None
    working = working_copy(adata, model.geometry, niches, use_image="image" in modalities)
    with ExitStack() as stack:
        reader = stack.enter_context(PatchReader(working.adata))
        has_image = reader.has_image if "image" in modalities else np.zeros(adata.n_obs, dtype=bool)
        match = match_genes(adata, model, raw, gene_symbols, organism, any_image=bool(has_image.any()))
        check_something(adata, reader, has_image, match, modalities)
        identity = identify(model)
        order = _plan(reader, model.geometry, use_image=bool(has_image.any()))
        sink: Sink | None
        if open_sink is None:
            sink = memory = MemorySink(adata.n_obs, run.dtype)
        else:
            memory = None
            of_what = fingerprint(
                adata,
                working.adata,
                reader,
                identity=identity,
                encoders=_describe_encoders(model),
                how=(run.device.type, run.amp, run.dtype),
                what=(*modalities, *outputs),
                raw=raw,
                match=match,
                order=order,
            )
            sink = open_sink(of_what, bool(has_image.any() and not has_image.all()))
        colours = _colours(model, reader) if has_image.any() else {}
        if sink is not None and sink.done < adata.n_obs:
            expression = None
            if match is not None:
                counts = stack.enter_context(CountRows(raw, match))
                graph = niche_graph(working.adata)
                expression = Expression(model, counts, graph, reader.codes, reader.coordinates)
            _embed(model, reader, order, has_image, expression, colours, outputs, run, sink)
    record = {
        **_describe_model(model, identity, run),
        "modalities": [name for name, used in (("image", has_image.any()), ("gene", match is not None)) if used],
        "outputs": list(outputs),
        "layer": layer or "",
        "gene_symbols": gene_symbols or "",
        "organism": organism or "",
        "input_transform": "" if match is None else _transform(model, layer),
        "genes": {} if match is None else match.report(),
        **_describe_libraries(working.adata, reader, has_image, match is not None, colours),
    }
    matrices = {} if memory is None else memory.matrices
    return Embedded({name: matrices[name] for name in outputs if name in matrices}, record, working)


# --- what there is -----------------------------------------------------------------------------------------------


def raw_counts(adata: AnnData, layer: str | None) -> Any:
    """Return the checked raw counts; ``None`` if the AnnData has none."""
    if layer is not None:
        counts, name = require_key(adata.layers, layer, where="adata.layers"), f"adata.layers[{layer!r}]"
    else:
        counts, name = adata.X, "adata.X"
    if counts is None or adata.n_vars == 0:
        return None
    check_counts(counts, name=name)
    return counts


def match_genes(
    adata: AnnData, model: STAlign, raw: Any, gene_symbols: str | None, organism: str | None, *, any_image: bool
) -> GeneMatch | None:
    """Match the genes; ``None`` where the slide has to do without, which it can if it has an image."""
    from stalign.genes._match import ORGANISMS
    from stalign.pp._genes import resolve_genes

    if organism is not None:
        check_choice("organism", organism, ORGANISMS)
    if raw is None:
        return None
    if not model.genes:
        raise ValueError(
            f"Model {model.config.name!r} has no vocabulary, so that counts mean nothing to it. Pass "
            "`modalities=('image',)`, or make the model with `genes=...`."
        )
    try:
        return resolve_genes(adata, model.genes, gene_symbols=gene_symbols, organism=organism)
    except ValueError:
        if not any_image or _covers_any(adata, model, gene_symbols, organism):
            raise
    logger.warning(
        "None of the %d genes is in the model's vocabulary (the first: %s): embedded from the image alone.",
        adata.n_vars,
        listing(adata.var_names, 3),
    )
    return None


def _covers_any(adata: AnnData, model: STAlign, gene_symbols: str | None, organism: str | None) -> bool:
    """Whether at least one gene is in the vocabulary, be it below the floor."""
    from stalign.pp._genes import resolve_genes

    try:
        resolve_genes(adata, model.genes, gene_symbols=gene_symbols, organism=organism, min_genes=1, min_coverage=0.0)
    except ValueError:
        return False
    return True


def check_something(
    adata: AnnData, reader: PatchReader, has_image: np.ndarray, match: GeneMatch | None, modalities: Sequence[str]
) -> None:
    """Refuse spots that have neither of the modalities asked for."""
    if match is not None or has_image.all():
        return
    without = [name for code, name in enumerate(reader.libraries) if not has_image[reader.codes == code].all()]
    no_counts = f"no counts (`adata.X` is empty: {adata.n_obs} spots × {adata.n_vars} genes)"
    if not has_image.any():
        no_image = f"no image (`adata.uns['spatial']` has none for {listing(without)})"
        if "gene" not in modalities:
            raise ValueError(
                f"modalities=('image',), but there is {no_image}. Pass `image=...`, or leave the genes in: "
                "`modalities=('image', 'gene')`."
            )
        if "image" not in modalities:
            raise ValueError(
                f"modalities=('gene',), but there are {no_counts}. Pass `layer=...`, or `modalities=('image',)`."
            )
        raise ValueError(
            f"Nothing to embed: there is {no_image} and there are {no_counts}. Pass `image=...`, or put raw counts "
            "into `adata.X` or a layer (`layer=...`)."
        )
    raise ValueError(
        f"Libraries {listing(without)} have no image, and genes are not used "
        f"({'not among `modalities`' if 'gene' not in modalities else 'there are none'}), so that their spots cannot "
        "be embedded. Pass `image={library: image}`, or leave these libraries out."
    )


def _colours(model: STAlign, reader: PatchReader) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if model.config.colour != "library":
        return {}
    return reader.colours(model.geometry.spot_um, model.geometry.spot_pixels)


# --- the forward passes ------------------------------------------------------------------------------------------


def _plan(reader: PatchReader, geometry: Geometry, *, use_image: bool) -> np.ndarray:
    """Return all spots, library by library, those on the same tiles of an image together.

    The order does not depend on the size of a batch: interrupted work goes on in it with batches of any size.
    """
    if use_image:
        return reader.order([(geometry.spot_um, geometry.spot_pixels), (geometry.niche_um, geometry.niche_pixels)])
    parts = [np.flatnonzero(reader.codes == code) for code in range(len(reader.libraries))]
    return np.concatenate([here[tile_order(None, reader.coordinates[here], ())] for here in parts if len(here)])


def _plan_batches(reader: PatchReader, has_image: np.ndarray, batch_size: int, order: np.ndarray) -> list[Batch]:
    """Cut the order of the spots into batches of one library."""
    batches = []
    for part in np.split(order, np.flatnonzero(np.diff(reader.codes[order])) + 1) if len(order) else ():
        library, with_image = reader.libraries[reader.codes[part[0]]], bool(has_image[part[0]])
        batches += [
            Batch(part[start : start + batch_size], library, with_image) for start in range(0, len(part), batch_size)
        ]
    return batches


def _embed(
    model: STAlign,
    reader: PatchReader,
    order: np.ndarray,
    has_image: np.ndarray,
    expression: Expression | None,
    colours: dict[str, tuple[np.ndarray, np.ndarray]],
    outputs: Sequence[str],
    run: Run,
    sink: Sink,
) -> None:
    from tqdm.auto import tqdm

    workers = auto_workers(model, run.device) if run.num_workers is None else run.num_workers
    with (
        inference(model, run.device, run.amp, workers=workers) as network,
        tqdm(total=len(order), initial=sink.done, unit="spot", desc="stalign", disable=not run.progress) as bar,
    ):
        batch_size = run.batch_size or auto_batch_size(
            model, run.device, image=bool(has_image.any()), genes=expression is not None
        )
        run_passes(
            model,
            network,
            reader,
            _plan_batches(reader, has_image, batch_size, order[sink.done :]),
            expression,
            colours,
            outputs=outputs,
            device=run.device,
            num_workers=workers,
            sink=sink,
            advance=bar.update,
        )


# --- the record --------------------------------------------------------------------------------------------------


def _describe_model(model: STAlign, identity: ModelIdentity, run: Run) -> dict[str, Any]:
    import stalign

    geometry = model.geometry
    return {
        "model": identity.name,
        "revision": identity.revision,
        "sha256": identity.sha256,
        "model_source": identity.source,
        "encoders": _describe_encoders(model),
        "package_version": stalign.__version__,
        "device": str(run.device),
        "dtype": {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[run.amp],
        "n_neighbors": int(geometry.n_neighbors),
        "spot_um": float(geometry.spot_um),
        "niche_um": float(geometry.niche_um),
        "spot_pixels": int(geometry.spot_pixels),
        "niche_pixels": int(geometry.niche_pixels),
        "colour": model.config.colour,
    }


def _describe_encoders(model: STAlign) -> dict[str, str]:
    """Branch → SHA-256 of its encoder's pretrained weights, where they are not those of the model's own file."""
    from stalign.models._config import BRANCHES

    origins = {name: model.encoder(name).provenance for name in BRANCHES}
    own = model.provenance.sha256
    return {name: origin.sha256 for name, origin in origins.items() if origin is not None and origin.sha256 != own}


def _transform(model: STAlign, layer: str | None) -> str:
    where = "X" if layer is None else f"layers[{layer!r}]"
    spot, niche = model.config.spot_gene.encoder, model.config.niche_gene.encoder
    return f"raw counts of {where}, summed by vocabulary gene; spots: {spot}, niches: {niche}"


def _describe_libraries(
    light: AnnData,
    reader: PatchReader,
    has_image: np.ndarray,
    use_genes: bool,
    colours: dict[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    entries = niche_record(light)["libraries"]
    libraries = {}
    for code, name in enumerate(reader.libraries):
        here = reader.codes == code
        with_image = bool(has_image[here].any())
        libraries[name] = {
            "n_spots": int(here.sum()),
            "mpp": float(entries[name]["mpp"]),
            "modalities": [side for side, used in (("image", with_image), ("gene", use_genes)) if used],
        }
        if name in colours:
            libraries[name] |= {"colour_mean": colours[name][0], "colour_std": colours[name][1]}
    return {"mpp": {name: entry["mpp"] for name, entry in libraries.items()}, "libraries": libraries}
