"""The evaluation table: ``python -m tests.benchmarks.evaluation --data PATH --out docs/evaluation.md``.

Domains, genes from H&E and names without training on sections the bundled model has never seen, each beside plain
methods. One default setting for all sections; labels are used for scoring only.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score, f1_score

import stalign as sta
from tests.benchmarks import baselines

SEEDS = (0, 1, 2)
LABELLED = ("her2st/A1", "her2st/B1", "her2st/F1", "dlpfc/151510", "dlpfc/151673", "dlpfc/151674")
IMAGED = ("her2st/A1", "dlpfc/151510", "dlpfc/151673", "dlpfc/151674")
RIDGE_TRAINING = ("her2st/C2", "her2st/C3", "her2st/C4", "her2st/C5", "her2st/C6")
UNLABELLED = ("NA", "nan", "")
BREAST_PROMPTS = {
    "invasive cancer": ["ERBB2", "KRT8", "KRT18", "KRT19", "EPCAM", "MUC1"],
    "cancer in situ": ["KRT14", "KRT5", "KRT17", "ACTA2", "MYLK", "KRT8"],
    "connective tissue": ["COL1A1", "COL1A2", "COL3A1", "DCN", "LUM", "FN1"],
    "adipose tissue": ["ADIPOQ", "FABP4", "PLIN1", "PLIN4", "LPL", "ADIRF"],
    "immune infiltrate": ["PTPRC", "CD3E", "CD52", "CD74", "IGKC", "MS4A1"],
    "breast glands": ["KRT15", "LTF", "SLPI", "PIGR", "KRT14", "AZGP1"],
}
LAYER_PROMPTS = {
    "L1": ["RELN", "AQP4", "GFAP", "FABP7"],
    "L2": ["HPCAL1", "CUX2", "LAMP5", "C1QL2"],
    "L3": ["FREM3", "CARTPT", "CUX2", "ADCYAP1"],
    "L4": ["RORB", "NEFM", "NEFH", "PCP4"],
    "L5": ["PCP4", "TRABD2A", "FEZF2", "ETV1"],
    "L6": ["NR4A2", "KRT17", "NTNG2", "CCN2"],
    "WM": ["MBP", "MOBP", "PLP1", "MAG"],
}


PREFACE = """# Benchmarks

Sections that `stalign-mini` was never trained on, with its default settings for all of them; labels are used for
scoring only. Made by

```bash
{command}
```

- **Domains**: adjusted Rand index with the true number of classes, mean over seeds {seeds} (standard deviation). Spots
  without a label take part in the clustering and not in the score. her2st: a pathologist's regions; dlpfc: layers.
- **Names from marker genes**: macro-F1 of `tl.zero_shot_annotate` with the marker lists in
  `tests/benchmarks/evaluation.py`, which come from general knowledge of the tissues and were not tuned.
- **Genes from H&E**: the 50 most variable of the genes that the head predicts and all sections measured; log1p of
  counts per 10,000; Pearson correlation per gene over spots, mean over genes (standard deviation over genes). The ridge
  is fitted on colour and texture statistics of {n} sections of one breast tumour, and centred slide by slide, as the
  head is. A1 is another patient's breast tumour. The cortex has no counterpart in the training data of either.
- **Retrieval**: share of spots whose own expression is among the nearest 5 % for their image.

