from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from stalign import __version__
from stalign._cli import app
from stalign.benchmark import Row, run, to_frame, to_markdown
from stalign.benchmark._rows import COLUMNS, percentile_interval

runner = CliRunner()
QUICK = ["--sections", "set/0", "--labels", "region", "--methods", "pca", "--seeds", "0"]


def test_run_makes_one_tidy_table(folder, mini, tmp_path):
    out = tmp_path / "table.md"
    table = run(
        folder,
        out=out,
        tasks=["domains", "genes", "few-shot"],
        model=mini,
        seeds=[0, 1],
        sections=["set/0", "set/1", "bare"],
        labels="region",
        methods=["pca", "mean"],
        command="stalign benchmark DATA",
    )
    assert tuple(table.columns) == COLUMNS
    assert set(table["sha256"]) == {mini.provenance.sha256}
    assert set(table["version"]) == {__version__}
    assert not table.duplicated(["task", "metric", "section", "method", "seed"]).any()
    domains = table[table["task"] == "domains"]
    assert set(domains["section"]) == {"set/0", "set/1"}  # the third has no labels
    assert set(domains["seed"]) == {0, 1}
    assert set(table.loc[table["task"] == "genes", "section"]) == {"set/0", "set/1"}  # nor an image
    pd.testing.assert_frame_equal(pd.read_csv(out.with_suffix(".csv"))[["value", "low"]], table[["value", "low"]])
    text = out.read_text(encoding="utf-8")
    assert "stalign benchmark DATA" in text
    assert "| method | set/0 | set/1 |" in text
    assert "- `pca`: log1p" in text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["table.csv", "table.md"]


def test_rows_that_are_not_measured_again_are_kept(folder, mini, tmp_path):
    out = tmp_path / "table.md"
    options = {"out": out, "model": mini, "seeds": [0], "labels": "region"}
    first = run(folder, tasks=["domains"], sections=["set/0"], methods=["pca", "niche-pca"], **options)
    both = run(folder, tasks=["few-shot"], sections=["set/0"], methods=["pca"], **options)
    assert list(dict.fromkeys(both["task"])) == ["domains", "few-shot"]
    again = run(folder, tasks=["domains"], sections=["set/0"], methods=["pca"], **options)
    assert len(again) == len(both)
    assert set(again["method"]) == {"pca", "niche-pca"}
    more = run(folder, tasks=["domains"], sections=["set/1"], methods=["pca"], **options)
    assert len(more) == len(both) + len(first) // 2
    assert len(pd.read_csv(out.with_suffix(".csv"))) == len(more)


def test_an_interrupted_run_keeps_what_is_finished(folder, mini, tmp_path, monkeypatch):
    from stalign.benchmark import _run

    out = tmp_path / "table.md"

    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(_run, "few_shot", fail)
    with pytest.raises(OSError, match="disk full"):
        run(
            *(folder,),
            out=out,
            tasks=["domains", "few-shot"],
            model=mini,
            seeds=[0],
            sections=["set/0"],
            labels="region",
            methods=["pca"],
        )
    assert set(pd.read_csv(out.with_suffix(".csv"))["task"]) == {"domains"}


def test_sections_are_files_of_ones_own(folder, mini):
    path = folder / "set" / "1.h5ad"
    table = run(
        folder, tasks=["domains"], model=mini, seeds=[0], sections=[str(path)], labels="region", methods=["pca"]
    )
    assert set(table["section"]) == {"1"}


def test_one_patient_is_not_learned_from(folder, mini, caplog):
    options = {"tasks": ["genes"], "model": mini, "labels": "region", "methods": ["mean"]}
    table = run(folder, sections=["set/0", "set/1"], **options)
    assert len(table) == 4
    with pytest.raises(ValueError, match="Nothing could be measured"):
        run(folder, sections=["set/0"], **options)


def test_held_back_sections_are_not_learned_from(folder, mini, tmp_path):
    """Without their training sections, two held-back ones of two patients do not stand in for each other."""
    for number, name in enumerate(("her2st/A1", "dlpfc/151510")):
        path = tmp_path / f"{name}.h5ad"
        path.parent.mkdir()
        path.symlink_to(folder / "set" / f"{number}.h5ad")
    with pytest.raises(ValueError, match="Nothing could be measured"):
        run(tmp_path, tasks=["genes"], model=mini, labels="region", methods=["mean"])
    table = run(tmp_path, tasks=["genes"], model=mini, training=["dlpfc/151510"], methods=["mean"])
    assert set(table["section"]) == {"her2st/A1"}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tasks": ["domain"]}, ValueError, "Did you mean 'domains'"),
        ({"tasks": []}, ValueError, "empty"),
        ({"methods": ["pcaa"]}, ValueError, "Did you mean 'pca'"),
        ({"seeds": []}, ValueError, "seeds is empty"),
        ({"sections": []}, ValueError, "sections is empty"),
        ({"sections": ["set/7"]}, FileNotFoundError, r"(?s)set/7.*set/0"),
        ({"training": ["set/8"]}, FileNotFoundError, "set/8"),
        ({"sections": None}, ValueError, r"(?s)her2st/A1.*set/0"),
        ({"labels": "nothing", "tasks": ["domains"]}, ValueError, "Nothing could be measured"),
        ({"model": "no-such-model"}, Exception, "no-such-model"),
    ],
)
def test_bad_input(folder, mini, tmp_path, options, error, match):
    out = tmp_path / "table.md"
    with pytest.raises(error, match=match):
        run(folder, **{"out": out, "model": mini, "sections": ["set/0"], "methods": ["pca"], **options})
    if options.get("labels") is None:
        assert not list(tmp_path.iterdir())


