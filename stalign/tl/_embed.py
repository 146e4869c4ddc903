"""Embed the spots and niches of a slide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign._settings import settings
from stalign._validate import check_adata, check_choice, check_choices, check_positive
from stalign.tl._slots import PARTS
from stalign.tl._targets import choose_target
from stalign.tl._working import NicheArguments, adopt

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from anndata import AnnData

    from stalign.models import STAlign
    from stalign.tl._compute import Embedded, Run

_DTYPES = ("float32", "float16")


def embed(
    adata: AnnData,
    *,
    model: str | Path | STAlign = "stalign-mini",
    modalities: Sequence[str] = ("image", "gene"),
    outputs: Sequence[str] = PARTS,
    image: Any = None,
    image_key: str | None = None,
    mpp: float | Mapping[str, float] | None = None,
    layer: str | None = None,
    gene_symbols: str | None = None,
    organism: str | None = None,
    spatial_key: str | None = None,
    library_key: str | None = None,
    key_added: str = Key.obsm.EMBEDDING,
    device: str | torch.device | None = None,
    amp: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    progress: bool | None = None,
    dtype: str = "float32",
    store: str | Path | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Embed the histology and the expression of every spot and its niche.

    Niches are those of the model: where :func:`stalign.pp.extract_niches` has not run, or with another geometry, it is
    run here. A slide without image is embedded from its genes, one without counts from its image, and libraries of one
    AnnData may differ in what they have; ``uns`` says which was used. Where an image is there, rows of the aligned
    image side of libraries without one are NaN.

    Pixels and counts are read as they are needed, so that memory holds the counts (of an AnnData opened with
    ``backed``, not even these) and the embeddings. Those of a backed AnnData are made in a folder beside its file; if
    the work is interrupted, the same call goes on where it stopped. At the end they are in the file
    (``backed="r+"``), or in a zarr store beside it (``backed="r"``), see *Returns*.

    Parameters
    ----------
    adata
        Spots with raw counts, an image, or both; in memory, or opened with ``backed="r"`` or ``backed="r+"``.
    model
        Name of a bundled model, a model folder, a Hub id, or a loaded :class:`~stalign.models.STAlign`.
    modalities
        What to use of what is there.
    outputs
        Which matrices to keep.
    image, image_key, mpp
        As in :func:`stalign.pp.extract_niches`.
    layer
        Layer with the raw counts; ``None`` is ``X``.
    gene_symbols, organism
        As in :func:`stalign.pp.match_genes`; ``None`` is what its last call on this AnnData was given, else
        ``var_names`` and ``"human"``.
    spatial_key, library_key
        Coordinates in ``obsm``, and column of ``obs`` that names each spot's library. ``None`` is what
        :func:`stalign.pp.extract_niches` was given, else ``"spatial"`` and one library.
    key_added
        Prefix of the slots written.
    device
        ``"auto"``, ``"cpu"``, ``"cuda:0"``, ``"mps"``.
    amp
        Mixed precision of the encoders: ``"bf16"``, ``"fp16"`` or ``"off"``.
    batch_size
        Spots in one forward pass; ``None`` finds out what suits the model and the device. Halved when a device runs
        out of memory. The result does not depend on it.
    num_workers
        Threads that read pixels ahead; 0 does everything in the calling thread, ``None`` takes as many as suit the
        device.
    progress
        Show a progress bar.
    dtype
        ``"float32"``, or ``"float16"`` for matrices of half the size.
    store
        Folder of a zarr store in which the embeddings are made and kept; data in memory get a copy of them at the end.
        The default of an AnnData opened with ``backed="r"`` is ``<file>.<key_added>.zarr`` beside its file. A finished
        store of the same slide and model is taken as it is, an unfinished one gone on with.
    copy
        Return a new object instead of writing to ``adata``.

    Returns
    -------
    ``None``, or with ``copy=True`` a new AnnData, with (n_obs, d) matrices of ``dtype``, as far as ``outputs`` names
    them and the slide has what they need:

    - ``obsm["X_stalign"]``: spot and niche, image and genes fused
    - ``obsm["X_stalign_spot"]``, ``obsm["X_stalign_niche"]``: its two scales. These three have unit norm where the
      model's config says so (``unit_fused``); those of ``stalign-mini`` keep distances, and are near zero for spots
      near the slide's average
    - ``obsm["X_stalign_image"]``, ``obsm["X_stalign_gene"]``: the aligned pair; spot and niche side by side, unit norm
    - ``uns["stalign"]["embed"]``: model, revision, SHA-256, package version, device, dtype, patch sizes, scale per
      library, gene coverage, input transform, modalities per library, colours per library
    - what :func:`stalign.pp.extract_niches` writes, where it was run

    With another ``key_added`` the matrices begin with it, and the record is ``uns["stalign"]["embed_<key_added>"]``.

    With ``backed="r+"`` all of this is in the file as well, which is replaced as a whole at the end. With
    ``backed="r"`` the matrices in ``obsm`` are zarr arrays, which are read when they are used (``numpy.asarray``) and
    become ordinary matrices by ``to_memory`` and ``write_h5ad``. ``uns["stalign"]["embed"]["store"]`` names the store,
    which :func:`anndata.read_zarr` reads on its own: names of the spots, matrices, niche graph and record.

    Raises
    ------
    ValueError
        For an unknown model or device, counts that are not raw, too few known genes, and slides with neither image nor
        counts.
    KeyError
        If a layer, coordinates, an image or a column are not there.
    FileNotFoundError
        If the image's file is gone.
    FileExistsError
        If ``store`` is something else.
    OSError
        If the disk is full; what is finished is kept, and the data are as they were.

    Notes
    -----
    ``None`` for ``device``, ``amp``, ``batch_size``, ``num_workers`` and ``progress`` is what :data:`stalign.settings`
    says.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.tl.embed(adata)  # doctest: +SKIP
    >>> adata.obsm["X_stalign"].shape  # doctest: +SKIP
    (1264, 512)
    """
    from stalign.tl._compute import MODALITIES, compute_embedding
    from stalign.tl._runtime import resolve_model

    check_adata(adata)
    modalities = check_choices("modalities", modalities, MODALITIES)
    outputs = check_choices("outputs", outputs, PARTS)
    run = make_run(device, amp, batch_size, num_workers, progress, dtype)
    target = choose_target(adata, store, key_added, run.dtype, copy=copy)
    arguments: dict[str, Any] = {
        "modalities": modalities,
        "outputs": outputs,
        "niches": NicheArguments(image, image_key, mpp, spatial_key, library_key),
        "layer": layer,
        "gene_symbols": gene_symbols,
        "organism": organism,
        "run": run,
    }
    with target:
        result = compute_embedding(adata, resolve_model(model), open_sink=target.open, **arguments)
        uns = {**adata.uns.get(Key.UNS, {})}
        if result.working.is_new:
            uns[Key.uns.NICHE] = result.working.adata.uns[Key.UNS][Key.uns.NICHE]
        uns[Key.embed_record(key_added)] = {**result.record, "key_added": key_added, "store": target.place}
        result = result._replace(matrices=dict(target.finish(result, uns, with_image="image" in modalities)))
    out = adata.copy() if copy else adata
    _write(out, result, uns, key_added, use_image="image" in modalities)
    return out if copy else None


