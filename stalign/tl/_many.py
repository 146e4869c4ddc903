"""Embed many slides: one result for each, in this process or on a Dask cluster."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stalign._keys import Key
from stalign._logging import logger, one_line
from stalign._settings import settings
from stalign._validate import DISK_FULL, check_choice, listing, near

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client, Future, SpecCluster

    from stalign.models import STAlign

_ERRORS = ("report", "raise")
# What is this function's own business, or makes no sense for a slide that is read from and written to a file.
_NOT_OPTIONS = ("adata", "model", "progress", "store", "copy")
# How it is computed, not what: results do not depend on these.
_HOW = ("device", "batch_size", "num_workers")
# Settings that belong to a machine or a screen; the others go with the work.
_OWN_SETTINGS = ("cache_dir", "progress")
# What reading, embedding or writing one slide raises; the next slide is another one. Faults leave a traceback.
_WRONG_INPUT = (ValueError, KeyError, TypeError, ImportError, OSError)
_FAULTS = (ArithmeticError, AttributeError, IndexError, MemoryError, RuntimeError)
# Errors of the system that come again however often one tries.
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_LASTING_CODES = {*DISK_FULL, errno.EROFS, None}
_PATIENCE = 30.0
"""Seconds after which it is said that the cluster has no workers."""
_RESUBMISSIONS = 3
"""How often a slide that waited where workers died on others is given to the cluster again."""


class SlideResult(NamedTuple):
    """What became of one slide; the columns of the table that :func:`embed_many` returns.

    Attributes
    ----------
    slide, result
        The paths of the slide and of its result.
    status
        ``"done"``, ``"skipped"`` (the result was there) or ``"failed"``.
    n_spots
        Spots of the slide, ``None`` where it failed.
    seconds
        Time for reading, embedding and writing; NaN where it was skipped.
    error
        Why it failed, in one line.
    worker
        Address of the Dask worker, empty without a cluster.
    """

    slide: str
    result: str
    status: str
    n_spots: int | None = None
    seconds: float = float("nan")
    error: str = ""
    worker: str = ""


class _Task(NamedTuple):
    """One slide, and all that another process needs to embed it."""

    slide: Path
    result: Path
    model: str
    revision: str
    sha256: str
    options: dict[str, Any]
    job: dict[str, Any]
    replaces: tuple[int, int, int] | None
    retries: int
    raises: bool
    journal: Path | None
    run: str
    settings: dict[str, Any]


def embed_many(
    slides: Sequence[str | Path] | str | Path,
    *,
    out: str | Path,
    client: Client | None = None,
    model: str | Path | STAlign = "stalign-mini",
    overwrite: bool = False,
    retries: int = 1,
    errors: str = "report",
    progress: bool | None = None,
    on_result: Callable[[SlideResult], Any] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Embed slides from files, one ``.h5ad`` for each, in this process or spread over a Dask cluster.

    Every result is written under a temporary name and renamed, and holds what it was made from: a call that is
    repeated after an interruption skips the slides that are finished. A slide that fails is reported; the others go
    on.

    Parameters
    ----------
    slides
        ``.h5ad`` files, ``.zarr`` folders written by AnnData, Space Ranger ``outs`` folders of Visium and Visium HD
        (bins of 8 µm).
    out
        Folder of the results, ``<name>.h5ad``. The name of an ``outs`` folder is that of the folder above it.
    client
        A :class:`distributed.Client`. Each task is one slide; a worker process loads the model once and embeds one
        slide at a time. Workers must see the slides, ``out`` and the model's folder under the same paths. A slide
        whose worker dies goes to another worker.
    model
        Name of a bundled model, a model folder, a Hub id, or a loaded :class:`~stalign.models.STAlign` (with
        ``client``: one that was saved).
    overwrite
        Compute all slides again, and replace files in ``out``.
    retries
        How often a slide is tried again after an error of the system that may pass, such as a file server that does
        not answer. Wrong input is not tried again.
    errors
        ``"report"`` writes the error of a slide into the table; ``"raise"`` stops at the first.
    progress
        Show progress bars: of the spots of each slide, or with ``client`` of the slides.
    on_result
        Called with each row of the table as soon as it is known.
    options
        Arguments of :func:`stalign.tl.embed`. ``image`` belongs to one slide; for several, name each one's image in
        ``uns["spatial"][library]["metadata"]["source_image_path"]``.

    Returns
    -------
    A DataFrame with a row for each slide, in their order, and the columns

    - ``slide``, ``result``: paths
    - ``status``: ``"done"``; ``"skipped"``, the result was there; ``"failed"``
    - ``n_spots``: Int64, missing where it failed
    - ``seconds``: for reading, embedding and writing; NaN where it was skipped
    - ``error``: one line, empty where there is none
    - ``worker``: address of the Dask worker, empty without ``client``

    Each result has the slots of :func:`stalign.tl.embed`, and in ``uns["stalign"]["job"]`` (JSON) the slide's path,
    size and time of change, the model's SHA-256 and the options. With ``client``, ``out/journal/<name>.jsonl`` has a
    line for each start and end of work on the slide.

    Raises
    ------
    FileNotFoundError
        If a slide does not exist.
    FileExistsError
        If a file in ``out`` is not the result of this slide, model and options; nothing is computed then.
    ValueError
        If two slides have the same name, or the model cannot be loaded or sent to workers.
    TypeError
        If an option is none of :func:`stalign.tl.embed`.
    ConnectionError
        If the scheduler is lost. What is finished stays.

    Notes
    -----
    Results of a cluster are those of one process, on the same kind of device. A worker that lost its connection but
    lives may compute a slide a second time in vain; the result is written once.

    Temporary files of processes that were killed are called ``.<name>.h5ad.<digits>.tmp``. They are not used, and are
    removed once the slide's result is there.

    Examples
    --------
    >>> import stalign as sta
    >>> table = sta.tl.embed_many(["a.h5ad", "b.h5ad"], out="embedded")  # doctest: +SKIP
    >>> table[["slide", "status", "n_spots"]]  # doctest: +SKIP
    """
    check_choice("errors", errors, _ERRORS)
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ValueError(f"retries must be an integer >= 0, got {retries!r}.")
    progress = settings.progress if progress is None else bool(progress)
    paths = _check_slides(slides)
    results = _name_results(paths, Path(out).expanduser())
    options = _check_options(options, n_slides=len(paths))

    from stalign.tl._runtime import identify, resolve_model

    network = resolve_model(model)
    identity = identify(network)
    if client is not None and not identity.source:
        raise ValueError(
            f"Model {identity.name!r} is in the memory of this process and was never saved. Save it where the workers "
            "can read it, `model.save(folder)`, and pass the folder."
        )
    # A folder is given to workers, which may run elsewhere, from the root; a name stays a name.
    is_folder = identity.source == network.provenance.folder
    source = str(Path(identity.source).absolute()) if is_folder else identity.source
    run = os.urandom(4).hex()
    shared = {"sha256": identity.sha256, "options": _described(options)}
    tasks = [
        _Task(
            slide=path.absolute(),
            result=result.absolute(),
            model=source,
            revision=identity.revision,
            sha256=identity.sha256,
            options=options,
            job={**_stamp(path), **shared},
            replaces=_signature(result) if overwrite else None,
            retries=retries,
            raises=errors == "raise",
            journal=None if client is None else result.absolute().parent / "journal" / f"{result.stem}.jsonl",
            run=run,
            settings=_shared_settings(),
        )
        for path, result in zip(paths, results, strict=True)
    ]
    finished = {} if overwrite else _finished(tasks)
    waiting = [task for task in tasks if str(task.result) not in finished]
    work = _serially(waiting, network, progress) if client is None else _on_cluster(waiting, client, progress)
    # Workers have paths from the root; the table has those that were passed.
    passed = {str(t.result): (str(p), str(r)) for t, p, r in zip(tasks, paths, results, strict=True)}
    rows: dict[str, SlideResult] = {}
    try:
        for row in _chain(finished, work):
            slide, result = passed[row.result]
            rows[result] = row._replace(slide=slide, result=result)
            if on_result is not None:
                on_result(rows[result])
    finally:
        work.close()
        _clean_up(row for row in rows.values() if row.status != "failed")
    return _table([rows[str(result)] for result in results])


