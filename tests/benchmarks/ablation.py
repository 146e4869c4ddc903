"""What each part of ``stalign-mini`` is good for, on training sections left out in turn and on simulated tissue.

python -m tests.benchmarks.ablation --data PATH --out docs/ablation.md
"""

from __future__ import annotations

import argparse
import copy
import itertools
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
from stalign import train
from stalign.benchmark import Section
from stalign.benchmark._methods import DOMAIN_METHODS
from stalign.benchmark._metrics import pearson
from stalign.genes import normalise_log1p
from stalign.models.encoders import _slide_profile
from stalign.models.encoders._slide_profile import STEPS, autocorrelation
from stalign.pp._prepare import prepare_config
from stalign.train import _alignment, _prediction
from stalign.train._alignment import fit_alignment
from stalign.train._config import PredictionFitConfig, PretrainConfig
from stalign.train._data import EncodedSection
from stalign.train._evaluate import embed_section, recall_at
from stalign.train._features import encode_sections
from stalign.train._prediction import fit_prediction
from tests.benchmarks.simulated import simulate

CONFIG = Path(sta.__file__).parent / "train" / "configs" / "stalign-mini.toml"
LABELLED = ("her2st/C1", "her2st/D1", "her2st/E1")
LEFT_OUT = "C"
# Everyone with an image that follows the tissue; the lymph node's does not (its data sheet says so).
PATIENTS = ("C", "CRC_16", "MSTI_1")
# Programmes of three tissues, two shapes of domains.
SOURCES = ("crc_visium/CRC_16", "her2st/D2", "her2st/E2")
SIMULATED = [(source, kind) for source in SOURCES for kind in ("layers", "blobs")]
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
{n_simulated} slides made from the programmes of {sources}, curved layers and blobs
(`tests/benchmarks/simulated.py`); there a new seed is a new slide. The last two rows are the plain methods of the same
name in [](benchmarks.md).

"""
NETWORKS = """## The network

Trained with the recipe of [](training.md) on everything but patient {left_out}, whose five sections with an image are
then asked for: recall@5 % of a spot's own expression given its image, and correlation of predicted with measured
expression over the 50 most variable genes that the head predicts. Domains: ARI of the fused embedding on {labelled}.

"""

CLOSED_FORM = """## What is fitted in closed form

On networks that were trained without the patient named in the column, image sides and head are fitted in several ways.
Recall@5 % of a spot's own expression given its image; correlation of predicted with measured expression over the 50
most variable genes that the head predicts, and for how many of them the squared error is below that of the slide's own
mean. For patient C, means over five sections.

"""

Row = dict[str, object]
Variant = dict[str, object]
NETWORK: dict[str, Variant] = {
    "as shipped": {},
    "image sides as the contrast left them": {"alignment": {"enabled": False}},
    "the same, projection heads with a hidden layer": {
        "heads": {"hidden": 256, "skip": True},
        "alignment": {"enabled": False},
    },
    "images by a small CNN, trained along": {"spot_image": CNN, "niche_image": CNN},
    "images by statistics alone, no learned filters": {
        "spot_image": {"args": {"n_filters": 0}},
        "niche_image": {"args": {"n_filters": 0}},
    },
    "no structure terms": {"objective": {"structure": 0.0}},
}


# Changes of functions of the alignment and of the head, changes of the config, and whether sections without an image
# take part in the head.
CLOSED: dict[str, tuple[dict[str, object], Variant, bool]] = {
    "as shipped": ({}, {}, True),
    "image sides as the contrast left them": ({}, {"alignment": {"enabled": False}}, True),
    "image sides with the penalty on the tokens": ({"_linear_tokens": lambda *_: None}, {}, True),
    "head: each gene for itself": ({}, {"prediction": {"programmes": [0]}}, True),
    "head: number of programmes by squared error": (
        {},
        {"prediction": {"programmes": PredictionFitConfig().programmes}},
        True,
    ),
    "head: programmes of sections with an image alone": ({}, {}, False),
    "head: no average over the niche": ({"_NICHE_SHARES": (0.0,)}, {}, True),
}


def fixed(spot: list[float], niche: list[float]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Weights of the steps that are the same on every slide."""
    return lambda *_: (np.array(niche), np.array(spot))


