"""STimage-1K4M: tables of coordinates and counts beside a picture."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import check_choice, listing, near
from stalign.io._files import (
    PIXEL_COLUMNS,
    contents,
    plain,
    repeats_allowed,
    require_folder,
    unique_genes,
    unique_spots,
    whole,
)
from stalign.io._report import report

if TYPE_CHECKING:
    from anndata import AnnData

_TECHNOLOGIES = {"ST": "Spatial Transcriptomics", "Visium": "Visium", "VisiumHD": "Visium HD"}
_COORD_COLUMNS = ("yaxis", "xaxis", "r")
_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_VALUES_AT_ONCE = 4_000_000
# Ends of spot names: legacy ST spells column x row, Space Ranger's bins their size, row and column.
_ST_NAME = r"(?:^|_)(?P<array_col>\d+(?:\.\d+)?)x(?P<array_row>\d+(?:\.\d+)?)$"
_BIN_NAME = r"s_(?P<bin>\d+)um_(?P<array_row>\d+)_(?P<array_col>\d+)(?:-\d+)?$"


def read_stimage1k4m(
    path: str | Path,
    slide: str,
    *,
    technology: str | None = None,
    library_id: str | None = None,
) -> AnnData:
    """Read a slide of STimage-1K4M.

    The table of counts is streamed into a sparse matrix; the picture is referenced by its path, not loaded.
    Coordinates and spot radius are pixels of that picture. The radius gives the scale only where nothing else does
    (it is that of a theoretical spot, good to about 10 %): legacy ST and Visium HD spots have their array position in
    their names, and a full hexagonal grid in the folder ``Visium`` has its known pitch.

    Parameters
    ----------
    path
        The folder with ``ST/``, ``Visium/`` and ``VisiumHD/``, or one of these.
    slide
        Name of the slide, as in ``coord/<slide>_coord.csv``.
    technology
        ``"ST"``, ``"Visium"`` or ``"VisiumHD"``; ``None`` looks into all.
    library_id
        Name of the library; ``None`` takes the slide's.

    Returns
    -------
    AnnData of the spots that have counts and coordinates, with

    - ``X``: counts, CSR float32
    - ``obs["array_row"]``, ``["array_col"]`` where the spots' names hold them; ``["pxl_row_in_fullres"]``,
      ``["pxl_col_in_fullres"]``
    - ``obsm["spatial"]``: (n, 2) float64 (x, y) in pixels of the picture
    - ``uns["spatial"][slide]["scalefactors"]``: ``spot_diameter_fullres``, twice the radius; ``bin_size_um`` where the
      names hold it
    - ``uns["spatial"][slide]["metadata"]``: ``technology``, ``source_image_path``, and what the collection's
      ``meta/meta_all_gene*.csv`` says about the slide (``species``, ``tissue``, ``pmid``, …), where it is there

    Raises
    ------
    FileNotFoundError
        If there is no such slide.
    ValueError
        If a table is damaged, or the two tables share no spots.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.io.read_stimage1k4m("STimage-1K4M", "Human_Breast_Andersson_10142021_ST_A1")  # doctest: +SKIP
    """
    folder, technology = _find_slide(require_folder(path), slide, technology)
    coord_file, count_file = folder / "coord" / f"{slide}_coord.csv", folder / "gene_exp" / f"{slide}_count.csv"
    if not count_file.is_file():
        raise FileNotFoundError(
            f"There are coordinates of slide {slide!r}, but no counts: looked for '{count_file}'. 'gene_exp/' holds "
            f"{contents(folder / 'gene_exp')}."
        )
    positions = _read_positions(coord_file)
    counts, spots, genes = _read_counts(count_file)
    adata = _join(counts, spots, genes, positions, slide)
    scalefactors = {"spot_diameter_fullres": 2 * float(np.median(positions["r"]))}
    scalefactors.update(_add_array(adata, technology))
    metadata = {**_about(folder, slide), "technology": _TECHNOLOGIES[technology]}
    picture = _find_picture(folder, slide)
    if picture is not None:
        metadata["source_image_path"] = str(picture)
    library = library_id or slide
    adata.uns[Key.uns.SPATIAL] = {library: {"images": {}, "scalefactors": scalefactors, "metadata": metadata}}
    report(adata)
    return adata


# --- finding the files -------------------------------------------------------------------------------------------


def _find_slide(root: Path, slide: str, technology: str | None) -> tuple[Path, str]:
    """Return the folder with ``coord``, ``gene_exp`` and ``image`` that holds the slide, and its technology."""
    if technology is not None:
        check_choice("technology", technology, tuple(_TECHNOLOGIES))
    folders = {name: root / name for name in _TECHNOLOGIES if (root / name / "coord").is_dir()}
    if (root / "coord").is_dir():
        own = technology or root.resolve().name
        if own not in _TECHNOLOGIES:
            raise ValueError(
                f"The technology of '{root}' is not in its name. Pass `technology=...`, one of {list(_TECHNOLOGIES)}."
            )
        folders = {own: root}
    elif technology is not None:
        folders = {name: folder for name, folder in folders.items() if name == technology}
    if not folders:
        looked_for = ", ".join(f"'{name}/coord/'" for name in ([technology] if technology else _TECHNOLOGIES))
        raise FileNotFoundError(
            f"'{root}' is not a folder of STimage-1K4M: looked for {looked_for}. It holds {contents(root)}."
        )
    for name, folder in folders.items():
        if (folder / "coord" / f"{slide}_coord.csv").is_file():
            return folder, name
    available = sorted(
        file.name.removesuffix("_coord.csv") for folder in folders.values() for file in folder.glob("coord/*_coord.csv")
    )
    raise FileNotFoundError(
        f"Slide {slide!r} is not in {listing(f'{name}/coord' for name in folders)} of '{root}'. Available: "
        f"{listing(available)}.{near(slide, available)}"
    )


def _find_picture(folder: Path, slide: str) -> Path | None:
    for suffix in _PICTURES:
        picture = folder / "image" / f"{slide}{suffix}"
        if picture.is_file():
            return picture.resolve()
    logger.warning("There is no picture '%s'; the slide is read without.", folder / "image" / f"{slide}.png")
    return None


def _about(folder: Path, slide: str) -> dict[str, Any]:
    """Return the slide's row of the collection's table, which stands beside the folders of the technologies."""
    for file in sorted((folder.resolve().parent / "meta").glob("meta_all_gene*.csv")):
        with whole(file, "a table of slides"):
            table = pd.read_csv(file)
        rows = table.loc[table["slide"].astype(str) == slide] if "slide" in table else table.iloc[:0]
        if len(rows):
            return plain({str(name): value for name, value in rows.iloc[0].drop("slide").items()})
    return {}


# --- reading -----------------------------------------------------------------------------------------------------


def _read_positions(file: Path) -> pd.DataFrame:
    with whole(file, "a table of coordinates"):
        table = pd.read_csv(file, index_col=0)
    lacking = [name for name in _COORD_COLUMNS if name not in table]
    if lacking:
        raise ValueError(f"'{file}' lacks the columns {lacking}. It has {listing(table.columns)}.")
    table = table.loc[:, list(_COORD_COLUMNS)].set_axis(table.index.astype(str))
    with whole(file, "a table of coordinates"):
        table = table.apply(pd.to_numeric).astype(np.float64)
    if not np.isfinite(table.to_numpy()).all() or (table["r"] <= 0).any():
        raise ValueError(f"'{file}' has empty cells or radii that are not positive. Is the file complete?")
    unique_spots(table.index, file)
    return table


def _read_counts(file: Path) -> tuple[csr_matrix, pd.Index, list[str]]:
    """Stream a table of spots × genes into a sparse matrix, a few million values at a time."""
    with whole(file, "a table of counts"):
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            header, first = next(rows, []), next(rows, [])
        if len(first) < 2 or len(header) not in (len(first), len(first) - 1):
            raise ValueError(f"its header has {len(header)} names, its first row {len(first)} cells")
        # R leaves the name of the first column out, or empty.
        genes = header[len(header) - len(first) + 1 :]
        blocks, spots = [], []
        types: dict[int, Any] = {0: str, **dict.fromkeys(range(1, len(first)), np.float32)}
        step = max(1, _VALUES_AT_ONCE // len(genes))
        reader = pd.read_csv(
            file, header=None, skiprows=1, names=range(len(first)), dtype=types, chunksize=step, keep_default_na=False
        )
        with reader:
            for chunk in reader:
                blocks.append(csr_matrix(chunk.iloc[:, 1:].to_numpy()))
                spots.append(chunk.iloc[:, 0].to_numpy(dtype=str))
                if not np.isfinite(blocks[-1].data).all():
                    raise ValueError(f"it has infinite values near row {sum(map(len, spots))}")
    names = pd.Index(np.concatenate(spots))
    unique_spots(names, file)
    return vstack(blocks, format="csr"), names, genes


def _join(counts: csr_matrix, spots: pd.Index, genes: list[str], positions: pd.DataFrame, slide: str) -> AnnData:
    """Put counts and coordinates together by the spots' names, in the order of the counts."""
    from anndata import AnnData

    rows = positions.index.get_indexer(spots)
    both = rows >= 0
    if not both.any():
        raise ValueError(
            f"Counts and coordinates of slide {slide!r} share no spots: {listing(spots, 3)} and "
            f"{listing(positions.index, 3)}."
        )
    n_bare, n_empty = int((~both).sum()), len(positions) - int(both.sum())
    if n_bare or n_empty:
        logger.warning(
            "Slide '%s': left out %d spots with counts but no coordinates, and %d with coordinates but no counts.",
            slide,
            n_bare,
            n_empty,
        )
        counts, spots, positions = counts[np.flatnonzero(both)], spots[both], positions.iloc[rows[both]]
    else:
        positions = positions.iloc[rows]
    xy = positions[["xaxis", "yaxis"]].to_numpy()
    obs = pd.DataFrame(dict(zip(PIXEL_COLUMNS, xy.T, strict=True)), index=spots)
    with repeats_allowed():
        adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(genes, dtype=str)))
    adata.obsm[Key.obsm.SPATIAL] = xy
    unique_genes(adata)
    return adata


def _add_array(adata: AnnData, technology: str) -> dict[str, float]:
    """Read array positions out of the spots' names, where all hold them; return the scale factors they give."""
    pattern = {"ST": _ST_NAME, "VisiumHD": _BIN_NAME}.get(technology)
    if pattern is None or not re.search(pattern, adata.obs_names[0]):
        return {}
    found = pd.Series(adata.obs_names).str.extract(pattern)
    bins = found.pop("bin").astype(float).unique() if "bin" in found else np.array([])
    if found.isna().any().any() or len(bins) > 1:
        return {}
    for name in (Key.obs.ARRAY_ROW, Key.obs.ARRAY_COL):
        adata.obs[name] = pd.to_numeric(found[name]).to_numpy()
    return {"bin_size_um": float(bins[0])} if len(bins) else {}