def _chain(finished: Mapping[str, SlideResult], work: Iterator[SlideResult]) -> Iterator[SlideResult]:
    yield from finished.values()
    yield from work


def _table(rows: Sequence[SlideResult]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows, columns=SlideResult._fields)
    return table.astype({"n_spots": "Int64", "seconds": "float64"})


# --- checks before anything is computed --------------------------------------------------------------------------


def _check_slides(slides: Sequence[str | Path] | str | Path) -> list[Path]:
    paths = [Path(slide).expanduser() for slide in ([slides] if isinstance(slides, (str, Path)) else slides)]
    if not paths:
        raise ValueError("There are no slides to embed: `slides` is empty.")
    return paths


def _name_results(slides: Sequence[Path], out: Path) -> list[Path]:
    """Return the result of each slide, after checking that slides exist and results are distinct."""
    from stalign.io._slides import slide_name

    results = [out / f"{slide_name(slide)}.h5ad" for slide in slides]
    seen: dict[Path, Path] = {}
    for slide, result in zip(slides, results, strict=True):
        if result in seen:
            raise ValueError(
                "Two slides have the same name and would be written to the same file. Embed them separately: "
                f"{listing([seen[result], slide])} -> '{result}'."
            )
        seen[result] = slide
    for slide in slides:
        if not slide.exists():
            raise FileNotFoundError(f"There is no file or folder {slide}.")
    return results


