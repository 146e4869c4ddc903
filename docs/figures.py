"""Draw the figures of the pages: ``python docs/figures.py`` (a minute on two cores, no network)."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

import stalign as sta

STATIC = Path(__file__).parent / "_static"


def save(axes: object, name: str) -> None:
    figure = np.atleast_1d(np.asarray(axes, dtype=object)).flat[0].figure
    figure = getattr(figure, "figure", None) or figure
    figure.savefig(STATIC / name, dpi=100, bbox_inches="tight")


def main() -> None:
    mpl.use("Agg")
    STATIC.mkdir(exist_ok=True)
    adata = sta.datasets.synthetic_visium()
    sta.tl.embed(adata)
    sta.tl.spatial_domains(adata, n_domains=5)
    titles = ["true region (synthetic)", "domains, no labels"]
    save(sta.pl.spatial(adata, color=["region", "stalign_domain"], title=titles), "quickstart.png")
    save(sta.pl.niches(adata, n=4), "niches.png")
    save(sta.pl.training(Path(sta.__file__).parent / "models" / "_bundled" / "stalign-mini"), "training.png")


if __name__ == "__main__":
    main()
