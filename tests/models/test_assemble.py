"""The paper's model from folders in the public layouts, filled with random numbers."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from scipy import sparse

from stalign import genes as gene_sets_room
from stalign import models
from stalign.models._assemble import GENE_SETS
from stalign.models.encoders import ScGPT, build_image_encoder
from stalign.models.encoders._scgpt import _Network, _official_names

UNI = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SPECIALS = ("<pad>", "<cls>", "<eoc>")


def write_uni(folder, size):
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(build_image_encoder("uni", **size).vit.state_dict(), folder / "pytorch_model.bin")
    if size:
        (folder / "config.json").write_text(json.dumps(size))
    return folder


def write_scgpt(folder, genes, *, width=32, heads=4, layers=2, seed=0):
    folder.mkdir()
    vocab = {token: number for number, token in enumerate([*genes, *SPECIALS])}
    torch.manual_seed(seed)
    network, names = _Network(len(vocab), width, heads, width, layers), _official_names(layers)
    state = {
        names[key].replace("self_attn.in_proj_", "self_attn.Wqkv."): value
        for key, value in network.state_dict().items()
    }
    torch.save(state | {"flag_encoder.weight": torch.zeros(2, width)}, folder / "best_model.pt")
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "args.json").write_text(
        json.dumps({"embsize": width, "nheads": heads, "d_hid": width, "nlayers": layers, "n_layers_cls": 3})
    )
    return folder


@pytest.fixture(scope="module")
def some_genes():
    sets = gene_sets_room.select_sets(gene_sets_room.hallmark(), GENE_SETS)
    every = sorted({gene for members in sets.values() for gene in members})
    return [*every[:500], "RP11-34P13.7", "MALAT1"]  # 48 genes of the sets are not there


@pytest.fixture(scope="module")
def folders(tmp_path_factory, some_genes):
    root = tmp_path_factory.mktemp("weights")
    return {"image_weights": write_uni(root / "UNI", UNI), "scgpt": write_scgpt(root / "scGPT_human", some_genes)}


@pytest.fixture(scope="module")
def config():
    """The paper's config with small parts that are not pretrained."""
    return models.config("paper").updated(
        {
            "spot_image": {"encoder": "test_resnet", "tokens": {"kind": "linear"}},
            "niche_gene": {"args": {"hidden": [16, 8], "layers": 1, "feedforward": 16, "out_hidden": 8}},
            "heads": {"hidden": 16, "out": 8},
            "fusion": {"heads": 2, "head_dim": 4, "hidden": 4},
            "width": 24,
        }
    )


@pytest.fixture(scope="module")
def model(config, folders):
    return models.assemble(config, **folders)


def inputs(model, n=3):
    generator = torch.Generator().manual_seed(0)
    pixels = model.geometry.niche_pixels
    return {
        "spot_image": torch.randn(n, 3, 32, 32, generator=generator),
        "niche_image": torch.randn(n, 3, pixels, pixels, generator=generator),
        "spot_gene": torch.randn(n, model.encoder("spot_gene").input_dim, generator=generator),
        "niche_gene": torch.randn(n, model.encoder("niche_gene").input_dim, generator=generator),
    }


def test_the_eight_sets_have_the_published_size():
    sets = gene_sets_room.select_sets(gene_sets_room.hallmark(), GENE_SETS)
    assert (len(sets), len({gene for members in sets.values() for gene in members})) == (8, 548)
    encoder = models.config("paper").niche_gene.args
    assert (encoder["n_pathways"], encoder["n_genes"]) == (8, 548)


def test_parts_fit(model, folders, some_genes):
    assert model.genes[: len(some_genes)] == tuple(some_genes)
    assert len(model.genes) == 548 + 2
    assert not set(SPECIALS) & set(model.genes)
    config = model.config
    assert config.niche_patch.pixels == 32
    assert config.niche_image.tokens == models.TokenConfig("conv", kernel=2, stride=2)  # 48 -> 24, as published
    assert config.spot_gene.tokens.kind == "linear"  # 32 -> 24
    state = torch.load(folders["image_weights"] / "pytorch_model.bin", weights_only=True)
    own = model.encoder("niche_image").vit.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in state.items())
    assert not any(p.requires_grad for p in model.encoder("niche_image").parameters())
    assert not model.training
    with torch.inference_mode():
        output = model(**inputs(model))
    assert output.spot.shape == output.niche.shape == (3, 8)
    assert output.niche_gene.shape == (3, 8, 24)
    assert "CC BY-NC-ND" in model.card.licence_weights


