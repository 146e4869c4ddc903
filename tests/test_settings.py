from __future__ import annotations

import logging
from pathlib import Path

import pytest

from stalign._settings import Settings


@pytest.fixture
def fresh(monkeypatch):
    level = logging.getLogger("stalign").level
    monkeypatch.delenv("STALIGN_CACHE_DIR", raising=False)
    yield Settings()
    logging.getLogger("stalign").setLevel(level)


def test_defaults(fresh):
    assert fresh.device == "auto"
    assert fresh.amp is None
    assert fresh.batch_size is None
    assert fresh.num_workers is None
    assert fresh.compile is False
    assert fresh.progress is True
    assert fresh.seed == 0
    assert fresh.verbosity == logging.INFO
    assert fresh.cache_dir == Path.home() / ".cache" / "stalign"


def test_cache_dir_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STALIGN_CACHE_DIR", str(tmp_path / "here"))
    assert Settings().cache_dir == tmp_path / "here"


@pytest.mark.parametrize(
    ("name", "value"),
    [("device", "cpu"), ("amp", "bf16"), ("batch_size", 3), ("num_workers", 2), ("progress", False), ("seed", 7)],
)
def test_a_good_value_is_kept(fresh, name, value):
    setattr(fresh, name, value)
    assert getattr(fresh, name) == value


def test_cache_dir_and_verbosity_are_converted(fresh):
    fresh.cache_dir = "~/somewhere"
    assert fresh.cache_dir == Path.home() / "somewhere"
    fresh.verbosity = "warning"
    assert fresh.verbosity == logging.WARNING
    fresh.verbosity = 10
    assert fresh.verbosity == logging.DEBUG


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("device", 0, TypeError),
        ("amp", "fp8", ValueError),
        ("batch_size", 0, ValueError),
        ("batch_size", True, ValueError),
        ("batch_size", 2.5, ValueError),
        ("num_workers", -1, ValueError),
        ("progress", "yes", TypeError),
        ("seed", -1, ValueError),
        ("verbosity", "LOUD", ValueError),
        ("verbosity", True, ValueError),
    ],
)
def test_a_bad_value_is_refused_and_changes_nothing(fresh, name, value, error):
    before = getattr(fresh, name)
    with pytest.raises(error, match=name) as caught:
        setattr(fresh, name, value)
    assert repr(value) in str(caught.value)
    assert getattr(fresh, name) == before


def test_an_unknown_setting_is_refused(fresh):
    with pytest.raises(AttributeError, match=r"batchsize.*Available.*batch_size"):
        fresh.batchsize = 3
