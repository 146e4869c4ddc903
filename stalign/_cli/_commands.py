"""The commands. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stalign._cli._app import INSTALLATION, MODELS, SLIDES, USER_ERROR_CODE, app, examples

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import STAlign

_INPUT = "Input"
_MODEL = "Model"
_CLUSTER = "Many slides"

Model = Annotated[
    str, typer.Option(help="A bundled model, a model folder, or a Hub id 'owner/name'.", rich_help_panel=_MODEL)
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", show_default="auto", rich_help_panel=_MODEL)
]
Amp = Annotated[str | None, typer.Option(help="Mixed precision: bf16 or fp16.", rich_help_panel=_MODEL)]
BatchSize = Annotated[int | None, typer.Option(help="Spots in one forward pass.", rich_help_panel=_MODEL)]
NumWorkers = Annotated[int | None, typer.Option(help="Threads that read pixels ahead.", rich_help_panel=_MODEL)]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]
Layer = Annotated[str | None, typer.Option(help="Layer with raw counts; X by default.", rich_help_panel=_INPUT)]
GeneSymbols = Annotated[
    str | None, typer.Option(help="Column of var with gene names; the index by default.", rich_help_panel=_INPUT)
]
Organism = Annotated[str | None, typer.Option(help="human or mouse.", show_default="human", rich_help_panel=_INPUT)]
LibraryKey = Annotated[
    str | None, typer.Option(help="Column of obs that names each spot's library.", rich_help_panel=_INPUT)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
OutFile = Annotated[
    Path | None, typer.Option(help="The file to write.", show_default="FILE with '_stalign' before .h5ad, beside it")
]

_DEFAULT_MODEL = "stalign-mini"


def _split(values: list[str] | None) -> list[str]:
    """Names given one by one or separated by commas."""
    return [name.strip() for value in values or [] for name in value.split(",") if name.strip()]


def _default_out(file: Path, out: Path | None) -> Path:
    return file.with_name(f"{file.stem}_stalign.h5ad") if out is None else out


def _given(**arguments: Any) -> dict[str, Any]:
    """Arguments that were given; the others keep the function's own default."""
    return {name: value for name, value in arguments.items() if value is not None}


def _ensure_embedded(adata: AnnData, model: STAlign, **options: Any) -> None:
    """Embed a slide that was not embedded with this model yet."""
    from stalign import tl
    from stalign._keys import Key
    from stalign.tl._slots import embed_record

    if Key.obsm.EMBEDDING in adata.obsm and embed_record(adata).get("sha256") == model.provenance.sha256:
        return
    tl.embed(adata, model=model, **_given(**options))


@app.command(rich_help_panel=INSTALLATION, epilog=examples("stalign demo --out demo"))
def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the .h5ad.")] = Path("stalign-demo"),
    seed: Annotated[int, typer.Option(help="Another seed makes another section.", min=0)] = 0,
    n_rows: Annotated[int, typer.Option(help="Rows of the array.", min=4)] = 40,
    n_cols: Annotated[int, typer.Option(help="Spots in a row.", min=4)] = 38,
    device: Device = None,
) -> None:
    """Show the main job on a generated slide: embed, domains, names, predicted genes."""
    from stalign import settings
    from stalign._cli._demo import run

    if ctx.obj["verbosity"] is None:
        settings.verbosity = "WARNING"  # the demo tells its own story
    run(out, seed=seed, n_rows=n_rows, n_cols=n_cols, device=device, say=typer.echo)


