from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse

import stalign as sta
from stalign import genes as sg
from stalign.slide._library import PatchReader
from stalign.tl import _compute
from stalign.tl._slots import PARTS

WIDTHS = {"": 128, "_spot": 64, "_niche": 64, "_image": 128, "_gene": 128}


def embed(adata: ad.AnnData, model, **kwargs) -> ad.AnnData:
    sta.tl.embed(adata, model=model, progress=False, **kwargs)
    return adata


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def record(adata: ad.AnnData, key: str = "embed") -> dict:
    return adata.uns["stalign"][key]


# --- what is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_fused", [False, True])
def test_slots(slide, make_tiny, unit_fused):
    assert sta.tl.embed(slide, model=make_tiny(unit_fused=unit_fused), progress=False) is None
    assert {name for name in slide.obsm if name.startswith("X_")} == {f"X_stalign{part}" for part in WIDTHS}
    for part, width in WIDTHS.items():
        matrix = slide.obsm[f"X_stalign{part}"]
        assert type(matrix) is np.ndarray
        assert matrix.shape == (120, width)
        assert matrix.dtype == np.float32
        norm = np.linalg.norm(matrix, axis=1)
        if unit_fused or part in ("_image", "_gene"):
            np.testing.assert_allclose(norm, 1, atol=1e-5)
        else:
            assert norm.std() > 1e-3  # as long as the model makes them
        assert matrix.std(axis=0).max() > 1e-3  # spots differ
    assert slide.obsp["niche_connectivities"].shape == (120, 120)
    assert slide.obs["niche_n_spots"].max() == 7
    assert slide.obs["niche_in_image"].between(0, 1).all()


def test_record(slide, tiny):
    entry = record(embed(slide, tiny))
    assert entry["model"] == "tiny"
    assert len(entry["sha256"]) == 64
    assert entry["model_source"] == ""  # never saved
    assert entry["package_version"] == sta.__version__
    assert (entry["device"], entry["dtype"]) == ("cpu", "float32")
    assert (entry["n_neighbors"], entry["spot_um"], entry["niche_um"]) == (6, 80.0, 240.0)
    assert (entry["spot_pixels"], entry["niche_pixels"]) == (16, 16)
    assert entry["modalities"] == ["image", "gene"]
    assert entry["outputs"] == list(PARTS)
    assert entry["mpp"]["S1"] == pytest.approx(5.0, rel=1e-6)
    assert entry["libraries"]["S1"]["n_spots"] == 120
    assert entry["libraries"]["S1"]["modalities"] == ["image", "gene"]
    assert entry["libraries"]["S1"]["colour_mean"].shape == (3,)
    assert entry["genes"]["coverage"] == 1.0
    assert entry["input_transform"].startswith("raw counts of X")


@pytest.mark.parametrize("unit_fused", [False, True])
def test_is_the_model_on_the_slides_patches_and_counts(slide, make_tiny, unit_fused):
    """Everything again by hand: patches, counts over the vocabulary, niche graph, forward, how scales are joined."""
    tiny = make_tiny(unit_fused=unit_fused)
    embed(slide, tiny, batch_size=50)
    geometry = tiny.geometry
    with PatchReader(slide) as reader:
        everything = np.arange(slide.n_obs)
        colour = reader.colours(geometry.spot_um, geometry.spot_pixels)["S1"]
        spot = reader.read(everything, geometry.spot_um, geometry.spot_pixels)
        niche = reader.read(everything, geometry.niche_um, geometry.niche_pixels)
    graph = sg.row_normalise(slide.obsp["niche_connectivities"])
    spot_gene, niche_gene = tiny.preprocess_genes(slide.X, connectivities=graph)
    with torch.inference_mode():
        output = tiny(
            spot_image=tiny.preprocess_spot_image(spot, colour=colour),
            niche_image=tiny.preprocess_niche_image(niche, colour=colour),
            spot_gene=torch.from_numpy(spot_gene),
            niche_gene=torch.from_numpy(niche_gene),
        )

    def unit(matrix: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.normalize(matrix, dim=1).numpy()

    def side_by_side(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a, b], axis=1) / np.sqrt(2)

    scale = unit if unit_fused else torch.Tensor.numpy
    expected = {
        "": side_by_side(scale(output.spot), scale(output.niche)),
        "_spot": scale(output.spot),
        "_niche": scale(output.niche),
        "_image": side_by_side(unit(output.spot_image), unit(output.niche_image)),
        "_gene": side_by_side(unit(output.spot_gene), unit(output.niche_gene)),
    }
    for part, matrix in expected.items():
        np.testing.assert_allclose(slide.obsm[f"X_stalign{part}"], matrix, rtol=1e-4, atol=1e-5, err_msg=part)


