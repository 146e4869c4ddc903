"""UNI inside ``tl.embed`` on a GPU, against what the same GPU reaches in a bare matrix product."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import stalign as sta
from stalign import models
from tests.benchmarks.embedding import Pair
from tests.benchmarks.measure import alternate, seconds
from tests.benchmarks.rows import Row, at_least, left_open
from tests.benchmarks.sections import hd_section
from tests.benchmarks.slide_reading import make_tiled_tiff
from tests.benchmarks.training import TINY

SHARE = "UNI's bf16 arithmetic inside `tl.embed` by the measured ceiling of a matrix product"
AGAINST_BARE = "spots per second of `tl.embed` with UNI on a GPU by those of its network on tensors in its memory"


def gpu(data: str | None, *, quick: bool) -> list[Row]:
    """Both lines from the same calls."""
    if not quick and not torch.cuda.is_available():
        why = "no GPU was at hand"
        return [left_open(SHARE, "≥ 0.45", why), left_open(AGAINST_BARE, "≥ 0.85 ×", why)]
    device = "cpu" if quick else "cuda:0"
    name = "a CPU" if quick else torch.cuda.get_device_name(0)
    n, side, batch = (40, 2_048, 16) if quick else (16_384, 8_192, 256)
    ceiling = matrix_ceiling(device, 64 if quick else 8_192)
    config = models.config("paper")
    model = models.STAlign(config.updated(TINY) if quick else config)
    with tempfile.TemporaryDirectory() as folder:
        section = hd_section(n, side, n_genes=100)
        image = make_tiled_tiff(Path(folder) / "slide.tiff", side)
        sta.settings.verbosity = "ERROR"  # random weights are meant here
        pair = Pair(
            section, model, image=image, modalities=("image",), outputs=("image",), device=device, amp="bf16",
            batch_size=batch,
        )  # fmt: skip
        times = alternate({"embed": pair.embed, "bare": pair.bare}, repeats=1 if quick else 3)
    sta.settings.verbosity = "WARNING"
    flops = vit_flops(model.encoder("niche_image"))
    reached = n / times["embed"] * flops / 1e12
    how = (
        f"{name}: {n:,} bins, 200-µm niches from a tiled JPEG at 0.25 µm, batch {batch}, bf16, random weights; "
        f"{n / times['embed']:,.0f} spots/s × {flops / 1e9:.1f} GFLOP of the ViT alone = {reached:,.3g} TFLOP/s of "
        f"{ceiling:,.3g} (best of 20 products of 8,192 × 8,192); the whole call"
    )
    return [
        at_least(SHARE, reached / ceiling, 0.45, "", how),
        at_least(AGAINST_BARE, times["bare"] / times["embed"], 0.85, "×", f"{n / times['bare']:,.0f} spots/s bare"),
    ]


def matrix_ceiling(device: str, side: int) -> float:
    """Largest TFLOP/s of a bf16 product of two square matrices."""
    left, right = (torch.randn((side, side), device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        left @ right
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return 2 * side**3 / min(seconds(product) for _ in range(20)) / 1e12


def vit_flops(encoder: torch.nn.Module) -> float:
    """Floating-point operations of one image in a vision transformer; a multiplication and an addition are two."""
    vit = encoder.vit
    tokens, width = vit.patch_embed.num_patches + 1, vit.embed_dim
    hidden = vit.blocks[0].mlp.fc1.out_features
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width
    embedding = 2 * vit.patch_embed.num_patches * vit.patch_embed.proj.weight.numel()
    return float(len(vit.blocks) * block + embedding)
