"""Shards: sections on disk, mapped instead of read, each in a folder of its own with checksums.

``<shards>/manifest.json`` lists the sections, ``<shards>/genes.txt`` holds the vocabulary, ``<shards>/<section>/`` the
arrays (``.npy``), ``meta.json`` with size and SHA-256 of each, and ``cache/`` with what frozen encoders made of them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import scipy.sparse as sp

from stalign._logging import logger
from stalign._validate import listing, near
from stalign.models._checkpoint import sha256
from stalign.models._config import Geometry
from stalign.train._data import Section, StoredMatrix
from stalign.train._files import write_text, write_whole

FORMAT = 1
MANIFEST = "manifest.json"
META = "meta.json"
GENES = "genes.txt"
CACHE = "cache"
_LOCK = ".lock"
_PARTIAL = ".partial"
_OPTIONAL = ("spot_image", "niche_image", "labels")
_MATRICES = ("counts", "connectivities")
_BLOCK_BYTES = 2**26
_REDO = "Run `stalign prepare` again with the same inputs: it redoes what is damaged or missing, and nothing else."


class DamagedShardError(ValueError):
    """A shard lacks a file, or holds one that is not what was written."""


# --- files ---------------------------------------------------------------------------------------------------------


def row_blocks(n: int, row_bytes: int) -> Iterator[slice]:
    """Yield slices that cover ``n`` rows, each of some tens of megabytes."""
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def write_array(file: Path, shape: tuple[int, ...], dtype: Any, blocks: Iterable[np.ndarray]) -> dict[str, Any]:
    """Write an ``.npy`` file block by block, under a temporary name that is then changed.

    Written with ordinary writes rather than through a map, so that a full disk is an error and does not end the
    process.

    Parameters
    ----------
    file
        Where to.
    shape, dtype
        Of the whole array.
    blocks
        Its rows, in order, in pieces of any length.

    Returns
    -------
    What ``meta.json`` holds of it: ``dtype``, ``shape``, ``bytes`` and ``sha256``.
    """
    dtype = np.dtype(dtype)
    digest = hashlib.sha256()
    written = {"rows": 0, "bytes": 0}

    def put(handle: BinaryIO, content: bytes | memoryview) -> None:
        handle.write(content)
        digest.update(content)
        written["bytes"] += len(content)

    def write(handle: BinaryIO) -> None:
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, described)
        put(handle, header.getvalue())
        for block in blocks:
            if block.shape[1:] != shape[1:]:
                raise ValueError(f"{file.name}: a block has shape {block.shape}, for an array of {shape}.")
            put(handle, np.ascontiguousarray(block, dtype=dtype).reshape(-1).view(np.uint8).data)
            written["rows"] += len(block)
        if written["rows"] != shape[0]:
            raise ValueError(f"{file.name}: {written['rows']} rows were written, for an array of {shape}.")

    write_whole(file, write)
    return {"dtype": dtype.str, "shape": list(shape), "bytes": written["bytes"], "sha256": digest.hexdigest()}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object under a temporary name that is then changed."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, or say that the file is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedShardError(f"'{file}' is missing.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedShardError(f"'{file}' cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DamagedShardError(f"'{file}' holds a JSON {type(content).__name__}, not an object.")
    return content


def digest_of(content: Any) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_of_genes(genes: Sequence[str]) -> str:
    """Return the SHA-256 of a vocabulary."""
    return hashlib.sha256("\n".join(genes).encode()).hexdigest()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, which wait; it is free again when this process ends, however it ends.

    File systems and operating systems without such locks go without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / _LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Waiting for another process that works on %s.", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): do not prepare it from two processes at once.", folder, error)
        yield


# --- writing -------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes the shard of one section under a temporary name; :meth:`finish` puts it in its place.

    Parameters
    ----------
    folder
        The shards.
    name
        Name of the section.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.target = folder / check_name(name)
        self.folder = folder / f".{name}{_PARTIAL}"
        self.name = name
        self._files: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str, array: np.ndarray) -> None:
        """Write an array."""
        self.add_blocks(name, array.shape, array.dtype, [array])

    def add_blocks(self, name: str, shape: tuple[int, ...], dtype: Any, blocks: Iterable[np.ndarray]) -> None:
        """Write an array block by block, see :func:`write_array`."""
        self._files[f"{name}.npy"] = write_array(self.folder / f"{name}.npy", shape, dtype, blocks)

    def add_matrix(self, name: str, matrix: sp.csr_matrix) -> None:
        """Write a CSR matrix as three arrays."""
        for part in ("data", "indices", "indptr"):
            self.add(f"{name}_{part}", getattr(matrix, part))

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Write ``meta.json`` and put the shard in its place; an earlier one is replaced, its cache with it."""
        write_json(self.folder / META, {"format": FORMAT, "name": self.name, **meta, "files": self._files})
        old = self.target.with_name(f".{self.name}.old{_PARTIAL}")
        shutil.rmtree(old, ignore_errors=True)
        if self.target.exists():
            self.target.rename(old)
        self.folder.rename(self.target)
        shutil.rmtree(old, ignore_errors=True)


