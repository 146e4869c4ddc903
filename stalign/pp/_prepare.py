"""From files to what :func:`stalign.train.pretrain` takes: sections in memory, or shards on disk."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stalign._keys import Key
from stalign._logging import logger, one_line
from stalign._settings import settings
from stalign._validate import check_choice, check_positive, listing, near

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import ModelConfig
    from stalign.models._config import Geometry
    from stalign.train import PretrainConfig, Section
    from stalign.train._shards import Shards

_TECHNOLOGIES = ("ST", "Visium", "VisiumHD")
_MOUSE = ("mouse", "mus musculus")
# What a section's own files can be at fault for; anything else is a fault of the package and ends the run.
_SECTION_ERRORS = (ValueError, KeyError, TypeError, OSError)


# --- where slides are ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlideSource:
    """A slide that can be read.

    Attributes
    ----------
    path
        A file, or the folder of a collection.
    layout
        ``"file"`` (``.h5ad``, ``.zarr``, Space Ranger ``outs``), ``"hest"`` or ``"stimage"``.
    sample, technology
        Which slide of a collection.
    """

    path: Path
    layout: str = "file"
    sample: str = ""
    technology: str = ""

    @property
    def name(self) -> str:
        """Name of the slide."""
        from stalign.io._slides import slide_name

        return self.sample or slide_name(self.path)

    @property
    def files(self) -> list[Path]:
        """What the slide is made of, as far as it is there; the first is always there."""
        if self.layout == "hest":
            names = [f"st/{self.sample}.h5ad", f"metadata/{self.sample}.json"]
            names += [f"wsis/{self.sample}{suffix}" for suffix in (".tif", ".tiff")]
        elif self.layout == "stimage":
            names = [f"coord/{self.sample}_coord.csv", f"gene_exp/{self.sample}_count.csv"]
            names += [f"image/{self.sample}{suffix}" for suffix in (".png", ".jpg", ".jpeg", ".tif", ".tiff")]
        elif self.path.is_dir():
            return sorted(file for file in self.path.rglob("*") if file.is_file())
        else:
            return [self.path]
        return [self.path / name for name in names if (self.path / name).is_file()]

    @property
    def origin(self) -> str:
        """Path that stands for the slide."""
        return (self.path if self.layout == "file" else self.files[0]).absolute().as_posix()

    def read(self) -> AnnData:
        """Read the slide."""
        from stalign import io
        from stalign.io._slides import read_slide

        if self.layout == "hest":
            return io.read_hest(self.path, self.sample)
        if self.layout == "stimage":
            return io.read_stimage1k4m(self.path, self.sample, technology=self.technology)
        return read_slide(self.path)


def find_slides(inputs: Iterable[str | Path]) -> list[SlideSource]:
    """Find the slides that files and folders hold.

    Parameters
    ----------
    inputs
        ``.h5ad`` files; AnnData ``.zarr`` and Space Ranger ``outs`` folders; folders of HEST-1k or STimage-1K4M, which
        are recognised; other folders are searched for ``.h5ad`` files.

    Raises
    ------
    FileNotFoundError
        If an input does not exist, or holds no slide.
    """
    found: dict[SlideSource, None] = {}
    for entry in inputs:
        path = Path(entry).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder '{path}'.")
        found.update(dict.fromkeys(_slides_in(path)))
    return list(found)


def _slides_in(path: Path) -> list[SlideSource]:
    is_space_ranger = (path / "binned_outputs").is_dir() or (path / "spatial").is_dir()
    if path.is_file() or path.suffix == ".zarr" or is_space_ranger:
        if path.is_file() and path.suffix != ".h5ad":
            raise ValueError(f"'{path}' is no slide that can be read: a file must be an .h5ad.")
        return [SlideSource(path)]
    hest = sorted(file.stem for file in (path / "st").glob("*.h5ad"))
    if hest:
        return [SlideSource(path, "hest", sample) for sample in hest]
    stimage = [path / name for name in _TECHNOLOGIES if (path / name / "coord").is_dir()]
    if (path / "coord").is_dir() and path.resolve().name in _TECHNOLOGIES:
        stimage = [path]
    if stimage:
        return [slide for folder in stimage for slide in _stimage_slides(folder)]
    files = [SlideSource(file) for file in sorted(path.rglob("*.h5ad"))]
    if not files:
        from stalign.io._files import contents

        raise FileNotFoundError(
            f"'{path}' holds no slide: looked for .h5ad files, HEST-1k ('st/<id>.h5ad'), STimage-1K4M "
            f"('Visium/coord/…') and Space Ranger ('spatial/'). It holds {contents(path)}."
        )
    return files


def _stimage_slides(folder: Path) -> Iterator[SlideSource]:
    for file in sorted(folder.glob("coord/*_coord.csv")):
        sample = file.name.removesuffix("_coord.csv")
        yield SlideSource(folder, "stimage", sample, folder.resolve().name)


def name_slides(slides: Sequence[SlideSource]) -> dict[str, SlideSource]:
    """Return the slides by name; slides of one name get their folder's name in front.

    Raises
    ------
    ValueError
        If that does not tell them apart.
    """
    count = Counter(slide.name for slide in slides)
    named: dict[str, SlideSource] = {}
    for slide in slides:
        name = slide.name if count[slide.name] == 1 else f"{slide.path.absolute().parent.name}_{slide.name}"
        if name in named:
            raise ValueError(
                f"Two slides would both be called {name!r}: '{named[name].origin}' and '{slide.origin}'. Rename one, "
                "or prepare them in two folders."
            )
        named[name] = slide
    return named


# --- what the files say of a slide -----------------------------------------------------------------------------------


def _metadata(adata: AnnData) -> dict[str, Any]:
    """Return what is said of the whole object and of its only library."""
    whole = adata.uns.get("metadata", {})
    libraries = list(adata.uns.get(Key.uns.SPATIAL, {}).values())
    own = libraries[0].get("metadata", {}) if len(libraries) == 1 else {}
    return {**(whole if isinstance(whole, Mapping) else {}), **(own if isinstance(own, Mapping) else {})}


def _patient(adata: AnnData, source: SlideSource) -> str | None:
    """Return the patient, as narrowly as is known; ``None`` leaves it to ``obs`` and the slide's name.

    Sections of one patient must not be told apart by mistake: where only the study is known, the study it is.
    """
    metadata = _metadata(adata)
    if source.layout == "hest":
        # Their patients are numbered within a study.
        study, patient = str(metadata.get("dataset_title", "")), str(metadata.get("patient", ""))
        return ": ".join(part for part in (study, patient) if part) or None
    if source.layout == "stimage":
        # Names begin with species, tissue and study; what follows the technology is the slide.
        study, token, _ = source.sample.rpartition(f"_{source.technology}_")
        return study if token else None
    if "patient" in adata.obs:
        return None
    return str(metadata["patient"]) if metadata.get("patient") else None


def _organism(adata: AnnData, source: SlideSource) -> str | None:
    """Return ``"mouse"`` where the metadata or STimage-1K4M's name says so."""
    stated = str(_metadata(adata).get("species", "")).lower()
    return "mouse" if stated in _MOUSE or source.sample.startswith("Mouse_") else None


