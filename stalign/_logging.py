"""The package's logger: says what was written, on stderr, unless the application configured logging itself."""

from __future__ import annotations

import logging

logger = logging.getLogger("stalign")


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks; a KeyError would print its message in quotes."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split()) or type(error).__name__


def _attach_handler() -> None:
    if any(getattr(handler, "_stalign", False) for handler in logger.handlers):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # An application with handlers of its own receives the records by propagation; two lines for one would be noise.
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    handler._stalign = True  # type: ignore[attr-defined]
    logger.addHandler(handler)


_attach_handler()