def test_sees_the_right_pixels(slide, tiny):
    """Bands of colour run along x; with the axes swapped, a patch would say nothing about its spot's band."""
    embed(slide, tiny)
    image = slide.obsm["X_stalign_image"]
    centred = image - image.mean(axis=0)
    truth = slide.obs["truth"].cat.codes.to_numpy()
    inner = (slide.obs["array_col"] % 8).isin([2, 3, 4, 5]).to_numpy()
    rows = np.flatnonzero(inner)
    centroids = np.stack([centred[truth == code].mean(axis=0) for code in range(3)])
    nearest = ((centred[rows, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == truth[rows]).mean() > 0.95


def test_markers_of_a_gene_by_its_earlier_name(slide, tiny, same):
    other = slide.copy()
    other.var_names = ["HER2" if name == "ERBB2" else name for name in other.var_names]
    same(embed(slide, tiny), embed(other, tiny))
    assert record(other)["genes"]["n_matched"] == 240


@pytest.mark.parametrize("outputs", [["fused"], ["gene", "spot"], "image"])
def test_subset_of_outputs(slide, tiny, outputs):
    whole = embed(slide.copy(), tiny)
    embed(slide, tiny, outputs=outputs)
    names = [outputs] if isinstance(outputs, str) else outputs
    expected = {"X_stalign" if name == "fused" else f"X_stalign_{name}" for name in names}
    assert {name for name in slide.obsm if name.startswith("X_")} == expected
    for name in expected:
        np.testing.assert_allclose(slide.obsm[name], whole.obsm[name], atol=1e-6)
    assert record(slide)["outputs"] == names


def test_matrices_of_an_earlier_call_do_not_stay(slide, tiny):
    embed(slide, tiny)
    embed(slide, tiny, outputs=["fused"])
    assert [name for name in slide.obsm if name.startswith("X_")] == ["X_stalign"]


def test_copy(slide, tiny, snapshot, same):
    before = snapshot(slide)
    result = sta.tl.embed(slide, model=tiny, progress=False, copy=True)
    assert snapshot(slide) == before
    same(result, embed(slide, tiny))


def test_counts_in_a_layer(slide, tiny, same):
    other = slide.copy()
    other.layers["counts"] = other.X.copy()
    other.X = sg.normalise_log1p(other.X)
    embed(other, tiny, layer="counts")
    same(embed(slide, tiny), other)
    assert record(other)["layer"] == "counts"


def test_model_by_folder(slide, tiny, tiny_folder, same):
    other = embed(slide.copy(), str(tiny_folder))
    same(embed(slide, tiny), other)
    assert record(other)["model_source"] == str(tiny_folder)
    assert record(other)["sha256"] != record(slide)["sha256"]  # of the file, not of the tensors


def test_the_model_is_left_as_it_was(slide, make_tiny):
    model = make_tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embed(slide, model)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_settings_are_the_defaults(slide, tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(
        _compute, "_plan_batches", lambda *args, plan=_compute._plan_batches: seen.append(args) or plan(*args)
    )
    monkeypatch.setattr(sta.settings, "_batch_size", 17)
    embed(slide, tiny)
    assert seen[0][2] == 17


# --- what must not matter ----------------------------------------------------------------------------------------


@pytest.fixture
def baseline(embedded):
    return embedded


@pytest.mark.parametrize("batch_size", [1, 7, 120, 4096])
def test_batch_size(slide, tiny_folder, baseline, same, batch_size):
    same(embed(slide, tiny_folder, batch_size=batch_size), baseline, atol=1e-5)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_threads(slide, tiny_folder, baseline, same, num_workers):
    same(embed(slide, tiny_folder, num_workers=num_workers, batch_size=13), baseline)


def test_order_of_spots(slide, tiny_folder, baseline, same):
    order = np.random.default_rng(1).permutation(slide.n_obs)
    same(embed(slide[order].copy(), tiny_folder), baseline[order], atol=1e-4)


def test_order_of_genes(slide, tiny_folder, baseline, same):
    order = np.random.default_rng(2).permutation(slide.n_vars)
    same(embed(slide[:, order].copy(), tiny_folder), baseline, atol=1e-4)


@pytest.mark.parametrize(
    "convert",
    [
        sparse.csc_matrix,
        sparse.csr_array,
        sparse.csc_array,
        lambda X: X.toarray(),
        lambda X: X.astype(np.int64),
        lambda X: X.toarray().astype(np.uint16),
        lambda X: X.astype(np.float64),
        lambda X: np.asfortranarray(X.toarray()),
    ],
    ids=["csc", "csr_array", "csc_array", "dense", "int64", "uint16", "float64", "fortran"],
)
def test_kind_of_matrix(slide, tiny_folder, baseline, same, convert):
    slide.X = convert(slide.X)
    X = slide.X
    before = X.copy()
    same(embed(slide, tiny_folder), baseline)
    assert type(slide.X) is type(X)
    assert (before != slide.X).sum() == 0


def test_order_of_libraries(two_libraries, tiny, same):
    a = embed(two_libraries.copy(), tiny, library_key="library")
    swapped = two_libraries.copy()
    swapped.obs["library"] = swapped.obs["library"].map({"A": "Z", "B": "B"})
    swapped.uns["spatial"] = {"B": swapped.uns["spatial"]["B"], "Z": swapped.uns["spatial"]["A"]}
    same(a, embed(swapped, tiny, library_key="library"))


def test_out_of_memory_goes_on_with_fewer(slide, make_tiny, baseline, same, monkeypatch, caplog):
    model = make_tiny()
    forward, sizes = model.forward, []

    def limited(**inputs):
        n = len(next(iter(inputs.values())))
        if n > 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        sizes.append(n)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", limited)
    same(embed(slide, model, batch_size=60), baseline)
    assert sum(sizes) == 120
    assert max(sizes) == 15
    assert "going on with 15" in caplog.text


def test_mixed_precision_stays_near(slide, tiny, baseline):
    embed(slide, tiny, amp="bf16")
    assert record(slide)["dtype"] == "bfloat16"
    assert slide.obsm["X_stalign"].dtype == np.float32
    cosine = (slide.obsm["X_stalign_image"] * baseline.obsm["X_stalign_image"]).sum(axis=1)
    assert cosine.min() > 0.99
    assert pearson(slide.obsm["X_stalign"], baseline.obsm["X_stalign"]) > 0.99


# --- one side alone ----------------------------------------------------------------------------------------------


def check_image_only(adata: ad.AnnData, baseline: ad.AnnData) -> None:
    assert record(adata)["modalities"] == ["image"]
    assert record(adata)["genes"] == {}
    assert record(adata)["input_transform"] == ""
    assert record(adata)["libraries"]["S1"]["modalities"] == ["image"]
    assert "X_stalign_gene" not in adata.obsm
    np.testing.assert_allclose(adata.obsm["X_stalign_image"], baseline.obsm["X_stalign_image"], atol=1e-5)
    for part in ("", "_spot", "_niche"):
        matrix = adata.obsm[f"X_stalign{part}"]
        assert np.isfinite(matrix).all()
        assert np.abs(matrix - baseline.obsm[f"X_stalign{part}"]).max() > 1e-3


def test_no_genes_at_all(slide, tiny_folder, baseline):
    adata = ad.AnnData(obs=slide.obs, obsm=dict(slide.obsm), uns=slide.uns)
    assert (adata.n_vars, adata.X) == (0, None)
    check_image_only(embed(adata, tiny_folder), baseline)


def test_genes_turned_off(slide, tiny_folder, baseline):
    slide.X = -slide.X.toarray()  # not looked at
    check_image_only(embed(slide, tiny_folder, modalities="image"), baseline)


def test_no_gene_of_the_vocabulary(slide, tiny_folder, baseline, caplog):
    slide.var_names = [f"unheard-{number}" for number in range(slide.n_vars)]
    check_image_only(embed(slide, tiny_folder), baseline)
    assert "None of the 240 genes" in caplog.text
    assert "unheard-0" in caplog.text


def test_no_image(slide, tiny_folder, baseline):
    slide.uns["spatial"]["S1"]["images"] = {}
    embed(slide, tiny_folder)
    assert record(slide)["modalities"] == ["gene"]
    assert record(slide)["libraries"]["S1"]["modalities"] == ["gene"]
    assert "X_stalign_image" not in slide.obsm
    assert slide.obs["niche_in_image"].isna().all()
    np.testing.assert_allclose(slide.obsm["X_stalign_gene"], baseline.obsm["X_stalign_gene"], atol=1e-5)
    assert np.isfinite(slide.obsm["X_stalign"]).all()


def test_no_uns_at_all(slide, tiny_folder, baseline):
    del slide.uns["spatial"]
    embed(slide, tiny_folder)
    assert record(slide)["modalities"] == ["gene"]
    np.testing.assert_allclose(slide.obsm["X_stalign_gene"], baseline.obsm["X_stalign_gene"], atol=1e-5)


def test_image_turned_off(slide, tiny_folder, baseline):
    slide.uns["spatial"]["S1"]["images"] = {"hires": "no picture"}  # not opened
    embed(slide, tiny_folder, modalities=("gene",))
    assert record(slide)["modalities"] == ["gene"]
    assert "X_stalign_image" not in slide.obsm
    np.testing.assert_allclose(slide.obsm["X_stalign_gene"], baseline.obsm["X_stalign_gene"], atol=1e-5)


def test_image_after_genes(slide, tiny_folder, baseline, same):
    """Niches made without an image do not stand in the way of a call that wants it."""
    embed(slide, tiny_folder, modalities=("gene",))
    same(embed(slide, tiny_folder), baseline)


# --- several libraries -------------------------------------------------------------------------------------------


def test_libraries_are_as_alone(two_libraries, make_planted, tiny, same):
    embed(two_libraries, tiny, library_key="library")
    assert record(two_libraries)["mpp"] == pytest.approx({"A": 5.0, "B": 5.0})
    for name, shape in (("A", {}), ("B", {"n_rows": 7, "n_cols": 9})):
        alone = embed(make_planted(name, seed={"A": 1, "B": 2}[name], **shape), tiny)
        part = two_libraries[two_libraries.obs["library"] == name]
        same(part[alone.obs_names], alone, atol=1e-4)


def test_library_without_image(two_libraries, tiny, caplog):
    both = embed(two_libraries.copy(), tiny, library_key="library")
    two_libraries.uns["spatial"]["B"]["images"] = {}
    embed(two_libraries, tiny, library_key="library")
    inside = (two_libraries.obs["library"] == "A").to_numpy()
    image = two_libraries.obsm["X_stalign_image"]
    assert np.isnan(image[~inside]).all()
    np.testing.assert_allclose(image[inside], both.obsm["X_stalign_image"][inside], atol=1e-5)
    for part in ("", "_spot", "_niche", "_gene"):
        assert np.isfinite(two_libraries.obsm[f"X_stalign{part}"]).all()
    gene = two_libraries.obsm["X_stalign_gene"]
    np.testing.assert_allclose(gene, both.obsm["X_stalign_gene"], atol=1e-5)
    libraries = record(two_libraries)["libraries"]
    assert libraries["A"]["modalities"] == ["image", "gene"]
    assert libraries["B"]["modalities"] == ["gene"]
    assert "Libraries B have no image" in caplog.text


def test_images_by_library(two_libraries, tiny, same):
    whole = embed(two_libraries.copy(), tiny, library_key="library")
    spatial = two_libraries.uns["spatial"]
    images = {name: spatial[name]["images"].pop("hires") for name in "AB"}
    embed(two_libraries, tiny, library_key="library", image=images)
    same(two_libraries, whole)
    niche = two_libraries.uns["stalign"]["niche"]["libraries"]
    assert {entry["image_key"] for entry in niche.values()} == {"stalign"}
    same(embed(two_libraries, tiny), whole)  # what was passed is remembered


# --- again, after something changed ------------------------------------------------------------------------------


def test_two_embeddings_side_by_side(slide, tiny, make_tiny, same):
    first = embed(slide.copy(), tiny)
    wide = make_tiny(1, n_neighbors=18, niche_patch={"um": 400.0, "pixels": 16})
    embed(slide, tiny)
    embed(slide, wide, key_added="X_wide")
    alone = embed(first.copy(), wide, key_added="X_wide")
    assert set(slide.uns["stalign"]) == {"niche", "embed", "embed_X_wide"}
    assert record(slide)["n_neighbors"] == 6
    assert record(slide, "embed_X_wide")["n_neighbors"] == 18
    assert record(slide, "embed_X_wide")["key_added"] == "X_wide"
    for part in WIDTHS:
        np.testing.assert_array_equal(slide.obsm[f"X_stalign{part}"], first.obsm[f"X_stalign{part}"])
        np.testing.assert_array_equal(slide.obsm[f"X_wide{part}"], alone.obsm[f"X_wide{part}"])
    # Both records still lead to their own model's answers, although the niches are now those of the second.
    labels = {"immune": ["CD3E", "PTPRC"], "stroma": ["COL1A1", "DCN"]}
    for adata, key, model in ((slide, "X_stalign", tiny), (first, "X_stalign", tiny), (slide, "X_wide", wide)):
        sta.tl.zero_shot_annotate(adata, labels, use_rep=key, model=model, key_added=f"of_{key}")
    np.testing.assert_allclose(
        slide.obsm["of_X_stalign_score"].to_numpy(), first.obsm["of_X_stalign_score"].to_numpy(), atol=1e-4
    )
    with pytest.raises(ValueError, match=r"was made by 'tiny' .*but the model is 'tiny'"):
        sta.tl.zero_shot_annotate(slide, labels, use_rep="X_wide", model=tiny)


def test_fewer_spots_get_niches_of_their_own(slide, tiny, same):
    mask = (slide.obs["array_row"] < 6).to_numpy()
    fresh = embed(slide[mask].copy(), tiny)
    embed(slide, tiny)
    part = slide[mask].copy()
    assert part.obsp["niche_connectivities"].sum() < slide.obsp["niche_connectivities"].sum()
    embed(part, tiny)
    same(part, fresh)
    assert part.uns["stalign"]["niche"]["libraries"]["S1"]["n_spots"] == mask.sum() == 72
    np.testing.assert_array_equal(part.obs["niche_n_spots"], fresh.obs["niche_n_spots"])


def test_a_library_less(two_libraries, tiny, make_planted, same):
    embed(two_libraries, tiny, library_key="library")
    part = two_libraries[two_libraries.obs["library"] == "A"].copy()
    embed(part, tiny)
    alone = embed(make_planted("A", seed=1), tiny)
    same(part[alone.obs_names], alone, atol=1e-4)


@pytest.mark.filterwarnings("ignore::anndata.ImplicitModificationWarning")
def test_view(slide, tiny, same, snapshot):
    embed(slide, tiny)
    before = snapshot(slide)
    mask = (slide.obs["array_row"] < 6).to_numpy()
    fresh = embed(slide[mask].copy(), tiny)
    view = slide[mask]
    embed(view, tiny)
    assert not view.is_view
    same(view, fresh)
    assert snapshot(slide) == before


def test_what_was_passed_is_remembered(slide, tiny):
    embed(slide, tiny, mpp=4.95)
    part = slide[:60].copy()
    embed(part, tiny)
    assert record(part)["mpp"]["S1"] == 4.95


def test_niches_made_before_are_kept(slide, tiny):
    geometry = tiny.geometry
    sta.pp.extract_niches(slide, n_neighbors=6, spot_um=geometry.spot_um, niche_um=geometry.niche_um, key_added="mine")
    embed(slide, tiny)
    assert set(slide.obsp) == {"mine_connectivities"}


# --- to disk and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["both", "image", "gene"])
def test_round_trip(slide, tiny, tmp_path, same, kind):
    embed(slide, tiny, modalities={"both": ("image", "gene")}.get(kind, (kind,)))
    slide.write_h5ad(tmp_path / "slide.h5ad")
    back = ad.read_h5ad(tmp_path / "slide.h5ad")
    same(slide, back, atol=0)
    for key, value in record(slide).items():
        if isinstance(value, (str, int, float)):
            assert record(back)[key] == value
    assert list(record(back)["modalities"]) == record(slide)["modalities"]
    assert float(record(back)["mpp"]["S1"]) == record(slide)["mpp"]["S1"]
    niches = back.obsp["niche_connectivities"].copy()
    same(embed(back, tiny, modalities=record(slide)["modalities"]), slide)  # the record is understood again
    assert (back.obsp["niche_connectivities"] != niches).nnz == 0
    back.write_h5ad(tmp_path / "again.h5ad")


def test_image_from_a_file(slide, tiny_folder, baseline, same, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "slide.tif", slide.uns["spatial"]["S1"]["images"].pop("hires"))
    embed(slide, tiny_folder, image=tmp_path / "slide.tif", num_workers=2, batch_size=40)
    same(slide, baseline)
    assert slide.uns["stalign"]["niche"]["libraries"]["S1"]["image"] == "path"


# --- bad input ---------------------------------------------------------------------------------------------------


def no_coordinates(adata):
    del adata.obsm["spatial"]


def three_coordinates(adata):
    adata.obsm["spatial"] = np.ones((adata.n_obs, 3))


def nan_coordinates(adata):
    adata.obsm["spatial"][3, 0] = np.nan


def infinite_coordinates(adata):
    adata.obsm["spatial"][3, 1] = np.inf


def neither(adata):
    adata.uns["spatial"]["S1"]["images"] = {}
    adata.X = None


def no_scale_factor(adata):
    del adata.uns["spatial"]["S1"]["scalefactors"]["tissue_hires_scalef"]


def too_small_image(adata):
    adata.uns["spatial"]["S1"]["images"]["hires"] = adata.uns["spatial"]["S1"]["images"]["hires"][:100, :100]


def swapped(adata):
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1].copy()


def no_scale(adata):
    del adata.obs["array_row"], adata.obs["array_col"]
    del adata.uns["spatial"]["S1"]["scalefactors"]["spot_diameter_fullres"]
    adata.obsm["spatial"] += np.random.default_rng(0).uniform(-8, 8, (adata.n_obs, 2))


def same_names(adata):
    adata.obs_names = ["a"] * adata.n_obs


def same_genes(adata):
    adata.var_names = ["ERBB2"] * adata.n_vars


def negative(adata):
    adata.X[5, 7] = -2


def fractions(adata):
    adata.X[5, 7] = 1.5


def not_a_number(adata):
    adata.X[5, 7] = np.nan


def unknown_genes(adata):
    adata.uns["spatial"]["S1"]["images"] = {}
    adata.var_names = [f"unheard-{number}" for number in range(adata.n_vars)]


def few_genes(adata):
    names = [f"unheard-{number}" for number in range(adata.n_vars)]
    names[:3] = ["ERBB2", "CD3E", "COL1A1"]
    adata.var_names = names


def two_spatial(adata):
    adata.uns["spatial"]["S2"] = {}


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (no_coordinates, KeyError, r"'spatial' not found in `adata.obsm`.*spatial_key"),
        (three_coordinates, ValueError, r"\(n_spots, 2\) = \(120, 2\), got \(120, 3\)"),
        (nan_coordinates, ValueError, r"NaN or infinite coordinates for 1 of 120 spots: \['S1_3'\]"),
        (infinite_coordinates, ValueError, r"NaN or infinite coordinates for 1 of 120"),
        (neither, ValueError, r"no image .*no counts .*image=.*layer="),
        (no_scale_factor, KeyError, r"'tissue_hires_scalef' not found.*image="),
        (too_small_image, ValueError, r"outside the image\. Spots span x 40 to .*100 × 100"),
        (swapped, ValueError, r"x and y look swapped"),
        (no_scale, ValueError, r"mpp="),
        (same_names, ValueError, r"`obs_names` are not unique: \['a'\].*obs_names_make_unique"),
        (same_genes, ValueError, r"`var_names` are not unique: \['ERBB2'\].*var_names_make_unique"),
        (negative, ValueError, r"`adata\.X` must hold raw counts.*negative values: -2\.0 at row 5, column 7.*layer="),
        (fractions, ValueError, r"`adata\.X` must hold raw counts.*not whole: 1\.5 at row 5, column 7.*layer="),
        (not_a_number, ValueError, r"NaN or infinite values"),
        (unknown_genes, ValueError, r"cover 0 of the 240 genes.*unheard-0.*gene_symbols="),
        (few_genes, ValueError, r"cover 3 of the 240 genes.*unheard-3"),
        (two_spatial, ValueError, r"2 libraries: \['S1', 'S2'\].*library_key"),
    ],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique", "ignore:Variable names are not unique")
def test_bad_slides(slide, tiny, snapshot, spoil, error, message):
    spoil(slide)
    before = snapshot(slide)
    with pytest.raises(error, match=message):
        embed(slide, tiny)
    assert snapshot(slide) == before


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"model": "stalign-mini2"}, (ValueError, KeyError, FileNotFoundError), r"stalign-mini2.*stalign-mini"),
        ({"model": 3}, TypeError, r"model must be .*got int: 3.*stalign-mini"),
        ({"device": "cuda:7"}, ValueError, r"Device 'cuda:7' is not available. Available: \[.*'cpu'\].*auto"),
        ({"device": "gpu"}, ValueError, r"Device 'gpu' is not available"),
        ({"amp": "fp8"}, ValueError, r"amp must be one of .*'bf16'.*got 'fp8'"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
        ({"num_workers": -1}, ValueError, "num_workers must be an integer >= 0, got -1"),
        ({"modalities": ("pixels",)}, ValueError, r"modalities must be one of \['image', 'gene'\], got 'pixels'"),
        ({"modalities": ()}, ValueError, "modalities is empty"),
        ({"outputs": ("spots",)}, ValueError, r"outputs must be one of .*got 'spots'.*Did you mean 'spot'"),
        ({"layer": "count"}, KeyError, r"'count' not found in `adata.layers`. Available: \['counts'\].*'counts'"),
        ({"image_key": "lowres"}, KeyError, r"'lowres' not found .*Available: \['hires'\].*image_key='hires'"),
        ({"spatial_key": "X_spatial"}, KeyError, r"'X_spatial' not found in `adata.obsm`. Available: .*'spatial'"),
        ({"library_key": "slide"}, KeyError, r"'slide' not found in `adata.obs`. Available: .*'library'"),
        ({"organism": "rat"}, ValueError, r"organism must be one of .*got 'rat'"),
        ({"gene_symbols": "symbol"}, KeyError, r"'symbol' not found in `adata.var`"),
        ({"mpp": -1.0}, ValueError, r"mpp of library 'S1' must be a positive number, got -1"),
        ({"image": "nowhere.tif"}, FileNotFoundError, r"nowhere\.tif"),
        ({"image": np.zeros((400, 400, 7), np.uint8)}, ValueError, r"\(400, 400, 7\)"),
    ],
)
def test_bad_arguments(slide, tiny, snapshot, kwargs, error, message):
    slide.layers["counts"] = slide.X.copy()
    before = snapshot(slide)
    with pytest.raises(error, match=message):
        sta.tl.embed(slide, **{"model": tiny, "progress": False, **kwargs})
    assert snapshot(slide) == before


