from __future__ import annotations

import time
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from anndata import AnnData, read_h5ad

from stalign.pp import extract_niches, get_patches
from stalign.pp._niches import PatchReader, open_library_image
from stalign.slide import ScaleWarning

GEOMETRY = {"n_neighbors": 18, "spot_um": 100.0, "niche_um": 400.0}
RED, WHITE = [200, 30, 30], [240, 240, 240]


def entry(adata: AnnData) -> dict:
    return adata.uns["stalign"]["niche"]["libraries"]["S1"]


def test_what_is_written(hexagonal):
    extract_niches(hexagonal, **GEOMETRY)
    record = hexagonal.uns["stalign"]["niche"]
    assert record["params"] == {**GEOMETRY, "spatial_key": "spatial", "library_key": "", "key_added": "niche"}
    assert entry(hexagonal) == {
        "mpp": pytest.approx(0.5),
        "mpp_source": "pitch",
        "mpp_candidates": {"pitch": pytest.approx(0.5), "spot_diameter": pytest.approx(0.5)},
        "grid": "hexagonal",
        "pitch_um": 100.0,
        "n_spots": 81,
        "image": "uns",
        "image_key": "hires",
        "image_path": "",
        "image_scale": 0.25,
        "image_height": 480,
        "image_width": 520,
    }
    assert hexagonal.obs["niche_n_spots"].dtype == np.int32
    assert hexagonal.obs["niche_in_image"].dtype == np.float32


def test_share_in_the_image(hexagonal):
    # The first spot is at (100, 100): 400 µm = 800 pixels reach 300 pixels out on two sides.
    extract_niches(hexagonal, **GEOMETRY)
    assert hexagonal.obs["niche_in_image"].iloc[0] == pytest.approx((500 / 800) ** 2)
    assert hexagonal.obs["niche_in_image"].iloc[40] == 1


def test_copy_and_key_added_and_round_trip(hexagonal, snapshot, tmp_path):
    before = snapshot(hexagonal)
    out = extract_niches(hexagonal, key_added="near", copy=True, **GEOMETRY)
    assert snapshot(hexagonal) == before
    assert {"near_n_spots", "near_in_image"} <= set(out.obs)
    out.write_h5ad(tmp_path / "a.h5ad")
    back = read_h5ad(tmp_path / "a.h5ad")
    assert back.uns["stalign"]["niche"]["libraries"]["S1"]["grid"] == "hexagonal"
    np.testing.assert_array_equal(get_patches(back, [3, 4], size=32), get_patches(out, [3, 4], size=32))


def test_a_view_does_not_change_its_parent(hexagonal, snapshot):
    before = snapshot(hexagonal)
    part = hexagonal[10:60]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extract_niches(part, image=np.full((2000, 2100, 3), 240, np.uint8), **GEOMETRY)
    assert part.obsp["niche_connectivities"].shape == (50, 50)
    assert snapshot(hexagonal) == before


# --- patches -----------------------------------------------------------------------------------------------------


def dotted(hexagonal: AnnData, spot: int, dx_um: float, dy_um: float) -> np.ndarray:
    """Full-resolution image, white, with a blue square of 40 µm at an offset from a spot."""
    image = np.full((1920, 2080, 3), 240, dtype=np.uint8)
    x, y = hexagonal.obsm["spatial"][spot] + np.array([dx_um, dy_um]) / 0.5
    image[round(y) - 40 : round(y) + 40, round(x) - 40 : round(x) + 40] = (20, 40, 200)
    return image


def check_dot(patch: np.ndarray) -> None:
    """The dot lies 80 µm right of and 120 µm above the centre of a patch of 400 µm and 100 pixels: 4 µm per pixel."""
    blue = patch[..., 0] < 100
    rows, columns = np.nonzero(blue)
    assert rows.mean() + 0.5 == pytest.approx(50 - 30, abs=0.6)
    assert columns.mean() + 0.5 == pytest.approx(50 + 20, abs=0.6)
    assert blue.sum() == pytest.approx(100, abs=15)


def test_known_colour_at_a_known_offset_in_the_small_image(hexagonal):
    full = dotted(hexagonal, 40, 80, -120)
    small = full.reshape(480, 4, 520, 4, 3).mean(axis=(1, 3)).astype(np.uint8)
    hexagonal.uns["spatial"]["S1"]["images"]["hires"] = small
    extract_niches(hexagonal, **GEOMETRY)
    check_dot(get_patches(hexagonal, 40, level="niche", size=100)[0])


