"""What is installed, what works, and what to do about the rest."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

_REQUIRED = (
    "anndata",
    "numpy",
    "scipy",
    "pandas",
    "scanpy",
    "squidpy",
    "scikit-learn",
    "torch",
    "timm",
    "safetensors",
    "tifffile",
    "imagecodecs",
    "zarr",
)
# Packages of the extras, and what they are for.
_OPTIONAL = {
    "lightning": ("train", "pretraining"),
    "huggingface-hub": ("hub", "models from the Hub"),
    "openslide-python": ("wsi", "scanners' formats"),
    "leidenalg": ("leiden", "Leiden domains"),
    "distributed": ("dask", "many slides on a cluster"),
    "spatialdata-io": ("spatialdata", "instruments' output as SpatialData"),
}
# One codec each that TIFFs of microscopes use; those of the second line keep only nearly the same pixels.
_EXACT_CODECS = ("deflate", "lzw", "zstd")
_LOSSY_CODECS = ("jpeg", "jpeg2000")
_LOSSY_ERROR = 8.0
# What a user may set without writing Python.
_VARIABLES = ("STALIGN_CACHE_DIR", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
# What a broken installation raises; a check that fails is a line of the report, not the end of it.
_FAILURES = (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


class _CheckError(RuntimeError):
    """A check that did not pass."""


def examine(say: Callable[[str], Any]) -> bool:
    """Run every check and return whether all that matter passed."""
    checks: tuple[tuple[str, Callable[[], list[str]]], ...] = (
        ("system", _system),
        ("packages", _packages),
        ("name", _name),
        ("devices", _devices),
        ("settings", _settings),
        ("image readers", _image_readers),
        ("cache folder", _cache),
        ("models", _models),
        ("self-test", _self_test),
    )
    failed = []
    for name, check in checks:
        try:
            lines, mark = check(), "ok  "
        except _FAILURES as error:
            lines, mark = (
                [f"{type(error).__name__}: {error}" if not isinstance(error, _CheckError) else str(error)],
                "FAIL",
            )
            failed.append(name)
        for number, line in enumerate(lines):
            say(f"{mark if number == 0 else '    '} {name if number == 0 else '':<14} {line}".rstrip())
    say("Everything works." if not failed else f"Failed: {', '.join(failed)}.")
    return not failed


def _system() -> list[str]:
    from stalign import __version__

    return [
        f"stalign {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} CPUs"
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[str]:
    versions = {package: _version(package) for package in _REQUIRED}
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        raise _CheckError(f"missing: {', '.join(missing)}. Install them: pip install {' '.join(missing)}")
    lines = [", ".join(f"{package} {version}" for package, version in versions.items())]
    found = {package: _version(package) for package in _OPTIONAL}
    there = [f"{package} {version}" for package, version in found.items() if version]
    if there:
        lines.append(f"extras: {', '.join(there)}")
    for package, (extra, purpose) in _OPTIONAL.items():
        if not found[package]:
            lines.append(f"{package} is not there, for {purpose}: pip install 'stalign[{extra}]'")
    return lines


def _name() -> list[str]:
    """The other STalign (JEFworks-Lab) shares the name to pip, and the folder on case-insensitive disks."""
    here = Path(__file__).parents[1]
    if util.find_spec("STalign") is not None:
        raise _CheckError(
            "a package `STalign` (another method, by JEFworks-Lab) is importable here, too. The two collide: keep them "
            "in separate environments."
        )
    return [f"stalign is imported from {here}; no package `STalign` beside it"]


def _devices() -> list[str]:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        lines = [f"cuda:{i} {card.name}, {card.total_memory / 2**30:.0f} GiB" for i, card in enumerate(cards)]
    else:
        lines = ["no CUDA device" + ("" if torch.version.cuda else " (this torch was built without CUDA)")]
    if torch.backends.mps.is_available():
        lines.append("mps")
    return [*lines, f"cpu, {torch.get_num_threads()} threads"]


def _settings() -> list[str]:
    """What applies where an argument is left out, and the environment that changes it."""
    from stalign import settings

    names = ("device", "amp", "batch_size", "num_workers", "seed")
    lines = [", ".join(f"{name} {_or_automatic(getattr(settings, name))}" for name in names)]
    given = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return [*lines, *([f"from the environment: {', '.join(given)}"] if given else [])]


def _or_automatic(value: Any) -> str:
    return "automatic" if value is None else str(value)


def _image_readers() -> list[str]:
    """Write small pictures in every way that matters and read them back."""
    import tempfile

    import numpy as np

    picture = np.zeros((64, 96, 3), dtype=np.uint8)
    picture[:32, 48:] = (200, 40, 120)
    with tempfile.TemporaryDirectory(prefix="stalign-doctor-") as folder:
        for codec in (*_EXACT_CODECS, *_LOSSY_CODECS):
            _check_tiff(Path(folder), picture, codec)
        _check_zarr(Path(folder), picture)
        _check_png(Path(folder), picture)
    codecs = ", ".join((*_EXACT_CODECS, *_LOSSY_CODECS))
    return [f"tiled TIFF ({codecs}), zarr, PNG, arrays", _openslide()]


def _check_tiff(folder: Path, picture: Any, codec: str) -> None:
    import tifffile

    path = folder / f"{codec}.tif"
    # Tiles of JPEG must be multiples of 16 pixels; 32 suits all.
    tifffile.imwrite(path, picture, tile=(32, 32), compression=codec, photometric="rgb")
    _check_pixels(path, picture, f"a TIFF compressed with {codec}", exact=codec in _EXACT_CODECS)


def _check_zarr(folder: Path, picture: Any) -> None:
    import zarr

    array = zarr.open(str(folder / "picture.zarr"), mode="w", shape=picture.shape, chunks=(32, 32, 3), dtype="uint8")
    array[:] = picture
    _check_pixels(folder / "picture.zarr", picture, "a zarr array")


def _check_png(folder: Path, picture: Any) -> None:
    from PIL import Image

    Image.fromarray(picture).save(folder / "picture.png")
    _check_pixels(folder / "picture.png", picture, "a PNG")


def _check_pixels(path: Path, picture: Any, what: str, *, exact: bool = True) -> None:
    """Compare what is read back with what was written."""
    import numpy as np

    from stalign.slide import open_image

    with open_image(path) as image:
        read = image.read_region(0, 0, 0, *picture.shape[:2])
    error = float(np.abs(read.astype(np.float64) - picture).mean())
    if error > (0.0 if exact else _LOSSY_ERROR):
        raise _CheckError(f"{what} came back with other pixels than were written (mean difference {error:.1f} of 255).")


def _openslide() -> str:
    """OpenSlide is an extra: one that is installed but does not load is said, and fails nothing."""
    if not _version("openslide-python"):
        return "no OpenSlide (only needed for vendors' formats)"
    try:
        import openslide
    except (ImportError, OSError) as error:
        return f"OpenSlide is installed but does not load: {error} (pip install 'stalign[wsi]' brings the library)"
    return f"OpenSlide {openslide.__library_version__} (openslide-python {openslide.__version__})"


def _cache() -> list[str]:
    from stalign import settings

    folder = settings.cache_dir
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    if existing is None or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise _CheckError(f"{folder} cannot be written. Set the variable STALIGN_CACHE_DIR or `settings.cache_dir`.")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return [f"{folder}, {size / 1e6:.1f} MB"]


def _models() -> list[str]:
    from stalign import models

    names = models.available().models
    if not names:
        raise _CheckError("no model came with the package: the installation is incomplete. Install it again.")
    lines = []
    for name in names:
        model = models.load(name)
        n_weights = sum(parameter.numel() for parameter in model.parameters())
        lines.append(
            f"{name}: {n_weights / 1e6:.1f} M weights, {len(model.genes):,} genes, SHA-256 {model.provenance.sha256}"
        )
    return lines


def _self_test() -> list[str]:
    """Embed a small generated slide twice, in other batches: the result must be finite and the same."""
    import warnings

    import numpy as np

    import stalign as sta
    from stalign._keys import Key

    before = sta.settings.verbosity
    sta.settings.verbosity = "WARNING"
    start = time.perf_counter()
    try:
        slide = sta.datasets.synthetic_visium(n_rows=12, n_cols=12)
        results = []
        with warnings.catch_warnings():
            # The generated slide has few of the model's genes, which is no news here.
            warnings.filterwarnings("ignore", message="The data cover", category=UserWarning)
            for batch_size in (256, 17):
                sta.tl.embed(slide, outputs=("fused",), batch_size=batch_size, progress=False)
                results.append(slide.obsm[Key.obsm.EMBEDDING].copy())
    finally:
        sta.settings.verbosity = before
    if not np.isfinite(results[0]).all():
        raise _CheckError("the embedding of a generated slide has numbers that are not finite.")
    if not np.allclose(results[0], results[1], atol=1e-3):
        raise _CheckError("the embedding of a generated slide depends on the batch size.")
    device = slide.uns[Key.UNS][Key.uns.EMBED]["device"]
    return [
        f"embedded {slide.n_obs} spots of a synthetic slide twice on {device} in {time.perf_counter() - start:.1f} s"
    ]