def test_scales_that_contradict_each_other_are_said(slide, tiny):
    with pytest.warns(sta.slide.ScaleWarning, match=r"4\.95|6"):
        embed(slide, tiny, mpp=6.0)


def test_not_an_anndata_or_empty(slide, tiny):
    with pytest.raises(TypeError, match=r"Expected an AnnData, got dict"):
        embed({}, tiny)
    with pytest.raises(ValueError, match=r"empty: 0 spots × 240 genes"):
        embed(slide[:0].copy(), tiny)


@pytest.mark.parametrize(("modalities", "message"), [("image", r"modalities=\('image',\)"), ("gene", "no counts")])
def test_the_side_asked_for_is_not_there(slide, tiny, snapshot, modalities, message):
    if modalities == "image":
        slide.uns["spatial"]["S1"]["images"] = {}
    else:
        slide.X = None
    before = snapshot(slide)
    with pytest.raises(ValueError, match=message):
        embed(slide, tiny, modalities=modalities)
    assert snapshot(slide) == before


def test_a_library_with_neither(two_libraries, tiny, snapshot):
    two_libraries.uns["spatial"]["B"]["images"] = {}
    two_libraries.X = None
    before = snapshot(two_libraries)
    with pytest.raises(ValueError, match=r"Libraries \['B'\] have no image.*there are none.*leave these libraries out"):
        embed(two_libraries, tiny, library_key="library")
    assert snapshot(two_libraries) == before


