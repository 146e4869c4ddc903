"""Run tasks on sections and keep one tidy table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stalign._logging import logger
from stalign._validate import check_choices, listing
from stalign.benchmark._annotation import annotation, few_shot
from stalign.benchmark._domains import domains
from stalign.benchmark._genes import genes, retrieval
from stalign.benchmark._markers import MARKERS
from stalign.benchmark._methods import QUALITY_METHODS, check_methods, wanted
from stalign.benchmark._robustness import robustness
from stalign.benchmark._rows import SPOTS, Row, to_frame, typed
from stalign.benchmark._section import Section
from stalign.benchmark._table import to_markdown

if TYPE_CHECKING:
    import pandas as pd

    from stalign.models import STAlign

TASKS: Final = ("domains", "genes", "retrieval", "annotation", "few-shot", "robustness", "quality")

# Of the development data: held-back sections, and what may be learned from, by data set.
EVALUATION: Final = ("her2st/A1", "her2st/B1", "her2st/F1", "dlpfc/151510", "dlpfc/151673", "dlpfc/151674")
TRAINING: Final[Mapping[str, Sequence[str]]] = {"her2st": tuple(f"her2st/C{number}" for number in range(2, 7))}
# Cortex has no labelled training section: a section of another donor gives the prototypes.
REFERENCES: Final[Mapping[str, Sequence[str]]] = {
    "her2st": ("her2st/C1", "her2st/D1", "her2st/E1"),
    "dlpfc": ("dlpfc/151510", "dlpfc/151673", "dlpfc/151674"),
}


class _Sections:
    """Sections by name, each read once."""

    def __init__(self, data: Path, label_key: str | None) -> None:
        self._data = data
        self._label_key = label_key
        self._read: dict[str, Section] = {}
        self._warned: set[tuple[str, str]] = set()

    def path(self, name: str) -> Path:
        """Return the file of a section: a name within the folder, or a file of its own."""
        for path in (self._data / f"{name}.h5ad", self._data / name, Path(name)):
            if path.exists() and (path.suffix or not path.is_dir()):
                return path
        raise FileNotFoundError(
            f"There is no section {name!r}: neither {self._data / name}.h5ad nor a file of that name. "
            f"{self._data} holds {listing(self.there())}."
        )

    def there(self) -> list[str]:
        """Names of the sections in the folder."""
        files = [*self._data.glob("*.h5ad"), *self._data.glob("*/*.h5ad")]
        return sorted(file.relative_to(self._data).as_posix().removesuffix(".h5ad") for file in files)

    def warn_of_one_patient(self, first: str, second: str) -> None:
        """Say once that two sections are of one patient."""
        if (first, second) not in self._warned:
            self._warned.add((first, second))
            logger.warning("%s and %s are of one patient: this is no test on a new one.", first, second)

    def has(self, name: str) -> bool:
        """Whether the folder holds a section of this name."""
        return (self._data / f"{name}.h5ad").is_file()

    def __call__(self, name: str) -> Section:
        if name not in self._read:
            path = self.path(name)
            short = path.stem if Path(name).is_absolute() else name.removesuffix(".h5ad")
            self._read[name] = Section.read(path, short, label_key=self._label_key)
        return self._read[name]


def run(
    data: str | Path,
    *,
    out: str | Path | None = None,
    tasks: Sequence[str] = TASKS,
    model: str | Path | STAlign = "stalign-mini",
    seeds: Sequence[int] = (0, 1, 2),
    sections: Sequence[str] | None = None,
    training: Sequence[str] | None = None,
    references: Sequence[str] | None = None,
    labels: str = "annotation",
    markers: Mapping[str, Sequence[str]] | None = None,
    methods: Sequence[str] | None = None,
    command: str = "",
    say: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Measure a model and plain methods on sections.

    Parameters
    ----------
    data
        Folder with sections, ``<section>.h5ad`` or ``<dataset>/<section>.h5ad``: raw counts in ``X``, coordinates, and
        an image where there is one.
    out
        Markdown file to write; the tidy table is written beside it as ``.csv``, after each task. A table of an earlier
        run is read, and rows of tasks, sections and methods that are not measured again are kept.
    tasks
        Any of :data:`TASKS`. ``"quality"`` is for the development data alone, and for models with statistics of their
        training spots (:func:`stalign.tl.quality`).
    model
        Name of a bundled model, a model folder, a Hub id, or a loaded :class:`~stalign.models.STAlign`.
    seeds
        Of the clustering; :func:`robustness` takes the first.
    sections
        Names within the folder, or files; ``None`` is the six held-back sections of the development data.
    training
        Sections that gene predictors are fitted on. ``None``: the training sections of the same data set of the
        development data, else the other ``sections`` of other patients (``obs["patient"]``).
    references
        Labelled sections that give prototypes; ``None`` as for ``training``.
    labels
        Column of ``obs`` with the labels.
    markers
        Marker genes by label; ``None`` are those of breast and cortex.
    methods
        Names or patterns of :data:`METHODS`, such as ``"stalign*"``.
    command
        What the table says it was made by.
    say
        Called with a line after each section.

    Returns
    -------
    DataFrame with a row for each value: ``task``, ``metric``, ``section``, ``method``, ``seed``, ``value``, ``low`` and
    ``high`` (95 % interval), ``interval`` (what was drawn again for it), ``n``, ``command``, ``model``, ``sha256``,
    ``version``.

    Raises
    ------
    ValueError
        For an unknown task or method, a folder without the sections, and if no section has what a task needs.
    FileNotFoundError
        If a section is not there.

    Examples
    --------
    >>> import stalign as sta
    >>> sta.benchmark.run("data", tasks=["domains"], out="benchmarks.md")  # doctest: +SKIP
    """
    from stalign import __version__
    from stalign.tl._runtime import identify, resolve_model

    tasks = check_choices("tasks", tasks, TASKS)
    check_methods(methods)
    if not seeds:
        raise ValueError("seeds is empty: name at least one, such as 0.")
    folder = Path(data)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    read = _Sections(folder, labels)
    names = _choose(read, sections)
    for name in (*names, *(training or ()), *(references or ())):
        read.path(name)
    before = _read_before(out)
    network = resolve_model(model)
    identity = identify(network)
    options: dict[str, Any] = {"model": network, "methods": methods}
    table = None
    for task in tasks:
        rows: list[Row] = []
        if task == "quality":
            rows += _quality(read, folder, names, seeds, network, methods)
            if say is not None:
                say(f"{task}: {len(rows)} values" if rows else f"{task}: not possible")
        for name in names if task != "quality" else ():
            section = read(name)
            fit_on = list(_others(read, name, names, training, TRAINING))
            prototypes = list(_others(read, name, names, references, REFERENCES))
            found = _measure(task, section, fit_on, prototypes, seeds, markers or MARKERS, options)
            rows += found
            if say is not None:
                say(
                    f"{task}: {section.name}: {len(found)} values" if found else f"{task}: {section.name}: not possible"
                )
        made = to_frame(rows, command=command, model=identity.name, sha256=identity.sha256, version=__version__)
        table = made if table is None else _join(table, made)
        if out is not None:
            _write(_keep(before, table, complete=sections is None and methods is None), Path(out), command)
    if table is None or table.empty:
        raise ValueError(
            f"Nothing could be measured: {listing(names)} have no labels in obs[{labels!r}] and no images, or no "
            "method of that name belongs to these tasks. Name the column with `labels`, or other tasks."
        )
    return table if out is None else _keep(before, table, complete=sections is None and methods is None)