def test_known_colour_at_a_known_offset_in_arrays_and_files(hexagonal, tmp_path):
    full = dotted(hexagonal, 40, 80, -120)
    with tifffile.TiffWriter(tmp_path / "p.tif") as tif:
        tif.write(full, photometric="rgb", tile=(128, 128), subifds=2)
        for step in (2, 4):
            level = full.reshape(1920 // step, step, 2080 // step, step, 3).mean(axis=(1, 3)).astype(np.uint8)
            tif.write(level, photometric="rgb", tile=(128, 128), subfiletype=1)
    store = zarr.open(str(tmp_path / "a.zarr"), mode="w", shape=full.shape, chunks=(256, 256, 3), dtype="uint8")
    store[:] = full
    expected = {"path": str(tmp_path / "p.tif"), "zarr": str(tmp_path / "a.zarr")}
    for source in (full, tmp_path / "p.tif", str(tmp_path / "a.zarr"), store, {"S1": full}):
        adata = hexagonal.copy()
        extract_niches(adata, image=source, **GEOMETRY)
        check_dot(get_patches(adata, 40, level="niche", size=100)[0])
        assert entry(adata)["image_scale"] == 1
        if source is full:
            assert entry(adata)["image"] == "uns"
            assert adata.uns["spatial"]["S1"]["images"]["stalign"] is full
            assert adata.uns["spatial"]["S1"]["scalefactors"]["tissue_stalign_scalef"] == 1
            assert "stalign" not in hexagonal.uns["spatial"]["S1"]["images"]
        elif source is store:
            assert entry(adata)["image_path"] == expected["zarr"]


def test_source_image_path_is_preferred_when_it_exists(hexagonal, tmp_path):
    full = dotted(hexagonal, 40, 80, -120)
    tifffile.imwrite(tmp_path / "f.tif", full, photometric="rgb", tile=(128, 128))
    hexagonal.uns["spatial"]["S1"]["metadata"] = {"source_image_path": str(tmp_path / "f.tif")}
    extract_niches(hexagonal, **GEOMETRY)
    assert entry(hexagonal)["image"] == "path"
    check_dot(get_patches(hexagonal, 40, level="niche", size=100)[0])
    (tmp_path / "f.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"f\.tif.*again"):
        get_patches(hexagonal, 40)
    extract_niches(hexagonal, **GEOMETRY)
    assert entry(hexagonal)["image"] == "uns"


def test_the_finest_image_is_taken(hexagonal):
    spatial = hexagonal.uns["spatial"]["S1"]
    spatial["images"] = {"lowres": np.full((120, 130, 3), 9, np.uint8), **spatial["images"]}
    spatial["scalefactors"]["tissue_lowres_scalef"] = 0.0625
    extract_niches(hexagonal, **GEOMETRY)
    assert entry(hexagonal)["image_key"] == "hires"
    extract_niches(hexagonal, image_key="lowres", **GEOMETRY)
    assert entry(hexagonal)["image_key"] == "lowres"


def test_a_passed_image_may_have_a_scale_factor(hexagonal):
    image = np.full((480, 520, 3), 240, np.uint8)
    extract_niches(hexagonal, image=image, image_key="hires", **GEOMETRY)
    assert entry(hexagonal)["image_scale"] == 0.25


def test_patches_in_order(hexagonal):
    extract_niches(hexagonal, **GEOMETRY)
    names = hexagonal.obs_names[[70, 0, 40]]
    patches = get_patches(hexagonal, names, size=16)
    assert patches.shape == (3, 16, 16, 3)
    assert patches.dtype == np.uint8
    assert patches[1, 8, 8].tolist() == RED
    assert patches[2, 8, 8].tolist() == WHITE
    np.testing.assert_array_equal(patches, get_patches(hexagonal, [70, 0, 40], size=16))
    mask = np.zeros(81, dtype=bool)
    mask[[0, 40]] = True
    np.testing.assert_array_equal(patches[[1, 2]], get_patches(hexagonal, mask, size=16))
    with pytest.raises(KeyError, match="S1_999"):
        get_patches(hexagonal, ["S1_999"])
    with pytest.raises(IndexError, match="81 spots"):
        get_patches(hexagonal, [81])
    with pytest.raises(ValueError, match="level must be"):
        get_patches(hexagonal, level="tile")


def test_without_extract_niches(hexagonal):
    with pytest.raises(KeyError, match="extract_niches"):
        get_patches(hexagonal)


def test_gene_only_library(section_maker):
    xy = np.random.default_rng(0).uniform(0, 1000, (30, 2))
    adata = section_maker(np.zeros(30), np.zeros(30), xy)
    extract_niches(adata, **GEOMETRY)
    assert np.isnan(entry(adata)["mpp"])
    assert entry(adata)["image"] == "none"
    assert adata.obs["niche_in_image"].isna().all()
    assert open_library_image(adata, "S1") is None
    with PatchReader(adata) as reader:
        assert not reader.has_image.any()
    with pytest.raises(ValueError, match=r"'S1' has no image.*image="):
        get_patches(adata)


# --- what must be refused, and leave no trace --------------------------------------------------------------------


def without_spatial(adata):
    del adata.obsm["spatial"]


def three_columns(adata):
    adata.obsm["spatial"] = np.column_stack([adata.obsm["spatial"], np.zeros(81)])


def with_nan(adata):
    adata.obsm["spatial"][3, 0] = np.nan


def with_inf(adata):
    adata.obsm["spatial"][3, 1] = np.inf


def without_scale_factor(adata):
    del adata.uns["spatial"]["S1"]["scalefactors"]["tissue_hires_scalef"]


def wrong_scale_factor(adata):
    adata.uns["spatial"]["S1"]["scalefactors"]["tissue_hires_scalef"] = 1.0


def swapped(adata):
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1].copy()


def duplicates(adata):
    adata.obs_names = ["a", *adata.obs_names[:-2], "a"]


def duplicate_genes(adata):
    adata.var_names = ["A", "A", "B", "C"]


def no_scale_source(adata):
    del adata.obs["array_row"]
    del adata.uns["spatial"]["S1"]["scalefactors"]["spot_diameter_fullres"]


def nan_image(adata):
    adata.uns["spatial"]["S1"]["images"]["hires"] = np.full((480, 520, 3), np.nan, dtype=np.float32)


def mask_image(adata):
    adata.uns["spatial"]["S1"]["images"]["hires"] = np.zeros((480, 520), dtype=bool)


def second_library(adata):
    adata.uns["spatial"]["S2"] = adata.uns["spatial"]["S1"]


def nothing(adata):
    pass


BAD = [
    (without_spatial, {}, KeyError, r"'spatial' not found in `adata.obsm`"),
    (nothing, {"spatial_key": "X_spatial"}, KeyError, r"X_spatial.*Available: \['spatial'\]"),
    (three_columns, {}, ValueError, r"\(81, 3\)"),
    (with_nan, {}, ValueError, r"NaN or infinite.*S1_3"),
    (with_inf, {}, ValueError, r"NaN or infinite.*S1_3"),
    (nothing, {"image_key": "hirse"}, KeyError, r"'hirse' not found.*\['hires'\].*Did you mean 'hires'"),
    (without_scale_factor, {}, KeyError, "tissue_hires_scalef"),
    (
        wrong_scale_factor,
        {},
        ValueError,
        r"81 spots of library 'S1' lie outside.*x 100 to 1800.*520 × 480.*x 0 to 520, y 0 to 480",
    ),
    (swapped, {}, ValueError, "x and y look swapped"),
    (duplicates, {}, ValueError, "not unique"),
    (duplicate_genes, {}, ValueError, "not unique"),
    (no_scale_source, {}, ValueError, r"scale of library 'S1' is unknown.*mpp="),
    (nan_image, {}, ValueError, "NaN"),
    (mask_image, {}, ValueError, "1-bit"),
    (second_library, {}, ValueError, r"2 libraries.*library_key"),
    (nothing, {"library_key": "sample"}, KeyError, "sample"),
    (nothing, {"image": {"S9": np.zeros((9, 9, 3), np.uint8)}}, KeyError, "S9"),
    (nothing, {"image": "nowhere.tif"}, FileNotFoundError, r"nowhere\.tif"),
    (nothing, {"image": np.zeros((50, 50, 16), np.uint8)}, ValueError, "channel"),
    (nothing, {"image": 3}, TypeError, "int"),
    (nothing, {"mpp": -1.0}, ValueError, "mpp.*-1"),
    (nothing, {"n_neighbors": 0}, ValueError, "n_neighbors.*0"),
    (nothing, {"niche_um": np.nan}, ValueError, "niche_um"),
]


@pytest.mark.parametrize(("spoil", "arguments", "error", "message"), BAD, ids=lambda v: getattr(v, "__name__", None))
def test_bad_input_leaves_no_trace(hexagonal, snapshot, spoil, arguments, error, message):
    spoil(hexagonal)
    before = snapshot(hexagonal)
    with pytest.raises(error, match=message):
        extract_niches(hexagonal, **{**GEOMETRY, **arguments})
    assert snapshot(hexagonal) == before


def test_empty(hexagonal):
    with pytest.raises(ValueError, match="empty: 0 spots"):
        extract_niches(hexagonal[:0].copy(), **GEOMETRY)
    with pytest.raises(TypeError, match="DataFrame"):
        extract_niches(pd.DataFrame(), **GEOMETRY)


def test_two_sections_in_one_library_are_refused(hexagonal, snapshot):
    both = ad.concat([hexagonal, hexagonal], index_unique="-")
    before = snapshot(both)
    with pytest.raises(ValueError, match=r"81 of 162 spots.*several sections.*library_key"):
        extract_niches(both, **GEOMETRY)
    assert snapshot(both) == before


def test_swapped_is_seen_from_the_image_alone(hexagonal):
    """Without array positions, spots outside the image that would lie inside if swapped say the same."""
    del hexagonal.obs["array_row"]
    hexagonal.uns["spatial"]["S1"]["images"]["hires"] = np.full((400, 520, 3), 240, np.uint8)
    swapped(hexagonal)
    with pytest.raises(ValueError, match=r"y 100 to 1800.*x and y look swapped"):
        extract_niches(hexagonal, mpp=0.5, **GEOMETRY)


def test_swapped_is_seen_from_the_recorded_pixels(hexagonal):
    hexagonal.obs["pxl_col_in_fullres"], hexagonal.obs["pxl_row_in_fullres"] = hexagonal.obsm["spatial"].T
    extract_niches(hexagonal, **GEOMETRY)
    del hexagonal.obs["array_row"]
    swapped(hexagonal)
    with pytest.raises(ValueError, match="pxl_col_in_fullres"):
        extract_niches(hexagonal, mpp=0.5, **GEOMETRY)


def test_turned_and_mirrored_slides_are_no_swap(hexagonal):
    xy = hexagonal.obsm["spatial"]
    for turned in (np.array([-1, 1]) * xy, np.array([1, -1]) * xy, np.column_stack([-xy[:, 1], xy[:, 0]])):
        adata = AnnData(obs=hexagonal.obs[["array_row", "array_col"]], obsm={"spatial": turned})
        extract_niches(adata, **GEOMETRY)
        assert adata.uns["stalign"]["niche"]["libraries"]["library"]["mpp"] == pytest.approx(0.5)


def test_one_per_cent_of_spots_may_lie_just_outside(section_maker, hexagon_array):
    rows, cols, um = hexagon_array(12, 12)
    adata = section_maker(rows, cols, um + 20, image=np.full((1200, 1300, 3), 240, np.uint8))
    adata.obsm["spatial"][0] = (-10, 20)
    extract_niches(adata, **GEOMETRY)
    assert adata.obs["niche_in_image"].iloc[0] < 0.5
    adata.obsm["spatial"][1, 1] = -10
    with pytest.raises(ValueError, match="2 of 144 spots"):
        extract_niches(adata, **GEOMETRY)


# --- scale -------------------------------------------------------------------------------------------------------


def test_contradictions_warn(hexagonal, tmp_path):
    with pytest.warns(ScaleWarning, match=r"0\.6 .*0\.5"):
        extract_niches(hexagonal, mpp=0.6, **GEOMETRY)
    assert entry(hexagonal)["mpp_source"] == "user"
    full = np.full((1920, 2080, 3), 240, np.uint8)
    for density, warns in ((20_200, False), (21_000, True)):
        options = {"resolution": (density, density), "resolutionunit": "CENTIMETER", "tile": (128, 128)}
        tifffile.imwrite(tmp_path / f"{density}.tif", full, photometric="rgb", **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ScaleWarning)
            extract_niches(hexagonal, image=tmp_path / f"{density}.tif", **GEOMETRY)
        assert any(issubclass(w.category, ScaleWarning) for w in caught) == warns
        assert entry(hexagonal)["mpp"] == pytest.approx(0.5)
    hexagonal.uns["spatial"]["S1"]["scalefactors"]["spot_diameter_fullres"] = 110.0
    with pytest.warns(ScaleWarning, match="spot_diameter_fullres"):
        extract_niches(hexagonal, **GEOMETRY)


def test_sources_in_turn(hexagonal):
    extract_niches(hexagonal, mpp={"S1": 0.5}, **GEOMETRY)
    assert entry(hexagonal)["mpp_source"] == "user"
    del hexagonal.obs["array_row"]
    extract_niches(hexagonal, **GEOMETRY)
    assert entry(hexagonal)["mpp_source"] == "spot_diameter"
    hexagonal.uns["spatial"]["S1"]["scalefactors"]["microns_per_pixel"] = 0.5
    extract_niches(hexagonal, **GEOMETRY)
    assert entry(hexagonal)["mpp_source"] == "microns_per_pixel"


def test_square_arrays(section_maker):
    row, col = (a.ravel() for a in np.mgrid[1:21, 1:21])
    image = np.full((900, 900, 3), 240, np.uint8)
    adata = section_maker(row, col, np.column_stack([col, row]) * 40.0, image=image, spot_diameter=20.0)
    with pytest.raises(ValueError, match="mpp="):  # a square array of unknown pitch
        extract_niches(adata, **GEOMETRY)
    legacy = adata.copy()
    legacy.obs_names = [f"{c}x{r}" for r, c in zip(row, col, strict=True)]
    extract_niches(legacy, **GEOMETRY)
    assert entry(legacy)["mpp_candidates"] == {"pitch": pytest.approx(5.0), "spot_diameter": pytest.approx(5.0)}
    binned = adata.copy()
    binned.uns["spatial"]["S1"]["scalefactors"]["bin_size_um"] = 8.0
    binned.uns["spatial"]["S1"]["scalefactors"]["spot_diameter_fullres"] = 40.0
    extract_niches(binned, **GEOMETRY)
    assert entry(binned)["mpp"] == pytest.approx(0.2)
    assert entry(binned)["pitch_um"] == 8


SECTIONS = ["her2st/A1", "her2st/A3", "her2st/C2", "her2st/D1", "her2st/F3", "crc_visium/CRC_16", "dlpfc/151510"]
SECTIONS += ["dlpfc/151673", "dlpfc/151674", "lymphnode_visium/V1_Human_Lymph_Node"]


@pytest.mark.real
@pytest.mark.parametrize("name", SECTIONS)
def test_scale_of_real_sections(real_section, name):
    adata = real_section(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScaleWarning)
        extract_niches(adata, **GEOMETRY)
    (found,) = adata.uns["stalign"]["niche"]["libraries"].values()
    assert found["mpp"] == pytest.approx(float(adata.uns["metadata"]["fullres_um_per_px"]), rel=0.02)
    assert found["mpp_source"] == "pitch"
    assert found["grid"] == ("square" if name.startswith("her2st") else "hexagonal")
    has_image = bool(adata.uns["metadata"]["has_image"])
    assert (found["image"] == "uns") == has_image
    if has_image:
        assert get_patches(adata, slice(0, 5), level="niche", size=64).shape == (5, 64, 64, 3)


@pytest.mark.real
def test_unknown_pitch_asks_for_mpp(real_section):
    adata = real_section("breast_dbit/MSTI_1")
    with pytest.raises(ValueError, match=r"'MSTI_1' is unknown.*mpp="):
        extract_niches(adata, **GEOMETRY)
    extract_niches(adata, mpp=0.2, **GEOMETRY)
    assert adata.uns["stalign"]["niche"]["libraries"]["MSTI_1"]["grid"] == "square"


@pytest.mark.real
def test_swapped_real_section(real_section):
    adata = real_section("crc_visium/CRC_16")
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1].copy()
    with pytest.raises(ValueError, match="x and y look swapped"):
        extract_niches(adata, **GEOMETRY)


@pytest.mark.real
def test_speed_on_a_visium_section(real_section):
    """A loop that subsets the AnnData takes about 1.3 ms for each of the 3,106 spots, 4 s in all."""
    adata = real_section("crc_visium/CRC_16")
    extract_niches(adata, **GEOMETRY)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        extract_niches(adata, **GEOMETRY)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1