def read_patients(file: str | Path) -> dict[str, str]:
    """Read a table of patients: CSV with the columns ``section`` and ``patient``.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it lacks a column.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no table of patients '{file}'.")
    with file.open(encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines)
        lacking = {"section", "patient"} - set(table.fieldnames or ())
        if lacking:
            raise ValueError(f"'{file}' lacks the columns {sorted(lacking)}. It has {listing(table.fieldnames or ())}.")
        return {row["section"]: row["patient"] for row in table}


# --- in memory -------------------------------------------------------------------------------------------------------


def prepare_sections(config: PretrainConfig, role: str = "train") -> tuple[list[Section], tuple[str, ...]]:
    """Read the sections of a pretraining config into memory and cut their patches.

    Parameters
    ----------
    config
        A pretraining run.
    role
        ``"train"`` or ``"validation"``.

    Returns
    -------
    The sections, and the vocabulary whose genes are the columns of their counts.
    """
    import anndata

    from stalign.models import config as model_config

    genes = resolve_vocabulary(config.network.vocabulary)
    network = model_config(config.network.config).updated(config.network.changes)
    sections = []
    files = config.data.files(role) if role == "train" or config.data.validation else []
    for file in files:
        adata = anndata.read_h5ad(file)
        sections.append(prepare_section(adata, network, genes, name=file.stem, mpp=config.data.mpp.get(file.stem)))
    return sections, genes


def prepare_section(
    adata: AnnData, network: ModelConfig, genes: Sequence[str], *, name: str, mpp: float | None = None
) -> Section:
    """Turn the AnnData of one slide into a training section in memory.

    Parameters
    ----------
    adata
        Counts, coordinates and, if there is one, the image. It is not changed.
    network
        Says how large niches and patches are.
    genes
        The vocabulary.
    name
        Name of the section.
    mpp
        µm per full-resolution pixel, where nothing in the file states it.
    """
    from stalign.genes._resolve import resolve_genes
    from stalign.train._sections import read_section

    work = adata.copy()
    _find_niches(work, network.geometry, mpp)
    match = resolve_genes(work, genes)
    section = read_section(work, network.geometry, match=match, name=name)
    logger.info("Section %s: %d spots, %s.", name, len(section), _kind(section.has_image))
    return section


def _find_niches(adata: AnnData, geometry: Geometry, mpp: float | None) -> None:
    from stalign.pp._niches import extract_niches

    extract_niches(
        adata, mpp=mpp, n_neighbors=geometry.n_neighbors, spot_um=geometry.spot_um, niche_um=geometry.niche_um
    )


def _kind(has_image: bool) -> str:
    return "image and counts" if has_image else "counts only"


# --- shards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One section to be written; plain values, so that it travels to another process."""

    source: SlideSource
    name: str
    folder: Path
    geometry: Geometry
    genes: tuple[str, ...]
    mpp: float | None
    patient: str | None
    organism: str | None

    @cached_property
    def settings(self) -> dict[str, Any]:
        from stalign.train._shards import section_settings

        return section_settings(self.geometry, self.genes)

    @property
    def request(self) -> dict[str, Any]:
        return {"mpp": self.mpp, "patient": self.patient, "organism": self.organism}

    def run(self) -> None:
        """Read the slide and write its shard."""
        from stalign.genes._resolve import resolve_genes
        from stalign.train._sections import write_section

        before = _stamps(self.source)
        adata = self.source.read()
        _find_niches(adata, self.geometry, self.mpp)
        organism = self.organism or _organism(adata, self.source)
        write_section(
            self.folder,
            adata,
            self.geometry,
            match=resolve_genes(adata, self.genes, organism=organism),
            name=self.name,
            patient=self.patient or _patient(adata, self.source),
            meta={
                "settings": self.settings,
                "request": self.request,
                "source": {"path": self.source.origin, "files": before},
            },
        )

    def is_done(self) -> bool:
        """Whether the shard is there, whole, and made of the same files with the same settings.

        Raises
        ------
        ValueError
            If a shard of this name was made of another slide, which is still there.
        """
        from stalign.train._shards import META, DamagedShardError, is_whole, read_json

        folder = self.folder / self.name
        if not folder.is_dir():
            return False
        try:
            meta = read_json(folder / META)
            source, settings_, request = meta["source"], meta["settings"], meta["request"]
            stamps = source["files"]
        except (DamagedShardError, KeyError, TypeError) as error:
            logger.warning("Section %s is prepared again: its shard is damaged (%s).", self.name, error)
            return False
        # Files that are gone, such as slides deleted to save space, are no reason to do it again.
        changed = [name for name, stamp in _stamps(self.source).items() if stamps.get(name) != stamp]
        # Where the earlier slide is still there, this is not the same one moved, but another of its name.
        if changed and source["path"] != self.source.origin and Path(source["path"]).exists():
            raise ValueError(
                f"Section {self.name!r} in '{self.folder}' was prepared from '{source['path']}', and now it would be "
                f"'{self.source.origin}'. Pass `--overwrite` to replace it, or another folder."
            )
        if changed or settings_ != self.settings or request != self.request:
            return False
        if not is_whole(folder):
            logger.warning("Section %s is prepared again: its shard is damaged.", self.name)
            return False
        return True