def test_a_foreign_table_is_not_replaced(folder, mini, tmp_path):
    foreign = tmp_path / "table.csv"
    foreign.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of this command"):
        run(folder, out=tmp_path / "table.md", model=mini, sections=["set/0"])
    assert foreign.read_text() == "a,b\n1,2\n"


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "nowhere")


# --- Markdown ----------------------------------------------------------------------------------------------------


def test_markdown_of_known_rows():
    rows = [Row("domains", "ARI", "A", "pca", value, seed, 0.1, 0.5) for seed, value in enumerate((0.2, 0.4))]
    rows += [Row("domains", "ARI", "B", "stalign", 0.75), Row("domains", "ARI", "A", "mine", 1.0)]
    text = to_markdown(to_frame(rows, model="m", sha256="abc", version="1"), command="run it")
    assert "| pca | 0.300 (0.10) [0.10, 0.50] |  |" in text
    assert "| stalign |  | 0.750 |" in text
    assert "| mine | 1.000 |  |" in text
    assert text.index("| pca |") < text.index("| stalign |") < text.index("| mine |")
    assert "run it" in text
    assert "`m`, SHA-256 `abc`, with stalign 1." in text


def test_frame_of_no_rows_has_all_columns():
    table = to_frame([])
    assert tuple(table.columns) == COLUMNS
    assert table.empty


def test_interval_of_nothing():
    assert np.isnan(percentile_interval(np.array([np.nan]))).all()


# --- the command -------------------------------------------------------------------------------------------------


def test_command(folder, tmp_path):
    out = tmp_path / "b.md"
    result = runner.invoke(app, ["benchmark", str(folder), "--out", str(out), "--tasks", "domains,few-shot", *QUICK])
    assert result.exit_code == 0, result.output
    assert "domains: set/0: 6 values" in result.stdout
    table = pd.read_csv(out.with_suffix(".csv"))
    assert set(table["task"]) == {"domains", "few-shot"}
    command = table["command"].iloc[0]
    assert command == (
        "stalign benchmark DATA --out b.md --labels region --tasks domains,few-shot --seeds 0 --sections set/0 "
        "--methods pca"
    )
    assert command in out.read_text(encoding="utf-8")


def test_command_names_no_folders_of_this_machine(folder, tmp_path):
    out = tmp_path / "b.md"
    own = ["--sections", str(folder / "set" / "0.h5ad"), *QUICK[2:]]
    result = runner.invoke(app, ["benchmark", str(folder), "--out", str(out), "--tasks", "domains", *own])
    assert result.exit_code == 0, result.output
    assert str(tmp_path) not in out.with_suffix(".csv").read_text()
    assert str(folder) not in out.with_suffix(".csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "domian"], "Did you mean 'domains'"),
        (["--seeds", "one"], "--seeds must be whole numbers"),
        (["--seeds=-1"], "--seeds must be whole numbers"),
        (["--sections", "set/9"], "There is no section 'set/9'"),
        (["--markers", "none.toml"], "There is no file none.toml"),
        (["--methods", "pcaa"], "Did you mean 'pca'"),
    ],
)
def test_command_with_bad_input(folder, tmp_path, arguments, message):
    out = tmp_path / "b.md"
    result = runner.invoke(app, ["benchmark", str(folder), "--out", str(out), "--sections", "set/0", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


# --- quality -----------------------------------------------------------------------------------------------------


def test_quality_is_left_out_without_its_sections(folder, mini, tmp_path):
    with pytest.raises(ValueError, match="Nothing could be measured"):
        run(folder, tasks=["quality"], model=mini, sections=["set/0"])


def test_quality_rows_join_the_table(folder, mini, monkeypatch):
    from stalign.benchmark import _quality, _run

    made = pd.DataFrame(
        [("quality", "AUROC", "set/0", "inverted image", 0, 0.9, 0.8, 0.95)], columns=list(_quality.COLUMNS)
    )
    asked = {}
    monkeypatch.setattr(_quality, "REAL", "set/0")
    monkeypatch.setattr(_quality, "WRONG_TISSUE", ("set/1", "set/2"))
    monkeypatch.setattr(_quality, "rows", lambda *args, **options: asked.update(options) or made)
    monkeypatch.setattr(mini, "familiarity", mini.familiarity or object())
    table = _run.run(folder, tasks=["quality"], model=mini, sections=["set/0"])
    assert asked == {"real": "set/0", "wrong": ["set/1"]}
    row = table.iloc[0]
    assert (row["value"], row["low"], row["interval"], row["seed"]) == (0.9, 0.8, "spots", 0)
