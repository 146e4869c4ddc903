"""The command that turns slides into shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stalign._cli._app import MODELS, USER_ERROR_CODE, app, examples

if TYPE_CHECKING:
    from stalign.train._shards import Shards

_SIZES = "Sizes, in place of the network's"


@app.command(
    rich_help_panel=MODELS,
    epilog=examples(
        "stalign prepare slides/ --out cohort.shards --jobs 4",
        "stalign prepare --out cohort.shards --verify",
    ),
)
def prepare(
    ctx: typer.Context,
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(help=".h5ad files, folders of them, folders of HEST-1k or STimage-1K4M, Space Ranger folders."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the shards.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A training config, in place of INPUTS: its sections, and what its frozen encoders make."),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the config: --set data.root=PATH")
    ] = None,
    network: Annotated[str, typer.Option(help="Config or model that says how large niches and patches are.")] = "mini",
    vocabulary: Annotated[
        str, typer.Option(help="Genes to keep: protein-coding, a model, or a file with one symbol a line.")
    ] = "protein-coding",
    mpp: Annotated[
        list[str] | None,
        typer.Option(help="µm per full-resolution pixel where nothing states it: NUMBER for all, or SECTION=NUMBER."),
    ] = None,
    patients: Annotated[Path | None, typer.Option(help="CSV with the columns section and patient.")] = None,
    organism: Annotated[
        str | None, typer.Option(help="human or mouse.", show_default="what the metadata say, or human")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes, each with one section in memory.", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Prepare everything again.")] = False,
    skip_failed: Annotated[
        bool, typer.Option("--skip-failed", help="Go on without sections that cannot be prepared.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its checksum at the end; alone: do nothing else.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
    n_neighbors: Annotated[int | None, typer.Option(help="Spots of a niche.", rich_help_panel=_SIZES)] = None,
    spot_um: Annotated[float | None, typer.Option(help="Side of a spot patch in µm.", rich_help_panel=_SIZES)] = None,
    niche_um: Annotated[float | None, typer.Option(help="Side of a niche patch in µm.", rich_help_panel=_SIZES)] = None,
    spot_pixels: Annotated[int | None, typer.Option(help="The same in pixels.", rich_help_panel=_SIZES)] = None,
    niche_pixels: Annotated[int | None, typer.Option(help="The same in pixels.", rich_help_panel=_SIZES)] = None,
) -> None:
    """Turn slides into shards on disk, to train on any number of them.

    What was done before is not done again.
    """
    if config is not None:
        _refuse_beside_config(ctx)
    elif changes:
        raise ValueError("--set changes a config: pass --config, too.")
    from stalign import settings

    settings.progress = progress
    if config is not None:
        shards = _from_config(config, changes or [], out=out, jobs=jobs, overwrite=overwrite)
        if verify:
            _verify(shards.folder)
    else:
        if out is None:
            raise ValueError("Pass --out, the folder of the shards.")
        if not inputs and not verify:
            raise ValueError("Name the slides to prepare, or --verify to check the shards that are there.")
        sizes = {
            "n_neighbors": n_neighbors,
            "spot_um": spot_um,
            "niche_um": niche_um,
            "spot_pixels": spot_pixels,
            "niche_pixels": niche_pixels,
        }
        from stalign.pp._prepare import prepare_shards, read_patients

        if inputs:
            prepare_shards(
                inputs,
                out,
                network=network,
                geometry={name: value for name, value in sizes.items() if value is not None},
                vocabulary=vocabulary,
                mpp=_scales(mpp or []),
                patients=None if patients is None else read_patients(patients),
                organism=organism,
                jobs=jobs,
                overwrite=overwrite,
                skip_failed=skip_failed,
            )
        if verify:
            _verify(out)
        from stalign.train._shards import open_shards

        shards = open_shards(out)
    typer.echo(_summary(shards))


def _refuse_beside_config(ctx: typer.Context) -> None:
    """Refuse what the config says itself."""
    allowed = ("config", "changes", "out", "jobs", "overwrite", "verify", "progress")
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params if name not in allowed}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        options = ", ".join("INPUTS" if name == "inputs" else f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"A config names its sections and their sizes itself: {options} cannot be given beside --config. Change "
            "the config with --set."
        )


def _from_config(config: Path, changes: list[str], *, out: Path | None, jobs: int, overwrite: bool) -> Shards:
    from stalign import train
    from stalign.pp._prepare import encode_config, prepare_config
    from stalign.train._shards import open_shards

    if out is not None:
        changes = [*changes, f"data.shards={json.dumps(str(out))}"]
    run = train.read_config(config, changes)
    folder = prepare_config(run, jobs=jobs, overwrite=overwrite)
    encode_config(run)
    return open_shards(folder, skip_damaged=run.data.skip_damaged)


def _scales(values: list[str]) -> float | dict[str, float] | None:
    """Read ``0.5`` or ``A1=0.5``."""
    if not values:
        return None
    parts: list[Any] = [value.rpartition("=") for value in values]
    try:
        by_section = {name: float(number) for name, _, number in parts}
    except ValueError:
        raise ValueError(f"--mpp must read NUMBER or SECTION=NUMBER, got {values}.") from None
    if "" in by_section:
        if len(values) > 1:
            raise ValueError(f"--mpp is either one number for all sections, or SECTION=NUMBER for each; got {values}.")
        return by_section[""]
    return by_section


def _verify(folder: Path) -> None:
    from stalign.train._shards import verify_shards

    damages = verify_shards(folder)
    for name, damage in damages.items():
        typer.echo(f"error: section {name!r}: {damage}", err=True)
    if damages:
        typer.echo(
            f"error: {len(damages)} shards in {folder} are damaged. Remove what is named and prepare again.", err=True
        )
        raise typer.Exit(USER_ERROR_CODE)
    typer.echo(f"Every file of {folder} is what was written.")


def _summary(shards: Shards) -> str:
    entries = shards.entries.values()
    n_images = sum(entry.has_image for entry in entries)
    return (
        f"{shards.folder}: {len(entries)} sections ({n_images} with an image), "
        f"{sum(entry.n_spots for entry in entries):,} spots, {len(shards.patients)} patients, {shards.bytes:,} bytes"
    )
