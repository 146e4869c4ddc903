from __future__ import annotations

import anndata
import numpy as np
import pytest
from anndata import AnnData

import stalign as sta
from stalign.tl._quality import pair_agreement
from stalign.train._familiarity import set_familiarity

COLUMNS = ["stalign_ood", "stalign_ood_gene", "stalign_ood_image", "stalign_agreement", "stalign_tissue"]


@pytest.fixture(scope="session")
def sections() -> list[AnnData]:
    """Three sections of one tissue: a synthetic one, its counts dealt out at random."""
    whole = sta.datasets.synthetic_visium(n_rows=14, n_cols=12)
    rng = np.random.default_rng(0)
    parts, rest = [], whole.X.astype(np.int64)
    for share in (1 / 3, 1 / 2, 1):
        part, taken = whole.copy(), rest.copy()
        taken.data = rng.binomial(rest.data, share)
        rest = rest - taken
        part.X = taken.astype(np.float32)
        parts.append(part)
    return parts


@pytest.fixture(scope="session")
def bundled():
    return sta.models.load("stalign-mini")


@pytest.fixture(scope="session")
def known(sections, bundled) -> sta.models.STAlign:
    """The bundled model, but what it knows are two synthetic sections."""
    import copy

    from stalign.genes import match_names
    from stalign.train._sections import read_section

    training = []
    for number, adata in enumerate(sections[:2]):
        adata, geometry = adata.copy(), bundled.geometry
        sta.pp.extract_niches(
            adata, n_neighbors=geometry.n_neighbors, spot_um=geometry.spot_um, niche_um=geometry.niche_um
        )
        match = match_names(list(adata.var_names), bundled.genes)
        training.append(read_section(adata, geometry, match=match, name=f"S{number}", patient=f"P{number}"))
    return sta.train.add_familiarity(copy.deepcopy(bundled), training)


@pytest.fixture
def section(sections) -> AnnData:
    return sections[2].copy()


@pytest.fixture(scope="session")
def measured(sections, known) -> AnnData:
    adata = sections[2].copy()
    sta.tl.embed(adata, model=known)
    sta.tl.quality(adata, model=known)
    return adata


def invert(adata: AnnData) -> AnnData:
    entry = adata.uns["spatial"]["synthetic_visium"]
    entry["images"] = {name: 255 - image for name, image in entry["images"].items()}
    return adata


def without_image(adata: AnnData) -> AnnData:
    adata.uns["spatial"]["synthetic_visium"]["images"] = {}
    return adata


def separates(real, foreign, column: str = "stalign_ood") -> float:
    a, b = real.obs[column].to_numpy(), foreign.obs[column].to_numpy()
    return float((b[None] > a[:, None]).mean())


def test_slots(measured):
    assert [measured.obs[name].dtype for name in COLUMNS] == [np.float32] * 5
    assert not measured.obs[COLUMNS].isna().any().any()
    assert measured.obs["stalign_agreement"].between(0, 1).all()
    assert measured.obs["stalign_tissue"].between(0, 1).all()
    record = measured.uns["stalign"]["quality"]
    assert record["libraries"]["synthetic_visium"]["n_spots"] == measured.n_obs
    assert record["libraries"]["synthetic_visium"]["n_shared_genes"] > 500
    assert record["reference"] == "training spots"


def test_known_tissue_is_near(measured):
    assert measured.obs["stalign_ood"].median() < 1.5


def test_inverted_image_is_far(section, measured, known):
    sta.tl.quality(invert(section), model=known)
    assert separates(measured, section) > 0.95
    assert separates(measured, section, "stalign_ood_image") > 0.99
    np.testing.assert_allclose(section.obs["stalign_ood_gene"], measured.obs["stalign_ood_gene"], rtol=1e-4)


def test_shuffled_genes_are_far(section, measured, known):
    section.var_names = np.random.default_rng(0).permutation(section.var_names.to_numpy())
    sta.tl.quality(section, model=known)
    assert separates(measured, section) > 0.99


def test_agreement_is_lost_when_genes_change_places(known):
    # A slide of some size: profiles are averaged over niches of 19 spots, and few of them say nothing about chance.
    section = sta.datasets.synthetic_visium(n_rows=36, n_cols=30)
    sta.tl.quality(section, model=known)
    own = section.obs["stalign_agreement"].mean()
    counts, means = section.X, []
    for seed in range(5):
        section.X = counts[np.random.default_rng(seed).permutation(section.n_obs)]
        sta.tl.quality(section, model=known)
        means.append(section.obs["stalign_agreement"].mean())
    assert abs(np.mean(means) - 0.5) < 0.1
    assert own > max(means)
    assert own > np.mean(means) + 0.1


def test_what_is_missing_is_made_and_not_kept(section, measured, known):
    before = (set(section.obsm), set(section.obsp), set(section.uns.get("stalign", {})))
    sta.tl.quality(section, model=known)
    np.testing.assert_allclose(section.obs[COLUMNS], measured.obs[COLUMNS], rtol=1e-4, atol=1e-3)
    assert (set(section.obsm), set(section.obsp)) == before[:2]
    assert set(section.uns["stalign"]) == {"quality"}


