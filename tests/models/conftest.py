from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from stalign import models
from stalign.models import (
    BranchConfig,
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    PatchConfig,
    PredictionConfig,
    TokenConfig,
)

GENES = ("CD3E", "EPCAM", "ERBB2", "KRT8", "MS4A1", "PTPRC")


def _value(key: str, number: int, shape: tuple[int, ...], base: int) -> torch.Tensor:
    """One tensor of the recipe that fills large reference weights; it is described beside the fixtures."""
    numel = int(np.prod(shape))
    u = np.random.RandomState(base + number).random_sample(numel)
    s = 2 * u - 1
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_mean"):
        values = 0.2 * s
    elif key.endswith("running_var"):
        values = 0.5 + u
    elif key.endswith("gamma"):
        values = 0.1 + 0.2 * u
    elif key.endswith(("bias", "cls_token", "pos_embed")):
        values = 0.1 * s
    elif len(shape) == 1:
        values = 0.8 + 0.4 * u
    else:
        values = np.sqrt(3 / (numel / shape[0])) * s
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


@pytest.fixture(scope="session")
def fill() -> Callable[[Mapping[str, tuple[int, ...]], int], dict[str, torch.Tensor]]:
    return lambda shapes, base: {key: _value(key, k, shapes[key], base) for k, key in enumerate(sorted(shapes))}


@pytest.fixture(scope="session")
def read_shapes() -> Callable[[str], dict[str, tuple[int, ...]]]:
    def read(text: str) -> dict[str, tuple[int, ...]]:
        rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
        return {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape, *_ in rows}

    return read


@pytest.fixture(scope="session")
def genes() -> tuple[str, ...]:
    return GENES


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    image = BranchConfig("test_resnet", tokens=TokenConfig("linear"))
    gene = BranchConfig("mlp", {"hidden": [12], "dim": 8}, TokenConfig("linear"))
    return ModelConfig(
        name="tiny",
        n_neighbors=6,
        spot_patch=PatchConfig(um=100.0, pixels=32),
        niche_patch=PatchConfig(um=300.0, pixels=32),
        spot_image=image,
        spot_gene=gene,
        niche_image=image,
        niche_gene=gene,
        n_tokens=3,
        width=16,
        fusion=FusionConfig(heads=2, head_dim=4, hidden=8, dropout=0.1),
        heads=HeadsConfig(hidden=10, out=6),
        prediction=PredictionConfig(n_genes=4),
    )


@pytest.fixture
def tiny(tiny_config: ModelConfig) -> models.STAlign:
    torch.manual_seed(0)
    return models.STAlign(tiny_config, GENES).eval()


@pytest.fixture(scope="session")
def tiny_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "spot_image": torch.randn(7, 3, 32, 32, generator=generator),
        "niche_image": torch.randn(7, 3, 32, 32, generator=generator),
        "spot_gene": torch.randn(7, len(GENES), generator=generator),
        "niche_gene": torch.randn(7, len(GENES), generator=generator),
    }
