"""Vision transformers of computational pathology: UNI and its relatives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from stalign._validate import check_choice
from stalign.models.encoders._base import IMAGENET_MEAN, IMAGENET_STD, ImageEncoder

Front = Literal["imagenet", "published"]
Pool = Literal["cls", "cls+mean"]
Layout = Literal["timm", "dinov2-hf"]
Mlp = Literal["gelu", "swiglu"]


class TrainableFront(nn.Module):
    """What ST-Align's authors put before UNI: BatchNorm over RGB, adaptive average pool, a 3 × 3 convolution.

    UNI then does not see the ImageNet-normalised pixels it was trained on, and its features cannot be computed ahead.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, kernel_size=3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, height, width) to (n, 3, size, size)."""
        return self.conv(nn.functional.adaptive_avg_pool2d(self.norm(images), self.size))


class ViT(ImageEncoder):
    """A vision transformer in the layout that UNI, UNI 2, Virchow 2, H-optimus-0 and Phikon v2 share.

    Parameters
    ----------
    img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, norm_eps, init_values, reg_tokens, no_embed_class
        As in timm's ``VisionTransformer``.
    mlp
        ``"gelu"``, or ``"swiglu"`` with its two gates in one matrix.
    pool
        ``"cls"``: the class token after the final norm. ``"cls+mean"``: beside it the mean of the patch tokens.
    front
        ``"imagenet"``: fixed, pixels are normalised with ``mean`` and ``std``. ``"published"``: the trainable front
        of ST-Align's authors.
    layout
        Names in the pretrained file: timm's, or those of the DINOv2 models of ``transformers``.
    size
        Side in pixels that patches are resampled to, a multiple of ``patch_size``; ``None`` is ``img_size``, which the
        weights were trained at. At another size the position embedding is resampled (bicubic, antialiased).
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        mlp: Mlp = "gelu",
        norm_eps: float = 1e-6,
        init_values: float = 1e-5,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        pool: Pool = "cls",
        front: Front = "imagenet",
        layout: Layout = "timm",
        size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        check_choice("front", front, get_args(Front))
        check_choice("pool", pool, get_args(Pool))
        check_choice("layout", layout, get_args(Layout))
        check_choice("mlp", mlp, get_args(Mlp))
        size = img_size if size is None else size
        if size % patch_size:
            raise ValueError(f"size must be a multiple of patch_size ({patch_size}), got {size}.")
        super().__init__(mean=mean, std=std, size=None if front == "published" else size)
        from functools import partial

        from timm.layers import SwiGLUPacked
        from timm.models.vision_transformer import VisionTransformer

        swiglu = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if mlp == "swiglu" else {}
        self.front = TrainableFront(size) if front == "published" else nn.Identity()
        self.vit = VisionTransformer(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            init_values=init_values,
            reg_tokens=reg_tokens,
            no_embed_class=no_embed_class,
            dynamic_img_size=True,
            num_classes=0,
            **swiglu,
        )
        self.patch_size = patch_size
        self.pool = pool
        self.layout = layout
        self.n_prefix = 1 + reg_tokens
        self.dim = embed_dim * (2 if pool == "cls+mean" else 1)

    def frozen_modules(self) -> Iterator[nn.Module]:
        """Yield the transformer; a trainable front stays trainable."""
        yield self.vit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, height, width), sides multiples of the patch size behind the front, to (n, dim)."""
        images = self.front(images)
        if any(side % self.patch_size for side in images.shape[-2:]):
            raise ValueError(
                f"Images must have sides that are multiples of {self.patch_size} px, got {tuple(images.shape[-2:])}. "
                "`preprocess` resamples patches to the right size."
            )
        tokens = self.vit.forward_features(images)
        if self.pool == "cls":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.n_prefix :].mean(dim=1)], dim=-1)

    @property
    def backbone(self) -> nn.Module:
        """The transformer, without what stands before it."""
        return self.vit

    def convert(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the keys of a pretrained file to those of :attr:`vit`."""
        return _from_dinov2(state) if self.layout == "dinov2-hf" else dict(state)


_DINOV2_NAMES = (
    (r"^(?:dinov2\.)?embeddings\.cls_token$", "cls_token"),
    (r"^(?:dinov2\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(?:dinov2\.)?embeddings\.patch_embeddings\.projection\.(weight|bias)$", r"patch_embed.proj.\1"),
    (r"^(?:dinov2\.)?layernorm\.(weight|bias)$", r"norm.\1"),
    (r"^(?:dinov2\.)?encoder\.layer\.(\d+)\.(norm[12]\.\w+|mlp\.fc[12]\.\w+)$", r"blocks.\1.\2"),
    (r"^(?:dinov2\.)?encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^(?:dinov2\.)?encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)$", r"blocks.\1.attn.proj.\2"),
    (r"^(?:dinov2\.)?encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)$", r"blocks.\1.attn.\2.\3"),
)


def _from_dinov2(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of ``transformers``' DINOv2 → timm's; query, key and value become one matrix."""
    if "pos_embed" in state:
        return dict(state)
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key.endswith("embeddings.mask_token"):
            continue  # used in pretraining only
        for pattern, name in _DINOV2_NAMES:
            new, hits = re.subn(pattern, name, key)
            if hits:
                break
        renamed[new if hits else key] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            renamed[key.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed
