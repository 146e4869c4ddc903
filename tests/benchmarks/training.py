"""Training pairs per second: the published step, and ours with cached features of the frozen encoders."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from stalign import models
from tests.benchmarks.measure import call, isolated, peak_rss
from tests.benchmarks.rows import Row, at_least

N_SPOTS = 1_000
N_CLUSTERS = 6
WARM = 2  # steps that are not timed
# A network of the same parts that fits a test.
TINY = {
    "spot_image": {
        "encoder": "colour-cnn",
        "args": {"model": "resnet10t", "model_args": {"channels": [8, 8, 8, 8], "stem_width": 8}},
        "tokens": {"kind": "linear", "kernel": 1, "stride": 1},
    },
    "niche_image": {
        "args": {"embed_dim": 64, "depth": 1, "num_heads": 1},
        "tokens": {"kind": "linear", "kernel": 1, "stride": 1},
    },
    "niche_gene": {"args": {"layers": 1, "hidden": [32, 32]}},
    "heads": {"hidden": 64, "out": 64},
}


def build(name: str, *, tiny: bool) -> models.STAlign:
    """Make the network of a config with random weights."""
    torch.manual_seed(0)
    config = models.config(name)
    return models.STAlign(config.updated(TINY) if tiny else config)


def measured(times: list[float], batch: int) -> dict[str, Any]:
    """What a child reports: seconds of its steps, and memory."""
    return {"times": times, "batch": batch, "peak": peak_rss(), "threads": torch.get_num_threads()}


# --- the published step ------------------------------------------------------------------------------------------


def published(*, batch: int, steps: int, features: bool = False, tiny: bool = False) -> dict[str, Any]:
    """Time steps as published; with ``features``, without its niche image encoder."""
    from tests.benchmarks.published_step import N_NEGATIVES, PublishedStep, random_spots

    model = build("published", tiny=tiny)
    step = PublishedStep(model, batch)
    times = []
    for number in range(steps):
        spots = [random_spots(model, batch, features=features, seed=number * 10 + i) for i in range(1 + N_NEGATIVES)]
        start = time.perf_counter()
        loss = step(spots[0], spots[1:])
        times.append(time.perf_counter() - start)
        if not np.isfinite(loss):
            raise AssertionError(f"the loss is {loss}")
    return measured(times, batch)


# --- ours --------------------------------------------------------------------------------------------------------


def encoded_section(model: models.STAlign, n: int) -> Any:
    """A section whose frozen encoders have run: spots' pixels, and random features in place of the others."""
    from stalign.train._data import EncodedSection, Section

    rng = np.random.default_rng(0)
    side = model.geometry.spot_pixels
    empty = sp.csr_matrix((n, 1), dtype=np.float32)
    section = Section(
        name="made",
        patient="made",
        counts=empty,
        connectivities=sp.identity(n, dtype=np.float32, format="csr"),
        spot_image=rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
        niche_image=np.zeros((n, 1, 1, 3), dtype=np.uint8),
    )
    wide = {name: model.encoder(name).input_dim for name in ("spot_gene", "niche_gene")}
    return EncodedSection(
        section=section,
        **{name: rng.standard_normal((n, dim), dtype=np.float32) for name, dim in wide.items()},
        clusters=rng.integers(0, N_CLUSTERS, n),
        niche_feature=rng.standard_normal((n, 1, model.encoder("niche_image").dim), dtype=np.float32),
    )


def ours(*, batch: int, steps: int, tiny: bool = False) -> dict[str, Any]:
    """Time the package's own steps, from drawing the batch to the optimiser; ``batch`` is that of all processes."""
    from stalign.train._config import AugmentConfig, ObjectiveConfig, OptimiserConfig, RunConfig
    from stalign.train._data import Batches
    from stalign.train._distributed import World
    from stalign.train._fit import make_trainer, run_steps
    from stalign.train._module import Alignment

    model = build("paper", tiny=tiny)
    model.to(memory_format=torch.channels_last)
    encoded = encoded_section(model, N_SPOTS)
    steps += WARM
    module = Alignment(
        model,
        objective=ObjectiveConfig(negatives="paper", symmetric=False),
        optimiser=OptimiserConfig(steps=steps, batch_size=batch),
        seed=0,
    )

    def batches(world: World) -> Batches:
        return Batches(
            [encoded],
            steps=steps,
            batch_size=batch,
            augment=AugmentConfig(drop_modality=0.0),
            image_sections=1.0,
            preprocess={name: model.encoder(name).preprocess for name in ("spot_image", "niche_image")},
            stratified=True,
            seed=0,
            rank=world.rank,
            world_size=world.size,
        )

    clock, run = make_clock(), RunConfig()
    run_steps(make_trainer(run, steps=steps, callbacks=[clock]), module, batches, run)
    return measured(np.diff(clock.ends)[WARM - 1 :].tolist(), batch)


