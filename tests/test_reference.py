"""The reference: every public function is documented in full, and the examples of the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import stalign as sta

ROOMS = tuple(name for name in sta.__all__ if inspect.ismodule(getattr(sta, name)))
MODULES = (*(f"stalign.{room}" for room in ROOMS), "stalign.models.encoders", "stalign.train.losses")
# Checks without a result.
WITHOUT_RESULT = {"check_counts"}


def public(module: str) -> dict[str, Any]:
    """Functions and classes of a room that are its own, by name."""
    room = importlib.import_module(module)
    names = getattr(room, "__all__", None) or [name for name in vars(room) if not name.startswith(("_", "check_"))]
    found = {name: getattr(room, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if callable(value) and getattr(value, "__module__", "").startswith("stalign")
    }


def functions() -> list[Any]:
    rows = [(f"{module}.{name}", value) for module in MODULES for name, value in public(module).items()]
    return [pytest.param(value, id=name) for name, value in rows if inspect.isfunction(value)]


def sections(docstring: str) -> dict[str, str]:
    """Text under each NumPy heading."""
    parts = re.split(r"^(\w+)\n-{3,}\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_all_rooms_are_looked_at():
    assert {"pp", "tl", "pl", "io", "datasets", "models", "train", "genes", "slide"} <= set(ROOMS)
    assert len(functions()) > 50


@pytest.mark.parametrize("function", functions())
def test_a_function_documents_its_parameters_results_and_an_example(function: Callable[..., Any]):
    found = sections(function.__doc__ or "")
    parameters = inspect.signature(function).parameters
    if parameters:
        described = found.get("Parameters", "")
        names = {
            name.strip().lstrip("*") for line in re.findall(r"^(\S.*)$", described, re.M) for name in line.split(",")
        }
        assert set(parameters) == names
    if function.__name__ not in WITHOUT_RESULT:
        assert found.get("Returns", "").strip()
    assert ">>> " in found.get("Examples", "")


@pytest.mark.parametrize("name", [f"{module}.{name}" for module in MODULES for name in public(module)])
def test_everything_public_has_a_summary_of_one_line(name: str):
    module, _, attribute = name.rpartition(".")
    first, *rest = inspect.cleandoc(getattr(importlib.import_module(module), attribute).__doc__ or "").split("\n")
    assert first.endswith(".")
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    n = 0
    for name, value in public(module).items():
        # Nothing but what the example itself imports.
        for test in finder.find(value, name=f"{module}.{name}", module=False, globs={}):
            runner.run(test)
            n += len(test.examples)
    plt.close("all")
    assert n > 0
    assert runner.summarize(verbose=False).failed == 0
