from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import stalign as sta
from stalign.tl._calibration import reliability


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_bars_are_the_accuracies():
    calibration = reliability(
        np.array([0.95] * 10 + [0.55] * 4), np.array([True] * 8 + [False] * 2 + [True] * 2 + [False] * 2)
    )
    ax = sta.pl.reliability(calibration)
    bars = [bar for bar in ax.patches if bar.get_width() < 0.5]
    assert [round(bar.get_x(), 6) for bar in bars] == [0.5, 0.9]
    assert [bar.get_height() for bar in bars] == pytest.approx([0.5, 0.8])
    assert [text.get_text() for text in ax.texts] == ["4", "10"]
    assert ax.get_title() == f"ECE {calibration.ece:.3f}, 14 spots"
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [[0.55, 0.5], [0.95, 0.8]])
    own = plt.subplots()[1]
    assert sta.pl.reliability(calibration, title="mine", ax=own) is own
    assert own.get_title() == "mine"


def test_something_else_is_refused():
    with pytest.raises(TypeError, match=r"stalign\.tl\.calibration.*float: 0\.4"):
        sta.pl.reliability(0.4)
