"""Many bins from a large file: memory, time per bin, and what is read from the disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import anndata as ad

import stalign as sta
from stalign import models
from tests.benchmarks.measure import isolated, peak_rss, seconds
from tests.benchmarks.rows import Row, at_most
from tests.benchmarks.sections import MPP, hd_section
from tests.benchmarks.slide_reading import counted, make_tiled_tiff, touched_bytes

SIZES = (10_000, 50_000, 100_000)
SIDE = 40_000
QUICK_SIZES = (100, 200, 400)
QUICK_SIDE = 4_096


def slide(
    data: str | None, *, quick: bool, sizes: tuple[int, int, int] | None = None, side: int | None = None
) -> list[Row]:
    """Embed 10,000, 50,000 and 100,000 bins, each in a process of its own, from files made here."""
    small, half, full = sizes or (QUICK_SIZES if quick else SIZES)
    side = side or (QUICK_SIDE if quick else SIDE)
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        image = make_image(Path(folder) / "slide.tiff", side, levels=4)
        # The few bins come first and last; the faster time counts, to the disadvantage of the many.
        for n in (small, half, full, small):
            result = _in_child(Path(folder), image, n, side, quick=quick)
            if n not in found or result["seconds"] < found[n]["seconds"]:
                found[n] = result
        arguments = {"image": str(image), "n": half, "side": side}
        read = bytes_read(**arguments) if quick else isolated("slides:bytes_read", **arguments)
        image.unlink()
        flat = _in_child(Path(folder), make_image(Path(folder) / "flat.tiff", side, levels=1), half, side, quick=quick)
    return [*_rows(found, (small, half, full), side), _bytes_row(read, half), *_flat_rows(flat, found[half], half)]


def make_image(path: Path, side: int, *, levels: int) -> Path:
    make_tiled_tiff(path, side, levels=levels)
    print(f"  made {side:,} × {side:,} px in {levels} levels, {path.stat().st_size / 1e9:.2f} GB", flush=True)
    return path


def _in_child(folder: Path, image: Path, n: int, side: int, *, quick: bool) -> dict[str, float]:
    # A folder of its own: finished embeddings beside the file would be taken as they are.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        section = Path(own) / "section.h5ad"
        hd_section(n, side).write_h5ad(section)
        arguments = {"section": str(section), "image": str(image)}
        result = embed_file(**arguments) if quick else isolated("slides:embed_file", **arguments)
    print(f"  {n:,} bins: {result['seconds']:.1f} s, {result['peak']:.2f} GB", flush=True)
    return result


def _rows(found: dict[int, dict[str, Any]], sizes: tuple[int, int, int], side: int) -> list[Row]:
    small, half, full = sizes
    how = (
        f"`stalign-mini`, {side:,} × {side:,} px of JPEG tiles at 0.25 µm in 4 levels, 8-µm bins in pieces all over "
        f"it, 18,000 genes, 200 molecules a bin; `backed='r'`, embeddings in a zarr store, default settings; "
        f"{found[full]['before']:.2f} GB before the call"
    )
    per_bin = {n: result["seconds"] / n * 1e3 for n, result in found.items()}
    memory = {n: result["peak"] for n, result in found.items()}
    return [
        at_most(f"memory while embedding {full:,} bins", memory[full], 3, "GB", how),
        at_most(
            f"the same by that for {half:,} bins",
            memory[full] / memory[half],
            1.1,
            "×",
            f"{memory[half]:.2f} GB for {half:,}, {memory[small]:.2f} GB for {small:,}",
        ),
        at_most(
            f"time per bin with {full:,} bins by that with {small:,}",
            per_bin[full] / per_bin[small],
            1.1,
            "×",
            ", ".join(f"{n:,}: {value:.3g} ms" for n, value in sorted(per_bin.items())) + "; the whole call",
        ),
    ]


def _flat_rows(flat: dict[str, Any], levels: dict[str, Any], n: int) -> list[Row]:
    return [
        at_most(f"memory with {n:,} bins and no levels in the file", flat["peak"], 3, "GB", "the rest as above"),
        Row(
            f"time with {n:,} bins and no levels in the file by that with levels",
            flat["seconds"] / levels["seconds"],
            "×",
            f"{flat['seconds'] / n * 1e3:.3g} ms per bin: every tile under the tissue is decoded at full resolution",
        ),
    ]


def _bytes_row(read: dict[str, float], n: int) -> Row:
    how = (
        f"image side of {n:,} bins: {read['read'] / 1e6:.1f} MB read by the process, {read['tiles'] / 1e6:.1f} MB of "
        f"them tiles; {read['touched'] / 1e6:.1f} MB in the {read['n_touched']:,.0f} tiles touched (file's tables)"
    )
    return at_most(
        "bytes read from the TIFF by bytes of the tiles touched", read["read"] / read["touched"], 1.3, "×", how
    )


def bytes_of_process() -> int | None:
    """Bytes that this process has read from files so far, where the system says so."""
    counters = Path("/proc/self/io")
    if not counters.is_file():
        return None
    return int(dict(line.split(": ") for line in counters.read_text(encoding="utf-8").splitlines())["rchar"])


def bytes_read(image: str, n: int, side: int) -> dict[str, float]:
    """Embed the image side of bins whose counts are not read."""
    section = hd_section(n, side, n_genes=10)
    model = models.load("stalign-mini")
    options: dict[str, Any] = {"model": model, "image": image, "modalities": ("image",), "copy": True}
    sta.tl.embed(section[:2].copy(), **options)  # what is imported on the way is read now
    with counted() as opened:
        before = bytes_of_process()
        sta.tl.embed(section, **options)
        after = bytes_of_process()
    of_tiles = sum(file.counters.bytes_read for file in opened)
    whole = of_tiles if before is None or after is None else max(after - before, of_tiles)
    geometry = model.geometry
    sides = ((geometry.spot_um, geometry.spot_pixels), (geometry.niche_um, geometry.niche_pixels))
    touched, n_touched = touched_bytes(image, section.obsm["spatial"], [(um / MPP, pixels) for um, pixels in sides])
    return {"read": whole, "tiles": of_tiles, "touched": touched, "n_touched": n_touched}


def embed_file(section: str, image: str) -> dict[str, float]:
    """Embed a file and say what it took."""
    adata = ad.read_h5ad(section, backed="r")
    model = models.load("stalign-mini")
    before = peak_rss()
    elapsed = seconds(lambda: sta.tl.embed(adata, model=model, image=image))
    return {"seconds": elapsed, "peak": peak_rss(), "before": before}
