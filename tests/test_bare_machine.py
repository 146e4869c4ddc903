"""``models``, ``slide``, ``genes`` and ``train`` at work where scanpy, squidpy and scikit-learn are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import stalign

BLOCK = """
import sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    # As if they were not installed: libraries that ask for them are told so, and imports fail.
    names = {"scanpy", "squidpy", "sklearn", "spatialdata", "dask", "skimage"}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in cls.names else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Absent
try:
    import scanpy
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the import was not blocked")
"""

EMBED = """
import numpy as np, scipy.sparse as sp, tifffile, torch
from stalign import genes, models, slide

rng = np.random.default_rng(0)
picture = rng.integers(0, 255, (600, 800, 3), dtype=np.uint8)
tifffile.imwrite("he.tif", picture, tile=(128, 128), compression="deflate", photometric="rgb", resolution=(2e4, 2e4),
                 resolutionunit="CENTIMETER")
model = models.load("stalign-mini")
geometry = model.geometry
xy = rng.uniform(100, 500, (8, 2))
with slide.open_image("he.tif") as image:
    assert abs(image.mpp - 0.5) < 1e-6
    spot = slide.read_patches(image, xy, geometry.spot_um / image.mpp, geometry.spot_pixels)
    niche = slide.read_patches(image, xy, geometry.niche_um / image.mpp, geometry.niche_pixels)
names = ["ERBB2", "HER2P1", "CD3E", "KRT8", "ENSG00000141736.13"]
match = genes.match_names(names, model.genes)
counts = genes.aggregate(sp.csr_matrix(rng.poisson(3.0, (8, 5)).astype(np.float32)), match)
graph = genes.row_normalise(sp.csr_matrix(np.ones((8, 8), dtype=np.float32)))
spot_gene, niche_gene = model.preprocess_genes(counts, connectivities=graph)
colour = slide.colour_statistics(spot)
with torch.inference_mode():
    output = model(
        spot_image=model.preprocess_spot_image(spot, colour=colour),
        niche_image=model.preprocess_niche_image(niche, colour=colour),
        spot_gene=torch.from_numpy(spot_gene),
        niche_gene=torch.from_numpy(niche_gene),
    )
for part in ("fused", "image", "gene"):
    matrix = model.embedding(output, part)
    assert matrix.shape[0] == 8 and torch.isfinite(matrix).all(), part
"""

LOSS = """
import torch
from stalign.train import losses

torch.manual_seed(0)
query = torch.randn(6, 4, requires_grad=True)
loss = losses.info_nce(query, query.detach() + 0.1 * torch.randn(6, 4))
loss.backward()
assert torch.isfinite(query.grad).all() and float(loss.detach()) > 0
"""

STEP = """
import numpy as np, scipy.sparse as sp
from stalign import models, settings, train

settings.progress, settings.device = False, "cpu"
rng = np.random.default_rng(0)
n, names = 24, tuple(f"G{i}" for i in range(30))
near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 2
patches = rng.integers(0, 255, (n, 16, 16, 3), dtype=np.uint8)
section = train.Section(
    name="a", patient="a", counts=sp.csr_matrix(rng.poisson(2.0, (n, 30)).astype(np.float32)),
    connectivities=sp.csr_matrix(near / near.sum(axis=1, keepdims=True), dtype=np.float32),
    spot_image=patches, niche_image=patches, colour=(np.full(3, 0.5, np.float32), np.full(3, 0.2, np.float32)),
)
image = {"encoder": "timm", "args": {"model": "resnet10t", "model_args": {"channels": [8, 8, 8, 8]}}}
gene = {"args": {"dim": 16, "hidden": 16}}
config = train.PretrainConfig.from_dict({
    "out": "run", "data": {"root": ".", "train": ["*.h5ad"]},
    "network": {"name": "tiny", "changes": {
        "n_tokens": 2, "width": 16, "spot_patch": {"pixels": 16}, "niche_patch": {"pixels": 16},
        "spot_image": image, "niche_image": image, "spot_gene": gene, "niche_gene": gene,
        "fusion": {"heads": 2, "head_dim": 8, "hidden": 8}, "heads": {"hidden": 16, "out": 16}}},
    "objective": {"n_clusters": 2}, "optimiser": {"steps": 1, "batch_size": 12, "warmup": 1},
    "prediction": {"n_genes": 5, "penalties": [1.0]},
})
assert models.load(train.pretrain(config, [section], genes=names)).genes == names
"""

CLEAN = """
loaded = sorted({name.split(".")[0] for name in sys.modules} & Absent.names)
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(EMBED, id="embed"),
        pytest.param(LOSS, id="loss"),
        pytest.param(
            STEP,
            id="step",
            marks=pytest.mark.skipif(find_spec("lightning") is None, reason="training needs the extra `train`"),
        ),
    ],
)
def test_runs_without_scanpy_squidpy_and_sklearn(code, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(stalign.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", BLOCK + code + CLEAN],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
