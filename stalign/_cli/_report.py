"""The command that writes a page about a slide."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from stalign._cli._app import SLIDES, app, examples
from stalign._cli._commands import BatchSize, Device, Layer, LibraryKey, _given, _split


@app.command(
    rich_help_panel=SLIDES,
    epilog=examples(
        "stalign report slide.h5ad",
        "stalign report run_1/outs --out run_1.html --domains 6 --markers markers.toml --genes ERBB2,COL1A1",
    ),
)
def report(
    slide: Annotated[Path, typer.Argument(help="A slide, embedded or not: .h5ad, .zarr, or a Space Ranger folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="SLIDE with .html, beside it")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading.", show_default="name of the slide")] = None,
    domains: Annotated[
        int | None,
        typer.Option(help="Number of domains to find.", show_default="those in the file, else 7", min=2),
    ] = None,
    markers: Annotated[
        Path | None,
        typer.Option(help="Labels and their genes: .json, .toml or .gmt.", show_default="names in the file"),
    ] = None,
    genes: Annotated[
        list[str] | None,
        typer.Option(help="Predicted genes to show: ERBB2,KRT8,…", show_default="three that vary much"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A bundled model, a model folder, or a Hub id 'owner/name'.",
            show_default="the one that embedded the slide, else stalign-mini",
            rich_help_panel="Model",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Full-resolution image of the slide, to embed it from.", rich_help_panel="Input"),
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(help="µm per full-resolution pixel, if nothing states it.", rich_help_panel="Input"),
    ] = None,
    layer: Layer = None,
    library_key: LibraryKey = None,
    device: Device = None,
    batch_size: BatchSize = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write one HTML page about a slide, to look at and to pass on.

    What the model saw, domains and their genes, names, predicted genes, neighbourhoods, quality, what to be careful
    with. What the slide's file holds is shown, what is missing is computed; the file itself is not changed. The page
    needs no network and no other file.
    """
    from stalign._cli._files import check_output, read_markers, read_slide
    from stalign.io._slides import slide_name

    name = slide_name(slide)
    target = _beside(slide, name) if out is None else out
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder. Name the file to write: --out {target / name}.html")
    check_output(target, overwrite=overwrite)
    labels = None if markers is None else read_markers(markers)
    adata = read_slide(slide)

    import matplotlib as mpl

    mpl.use("Agg")

    from stalign import pl

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=SyntaxWarning)  # of what squidpy imports
        pl.report(
            adata,
            target,
            title=title or name,
            n_domains=domains,
            markers=labels,
            genes=_split(genes) or None,
            overwrite=overwrite,
            **_given(
                model=model,
                image=image,
                mpp=mpp,
                layer=layer,
                library_key=library_key,
                device=device,
                batch_size=batch_size,
            ),
        )
    typer.echo(f"{slide} -> {target} ({target.stat().st_size / 1e6:.1f} MB)")


def _beside(slide: Path, name: str) -> Path:
    """Name of the page; that of a run stands beside its ``outs``."""
    return slide.resolve().parent / f"{name}.html" if slide.name == "outs" else slide.with_name(f"{name}.html")