def make_run(
    device: str | torch.device | None = None,
    amp: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    progress: bool | None = None,
    dtype: str = "float32",
) -> Run:
    """Fill in the settings for what is ``None``, and check the rest."""
    from stalign.tl._compute import Run
    from stalign.tl._runtime import resolve_amp, resolve_device

    size = settings.batch_size if batch_size is None else check_positive("batch_size", batch_size, integer=True)
    workers = settings.num_workers if num_workers is None else num_workers
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise ValueError(f"num_workers must be an integer >= 0, got {workers!r}.")
    return Run(
        device=resolve_device(device),
        amp=resolve_amp(amp),
        batch_size=size,
        num_workers=workers,
        progress=settings.progress if progress is None else bool(progress),
        dtype=check_choice("dtype", str(np.dtype(dtype)) if isinstance(dtype, (type, np.dtype)) else dtype, _DTYPES),
    )


def _write(adata: AnnData, result: Embedded, uns: dict[str, Any], key_added: str, *, use_image: bool) -> None:
    if result.working.is_new:
        adopt(adata, result.working.adata, use_image=use_image)
    # A matrix of an earlier call would pass for one of this model.
    stale = [name for name in (Key.embedding(part, key_added) for part in PARTS) if name in adata.obsm]
    for name in stale:
        del adata.obsm[name]
    for part, matrix in result.matrices.items():
        adata.obsm[Key.embedding(part, key_added)] = matrix
    adata.uns[Key.UNS] = uns
    _report(result, key_added, stale)


def _report(result: Embedded, key_added: str, stale: Sequence[str]) -> None:
    record = result.record
    missing = [part for part in record["outputs"] if part not in result.matrices]
    if missing:
        side = " and ".join({"image": "image", "gene": "genes"}[name] for name in record["modalities"])
        logger.info("Embedded from the %s alone: there is no output %s.", side, ", ".join(map(repr, missing)))
    without = [name for name, entry in record["libraries"].items() if "image" not in entry["modalities"]]
    if without and "image" in record["modalities"]:
        logger.info("Libraries %s have no image: their rows of the image side are NaN.", ", ".join(without))
    names = [f"`obsm['{Key.embedding(part, key_added)}']`" for part in result.matrices]
    removed = [name for name in stale if name not in {Key.embedding(part, key_added) for part in result.matrices}]
    if removed:
        logger.info("Removed %s of an earlier call.", ", ".join(f"`obsm['{name}']`" for name in removed))
    logger.info("Added %s, `uns['%s']['%s']`.", ", ".join(names), Key.UNS, Key.embed_record(key_added))
