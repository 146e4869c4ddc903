"""What each part of ``stalign-mini`` is good for, on training sections left out in turn and on simulated tissue.

python -m tests.benchmarks.ablation --data PATH --out docs/ablation.md
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import patch

import anndata as ad
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import adjusted_rand_score

import stalign as sta
from stalign.benchmark._metrics import pearson
from stalign.genes import normalise_log1p
from stalign.models.encoders import _slide_profile
from stalign.models.encoders._slide_profile import STEPS, autocorrelation
from stalign.pp._prepare import prepare_config
from stalign.train._config import PretrainConfig
from tests.benchmarks.simulated import simulate

CONFIG = Path(sta.__file__).parent / "train" / "configs" / "stalign-mini.toml"
LABELLED = ("her2st/C1", "her2st/D1", "her2st/E1")
LEFT_OUT = "C"
SIMULATED = [(kind, seed) for kind in ("layers", "blobs") for seed in range(1, 5)]
CNN = {
    "encoder": "colour-cnn",
    "args": {"model": "resnet10t", "model_args": {"channels": [24, 48, 96, 128], "stem_width": 12}},
}

PREFACE = """# What each part is good for

Made by

```bash
{command}
```

on training sections and simulated tissue alone; the sections of [](benchmarks.md) have no part in it. Means over seeds
{seeds} (standard deviation over seeds in brackets).

"""
PROFILES = """## The slide profile

No network and nothing trained: domains (`tl.spatial_domains` at its defaults, true number of classes, ARI) from the
inputs of the two gene encoders side by side. Real: {labelled}, with the pathologist's regions, all spots. Simulated:
{n_simulated} slides made from the programmes of `crc_visium/CRC_16`, curved layers and blobs
(`tests/benchmarks/simulated.py`); there a new seed is a new slide.

"""
NETWORKS = """## The network

Trained with the recipe of [](training.md) on everything but patient {left_out}, whose five sections with an image are
then asked for: recall@5 % of a spot's own expression given its image, and correlation of predicted with measured
expression over the 50 most variable genes that the head predicts. Domains: ARI of the fused embedding on {labelled}.

"""

Variant = dict[str, object]
NETWORK: dict[str, Variant] = {
    "as shipped": {},
    "images by a small CNN, trained along": {"spot_image": CNN, "niche_image": CNN},
    "images by statistics alone, no learned filters": {
        "spot_image": {"args": {"n_filters": 0}},
        "niche_image": {"args": {"n_filters": 0}},
    },
    "projection heads with a hidden layer": {"heads": {"hidden": 256, "skip": True}},
    "no structure terms": {"objective": {"structure": 0.0}},
}


def fixed(spot: list[float], niche: list[float]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Weights of the steps that are the same on every slide."""
    return lambda *_: (np.array(niche), np.array(spot))


@contextmanager
def changed(**functions: Callable[..., object]) -> Iterator[None]:
    """The slide profile with some of its parts replaced."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch.object(_slide_profile, name, function))
        yield


def no_autocorrelation(graph: object, expression: object) -> tuple[np.ndarray, np.ndarray]:
    n_genes = expression.shape[1]  # type: ignore[attr-defined]
    return np.ones(n_genes), np.zeros(n_genes)


def powered(power: float) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Autocorrelations to a power, which the profile then takes to its own."""

    def weights(graph: object, expression: object) -> tuple[np.ndarray, np.ndarray]:
        found, error = autocorrelation(graph, expression)
        above = np.maximum(found - 1.5 * error, 0.0)
        return above**power, np.zeros_like(above)

    return weights