def _check_options(options: dict[str, Any], *, n_slides: int) -> dict[str, Any]:
    """Return the options, with that setting filled in which decides about the result."""
    defaults = _defaults()
    for name in options:
        if name not in defaults:
            raise TypeError(
                f"embed_many has no option {name!r}. Available, from `tl.embed`: {listing(defaults, 40)}."
                f"{near(name, defaults)}"
            )
    if options.get("image") is not None and n_slides > 1:
        raise ValueError(
            f"`image` belongs to one slide, got {n_slides} slides. Name each slide's image in its "
            "`uns['spatial'][library]['metadata']['source_image_path']`, or embed them one by one."
        )
    filled = dict(options)
    if isinstance(filled.get("image"), (str, Path)):
        filled["image"] = _reachable(filled["image"])
    if filled.get("amp") is None:
        filled["amp"] = settings.amp or "off"
    return filled


def _reachable(path: str | Path) -> str:
    """Return a path that means the same to a process in another folder; names of models stay."""
    return str(Path(path).absolute()) if Path(path).exists() else str(path)


def _shared_settings() -> dict[str, Any]:
    """Return the settings of this process, which those of a worker's process are not."""
    names = [name for name, value in vars(type(settings)).items() if isinstance(value, property)]
    return {name: getattr(settings, name) for name in names if name not in _OWN_SETTINGS}


@contextmanager
def _with_settings(values: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def _defaults() -> dict[str, Any]:
    """Return the options of :func:`stalign.tl.embed` and their defaults."""
    from stalign.tl._embed import embed

    parameters = inspect.signature(embed).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in _NOT_OPTIONS}


# --- what a result was made from ---------------------------------------------------------------------------------


def _stamp(slide: Path) -> dict[str, Any]:
    """Describe the state of a slide's file, or of the files of its folder."""
    files = [slide] if slide.is_file() else [file for file in slide.rglob("*") if file.is_file()]
    states = [file.stat() for file in files]
    return {
        "slide": str(slide.absolute()),
        "bytes": sum(state.st_size for state in states),
        "modified": max((state.st_mtime_ns for state in states), default=0),
    }