def check_name(name: str) -> str:
    """Refuse a name that cannot be a folder of its own."""
    if not name or name.startswith(".") or "/" in name or "\\" in name or name in (MANIFEST, GENES):
        raise ValueError(f"{name!r} cannot be the name of a section: it becomes the name of a folder.")
    return name


def remove_partial(folder: Path) -> None:
    """Remove what interrupted runs left behind. Only to be called by who holds the folder's lock."""
    for left in folder.glob(f".*{_PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


def section_settings(geometry: Geometry, genes: Sequence[str]) -> dict[str, Any]:
    """Return what all shards of a folder have in common."""
    return {"geometry": dict(geometry._asdict()), "vocabulary_sha256": digest_of_genes(genes)}


def write_manifest(folder: Path, settings: Mapping[str, Any]) -> None:
    """List the finished sections of a folder, as their own ``meta.json`` describe them."""
    entries = {}
    for meta_file in sorted(folder.glob(f"[!.]*/{META}")):
        try:
            meta = read_json(meta_file)
        except DamagedShardError as error:
            logger.warning("Left out of the manifest: %s", error)
            continue
        if meta.get("settings") != settings:
            logger.warning(
                "Left out of the manifest: '%s' was cut with another geometry or vocabulary. Remove the folder, or "
                "prepare the section again.",
                meta_file.parent,
            )
            continue
        entries[meta_file.parent.name] = {
            "patient": meta["patient"],
            "n_spots": meta["n_spots"],
            "has_image": meta["has_image"],
            "source": meta["source"]["path"],
            "bytes": sum(entry["bytes"] for entry in meta["files"].values()),
            "meta_sha256": sha256(meta_file),
        }
    write_json(folder / MANIFEST, {"format": FORMAT, "settings": dict(settings), "sections": entries})


def write_genes(folder: Path, genes: Sequence[str]) -> None:
    """Write the vocabulary, one symbol a line."""
    write_text(folder / GENES, "\n".join(genes) + "\n")


# --- reading -------------------------------------------------------------------------------------------------------


class ShardEntry(NamedTuple):
    """What the manifest says of a section."""

    name: str
    patient: str
    n_spots: int
    has_image: bool
    source: str
    bytes: int


class Shards:
    """A folder of shards that was found to be whole. Made by :func:`stalign.train.open_shards`.

    Attributes
    ----------
    folder
        Where it is.
    genes
        Vocabulary, the columns of every section's counts.
    geometry
        Niche and patch sizes the sections were cut with.
    entries
        By name of the section, sorted: ``patient``, ``n_spots``, ``has_image``, ``source`` and ``bytes``.
    """

    def __init__(
        self, folder: Path, genes: tuple[str, ...], geometry: Geometry, entries: Mapping[str, ShardEntry]
    ) -> None:
        self.folder, self.genes, self.geometry, self.entries = folder, genes, geometry, dict(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, patterns: Iterable[str]) -> list[str]:
        """Return names of sections in the order of the patterns, each once.

        Parameters
        ----------
        patterns
            Each matches the end of the path that a section was prepared from (``"patient_1/*.h5ad"``), or its name.

        Raises
        ------
        FileNotFoundError
            If a pattern matches nothing.
        """
        found: dict[str, None] = {}
        for pattern in patterns:
            matches = [entry for entry in self.entries.values() if _matches(entry, pattern)]
            if not matches:
                available = [entry.source for entry in self.entries.values()]
                raise FileNotFoundError(
                    f"No section of the shards in '{self.folder}' matches {pattern!r}. Prepared from: "
                    f"{listing(available)}.{near(pattern, [*self.entries, *available])}"
                )
            found.update(dict.fromkeys(entry.name for entry in sorted(matches, key=lambda e: PurePosixPath(e.source))))
        return list(found)

    def of_patients(self, patients: Iterable[str]) -> list[str]:
        """Return the names of all sections of some patients.

        Raises
        ------
        ValueError
            If a patient has no section.
        """
        names = []
        for patient in patients:
            own = [entry.name for entry in self.entries.values() if entry.patient == patient]
            if not own:
                known = sorted({entry.patient for entry in self.entries.values()})
                raise ValueError(
                    f"No section of the shards in '{self.folder}' is of patient {patient!r}. Patients: "
                    f"{listing(known)}.{near(patient, known)}"
                )
            names += own
        return list(dict.fromkeys(names))

    @property
    def bytes(self) -> int:
        """Size on disk, without what frozen encoders made."""
        return sum(entry.bytes for entry in self.entries.values())

    @property
    def patients(self) -> list[str]:
        """The patients, sorted."""
        return sorted({entry.patient for entry in self.entries.values()})

    def open(self, names: Iterable[str] | None = None) -> list[Section]:
        """Open sections, in the order of ``names``; nothing is read but what describes them."""
        return [open_section(self.folder / name) for name in (self.entries if names is None else names)]

    def check(self, geometry: Geometry, genes: Sequence[str]) -> None:
        """Refuse shards that a network of this geometry and vocabulary cannot be trained on.

        Raises
        ------
        ValueError
            Naming what differs.
        """
        check_settings(self.folder, section_settings(self.geometry, self.genes), section_settings(geometry, genes))


def check_settings(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse shards that were cut with other settings."""
    if found == wanted:
        return
    own, asked = found.get("geometry", {}), wanted["geometry"]
    differing = [
        f"{key} {own.get(key)!r} instead of {value!r}" for key, value in asked.items() if own.get(key) != value
    ]
    if found.get("vocabulary_sha256") != wanted["vocabulary_sha256"]:
        differing.append("another vocabulary")
    raise ValueError(
        f"The shards in '{folder}' were prepared for another network: {', '.join(differing)}. Prepare them in another "
        "folder, or again with `--overwrite`."
    )


def _matches(entry: ShardEntry, pattern: str) -> bool:
    # ** stands for any folders: what follows it is compared with the end of the path anyway.
    tail = PurePosixPath(pattern.replace("\\", "/").split("**/")[-1]).as_posix().removeprefix("/")
    return PurePosixPath(entry.source).match(tail) or fnmatch.fnmatchcase(entry.name, pattern)


def open_shards(folder: str | Path, *, skip_damaged: bool = False) -> Shards:
    """Open a folder of shards.

    Names and sizes of all files are checked; :func:`stalign.train.verify_shards` reads them, too.

    Parameters
    ----------
    folder
        What ``stalign prepare`` wrote.
    skip_damaged
        Leave damaged sections out, with a warning, instead of refusing the folder.

    Returns
    -------
    :class:`Shards`.

    Raises
    ------
    FileNotFoundError
        If there are no shards.
    DamagedShardError
        If a section is damaged, naming it and the file; a ``ValueError``.

    Examples
    --------
    >>> from stalign import train
    >>> shards = train.open_shards("cohort.shards")  # doctest: +SKIP
    >>> shards.of_patients(["B"])  # doctest: +SKIP
    """
    folder = Path(folder).expanduser()
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no shards: there is no {MANIFEST}. `stalign prepare INPUTS --out {folder}` makes them."
        )
    try:
        manifest = _read_manifest(folder)
        genes = _read_genes(folder, manifest["settings"]["vocabulary_sha256"])
    except DamagedShardError as error:
        raise DamagedShardError(f"{error} {_REDO}") from error
    entries, damages = {}, {}
    for name, stated in manifest["sections"].items():
        damage = _damage(folder / name, stated["meta_sha256"])
        if damage:
            damages[name] = damage
        else:
            entries[name] = ShardEntry(name, **{key: value for key, value in stated.items() if key != "meta_sha256"})
    if damages:
        described = " ".join(f"Section {name!r}: {damage}" for name, damage in damages.items())
        if not skip_damaged:
            raise DamagedShardError(
                f"{len(damages)} of {len(manifest['sections'])} shards in '{folder}' are damaged. {described} {_REDO} "
                "`skip_damaged=True` (`data.skip_damaged` of a config) leaves them out."
            )
        logger.warning("Left out %d damaged shards of '%s'. %s", len(damages), folder, described)
    return Shards(folder, genes, Geometry(**manifest["settings"]["geometry"]), entries)


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"The shards in '{folder}' have format {manifest.get('format')!r}; this version of stalign reads format "
            f"{FORMAT}. Prepare them again, or use the version that made them."
        )
    try:
        Geometry(**manifest["settings"]["geometry"])
        for name, stated in manifest["sections"].items():
            ShardEntry(name, **{key: value for key, value in stated.items() if key != "meta_sha256"})
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedShardError(f"'{folder / MANIFEST}' is not a manifest of shards ({error!r}).") from error
    return manifest


def _read_genes(folder: Path, digest: str) -> tuple[str, ...]:
    try:
        genes = tuple(line for line in (folder / GENES).read_text(encoding="utf-8").split("\n") if line)
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedShardError(f"'{folder / GENES}' cannot be read ({error}).") from error
    if digest_of_genes(genes) != digest:
        raise DamagedShardError(f"'{folder / GENES}' is not the vocabulary that the manifest names.")
    return genes


def _damage(folder: Path, meta_sha256: str = "", *, thorough: bool = False) -> str:
    """Say what is wrong with a section's folder; empty if nothing is."""
    try:
        meta = read_json(folder / META)
    except DamagedShardError as error:
        return str(error)
    if meta_sha256 and sha256(folder / META) != meta_sha256:
        return f"'{folder / META}' is not the one that the manifest names."
    try:
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in meta["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"'{folder / META}' does not describe a section ({error!r})."
    for name, (size, digest) in files.items():
        damage = _file_damage(folder / name, size, digest if thorough else "")
        if damage:
            return damage
    return ""


def _file_damage(file: Path, size: int, digest: str) -> str:
    if not file.is_file():
        return f"'{file}' is missing."
    found = file.stat().st_size
    if found != size:
        return f"'{file}' has {found:,} bytes instead of {size:,}."
    if digest and sha256(file) != digest:
        return f"'{file}' is not what was written: its SHA-256 differs."
    return ""


def is_whole(folder: Path) -> bool:
    """Whether a section's folder holds all its files, by their sizes."""
    return not _damage(folder)


def verify_shards(folder: str | Path) -> dict[str, str]:
    """Read every file of a folder of shards, caches included, and compare it with its SHA-256.

    Parameters
    ----------
    folder
        What ``stalign prepare`` wrote.

    Returns
    -------
    By name of the damaged section: what is wrong with it. Empty if all is well.

    Raises
    ------
    FileNotFoundError
        If there are no shards.
    DamagedShardError
        If manifest or vocabulary are damaged.

    Examples
    --------
    >>> from stalign import train
    >>> train.verify_shards("cohort.shards")  # doctest: +SKIP
    """
    folder = Path(folder).expanduser()
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"'{folder}' holds no shards: there is no {MANIFEST}.")
    manifest = _read_manifest(folder)
    _read_genes(folder, manifest["settings"]["vocabulary_sha256"])
    found = {}
    for name, stated in manifest["sections"].items():
        damage = _damage(folder / name, stated["meta_sha256"], thorough=True) or _cache_damage(folder / name)
        if damage:
            found[name] = damage
    return found


def open_section(folder: Path) -> Section:
    """Open the shard of one section.

    Raises
    ------
    DamagedShardError
        If a file does not hold what ``meta.json`` says.
    """
    meta = read_json(folder / META)
    files, n = meta["files"], meta["n_spots"]
    stored: dict[str, Any] = {name: folder / f"{name}.npy" for name in _OPTIONAL if f"{name}.npy" in files}
    shapes = {"counts": (n, meta["n_genes"]), "connectivities": (n, n)}
    stored |= {name: StoredMatrix(folder, name, shapes[name]) for name in _MATRICES}
    colour = None
    if meta["colour"] is not None:
        mean, sd = (np.array(meta["colour"][key], dtype=np.float32) for key in ("mean", "sd"))
        colour = (mean, sd)
    try:
        return Section(
            name=meta["name"],
            patient=meta["patient"],
            colour=colour,
            folder=folder,
            checksums={name: entry["sha256"] for name, entry in files.items()},
            **stored,
        )
    except (ValueError, OSError) as error:
        raise DamagedShardError(f"The shard '{folder}' cannot be opened: {error} {_REDO}") from error


# --- what frozen encoders made ---------------------------------------------------------------------------------------


def cached(
    folder: Path,
    name: str,
    key: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: Any,
    blocks: Callable[[], Iterable[np.ndarray]],
) -> Path:
    """Return the file of an array that depends on ``key`` alone; it is made where it is not there, or damaged.

    Parameters
    ----------
    folder
        The cache.
    name
        What the array is.
    key
        All that it depends on, in plain values.
    shape, dtype
        Of the array.
    blocks
        Makes its rows, in order.
    """
    file = folder / f"{name}-{digest_of(key)[:16]}.npy"
    if not _is_cached(file):
        with folder_lock(folder):
            if not _is_cached(file):  # another process may have made it by now
                file.with_suffix(".json").unlink(missing_ok=True)
                entry = write_array(file, shape, dtype, blocks())
                write_json(file.with_suffix(".json"), {"format": FORMAT, "name": name, "key": dict(key), **entry})
    return file


def _is_cached(file: Path, *, thorough: bool = False) -> bool:
    side = file.with_suffix(".json")
    if not side.is_file():
        return False  # never finished
    try:
        entry = read_json(side)
        damage = _file_damage(file, int(entry["bytes"]), str(entry["sha256"]) if thorough else "")
    except (DamagedShardError, KeyError, TypeError, ValueError) as error:
        damage = f"'{side}' does not describe a cache ({error!r})."
    if damage:
        logger.warning("A cache is made again: %s", damage)
    return not damage


def _cache_damage(folder: Path) -> str:
    for side in sorted((folder / CACHE).glob("[!.]*.json")):
        try:
            entry = read_json(side)
            damage = _file_damage(side.with_suffix(".npy"), int(entry["bytes"]), str(entry["sha256"]))
        except (DamagedShardError, KeyError, TypeError, ValueError) as error:
            damage = f"'{side}' does not describe a cache ({error!r})."
        if damage:
            return f"{damage} Remove the file: it is made again when it is needed."
    return ""
