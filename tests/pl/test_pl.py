from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

import stalign as sta

GEOMETRY = {"n_neighbors": 18, "spot_um": 100.0, "niche_um": 400.0}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def adata(hexagonal):
    sta.pp.extract_niches(hexagonal, **GEOMETRY)
    hexagonal.obs["region"] = pd.Categorical(np.where(np.arange(81) < 40, "left", "right"))
    hexagonal.uns["region_colors"] = ["#ff0000", "#0000ff"]
    return hexagonal


@pytest.fixture
def two(section_maker, hexagon_array, adata):
    rows, cols, um = hexagon_array(7, 7)
    other = section_maker(rows, cols, um * 2, library="S2")
    both = ad.concat({"S1": adata, "S2": other}, label="sample")
    both.uns["spatial"] = {**adata.uns["spatial"], **other.uns["spatial"]}
    return both


def spots(ax: Axes):
    return ax.collections[0]


def test_spatial_on_the_image(adata, snapshot):
    before = snapshot(adata)
    ax = sta.pl.spatial(adata, color="region")
    assert isinstance(ax, Axes)
    assert ax.get_title() == "region"
    assert len(ax.images) == 1
    colors = spots(ax).get_facecolors()
    np.testing.assert_allclose(colors[0], to_rgba("#ff0000"))
    np.testing.assert_allclose(colors[80], to_rgba("#0000ff"))
    assert snapshot(adata) == before
    # Spot 0 is at full-resolution pixel (100, 100), a quarter of it in the picture; y runs downwards.
    x0, y0 = spots(ax).get_paths()[0].get_extents().get_points().mean(axis=0)
    assert (x0, y0) == pytest.approx((25, 25), abs=1)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_spatial_genes_and_no_colour(adata):
    axes = sta.pl.spatial(adata, color=["ERBB2", "region"], title=["one", "two"])
    assert [ax.get_title() for ax in axes] == ["one", "two"]
    np.testing.assert_allclose(spots(axes[0]).get_array(), np.arange(81))
    assert sta.pl.spatial(adata).get_title() == "S1"
    _figure, ax = plt.subplots()
    assert sta.pl.spatial(adata, color="CD3E", ax=ax) is ax


def test_spatial_by_library(two):
    axes = sta.pl.spatial(two, color=["ERBB2"], library_key="sample")
    assert [ax.get_title() for ax in axes] == ["S1: ERBB2", "S2: ERBB2"]
    assert len(axes[0].images) == 1
    assert len(axes[1].images) == 0
    assert len(spots(axes[1]).get_array()) == 49
    assert axes[1].get_ylim()[0] > axes[1].get_ylim()[1]
    one = sta.pl.spatial(two, color="ERBB2", library_key="sample", library_id="S2")
    assert one.get_title() == "ERBB2"


def test_many_spots_are_dots():
    row, col = (a.ravel() for a in np.mgrid[:200, :200])
    adata = ad.AnnData(obs=pd.DataFrame({"v": row.astype(float)}, index=np.arange(40_000).astype(str)))
    adata.obsm["spatial"] = np.column_stack([col, row]).astype(float)
    ax = sta.pl.spatial(adata, color="v")
    assert len(spots(ax).get_offsets()) == 40_000
    image = np.full((210, 210, 3), 240, np.uint8)
    adata.uns["spatial"] = {"L": {"images": {"hires": image}, "scalefactors": {"tissue_hires_scalef": 1.0}}}
    ax = sta.pl.spatial(adata, color="v")
    assert len(ax.images) == 1


