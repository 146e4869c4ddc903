"""Any image model of timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stalign.models.encoders._base import ImageEncoder


class TimmEncoder(ImageEncoder):
    """An image model of timm without its classifier.

    Parameters
    ----------
    model
        Its name in timm.
    size
        Side in pixels that patches are resampled to. ``None``: as they come, or the model's own size where it has a
        fixed one.
    mean, std
        Colour normalisation; ``None`` for that of the model's pretraining.
    model_args
        Further arguments of ``timm.create_model``.
    """

    def __init__(
        self,
        *,
        model: str,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        import timm

        # The weights never come from here: a checkpoint or `load_image_encoder` fills them in.
        try:
            if ":" in model:
                raise RuntimeError("names with a colon are fetched from the network")
            network = timm.create_model(model, pretrained=False, num_classes=0, **dict(model_args or {}))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"timm cannot make {model!r} with {dict(model_args or {})}: {error}.") from error
        data = network.pretrained_cfg
        if size is None and data.get("fixed_input_size") and not (model_args or {}).get("dynamic_img_size"):
            size = int((model_args or {}).get("img_size", data["input_size"][-1]))
        super().__init__(
            mean=data["mean"] if mean is None else mean, std=data["std"] if std is None else std, size=size
        )
        self.model_name = model
        self.network = network
        # Some families widen the features once more after pooling.
        self.dim = int(getattr(network, "head_hidden_size", None) or network.num_features)

    @property
    def backbone(self) -> nn.Module:
        """The network of timm."""
        return self.network

    def convert(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Drop the classifier, which pretrained files of timm hold and an encoder does not have."""
        classifier = self.network.pretrained_cfg.get("classifier") or ()
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        own = set(self.network.state_dict())
        return {
            key: value
            for key, value in state.items()
            if key in own or not any(key.startswith(f"{name}.") for name in names)
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, height, width) to (n, dim)."""
        return self.network(images)
