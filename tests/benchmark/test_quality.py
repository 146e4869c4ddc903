from __future__ import annotations

import numpy as np
import pytest

import stalign as sta
from stalign.benchmark import _quality


def test_area_by_hand():
    real, foreign = np.array([1.0, 2, 3]), np.array([2.0, 4, np.nan])
    # Of six pairs: 2 beats 1, ties with 2, loses to 3; 4 beats all.
    assert _quality.auroc(real, foreign) == pytest.approx((1 + 0.5 + 3) / 6)
    assert np.isnan(_quality.auroc(real, np.array([np.nan])))


def test_what_is_made_foreign_is_a_copy():
    adata = sta.datasets.synthetic_visium(n_rows=5, n_cols=5)
    image = adata.uns["spatial"]["synthetic_visium"]["images"]["hires"]
    negative = _quality.inverted(adata).uns["spatial"]["synthetic_visium"]["images"]["hires"]
    np.testing.assert_array_equal(negative.astype(int) + image, 255)
    assert adata.uns["spatial"]["synthetic_visium"]["images"]["hires"] is image
    mixed = _quality.shuffled(adata, 0)
    assert sorted(mixed.var_names) == sorted(adata.var_names)
    assert (mixed.var_names != adata.var_names).any()


def test_rows(tmp_path, monkeypatch):
    adata = sta.datasets.synthetic_visium(n_rows=5, n_cols=5)
    for name in ("real", "wrong"):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    rng = np.random.default_rng(0)
    monkeypatch.setattr(_quality, "_scores", lambda adata, model: rng.normal(size=adata.n_obs))
    monkeypatch.setattr(_quality, "_coverage", lambda *arguments: iter(()))
    table = _quality.rows(tmp_path, seeds=(0, 1), real="real", wrong=["wrong"])
    assert list(table.columns) == list(_quality.COLUMNS)
    assert len(table) == 6
    assert set(table["method"]) == {"wrong tissue", "inverted image", "shuffled genes"}
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
