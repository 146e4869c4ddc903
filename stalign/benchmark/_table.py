"""The tidy table as Markdown, with what its figures mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from stalign.benchmark._methods import METHODS

if TYPE_CHECKING:
    import pandas as pd

_PREFACE: Final = """# Benchmarks

What {model} reaches beside plain methods. Made by

```bash
{command}
```

{provenance}

One default setting for all sections; labels are used for scoring alone. A figure in parentheses is the
standard deviation over seeds; brackets hold a 95 % interval: from drawing blocks of tissue (about 25 squares
of a section), genes, or
labelled spots again. It says how far the figure depends on the spots or genes of
this section, not on the patient. All values, one a line, are in the `.csv` beside this page.
"""

# Tables that come before the others of their task.
_FIRST: Final = ("ARI",)
_TITLES: Final = {
    "domains": "Domains",
    "genes": "Genes from histology",
    "retrieval": "Search across modalities",
    "annotation": "Names for spots",
    "few-shot": "A few labelled spots",
    "robustness": "Robustness",
    "quality": "Quality and uncertainty",
}

_TEXTS: Final = {
    "domains": """\
Each section is divided into as many domains as it has labels. Spots without a label are left out before
anything is computed; "undetermined" counts as a label.

- **ARI**, **NMI**, **homogeneity**: agreement with the labels; 1 is the same division, 0 that of chance
  (ARI).
- **neighbours alike**: share of the 6 nearest spots in the same domain. **CHAOS**: mean distance to the
  nearest spot of the same domain, coordinates scaled to unit variance. **PAS**: share of spots with at least
  6 of the 10 nearest in other domains. For CHAOS and PAS, lower is smoother. Smooth is not right: compare
  with the row of the annotation.""",
    "genes": """\
The 50 genes that vary most over test and training sections together, of those that all measured and at least
10 % of each section's spots express, as in HEST-benchmark; log1p of counts per 10,000. The training sections
are of other patients than the test section.

- **Pearson r**: per gene over spots, then the mean over genes; 0 for a prediction that does not vary.
- **MSE**: mean squared error, mean over genes.
- **share of genes**: how many of the 50 the model predicts better than a plain method.

HEST's protocol is followed with an intercept, which changes no correlation, and without which its squared
error would be that of the genes' means. Genes that the model's head does not know have the training sections'
mean.""",
    "retrieval": """\
Share of the spots whose own counterpart, among all spots of the section, is within the nearest 1, 5 or 10 %
(one spot at least); a tie counts with the middle of its ranks.""",
    "annotation": """\
Macro-F1 over the labels that are offered; "undetermined" spots are not scored.

- **markers**: labels with marker genes (`stalign.benchmark.MARKERS`), which come from general knowledge of
  the tissues and were not tuned.
- **reference**: prototypes of labelled sections of other patients. For cortex there is no labelled training
  section, the sections of the other donor stand in.
- **over guessing**: over the better of two ways to guess, the largest class everywhere and answers drawn by
  the shares of the classes. Guessing by the shares has an expected macro-F1 of one over the number of
  classes.
- **calibration error**: expected difference between the confidence of an answer and the share of such answers
  that are right (ten bins); lower is better.""",
    "few-shot": """\
Logistic regression on 1, 5, 10 or 50 labelled spots of each class (half of a class at most), scored on the
other spots of the same section; mean of ten draws, the same for all methods. All representations are reduced
to 30 components. "undetermined" spots and classes of fewer than four spots are left out.""",
    "robustness": """\
The same section with another stain (gain 0.75 to 1.25 and shift up to 0.05 of the optical density of each
colour), half of its molecules, or a third of its genes missing; one draw, the first seed. "ARI before and
after" compares the domains with those of the untouched section: 1 means that nothing changed.""",
    "quality": """\
**AUROC** of `tl.quality`'s out-of-distribution score: the chance that a foreign spot scores above a spot of a
held-back breast tumour; its interval is from drawing spots again. **coverage of 90 % intervals**: share of the
measured values that lie within the head's intervals, mean over genes.""",
}


def to_markdown(table: pd.DataFrame, *, command: str = "") -> str:
    """Write a tidy table as Markdown: for each task its definitions and methods, for each metric a table of sections.

    Parameters
    ----------
    table
        Of :func:`stalign.benchmark.run` or :func:`stalign.benchmark.to_frame`.
    command
        What it was made by; by default, what its rows say.

    Returns
    -------
    The text.

    Examples
    --------
    >>> from stalign.benchmark import Row, to_frame, to_markdown
    >>> print(to_markdown(to_frame([Row("domains", "ARI", "A1", "pca", 0.5)])).splitlines()[-3])
    | method | A1 |
    """
    commands = [text for text in table["command"].unique() if text] or [command or "stalign benchmark DATA"]
    parts = [_PREFACE.format(model=_models(table), command="\n".join(commands), provenance=_provenance(table))]
    for task, block in table.groupby("task", sort=False):
        parts.append(f"## {_TITLES.get(str(task), task)}\n\n{_TEXTS.get(str(task), '')}\n")
        parts.append("\n".join(f"- `{name}`: {METHODS[name]}" for name in _methods(block) if name in METHODS) + "\n")
        for metric, values in sorted(block.groupby("metric", sort=False), key=lambda part: part[0] not in _FIRST):
            parts.append(f"### {_TITLES.get(str(task), task)}: {metric}\n\n{_wide(values)}\n")
    return "\n".join(parts)


def _methods(block: pd.DataFrame) -> list[str]:
    """Methods in the order of the list of all, others after them."""
    there = list(dict.fromkeys(block["method"]))
    return [name for name in METHODS if name in there] + [name for name in there if name not in METHODS]


def _models(table: pd.DataFrame) -> str:
    names = [name for name in table["model"].unique() if name]
    return " and ".join(f"`{name}`" for name in names) or "a model"


def _provenance(table: pd.DataFrame) -> str:
    made = table[["model", "sha256", "version"]].drop_duplicates()
    return "\n".join(
        f"`{model}`, SHA-256 `{sha256}`, with stalign {version}."
        for model, sha256, version in made.itertuples(index=False, name=None)
        if model
    )


def _wide(values: pd.DataFrame) -> str:
    sections = list(dict.fromkeys(values["section"]))
    cells = {key: _cell(block) for key, block in values.groupby(["method", "section"], sort=False)}
    lines = ["| method | " + " | ".join(sections) + " |", "|---" * (len(sections) + 1) + "|"]
    for method in _methods(values):
        lines.append(f"| {method} | " + " | ".join(cells.get((method, section), "") for section in sections) + " |")
    return "\n".join(lines)


def _cell(block: pd.DataFrame) -> str:
    """Mean over seeds, its standard deviation, and the mean ends of the interval."""
    text = f"{block['value'].mean():.3f}"
    if len(block) > 1:
        text += f" ({block['value'].std(ddof=0):.2f})"
    low, high = block["low"].mean(), block["high"].mean()
    return f"{text} [{low:.2f}, {high:.2f}]" if np.isfinite(low) and np.isfinite(high) else text
