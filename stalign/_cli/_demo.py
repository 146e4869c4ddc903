"""The main job on a generated slide, told step by step with what came out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stalign._keys import Key

if TYPE_CHECKING:
    from anndata import AnnData

# A few markers for each kind of tissue on the generated slide, as a pathologist might name them.
MARKERS = {
    "tumour": ["ERBB2", "KRT8", "KRT18", "EPCAM", "MUC1"],
    "immune": ["CD3E", "PTPRC", "MS4A1", "CD79A", "CD2"],
    "stroma": ["COL1A1", "COL3A1", "DCN", "LUM", "POSTN"],
    "adipose": ["ADIPOQ", "PLIN1", "FABP4", "LPL", "CIDEC"],
    "normal epithelium": ["KRT5", "KRT14", "KRT17", "OXTR", "MYH11"],
}
SHOWN = ("ERBB2", "COL1A1")
TRUTH = "region"
_STEPS = 6


class _Story:
    """Numbers the steps and times them."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self._say, self._step, self._start = say, 0, time.perf_counter()
        self._begin = self._start

    def tell(self, text: str) -> None:
        now = time.perf_counter()
        self._step += 1
        self._say(f"[{self._step}/{_STEPS}] {text} ({now - self._start:.1f} s)")
        self._start = now

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._begin


def run(
    out: Path,
    *,
    seed: int,
    n_rows: int,
    n_cols: int,
    device: str | None,
    say: Callable[[str], Any],
) -> AnnData:
    """Make a slide, embed it, find domains, name and predict; write figures and an ``.h5ad`` to ``out``."""
    with warnings.catch_warnings():
        # That the slide has few of the model's genes is told below; the other comes from what squidpy imports.
        warnings.filterwarnings("ignore", message="The data cover", category=UserWarning)
        warnings.filterwarnings("ignore", category=SyntaxWarning)
        return _run(out, seed=seed, n_rows=n_rows, n_cols=n_cols, device=device, say=say)


def _run(out: Path, *, seed: int, n_rows: int, n_cols: int, device: str | None, say: Callable[[str], Any]) -> AnnData:
    import stalign as sta
    from stalign._cli._files import write_slide

    say(f"stalign {sta.__version__}: the main job on a slide that is SYNTHETIC (generated, no patient's tissue).")
    story = _Story(say)
    adata = sta.datasets.synthetic_visium(n_rows=n_rows, n_cols=n_cols, seed=seed)
    n_regions = adata.obs[TRUTH].nunique()
    story.tell(
        f"Generated a section: {adata.n_obs:,} spots x {adata.n_vars:,} genes, H&E-like image, {n_regions} regions "
        f"whose place is known, seed {seed}."
    )
    model = sta.models.load("stalign-mini")
    sta.tl.embed(adata, model=model, device=device)
    record = adata.uns[Key.UNS][Key.uns.EMBED]
    story.tell(
        f"Embedded with {model.config.name} on {record['device']}: obsm['X_stalign'], "
        f"{adata.obsm[Key.obsm.EMBEDDING].shape[1]} numbers a spot, from the image and "
        f"{record['genes']['n_covered']} of the {len(model.genes):,} genes that the model knows."
    )
    sta.tl.spatial_domains(adata, n_domains=n_regions)
    story.tell(f"Found {n_regions} domains with no labels: {_agreement(adata)}.")
    sta.tl.zero_shot_annotate(adata, {label: MARKERS[label] for label in adata.obs[TRUTH].cat.categories})
    adata.uns[f"{Key.obs.ANNOTATION}_colors"] = list(adata.uns[f"{TRUTH}_colors"])  # the same labels in the same order
    story.tell(f"Named spots from {len(MARKERS)} lists of marker genes, with no training: {_named(adata)}.")
    genes = [gene for gene in model.predicted_genes if gene in adata.var_names]
    sta.tl.predict_expression(adata, genes)
    story.tell(f"Predicted {len(genes)} genes from the image alone: {_predicted(adata)}.")
    files = _draw(adata, out)
    write_slide(adata, out / "synthetic_visium.h5ad")
    story.tell("Drew the figures and wrote the AnnData.")
    for file in [*files, out / "synthetic_visium.h5ad"]:
        say(f"      {file}")
    say(
        f"Done in {story.elapsed:.0f} s. The numbers say how the model does on a drawn slide; for real sections see "
        "docs/benchmarks.md."
    )
    return adata


def _agreement(adata: AnnData) -> str:
    from sklearn.metrics import adjusted_rand_score

    ari = adjusted_rand_score(adata.obs[TRUTH].astype(str), adata.obs[Key.obs.DOMAIN].astype(str))
    return f"adjusted Rand index {ari:.2f} against the true regions (1 is perfect, 0 is chance)"


def _named(adata: AnnData) -> str:
    from sklearn.metrics import accuracy_score, f1_score

    truth, names = adata.obs[TRUTH].astype(str), adata.obs[Key.obs.ANNOTATION].astype(str)
    labels = sorted(truth.unique())
    f1 = f1_score(truth, names, labels=labels, average="macro", zero_division=0)
    return f"{accuracy_score(truth, names):.0%} of spots right, macro F1 {f1:.2f}"


def _predicted(adata: AnnData) -> str:
    """Correlations of the genes that mark a region; the others of the slide do not depend on place."""
    r = adata.var.loc[adata.var["programme"] != "background", Key.var.PREDICTED_R].dropna()
    return (
        f"Pearson r with the measured ones over the {len(r)} that mark a region: median {r.median():.2f}, from "
        f"{r.min():.2f} ({r.idxmin()}) to {r.max():.2f} ({r.idxmax()})"
    )


def _draw(adata: AnnData, out: Path) -> list[Path]:
    """Write the figures: every one is a call of ``stalign.pl``."""
    import numpy as np

    import stalign as sta
    from stalign._cli._files import write_figure

    figures: dict[str, Callable[[], Any]] = {
        "1_tissue": lambda: sta.pl.spatial(adata, color=None, title="synthetic slide"),
        "2_niches": lambda: sta.pl.niches(adata),
        "3_domains": lambda: sta.pl.spatial(
            adata, color=[TRUTH, Key.obs.DOMAIN], title=["true region (synthetic)", "domains, no labels"]
        ),
        "4_annotation": lambda: sta.pl.annotation(adata),
        **{f"5_{gene}": partial(sta.pl.expression, adata, gene) for gene in SHOWN},
    }
    files = []
    for name, draw in figures.items():
        axes = np.atleast_1d(np.asarray(draw(), dtype=object))
        files.append(out / f"{name}.png")
        figure = axes.flat[0].figure
        write_figure(getattr(figure, "figure", None) or figure, files[-1])
    return files