def test_genes_reach_both_encoders(model, folders, some_genes):
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(0.5, size=(4, len(model.genes))).astype(np.float32))
    graph = sparse.csr_matrix(np.full((4, 4), 0.25, dtype=np.float32))
    spot, niche = model.preprocess_genes(counts, connectivities=graph)
    direct = ScGPT.from_folder(folders["scgpt"]).embed(counts[:, : len(some_genes)], some_genes)
    np.testing.assert_allclose(spot, direct, atol=1e-6)
    sets = gene_sets_room.select_sets(gene_sets_room.hallmark(), GENE_SETS)
    union = sorted({gene for members in sets.values() for gene in members})
    dense = counts.toarray()
    mean = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4).mean(axis=0)
    place = {gene: number for number, gene in enumerate(model.genes)}
    for number, members in enumerate(sets.values()):
        expected = [mean[place[gene]] if gene in members else 0.0 for gene in union]
        np.testing.assert_allclose(niche[0].reshape(8, 548)[number], expected, rtol=1e-5, atol=1e-6)


def test_scgpt_runs_in_inference_mode_and_stays_usable(model):
    counts = sparse.csr_matrix(np.ones((2, len(model.genes)), dtype=np.float32))
    encoder = model.encoder("spot_gene")
    outside = encoder.preprocess(counts)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder.preprocess(counts)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, outside, atol=0.05)
    assert not any(p.is_inference() for p in encoder._scgpt[0].parameters())
    np.testing.assert_array_equal(encoder.preprocess(counts), outside)


def test_seed(config, folders, model):
    random_state = torch.get_rng_state()
    same, other = models.assemble(config, **folders, seed=0), models.assemble(config, **folders, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.heads["spot"].mlp[0].weight, other.heads["spot"].mlp[0].weight)


def test_round_trip(model, tmp_path, caplog):
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(0.5, size=(4, len(model.genes))).astype(np.float32))
    with caplog.at_level(logging.WARNING, logger="stalign"):
        loaded = models.load(model.save(tmp_path / "mine"))
    assert not caplog.records
    assert loaded.config == model.config
    assert loaded.genes == model.genes
    for name in ("niche_image", "spot_gene"):
        assert loaded.encoder(name).provenance == model.encoder(name).provenance
    np.testing.assert_array_equal(
        loaded.encoder("spot_gene").preprocess(counts), model.encoder("spot_gene").preprocess(counts)
    )
    with torch.inference_mode():
        before, after = model(**inputs(model)), loaded(**inputs(model))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = models.load(loaded.save(tmp_path / "again"))
    assert again.encoder("spot_gene").provenance == model.encoder("spot_gene").provenance


def test_scgpt_is_found_again_or_asked_for(config, folders, tmp_path, some_genes):
    here = tmp_path / "scGPT_human"
    shutil.copytree(folders["scgpt"], here)
    model = models.assemble(config, image_weights=folders["image_weights"], scgpt=here)
    saved = model.save(tmp_path / "mine")
    counts = sparse.csr_matrix(np.ones((1, len(model.genes)), dtype=np.float32))
    expected = model.encoder("spot_gene").preprocess(counts)

    here.rename(saved / "scgpt")  # beside the weights it travels with them
    np.testing.assert_array_equal(models.load(saved).encoder("spot_gene").preprocess(counts), expected)

    (saved / "scgpt").rename(tmp_path / "elsewhere")
    lost = models.load(saved).encoder("spot_gene")
    with pytest.raises(ValueError, match=r"no scGPT checkpoint is attached.*is not in .*scGPT_human any more.*attach"):
        lost.preprocess(counts)
    lost.attach(tmp_path / "elsewhere")
    np.testing.assert_array_equal(lost.preprocess(counts), expected)

    other = write_scgpt(tmp_path / "other", some_genes, seed=5)
    with pytest.raises(ValueError, match=r"not the scGPT checkpoint the model was saved with.*other=True"):
        models.load(saved).encoder("spot_gene").attach(other)
    shutil.copytree(other, saved / "scgpt")
    with pytest.raises(ValueError, match="not the scGPT checkpoint"):
        models.load(saved).encoder("spot_gene").preprocess(counts)
    swapped = models.load(saved).encoder("spot_gene")
    swapped.attach(other, other=True)
    assert np.abs(swapped.preprocess(counts) - expected).max() > 1e-3


@pytest.mark.parametrize("kind", ["gmt", "dict", "names"])
def test_gene_sets(config, folders, tmp_path, some_genes, kind):
    sets = {"one": some_genes[:20], "two": some_genes[10:40], "three": [*some_genes[50:60], "NOT_IN_SCGPT"]}
    given = sets
    if kind == "gmt":
        given = tmp_path / "sets.gmt"
        given.write_text("".join(f"{name}\thttp://x\t" + "\t".join(genes) + "\r\n" for name, genes in sets.items()))
    if kind == "names":
        given = ["HALLMARK_NOTCH_SIGNALING", "HALLMARK_APOPTOSIS"]
    model = models.assemble(config, **folders, gene_sets=given)
    n_sets, n_genes = (3, 51) if kind != "names" else (2, 191)
    args = model.config.niche_gene.args
    assert model.config.n_tokens == args["n_pathways"] == n_sets
    assert args["n_genes"] == n_genes
    loaded = models.load(model.save(tmp_path / "mine"))
    with torch.inference_mode():
        output = loaded(**inputs(loaded))
    assert output.niche_gene.shape == (3, n_sets, 24)
    if kind != "names":
        assert model.genes[-1] == "NOT_IN_SCGPT"
        assert loaded.encoder("niche_gene").mask.sum(dim=1).tolist() == [20, 30, 11]