def _signature(result: Path) -> tuple[int, int, int] | None:
    """Tell one version of a file from the next; ``None`` if there is none."""
    if not result.exists():
        return None
    state = result.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _described(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide about the result, as JSON has them; all, so that defaults may change."""
    chosen = {**_defaults(), **options}
    for name in ("modalities", "outputs"):
        values = chosen[name]
        chosen[name] = sorted({values} if isinstance(values, str) else set(values))
    return {name: _plain(value) for name, value in sorted(chosen.items()) if name not in _HOW}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        import hashlib

        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    return str(value)


def _finished(tasks: Sequence[_Task]) -> dict[str, SlideResult]:
    """Return the slides whose results are there; refuse files that are something else."""
    finished: dict[str, SlideResult] = {}
    foreign: list[tuple[Path, str]] = []
    for task in tasks:
        if not task.result.exists():
            continue
        reason, n_spots = _examine(task)
        if reason:
            foreign.append((task.result, reason))
        else:
            finished[str(task.result)] = SlideResult(str(task.slide), str(task.result), "skipped", n_spots)
    if foreign:
        path, reason = foreign[0]
        others = f" So it is with {listing([other.name for other, _ in foreign[1:]], 5)}." if foreign[1:] else ""
        raise FileExistsError(
            f"{path} exists, and {reason}.{others} Pass `overwrite=True` (--overwrite) to compute and replace all, or "
            "another `out` (--out)."
        )
    return finished


def _examine(task: _Task) -> tuple[str, int]:
    """Say why a file is not the result of a task, empty if it is; and return its number of spots."""
    import h5py

    try:
        with h5py.File(task.result, "r") as handle:
            own = handle.get(f"uns/{Key.UNS}")
            if own is None or Key.uns.JOB not in own:
                return "is no result of `embed_many` or `stalign embed`", 0
            found = json.loads(own[Key.uns.JOB].asstr()[()])
            record = own[Key.embed_record(str(found["options"]["key_added"]))]
            sha256 = record["sha256"].asstr()[()]
            n_spots = len(handle["obs"][handle["obs"].attrs["_index"]])
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        return f"cannot be read as a result ({error}): it is damaged, or something else", 0
    if sha256 != task.sha256 or found["sha256"] != task.sha256:
        return f"was made by another model (SHA-256 {sha256[:12]}…, not {task.sha256[:12]}…)", 0
    if (found["bytes"], found["modified"]) != (task.job["bytes"], task.job["modified"]):
        return f"was made from another slide, or '{task.slide}' has changed since", 0
    # Options that this version has and that one had not: it did what is now the default.
    then, now = {**_described({}), **found["options"]}, task.job["options"]
    other = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if other:
        changes = ", ".join(f"{name}={then.get(name)!r} and not {now.get(name)!r}" for name in other)
        return f"was made with {changes}", 0
    return "", n_spots


def _is_there(task: _Task) -> SlideResult | None:
    """Return the row of a task whose result was written meanwhile, by a worker that died before it could say so."""
    if _signature(task.result) in (None, task.replaces):
        return None
    reason, n_spots = _examine(task)
    return None if reason else SlideResult(str(task.slide), str(task.result), "skipped", n_spots)


def _clean_up(rows: Iterable[SlideResult]) -> None:
    """Remove what processes that were killed left of slides that are finished."""
    from stalign.io._slides import leftovers

    for row in rows:
        for file in leftovers(Path(row.result)):
            file.unlink(missing_ok=True)
            logger.info("Removed '%s', which a process that was killed had left.", file)


# --- one slide ---------------------------------------------------------------------------------------------------


def _attempt(task: _Task, get_model: Callable[[], STAlign], *, progress: bool, worker: str = "") -> SlideResult:
    """Embed a slide, again after an error that may pass; return what became of it."""
    there = _is_there(task)
    if there is not None:
        return there._replace(worker=worker)
    start = time.perf_counter()
    for tried in range(task.retries + 1):
        _note(task, "started", worker=worker)
        try:
            n_spots = _embed_file(task, get_model(), progress=progress)
        except (*_WRONG_INPUT, *_FAULTS) as error:
            _note(task, "failed", worker=worker, error=one_line(error))
            if tried < task.retries and _may_pass(error):
                logger.warning("'%s' failed and is tried again: %s", task.slide, one_line(error))
                time.sleep(min(2.0**tried, 30.0))
                continue
            if task.raises:
                raise
            logger.warning("'%s' failed: %s", task.slide, one_line(error), exc_info=isinstance(error, _FAULTS))
            seconds = time.perf_counter() - start
            return _failed(task, one_line(error), seconds=seconds, worker=worker)
        seconds = time.perf_counter() - start
        _note(task, "finished", worker=worker, n_spots=n_spots, seconds=round(seconds, 3))
        return SlideResult(str(task.slide), str(task.result), "done", n_spots, seconds, worker=worker)
    raise AssertionError  # the loop returns or raises


def _failed(task: _Task, error: str, *, seconds: float = float("nan"), worker: str = "") -> SlideResult:
    return SlideResult(str(task.slide), str(task.result), "failed", None, seconds, error, worker)


def _embed_file(task: _Task, model: STAlign, *, progress: bool) -> int:
    from stalign.io._slides import read_slide, write_slide
    from stalign.tl._embed import embed

    adata = read_slide(task.slide)
    embed(adata, model=model, progress=progress, **task.options)
    adata.uns[Key.UNS][Key.uns.JOB] = json.dumps(task.job, sort_keys=True)
    if _is_there(task) is None:
        write_slide(adata, task.result)
    return adata.n_obs


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, _LASTING) and error.errno not in _LASTING_CODES


def _note(task: _Task, event: str, **what: Any) -> None:
    """Add a line to the slide's journal: one write, so that lines of several processes stay whole."""
    if task.journal is None:
        return
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"event": event, "time": now, "run": task.run, "pid": os.getpid(), **what}
    task.journal.parent.mkdir(parents=True, exist_ok=True)
    with task.journal.open("ab", buffering=0) as handle:
        handle.write(json.dumps(line).encode() + b"\n")