def make_clock() -> Any:
    """A callback that keeps the moments at which steps ended."""
    import lightning

    class Clock(lightning.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, *arguments: Any, **named: Any) -> None:
            self.ends.append(time.perf_counter())

    return Clock()


# --- the table ---------------------------------------------------------------------------------------------------


def training(data: str | None, *, quick: bool) -> list[Row]:
    """Each side in processes of its own; ours before and after the published step, whose faster step counts."""
    run = _here if quick else isolated

    def child(side: str, batch: int, steps: int, **arguments: Any) -> dict[str, Any]:
        steps = 1 if quick else steps
        result = run(f"training:{side}", batch=batch, steps=steps, tiny=quick, **arguments)
        print(f"  {side}, batch {batch}: {statistics.median(result['times']):.3g} s a step", flush=True)
        return result

    before = child("ours", 4, 20)
    theirs = child("published", 4, 2)
    after = child("ours", 4, 20)
    at_hand = child("published", 4, 5, features=True)
    large = child("ours", 64, 5)
    rate = {
        "ours": 4 / statistics.median(before["times"] + after["times"]),
        "published": 4 / min(theirs["times"]),
        "at hand": 4 / statistics.median(at_hand["times"]),
        "large": 64 / statistics.median(large["times"]),
    }
    small_gain, large_gain = rate["ours"] / rate["published"], rate["large"] / rate["published"]
    threads = f"{before['threads']} threads, float32, random weights"
    published_how = (
        f"six forward passes with gradient, one backward pass, AdamW on all 395 M parameters; the faster of "
        f"{len(theirs['times'])} steps; {threads}"
    )
    ours_how = (
        "UNI's and scGPT's features cached, negatives from the batch; drawing, augmentation, forward, backward, "
        f"clipping and AdamW on 92 M parameters through Lightning; median; {threads}"
    )
    per_pair = (
        "extrapolated: the published side is taken to cost as much per pair as with batch 4, since its memory at 64 "
        f"(about {_at_64(theirs):,.0f} GB) is out of reach; 98 % of its arithmetic is UNI's, the same for every image"
    )
    return [
        at_least("training pairs per second by those of the published step, batch 4", small_gain, 100, "×", ours_how),
        Row(
            "training pairs per second by those of the published step, batch 64",
            large_gain,
            "×",
            per_pair,
            "more than at batch 4",
            bool(large_gain > small_gain and large_gain >= 100),
        ),
        Row("the published step, batch 4", rate["published"], "pairs/s", published_how),
        Row("the published step with UNI's features at hand, batch 4", rate["at hand"], "pairs/s", "the rest as above"),
        Row("ours, batch 4", rate["ours"], "pairs/s", "before and after the published step"),
        Row("ours, batch 64", rate["large"], "pairs/s", "the same run"),
        Row("memory of the published step, batch 4", theirs["peak"], "GB", "peak of its process"),
        Row("memory with UNI's features at hand, batch 4", at_hand["peak"], "GB", "peak of its process"),
        Row("memory of ours, batch 4", before["peak"], "GB", "peak of its process"),
        Row("memory of ours, batch 64", large["peak"], "GB", "peak of its process"),
    ]


def _here(target: str, **arguments: Any) -> Any:
    return call(target, arguments)


def _at_64(result: dict[str, Any]) -> float:
    """GB at batch 64, of which weights, gradients and the optimiser's two moments (16 bytes a parameter) stay."""
    fixed = 395e6 * 16 / 1e9
    return fixed + (result["peak"] - fixed) * 16


def scaling(data: str | None, *, quick: bool) -> list[Row]:
    """Two processes that share each batch against one, started by ``torchrun``."""
    batch, steps = 64, 4
    cores = torch.get_num_threads()
    if quick:
        result = ours(batch=4, steps=1, tiny=True)
        return [Row("ours in this process", 4 / result["times"][0], "pairs/s", "a quick run starts no others")]
    one = isolated("training:ours", threads=1, batch=batch, steps=steps)
    two = isolated("training:ours", threads=1, processes=2, batch=batch, steps=steps)
    rate = {name: batch / statistics.median(result["times"]) for name, result in (("one", one), ("two", two))}
    how = (
        f"batch {batch} in all, one thread a process, `torchrun` with gloo on {cores} cores, the networks and steps of "
        "the lines above; gradients and batch statistics cross over, as do the negatives"
    )
    return [
        Row("training pairs per second of two processes by those of one", rate["two"] / rate["one"], "×", how),
        Row("one process", rate["one"], "pairs/s", f"{one['peak']:.1f} GB"),
        Row("two processes", rate["two"], "pairs/s", f"{two['peak']:.1f} GB each"),
    ]
