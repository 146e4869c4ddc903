"""Time, memory and isolation: ``python -m tests.benchmarks.measure MODULE:FUNCTION ARGUMENTS RESULT`` is one child."""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def peak_rss() -> float:
    """Largest resident memory of this process so far, in GB (10⁹ bytes).

    Linux's own high-water mark starts anew with a program; that of ``getrusage`` is inherited from the parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(functions: Mapping[str, Callable[[], float]], repeats: int, *, warm: bool = False) -> dict[str, float]:
    """Call functions in turns, after one call to warm up unless they are ``warm``; return each one's median seconds."""
    for function in () if warm else functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            found[name].append(function())
    return {name: statistics.median(values) for name, values in found.items()}


def isolated(
    target: str, *, threads: int | None = None, processes: int = 1, timeout: float = 900, **arguments: Any
) -> Any:
    """Run ``module:function`` of this package in a process of its own and return what it returns.

    Arguments and result travel as JSON. Several processes are started by ``torchrun``; the first one's result counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        command = [sys.executable, "-m", *(several if processes > 1 else []), "tests.benchmarks.measure"]
        command += [target, json.dumps(arguments), str(result)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if threads is not None:
            env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        subprocess.run(command, env=env, cwd=ROOT, check=True, timeout=timeout)  # noqa: S603
        return json.loads(result.read_text(encoding="utf-8"))


def call(target: str, arguments: Mapping[str, Any]) -> Any:
    """Call ``module:function`` in this process."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"tests.benchmarks.{module}"), name)(**arguments)


def quieten() -> None:
    """No progress bars and notes between the figures."""
    import stalign as sta

    sta.settings.progress = False
    sta.settings.verbosity = "WARNING"


def main() -> None:
    target, arguments, result = sys.argv[1:]
    quieten()
    found = call(target, json.loads(arguments))
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
