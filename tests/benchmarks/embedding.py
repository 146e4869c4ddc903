"""``tl.embed`` against the bare network on tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np
import torch

import stalign as sta
from stalign import models
from stalign.tl._runtime import inference
from tests.benchmarks.measure import alternate, seconds
from tests.benchmarks.rows import Row, at_least, left_open
from tests.benchmarks.sections import real_section
from tests.benchmarks.training import TINY

TARGET = "≥ 0.9 ×"


@contextmanager
def recorded(model: models.STAlign) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Keep the tensors of every forward pass."""
    passes: list[dict[str, torch.Tensor]] = []
    handle = model.register_forward_pre_hook(
        lambda module, positional, named: passes.append({k: v for k, v in named.items() if v is not None}),
        with_kwargs=True,
    )
    try:
        yield passes
    finally:
        handle.remove()


class Pair:
    """The same forward passes twice: inside ``tl.embed``, and alone on the tensors that it made.

    Parameters
    ----------
    adata
        The section; every measurement gets a copy.
    model
        The network.
    arguments
        Of ``tl.embed``, the same for both sides where they say how the passes are made.
    """

    def __init__(self, adata: ad.AnnData, model: models.STAlign, **arguments: Any) -> None:
        self.adata = adata
        self.model = model
        self.arguments = {"device": "cpu", "amp": "off", **arguments}
        # Without threads pixels and profiles are ready together, so that whole passes are seen.
        with recorded(model) as passes:
            self.result = sta.tl.embed(adata, model=model, copy=True, **{**self.arguments, "num_workers": 0})
        self.passes = passes
        n_passed = sum(len(inputs["niche_image"]) for inputs in passes)
        if n_passed != adata.n_obs or any(inputs["niche_image"].ndim != 4 for inputs in passes):
            raise AssertionError(f"the pixels of {n_passed} spots went through the network, of {adata.n_obs}")

    def embed(self) -> float:
        """Seconds of the whole call on a section that nothing is known of."""
        own = self.adata.copy()
        return seconds(lambda: (sta.tl.embed(own, model=self.model, **self.arguments), _finish(self.arguments)))

    def bare(self) -> float:
        """Seconds of the forward passes alone."""
        device = torch.device(self.arguments["device"])
        with inference(self.model, device, self.arguments["amp"]) as network:
            return seconds(lambda: ([network(**inputs) for inputs in self.passes], _finish(self.arguments)))

    def outputs(self) -> np.ndarray:
        """The fused embedding of the bare passes, in the order of the passes."""
        with inference(self.model, torch.device(self.arguments["device"]), self.arguments["amp"]) as network:
            parts = [network.embedding(network(**inputs), "fused") for inputs in self.passes]
        return torch.cat(parts).float().cpu().numpy()


def _finish(arguments: dict[str, Any]) -> None:
    """Wait for a GPU, whose calls return before they are done."""
    if str(arguments["device"]).startswith("cuda"):
        torch.cuda.synchronize()


def embed(data: str | None, *, quick: bool) -> list[Row]:
    what = "spots per second of `tl.embed` by those of its network on tensors in memory, `stalign-mini`"
    found = real_section(data, quick=quick)
    if found is None:
        return [left_open(what, TARGET, "needs --data")]
    adata, name = found
    pair = Pair(adata, models.load("stalign-mini"))
    times = alternate({"embed": pair.embed, "bare": pair.bare}, repeats=1 if quick else 7)
    rate = {side: adata.n_obs / value for side, value in times.items()}
    size = len(next(iter(pair.passes[0].values())))
    how = (
        f"{name}, {adata.n_obs:,} spots, batch {size}, {torch.get_num_threads()} threads, float32; the whole call with "
        "niches, expression profiles and pixels, the model loaded before; the passes on the tensors that the call made"
    )
    rows = [
        at_least(what, times["bare"] / times["embed"], 0.9, "×", how),
        Row("`tl.embed`", rate["embed"], "spots/s", "the same run"),
        Row("its network alone", rate["bare"], "spots/s", "the same run"),
    ]
    rows += [Row(f"{part}, alone", value, "s", f"the call took {times['embed']:.3g} s") for part, value in _parts(pair)]
    return [*rows, *_large(adata, name, quick=quick)]


def _parts(pair: Pair) -> Iterator[tuple[str, float]]:
    """Seconds of what is not the network, one after the other, each the better of two."""
    adata, model = pair.adata.copy(), pair.model
    geometry = model.geometry
    yield "niches", _better(lambda: sta.pp.extract_niches(pair.adata.copy()))
    sta.pp.extract_niches(adata)
    graph = sta.genes.row_normalise(adata.obsp["niche_connectivities"])
    match = sta.genes.match_names(list(adata.var_names), model.genes)

    def profiles() -> None:
        model.preprocess_genes(sta.genes.aggregate(adata.X, match), connectivities=graph)

    def pixels() -> None:
        with sta.pp._niches.PatchReader(adata) as reader:
            for um, side in ((geometry.spot_um, geometry.spot_pixels), (geometry.niche_um, geometry.niche_pixels)):
                reader.read(np.arange(adata.n_obs), um, side)

    yield "expression profiles", _better(profiles)
    yield "pixels", _better(pixels)


def _better(function: Callable[[], None]) -> float:
    return min(seconds(function), seconds(function))


def _large(adata: ad.AnnData, name: str, *, quick: bool) -> list[Row]:
    """The paper's image encoders, whose passes dominate everything else."""
    config = models.config("paper")
    if quick:
        config = config.updated(TINY)
    few = adata[:24].copy()
    sta.settings.verbosity = "ERROR"  # random weights are meant here
    pair = Pair(few, models.STAlign(config), modalities=("image",), outputs=("image",), batch_size=8)
    times = alternate({"embed": pair.embed, "bare": pair.bare}, repeats=1 if quick else 2, warm=True)
    sta.settings.verbosity = "WARNING"
    how = (
        f"{few.n_obs} spots of {name}, image only, batch 8, {torch.get_num_threads()} threads, float32; ResNet-50 at "
        f"32 px and UNI's ViT-L at 224 px with random weights; {few.n_obs / times['bare']:.2f} spots/s bare"
    )
    what = "spots per second of `tl.embed` by those of its network on tensors in memory, the paper's encoders"
    return [at_least(what, times["bare"] / times["embed"], 0.9, "×", how)]