def _measure(
    task: str,
    section: Section,
    training: Sequence[Section],
    references: Sequence[Section],
    seeds: Sequence[int],
    markers: Mapping[str, Sequence[str]],
    options: Mapping[str, Any],
) -> list[Row]:
    if task == "domains":
        return domains(section, seeds=seeds, **options)
    if task == "genes":
        return genes(section, training, **options)
    if task == "retrieval":
        return retrieval(section, training, **options)
    if task == "annotation":
        return annotation(section, references, markers=markers, **options)
    if task == "few-shot":
        return few_shot(section, **options)
    return robustness(section, seed=seeds[0], **options)


def _quality(
    read: _Sections,
    folder: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    model: STAlign,
    methods: Sequence[str] | None,
) -> list[Row]:
    """Rows of the out-of-distribution score, for the development data and a model with the statistics it needs."""
    from stalign.benchmark import _quality as quality

    wrong = [name for name in quality.WRONG_TISSUE if read.has(name)]
    asked = any(wanted(method, methods) for method in QUALITY_METHODS)
    if quality.REAL not in names or not read.has(quality.REAL) or not wrong or model.familiarity is None or not asked:
        return []
    found = quality.rows(folder, model, seeds, real=quality.REAL, wrong=wrong)
    values = found[list(quality.COLUMNS)].itertuples(index=False, name=None)
    return [
        Row(
            *(task, metric, section, method, float(value), int(seed), float(low), float(high)),
            SPOTS if metric == "AUROC" else "",
        )
        for task, metric, section, method, seed, value, low, high in values
        if wanted(method, methods)
    ]