def test_genes_alone_and_image_alone(section, measured, known):
    genes = without_image(section.copy())
    sta.tl.quality(genes, model=known)
    assert genes.obs[["stalign_ood_image", "stalign_agreement", "stalign_tissue"]].isna().all().all()
    np.testing.assert_allclose(genes.obs["stalign_ood"], measured.obs["stalign_ood_gene"], rtol=1e-4)
    image = section[:, :0].copy()
    sta.tl.quality(image, model=known)
    assert image.obs[["stalign_ood_gene", "stalign_agreement"]].isna().all().all()
    np.testing.assert_allclose(image.obs["stalign_ood"], measured.obs["stalign_ood_image"], rtol=1e-4)
    asked = sta.tl.quality(section, model=known, modalities=("image",), copy=True)
    np.testing.assert_allclose(asked.obs["stalign_ood"], measured.obs["stalign_ood_image"], rtol=1e-4)
    assert "stalign_ood" not in section.obs


def test_order_and_libraries_play_no_part(section, measured, known):
    other = without_image(sta.datasets.synthetic_visium(n_rows=10, n_cols=10, seed=7))
    both = anndata.concat({"one": section, "two": other}, label="slide", index_unique="-")
    both.uns["spatial"] = {
        "one": section.uns["spatial"]["synthetic_visium"],
        "two": other.uns["spatial"]["synthetic_visium"],
    }
    both = both[np.random.default_rng(0).permutation(both.n_obs)].copy()
    sta.tl.quality(both, model=known, library_key="slide")
    first = both.obs.loc[[f"{name}-one" for name in section.obs_names], COLUMNS[:3]]
    np.testing.assert_allclose(first, measured.obs[COLUMNS[:3]], rtol=1e-3, atol=1e-3)
    second = both.obs["slide"] == "two"
    assert both.obs.loc[second, "stalign_tissue"].isna().all()
    assert not both.obs.loc[second, "stalign_ood"].isna().any()
    assert set(both.uns["stalign"]["quality"]["libraries"]) == {"one", "two"}


def test_backed_and_saved(section, measured, known, tmp_path):
    section.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sta.tl.quality(backed, model=known)
    np.testing.assert_allclose(backed.obs[COLUMNS], measured.obs[COLUMNS], rtol=1e-4, atol=1e-3)
    backed.file.close()
    measured.copy().write_h5ad(tmp_path / "b.h5ad")
    again = anndata.read_h5ad(tmp_path / "b.h5ad").uns["stalign"]["quality"]
    assert again["libraries"]["synthetic_visium"]["n_spots"] == measured.n_obs


def test_reference_in_place_of_the_training_spots(sections, section, bundled):
    import copy

    blank = set_familiarity(copy.deepcopy(bundled), None)
    real = sta.tl.quality(section, model=blank, reference=sections[:2], copy=True)
    assert real.uns["stalign"]["quality"]["reference"] == "passed"
    foreign = sta.tl.quality(invert(section), model=blank, reference=sections[:2], copy=True)
    assert separates(real, foreign) > 0.9
    assert "stalign" not in sections[0].uns


def test_model_without_statistics(section, bundled, snapshot):
    import copy

    blank = set_familiarity(copy.deepcopy(bundled), None)
    before = snapshot(section)
    with pytest.raises(ValueError, match=r"reference=.*add_familiarity"):
        sta.tl.quality(section, model=blank)
    with pytest.raises(ValueError, match="reference is empty"):
        sta.tl.quality(section, model=blank, reference=[])
    assert snapshot(section) == before


def test_bad_calls(section, known, snapshot):
    before = snapshot(section)
    with pytest.raises(ValueError, match="modalities"):
        sta.tl.quality(section, model=known, modalities=("sound",))
    with pytest.raises(KeyError, match="counts"):
        sta.tl.quality(section, model=known, layer="counts")
    with pytest.raises(ValueError, match="at least 50 genes"):
        sta.tl.quality(without_image(section[:, :40].copy()), model=known)
    scaled = section.copy()
    scaled.X = scaled.X * 0.5
    with pytest.raises(ValueError, match="raw counts"):
        sta.tl.quality(scaled, model=known)
    assert snapshot(section) == before


def test_statistics_travel_with_the_checkpoint(known, section, measured, tmp_path):
    again = sta.models.load(known.save(tmp_path / "m", dtype="float16"))
    sta.tl.quality(section, model=again)
    np.testing.assert_allclose(section.obs["stalign_ood"], measured.obs["stalign_ood"], atol=0.1)


def test_agreement_of_pairs_made_by_hand():
    axes = np.eye(4, dtype=np.float32)
    places = np.arange(8.0).reshape(4, 2)
    np.testing.assert_allclose(pair_agreement(axes, axes, places), 1)
    # Every image has its neighbour's genes: its own pair ties with two of the mismatched three, and loses to the other.
    np.testing.assert_allclose(pair_agreement(axes, np.roll(axes, 1, axis=0), places), (2 * 0.5) / 3)
    assert np.isnan(pair_agreement(axes[:1], axes[:1], places[:1])).all()