@contextmanager
def changed(**functions: object) -> Iterator[None]:
    """The slide profile, or what is fitted in closed form, with some of its parts replaced."""
    with ExitStack() as stack:
        for name, function in functions.items():
            owner = next(module for module in (_slide_profile, _alignment, _prediction) if hasattr(module, name))
            stack.enter_context(patch.object(owner, name, function))
        yield


def no_autocorrelation(graph: object, expression: object) -> tuple[np.ndarray, np.ndarray]:
    n_genes = expression.shape[1]  # type: ignore[attr-defined]
    return np.ones(n_genes), np.zeros(n_genes)


def powered(power: float) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Autocorrelations to a power, which the profile then takes to its own."""

    def weights(graph: object, expression: object) -> tuple[np.ndarray, np.ndarray]:
        found, error = autocorrelation(graph, expression)
        return np.maximum(found, 0.0) ** power, error

    return weights


def clear_of_chance(graph: object, expression: object) -> tuple[np.ndarray, np.ndarray]:
    found, error = autocorrelation(graph, expression)
    return np.maximum(found - 1.5 * error, 0.0), error


ONE, NICHE = [1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]
PLAIN = ("niche-pca", "smoothed-genes")
CLUSTERING = {"k-means": "kmeans"}
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
    "only genes clear of chance (1.5 standard errors)": (
        {"autocorrelation": clear_of_chance},
        ("spot", "niche"),
    ),
    "genes by their autocorrelation itself": ({"autocorrelation": powered(4.0)}, ("spot", "niche")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training sections")
    parser.add_argument("--out", type=Path, default=Path("ablation.md"), help="a .csv is written beside it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of what to leave out or replace")
    arguments = parser.parse_args()
    sta.settings.progress = False
    sta.settings.verbosity = "WARNING"
    torch.set_num_threads(1)
    for part in arguments.parts:
        for rows in PARTS[part](arguments.data, arguments.seeds, arguments.methods):
            write(keep(pd.DataFrame(rows), arguments.out.with_suffix(".csv")), arguments)
    print(arguments.out.read_text(encoding="utf-8"))


def keep(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Put rows into the table beside the page, in the place of earlier ones of the same method, metric and seed."""
    name = ["part", "method", "metric", "seed"]
    if path.is_file():
        before = pd.read_csv(path)
        again = pd.MultiIndex.from_frame(before[name]).isin(pd.MultiIndex.from_frame(rows[name]))
        rows = pd.concat([before[~again], rows], ignore_index=True)
    rows.to_csv(path, index=False)
    return rows


# -- the profile ------------------------------------------------------------------------------------------------------


def labelled(data: Path, name: str) -> tuple[ad.AnnData, np.ndarray]:
    adata = ad.read_h5ad(data / f"{name}.h5ad")
    return adata, adata.obs["annotation"].astype(str).to_numpy()


def wanted(method: str, patterns: list[str]) -> bool:
    return any(fnmatch(method, pattern) for pattern in patterns)


def profile_rows(data: Path, seeds: list[int], methods: list[str]) -> Iterator[list[Row]]:
    """Yield the rows of one seed after another."""
    model = sta.models.load("stalign-mini")
    for seed in seeds:
        rows: list[Row] = []
        slides = {name: labelled(data, name) for name in LABELLED}
        for source, kind in SIMULATED:
            adata = simulate(data / f"{source}.h5ad", kind, 1000 * seed + 1)
            slides[f"simulated {source}/{kind}"] = adata, adata.obs["domain"].to_numpy()
        for name, (adata, truth) in slides.items():
            metric = "ARI, simulated" if name.startswith("simulated") else f"ARI, {name}"
            for method, value in divisions(model, adata, truth, seed, methods):
                rows.append({"part": "profile", "method": method, "metric": metric, "seed": seed, "value": value})
        print(f"profiles, seed {seed}: done", flush=True)
        yield rows