def _stamps(source: SlideSource) -> dict[str, list[int]]:
    """Return size and time of change of a slide's files, by name; the same wherever the slide is moved to."""
    inside = source.path if source.path.is_dir() else source.path.parent
    return {
        file.relative_to(inside).as_posix(): [file.stat().st_size, file.stat().st_mtime_ns] for file in source.files
    }


def prepare_shards(
    inputs: Iterable[str | Path] | str | Path,
    out: str | Path,
    *,
    network: str | Path | ModelConfig = "mini",
    geometry: Mapping[str, Any] | None = None,
    vocabulary: str | Path | Sequence[str] = "protein-coding",
    mpp: float | Mapping[str, float] | None = None,
    patients: Mapping[str, str] | None = None,
    organism: str | None = None,
    jobs: int = 1,
    overwrite: bool = False,
    skip_failed: bool = False,
    progress: bool | None = None,
) -> Shards:
    """Turn slides into shards on disk, ready to be trained on without fitting into memory.

    Section by section: a section that was finished earlier, from the same files with the same settings, is not done
    again, one that was interrupted or damaged is.

    Parameters
    ----------
    inputs
        ``.h5ad`` files; AnnData ``.zarr`` and Space Ranger ``outs`` folders; folders of HEST-1k or STimage-1K4M, which
        are recognised; other folders are searched for ``.h5ad`` files. Sections are called by the file's or sample's
        name, with the folder's in front where two are alike.
    out
        Folder of the shards.
    network
        The config or model that says how large niches and patches are.
    geometry
        Changes to that: ``n_neighbors``, ``spot_um``, ``niche_um``, ``spot_pixels``, ``niche_pixels``.
    vocabulary
        Genes whose counts are kept: ``"protein-coding"``, a model's name or folder, a text file with one symbol a line,
        or the symbols.
    mpp
        µm per full-resolution pixel of sections that do not state it, one for all or by section.
    patients
        By section, its patient; before what the files say (``obs["patient"]``, HEST-1k's metadata). STimage-1K4M names
        no patients: there the study stands for the patient, so that no patient is in training and validation both.
    organism
        ``"human"`` or ``"mouse"``; ``None`` goes by the metadata, then human.
    jobs
        Processes, each with one section in memory.
    overwrite
        Prepare everything again, and replace shards of other slides or settings.
    skip_failed
        Go on without sections that cannot be prepared, with a warning.
    progress
        Show a progress bar; ``None`` is ``stalign.settings.progress``.

    Returns
    -------
    :class:`stalign.train.Shards`, all that the folder now holds.

    Raises
    ------
    FileNotFoundError
        If there is nothing to prepare.
    ValueError
        If ``out`` holds shards of other settings, or sections could not be prepared; the others are finished by then.

    Examples
    --------
    >>> import stalign as sta
    >>> shards = sta.pp.prepare_shards(["cohort/"], "cohort.shards", jobs=4)  # doctest: +SKIP
    """
    from stalign.models import ModelConfig
    from stalign.models import config as model_config

    inputs = [inputs] if isinstance(inputs, str | Path) else inputs
    base = network if isinstance(network, ModelConfig) else model_config(network)
    slides = name_slides(find_slides(inputs))
    return _prepare(
        slides,
        Path(out).expanduser(),
        geometry=_changed(base.geometry, geometry or {}),
        genes=resolve_vocabulary(vocabulary),
        mpp=mpp,
        patients=_known(patients or {}, slides, "patients"),
        organism=organism,
        jobs=jobs,
        overwrite=overwrite,
        skip_failed=skip_failed,
        progress=progress,
    )


