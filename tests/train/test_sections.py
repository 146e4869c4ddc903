from __future__ import annotations

import numpy as np
import pytest

import stalign as sta
from stalign.genes import match_names
from stalign.models._config import Geometry
from stalign.train import _shards
from stalign.train._sections import read_section, write_section
from stalign.train._shards import open_section

GEOMETRY = Geometry(n_neighbors=6, spot_um=100.0, niche_um=300.0, spot_pixels=8, niche_pixels=12)
GENES = ("EPCAM", "CD3E", "ERBB2", "KRT8")


@pytest.fixture
def slide(hexagonal):
    """A hand-drawn slide with its niches: spot i has counts (i, 1, 0, 2) of ERBB2, CD3E, COL1A1, EPCAM."""
    sta.pp.extract_niches(hexagonal, n_neighbors=6, spot_um=100.0, niche_um=300.0)
    return hexagonal


def arguments(adata, **changes):
    return {"match": match_names(adata.var_names, GENES), "name": "S1", **changes}


def test_what_a_section_holds(slide, snapshot):
    before = snapshot(slide)
    section = read_section(slide, GEOMETRY, **arguments(slide))
    assert snapshot(slide) == before
    n = slide.n_obs
    expected = np.column_stack([np.full(n, 2), np.ones(n), np.arange(n), np.zeros(n)])
    np.testing.assert_array_equal(section.counts.toarray(), expected)
    np.testing.assert_allclose(section.connectivities.sum(axis=1), 1, rtol=1e-6)
    assert ((section.connectivities != 0) != (slide.obsp["niche_connectivities"] != 0)).nnz == 0
    for level, pixels in (("spot", 8), ("niche", 12)):
        patches = sta.pp.get_patches(slide, level=level, size=pixels)
        np.testing.assert_array_equal(getattr(section, f"{level}_image"), patches)
    mean, sd = section.colour
    values = section.spot_image.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(sd, values.std(axis=0), rtol=1e-4)
    assert (section.patient, section.labels, section.folder) == ("S1", None, None)


def test_on_disk_as_in_memory_however_it_is_cut(slide, tmp_path, monkeypatch):
    slide.obs["annotation"] = ["tumour", None] + ["stroma"] * (slide.n_obs - 2)
    section = read_section(slide, GEOMETRY, **arguments(slide))
    assert list(section.labels[:3]) == ["tumour", "", "stroma"]
    monkeypatch.setattr(_shards, "_BLOCK_BYTES", 7 * 12 * 12 * 3)
    write_section(tmp_path, slide, GEOMETRY, **arguments(slide), meta={"settings": {}, "source": {"path": "x"}})
    stored = open_section(tmp_path / "S1")
    for name in ("spot_image", "niche_image", "labels"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(section, name))
    for name in ("counts", "connectivities"):
        assert (getattr(stored, name) != getattr(section, name)).nnz == 0
    np.testing.assert_array_equal(stored.colour, section.colour)


def test_without_an_image(slide, tmp_path):
    slide.uns["stalign"]["niche"]["libraries"]["S1"]["image"] = "none"
    section = read_section(slide, GEOMETRY, **arguments(slide))
    assert (section.has_image, section.colour) == (False, None)
    write_section(tmp_path, slide, GEOMETRY, **arguments(slide), meta={"settings": {}, "source": {"path": "x"}})
    assert not open_section(tmp_path / "S1").has_image


def test_patients(slide):
    slide.obs["patient"] = "P7"
    assert read_section(slide, GEOMETRY, **arguments(slide)).patient == "P7"
    assert read_section(slide, GEOMETRY, **arguments(slide, patient="P8")).patient == "P8"
    slide.obs["patient"] = ["P7", *["P9"] * (slide.n_obs - 1)]
    with pytest.raises(ValueError, match=r"names 2 patients .*\['P7', 'P9'\]"):
        read_section(slide, GEOMETRY, **arguments(slide))


def test_what_cannot_be_a_section(slide, hexagonal):
    scaled = slide.copy()
    scaled.X = scaled.X * 0.5
    with pytest.raises(ValueError, match="`X of S1` must hold raw counts"):
        read_section(scaled, GEOMETRY, **arguments(slide))
    several = slide.copy()
    several.obs["library"] = ["S1", *["S2"] * (slide.n_obs - 1)]
    several.uns["stalign"]["niche"]["params"]["library_key"] = "library"
    entry = several.uns["stalign"]["niche"]["libraries"]["S1"]
    several.uns["stalign"]["niche"]["libraries"]["S2"] = entry
    with pytest.raises(ValueError, match=r"holds 2 libraries: \['S1', 'S2'\]"):
        read_section(several, GEOMETRY, **arguments(slide))
    del slide.uns["stalign"]
    with pytest.raises(KeyError, match="extract_niches"):
        read_section(slide, GEOMETRY, **arguments(slide))
