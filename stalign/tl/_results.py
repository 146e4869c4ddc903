"""Embeddings on disk: in a zarr store beside the data, or in the AnnData's own file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stalign._keys import Key
from stalign._logging import logger
from stalign.tl._sinks import FolderSink, difference, explained

if TYPE_CHECKING:
    from anndata import AnnData

FINGERPRINT = "stalign_fingerprint"
_ROWS = 16384
_ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}


def store_beside(file: str | Path, key_added: str) -> Path:
    """Return where the embeddings of a file that is only read are kept: ``slide.X_stalign.zarr`` beside it."""
    file = Path(file)
    return file.with_name(f"{file.stem}.{key_added}.zarr")


def working_folder(target: Path) -> Path:
    """Return the folder in which unfinished embeddings for a store or file wait."""
    return target.with_name(f"{target.name}.unfinished")


# --- a zarr store ------------------------------------------------------------------------------------------------


def check_store(path: Path) -> None:
    """Refuse to replace what is no store of embeddings."""
    if path.exists() and _read_fingerprint(path) is None and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"'{path}' is there and holds no embeddings of `tl.embed`; it is not overwritten. Pass another `store=...`."
        )


def _open(path: Path) -> Any:
    """Open a zarr group for reading; ``None`` where there is none that can be read."""
    import zarr

    if not path.is_dir():
        return None
    try:
        return zarr.open_group(str(path), mode="r")
    except (OSError, KeyError, ValueError):
        return None


def _read_fingerprint(path: Path) -> dict[str, str] | None:
    group = _open(path)
    found = None if group is None else dict(group.attrs).get(FINGERPRINT)
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, Mapping) else None


def attach(path: Path, fingerprint: Mapping[str, str], names: Mapping[str, str], n_obs: int) -> dict[str, Any] | None:
    """Return the matrices of a finished store of the same thing; ``None`` if it is another, damaged or not there.

    Parameters
    ----------
    path
        The store.
    fingerprint
        What the result depends on.
    names
        Name in ``obsm`` by output.
    n_obs
        Number of spots.
    """
    earlier = _read_fingerprint(path)
    if earlier is None:
        return None
    changed = difference(earlier, fingerprint)
    if changed:
        logger.warning("The embeddings in '%s' are of something else (%s changed): they are made anew.", path, changed)
        return None
    group = _open(path)
    matrices = {output: group[f"obsm/{name}"] for output, name in names.items() if f"obsm/{name}" in group}
    if not matrices or any(not _whole(path / "obsm" / names[output], m, n_obs) for output, m in matrices.items()):
        logger.warning("The embeddings in '%s' are damaged: they are made anew.", path)
        return None
    logger.info("The embeddings are in '%s' already.", path)
    return matrices


def _whole(folder: Path, matrix: Any, n_obs: int) -> bool:
    """Whether all chunks are there and can be decoded; zarr takes one that is missing for an empty one."""
    if len(matrix.shape) != 2 or matrix.shape[0] != n_obs:
        return False
    n_chunks = -(-n_obs // matrix.chunks[0])
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".", "zarr"))]
    if len(files) < n_chunks:
        return False
    try:
        for start in range(0, n_obs, matrix.chunks[0]):
            matrix[start : start + 1]
    except (OSError, ValueError, RuntimeError):
        return False
    return True


def write_store(
    path: Path, table: AnnData, sink: FolderSink, names: Mapping[str, str], fingerprint: Mapping[str, str]
) -> dict[str, Any]:
    """Write a store that :func:`anndata.read_zarr` reads, and return its matrices.

    Parameters
    ----------
    path
        Written under a temporary name beside it and renamed at the end.
    table
        What goes with the embeddings: names of the spots, niche graph, record. No counts.
    sink
        The embeddings.
    names
        Name in ``obsm`` by output.
    fingerprint
        What the result depends on.
    """
    import zarr

    with explained(path, "the finished embeddings"):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with explained(path, "the finished embeddings"):
            table.write_zarr(temporary)
            group = zarr.open_group(str(temporary), mode="r+")
            for output, name in names.items():
                if output in sink.widths:
                    _fill(_new_array(group, f"obsm/{name}", table.n_obs, sink.widths[output], sink.dtype), sink, output)
            group.attrs[FINGERPRINT] = dict(fingerprint)
            zarr.consolidate_metadata(str(temporary))
            temporary.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    group = _open(path)
    return {output: group[f"obsm/{name}"] for output, name in names.items() if output in sink.widths}


def _new_array(group: Any, name: str, n_obs: int, width: int, dtype: np.dtype[Any]) -> Any:
    make = group.create_array if hasattr(group, "create_array") else group.create_dataset  # zarr 3, zarr 2
    chunks = (max(1, min(n_obs, _ROWS)), width)
    array = make(name, shape=(n_obs, width), chunks=chunks, dtype=dtype, fill_value=float("nan"))
    array.attrs.update(_ARRAY)
    return array


def _fill(array: Any, sink: FolderSink, output: str) -> None:
    for start, block in sink.blocks(output):
        array[start : start + len(block)] = block


# --- the AnnData's own file --------------------------------------------------------------------------------------


def write_into_file(
    adata: AnnData, table: AnnData, sink: FolderSink, names: Mapping[str, str], stale: list[str]
) -> dict[str, np.ndarray]:
    """Add the embeddings to the file of an AnnData opened with ``backed="r+"``, and return them.

    They are added to a copy that takes the file's place at the end, so that the file is whole at every moment.

    Parameters
    ----------
    adata
        Its file is closed meanwhile.
    table
        What goes with the embeddings: columns of ``obs``, niche graph, record.
    sink
        The embeddings.
    names
        Name in ``obsm`` by output.
    stale
        Names in ``obsm`` of an earlier call, which go.
    """
    path = Path(str(adata.filename))
    with _closed(adata), explained(path, "a copy of the file with the embeddings in it"):
        handle = tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.parent, delete=False)  # noqa: SIM115
        handle.close()
        temporary = Path(handle.name)
        try:
            shutil.copyfile(path, temporary)
            _add(temporary, table, sink, names, stale)
            shutil.copymode(path, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return {
        output: np.concatenate([block for _, block in sink.blocks(output)]) for output in names if output in sink.widths
    }


@contextmanager
def _closed(adata: AnnData) -> Iterator[None]:
    """Close the file of a backed AnnData meanwhile; it opens its file again as before."""
    adata.file.close()
    try:
        yield
    finally:
        adata.file.open()


def _add(path: Path, table: AnnData, sink: FolderSink, names: Mapping[str, str], stale: list[str]) -> None:
    import os

    import h5py

    write = _write_elem()
    with h5py.File(path, "r+") as file:
        obsm = file["obsm"] if "obsm" in file else _new_group(file, "obsm")
        for name in (*stale, *names.values()):
            if name in obsm:
                del obsm[name]
        for output, name in names.items():
            if output in sink.widths:
                dataset = obsm.create_dataset(name, shape=(table.n_obs, sink.widths[output]), dtype=sink.dtype)
                dataset.attrs.update(_ARRAY)
                _fill(dataset, sink, output)
        columns = [str(name) for name in file["obs"].attrs["column-order"]]
        for column in table.obs.columns:
            write(file["obs"], column, table.obs[column].to_numpy())
            columns += [column] if column not in columns else []
        file["obs"].attrs["column-order"] = np.array(columns, dtype=h5py.string_dtype())
        for name, group in (("obsp", table.obsp), ("uns", table.uns)):
            target = file[name] if name in file else _new_group(file, name)
            for key, value in group.items():
                write(target, key, value)
    with path.open("rb+") as content:
        os.fsync(content.fileno())


def _new_group(file: Any, name: str) -> Any:
    group = file.create_group(name)
    group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    return group


def _write_elem() -> Any:
    try:
        from anndata.io import write_elem
    except ImportError:  # anndata before 0.11
        from anndata.experimental import write_elem
    return write_elem


def result_table(adata: AnnData, niches: AnnData | None, uns: Mapping[str, Any]) -> AnnData:
    """Return an AnnData of the spots' names with what goes with their embeddings.

    Parameters
    ----------
    adata
        The spots.
    niches
        What holds the niches, which go with the names; ``None`` leaves them out.
    uns
        What goes into ``uns["stalign"]``.
    """
    import pandas as pd
    from anndata import AnnData

    table = AnnData(obs=pd.DataFrame(index=adata.obs_names), uns={Key.UNS: dict(uns)})
    if niches is not None:
        key = str(niches.uns[Key.UNS][Key.uns.NICHE]["params"]["key_added"])
        table.obsp[Key.connectivities(key)] = niches.obsp[Key.connectivities(key)]
        for column in (Key.niche_n_spots(key), Key.niche_in_image(key)):
            if column in niches.obs:
                table.obs[column] = niches.obs[column].to_numpy()
    return table
