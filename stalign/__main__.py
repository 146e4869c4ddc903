"""The command line: ``stalign`` and ``python -m stalign``."""

from __future__ import annotations

from stalign._cli import app

if __name__ == "__main__":
    app(prog_name="stalign")
