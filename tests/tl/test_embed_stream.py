"""Reading ahead, blocks of genes, half precision: what streams gives what a whole would."""

from __future__ import annotations

import threading

import anndata as ad
import numpy as np
import pytest
import torch

import stalign as sta
from stalign import genes as sg
from stalign.slide._library import PatchReader
from stalign.tl import _forward
from stalign.tl._embed import make_run
from stalign.tl._expression import Expression
from stalign.tl._runtime import auto_batch_size, auto_workers, inference
from stalign.tl._sinks import MemorySink


def embed(adata: ad.AnnData, model, **kwargs) -> ad.AnnData:
    sta.tl.embed(adata, model=model, progress=False, **kwargs)
    return adata


# --- genes by blocks ---------------------------------------------------------------------------------------------


@pytest.fixture
def whole(slide, tiny):
    """Gene inputs of the whole slide at once, and what is needed to make them in blocks."""
    sta.pp.extract_niches(slide, n_neighbors=6, spot_um=80.0, niche_um=240.0)
    graph = slide.obsp["niche_connectivities"]
    match = sg.match_names(slide.var_names, tiny.genes)
    counts = sg.aggregate(slide.X, match)
    return slide, graph, match, tiny.preprocess_genes(counts, connectivities=sg.row_normalise(graph))


def expression_of(slide, tiny, graph, match, codes=None) -> Expression:
    codes = np.zeros(slide.n_obs, dtype=np.intp) if codes is None else codes
    return Expression(tiny, sg._rows.CountRows(slide.X, match), graph, codes, slide.obsm["spatial"])


@pytest.mark.parametrize("size", [1, 13, 120])
def test_blocks_are_parts_of_the_whole(whole, tiny, size):
    slide, graph, match, (spot, niche) = whole
    expression = expression_of(slide, tiny, graph, match)
    order = np.random.default_rng(0).permutation(120)
    for start in range(0, 120, size):
        rows = order[start : start + size]
        block = expression(rows)
        np.testing.assert_allclose(block[0], spot[rows], atol=1e-4)
        np.testing.assert_allclose(block[1], niche[rows], atol=1e-4)


@pytest.mark.parametrize("encoder", ["mlp", "pathway-transformer"])
def test_blocks_of_other_encoders(slide, encoder):
    """Encoders that take nothing from the slide as a whole give the same in blocks, too."""
    from stalign.models.encoders import build_gene_encoder

    sets = {f"set {k}": list(slide.var_names[k * 20 : k * 20 + 30]) for k in range(3)}
    args = {
        "mlp": {"hidden": [8], "dim": 16},
        "pathway-transformer": {"n_pathways": 3, "n_genes": None, "gene_sets": sets, "layers": 1, "hidden": [8, 8]},
    }[encoder]
    made = build_gene_encoder(encoder, vocabulary=tuple(slide.var_names), **args)
    sta.pp.extract_niches(slide, n_neighbors=6, spot_um=80.0, niche_um=240.0)
    graph = sg.row_normalise(slide.obsp["niche_connectivities"])
    expected = made.preprocess(slide.X, connectivities=graph)
    rows = np.array([100, 3, 50])
    near = np.unique(graph[rows].indices)
    assert made.fit_limit == 0
    block = made.preprocess(slide.X[near], connectivities=graph[rows][:, near])
    np.testing.assert_allclose(block, expected[rows], atol=1e-5)


def test_a_large_slide_is_fitted_on_a_bounded_sample(slide, make_tiny, monkeypatch):
    gene = {"args": {"dim": 64, "hidden": 16, "n_components": 8, "max_fit": 60}}
    model = make_tiny(spot_gene=gene, niche_gene=gene)
    asked: list[int] = []
    call = sg._rows.CountRows.__call__
    monkeypatch.setattr(
        sg._rows.CountRows, "__call__", lambda self, index: asked.append(len(index)) or call(self, index)
    )
    embed(slide, model, num_workers=0, batch_size=5)
    assert asked[0] <= 60  # the first are those of the fit
    assert np.isfinite(slide.obsm["X_stalign"]).all()
    order = np.random.default_rng(0).permutation(120)
    other = embed(slide[order].copy(), model)
    np.testing.assert_allclose(other.obsm["X_stalign"], slide.obsm["X_stalign"][order], atol=1e-4)


def test_blocks_of_genes_are_bounded(slide, tiny_folder, embedded, same, monkeypatch):
    made: list[int] = []
    call = Expression.__call__
    monkeypatch.setattr(Expression, "__call__", lambda self, rows: made.append(len(rows)) or call(self, rows))
    monkeypatch.setattr(_forward, "_GENE_SPOTS", 32)
    same(embed(slide, tiny_folder, batch_size=10), embedded)
    assert sum(made) == 120
    assert max(made) == 30


def test_counts_are_never_dense(slide, tiny_folder, embedded, same, monkeypatch):
    from scipy import sparse

    def refuses(self, *args, **kwargs):
        if self.shape[0] >= 120 and self.shape[1] >= 120:
            raise AssertionError(f"{self.shape} is made dense")
        return dense(self, *args, **kwargs)

    dense = sparse.csr_matrix.toarray
    monkeypatch.setattr(sparse.csr_matrix, "toarray", refuses)
    same(embed(slide, tiny_folder), embedded)


