"""The package's logger: says what was written, on stderr, unless the application configured logging itself."""

from __future__ import annotations

import logging

logger = logging.getLogger("stalign")


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