@app.command(
    rich_help_panel=SLIDES,
    epilog=examples(
        "stalign embed slide.h5ad --out embedded",
        "stalign embed run_1/outs run_2/outs --out embedded --device cuda",
        "stalign embed slide.h5ad --out embedded --image slide.tif --mpp 0.5",
        "stalign embed slides/*.h5ad --out embedded --dask local",
    ),
)
def embed(
    ctx: typer.Context,
    slides: Annotated[list[Path], typer.Argument(help=".h5ad, AnnData .zarr, or Space Ranger folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the results, one .h5ad for each slide.")],
    model: Model = _DEFAULT_MODEL,
    modalities: Annotated[
        list[str] | None, typer.Option(help="What to use of what is there: image,gene.", rich_help_panel=_MODEL)
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option(help="Which matrices: fused,spot,niche,image,gene.", rich_help_panel=_MODEL)
    ] = None,
    layer: Layer = None,
    gene_symbols: GeneSymbols = None,
    organism: Organism = None,
    key_added: Annotated[str | None, typer.Option(help="Name in obsm.", show_default="X_stalign")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Full-resolution image of the slide (TIFF, zarr, PNG).", rich_help_panel=_INPUT)
    ] = None,
    image_key: Annotated[
        str | None, typer.Option(help="Which image in uns to use, such as hires.", rich_help_panel=_INPUT)
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="µm per full-resolution pixel, if nothing states it.", rich_help_panel=_INPUT)
    ] = None,
    spatial_key: Annotated[
        str | None, typer.Option(help="Coordinates in obsm.", show_default="spatial", rich_help_panel=_INPUT)
    ] = None,
    library_key: LibraryKey = None,
    device: Device = None,
    amp: Amp = None,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    dask: Annotated[
        str | None,
        typer.Option(
            help="Spread the slides: address of a Dask scheduler, or local, local:4 for workers on this machine.",
            metavar="ADDRESS",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(
            help="Further tries after an error of the system.", show_default="1", min=0, rich_help_panel=_CLUSTER
        ),
    ] = None,
    progress: Progress = True,
    overwrite: Overwrite = False,
) -> None:
    """Embed slides, one .h5ad for each.

    A slide that fails is reported; the others go on, and the exit code is 2. The same command again goes on after an
    interruption: slides that are finished are skipped.
    """
    if image is not None and len(slides) > 1:
        raise ValueError(f"--image belongs to one slide, got {len(slides)} slides.")

    from stalign import tl
    from stalign.tl._many import SlideResult, open_client

    def say(row: SlideResult) -> None:
        if row.status == "failed":
            typer.echo(f"error: {row.slide}: {row.error}", err=True)
        else:
            there = ", finished before" if row.status == "skipped" else ""
            typer.echo(f"{row.slide} -> {row.result} ({row.n_spots:,} spots{there})")

    with open_client(dask) as client:
        table = tl.embed_many(
            slides,
            out=out,
            client=client,
            model=model,
            overwrite=overwrite,
            errors="raise" if len(slides) == 1 or _debug(ctx) else "report",
            progress=progress,
            on_result=say,
            **_given(
                retries=retries,
                modalities=_split(modalities) or None,
                outputs=_split(outputs) or None,
                image=image,
                image_key=image_key,
                mpp=mpp,
                layer=layer,
                gene_symbols=gene_symbols,
                organism=organism,
                spatial_key=spatial_key,
                library_key=library_key,
                key_added=key_added,
                device=device,
                amp=amp,
                batch_size=batch_size,
                num_workers=num_workers,
            ),
        )
    failed = int((table["status"] == "failed").sum())
    if failed:
        typer.echo(f"error: {failed} of {len(slides)} slides failed.", err=True)
        raise typer.Exit(USER_ERROR_CODE)


def _debug(ctx: typer.Context) -> bool:
    return bool(ctx.parent is not None and ctx.parent.params.get("debug"))


