from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import stalign as sta


@pytest.fixture
def log(tmp_path):
    table = pd.DataFrame(
        {
            "step": [0, 10, 20],
            "train/loss": [3.0, 2.0, 1.0],
            "train/spot": [1.5, 1.0, 0.5],
            "validation/C6/recall_at_5_percent": [None, 0.1, 0.2],
        }
    )
    table.to_csv(tmp_path / "training_log.csv", index=False)
    return tmp_path


def test_curves_show_the_logged_values(log):
    axes = sta.pl.training(log, smooth=1)
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes[0].get_lines()}
    assert lines == {"loss (sum)": [3, 2, 1], "spot": [1.5, 1, 0.5]}
    assert axes[1].get_lines()[0].get_ydata().tolist() == [0.1, 0.2]
    plt.close("all")


def test_without_validation_there_is_one_panel(log):
    table = pd.read_csv(log / "training_log.csv").drop(columns="validation/C6/recall_at_5_percent")
    table.to_csv(log / "other.csv", index=False)
    assert len(sta.pl.training(log / "other.csv")) == 1
    plt.close("all")


def test_missing_log(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training log"):
        sta.pl.training(tmp_path)
