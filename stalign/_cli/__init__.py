"""Commands around the package's functions; options have the names of the functions' arguments.

Nothing heavy is imported here: ``stalign --help`` should not wait for torch.
"""

from __future__ import annotations

from stalign._cli import _benchmark, _commands, _prepare, _report, _train  # noqa: F401  registers the commands
from stalign._cli._app import app, one_line_a_paragraph

for _command in app.registered_commands:
    if _command.callback is not None:
        _command.help = one_line_a_paragraph(_command.callback.__doc__)

__all__ = ["app"]
