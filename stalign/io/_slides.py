"""Slides as files: what the command line and :func:`stalign.tl.embed_many` take, and how results are written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData

_MARK = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` and rename it when the block ends well: no half-written file stays.

    Names are unique, so that two machines that write the same file do not write into each other's; and they end in
    another way, so that nobody who looks for files of this kind finds them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_MARK}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Let the disk have the content before the name: a power cut would otherwise leave an empty file of that name."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def leftovers(path: Path) -> list[Path]:
    """Return temporary files of :func:`replacing` that processes which were killed left beside ``path``."""
    names = path.parent.glob(f".{path.name}.*{_MARK}") if path.parent.is_dir() else ()
    return sorted(names)


def slide_name(slide: Path) -> str:
    """Name of a slide; Space Ranger calls every result ``outs``, so its run's name is the parent's."""
    resolved = slide.resolve()
    return resolved.parent.name if resolved.name == "outs" else resolved.name.removesuffix(resolved.suffix)


def read_slide(path: Path) -> AnnData:
    """Read an ``.h5ad`` file, an AnnData ``.zarr`` folder, or a Space Ranger ``outs`` folder (Visium, Visium HD)."""
    import anndata

    if path.suffix == ".h5ad":
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        return anndata.read_h5ad(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if path.suffix == ".zarr":
        return anndata.read_zarr(path)
    if (path / "binned_outputs").is_dir():
        from stalign.io._spaceranger import read_visium_hd

        return read_visium_hd(path)
    if (path / "spatial").is_dir():
        from stalign.io._spaceranger import read_visium

        return read_visium(path)
    raise ValueError(
        f"{path} is no slide that can be read. Readable: an .h5ad file, a .zarr folder written by AnnData, a Space "
        "Ranger `outs` folder of Visium (with `spatial/`) or Visium HD (with `binned_outputs/`; bins of 8 µm are "
        "taken). Other formats: read them with `stalign.io` and write an .h5ad."
    )


def write_slide(adata: AnnData, path: Path) -> None:
    """Write an ``.h5ad`` file."""
    with replacing(path) as temporary:
        adata.write_h5ad(temporary, compression="gzip")
