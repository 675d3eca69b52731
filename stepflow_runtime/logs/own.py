"""The library's own logger."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final

__all__ = ["report"]

logger: Final = logging.getLogger("stepflow_runtime")


def report(
    level: int, message: str, *args: object, exc: BaseException | None = None
) -> None:
    """Log something, and never raise: a handler of the user's must not end supervision."""
    with suppress(Exception, SystemExit):
        logger.log(level, message, *args, exc_info=exc)
