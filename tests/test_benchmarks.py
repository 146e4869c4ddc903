"""Every benchmark runs at a small size and returns lines for the table; no time is judged here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import stalign as sta
from tests.benchmarks import __main__ as command
from tests.benchmarks.measure import call, isolated, peak_rss
from tests.benchmarks.rows import COLUMNS, Row, at_least, at_most, left_open, to_frame, to_markdown


@pytest.fixture(autouse=True)
def quiet():
    before = sta.settings.progress, sta.settings.verbosity
    sta.settings.progress, sta.settings.verbosity = False, "WARNING"
    yield
    sta.settings.progress, sta.settings.verbosity = before


@pytest.mark.parametrize("name", command.BENCHMARKS)
@pytest.mark.filterwarnings("ignore")
def test_every_benchmark_returns_rows(name):
    if name in ("training", "scaling"):
        pytest.importorskip("lightning")
    rows = call(command.BENCHMARKS[name][0], {"data": None, "quick": True})
    assert rows
    for row in rows:
        assert isinstance(row, Row)
        assert row.what
        assert row.how
        assert (row.value or 0) > 0
    assert len(to_frame(name, rows)) == len(rows)


def test_rows_say_whether_a_target_was_reached():
    rows = [at_least("a", 2.0, 1.5, "×", "h"), at_most("b", 2.0, 1.5, "GB", "h"), left_open("c", "≥ 1", "no GPU")]
    assert [row.reached for row in rows] == [True, False, None]
    table = to_frame("some", rows)
    assert table["reached"].tolist() == ["yes", "no", ""]
    assert table["measured"].tolist() == ["2 ×", "2 GB", "left open"]
    text = to_markdown(table, "# Title\n", {"some": "Some speed"})
    assert text.startswith("# Title\n")
    assert "| a | 2 × | ≥ 1.5 × | yes | h |" in text
    assert "## Some speed" in text
    assert "no GPU" in text


@pytest.mark.reference
def test_published_loss_has_the_reference_value(shared: Path):
    """Six passes through a network that knows its answers: the loss is that of the authors' own."""
    torch = pytest.importorskip("torch")
    from stalign.models import STAlignOutput
    from tests.benchmarks.published_step import N_NEGATIVES, Spots, published_loss

    folder = shared / "reference" / "stalign_official"
    known = {key: torch.from_numpy(value) for key, value in np.load(folder / "loss_features.npz").items()}
    answers = []
    for number in range(1 + N_NEGATIVES):
        negative = {key: known[f"{key}_neg"][:, number - 1] for key in ("spot_gene", "niche_gene", "niche_fused")}
        side = {**known, **(negative if number else {})}
        tokens = {key: side[key].unflatten(1, (8, 512)) for key in ("niche_image", "niche_gene")}
        answers.append(
            STAlignOutput(
                spot_image=side["spot_image"],
                spot_gene=side["spot_gene"],
                spot=side["spot_fused"],
                niche=side["niche_fused"],
                **tokens,
            )
        )
    calls = iter(answers)
    spots = Spots(*[torch.zeros(4, 1)] * 4)
    loss = published_loss(lambda **inputs: next(calls), spots, [spots] * N_NEGATIVES)
    expected = json.loads((folder / "loss_expected.json").read_text())["total"]
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_published_step_trains_everything_through_six_passes():
    torch = pytest.importorskip("torch")
    from tests.benchmarks.published_step import PublishedStep, random_spots
    from tests.benchmarks.training import build

    model = build("published", tiny=True)
    passes = []
    model.register_forward_hook(lambda module, inputs, output: passes.append(torch.is_grad_enabled()))
    spots = [random_spots(model, 3, features=False, seed=i) for i in range(6)]
    PublishedStep(model, 3)(spots[0], spots[1:])
    assert passes == [True] * 6
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert model.branch("niche_image").encoder.vit.patch_embed.proj.weight.grad.abs().sum() > 0


def test_uni_has_the_published_number_of_operations():
    from stalign.models import encoders
    from tests.benchmarks.gpu import vit_flops

    uni = encoders.build_image_encoder("uni", depth=1)
    # 123.11 GFLOP in all, of which 0.308 is the embedding of the patches.
    assert (vit_flops(uni) - 0.308e9) * 24 + 0.308e9 == pytest.approx(123.11e9, rel=1e-3)


def test_a_child_has_a_memory_of_its_own():
    # The child does next to nothing; what this process holds must not be counted.
    assert 0 < isolated("measure:peak_rss") < peak_rss()


def test_other_lines_of_the_table_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "performance.md"
    monkeypatch.setattr(command, "BENCHMARKS", {"first": ("x:x", 1), "second": ("y:y", 1)})

    def run(name, arguments):
        return to_frame(name, [Row(f"{name} line", 1.0, "s", "how")]), True

    monkeypatch.setattr(command, "run", run)
    for names in (["second"], ["first"]):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *names, "--out", str(out)])
        assert command.main() == 0
    table = pd.read_csv(out.with_suffix(".csv"))
    assert table["benchmark"].tolist() == ["first", "second"]
    assert set(COLUMNS) <= set(table)
    assert out.read_text().index("first line") < out.read_text().index("second line")


def test_a_benchmark_that_fails_becomes_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    out = tmp_path / "performance.md"
    monkeypatch.setattr(command, "BENCHMARKS", {"broken": ("measure:not_there", 60)})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--out", str(out)])
    assert command.main() == 1
    assert "it failed" in out.read_text()