def _serially(tasks: Sequence[_Task], model: STAlign, progress: bool) -> Generator[SlideResult, None, None]:
    for task in tasks:
        yield _attempt(task, lambda: model, progress=progress)


# --- on a cluster ------------------------------------------------------------------------------------------------

_ONE_AT_A_TIME = threading.Lock()


@lru_cache(maxsize=1)
def _loaded(source: str, revision: str, sha256: str, device: str) -> STAlign:
    """Load a model once in a worker process, and leave it on its device from slide to slide."""
    from stalign import models
    from stalign.tl._runtime import identify, resolve_device

    model = models.load(source, revision=revision or None)
    found = identify(model).sha256
    if found != sha256:
        raise ValueError(
            f"Model {source!r} is another one on this worker: SHA-256 {found[:12]}… instead of {sha256[:12]}…. Pass "
            "the path of a model folder that all machines share."
        )
    return model.to(resolve_device(device))


def _work(task: _Task) -> SlideResult:
    """Embed one slide in a worker process. With several threads they take turns: the model is on one device."""
    from distributed import get_worker

    with _ONE_AT_A_TIME, _with_settings(task.settings):
        device = str(task.options.get("device") or settings.device)
        return _attempt(
            task,
            lambda: _loaded(task.model, task.revision, task.sha256, device),
            progress=False,
            worker=str(get_worker().address),
        )


def _on_cluster(tasks: Sequence[_Task], client: Client, progress: bool) -> Generator[SlideResult, None, None]:
    """Give each slide to a worker and yield what comes back, in the order in which it does."""
    if not tasks:
        return
    from concurrent.futures import CancelledError

    from tqdm.auto import tqdm

    numbers = count()

    def submit(task: _Task) -> Future:
        key = f"stalign-embed-{task.result.stem}-{task.run}-{next(numbers)}"
        return client.submit(_work, task, key=key, pure=False)

    futures = {submit(task): task for task in tasks}
    pending = set(futures)
    resubmitted: Counter[Path] = Counter()
    try:
        with tqdm(total=len(tasks), unit="slide", desc="stalign", disable=not progress) as bar:
            while pending:
                done = _next_done(pending, client)
                pending -= done
                for future in done:
                    task = futures.pop(future)
                    if resubmitted[task.result] < _RESUBMISSIONS and _was_bystander(future, task):
                        resubmitted[task.result] += 1
                        again = submit(task)
                        futures[again] = task
                        pending.add(again)
                        continue
                    bar.update()
                    yield _collect(future, task)
    except CancelledError as error:
        raise ConnectionError(
            f"The Dask scheduler is lost, or its tasks were cancelled: {len(pending)} of {len(tasks)} slides are not "
            "finished. Results that are written stay; call again to go on."
        ) from error
    finally:
        if pending:
            client.cancel(list(pending))


