from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from stalign import models
from stalign.models._fusion import ABFN
from stalign.models._tokens import ConvTokens, LinearTokens

FIELDS = models.STAlignOutput._fields


def test_shapes(tiny, tiny_inputs):
    with torch.inference_mode():
        output = tiny(**tiny_inputs)
    assert all(getattr(output, field).shape == (7, 6) for field in FIELDS)
    assert tiny.predict(output).shape == (7, 4)
    assert tiny.predicted_genes == tiny.genes[:4]


def test_niche_stays_tokens_without_heads(tiny_config, genes, tiny_inputs):
    model = models.STAlign(tiny_config.updated({"heads": {"niche": False}, "prediction": None}), genes).eval()
    output = model(**tiny_inputs)
    assert output.niche_image.shape == output.niche_gene.shape == (7, 3, 16)
    assert output.niche.shape == (7, 6)


@pytest.mark.parametrize("missing", ["single", "tokens"])
@pytest.mark.parametrize("side", ["image", "gene"])
def test_one_modality(tiny_config, genes, tiny_inputs, missing, side):
    model = models.STAlign(tiny_config.updated(missing=missing), genes).eval()
    with torch.inference_mode():
        both = model(**tiny_inputs)
        output = model(**{name: x for name, x in tiny_inputs.items() if name.endswith(side)})
    other = "gene" if side == "image" else "image"
    for scale in ("spot", "niche"):
        assert getattr(output, f"{scale}_{other}") is None
        torch.testing.assert_close(getattr(output, f"{scale}_{side}"), getattr(both, f"{scale}_{side}"))
        fused = getattr(output, scale)
        assert fused.shape == (7, 6)
        assert torch.isfinite(fused).all()


def test_single_side_takes_both_places(tiny, tiny_inputs):
    with torch.inference_mode():
        fused = tiny(spot_image=tiny_inputs["spot_image"]).spot
        tokens = tiny.branches["spot_image"](tiny_inputs["spot_image"])
        expected = tiny.heads["spot"](tiny.spot_fusion(tokens, tokens))
    torch.testing.assert_close(fused, expected, rtol=0, atol=0)


def test_one_scale_alone(tiny, tiny_inputs):
    output = tiny(niche_gene=tiny_inputs["niche_gene"])
    assert output.spot is None
    assert output.spot_gene is None
    assert output.niche.shape == (7, 6)


def test_batch_size_changes_nothing(tiny, tiny_inputs):
    with torch.inference_mode():
        whole = tiny(**tiny_inputs)
        parts = [tiny(**{name: x[i : i + 2] for name, x in tiny_inputs.items()}) for i in range(0, 7, 2)]
    for field in FIELDS:
        joined = torch.cat([getattr(part, field) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, field), rtol=1e-5, atol=1e-6)


def test_features_in_place_of_pixels(tiny, tiny_inputs):
    with torch.inference_mode():
        features = tiny.encoder("niche_image")(tiny_inputs["niche_image"])
        direct = tiny(niche_image=tiny_inputs["niche_image"]).niche_image
        torch.testing.assert_close(tiny(niche_image=features).niche_image, direct)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Nothing to embed"),
        ({"spot_image": torch.zeros(2, 32, 32, 3)}, r"spot_image must have shape \(n, 3, height, width\)"),
        ({"spot_image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "floating-point tensor"),
        ({"niche_gene": torch.zeros(2, 5)}, r"niche_gene must have shape \(n, 6\), got \(2, 5\)"),
        ({"spot_gene": torch.zeros(2, 6), "niche_gene": torch.zeros(3, 6)}, "differ in their number of spots"),
    ],
)
def test_bad_inputs(tiny, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**inputs)


def test_predict_needs_its_embeddings(tiny, tiny_inputs, tiny_config, genes):
    with pytest.raises(ValueError, match="needs 'spot_image'"):
        tiny.predict(tiny(spot_gene=tiny_inputs["spot_gene"]))
    model = models.STAlign(tiny_config.updated(prediction=None), genes)
    with pytest.raises(ValueError, match="no prediction head"):
        model.predict(tiny(**tiny_inputs))


def test_frozen_encoder_stays_in_evaluation_mode(tiny_config, genes):
    model = models.STAlign(tiny_config.updated({"spot_image": {"frozen": True}}), genes).train()
    assert not model.encoder("spot_image").training
    assert not any(p.requires_grad for p in model.encoder("spot_image").parameters())
    assert model.encoder("niche_image").training
    assert all(p.requires_grad for p in model.branch("spot_image").tokens.parameters())


def test_conv_tokens_are_collinear_and_linear_tokens_are_not():
    x = torch.randn(2, 32)
    conv = ConvTokens(32, 4, 32, kernel=1, stride=1)(x)
    normed = torch.nn.functional.layer_norm(conv, (32,))
    assert torch.linalg.matrix_rank(normed[0], rtol=1e-2) == 1
    linear = torch.nn.functional.layer_norm(LinearTokens(32, 4, 16)(x), (16,))
    assert torch.linalg.matrix_rank(linear[0], rtol=1e-4) == 4