def divisions(
    model: sta.models.STAlign, adata: ad.AnnData, truth: np.ndarray, seed: int, methods: list[str]
) -> Iterator[tuple[str, float]]:
    for method, (functions, levels) in PROFILE.items():
        if wanted(method, methods):
            with changed(**functions):
                yield method, ari(profiles(model, adata, levels), truth, seed)
    for method, clustering in CLUSTERING.items():
        if wanted(method, methods):
            yield method, ari(profiles(model, adata, ("spot", "niche")), truth, seed, method=clustering)
    slide = adata.copy()
    slide.obs["truth"] = truth
    section = Section.of(slide, label_key="truth")
    for method in PLAIN:
        if wanted(method, methods):
            plain = DOMAIN_METHODS[method]
            found = plain.cluster(plain.features(section, model), section.n_classes, seed)
            yield method, float(adjusted_rand_score(section.names, found))


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


def ari(values: np.ndarray, truth: np.ndarray, seed: int, method: str = "gmm") -> float:
    adata = ad.AnnData(obsm={"X_profile": values.astype(np.float32)}, shape=(len(values), 0))
    sta.tl.spatial_domains(adata, len(set(truth)), use_rep="X_profile", method=method, random_state=seed)
    return float(adjusted_rand_score(truth, adata.obs["stalign_domain"]))


# -- the network ------------------------------------------------------------------------------------------------------


def network_rows(data: Path, seeds: list[int], methods: list[str]) -> Iterator[list[Row]]:
    """Yield the rows of one trained model after another."""
    with cohort(data) as (base, sections, genes, scratch):
        kept = [section for section in sections if section.patient != LEFT_OUT]
        for method, changes in NETWORK.items():
            for seed in seeds if wanted(method, methods) else ():
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    config = replace(varied(base, changes), seed=seed, out=f"{folder}/model")
                    model = sta.models.load(str(train.pretrain(config, kept, genes=genes)))
                yield [
                    {"part": "network", "method": method, "seed": seed, **row} for row in measured(data, model, seed)
                ]
                print(f"{method}, seed {seed}: done", flush=True)


@contextmanager
def cohort(data: Path) -> Iterator[tuple[PretrainConfig, list[train.Section], list[str], str]]:
    """The recipe, all training sections and the one of its validation, the vocabulary, and a folder to write to."""
    with tempfile.TemporaryDirectory() as scratch:
        base = train.read_config(CONFIG, [f"data.root={data}"])
        folder = prepare_config(replace(base, out=f"{scratch}/all"))
        genes = (folder / "genes.txt").read_text(encoding="utf-8").split()
        yield base, list(train.open_shards(folder).open()), genes, scratch


def varied(base: PretrainConfig, changes: Variant) -> PretrainConfig:
    recipe = {name: changes[name] for name in ("objective", "alignment", "prediction") if name in changes}
    network = {name: value for name, value in changes.items() if name not in recipe}
    config = replace(base, network=replace(base.network, changes=network))
    changed = {name: replace(getattr(config, name), **values) for name, values in recipe.items()}  # type: ignore[arg-type]
    return replace(config, **changed)


def measured(data: Path, model: sta.models.STAlign, seed: int) -> Iterator[Row]:
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


# -- what is fitted in closed form ------------------------------------------------------------------------------------


