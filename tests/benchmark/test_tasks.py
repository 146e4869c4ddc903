from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from stalign.benchmark import Section, annotation, domains, few_shot, genes, retrieval, robustness
from stalign.benchmark import _features as features
from stalign.benchmark._annotation import draw_spots, expression_prototypes, marker_scores
from stalign.benchmark._domains import score_domains
from stalign.benchmark._genes import top_genes
from stalign.benchmark._methods import DOMAIN_METHODS, METHODS, check_methods, wanted
from stalign.benchmark._robustness import shift_stain, thin_counts


def by(rows, metric=None, method=None):
    return [row for row in rows if metric in (None, row.metric) and method in (None, row.method)]


# --- sections ----------------------------------------------------------------------------------------------------


def test_spots_without_a_label_are_left_out(slides):
    adata = slides[0]
    adata.obs["layer"] = adata.obs["region"].astype(str)
    adata.obs.loc[adata.obs_names[:5], "layer"] = ["NA", "", "nan", None, np.nan]
    section = Section.of(adata, label_key="layer")
    assert section.adata.n_obs == adata.n_obs - 5 == len(section.labels)
    assert list(section.adata.obs_names) == list(adata.obs_names[5:])


def test_a_section_is_not_the_users_object(slides, snapshot, mini):
    adata = slides[0]
    before = snapshot(adata)
    section = Section.of(adata, label_key="region")
    domains(section, model=mini, seeds=[0], methods=["stalign-genes-only"])
    assert snapshot(adata) == before


def test_no_labels_no_classes(slides):
    adata = slides[0]
    adata.obs["empty"] = "NA"
    assert Section.of(adata, label_key="empty").labels is None
    assert Section.of(adata).n_classes == 0
    with pytest.raises(KeyError, match="regoin"):
        Section.of(adata, label_key="regoin")


def test_a_section_is_embedded_once(slides, mini, monkeypatch):
    import stalign as sta

    section = Section.of(slides[0])
    calls = []
    embed = sta.tl.embed
    monkeypatch.setattr(sta.tl, "embed", lambda *args, **options: calls.append(options) or embed(*args, **options))
    for _ in range(2):
        section.side(mini, "image")
        section.side(mini, "gene")
        section.embed(mini, ("gene",))
    assert len(calls) == 2


# --- domains -----------------------------------------------------------------------------------------------------


def test_the_labels_themselves_score_one(sections):
    section = sections[0]
    codes = np.unique(section.labels, return_inverse=True)[1]
    for row in score_domains(section, "labels", codes + 3, None):
        assert row.value == pytest.approx(1)
        assert (row.low, row.high) == pytest.approx((1, 1))
        assert row.n == section.adata.n_obs


def test_domains_do_not_depend_on_the_names_of_labels(sections):
    section = sections[0]
    found = np.random.default_rng(0).integers(0, 4, section.adata.n_obs)
    renamed = Section(section.name, section.adata, np.array([label[::-1] for label in section.labels]))
    values = [[row.value for row in score_domains(part, "x", found, 0)] for part in (section, renamed)]
    np.testing.assert_allclose(*values)


def test_domains_of_all_methods(sections, mini):
    rows = domains(sections[0], model=mini, seeds=[0])
    methods = {row.method for row in rows}
    assert methods == {"annotation", *DOMAIN_METHODS, "stalign", "stalign-genes-only", "stalign-image-only"}
    for row in rows:
        assert row.low <= row.high
        assert row.interval == "spatial blocks"
    # Generated tissue is easy, and smooth.
    assert by(rows, "ARI", "pca")[0].value > 0.4
    assert by(rows, "neighbours alike", "annotation")[0].value > 0.6
    assert not by(rows, "ARI", "annotation")


def test_domains_need_labels(slides, mini):
    assert domains(Section.of(slides[0]), model=mini) == []