# --- images ahead of genes ---------------------------------------------------------------------------------------


def test_images_run_ahead_until_the_genes_are_there(slide, tiny_folder, embedded, same, monkeypatch):
    """The first genes take as long as three batches of images: these are encoded meanwhile, once each."""
    encoded: list[int] = []
    three = threading.Event()
    encode, fit = _forward._Passes.encode, Expression.fit

    def counted(self, batch, images):
        encoded.append(len(batch.spots))
        if len(encoded) == 3:
            three.set()
        return encode(self, batch, images)

    def slow(self):
        assert three.wait(20)
        return fit(self)

    monkeypatch.setattr(_forward._Passes, "encode", counted)
    monkeypatch.setattr(Expression, "fit", slow)
    same(embed(slide, tiny_folder, batch_size=20, num_workers=1), embedded)
    assert len(encoded) >= 3


def test_what_waits_is_bounded(slide, tiny_folder, embedded, same, monkeypatch):
    encoded: list[int] = []
    encode = _forward._Passes.encode
    released = threading.Event()
    fit = Expression.fit

    def counted(self, batch, images):
        encoded.append(len(batch.spots))
        return encode(self, batch, images)

    def slow(self):
        released.wait(0.5)
        return fit(self)

    monkeypatch.setattr(_forward._Passes, "encode", counted)
    monkeypatch.setattr(_forward._Passes, "can_wait", lambda self, limit: 25)
    monkeypatch.setattr(Expression, "fit", slow)
    same(embed(slide, tiny_folder, batch_size=10, num_workers=1), embedded)
    assert sum(encoded) <= 30


def test_out_of_memory_while_running_ahead(slide, make_tiny, embedded, same, monkeypatch, caplog):
    model = make_tiny()
    encoder = model.encoder("niche_image")
    forward = encoder.forward

    def limited(images):
        if len(images) > 12:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(images)

    monkeypatch.setattr(encoder, "forward", limited)
    same(embed(slide, model, batch_size=40, num_workers=1), embedded)
    assert "going on with 10" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_the_genes_is_raised(slide, tiny, monkeypatch, snapshot, num_workers):
    def fails(self):
        raise MemoryError("no room for the genes")

    monkeypatch.setattr(Expression, "fit", fails)
    before = snapshot(slide)
    with pytest.raises(MemoryError, match="no room for the genes"):
        embed(slide, tiny, num_workers=num_workers)
    assert snapshot(slide) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stalign")]


def test_pixels_are_read_in_other_threads(slide, tiny, monkeypatch):
    names: set[str] = set()
    read = PatchReader.read

    def noted(self, index, um, pixels):
        names.add(threading.current_thread().name.split("_")[0])
        return read(self, index, um, pixels)

    sta.pp.extract_niches(slide, n_neighbors=6, spot_um=80.0, niche_um=240.0)
    monkeypatch.setattr(PatchReader, "read", noted)
    monkeypatch.setattr(PatchReader, "colours", lambda self, um, pixels: {})
    embed(slide, tiny, num_workers=2, batch_size=20)
    assert names == {"stalign-pixels"}


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", np.float16])
def test_half_precision(slide, tiny_folder, embedded, same, dtype):
    embed(slide, tiny_folder, dtype=dtype)
    assert slide.obsm["X_stalign"].dtype == np.float16
    same(slide, embedded, atol=2e-3)
    sta.tl.spatial_domains(slide, 3)


def test_rows_that_never_come_are_missing():
    sink = MemorySink(4, "float32")
    sink.write(np.array([2, 0]), {"fused": np.ones((2, 3), dtype=np.float32)})
    assert sink.done == 2
    assert np.isnan(sink.matrices["fused"]).all(axis=1).tolist() == [False, True, False, True]


# --- what suits the machine --------------------------------------------------------------------------------------


def test_batch_size_follows_the_patches(tiny, make_tiny):
    cpu = torch.device("cpu")
    assert auto_batch_size(tiny, cpu, image=True, genes=True) == 256
    large = make_tiny(niche_patch={"um": 240.0, "pixels": 224})
    assert auto_batch_size(large, cpu, image=True, genes=True) == 16
    assert auto_batch_size(large, cpu, image=False, genes=True) == 256


def test_workers_and_threads_share_the_cores(monkeypatch, tiny):
    cpu = torch.device("cpu")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert auto_workers(tiny, cpu) == 0
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert auto_workers(tiny, cpu) == 1
    assert auto_workers(tiny, torch.device("cuda")) == 3
    monkeypatch.setattr("stalign.tl._runtime._LARGE", 1)
    assert auto_workers(tiny, cpu) == 0
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with inference(tiny, cpu, workers=1):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 4
        torch.set_num_threads(2)
        with inference(tiny, cpu, workers=1):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_settings_that_are_left_open():
    run = make_run()
    assert (run.batch_size, run.num_workers, run.dtype) == (None, None, "float32")


def test_a_compiled_model_is_asked_for(slide, tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    monkeypatch.setattr(sta.settings, "_compile", True)
    embed(slide, tiny, batch_size=60)
    assert len(compiled) == 1
    embed(slide, tiny)
    assert len(compiled) == 1  # once for a model
    assert np.isfinite(slide.obsm["X_stalign"]).all()