def closed_form_rows(data: Path, seeds: list[int], methods: list[str]) -> Iterator[list[Row]]:
    """Yield the rows of one patient and seed after another."""
    with cohort(data) as (base, sections, genes, scratch):
        for patient, seed in itertools.product(PATIENTS, seeds):
            kept = [section for section in sections if section.patient != patient]
            held = [section for section in sections if section.patient == patient and section.has_image]
            bare = varied(base, {"alignment": {"enabled": False}, "prediction": {"n_genes": 0}})
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                config = replace(bare, seed=seed, out=f"{folder}/model", network=replace(base.network, dtype="float32"))
                trunk = sta.models.load(str(train.pretrain(config, kept, genes=genes)))
            encoded, test = (encode_sections(trunk, part, n_clusters=6, seed=seed) for part in (kept, held))
            for method, (functions, changes, without_image) in CLOSED.items():
                if not wanted(method, methods):
                    continue
                recipe = varied(base, changes)
                used = [section for section in encoded if without_image or section.section.has_image]
                with changed(**functions):
                    model = fit_alignment(copy.deepcopy(trunk), encoded, recipe.alignment)
                    model = fit_prediction(model, used, recipe.prediction)
                rows = pd.DataFrame([held_out(model, section) for section in test]).mean()
                yield [
                    {
                        "part": "closed form",
                        "method": method,
                        "seed": seed,
                        "metric": f"{name}, {patient}",
                        "value": value,
                    }
                    for name, value in rows.items()
                ]
            print(f"closed form, {patient}, seed {seed}: done", flush=True)


def held_out(model: sta.models.STAlign, section: EncodedSection) -> dict[str, float]:
    """Recall from image to genes, and how well the head predicts."""
    embedded = embed_section(model, section)
    head = model.prediction
    features = embedded.image * np.sqrt(len(head.inputs))
    mixed = (1 - head.niche_share) * features + head.niche_share * (section.section.connectivities @ features)
    with torch.inference_mode():
        centre = torch.from_numpy(features.mean(axis=0)).float()
        predicted = head.from_features(torch.from_numpy(mixed).float(), centre=centre).numpy()
    expression = normalise_log1p(section.section.counts)[:, head.gene_index.numpy()].toarray()
    top = np.argsort(-expression.var(axis=0), kind="stable")[:50]
    predicted, expression = (values[:, top] - values[:, top].mean(axis=0) for values in (predicted, expression))
    error = ((predicted - expression) ** 2).mean(axis=0)
    return {
        "recall@5 %": recall_at(embedded.image, embedded.gene, share=0.05),
        "Pearson r": float(np.nanmean(pearson(predicted, expression))),
        "error below the mean's": float((error < expression.var(axis=0)).mean()),
    }


PARTS = {"profile": profile_rows, "closed form": closed_form_rows, "network": network_rows}

# -- the page ---------------------------------------------------------------------------------------------------------


def write(table: pd.DataFrame, arguments: argparse.Namespace) -> None:
    arguments.out.write_text(to_markdown(table, arguments), encoding="utf-8")


def to_markdown(table: pd.DataFrame, arguments: argparse.Namespace) -> str:
    command = f"python -m tests.benchmarks.ablation --data PATH --out {arguments.out}"
    seeds = ", ".join(str(seed) for seed in arguments.seeds)
    names = ", ".join(LABELLED)
    sources = ", ".join(f"`{source}`" for source in SOURCES)
    parts = [PREFACE.format(command=command, seeds=seeds)]
    texts = {
        "profile": PROFILES.format(labelled=names, n_simulated=len(SIMULATED) * len(arguments.seeds), sources=sources),
        "closed form": CLOSED_FORM,
        "network": NETWORKS.format(left_out=LEFT_OUT, labelled=names),
    }
    for part, text in texts.items():
        rows = table[table["part"] == part]
        if not len(rows):
            continue
        # Slides of one seed first, so that the spread is that over seeds.
        by_seed = rows.groupby(["method", "metric", "seed"], sort=False)["value"].mean()
        cells = by_seed.groupby(level=[0, 1], sort=False).agg(["mean", "std"])
        wide = cells.apply(lambda r: f"{r['mean']:.3f} ({r['std']:.3f})", axis=1).unstack("metric").fillna("")
        wide = wide.loc[list(dict.fromkeys(rows["method"])), list(dict.fromkeys(rows["metric"]))]
        header = "| | " + " | ".join(wide.columns) + " |\n|---|" + "---|" * len(wide.columns)
        lines = [
            f"| {name} | " + " | ".join(cells) + " |" for name, cells in zip(wide.index, wide.to_numpy(), strict=True)
        ]
        parts.append(text + header + "\n" + "\n".join(lines) + "\n\n")
    return "".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    main()