def _choose(read: _Sections, sections: Sequence[str] | None) -> list[str]:
    if sections is not None:
        if not sections:
            raise ValueError("sections is empty: name at least one.")
        return list(dict.fromkeys(sections))
    names = [name for name in EVALUATION if read.has(name)]
    if not names:
        raise ValueError(
            f"The folder holds none of {listing(EVALUATION)}. Name `sections`; there are {listing(read.there())}."
        )
    return names


def _others(
    read: _Sections,
    name: str,
    names: Sequence[str],
    given: Sequence[str] | None,
    usual: Mapping[str, Sequence[str]],
) -> Iterator[Section]:
    """Sections to learn from: those given; else the usual ones of the data set, else the others, of other patients."""
    own = read(name)
    if given is not None:
        for other in given:
            if read(other) is not own and read(other).name != own.name:
                if read(other).patient == own.patient:
                    read.warn_of_one_patient(other, name)
                yield read(other)
        return
    dataset = name.partition("/")[0]
    known = [other for other in usual.get(dataset, ()) if read.has(other)]
    # The held-back sections of the development data are not learned from.
    for other in known or (names if name not in EVALUATION else ()):
        if read(other).patient != own.patient:
            yield read(other)


# --- the table of an earlier run ---------------------------------------------------------------------------------


def _csv(out: str | Path) -> Path:
    return Path(out).with_suffix(".csv")


def _read_before(out: str | Path | None) -> pd.DataFrame | None:
    import pandas as pd

    from stalign.benchmark._rows import COLUMNS

    if out is None or not _csv(out).is_file():
        return None
    table = pd.read_csv(_csv(out))
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(f"{_csv(out)} is no table of this command: it lacks {listing(missing)}. Choose another `out`.")
    return typed(table[list(COLUMNS)])


def _join(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    tables = [table for table in (first, second) if len(table)]
    return typed(pd.concat(tables, ignore_index=True)) if tables else first


def _keep(before: pd.DataFrame | None, made: pd.DataFrame, *, complete: bool) -> pd.DataFrame:
    """Add the rows of an earlier run that were not measured again, in the order of the tasks.

    A task that was measured on all sections by all methods replaces its earlier rows; else those of the same section
    and method are replaced.
    """
    if before is None:
        return made
    key = ["task"] if complete else ["task", "section", "method"]
    again = set(made[key].itertuples(index=False, name=None))
    kept = [row not in again for row in before[key].itertuples(index=False, name=None)]
    table = _join(before[kept], made)
    place = {task: number for number, task in enumerate(TASKS)}
    return table.sort_values(
        "task", key=lambda tasks: tasks.map(place).fillna(len(place)), kind="stable", ignore_index=True
    )


def _write(table: pd.DataFrame, out: Path, command: str) -> None:
    from stalign.io._slides import replacing

    for path, text in ((_csv(out), table.to_csv(index=False)), (out, to_markdown(table, command=command))):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