def _next_done(pending: set[Future], client: Client) -> set[Future]:
    """Wait until some slides are done; say so where nobody works on them."""
    from distributed import wait

    told = False
    while True:
        try:
            return set(wait(pending, timeout=_PATIENCE, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            if not told and not client.scheduler_info()["workers"]:
                logger.warning("The cluster has no workers: %d slides wait for one.", len(pending))
                told = True


def _was_bystander(future: Future, task: _Task) -> bool:
    """Whether workers died on other slides while this one waited in their queues; Dask counts that against it."""
    from distributed import KilledWorker

    if future.status != "error" or not isinstance(future.exception(), KilledWorker):
        return False
    return not any(line["run"] == task.run and line["event"] == "started" for line in _read_journal(task))


def _read_journal(task: _Task) -> list[dict[str, Any]]:
    if task.journal is None or not task.journal.exists():
        return []
    return [json.loads(line) for line in task.journal.read_text(encoding="utf-8").splitlines()]


def _collect(future: Future, task: _Task) -> SlideResult:
    from concurrent.futures import CancelledError

    from distributed import KilledWorker

    if future.status == "finished":
        return future.result()
    if future.status == "cancelled":
        raise CancelledError
    error = future.exception()
    if isinstance(error, KilledWorker):
        message = (
            "the workers that took this slide died, one after the other; often they ran out of memory. Their logs say "
            "more."
        )
        if task.raises:
            raise RuntimeError(f"'{task.slide}': {message}") from error
        logger.warning("'%s' failed: %s", task.slide, message)
        return _failed(task, message)
    if task.raises:
        raise error
    logger.warning("'%s' failed: %s", task.slide, one_line(error), exc_info=error)
    return _failed(task, f"{type(error).__name__}: {one_line(error)}")


@contextmanager
def open_client(address: str | None) -> Iterator[Client | None]:
    """Connect to a Dask scheduler, or start workers on this machine; ``None`` is no cluster.

    Parameters
    ----------
    address
        Address of a scheduler, such as ``"tcp://10.0.0.1:8786"``; ``"local"`` for one worker per GPU of this machine
        (one worker where there is none), ``"local:4"`` for four workers.
    """
    if address is None:
        yield None
        return
    try:
        import distributed
    except ImportError as error:
        raise ImportError("A cluster needs Dask: `pip install 'stalign[dask]'`.") from error
    kind, _, number = address.partition(":")
    if kind != "local":
        with distributed.Client(address) as client:
            yield client
        return
    if number and not (number.isdecimal() and int(number) > 0):
        raise ValueError(f"A local cluster is 'local' or 'local:N' with N workers, got {address!r}.")
    with _local_cluster(int(number or 0)) as cluster, distributed.Client(cluster) as client:
        yield client


def _local_cluster(n_workers: int) -> SpecCluster:
    """Start workers of one thread on this machine, the GPUs and cores shared out among them."""
    from dask.system import CPU_COUNT
    from distributed import Nanny, Scheduler, SpecCluster

    gpus = _visible_gpus()
    n_workers = n_workers or max(1, len(gpus))
    # Dask gives workers one thread for numerical libraries, which would leave cores idle.
    threads = str(max(1, CPU_COUNT // n_workers))
    workers = {}
    for number in range(n_workers):
        environment = {"OMP_NUM_THREADS": threads}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        # The slides' memory is none of Dask's, which would stop a worker at its share of the machine.
        options = {
            "nthreads": 1,
            "memory_limit": 0,
            "host": "127.0.0.1",
            "env": environment,
            "silence_logs": logging.ERROR,
        }
        workers[number] = {"cls": Nanny, "options": options}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard": False}}
    return SpecCluster(workers=workers, scheduler=scheduler, name="stalign", silence_logs=logging.ERROR)


def _visible_gpus() -> list[str]:
    """Return the names of the CUDA devices that this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
