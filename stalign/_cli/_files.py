"""Files that commands read and write."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` and rename it when the block ends well: no half-written file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path, *, overwrite: bool) -> Path:
    """Refuse to replace a file unless asked to."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Pass --overwrite to replace it, or another --out.")
    return path


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
        from stalign.io import read_visium_hd

        return read_visium_hd(path)
    if (path / "spatial").is_dir():
        from stalign.io import read_visium

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


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure and close it."""
    import matplotlib.pyplot as plt

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)


def read_markers(path: Path) -> dict[str, list[str]]:
    """Read labels and their marker genes from JSON, TOML (``label = ["GENE", ...]``) or GMT."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    suffix = path.suffix.lower()
    if suffix == ".gmt":
        from stalign.genes import read_gmt

        return {name: list(genes) for name, genes in read_gmt(path).items()}
    text = path.read_text(encoding="utf-8")
    try:
        content: Any = {".json": json.loads, ".toml": tomllib.loads}[suffix](text)
    except KeyError:
        raise ValueError(f"Markers are read from .json, .toml or .gmt, got {path.name!r}.") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not valid {suffix[1:].upper()}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path} must hold labels and their genes, such as {{"tumour": ["ERBB2", "KRT8"]}}.')
    for label, genes in content.items():
        if not isinstance(genes, list) or not all(isinstance(gene, str) for gene in genes):
            raise ValueError(f"{path}: label {label!r} must have a list of gene names, got {genes!r}.")
    return content