def test_spatial_refusals(adata):
    with pytest.raises(KeyError, match=r"'ERBB' is neither.*Did you mean 'ERBB2'"):
        sta.pl.spatial(adata, color="ERBB")
    with pytest.raises(KeyError, match="'log' not found"):
        sta.pl.spatial(adata, color="ERBB2", layer="log")
    with pytest.raises(ValueError, match="library_id"):
        sta.pl.spatial(adata, library_id="S7")
    with pytest.raises(ValueError, match="2"):
        sta.pl.spatial(adata, color=["ERBB2", "region"], ax=plt.subplots()[1])
    with pytest.raises(KeyError, match=r"palette.*right"):
        sta.pl.spatial(adata, color="region", palette={"left": "red"})


def test_niches(adata):
    axes = sta.pl.niches(adata, [0, 40], size=64)
    assert len(axes) == 5
    assert axes[0].get_title() == "S1"
    boxes = [patch for patch in axes[0].patches if isinstance(patch, Rectangle)]
    # 400 µm are 800 full-resolution pixels, 200 of the picture; 100 µm are 50. Spot 40 is at its place.
    assert sorted({round(box.get_width()) for box in boxes}) == [50, 200]
    x, y = adata.obsm["spatial"][40] * 0.25 - 0.5
    assert boxes[2].get_xy() == pytest.approx((x - 100, y - 100))
    np.testing.assert_array_equal(axes[1].images[0].get_array(), sta.pp.get_patches(adata, 0, size=64)[0])
    np.testing.assert_array_equal(
        axes[4].images[0].get_array(), sta.pp.get_patches(adata, 40, level="niche", size=64)[0]
    )
    members = axes[4].collections[0].get_offsets()
    assert len(members) == 19
    assert np.asarray(members).mean(axis=0) == pytest.approx((31.5, 31.5))


def test_niches_choose_spots(adata, two):
    assert len(sta.pl.niches(adata, n=5)) == 11
    sta.pp.extract_niches(two, library_key="sample", **GEOMETRY)
    assert sta.pl.niches(two, n=2)[0].get_title() == "S1"
    with pytest.raises(ValueError, match="2 libraries"):
        sta.pl.niches(two, [0, 100])
    with pytest.raises(ValueError, match="no image"):
        sta.pl.niches(two, [100])


def test_niches_need_the_record(hexagonal):
    with pytest.raises(KeyError, match="extract_niches"):
        sta.pl.niches(hexagonal)


def test_annotation(adata):
    adata.obs["stalign_annotation"] = pd.Categorical(["tumour"] * 80 + ["unassigned"])
    with pytest.raises(KeyError, match="stalign_annotation_confidence"):
        sta.pl.annotation(adata)
    adata.obs["stalign_annotation_confidence"] = np.linspace(0, 1, 81)
    axes = sta.pl.annotation(adata)
    assert [ax.get_title() for ax in axes] == ["stalign_annotation", "confidence"]
    np.testing.assert_allclose(spots(axes[0]).get_facecolors()[80], to_rgba("#d3d3d3"))
    assert spots(axes[1]).get_clim() == (0, 1)


def test_expression(adata):
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    truth = np.log1p(np.arange(81) / total * 1e4)
    table = pd.DataFrame({"ERBB2": -2.0 * truth + 3, "MKI67": truth}, index=adata.obs_names)
    with pytest.raises(KeyError, match="predict_expression"):
        sta.pl.expression(adata, "ERBB2")
    adata.obsm["stalign_predicted"] = table
    axes = sta.pl.expression(adata, "ERBB2")
    assert [ax.get_title() for ax in axes] == ["ERBB2 measured", "ERBB2 predicted, r = -1.00"]
    np.testing.assert_allclose(spots(axes[0]).get_array(), truth, rtol=1e-5)
    assert [ax.get_title() for ax in sta.pl.expression(adata, "MKI67")] == ["MKI67 predicted"]
    with pytest.raises(KeyError, match=r"'ERBB3' was not predicted.*Did you mean 'ERBB2'"):
        sta.pl.expression(adata, "ERBB3")
    with pytest.raises(TypeError, match=r"one gene, got \['ERBB2', 'MKI67'\]. Call pl.expression once"):
        sta.pl.expression(adata, ["ERBB2", "MKI67"])


