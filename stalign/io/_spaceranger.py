"""Space Ranger's output: Visium and Visium HD."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import check_positive, listing
from stalign.io._files import (
    PIXEL_COLUMNS,
    as_counts,
    contents,
    plain,
    read_json,
    repeats_allowed,
    require_folder,
    require_image,
    unique_genes,
    unique_spots,
    whole,
)
from stalign.io._report import report

if TYPE_CHECKING:
    from anndata import AnnData

COUNTS_FILE = "filtered_feature_bc_matrix.h5"

_POSITIONS = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_POSITION_FILES = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
_SCALEFACTORS = "scalefactors_json.json"
_BIN_FOLDER = re.compile(r"square_(\d+)um")
_MATRIX_PARTS = {"barcodes", "data", "features", "indices", "indptr", "shape"}


def read_visium(
    path: str | Path,
    *,
    library_id: str | None = None,
    source_image: str | Path | None = None,
    counts_file: str = COUNTS_FILE,
) -> AnnData:
    """Read a Space Ranger ``outs`` folder of a Visium slide.

    Counts are read by scanpy; the result is that of :func:`squidpy.read.visium`, with the checks that a slide for
    patches needs: positions for every spot, gene names made unique, scale and image looked at. A missing hires or
    lowres picture is no error.

    Parameters
    ----------
    path
        The folder with the count matrix and ``spatial/``.
    library_id
        Name of the library; ``None`` takes that in the matrix file, else the folder's.
    source_image
        The full-resolution image that Space Ranger was given; it is referenced, not loaded.
    counts_file
        The count matrix: an HDF5 file, or a folder with ``matrix.mtx.gz``.

    Returns
    -------
    AnnData of the spots in the matrix, with

    - ``X``: counts, CSR float32; ``var["gene_ids"]``: Ensembl
    - ``obs["in_tissue"]``, ``["array_row"]``, ``["array_col"]``, ``["pxl_row_in_fullres"]``,
      ``["pxl_col_in_fullres"]``
    - ``obsm["spatial"]``: (n, 2) float64 (x, y) = (column, row) in full-resolution pixels
    - ``uns["spatial"][library]``: ``images`` (``hires``, ``lowres``, uint8 RGB), ``scalefactors``, ``metadata`` with
      ``source_image_path`` where ``source_image`` is given

    Raises
    ------
    FileNotFoundError
        If a file is missing; the message says which were looked for and what is there.
    ValueError
        If a file is damaged, or spots of the matrix have no position.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.io.read_visium("outs", source_image="tissue.tif")  # doctest: +SKIP
    """
    folder = require_folder(path)
    counts = _find_files(folder, counts_file)
    return _read_section(folder, counts, library_id, source_image, "Visium")


def read_visium_hd(
    path: str | Path,
    *,
    bin_size: int = 8,
    library_id: str | None = None,
    source_image: str | Path | None = None,
    counts_file: str = COUNTS_FILE,
) -> AnnData:
    """Read one bin size of a Space Ranger ``outs`` folder of a Visium HD slide.

    Counts are read by scanpy, positions (parquet) by pandas.

    Parameters
    ----------
    path
        The folder with ``binned_outputs/``, or that folder itself.
    bin_size
        Side of a bin in µm; Space Ranger writes 2, 8 and 16.
    library_id
        Name of the library; ``None`` takes that in the matrix file, else the folder's.
    source_image
        The full-resolution image that Space Ranger was given; it is referenced, not loaded.
    counts_file
        The count matrix: an HDF5 file, or a folder with ``matrix.mtx.gz``.

    Returns
    -------
    AnnData of the bins in the matrix, as :func:`read_visium` returns it; ``scalefactors`` hold ``bin_size_um`` and
    ``microns_per_pixel``.

    Raises
    ------
    FileNotFoundError
        If a file is missing; the message says which were looked for and what is there.
    ValueError
        If there is no such bin size, a file is damaged, or bins of the matrix have no position.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.io.read_visium_hd("outs", bin_size=16, source_image="tissue.btf")  # doctest: +SKIP
    """
    folder = _bin_folder(require_folder(path), check_positive("bin_size", bin_size, integer=True))
    counts = _find_files(folder, counts_file)
    library_id = library_id or _library_in_file(counts) or _folder_name(Path(path).expanduser())
    return _read_section(folder, counts, library_id, source_image, "Visium HD", bin_um=float(bin_size))


# --- finding the files -------------------------------------------------------------------------------------------


def _bin_folder(folder: Path, bin_size: int) -> Path:
    parent = folder / "binned_outputs" if (folder / "binned_outputs").is_dir() else folder
    found = {int(match.group(1)): item for item in parent.iterdir() if (match := _BIN_FOLDER.fullmatch(item.name))}
    if not found:
        raise FileNotFoundError(
            f"'{folder}' is not a Visium HD output: looked for 'binned_outputs/square_{bin_size:03d}um/'. It holds "
            f"{contents(folder)}."
            + (" Visium slides are read with `stalign.io.read_visium`." if (folder / "spatial").is_dir() else "")
        )
    if bin_size not in found:
        sizes = sorted(found)
        raise ValueError(
            f"No bins of {bin_size} µm in '{parent}'. Available: {sizes} µm. Pass `bin_size={sizes[-1]}`, for example."
        )
    return found[bin_size]


def _find_files(folder: Path, counts_file: str) -> Path:
    """Return the count matrix, after checking that the other files are there."""
    counts = folder / counts_file
    if not counts.exists() and counts_file == COUNTS_FILE:
        # Space Ranger writes the same matrix as a folder of text; some downloads hold only that.
        counts = folder / COUNTS_FILE.removesuffix(".h5")
    spatial = folder / "spatial"
    missing = []
    if not counts.exists():
        also = " (or the folder of the same name without '.h5')" if counts_file == COUNTS_FILE else ""
        missing.append(f"'{counts_file}'{also}")
    if not (spatial / _SCALEFACTORS).is_file():
        missing.append(f"'spatial/{_SCALEFACTORS}'")
    if not any((spatial / name).is_file() for name in _POSITION_FILES):
        missing.append("one of " + ", ".join(f"'spatial/{name}'" for name in _POSITION_FILES))
    if missing:
        raise FileNotFoundError(
            f"'{folder}' is not a complete Space Ranger output. Looked for and did not find: {'; '.join(missing)}. "
            f"It holds {contents(folder)}"
            + (f", 'spatial/' holds {contents(spatial)}" if spatial.is_dir() else "")
            + f".{_way_out(folder)}"
        )
    return counts


def _way_out(folder: Path) -> str:
    if (folder / "binned_outputs").is_dir():
        return " This is a Visium HD output: use `stalign.io.read_visium_hd`."
    if (folder / "outs").is_dir():
        return f" Pass '{folder / 'outs'}'."
    if any(folder.glob("*.h5")):
        return " Pass the name of the matrix as `counts_file=...`."
    return ""


# --- reading -----------------------------------------------------------------------------------------------------


def _read_section(
    folder: Path,
    counts: Path,
    library_id: str | None,
    source_image: str | Path | None,
    technology: str,
    bin_um: float | None = None,
) -> AnnData:
    metadata = {"technology": technology}
    if source_image is not None:
        metadata["source_image_path"] = str(require_image(source_image))
    adata = _read_counts(counts)
    unique_spots(adata.obs_names, counts)
    unique_genes(adata)
    positions = _read_positions(folder / "spatial", adata.obs_names)
    scalefactors = plain(read_json(folder / "spatial" / _SCALEFACTORS))
    if bin_um is not None:
        scalefactors.setdefault("bin_size_um", bin_um)
    for column in _POSITIONS:
        adata.obs[column] = positions[column].to_numpy()
    adata.obsm[Key.obsm.SPATIAL] = positions[list(PIXEL_COLUMNS)].to_numpy(dtype=np.float64)
    library = library_id or _library_in_file(counts) or _folder_name(folder)
    adata.uns[Key.uns.SPATIAL] = {
        library: {
            "images": _read_pictures(folder / "spatial", scalefactors),
            "scalefactors": scalefactors,
            "metadata": {**_file_metadata(counts), **metadata},
        }
    }
    report(adata)
    return adata


def _read_counts(counts: Path) -> AnnData:
    import scanpy as sc

    with repeats_allowed():
        if counts.is_dir():
            with whole(counts, "a matrix in text form"):
                adata = sc.read_10x_mtx(counts, make_unique=False)
        else:
            _check_10x(counts)
            with whole(counts, "a 10x HDF5 matrix"):
                adata = sc.read_10x_h5(counts)
    if adata.n_vars == 0 or adata.n_obs == 0:
        raise ValueError(f"'{counts}' has {adata.n_obs} spots and {adata.n_vars} features of type 'Gene Expression'.")
    adata.X = as_counts(adata.X)
    return adata


def _check_10x(file: Path) -> None:
    """Refuse a file that is cut off or is something else, before scanpy stumbles over it."""
    import h5py

    with whole(file, "a 10x HDF5 matrix"), h5py.File(file, "r") as handle:
        top = sorted(handle)
        parts = set(handle["matrix"]) if "matrix" in handle else set()
        is_legacy = any(isinstance(handle[name], h5py.Group) and "genes" in handle[name] for name in top)
    if not is_legacy and not parts >= _MATRIX_PARTS:
        lacks = f"its group 'matrix' lacks {sorted(_MATRIX_PARTS - parts)}" if parts else "it has no group 'matrix'"
        raise ValueError(
            f"'{file}' is no 10x HDF5 matrix: {lacks}; at the top it holds {listing(top)}. Pass `counts_file=...`, the "
            "'…feature_bc_matrix.h5' that Space Ranger wrote."
        )


def _attributes(counts: Path) -> dict[str, Any]:
    if counts.is_dir():
        return {}
    import h5py

    with whole(counts, "a 10x HDF5 matrix"), h5py.File(counts, "r") as handle:
        return dict(handle.attrs)


def _file_metadata(counts: Path) -> dict[str, Any]:
    attributes = _attributes(counts)
    return plain({key: attributes[key] for key in ("chemistry_description", "software_version") if key in attributes})


def _library_in_file(counts: Path) -> str | None:
    names = np.atleast_1d(_attributes(counts).get("library_ids", np.array([])))
    if len(names) == 0:
        return None
    return names[0].decode("utf-8") if isinstance(names[0], bytes) else str(names[0])


def _folder_name(folder: Path) -> str:
    """Name of the sample: that of the folder above ``outs``."""
    folder = folder.resolve()
    while folder.name in ("outs", "binned_outputs") and folder.parent != folder:
        folder = folder.parent
    return folder.name or "library"


def _read_positions(spatial: Path, barcodes: pd.Index) -> pd.DataFrame:
    """Return the positions of the spots in the matrix, in its order."""
    file = next(spatial / name for name in _POSITION_FILES if (spatial / name).is_file())
    table = _read_parquet(file) if file.suffix == ".parquet" else _read_csv(file)
    unique_spots(table.index, file)
    rows = table.index.get_indexer(barcodes)
    if (rows < 0).any():
        lost = barcodes[rows < 0]
        raise ValueError(
            f"{len(lost)} of {len(barcodes)} spots of the count matrix have no position in '{file}': "
            f"{listing(lost, 3)}; it names {listing(table.index, 3)}. Do both files belong to the same slide?"
        )
    return table.iloc[rows]


def _read_parquet(file: Path) -> pd.DataFrame:
    with whole(file, "a parquet table of positions"):
        table = pd.read_parquet(file)
    if "barcode" in table:
        table = table.set_index("barcode")
    lacking = [name for name in _POSITIONS if name not in table]
    if lacking:
        raise ValueError(f"'{file}' lacks the columns {lacking}. It has {listing(table.columns)}.")
    return table.set_axis(table.index.astype(str))


def _read_csv(file: Path) -> pd.DataFrame:
    """Read the table with or without a header: Space Ranger has written both since version 2."""
    with whole(file, "a table of positions"):
        with file.open(encoding="utf-8") as lines:
            first = lines.readline().strip().split(",")
        has_header = first[0].strip('"').lower() == "barcode"
        table = pd.read_csv(file, header=0 if has_header else None, index_col=0, dtype={0: str})
    if table.shape[1] != len(_POSITIONS):
        raise ValueError(
            f"'{file}' has {table.shape[1] + 1} columns; expected barcode, {', '.join(_POSITIONS)}. Is it complete?"
        )
    if not has_header:
        table.columns = pd.Index(_POSITIONS)
    elif set(table.columns) != set(_POSITIONS):
        raise ValueError(f"'{file}' has the columns {listing(table.columns)}; expected {listing(_POSITIONS)}.")
    table = table.set_axis(table.index.astype(str))
    with whole(file, "a table of positions"):
        table = table.apply(pd.to_numeric)
    if table.isna().any().any():
        raise ValueError(
            f"'{file}' has empty cells, first in row {int(table.isna().any(axis=1).argmax())}. Is it whole?"
        )
    return table


def _read_pictures(spatial: Path, scalefactors: dict[str, Any]) -> dict[str, np.ndarray]:
    from stalign.slide import open_image

    pictures = {}
    for key in ("hires", "lowres"):
        file = spatial / f"tissue_{key}_image.png"
        if not file.is_file():
            continue
        if f"tissue_{key}_scalef" not in scalefactors:
            logger.warning("'%s' is left out: the scale factors have no 'tissue_%s_scalef'.", file.name, key)
            continue
        with whole(file, "an image"), open_image(file) as image:
            pictures[key] = image.read_region(0, 0, 0, image.height, image.width)
    return pictures
