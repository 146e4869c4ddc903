from __future__ import annotations

import warnings

import pytest

from stalign.slide import ScaleWarning, derive_mpp


def test_order_of_trust():
    sources = {
        "user": 0.5,
        "pitch_um": 100.0,
        "pitch_px": 200.0,
        "microns_per_pixel": 0.5,
        "image_mpp": 0.5,
        "spot_diameter_px": 130.0,
    }
    for expected in ("user", "pitch", "microns_per_pixel", "image", "spot_diameter"):
        scale = derive_mpp(**sources)
        assert scale.source == expected
        assert scale.mpp == pytest.approx(0.5)
        assert next(iter(scale.candidates)) == expected
        for name in {"pitch": ("pitch_um", "pitch_px"), "image": ("image_mpp",)}.get(expected, (expected,)):
            sources.pop(name, None)


@pytest.mark.parametrize(("image_mpp", "warns"), [(0.509, False), (0.491, False), (0.515, True), (0.25, True)])
def test_two_per_cent(image_mpp, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scale = derive_mpp(pitch_um=100.0, pitch_px=200.0, image_mpp=image_mpp, library="A1")
    assert scale.mpp == 0.5
    assert bool(caught) == warns
    if warns:
        assert issubclass(caught[0].category, ScaleWarning)
        message = str(caught[0].message)
        assert "A1" in message
        assert "0.5" in message
        assert f"{image_mpp:.4g}" in message


@pytest.mark.parametrize(("diameter", "warns"), [(130.0, False), (140.0, False), (110.0, True)])
def test_ten_per_cent_for_the_spot_diameter(diameter, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        derive_mpp(user=0.5, spot_diameter_px=diameter)
    assert bool(caught) == warns


def test_nothing_known():
    with pytest.raises(ValueError, match=r"'A1' is unknown.*mpp="):
        derive_mpp(library="A1", pitch_px=100.0, spot_diameter_px=50.0, spot_diameter_um=None)
