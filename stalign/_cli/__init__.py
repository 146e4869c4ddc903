"""Commands around the package's functions; options have the names of the functions' arguments.

Nothing heavy is imported here: ``stalign --help`` should not wait for torch.
"""

from __future__ import annotations

from stalign._cli import _commands, _prepare, _train  # noqa: F401  registers the commands
from stalign._cli._app import app

__all__ = ["app"]