def test_image_file_that_is_gone(slide, tiny, snapshot, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    file = tmp_path / "slide.tif"
    tifffile.imwrite(file, slide.uns["spatial"]["S1"]["images"].pop("hires"))
    embed(slide, tiny, image=file)
    file.unlink()
    before = snapshot(slide)
    with pytest.raises(FileNotFoundError, match=r"image of library 'S1' is gone: .*slide\.tif.*extract_niches"):
        embed(slide, tiny)
    assert snapshot(slide) == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failing_midway(slide, make_tiny, snapshot, monkeypatch, num_workers):
    model = make_tiny()
    forward, calls = model.forward, []

    def fails_at_last(**inputs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the machine stopped")
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", fails_at_last)
    before = snapshot(slide)
    with pytest.raises(RuntimeError, match="the machine stopped"):
        embed(slide, model, batch_size=30, num_workers=num_workers)
    assert len(calls) == 4
    assert snapshot(slide) == before


def test_failing_while_reading(slide, tiny, snapshot, monkeypatch):
    def fails(self, index, um, pixels):
        raise OSError("the disk is gone")

    embed(slide, tiny)
    monkeypatch.setattr(PatchReader, "read", fails)
    before = snapshot(slide)
    with pytest.raises(OSError, match="the disk is gone"):
        embed(slide, tiny, num_workers=2)
    assert snapshot(slide) == before