def _changed(geometry: Geometry, changes: Mapping[str, Any]) -> Geometry:
    for name, value in changes.items():
        check_choice("geometry", name, geometry._fields)
        check_positive(name, value, integer=not name.endswith("_um"))
    values = {name: float(value) if name.endswith("_um") else value for name, value in changes.items()}
    return type(geometry)(**{**geometry._asdict(), **values})


def _known(table: Mapping[str, Any], slides: Mapping[str, SlideSource], what: str) -> dict[str, Any]:
    """Refuse a table of which no line is about one of the slides; say which lines are not."""
    unknown = [name for name in table if name not in slides]
    if table and len(unknown) == len(table):
        raise ValueError(
            f"{what} names none of the {len(slides)} sections: {listing(unknown)}. Sections: {listing(slides)}."
            f"{near(unknown[0], slides)}"
        )
    if unknown:
        logger.info("%s also names %d sections that are not here: %s.", what, len(unknown), listing(unknown, 5))
    return dict(table)


def resolve_vocabulary(vocabulary: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Return the gene symbols of a vocabulary given by name, model, file, or as they are."""
    from stalign.pp._genes import get_vocabulary

    if vocabulary == "protein-coding":
        from stalign.genes import protein_coding_genes

        return protein_coding_genes()
    if isinstance(vocabulary, str | Path) and Path(vocabulary).expanduser().is_file():
        text = Path(vocabulary).expanduser().read_text(encoding="utf-8")
        genes = tuple(line.strip() for line in text.splitlines() if line.strip())
    else:
        genes = tuple(get_vocabulary(vocabulary)[0])
    repeated = [gene for gene, n in Counter(genes).items() if n > 1]
    if repeated or not genes:
        raise ValueError(f"The vocabulary has {len(genes)} genes; named more than once: {listing(repeated, 5)}.")
    return genes


def _prepare(
    slides: Mapping[str, SlideSource],
    folder: Path,
    *,
    geometry: Geometry,
    genes: tuple[str, ...],
    mpp: float | Mapping[str, float] | None = None,
    patients: Mapping[str, str] | None = None,
    organism: str | None = None,
    jobs: int = 1,
    overwrite: bool = False,
    skip_failed: bool = False,
    progress: bool | None = None,
) -> Shards:
    from stalign.genes._match import ORGANISMS
    from stalign.train._shards import (
        folder_lock,
        open_shards,
        remove_partial,
        section_settings,
        write_genes,
        write_manifest,
    )

    check_positive("jobs", jobs, integer=True)
    if organism is not None:
        check_choice("organism", organism, ORGANISMS)
    by_name = dict(mpp) if isinstance(mpp, Mapping) else dict.fromkeys(slides, mpp)
    all_jobs = [
        _Job(
            source=slide,
            name=name,
            folder=folder,
            geometry=geometry,
            genes=genes,
            # A config names sections by file, whatever they are called here.
            mpp=by_name.get(name, by_name.get(slide.name)),
            patient=(patients or {}).get(name),
            organism=organism,
        )
        for name, slide in slides.items()
    ]
    wanted = section_settings(geometry, genes)
    with folder_lock(folder):
        _check_folder(folder, wanted, overwrite=overwrite)
        remove_partial(folder)
        to_do = [job for job in all_jobs if overwrite or not job.is_done()]
        if len(to_do) < len(all_jobs):
            logger.info("%d of %d sections were prepared before.", len(all_jobs) - len(to_do), len(all_jobs))
        write_genes(folder, genes)
        failed: dict[str, str] = {}
        try:
            failed = _run(to_do, jobs, settings.progress if progress is None else progress)
        finally:
            # Whatever ended the run: what is finished stays, and is listed.
            write_manifest(folder, wanted)
    if failed:
        described = " ".join(f"{name}: {message}" for name, message in failed.items())
        if not skip_failed:
            raise ValueError(
                f"{len(failed)} of {len(slides)} sections could not be prepared; the others are in '{folder}'. "
                f"{described} Call again once that is settled, or with `--skip-failed` to go on without them."
            )
        logger.warning("%d sections could not be prepared and are left out. %s", len(failed), described)
    return open_shards(folder)


def _check_folder(folder: Path, wanted: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or shards of other settings."""
    from stalign.train._shards import MANIFEST, META, DamagedShardError, check_settings, read_json

    others = [item.name for item in folder.iterdir() if not item.name.startswith(".")] if folder.is_dir() else []
    if not (folder / MANIFEST).is_file():
        if others and not any((folder / name / META).is_file() for name in others) and others != ["genes.txt"]:
            raise FileExistsError(f"'{folder}' exists and holds no shards, but {listing(others)}. Name another folder.")
        return
    if overwrite:
        return
    try:
        found = read_json(folder / MANIFEST).get("settings", {})
    except DamagedShardError as error:
        logger.warning("The manifest is written again: %s", error)
        return
    check_settings(folder, found, wanted)


def _run(jobs: Sequence[_Job], n_processes: int, progress: bool) -> dict[str, str]:
    """Run jobs, here or in other processes; return what went wrong, by section."""
    from tqdm.auto import tqdm

    failed: dict[str, str] = {}
    with tqdm(total=len(jobs), unit="section", desc="Preparing", disable=not progress or not jobs) as bar:
        for name, error in _outcomes(jobs, min(n_processes, len(jobs))):
            if error is not None:
                failed[name] = one_line(error)
                logger.warning("Section %s could not be prepared: %s", name, failed[name])
            bar.update()
    return failed


def _outcomes(jobs: Sequence[_Job], n_processes: int) -> Iterator[tuple[str, BaseException | None]]:
    if n_processes <= 1:
        for job in jobs:
            yield job.name, _attempt(job)
        return
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    # Started afresh: a copy of a process that runs threads may hang.
    pool = ProcessPoolExecutor(
        n_processes, mp_context=get_context("spawn"), initializer=_start_process, initargs=(settings.verbosity,)
    )
    with pool:
        try:
            running = {pool.submit(_attempt, job): job.name for job in jobs}
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A process that prepared a section ended without a word, most likely for want of memory. The finished "
                "sections are kept: call again with fewer `jobs`."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_process(verbosity: int) -> None:
    settings.verbosity = verbosity


def _attempt(job: _Job) -> BaseException | None:
    """Run a job; return what went wrong with its section."""
    try:
        job.run()
    except _SECTION_ERRORS as error:
        return error
    return None


# --- for a training config -------------------------------------------------------------------------------------------


def prepare_config(config: PretrainConfig, *, jobs: int = 1, overwrite: bool = False) -> Path:
    """Prepare the sections that a pretraining config names, as far as they are not.

    Parameters
    ----------
    config
        A pretraining run.
    jobs, overwrite
        As of :func:`prepare_shards`.

    Returns
    -------
    The folder of the shards: ``data.shards``, by default ``<out>.shards``. Several processes may call this at once: one
    works, the others wait.
    """
    from stalign.models import config as model_config
    from stalign.train._pretrain import shards_folder
    from stalign.train._shards import MANIFEST, DamagedShardError, open_shards, read_json, section_settings

    folder = shards_folder(config)
    patterns = [*config.data.train, *config.data.validation]
    network = model_config(config.network.config).updated(config.network.changes)
    if (folder / MANIFEST).is_file() and not _any_file(config.data.root, patterns):
        # Prepared elsewhere: the slides themselves are not on this machine.
        open_shards(folder, skip_damaged=config.data.skip_damaged).select(patterns)
        return folder
    files = [file for role in ("train", "validation") if getattr(config.data, role) for file in config.data.files(role)]
    genes = resolve_vocabulary(config.network.vocabulary)
    if not config.data.shards and (folder / MANIFEST).is_file():
        # The run's own folder: shards of an earlier geometry are of no use to it.
        try:
            found = read_json(folder / MANIFEST).get("settings")
        except DamagedShardError:
            found = None
        overwrite = overwrite or (found is not None and found != section_settings(network.geometry, genes))
    _prepare(
        name_slides(find_slides(files)),
        folder,
        geometry=network.geometry,
        genes=genes,
        mpp=config.data.mpp,
        jobs=jobs,
        overwrite=overwrite,
    )
    return folder


def _any_file(root: str, patterns: Iterable[str]) -> bool:
    return any(next(Path(root).expanduser().glob(pattern), None) is not None for pattern in patterns)


def encode_config(config: PretrainConfig) -> Path:
    """Run the frozen encoders of a config over its shards and keep the result there, so that training need not.

    Parameters
    ----------
    config
        A pretraining run; its shards are there.

    Returns
    -------
    The folder of the shards.
    """
    import torch

    from stalign.train._pretrain import build_model, encode_cohort, open_cohort, shards_folder

    cohort = open_cohort(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config, cohort.genes)
    encode_cohort(config, model, cohort)
    return shards_folder(config)


def pretrain_from_files(config: PretrainConfig) -> Path:
    """Prepare the sections that a config names and train on them: what ``stalign pretrain`` runs."""
    from stalign.train import pretrain

    prepare_config(config)
    return pretrain(config)
