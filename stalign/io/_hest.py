"""HEST-1k: a folder of AnnData files, whole-slide images and metadata."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import get_coordinates, listing, near
from stalign.io._files import (
    as_counts,
    contents,
    number,
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
from stalign.slide import ScaleWarning
from stalign.slide._scale import TOLERANCE
from stalign.slide._section import DIAMETER_FACTOR, PITCH_FACTOR

if TYPE_CHECKING:
    from anndata import AnnData

_SLIDE_SUFFIXES = (".tif", ".tiff")
_SPOT_UM = 55.0
"""The diameter that HEST divides by the pixel size to write ``spot_diameter_fullres``, where it names no other."""


def read_hest(
    path: str | Path,
    sample_id: str | None = None,
    *,
    library_id: str | None = None,
    source_image: str | Path | None = None,
) -> AnnData:
    """Read a sample of HEST-1k.

    The whole-slide image is referenced by its path, not loaded. The pixel size that HEST estimated from the spots is
    taken where there is one, else that embedded in the image; a warning says where the two differ.

    Parameters
    ----------
    path
        The folder with ``st/``, ``wsis/`` and ``metadata/``.
    sample_id
        Name of the sample, such as ``"TENX95"``; may be left out where the folder holds one.
    library_id
        Name of the library; ``None`` takes the sample's.
    source_image
        The full-resolution image, where it is not ``wsis/<id>.tif``.

    Returns
    -------
    AnnData of the sample's spots, with

    - ``X``: counts, CSR float32
    - ``obsm["spatial"]``: (n, 2) (x, y) = (column, row) in full-resolution pixels
    - ``uns["spatial"][library]["images"]``: HEST's small copies, ``downscaled_fullres``
    - ``uns["spatial"][library]["scalefactors"]``: theirs, ``microns_per_pixel``, and the array's ``spot_diameter_um``
      and ``spot_pitch_um`` where the metadata names them
    - ``uns["spatial"][library]["metadata"]``: the sample's metadata, ``technology`` and ``source_image_path``

    Raises
    ------
    FileNotFoundError
        If the folder is none of HEST's or has no such sample.
    ValueError
        If a file is damaged, or the sample is not named and there are several.

    Warns
    -----
    ScaleWarning
        If HEST's two pixel sizes differ by more than 2 %.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.io.read_hest("hest_data", "TENX95")  # doctest: +SKIP
    """
    folder = require_folder(path)
    sample = _find_sample(folder, sample_id)
    file = folder / "st" / f"{sample}.h5ad"
    slide = _find_slide(folder, sample, source_image)
    library = library_id or sample
    adata = _read_spots(file)
    metadata = _read_metadata(folder, sample)
    images, scalefactors = _pictures(adata)
    scalefactors = _with_scale(scalefactors, metadata, library)
    if "st_technology" in metadata:
        metadata["technology"] = str(metadata["st_technology"])
    if slide is not None:
        metadata["source_image_path"] = str(slide)
    entry = {"images": images, "scalefactors": scalefactors, "metadata": metadata}
    adata.uns[Key.uns.SPATIAL] = {library: entry}
    report(adata)
    return adata


def _find_sample(folder: Path, sample_id: str | None) -> str:
    available = sorted(file.stem for file in (folder / "st").glob("*.h5ad"))
    if not available:
        raise FileNotFoundError(
            f"'{folder}' is not a folder of HEST-1k: looked for 'st/<id>.h5ad' (and 'wsis/<id>.tif', "
            f"'metadata/<id>.json'). It holds {contents(folder)}."
        )
    if sample_id is None:
        if len(available) > 1:
            raise ValueError(f"'{folder}' holds {len(available)} samples: {listing(available)}. Pass `sample_id=...`.")
        return available[0]
    if sample_id not in available:
        raise FileNotFoundError(
            f"Sample {sample_id!r} is not in '{folder / 'st'}'. Available: {listing(available)}."
            f"{near(sample_id, available)}"
        )
    return sample_id


def _find_slide(folder: Path, sample: str, source_image: str | Path | None) -> Path | None:
    if source_image is not None:
        return require_image(source_image)
    for suffix in _SLIDE_SUFFIXES:
        slide = folder / "wsis" / f"{sample}{suffix}"
        if slide.is_file():
            return slide.resolve()
    logger.warning(
        "There is no whole-slide image '%s': the small copy in the AnnData file is used, if there is one.",
        folder / "wsis" / f"{sample}.tif",
    )
    return None


def _read_spots(file: Path) -> AnnData:
    import anndata

    with repeats_allowed(), whole(file, "an AnnData file"):
        adata = anndata.read_h5ad(file)
    if adata.X is None:
        raise ValueError(f"'{file}' has no expression matrix in X.")
    unique_spots(adata.obs_names, file)
    unique_genes(adata)
    adata.X = as_counts(adata.X)
    adata.obsm[Key.obsm.SPATIAL] = get_coordinates(adata)
    return adata


def _read_metadata(folder: Path, sample: str) -> dict[str, Any]:
    file = folder / "metadata" / f"{sample}.json"
    if not file.is_file():
        logger.warning("There is no '%s': pixel size and technology come from the other files.", file)
        return {}
    return plain(read_json(file))


def _pictures(adata: AnnData) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the small images that have pixels, and the scale factors, from HEST's only library ``"ST"``."""
    libraries = adata.uns.get(Key.uns.SPATIAL, {})
    entry: dict[str, Any] = next(iter(libraries.values()), {}) if isinstance(libraries, dict) else {}
    scalefactors = plain(entry.get("scalefactors", {}))
    images = {
        key: picture
        for key, picture in entry.get("images", {}).items()
        if getattr(picture, "ndim", 0) in (2, 3) and f"tissue_{key}_scalef" in scalefactors
    }
    return images, scalefactors


def _with_scale(scalefactors: dict[str, Any], metadata: dict[str, Any], library: str) -> dict[str, Any]:
    """Add the pixel size and what is known of the array to the scale factors."""
    estimated = number(metadata, "pixel_size_um_estimated")
    embedded = number(metadata, "pixel_size_um_embedded")
    if estimated and embedded and abs(embedded / estimated - 1) > TOLERANCE:
        warnings.warn(
            f"Library {library!r}: HEST estimated {estimated:.4g} µm per pixel from the spots, the image says "
            f"{embedded:.4g} ({abs(embedded / estimated - 1):.0%} apart). Using {estimated:.4g}; pass `mpp=...` to "
            "`stalign.pp.extract_niches` to decide otherwise.",
            ScaleWarning,
            stacklevel=3,
        )
    mpp, diameter = estimated or embedded, number(metadata, "spot_diameter")
    found: dict[str, float | None] = {
        "microns_per_pixel": mpp,
        PITCH_FACTOR: number(metadata, "inter_spot_dist"),
        DIAMETER_FACTOR: diameter or _SPOT_UM,
    }
    if mpp:
        # HEST computes this value from the pixel size: it is for drawing, and no evidence of the scale.
        found["spot_diameter_fullres"] = (diameter or _SPOT_UM) / mpp
    return {**scalefactors, **{key: value for key, value in found.items() if value is not None}}