def test_a_section_without_image_has_no_rows_of_images(slides, mini):
    adata = slides[0]
    adata.uns["spatial"]["synthetic_visium"]["images"] = {}
    section = Section.of(adata, label_key="region")
    assert not section.has_image
    rows = domains(section, model=mini, seeds=[0], methods=["stalign*", "colour", "random-encoder"])
    assert {row.method for row in rows} == {"stalign"}
    assert genes(section, [section], model=mini) == []
    assert retrieval(section, model=mini) == []


@pytest.mark.parametrize("name", [name for name in DOMAIN_METHODS if not DOMAIN_METHODS[name].needs_image])
def test_features_of_expression_do_not_depend_on_the_order_of_spots(name, slides):
    adata = slides[0]
    order = np.random.default_rng(0).permutation(adata.n_obs)
    values = [DOMAIN_METHODS[name].features(Section.of(part), None) for part in (adata, adata[order].copy())]
    distances = [np.linalg.norm(block - block[:1], axis=1) for block in (values[0][order], values[1])]
    np.testing.assert_allclose(*distances, rtol=1e-3, atol=1e-2)


def test_banksy_without_weight_on_the_neighbourhood_is_own_expression(sections):
    own = features.components(features.z_scores(features._variable(sections[0].log_expression(), 2000), 10), 20)
    np.testing.assert_allclose(np.abs(features.banksy(sections[0], 0.0)), np.abs(own), rtol=1e-3, atol=1e-2)


def test_colour_and_texture_of_known_patches():
    flat = np.full((2, 8, 8, 3), 51, dtype=np.uint8)
    values = features.colour_texture(flat)
    assert values.shape == (2, 18)
    np.testing.assert_allclose(values[:, :3], 0.2, atol=1e-6)
    np.testing.assert_allclose(values[:, 3:6], -np.log(0.2), atol=1e-5)
    np.testing.assert_allclose(values[:, 6:], 0, atol=1e-5)


def test_random_encoder_is_the_same_each_time_and_leaves_the_seed_alone(sections, mini):
    import torch

    torch.manual_seed(3)
    patch = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    first = features._untrained_features(patch)
    assert first.shape == (3, 512)
    np.testing.assert_array_equal(first, features._untrained_features(patch))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1) == after


def test_methods_by_name_and_pattern():
    assert wanted("pca", None)
    assert wanted("stalign-head", ["stalign*"])
    assert not wanted("pca", ["stalign*"])
    check_methods(["pca", "hest*"])
    with pytest.raises(ValueError, match=r"(?s)'stlign'.*Did you mean 'stalign'"):
        check_methods(["stlign"])


def test_every_method_is_described():
    assert set(DOMAIN_METHODS) <= set(METHODS)
    assert all(METHODS.values())


