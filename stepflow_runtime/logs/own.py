"""The library's own logger."""

from __future__ import annotations

import logging
import threading
from typing import Final

__all__ = ["report"]

logger: Final = logging.getLogger("stepflow_runtime")


def report(
    level: int, message: str, *args: object, exc: BaseException | None = None
) -> None:
    """Log something, and never raise: a handler of the user's must not end supervision."""
    try:
        logger.log(level, message, *args, exc_info=exc)
    except (Exception, SystemExit):  # noqa: BLE001, S110 - nobody is left to tell
        pass
    except BaseException:
        # A Ctrl-C is the program's; in a thread of ours nothing is.
        if threading.current_thread() is threading.main_thread():
            raise
