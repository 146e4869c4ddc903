"""The table: what was measured, against which target, and how."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pandas as pd

COLUMNS = ("what", "measured", "target", "reached", "how")


class Row(NamedTuple):
    """One line; ``value`` is ``None`` where nothing was measured, ``reached`` where there is no target."""

    what: str
    value: float | None
    unit: str
    how: str
    target: str = ""
    reached: bool | None = None

    def measured(self) -> str:
        if self.value is None:
            return "left open"
        digits = f"{self.value:,.0f}" if abs(self.value) >= 100 else f"{self.value:.3g}"
        return f"{digits} {self.unit}".strip()


def at_least(what: str, value: float, limit: float, unit: str, how: str) -> Row:
    return Row(what, value, unit, how, f"≥ {limit:,g} {unit}".strip(), bool(value >= limit))


def at_most(what: str, value: float, limit: float, unit: str, how: str) -> Row:
    return Row(what, value, unit, how, f"≤ {limit:,g} {unit}".strip(), bool(value <= limit))


def left_open(what: str, target: str, why: str) -> Row:
    return Row(what, None, "", f"Left open: {why}", target)


def to_frame(benchmark: str, rows: Sequence[Row]) -> pd.DataFrame:
    """Columns of :data:`COLUMNS` after the name of the benchmark, and the bare number with its unit."""
    yes_no = {True: "yes", False: "no", None: ""}
    return pd.DataFrame(
        [
            {
                "benchmark": benchmark,
                "what": row.what,
                "measured": row.measured(),
                "target": row.target,
                "reached": yes_no[row.reached],
                "how": row.how,
                "value": row.value,
                "unit": row.unit,
            }
            for row in rows
        ]
    )


def processor() -> str:
    """Name of the CPU as its maker writes it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def machine() -> str:
    """Describe what the figures were taken on, and when."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "anndata", "squidpy"))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return (
        f"{os.cpu_count()} cores of {processor()}, {memory_gb():.0f} GB of memory; Python {platform.python_version()}, "
        f"{packages}; {today}; load at the start: {load:.1f}"
    )


def to_markdown(table: pd.DataFrame, preface: str, titles: Mapping[str, str]) -> str:
    """Return the preface and one table per benchmark under its title, in the table's order."""
    parts = [preface]
    for name, block in table.groupby("benchmark", sort=False):
        lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in block[list(COLUMNS)].fillna("").to_numpy()]
        parts.append(f"## {titles.get(str(name), name)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)
