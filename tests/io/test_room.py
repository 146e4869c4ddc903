from __future__ import annotations

import json
import subprocess
import sys

import stalign as sta


def test_import_is_light():
    code = "import stalign.io, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)  # noqa: S603
    assert not set(json.loads(done.stdout)) & {"torch", "scanpy", "squidpy", "spatialdata", "anndata", "h5py", "PIL"}


def test_every_reader_is_documented():
    for name in sta.io.__all__:
        for part in ("Parameters", "Returns", "Raises", "Examples"):
            assert part in getattr(sta.io, name).__doc__
