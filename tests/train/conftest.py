from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from stalign.train import PretrainConfig, Section
from stalign.train._config import apply_changes

GENES = tuple(f"G{i}" for i in range(60))


def make_section(name: str, *, n_spots: int = 48, image: bool = True, seed: int = 0) -> Section:
    """A strip of tissue: the left half expresses the first genes and is dark, the right half the last and is bright."""
    rng = np.random.default_rng(seed)
    right = np.arange(n_spots) >= n_spots // 2
    rate = np.where((np.arange(len(GENES)) < 30)[None, :] == right[:, None], 0.3, 3.0)
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    near = np.abs(np.subtract.outer(np.arange(n_spots), np.arange(n_spots))) <= 2
    graph = sp.csr_matrix(near / near.sum(axis=1, keepdims=True), dtype=np.float32)
    if not image:
        return Section(name=name, patient=name, counts=counts, connectivities=graph)
    shade = np.where(right, 190, 90)[:, None, None, None] + rng.integers(-10, 10, (n_spots, 16, 16, 3))
    patches = shade.astype(np.uint8)
    colour = (np.full(3, 0.55, np.float32), np.full(3, 0.2, np.float32))
    return Section(
        name=name,
        patient=name,
        counts=counts,
        connectivities=graph,
        spot_image=patches,
        niche_image=patches,
        colour=colour,
    )


@pytest.fixture
def sections() -> list[Section]:
    return [make_section("a", seed=1), make_section("b", seed=2), make_section("c", image=False, seed=3)]


def tiny(out: str, *changes: str) -> PretrainConfig:
    """A run of six steps of a network of some thousand parameters, with ``"key=value"`` changed."""
    image = {"encoder": "timm", "args": {"model": "resnet10t", "model_args": {"channels": [8, 8, 8, 8]}}}
    data = {
        "out": out,
        "seed": 3,
        "data": {"root": ".", "train": ["*.h5ad"]},
        "network": {
            "name": "tiny",
            "changes": {
                "n_tokens": 2,
                "width": 16,
                "spot_patch": {"pixels": 16},
                "niche_patch": {"pixels": 16},
                "spot_image": image,
                "niche_image": image,
                "spot_gene": {"args": {"dim": 16, "hidden": 16}},
                "niche_gene": {"args": {"dim": 16, "hidden": 16}},
                "fusion": {"heads": 2, "head_dim": 8, "hidden": 8},
                "heads": {"hidden": 16, "out": 16},
            },
        },
        "objective": {"structure": 1.0, "rotated": 0.5, "n_clusters": 2},
        "optimiser": {"steps": 6, "batch_size": 24, "warmup": 2, "validate_every": 3},
        "prediction": {"n_genes": 10, "penalties": [1.0, 10.0]},
    }
    return PretrainConfig.from_dict(apply_changes(data, changes))


@pytest.fixture
def tiny_config(tmp_path) -> PretrainConfig:
    return tiny(str(tmp_path / "run"))