The images of the cortex sections have 16 µm per pixel, four pixels a spot; 151510 has 500 genes only.
"""


TASKS = ("domains", "names", "genes")


class Row(NamedTuple):
    task: str
    section: str
    method: str
    metric: str
    value: float
    sd: float = float("nan")


def read(data: Path, name: str) -> ad.AnnData:
    return ad.read_h5ad(data / f"{name}.h5ad")


def truth(adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    labels = adata.obs["annotation"].astype(str).to_numpy()
    return labels, ~np.isin(labels, UNLABELLED)


def has_image(adata: ad.AnnData) -> bool:
    return any(entry.get("images") for entry in adata.uns["spatial"].values())


def domains(data: Path, name: str) -> Iterator[Row]:
    adata = read(data, name)
    labels, known = truth(adata)
    k = len(set(labels[known]))

    def score(method: str, found: list[np.ndarray]) -> Row:
        values = [adjusted_rand_score(labels[known], f[known]) for f in found]
        return Row("domains", name, method, "ARI", float(np.mean(values)), float(np.std(values)))

    for method, (features, cluster) in baselines.DOMAIN_BASELINES.items():
        values = features(adata)
        yield score(method, [cluster(values, k, seed) for seed in SEEDS])
    sta.tl.embed(adata)
    variants = {"stalign": "X_stalign", "stalign, gene side": "X_stalign_gene"}
    if has_image(adata):
        sta.tl.embed(adata, modalities=("image",), key_added="image_only")
        variants["stalign, image only"] = "image_only"
    for method, rep in variants.items():
        found = []
        for seed in SEEDS:
            sta.tl.spatial_domains(adata, k, use_rep=rep, random_state=seed)
            found.append(adata.obs["stalign_domain"].astype(str).to_numpy())
        yield score(method, found)


def expression(data: Path, name: str, training: list[tuple[np.ndarray, pd.DataFrame]]) -> Iterator[Row]:
    adata = read(data, name)
    sta.tl.embed(adata)
    log = pd.DataFrame(baselines.log_normalised(adata).toarray(), columns=adata.var_names)
    head = sta.models.load("stalign-mini").predicted_genes
    shared = [g for g in log if g in head and all(g in frame for _, frame in training)]
    top = log[shared].var().nlargest(50).index.tolist()
    measured = log[top].to_numpy()
    blind = adata.copy()
    sta.tl.predict_expression(blind, genes=top)
    predictions = {
        "mean of training sections": np.tile(
            np.vstack([f[top].to_numpy() for _, f in training]).mean(axis=0), (len(log), 1)
        ),
        "ridge on colour and texture": baselines.ridge(
            [(x, frame[top].to_numpy()) for x, frame in training], baselines.image_features(adata)
        ),
        "stalign": np.asarray(blind.layers["stalign_predicted"])[:, blind.var_names.get_indexer(top)],
    }
    for method, predicted in predictions.items():
        with np.errstate(invalid="ignore"):
            r = [
                np.corrcoef(p, m)[0, 1] if p.std() > 0 else np.nan for p, m in zip(predicted.T, measured.T, strict=True)
            ]
        yield Row("genes from H&E", name, method, "Pearson r, top 50 genes", float(np.mean(r)), float(np.std(r)))
        yield Row("genes from H&E", name, method, "MSE, top 50 genes", float(((predicted - measured) ** 2).mean()))
    recall = sta.tl.retrieve(adata, adata, direction="image->gene", k=max(1, round(0.05 * adata.n_obs))).recall
    yield Row("retrieval", name, "chance", "recall@5%", 0.05)
    yield Row("retrieval", name, "stalign", "recall@5%", float(recall))


def names(data: Path, name: str) -> Iterator[Row]:
    adata = read(data, name)
    labels, known = truth(adata)
    known &= labels != "undetermined"
    prompts = LAYER_PROMPTS if name.startswith("dlpfc") else BREAST_PROMPTS
    prompts = {label: genes for label, genes in prompts.items() if label in set(labels)}
    majority = pd.Series(labels[known]).mode()[0]

    def score(method: str, found: np.ndarray) -> Row:
        value = f1_score(labels[known], found[known], average="macro", labels=sorted(prompts), zero_division=0)
        return Row("names from marker genes", name, method, "macro-F1", float(value))

    yield score("majority class", np.full(len(labels), majority))
    yield score("mean z-score of the markers", marker_scores(adata, prompts))
    sta.tl.embed(adata)
    for modality in ("fused", "gene", *(["image"] if has_image(adata) else [])):
        sta.tl.zero_shot_annotate(adata, prompts, modality=modality)
        yield score(f"stalign, {modality}", adata.obs["stalign_annotation"].astype(str).to_numpy())


def marker_scores(adata: ad.AnnData, prompts: dict[str, list[str]]) -> np.ndarray:
    log = baselines.log_normalised(adata)
    scores = {}
    for label, genes in prompts.items():
        columns = [adata.var_names.get_loc(g) for g in genes if g in adata.var_names]
        values = log[:, columns].toarray() if columns else np.zeros((adata.n_obs, 1))
        scores[label] = ((values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-6)).mean(axis=1)
    table = pd.DataFrame(scores)
    return table.idxmax(axis=1).to_numpy()


def ridge_training(data: Path) -> list[tuple[np.ndarray, pd.DataFrame]]:
    training = []
    for name in RIDGE_TRAINING:
        adata = read(data, name)
        sta.pp.extract_niches(adata)
        frame = pd.DataFrame(baselines.log_normalised(adata).toarray(), columns=adata.var_names)
        training.append((baselines.image_features(adata), frame))
    return training


def evaluate(data: Path, tasks: set[str]) -> pd.DataFrame:
    rows: list[Row] = []
    for task, function in (("domains", domains), ("names", names)):
        for name in LABELLED if task in tasks else ():
            rows += function(data, name)
            print(f"{name}: {task} done", flush=True)
    training = ridge_training(data) if "genes" in tasks else []
    for name in IMAGED if "genes" in tasks else ():
        rows += expression(data, name, training)
        print(f"{name}: genes from H&E done", flush=True)
    return pd.DataFrame(rows)


def to_markdown(table: pd.DataFrame, command: str) -> str:
    parts = [PREFACE.format(command=command, seeds=list(SEEDS), n=len(RIDGE_TRAINING))]
    for (task, metric), block in table.groupby(["task", "metric"], sort=False):
        text = block.apply(
            lambda r: f"{r['value']:.3f}" + (f" ({r['sd']:.2f})" if np.isfinite(r["sd"]) else ""), axis=1
        ).where(block["value"].notna(), "-")
        wide = block.assign(text=text).pivot(index="method", columns="section", values="text")
        wide = wide.loc[block["method"].drop_duplicates(), block["section"].drop_duplicates()].fillna("")
        header = "| method | " + " | ".join(wide.columns) + " |\n|---|" + "---|" * len(wide.columns)
        lines = [
            f"| {method} | " + " | ".join(row) + " |" for method, row in zip(wide.index, wide.to_numpy(), strict=True)
        ]
        parts.append(f"## {task}: {metric}\n\n{header}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with her2st/ and dlpfc/")
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation.md"), help="Markdown table; a .csv is written beside it"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="others are kept from the .csv")
    arguments = parser.parse_args()
    sta.settings.progress = False
    sta.settings.verbosity = "WARNING"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="The data cover")  # stated in the table's text
        table = evaluate(arguments.data, set(arguments.tasks))
    kept = arguments.out.with_suffix(".csv")
    if len(arguments.tasks) < len(TASKS) and kept.is_file():
        before = pd.read_csv(kept)
        table = pd.concat([table, before[~before["task"].isin(table["task"])]], ignore_index=True)
    command = f"python -m tests.benchmarks.evaluation --data PATH --out {arguments.out}"
    arguments.out.write_text(to_markdown(table, command), encoding="utf-8")
    table.to_csv(arguments.out.with_suffix(".csv"), index=False)
    print(arguments.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