def test_expression_from_a_layer(adata):
    adata.layers["stalign_predicted"] = np.repeat(np.arange(81.0)[:, None], 4, axis=1)
    assert sta.pl.expression(adata, "CD3E")[1].get_title().startswith("CD3E predicted, r = ")


@pytest.mark.real
@pytest.mark.parametrize("name", ["her2st/A1", "crc_visium/CRC_16", "dlpfc/151673", "her2st/A3"])
def test_real_sections(real_section, name):
    adata = real_section(name)
    sta.pp.extract_niches(adata, **GEOMETRY)
    ax = sta.pl.spatial(adata, color=adata.var_names[0])
    assert len(ax.images) == bool(adata.uns["metadata"]["has_image"])
    if adata.uns["metadata"]["has_image"]:
        assert len(sta.pl.niches(adata)) == 9


def test_scale_bar_has_its_length(adata):
    ax = sta.pl.spatial(adata, color="region")
    (bar,) = ax.get_lines()
    # 0.5 µm per full-resolution pixel and a quarter of it in the picture: 2 µm per picture pixel.
    (label,) = [text.get_text() for text in ax.texts]
    number, unit = label.split()
    assert np.ptp(bar.get_xdata()) * 2.0 == pytest.approx(float(number) * {"µm": 1, "mm": 1000}[unit])
    assert np.ptp(bar.get_xdata()) <= abs(np.diff(ax.get_xlim())[0]) / 4
    assert not sta.pl.spatial(adata, color="region", scale_bar=False).get_lines()


def test_no_scale_bar_where_the_scale_is_unknown(hexagonal):
    assert not sta.pl.spatial(hexagonal, color="ERBB2").get_lines()


def test_the_view_ends_with_the_picture(adata):
    ax = sta.pl.spatial(adata)
    (x0, x1), (y1, y0) = ax.get_xlim(), ax.get_ylim()
    height, width = adata.uns["spatial"]["S1"]["images"]["hires"].shape[:2]
    assert x0 >= -0.5
    assert y0 >= -0.5
    assert x1 <= width - 0.5
    assert y1 <= height - 0.5
    adata.obsm["spatial"] = adata.obsm["spatial"] - 500.0  # spots beside the picture stay in view
    x, y = adata.obsm["spatial"].min(axis=0) * 0.25
    ax = sta.pl.spatial(adata)
    assert ax.get_xlim()[0] < x
    assert ax.get_ylim()[1] < y


def test_quality(adata):
    with pytest.raises(KeyError, match=r"stalign_ood.*tl\.quality"):
        sta.pl.quality(adata)
    adata.obs["stalign_ood"] = np.linspace(0, 0.8, 81)
    adata.obs["stalign_agreement"] = np.linspace(0.3, 0.6, 81)
    adata.obs["stalign_tissue"] = np.nan
    axes = sta.pl.quality(adata)
    assert [ax.get_title() for ax in axes] == ["Far from what the model knows", "Image and genes agree"]
    # A slide that the model knows well is dark, and shares are drawn from 0 to 1.
    assert spots(axes[0]).get_clim() == (0, 2)
    assert spots(axes[1]).get_clim() == (0, 1)
    np.testing.assert_allclose(spots(axes[0]).get_array(), np.linspace(0, 0.8, 81))
    adata.obs["stalign_ood"] = 7.0
    assert spots(sta.pl.quality(adata)[0]).get_clim() == (0, 7)


def test_bars_say_their_units(adata):
    adata.obsm["stalign_predicted"] = pd.DataFrame({"ERBB2": np.arange(81.0)}, index=adata.obs_names)
    bars = [spots(ax).colorbar for ax in sta.pl.expression(adata, "ERBB2")]
    assert [bar.ax.get_ylabel() for bar in bars] == ["log1p of counts per 10,000"] * 2
