"""Run a model over the spots of an AnnData, without writing to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stalign._logging import logger
from stalign._validate import check_choice, listing, require_key
from stalign.genes import GeneMatch, aggregate, check_counts, row_normalise
from stalign.slide._library import PatchReader, niche_graph, niche_record
from stalign.tl._runtime import ModelIdentity, identify, inference, is_out_of_memory
from stalign.tl._working import NicheArguments, WorkingCopy, working_copy

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

    from stalign.models import STAlign

MODALITIES = ("image", "gene")


class Run(NamedTuple):
    """How the forward passes are made."""

    device: torch.device
    amp: str
    batch_size: int
    num_workers: int
    progress: bool


class Embedded(NamedTuple):
    """Matrices by name of the output, the record for ``uns``, and the working copy with the niches."""

    matrices: dict[str, np.ndarray]
    record: dict[str, Any]
    working: WorkingCopy


class _Genes(NamedTuple):
    """Inputs of the two gene encoders, (n, input_dim) float32 each."""

    match: GeneMatch
    spot: np.ndarray
    niche: np.ndarray


class _Batch(NamedTuple):
    """Positions of spots of one library that go through the model together."""

    spots: np.ndarray
    library: str
    with_image: bool


class _Pixels(NamedTuple):
    spot: np.ndarray
    niche: np.ndarray


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
) -> Embedded:
    """Embed every spot; see :func:`stalign.tl.embed`. ``adata`` is not changed."""
    raw = _counts(adata, layer) if "gene" in modalities else None
    working = working_copy(adata, model.geometry, niches, use_image="image" in modalities)
    with PatchReader(working.adata) as reader:
        has_image = reader.has_image if "image" in modalities else np.zeros(adata.n_obs, dtype=bool)
        match = _match(adata, model, raw, gene_symbols, organism, any_image=bool(has_image.any()))
        _check_something(adata, reader, has_image, match, modalities)
        colours = _colours(model, reader) if has_image.any() else {}
        batches = _plan_batches(reader, has_image, run.batch_size)
        with inference(model, run.device, run.amp):
            # A gene encoder may run a network of its own here (scGPT does), on the device and in the precision asked
            # for.
            genes = None if match is None else _gene_inputs(model, raw, match, working.adata, reader.codes)
            matrices = _forward(model, reader, batches, genes, colours, outputs, run)
    identity = identify(model)
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
    return Embedded(matrices, record, working)


# --- what there is -----------------------------------------------------------------------------------------------


def _counts(adata: AnnData, layer: str | None) -> Any:
    """Return the checked raw counts; ``None`` if the AnnData has none."""
    if layer is not None:
        counts, name = require_key(adata.layers, layer, where="adata.layers"), f"adata.layers[{layer!r}]"
    else:
        counts, name = adata.X, "adata.X"
    if counts is None or adata.n_vars == 0:
        return None
    check_counts(counts, name=name)
    return counts


def _match(
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


def _check_something(
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


def _gene_inputs(model: STAlign, raw: Any, match: GeneMatch, light: AnnData, codes: np.ndarray) -> _Genes:
    graph = row_normalise(niche_graph(light))
    spot, niche = model.preprocess_genes(aggregate(raw, match), connectivities=graph, library=codes)
    return _Genes(match, spot, niche)


def _colours(model: STAlign, reader: PatchReader) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if model.config.colour != "library":
        return {}
    return reader.colours(model.geometry.spot_um, model.geometry.spot_pixels)


# --- the forward passes ------------------------------------------------------------------------------------------


def _plan_batches(reader: PatchReader, has_image: np.ndarray, batch_size: int) -> list[_Batch]:
    """Group the spots into batches of one library, near ones together, so that a file is read in few places."""
    batches = []
    for code, library in enumerate(reader.libraries):
        here = np.flatnonzero(reader.codes == code)
        if not len(here):
            continue
        order = here[_strips(reader.coordinates[here], batch_size)]
        batches += [
            _Batch(order[start : start + batch_size], library, bool(has_image[here[0]]))
            for start in range(0, len(order), batch_size)
        ]
    return batches


def _strips(coordinates: np.ndarray, batch_size: int) -> np.ndarray:
    """Order spots strip by strip; a strip is about as wide as a batch is long."""
    x, y = coordinates.T
    n_strips = max(1, round(np.sqrt(len(x) / batch_size)))
    low, high = y.min(), y.max()
    strip = np.zeros(len(x)) if high == low else np.minimum((y - low) / (high - low) * n_strips, n_strips - 1) // 1
    return np.lexsort((y, x, strip))


def _forward(
    model: STAlign,
    reader: PatchReader,
    batches: Sequence[_Batch],
    genes: _Genes | None,
    colours: dict[str, tuple[np.ndarray, np.ndarray]],
    outputs: Sequence[str],
    run: Run,
) -> dict[str, np.ndarray]:
    from tqdm.auto import tqdm

    n_obs = len(reader.codes)
    matrices: dict[str, np.ndarray] = {}
    passes = _Passes(model, genes, colours, outputs, run.device)
    with tqdm(total=n_obs, unit="spot", desc="stalign", disable=not run.progress) as bar:
        for batch, pixels in _read_ahead(lambda b: _read(reader, model, b), batches, run.num_workers):
            for rows, values in passes(batch, pixels):
                for name, block in values.items():
                    if name not in matrices:
                        matrices[name] = np.full((n_obs, block.shape[1]), np.nan, dtype=np.float32)
                    matrices[name][rows] = block
            bar.update(len(batch.spots))
    return {name: matrices[name] for name in outputs if name in matrices}


def _read(reader: PatchReader, model: STAlign, batch: _Batch) -> _Pixels | None:
    if not batch.with_image:
        return None
    geometry = model.geometry
    return _Pixels(
        reader.read(batch.spots, geometry.spot_um, geometry.spot_pixels),
        reader.read(batch.spots, geometry.niche_um, geometry.niche_pixels),
    )


def _read_ahead(
    read: Callable[[_Batch], _Pixels | None], batches: Sequence[_Batch], num_workers: int
) -> Iterator[tuple[_Batch, _Pixels | None]]:
    """Yield batches with their pixels, in order; threads read the next ones meanwhile."""
    if num_workers == 0:
        for batch in batches:
            yield batch, read(batch)
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="stalign-pixels") as pool:
        waiting: deque[tuple[_Batch, Future[_Pixels | None]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(read, batch)))
                if len(waiting) > num_workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class _Passes:
    """Forward passes over batches, in parts that fit the device's memory."""

    def __init__(
        self,
        model: STAlign,
        genes: _Genes | None,
        colours: dict[str, tuple[np.ndarray, np.ndarray]],
        outputs: Sequence[str],
        device: torch.device,
    ) -> None:
        self.model = model
        self.genes = genes
        self.colours = colours
        self.outputs = outputs
        self.device = device
        self.limit: int | None = None

    def __call__(self, batch: _Batch, pixels: _Pixels | None) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yield (positions of spots, rows of every output) until the batch is through."""
        start = 0
        while start < len(batch.spots):
            size = min(self.limit or len(batch.spots), len(batch.spots) - start)
            part = slice(start, start + size)
            values = None
            try:
                values = self._run(batch, pixels, part)
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            if values is None:  # out of memory; outside the handler, so that the failed pass is freed first
                self._shrink(size)
                continue
            yield batch.spots[part], values
            start += size

    def _shrink(self, size: int) -> None:
        import torch

        self.limit = max(1, size // 2)
        logger.warning("%s is out of memory with %d spots at once: going on with %d.", self.device, size, self.limit)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, batch: _Batch, pixels: _Pixels | None, part: slice) -> dict[str, np.ndarray]:
        import torch

        inputs: dict[str, torch.Tensor] = {}
        if pixels is not None:
            colour = self.colours.get(batch.library)
            spot, niche = (torch.from_numpy(values[part]).to(self.device) for values in pixels)
            inputs["spot_image"] = self.model.preprocess_spot_image(spot, colour=colour)
            inputs["niche_image"] = self.model.preprocess_niche_image(niche, colour=colour)
        if self.genes is not None:
            rows = batch.spots[part]
            inputs["spot_gene"] = torch.from_numpy(self.genes.spot[rows]).to(self.device)
            inputs["niche_gene"] = torch.from_numpy(self.genes.niche[rows]).to(self.device)
        output = self.model(**inputs)
        values = {}
        for name in self.outputs:
            matrix = self.model.embedding(output, name)
            if matrix is not None:
                values[name] = matrix.float().flatten(1).cpu().numpy()
        return values


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