@pytest.mark.parametrize(
    ("peer", "module", "package"),
    [("graphst", "GraphST.GraphST", "graphst-modern"), ("banksy", "banksy.embed_banksy", "pybanksy")],
)
def test_peers_run_only_when_asked_for(peer, module, package, sections, mini, monkeypatch):
    import sys

    assert not wanted(peer, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        domains(sections[0], model=mini, seeds=[0], methods=[peer])


def test_banksy_finds_the_domains(sections, mini):
    pytest.importorskip("banksy", reason="a peer: pip install pybanksy")
    before = sections[0].adata.X.copy()
    rows = domains(sections[0], model=mini, seeds=[0], methods=["banksy"])
    assert next(row.value for row in rows if row.metric == "ARI") > 0.5
    assert (before != sections[0].adata.X).nnz == 0


# --- genes and retrieval -----------------------------------------------------------------------------------------


def test_top_genes_are_those_that_vary(slides):
    sections = []
    for number, adata in enumerate(slides):
        counts = np.full(adata.shape, 5.0, dtype=np.float32)
        counts[::2, 7] = 500  # varies within sections
        counts[:, 9] = 5 + 400 * number  # varies between them
        counts[:, 11] = 0
        counts[0, 11] = 5000  # varies, in one spot
        adata.X = csr_matrix(counts)
        sections.append(Section.of(adata))
    names = slides[0].var_names
    assert set(top_genes(sections, 2)) == {names[7], names[9]}
    assert names[11] not in top_genes(sections, 100)


def test_genes_that_sections_do_not_share(slides):
    slides[1].var_names = [f"other {number}" for number in range(slides[1].n_vars)]
    with pytest.raises(ValueError, match="0 genes in common"):
        top_genes([Section.of(adata, str(number)) for number, adata in enumerate(slides)])


def test_genes_from_histology(sections, mini):
    rows = genes(sections[0], [sections[1]], model=mini, n_genes=20)
    mean = by(rows, "Pearson r", "mean")[0]
    assert (mean.value, mean.n, mean.interval) == (0, 20, "genes")
    # Colour tells the generated tissues apart.
    assert by(rows, "Pearson r", "ridge-colour")[0].value > 0.2
    assert by(rows, "MSE", "ridge-colour")[0].value < by(rows, "MSE", "mean")[0].value
    for method in ("hest-colour", "hest-stalign", "neighbours-colour", "stalign-head", "stalign-ridge"):
        assert np.isfinite(by(rows, "Pearson r", method)[0].value)
    shares = [row for row in rows if row.metric.startswith("share of genes")]
    assert {row.method for row in shares} == {"stalign-head", "stalign-retrieval", "stalign-ridge"}
    assert all(0 <= row.value <= 1 for row in shares)


def test_the_prediction_does_not_see_the_counts(sections, slides, mini):
    """Counts of the test section are for scoring: other ones change no prediction of the head."""
    from stalign.benchmark._genes import predict_with_head

    names = [gene for gene in mini.predicted_genes if gene in sections[0].adata.var_names][:5]
    other = slides[0]
    other.X = csr_matrix(other.X.toarray()[::-1])
    values = [predict_with_head(part, mini, names) for part in (sections[0], Section.of(other))]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)


def test_retrieval_of_a_perfect_and_a_blind_model(sections, mini, monkeypatch):
    section = sections[0]
    n = section.adata.n_obs
    perfect = np.random.default_rng(0).normal(size=(n, 8))
    monkeypatch.setattr(Section, "side", lambda self, model, part: perfect)
    assert all(row.value == 1 for row in retrieval(section, model=mini, methods=["stalign"]))
    monkeypatch.setattr(Section, "side", lambda self, model, part: np.ones((n, 8)))
    rows = retrieval(section, model=mini, methods=["stalign", "chance"])
    assert all(row.value == 0 for row in rows if row.method == "stalign")
    assert next(row.value for row in rows if row.method == "chance") == pytest.approx(max(1, round(0.01 * n)) / n)


def test_retrieval_by_the_ridge(sections, mini):
    rows = retrieval(sections[0], [sections[1]], model=mini)
    assert {row.method for row in rows} == {"chance", "ridge-colour", "stalign"}
    chance, ridge = (by(rows, "recall@10%, image→gene", name)[0].value for name in ("chance", "ridge-colour"))
    assert ridge > chance


# --- names -------------------------------------------------------------------------------------------------------


def test_marker_scores_of_known_counts(slides, markers):
    adata = slides[0]
    counts = np.ones(adata.shape, dtype=np.float32)
    names = list(markers)
    truth = np.arange(adata.n_obs) % 3
    for number, label in enumerate(names):
        columns = adata.var_names.get_indexer([gene for gene in markers[label] if gene in adata.var_names])
        assert (columns >= 0).all()
        counts[np.ix_(truth == number, columns)] = 60
    adata.X = csr_matrix(counts)
    found = marker_scores(Section.of(adata), markers)
    np.testing.assert_array_equal(found, np.array(names)[truth])


def test_annotation_of_both_kinds(sections, mini, markers):
    rows = annotation(sections[0], [sections[1]], model=mini, markers=markers)
    prior = by(rows, "macro-F1, markers", "prior")[0].value
    assert prior == pytest.approx(1 / 3)
    for what in ("markers", "reference"):
        for method in ("stalign", "stalign-gene", "stalign-image"):
            value = by(rows, f"macro-F1, {what}", method)[0].value
            ratio = by(rows, f"macro-F1 over guessing, {what}", method)[0].value
            bar = max(by(rows, f"macro-F1, {what}", name)[0].value for name in ("majority", "prior"))
            assert ratio == pytest.approx(value / bar)
    assert by(rows, "macro-F1, reference", "expression-prototypes")[0].value > 0.7


