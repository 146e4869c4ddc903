from __future__ import annotations

import ast
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest

import stalign as sta

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CI = ROOT / ".ci" / "run"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: .+ -->\n\Z")


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a page, but those marked ``<!-- not run: reason -->``."""
    text = page.read_text(encoding="utf-8")
    found = (match for match in _BLOCK.finditer(text) if match[1] == language)
    return [match[2] for match in found if not _NOT_RUN.search(text[: match.start()])]


def marked_line(name: str) -> str:
    text = README.read_text(encoding="utf-8")
    assert text.count(f"<!-- ci: {name} -->") == 1
    _, _, rest = text.partition(f"<!-- ci: {name} -->\n")
    block = _BLOCK.match(rest)
    assert block is not None, f"no code block follows the marker {name!r}"
    lines = block[2].strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_the_two_commands_are_one_line_and_complete():
    demo, test = marked_line("demo"), marked_line("test")
    for line in (demo, test):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert "index" not in line
    assert demo.endswith(".venv/bin/stalign demo")
    assert test.endswith(".venv/bin/python -m pytest")


def test_ci_runs_the_lines_of_the_readme(tmp_path):
    """The script's own extraction, run on the README, gives the marked lines; the lines stand nowhere else."""
    script = CI.read_text(encoding="utf-8")
    assert "pip install" not in script
    start, end = script.index("readme_line() {"), script.index("fresh_copy() {")
    harness = tmp_path / "extract.sh"
    harness.write_text(f'here="$1"\n{script[start:end]}\nreadme_line "$2"\n', encoding="utf-8")
    for name in ("demo", "test"):
        done = subprocess.run(  # noqa: S603
            ["bash", str(harness), str(ROOT), name],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.strip() == marked_line(name)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    if page != README:  # the pages say the same things of a smaller slide
        small = partial(sta.datasets.synthetic_visium, n_rows=20, n_cols=20)
        monkeypatch.setattr(sta.datasets, "synthetic_visium", small)
    namespace: dict[str, object] = {"__name__": "page"}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)  # noqa: S102
    plt.close("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_of_the_repository_are_there(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


ROOMS = ("datasets", "genes", "io", "models", "pl", "pp", "slide", "tl", "train")


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_has_its_row_in_the_reference(room):
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    module = getattr(sta, room)
    rows = {line.strip().rsplit(".", 1)[-1] for line in text.splitlines() if line.startswith("   ")}
    modules = {"losses", "encoders"}  # their members have rows of their own
    assert not set(module.__all__) - rows - modules
    for name in set(module.__all__) & modules:
        public = [n for n, value in vars(getattr(module, name)).items() if not n.startswith("_") and callable(value)]
        own = [n for n in public if getattr(getattr(getattr(module, name), n), "__module__", "").startswith("stalign.")]
        assert not {n for n in own if not n.startswith("check_")} - rows


def _messages() -> list[str]:
    """Every string of the package's source, f-strings with their fields left out."""
    found = []
    for file in Path(sta.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
    return found


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"\*\*[^*\n]*?\"([^\"]+)\"[^*\n]*\*\*", text)
    assert len(quoted) > 20
    messages = _messages()
    fragments = [part.strip() for quote in quoted for part in quote.split("…") if len(part.strip()) > 4]
    missing = [part for part in fragments if not any(part in message for message in messages)]
    assert not missing
