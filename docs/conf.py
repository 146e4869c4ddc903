"""Sphinx configuration: every reference must resolve, every warning is an error (``sphinx -W``)."""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path

import stalign

HERE = Path(__file__).parent

project = "stalign"
author = "The stalign developers"
copyright = f"2026, {author}"  # noqa: A001
release = version = stalign.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_autodoc_typehints",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "Thumbs.db", "**.ipynb_checkpoints"]
nitpicky = True

# Links into the documentation of other packages, where it can be reached; without a network the pages are built all the
# same, and these names are shown without a link.
INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "scanpy": "https://scanpy.readthedocs.io/en/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "spatialdata": "https://spatialdata.scverse.org/en/stable/",
    "squidpy": "https://squidpy.readthedocs.io/en/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "zarr": "https://zarr.readthedocs.io/en/stable/",
}


def _reachable(inventories: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Fetch the inventories: an unreachable one would be a warning, and so an error. The first that fails ends it."""
    folder = HERE / "generated" / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, url in inventories.items():
        file = folder / f"{name}.inv"
        if not file.is_file():
            try:
                with urllib.request.urlopen(f"{url}objects.inv", timeout=5) as answer:  # noqa: S310
                    file.write_bytes(answer.read())
            except OSError:
                break
        found[name] = (url, str(file))
    return found


intersphinx_mapping = _reachable(INVENTORIES)

# What is left unresolved where they are not.
nitpick_ignore_regex = [
    (r"py:.*", r"(anndata|dask|distributed|matplotlib|numpy|pandas|safetensors)(\..*)?"),
    (r"py:.*", r"(scanpy|scipy|spatialdata|squidpy|torch|zarr)(\..*)?"),
    (r"py:.*", r"(np|pd|sp|nn|sparse|plt)\..*"),
    (r"py:class", r"(AnnData|Axes|Figure|Path|csr_matrix|ScGPTReport|optional|array|Any)"),
    (r"py:.*", r"(collections|pathlib|typing|os|logging|contextlib)(\..*)?"),
    (
        r"py:(class|exc|obj|data)",
        r"(str|int|float|bool|bytes|dict|list|tuple|set|type|object|None|Ellipsis|types\..*|[A-Z]\w*(Error|Warning))",
    ),
    # Base classes and helpers that are not part of the public interface.
    (r"py:.*", r"stalign\.(\w+\.)*_\w+(\..*)?"),
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tutorials keep the outputs they were saved with; a test executes them

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # sphinx_autodoc_typehints writes them into the parameter list
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = True
napoleon_custom_sections = ["Attributes"]  # a plain list: the members themselves are documented below it
typehints_defaults = "comma"
typehints_document_rtype = False
always_use_bars_union = True
# Types that are imported for checking only cannot always be resolved; they are shown as written.
suppress_warnings = [
    "sphinx_autodoc_typehints.forward_reference",
    "sphinx_autodoc_typehints.guarded_import",
]

html_theme = "sphinx_book_theme"
html_title = "stalign"
html_static_path = ["_static"]
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search field is in the sidebar already
}


def _copy_tutorials() -> None:
    """The notebooks live in ``tutorials/`` at the top; Sphinx reads only what is below ``docs/``."""
    target = HERE / "generated" / "tutorials"
    shutil.rmtree(target, ignore_errors=True)  # none that has gone from tutorials/
    target.mkdir(parents=True)
    for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        shutil.copyfile(notebook, target / notebook.name)


_copy_tutorials()