def test_prototypes_of_the_section_itself_name_its_spots(sections):
    section = sections[0]
    found = expression_prototypes(section, [section], list(np.unique(section.labels)))
    assert (found == section.labels).mean() > 0.85


def test_undetermined_spots_are_not_scored(sections, mini, markers):
    section = sections[0]
    labels = section.labels.copy()
    labels[:10] = "undetermined"
    rows = annotation(
        Section(section.name, section.adata, labels),
        model=mini,
        markers={**markers, "undetermined": ["ERBB2"]},
        methods=["marker-z"],
    )
    assert rows[0].n == int(np.isin(labels, list(markers)).sum())


def test_few_labels(sections, mini):
    rows = few_shot(sections[0], model=mini, shots=[1, 10], n_draws=3)
    values = {(row.method, row.metric): row.value for row in rows}
    assert values["pca", "macro-F1, 10 a class"] > values["pca", "macro-F1, 1 a class"]
    assert {row.method for row in rows} == {"pca", "pca-niche", "colour", "stalign", "stalign-gene", "stalign-image"}
    for row in rows:
        assert row.interval == "draws"
        assert row.low <= row.value <= row.high


def test_drawn_spots():
    classes = np.repeat([0, 1, -1], [30, 6, 4])
    spots = draw_spots(classes, 10, seed=0)
    assert np.bincount(classes[spots]).tolist() == [10, 3]  # half of the small class, none of the unlabelled
    np.testing.assert_array_equal(spots, draw_spots(classes, 10, seed=0))
    assert not np.array_equal(spots, draw_spots(classes, 10, seed=1))


# --- robustness --------------------------------------------------------------------------------------------------


def test_stain_in_optical_density():
    image = np.array([[[255, 128, 64, 7]]], dtype=np.uint8)
    same = shift_stain(image, np.ones(3), np.zeros(3))
    np.testing.assert_array_equal(same, image)
    changed = shift_stain(image, np.array([1.0, 2.0, 1.0]), np.array([np.log(2), 0, 0]))
    assert changed.ravel().tolist() == [128, 64, 64, 7]
    assert image.ravel().tolist() == [255, 128, 64, 7]


def test_thinned_counts(rng):
    counts = csr_matrix(rng.poisson(4.0, (200, 50)).astype(np.float32))
    half = thin_counts(counts, 0.5, seed=0)
    assert half.dtype == counts.dtype
    assert (half.data == np.rint(half.data)).all()
    assert ((counts - half).toarray() >= 0).all()
    assert half.sum() / counts.sum() == pytest.approx(0.5, abs=0.01)
    assert (thin_counts(counts, 1.0, seed=0) != counts).nnz == 0


def test_robustness(sections, mini, snapshot):
    section = sections[0]
    image = section.adata.uns["spatial"]["synthetic_visium"]["images"]["hires"].copy()
    counts = section.adata.X.copy()
    rows = robustness(section, model=mini)
    metrics = {row.metric for row in rows}
    for change in ("other stain", "half the counts", "a third of the genes missing"):
        assert f"change of ARI: {change}" in metrics
    assert {row.method for row in by(rows, "change of ARI: other stain")} == {"stalign"}
    assert {row.method for row in by(rows, "change of ARI: half the counts")} == {"pca", "smoothed-genes", "stalign"}
    assert len(by(rows, "change of Pearson r of the head: other stain", "stalign-head")) == 1
    untouched = by(rows, "ARI, untouched", "pca")[0].value
    direct = by(domains(section, model=mini, seeds=[0], methods=["pca"]), "ARI")[0].value
    assert untouched == pytest.approx(direct)
    np.testing.assert_array_equal(section.adata.uns["spatial"]["synthetic_visium"]["images"]["hires"], image)
    assert (counts != section.adata.X).nnz == 0
