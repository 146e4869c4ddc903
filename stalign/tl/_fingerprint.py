"""What an embedding depends on, in few words: the same fingerprint, the same result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stalign._keys import Key
from stalign.slide._library import niche_graph, niche_record

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.genes import GeneMatch
    from stalign.slide._library import PatchReader
    from stalign.tl._runtime import ModelIdentity


def fingerprint(
    adata: AnnData,
    light: AnnData,
    reader: PatchReader,
    *,
    identity: ModelIdentity,
    encoders: dict[str, str],
    how: Sequence[str],
    what: Sequence[str],
    raw: Any,
    match: GeneMatch | None,
    order: np.ndarray,
) -> dict[str, str]:
    """Return what an embedding depends on, by the words for it.

    Parameters
    ----------
    adata, light, reader
        The slide, its working copy with the niches, and its images.
    identity, encoders
        The model, and the SHA-256 of encoders that are not in its file.
    how
        Kind of device, precision and type of the numbers.
    what
        Modalities and outputs.
    raw, match
        Counts and the match of their genes; ``match`` is ``None`` without genes.
    order
        (n_obs,) spots in the order in which they are embedded.
    """
    import stalign
    from stalign.genes._rows import digest

    record = niche_record(light)
    graph = niche_graph(light)
    images = {name: _image(light, name, record["libraries"][name]) for name in reader.libraries}
    return {
        "the version of stalign": stalign.__version__,
        "the model": " ".join([identity.sha256, *(f"{k}={v}" for k, v in sorted(encoders.items()))]),
        "device or precision": " ".join(how),
        "modalities or outputs": " ".join(what),
        "the spots": _arrays(np.asarray(adata.obs_names, dtype=str), reader.coordinates, reader.codes, order),
        "the niches": _arrays(graph.indptr, graph.indices, graph.data, _text(record["params"])),
        "the images": _text(images) if reader.has_image.any() else "",
        "the genes": "" if match is None else _arrays(match.index),
        "the counts": "" if match is None else digest(raw),
    }


def _arrays(*arrays: Any) -> str:
    result = hashlib.sha256()
    for array in arrays:
        if isinstance(array, str):
            result.update(array.encode())
            continue
        whole = np.asarray(array)
        whole = whole.astype(np.int64) if whole.dtype.kind in "iu" else whole
        result.update(f"{whole.shape} {whole.dtype.kind}".encode())
        if whole.dtype.kind == "U":
            result.update("\n".join(whole.tolist()).encode())
        else:
            result.update(whole.tobytes())
    return result.hexdigest()


def _text(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _image(light: AnnData, library: str, entry: Any) -> str:
    """Describe a library's image: size and time of a file, the pixels of an array."""
    where = f"{entry['image']} {entry['image_height']} {entry['image_width']} {entry['image_scale']} {entry['mpp']}"
    if entry["image"] == "path":
        return f"{where} {_state(Path(str(entry['image_path'])))}"
    if entry["image"] == "uns":
        pixels = light.uns[Key.uns.SPATIAL][library]["images"][str(entry["image_key"])]
        return f"{where} {_arrays(pixels) if isinstance(pixels, np.ndarray) else repr(pixels)}"
    return where


def _state(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of what a zarr folder says about itself."""
    files = [path]
    if path.is_dir():
        inside = [file for depth in ("*", "*/*") for file in path.glob(depth)]
        files = sorted(file for file in inside if file.name.startswith((".z", "zarr")))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