def test_fusion_residual(tiny_config):
    torch.manual_seed(0)
    plain = ABFN(16, tiny_config.fusion).eval()
    residual = ABFN(16, tiny_config.updated({"fusion": {"residual": True}}).fusion).eval()
    residual.load_state_dict(plain.state_dict(), strict=False)
    image, gene = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    assert not torch.allclose(plain(image, gene), residual(image, gene))
    torch.testing.assert_close(residual.image_attention(image, gene), image + plain.image_attention(image, gene))


def test_normalised_heads(tiny_config, genes, tiny_inputs):
    model = models.STAlign(tiny_config.updated({"heads": {"normalise": True, "pool": "mean", "hidden": None}}), genes)
    output = model.eval()(**tiny_inputs)
    for field in FIELDS:
        torch.testing.assert_close(getattr(output, field).norm(dim=1), torch.ones(7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"spot_image": {"encoder": "resnet51"}},
            r"config\.spot_image: Unknown image encoder 'resnet51'.*Did you mean",
        ),
        ({"spot_gene": {"encoder": "scgtp"}}, "Did you mean 'scgpt'"),
        ({"spot_gene": {"args": {"dimm": 3}}}, "no argument 'dimm'.*Did you mean 'dim'"),
        ({"spot_gene": {"tokens": {"kind": "conv"}}}, "8 features into tokens of width 8, but the model's width is 16"),
        ({"spot_gene": {"tokens": {"kind": "none"}}}, "need an encoder that yields 3 tokens of width 16"),
        ({"prediction": {"n_genes": 7}}, "the vocabulary has 6 genes"),
        ({"niche_gene": {"encoder": "pathway-transformer", "args": {"n_genes": 3}}}, "of kind 'none'"),
    ],
)
def test_configs_that_do_not_fit(tiny_config, genes, changes, message):
    with pytest.raises(ValueError, match=message):
        models.STAlign(tiny_config.updated(changes), genes)


def test_vocabulary_is_checked(tiny_config):
    with pytest.raises(ValueError, match="1 genes more than once: \\['B'\\]"):
        models.STAlign(tiny_config, ["A", "B", "B"])
    with pytest.raises(TypeError, match="sequence of gene symbols"):
        models.STAlign(tiny_config, "CD3E")
    with pytest.raises(ValueError, match="needs a vocabulary"):
        models.STAlign(tiny_config)


def test_summary(tiny):
    summary = tiny.summary()
    assert summary.parameters == sum(p.numel() for p in tiny.parameters())
    assert summary.trainable == summary.parameters
    assert summary.flops > 0
    assert {part.name for part in summary.parts} >= {"spot_image", "spot_fusion", "heads", "prediction"}
    assert f"{summary.parameters:,}" in str(summary)


def test_summary_of_the_paper_model():
    with torch.device("meta"):
        model = models.STAlign(models.config("paper"))
    summary = model.summary()
    parts = {part.name: part for part in summary.parts}
    # The published code's costs at 32 px and 224 px: 126.10 GFLOPs, of which UNI 123.11 (its front end apart).
    assert summary.flops / 1e9 == pytest.approx(126.10, abs=0.02)
    assert parts["niche_image"].flops / 1e9 == pytest.approx(123.11, abs=0.01)
    assert parts["niche_image"].parameters == 303_350_784 + 8 * 2 + 8
    assert parts["niche_image"].trainable == 8 * 2 + 8
    assert "303,350,784" in str(summary)


def test_preprocess_genes(tiny, genes):
    counts = sparse.csr_matrix(np.array([[10, 0, 0, 0, 0, 0], [0, 5, 5, 0, 0, 0]], dtype=np.float32))
    graph = sparse.csr_matrix(np.full((2, 2), 0.5, dtype=np.float32))
    spot, niche = tiny.preprocess_genes(counts, connectivities=graph)
    expected = np.log1p([[1e4, 0, 0, 0, 0, 0], [0, 5e3, 5e3, 0, 0, 0]]).astype(np.float32)
    np.testing.assert_allclose(spot, expected, rtol=1e-6)
    np.testing.assert_allclose(niche, np.repeat(expected.mean(axis=0, keepdims=True), 2, axis=0), rtol=1e-6)
    assert spot.dtype == niche.dtype == np.float32


def test_an_untrained_bypass_is_the_profile():
    genes = tuple(f"G{i}" for i in range(50))
    model = models.STAlign(models.config("mini"), genes=genes).eval()
    profile = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    output = model(spot_gene=profile, niche_gene=profile)
    torch.testing.assert_close(output.niche, profile / 16)
    torch.testing.assert_close(output.spot_gene, profile / 16)
    torch.testing.assert_close(output.niche_gene, profile / 16)
    torch.testing.assert_close(model.embedding(output, "niche"), profile / 16)
    fused = model.embedding(output, "fused")
    torch.testing.assert_close(fused, torch.cat([output.spot, output.niche], dim=1) / 2**0.5)


def test_a_bypass_needs_heads_of_its_width():
    with pytest.raises(ValueError, match=r"heads\.out \(64\)"):
        models.STAlign(models.config("mini").updated({"heads": {"out": 64}}), genes=("A", "B"))


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "half"])
def test_a_share_of_the_niche_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="niche_share"):
        models.config("mini").updated({"prediction": {"n_genes": 2, "niche_share": share}})
