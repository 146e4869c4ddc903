"""The commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stalign._cli._app import MODELS, app, examples

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import Geometry

FIGURE = "training.png"


@app.command(
    rich_help_panel=MODELS,
    epilog=examples(
        "stalign pretrain my-model.toml --set optimiser.steps=20",
        "torchrun --nproc-per-node 4 -m stalign pretrain my-model.toml",
    ),
)
def pretrain(
    config: Annotated[Path, typer.Argument(help="A TOML config, see stalign/train/configs/.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the config: --set optimiser.steps=10")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Train a model with the three alignments on the sections that CONFIG names.

    The same command again goes on after an interruption. For several GPUs or nodes start it with torchrun.
    """
    from stalign import settings, train
    from stalign.pp._prepare import prepare_config
    from stalign.train._distributed import first_rank_first, started_rank, world
    from stalign.train._pretrain import run_folder

    settings.progress = progress
    if started_rank():
        settings.verbosity = "WARNING"  # the first process speaks for all
    run = train.read_config(config, changes or [])
    with first_rank_first():
        prepare_config(run)
    try:
        folder = train.pretrain(run)
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    if world().rank:
        return
    figure = _draw_curves(folder, run_folder(run) / FIGURE)
    typer.echo(f"{config} -> {folder} (checkpoints, log and {figure.name} in {figure.parent})")


@app.command(
    rich_help_panel=MODELS,
    epilog=examples("stalign finetune cohort/*.h5ad --out adapted --validation held_out.h5ad"),
)
def finetune(
    slides: Annotated[list[Path], typer.Argument(help="Slides of the cohort: .h5ad, .zarr, or Space Ranger folders.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    model: Annotated[str, typer.Option(help="A bundled model, a model folder, or a Hub id.")] = "stalign-mini",
    validation: Annotated[list[Path] | None, typer.Option(help="A slide that is only measured.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 200,
    batch_size: Annotated[int, typer.Option(help="Spots of one step.", min=2)] = 192,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-4,
    mpp: Annotated[float | None, typer.Option(help="µm per full-resolution pixel, if nothing states it.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", min=0)] = 0,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Adapt a model to a cohort: its encoders stay, what stands on them is trained on."""
    from stalign import models, settings, train
    from stalign.io._slides import read_slide

    settings.progress = progress
    if out.exists():
        raise FileExistsError(f"{out} exists. Choose another --out.")
    network = models.load(model)
    cohort = [_with_niches(read_slide(path), network.geometry, mpp) for path in slides]
    held_out = [_with_niches(read_slide(path), network.geometry, mpp) for path in validation or []]
    train.finetune(network, cohort, validation=held_out, steps=steps, batch_size=batch_size, lr=lr, seed=seed, out=out)
    _draw_curves(out, out / FIGURE)
    typer.echo(f"{model} -> {out}")


def _with_niches(adata: AnnData, geometry: Geometry, mpp: float | None) -> AnnData:
    from stalign import pp

    pp.extract_niches(
        adata, mpp=mpp, n_neighbors=geometry.n_neighbors, spot_um=geometry.spot_um, niche_um=geometry.niche_um
    )
    return adata


def _draw_curves(folder: Path, file: Path) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")

    from stalign import pl
    from stalign._cli._files import write_figure

    write_figure(pl.training(folder)[0].figure, file)
    return file
