"""What the ecosystem's list, the package index and CI read: complete, well-formed, and in agreement with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import stalign

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = ROOT / ".github" / "workflows"

# Of the schema of scverse/ecosystem-packages: what an entry must have, and how the values look.
REQUIRED = {
    "name": str,
    "description": str,
    "project_home": str,
    "documentation_home": str,
    "install": dict,
    "license": str,
    "tags": list,
    "version": str,
    "category": str,
    "contact": list,
}
OPTIONAL = {"tutorials_home", "publications", "test_command", "logo", "primary_category", "language"}
CATEGORIES = {"core-framework", "core-datastructure", "core-infrastructure", "ecosystem"}
DOI = r"^10.\d{4,9}\/[-._;()\/:A-Za-z0-9]+$"


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def meta() -> dict[str, Any]:
    return read_yaml(ROOT / ".github" / "meta.yaml")


def test_the_entry_for_the_list_has_what_its_schema_asks_for(meta):
    assert set(REQUIRED) <= set(meta) <= set(REQUIRED) | OPTIONAL
    assert all(isinstance(meta[name], kind) for name, kind in REQUIRED.items())
    for name in ("project_home", "documentation_home", "tutorials_home"):
        assert re.fullmatch(r"https://[\w.-]+/\S*", meta[name])
    assert meta["category"] in CATEGORIES
    assert set(meta["install"]) <= {"pypi", "conda", "cran", "bioconductor"}
    assert meta["install"]
    for name in ("tags", "contact"):
        assert meta[name]
        assert len(set(meta[name])) == len(meta[name])
    assert all(re.fullmatch(r"[A-Za-z\d]+(-[A-Za-z\d]+)*", user) for user in meta["contact"])
    assert all(re.fullmatch(DOI, doi) for doi in meta["publications"])


def test_the_entry_says_what_the_project_says(meta):
    assert meta["name"] == meta["install"]["pypi"] == PROJECT["project"]["name"]
    assert meta["license"] == PROJECT["project"]["license"]


def test_one_version_everywhere(meta):
    citation = read_yaml(ROOT / ".github" / "CITATION.cff")
    version = PROJECT["project"]["version"]
    assert stalign.__version__ == meta["version"] == citation["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_names_software_and_method():
    citation = read_yaml(ROOT / ".github" / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "references"} <= set(citation)
    assert citation["license"] == PROJECT["project"]["license"]
    assert "2411.16793" in str(citation["references"])


def test_the_package_is_typed():
    assert (Path(stalign.__file__).parent / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_groups_stand_on_extras():
    extras = PROJECT["project"]["optional-dependencies"]
    for group in PROJECT["dependency-groups"].values():
        for entry in group:
            inside = re.fullmatch(r"stalign\[([\w,]+)\]", entry)
            assert inside is not None
            assert set(inside[1].split(",")) <= set(extras)


def test_every_dependency_has_a_lower_bound_and_no_pin():
    unbounded = {"pandas-stubs", "scipy-stubs", "types-tqdm", "build"}
    extras = PROJECT["project"]["optional-dependencies"].values()
    for requirement in [*PROJECT["project"]["dependencies"], *(entry for extra in extras for entry in extra)]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert "==" not in requirement
        assert ">=" in requirement or name in unbounded | {"stalign"}


def steps(workflow: str, job: str) -> str:
    commands = read_yaml(WORKFLOWS / f"{workflow}.yml")["jobs"][job]["steps"]
    return "\n".join(step.get("run", "") for step in commands)


def test_ci_runs_on_the_lowest_and_the_highest_python():
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    tested = read_yaml(WORKFLOWS / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert f">={classified[0]}" == PROJECT["project"]["requires-python"]
    assert {classified[0], classified[-1]} <= set(tested)


def test_ci_has_a_job_for_each_promise():
    assert "--resolution lowest-direct" in steps("test", "lowest")
    assert "--pre " in steps("test", "pre-release")
    assert "pre-commit run --all-files" in steps("test", "pre-commit")
    assert "sphinx -W" in steps("test", "docs")
    assert "docs/tutorials.py" in steps("test", "tutorials")


def test_a_release_is_checked_and_published_without_a_secret():
    release = read_yaml(WORKFLOWS / "release.yml")
    # YAML 1.1 reads the key `on` as true.
    assert release[True]["push"]["tags"] == ["v*"]
    assert "GITHUB_REF_NAME" in steps("release", "build")
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert release["jobs"]["publish"]["needs"] == "build"
    assert "secrets." not in (WORKFLOWS / "release.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["bug_report", "feature_request"])
def test_issue_forms_ask_for_what_is_needed(form):
    content = read_yaml(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml")
    assert {"name", "description", "body"} <= set(content)
    identifiers = [entry["id"] for entry in content["body"] if "id" in entry]
    assert len(set(identifiers)) == len(identifiers)
    assert any(entry.get("validations", {}).get("required") for entry in content["body"])
