"""Execute the tutorials and keep their outputs: ``python docs/tutorials.py`` (minutes on two cores, no network).

``python docs/tutorials.py 01 05`` executes those whose names begin so. With ``--out FOLDER`` the executed notebooks are
written there and those in ``tutorials/`` stay as they are, e.g. to look at the results of a section of one's own:
``STALIGN_SECTION=slide.h5ad python docs/tutorials.py --out mine``. Needs the extras ``docs`` and ``train``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "tutorials"
LARGEST = 1_000_000  # bytes of a notebook; the repository keeps them with their figures
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

logger = logging.getLogger("tutorials")


def execute(path: Path) -> nbformat.NotebookNode:
    """Run all cells of a notebook in an empty folder, and drop what differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
    notebook.metadata = nbformat.from_dict(_METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join what was printed to one stream in several pieces."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def check(text: str, name: str) -> None:
    """Refuse notebooks that are too large, or that name a place on this machine."""
    if len(text.encode()) > LARGEST:
        raise ValueError(f"{name} has {len(text.encode()):,} bytes, more than {LARGEST:,}: draw smaller figures.")
    machine = (str(ROOT), str(Path.home()), tempfile.gettempdir(), sys.prefix)
    places = [place for place in machine if f"{place}/" in text]
    if places:
        raise ValueError(f"The outputs of {name} name places on this machine: {', '.join(places)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of the names of the notebooks, e.g. 01; all by default")
    parser.add_argument("--out", type=Path, default=TUTORIALS, help="where to write; in place by default")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("traitlets").setLevel(logging.ERROR)
    if os.environ.get("STALIGN_SECTION") and arguments.out == TUTORIALS:
        parser.error("with STALIGN_SECTION pass --out FOLDER: results of real sections do not go into tutorials/.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(TUTORIALS.glob("*.ipynb")) if path.name.startswith(tuple(arguments.names) or "")]
    if not paths:
        parser.error(f"no notebook begins with {' or '.join(arguments.names)}")
    for path in paths:
        start = time.monotonic()
        text = nbformat.writes(execute(path), indent=1, ensure_ascii=False) + "\n"
        if arguments.out == TUTORIALS:
            check(text, path.name)
        (arguments.out / path.name).write_text(text, encoding="utf-8")
        logger.info("%s: %.0f s, %.0f kB", path.name, time.monotonic() - start, len(text.encode()) / 1000)


if __name__ == "__main__":
    main()