@app.command(
    rich_help_panel=SLIDES,
    epilog=examples(
        "stalign annotate slide.h5ad --markers markers.toml --out named.h5ad",
        "stalign annotate slide.h5ad --reference labelled.h5ad --label-key region --threshold 0.5",
    ),
)
def annotate(
    file: Annotated[Path, typer.Argument(help="A slide, embedded or not.")],
    markers: Annotated[Path | None, typer.Option(help="Labels and their genes: .json, .toml or .gmt.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="In place of markers: an annotated slide.", rich_help_panel=_INPUT)
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(help="Column of its obs with the labels.", rich_help_panel=_INPUT)
    ] = None,
    out: OutFile = None,
    model: Model = _DEFAULT_MODEL,
    modality: Annotated[
        str | None, typer.Option(help="fused, image or gene.", show_default="fused", rich_help_panel=_MODEL)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Spots with less confidence stay 'unassigned'.", rich_help_panel=_MODEL)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="The smaller, the more confident.", show_default="1", rich_help_panel=_MODEL)
    ] = None,
    layer: Layer = None,
    device: Device = None,
    batch_size: BatchSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Name spots by marker genes or after an annotated slide, with no training."""
    from stalign._cli._files import check_output, read_markers, read_slide, write_slide

    if (markers is None) == (reference is None):
        raise ValueError("Pass either --markers or --reference (with --label-key).")
    target = check_output(_default_out(file, out), overwrite=overwrite)
    labels = None if markers is None else read_markers(markers)
    adata = read_slide(file)
    annotated = None if reference is None else read_slide(reference)

    from stalign import models, tl
    from stalign._keys import Key

    network = models.load(model)
    _ensure_embedded(adata, network, layer=layer, device=device, batch_size=batch_size)
    tl.zero_shot_annotate(
        adata,
        labels,
        model=network,
        **_given(
            reference=annotated,
            label_key=label_key,
            modality=modality,
            threshold=threshold,
            temperature=temperature,
        ),
    )
    write_slide(adata, target)
    for label, count in adata.obs[Key.obs.ANNOTATION].value_counts().items():
        typer.echo(f"{count:>8,}  {label}")
    typer.echo(f"{file} -> {target}")


@app.command(
    rich_help_panel=SLIDES,
    epilog=examples(
        "stalign predict slide.h5ad --genes ERBB2,COL1A1 --out predicted.h5ad",
        "stalign predict slide.h5ad --method ridge --reference cohort_1.h5ad --reference cohort_2.h5ad",
    ),
)
def predict(
    file: Annotated[Path, typer.Argument(help="A slide with an image, embedded or not.")],
    genes: Annotated[
        list[str] | None, typer.Option(help="ERBB2,KRT8,…; all that the model predicts by default.")
    ] = None,
    out: OutFile = None,
    model: Model = _DEFAULT_MODEL,
    method: Annotated[
        str | None, typer.Option(help="head, retrieval or ridge.", show_default="head", rich_help_panel=_MODEL)
    ] = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="Slides with counts, for retrieval and ridge.", rich_help_panel=_INPUT)
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", help="Neighbours of retrieval.", show_default="50", rich_help_panel=_MODEL)
    ] = None,
    layer: Layer = None,
    device: Device = None,
    batch_size: BatchSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict expression from histology, and compare it with what was measured."""
    from stalign._cli._files import check_output, read_slide, write_slide

    target = check_output(_default_out(file, out), overwrite=overwrite)
    adata = read_slide(file)
    known = [read_slide(path) for path in reference or []]

    from stalign import models, tl
    from stalign._keys import Key

    network = models.load(model)
    for slide in (adata, *known):
        _ensure_embedded(slide, network, layer=layer, device=device, batch_size=batch_size)
    tl.predict_expression(
        adata,
        _split(genes) or None,
        model=network,
        **_given(reference=known or None, method=method, k=k, layer=layer),
    )
    write_slide(adata, target)
    if Key.var.PREDICTED_R in adata.var:
        measured = adata.var[Key.var.PREDICTED_R].dropna()
        if len(measured):
            typer.echo(
                f"Pearson r with the measured counts: median {measured.median():.3f} over {len(measured):,} genes."
            )
    typer.echo(f"{file} -> {target}")


@app.command(rich_help_panel=MODELS, epilog=examples("stalign convert checkpoint.pth my-model"))
def convert(
    official: Annotated[Path, typer.Argument(help="A checkpoint of the authors' released code (.pth).")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Turn a checkpoint of the published code into a model folder.

    Nothing in the file is executed.
    """
    from stalign import models

    models.from_official(official).save(out, overwrite=overwrite)
    typer.echo(f"{official} -> {out}")


@app.command(rich_help_panel=INSTALLATION, epilog=examples("stalign doctor && echo fine"))
def doctor() -> None:
    """Check the installation: versions, devices, image readers, cache, models, a small self-test.

    The exit code is 0 if everything that is needed works, else 1. What is missing of the extras is said, and is no
    failure.
    """
    from stalign._cli._doctor import examine

    healthy = examine(say=typer.echo)
    if not healthy:
        raise typer.Exit(1)