def test_no_pretrained_weights_stay_random_in_silence(model, config, folders, tmp_path, caplog):
    random = models.STAlign(model.config, model.genes)
    with caplog.at_level(logging.WARNING, logger="stalign"):
        saved = random.save(tmp_path / "random")
    assert "has random weights" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="stalign"):
        loaded = models.load(saved)
    assert "has random weights" in caplog.text
    with pytest.raises(ValueError, match="no scGPT checkpoint is attached"):
        loaded.encoder("spot_gene").preprocess(sparse.csr_matrix((1, len(model.genes)), dtype=np.float32))


def test_refusals(config, folders, tmp_path, some_genes):
    with pytest.raises(ValueError, match="has the encoder 'slide-profile' in branch spot_gene"):
        models.assemble("mini", **folders)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        models.assemble(config, image_weights=folders["image_weights"], scgpt=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        models.assemble(config, image_weights=tmp_path / "nowhere", scgpt=folders["scgpt"])
    with pytest.raises(ValueError, match="gene sets have less than 50%"):
        models.assemble(config, **folders, genes=some_genes[:20])
    with pytest.raises(ValueError, match="None of the 2 genes is in scGPT's vocabulary"):
        models.assemble(config, **folders, genes=["P", "Q"], gene_sets={"one": ["P"], "two": ["Q"]})
    with pytest.raises(ValueError, match="at least one gene each"):
        models.assemble(config, **folders, gene_sets={"one": []})
    with pytest.raises(ValueError, match="Did you mean 'HALLMARK_HYPOXIA'"):
        models.assemble(config, **folders, gene_sets=["HALLMARK_HYPOXA"])
    empty = tmp_path / "empty.gmt"
    empty.write_text("ONE\thttp://x\n")
    with pytest.raises(ValueError, match="'ONE' is empty"):
        models.assemble(config, **folders, gene_sets=empty)


def test_damaged_record(model, tmp_path):
    saved = model.save(tmp_path / "mine")
    content = json.loads((saved / "config.json").read_text())
    content["encoders"]["spot_gene"] = {"colour": "red"}
    (saved / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"encoders\.spot_gene must be a dict"):
        models.load(saved)


# -- on real sections ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_section(real_section, config, folders, tmp_path, snapshot):
    import stalign as sta

    adata = real_section("her2st/A1")[:30].copy()
    scgpt = write_scgpt(tmp_path / "scgpt", adata.var_names)
    model = models.assemble(config, image_weights=folders["image_weights"], scgpt=scgpt)
    saved = model.save(tmp_path / "mine")
    first, second = adata.copy(), adata.copy()
    sta.tl.embed(first, model=model, progress=False)
    sta.tl.embed(second, model=saved, batch_size=7, progress=False)
    for name in ("X_stalign", "X_stalign_spot", "X_stalign_niche", "X_stalign_image", "X_stalign_gene"):
        rows = first.obsm[name]
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(second.obsm[name], rows, atol=1e-4)
    record = second.uns["stalign"]["embed"]
    assert record["encoders"]["spot_gene"] == model.encoder("spot_gene").provenance.sha256
    assert record["encoders"]["niche_image"] == model.encoder("niche_image").provenance.sha256


@pytest.mark.real
@pytest.mark.slow
def test_real_section_at_full_size(real_section, tmp_path):
    """UNI and scGPT at their public sizes: 303 M and 51 M parameters, files as they are published."""
    import stalign as sta

    adata = real_section("her2st/A1")[:16].copy()
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build_image_encoder("uni").vit.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "UNI").mkdir()
    state = {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in shapes.items()}
    torch.save(state, tmp_path / "UNI" / "pytorch_model.bin")
    del state
    names = [*adata.var_names, *(f"FILLER{number}" for number in range(60_694 - adata.n_vars))]
    write_scgpt(tmp_path / "scGPT_human", names, width=512, heads=8, layers=12)
    model = models.assemble("paper", image_weights=tmp_path / "UNI", scgpt=tmp_path / "scGPT_human")
    assert sum(p.numel() for p in model.encoder("niche_image").parameters()) == 303_350_784
    assert model.summary().flops / 1e9 == pytest.approx(126.10, abs=0.02)
    for folder in ("UNI", "scGPT_human"):
        shutil.rmtree(tmp_path / folder)  # gigabytes that pytest would keep
    sta.tl.embed(adata, model=model, progress=False, batch_size=8)
    assert adata.obsm["X_stalign"].shape == (16, 2048)
    assert adata.obsm["X_stalign_image"].shape == (16, 1024 + 8 * 512)
    for name in ("X_stalign", "X_stalign_image", "X_stalign_gene"):
        assert np.isfinite(adata.obsm[name]).all()
        assert np.ptp(adata.obsm[name], axis=0).max() > 0