ONE, NICHE = [1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]
PROFILE: dict[str, tuple[dict[str, Callable[..., object]], tuple[str, ...]]] = {
    "as shipped": ({}, ("spot", "niche")),
    "niche alone": ({}, ("niche",)),
    "spot alone": ({}, ("spot",)),
    "spot as it is, niche mean": ({"_learn_smoothing": fixed(ONE, NICHE)}, ("spot", "niche")),
    f"niche mean over {STEPS[-1]} steps on every slide": (
        {"_learn_smoothing": fixed(ONE, [0, 0, 0, 0, 1.0])},
        ("spot", "niche"),
    ),
    "all genes alike": ({"autocorrelation": no_autocorrelation}, ("spot", "niche")),
    "genes by their autocorrelation itself": ({"autocorrelation": powered(4.0)}, ("spot", "niche")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training sections")
    parser.add_argument("--out", type=Path, default=Path("ablation.md"), help="a .csv is written beside it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=["profile", "network"], default=["profile", "network"])
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of what to leave out or replace")
    arguments = parser.parse_args()
    sta.settings.progress = False
    sta.settings.verbosity = "WARNING"
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    kept = arguments.out.with_suffix(".csv")
    if kept.is_file():
        before = pd.read_csv(kept)
        rows += before[~before["part"].isin(arguments.parts)].to_dict("records")
    if "profile" in arguments.parts:
        rows += profile_rows(arguments.data, arguments.seeds, arguments.methods)
    if "network" in arguments.parts:
        rows += network_rows(arguments.data, arguments.seeds, arguments.methods)
    table = pd.DataFrame(rows)
    table.to_csv(kept, index=False)
    arguments.out.write_text(to_markdown(table, arguments), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


# -- the profile ------------------------------------------------------------------------------------------------------


def labelled(data: Path, name: str) -> tuple[ad.AnnData, np.ndarray]:
    adata = ad.read_h5ad(data / f"{name}.h5ad")
    return adata, adata.obs["annotation"].astype(str).to_numpy()


def wanted(method: str, patterns: list[str]) -> bool:
    return any(fnmatch(method, pattern) for pattern in patterns)


def profile_rows(data: Path, seeds: list[int], methods: list[str]) -> list[dict[str, object]]:
    model = sta.models.load("stalign-mini")
    source = data / "crc_visium" / "CRC_16.h5ad"
    rows = []
    for seed in seeds:
        slides = {name: labelled(data, name) for name in LABELLED}
        for kind, number in SIMULATED:
            adata = simulate(source, kind, 1000 * seed + number)
            slides[f"simulated {kind}/{number}"] = adata, adata.obs["domain"].to_numpy()
        for name, (adata, truth) in slides.items():
            for method, (functions, levels) in PROFILE.items():
                if not wanted(method, methods):
                    continue
                with changed(**functions):
                    value = ari(profiles(model, adata, levels), truth, seed)
                group = "simulated" if name.startswith("simulated") else name
                rows.append(
                    {"part": "profile", "method": method, "metric": f"ARI, {group}", "seed": seed, "value": value}
                )
        print(f"profiles, seed {seed}: done", flush=True)
    return rows


def profiles(model: sta.models.STAlign, adata: ad.AnnData, levels: tuple[str, ...]) -> np.ndarray:
    """Inputs of the gene encoders side by side, at the same scale."""
    adata = adata.copy()
    for library in adata.uns.get("spatial", {}).values():
        library.pop("images", None)
    mpp = None if "spatial" in adata.uns else 1.0
    sta.pp.extract_niches(adata, n_neighbors=model.geometry.n_neighbors, mpp=mpp, image=None)
    counts = sta.genes.aggregate(adata.X, sta.genes.match_names(adata.var_names, model.genes))
    graph = sta.genes.row_normalise(adata.obsp["niche_connectivities"])
    inputs = dict(zip(("spot", "niche"), model.preprocess_genes(counts, connectivities=graph), strict=True))
    return np.hstack([inputs[level] for level in levels])


def ari(values: np.ndarray, truth: np.ndarray, seed: int) -> float:
    adata = ad.AnnData(obsm={"X_profile": values.astype(np.float32)}, shape=(len(values), 0))
    sta.tl.spatial_domains(adata, n_domains=len(set(truth)), use_rep="X_profile", random_state=seed)
    return float(adjusted_rand_score(truth, adata.obs["stalign_domain"]))


# -- the network ------------------------------------------------------------------------------------------------------


def network_rows(data: Path, seeds: list[int], methods: list[str]) -> list[dict[str, object]]:
    from stalign import train

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = train.read_config(CONFIG, [f"data.root={data}"])
        folder = prepare_config(replace(base, out=str(Path(scratch) / "all")))
        sections = train.open_shards(folder).open()
        kept = [section for section in sections if section.patient != LEFT_OUT]
        genes = (folder / "genes.txt").read_text(encoding="utf-8").split()
        for method, changes in NETWORK.items():
            for seed in seeds if wanted(method, methods) else ():
                out = Path(scratch) / "model"
                config = replace(varied(base, changes), seed=seed, out=str(out))
                model = sta.models.load(str(train.pretrain(config, kept, genes=genes)))
                rows += [
                    {"part": "network", "method": method, "seed": seed, **row} for row in measured(data, model, seed)
                ]
                for folder in Path(scratch).glob("model*"):
                    _remove(folder)
            print(f"{method}: done", flush=True)
    return rows


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


def varied(base: PretrainConfig, changes: Variant) -> PretrainConfig:
    network = {name: value for name, value in changes.items() if name != "objective"}
    config = replace(base, network=replace(base.network, changes=network))
    objective = changes.get("objective", {})
    return replace(config, objective=replace(config.objective, **objective))  # type: ignore[arg-type]


def measured(data: Path, model: sta.models.STAlign, seed: int) -> Iterator[dict[str, object]]:
    recall, correlation = [], []
    for number in range(2, 7):
        adata = ad.read_h5ad(data / "her2st" / f"{LEFT_OUT}{number}.h5ad")
        sta.tl.embed(adata, model=model)
        recall.append(sta.tl.retrieve(adata, adata, direction="image->gene", k=round(0.05 * adata.n_obs)).recall)
        correlation.append(head_correlation(adata, model))
    yield {"metric": "recall@5 %, patient left out", "value": float(np.mean(recall))}
    yield {"metric": "Pearson r, patient left out", "value": float(np.mean(correlation))}
    for name in LABELLED:
        adata, truth = labelled(data, name)
        sta.tl.embed(adata, model=model)
        yield {"metric": f"ARI, {name}", "value": ari(adata.obsm["X_stalign"], truth, seed)}


def head_correlation(adata: ad.AnnData, model: sta.models.STAlign) -> float:
    expression = normalise_log1p(adata.X).tocsc()
    known = [gene for gene in model.predicted_genes if gene in adata.var_names]
    measured = expression[:, adata.var_names.get_indexer(known)].toarray()
    top = np.argsort(-measured.var(axis=0), kind="stable")[:50]
    predicted = adata.copy()
    sta.tl.predict_expression(predicted, [known[i] for i in top], model=model, method="head")
    columns = predicted.var_names.get_indexer([known[i] for i in top])
    values = np.asarray(predicted.layers["stalign_predicted"][:, columns])
    return float(np.nanmean(pearson(values, measured[:, top])))


# -- the page ---------------------------------------------------------------------------------------------------------


def to_markdown(table: pd.DataFrame, arguments: argparse.Namespace) -> str:
    command = f"python -m tests.benchmarks.ablation --data PATH --out {arguments.out}"
    seeds = ", ".join(str(seed) for seed in arguments.seeds)
    names = ", ".join(LABELLED)
    parts = [PREFACE.format(command=command, seeds=seeds)]
    texts = {
        "profile": PROFILES.format(labelled=names, n_simulated=len(SIMULATED) * len(arguments.seeds)),
        "network": NETWORKS.format(left_out=LEFT_OUT, labelled=names),
    }
    for part, text in texts.items():
        rows = table[table["part"] == part]
        if not len(rows):
            continue
        # Slides of one seed first, so that the spread is that over seeds.
        by_seed = rows.groupby(["method", "metric", "seed"], sort=False)["value"].mean()
        cells = by_seed.groupby(level=[0, 1], sort=False).agg(["mean", "std"])
        wide = cells.apply(lambda r: f"{r['mean']:.3f} ({r['std']:.3f})", axis=1).unstack("metric")
        wide = wide.loc[list(dict.fromkeys(rows["method"])), list(dict.fromkeys(rows["metric"]))]
        header = "| | " + " | ".join(wide.columns) + " |\n|---|" + "---|" * len(wide.columns)
        lines = [
            f"| {name} | " + " | ".join(cells) + " |" for name, cells in zip(wide.index, wide.to_numpy(), strict=True)
        ]
        parts.append(text + header + "\n" + "\n".join(lines) + "\n\n")
    return "".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    main()
