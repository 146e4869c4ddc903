"""The command that measures."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from stalign._cli._app import MODELS, app, examples
from stalign._cli._commands import Model, _split

_DEFAULT_TASKS = ["domains", "genes", "retrieval", "annotation", "few-shot", "robustness", "quality"]


@app.command(
    rich_help_panel=MODELS,
    epilog=examples(
        "stalign benchmark data --out benchmarks.md",
        "stalign benchmark data --tasks domains --methods 'pca*,stalign' --out benchmarks.md",
        "stalign benchmark . --sections slide_1.h5ad,slide_2.h5ad --labels region --markers markers.toml",
    ),
)
def benchmark(
    ctx: typer.Context,
    data: Annotated[Path, typer.Argument(help="Folder with <dataset>/<section>.h5ad or <section>.h5ad.")],
    out: Annotated[Path, typer.Option(help="Markdown file; the tidy table is written beside it as .csv.")] = Path(
        "benchmarks.md"
    ),
    tasks: Annotated[list[str] | None, typer.Option(help=",".join(_DEFAULT_TASKS), show_default="all of them")] = None,
    model: Model = "stalign-mini",
    seeds: Annotated[list[str] | None, typer.Option(help="Seeds of the clustering.", show_default="0,1,2")] = None,
    sections: Annotated[
        list[str] | None,
        typer.Option(help="Names in DATA or files.", show_default="the six held-back sections of the development data"),
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option(help="Sections that predictors of genes are fitted on.", show_default="those of other patients"),
    ] = None,
    references: Annotated[
        list[str] | None,
        typer.Option(help="Labelled sections that give prototypes.", show_default="those of other patients"),
    ] = None,
    labels: Annotated[str, typer.Option(help="Column of obs with the labels.")] = "annotation",
    markers: Annotated[
        Path | None, typer.Option(help="Labels and their genes: .json, .toml or .gmt.", show_default="breast, cortex")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Names or patterns: 'stalign*,pca'.", show_default="all but peers")
    ] = None,
) -> None:
    """Measure a model beside plain methods, and write one tidy table and its Markdown.

    Rows of an earlier run in --out that are not measured again are kept. Lists are separated by commas, or the option
    is given again.
    """
    from stalign import benchmark as room
    from stalign import settings
    from stalign._cli._files import read_markers

    if ctx.obj["verbosity"] is None:
        settings.verbosity = "WARNING"
    settings.progress = False
    chosen = _integers(_split(seeds)) or [0, 1, 2]
    known = None if markers is None else read_markers(markers)
    options = {
        "tasks": _split(tasks),
        "seeds": [str(seed) for seed in chosen] if seeds else [],
        "sections": _split(sections),
        "training": _split(training),
        "references": _split(references),
        "methods": _split(methods),
    }
    table = room.run(
        data,
        out=out,
        tasks=options["tasks"] or room.TASKS,
        model=model,
        seeds=chosen,
        sections=options["sections"] or None,
        training=options["training"] or None,
        references=options["references"] or None,
        labels=labels,
        markers=known,
        methods=options["methods"] or None,
        command=_command(out, model, labels, markers, options),
        say=typer.echo,
    )
    typer.echo(f"{data} -> {out} and {out.with_suffix('.csv').name} ({len(table):,} values)")


def _integers(values: list[str]) -> list[int]:
    try:
        found = [int(value) for value in values]
    except ValueError:
        raise ValueError(f"--seeds must be whole numbers from 0, got {','.join(values)}.") from None
    if any(value < 0 for value in found):
        raise ValueError(f"--seeds must be whole numbers from 0, got {','.join(values)}.")
    return found


def _command(out: Path, model: str, labels: str, markers: Path | None, options: dict[str, list[str]]) -> str:
    """Write the command as it can be read elsewhere: names of files without their folders."""
    words = ["stalign", "benchmark", "DATA", "--out", out.name]
    if model != "stalign-mini":
        words += ["--model", Path(model).name if Path(model).exists() else model]
    if labels != "annotation":
        words += ["--labels", labels]
    if markers is not None:
        words += ["--markers", markers.name]
    for name, values in options.items():
        if values:
            shown = [Path(value).name if Path(value).is_absolute() else value for value in values]
            words += [f"--{name}", ",".join(shown)]
    return shlex.join(words)
