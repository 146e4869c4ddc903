from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_every_tutorial_is_in_the_documentation_in_order():
    assert len(NOTEBOOKS) >= 6
    index = (FOLDER.parent / "docs" / "index.md").read_text(encoding="utf-8")
    listed = [line.strip() for line in index.splitlines() if line.startswith("generated/tutorials/")]
    assert listed == [f"generated/tutorials/{path.stem}" for path in NOTEBOOKS]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_says_that_its_slide_is_synthetic(notebook):
    text = notebook.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    assert "**synthetic**" in text
    assert "STALIGN_SECTION" in text
    assert not [place for place in ("/home/", "/root/", "/tmp/", "/Users/") if place in text]  # noqa: S108


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_none_is_an_error(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_in_order(notebook, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STALIGN_SECTION", raising=False)
    monkeypatch.delenv("STALIGN_REFERENCE", raising=False)
    namespace: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(code_cells(notebook), start=1):
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), namespace)  # noqa: S102
    plt.close("all")
