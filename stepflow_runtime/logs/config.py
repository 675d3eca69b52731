"""LogConfig: what the server logs, and where its lines go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["LEVELS", "LogConfig"]

LEVELS: Final = ("trace", "debug", "info", "warn", "error")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How the server's log lines are made and where they go.

    Every line becomes a :class:`~stepflow_runtime.LogEntry`: the newest are kept for
    :meth:`~stepflow_runtime.StepflowRuntime.get_recent_logs`, and each goes to the Python
    logger.

    :ivar level: the least severe level that the server logs: ``"trace"``, ``"debug"``,
        ``"info"``, ``"warn"`` or ``"error"``
    :ivar python_logger: the name of the Python logger, or None for no logger
    :ivar keep: how many of the newest entries are kept, as long as they are not over
        32 Mi characters together
    :raises ValueError: naming the field, if a value is not one of these
    """

    level: str = "info"
    python_logger: str | None = "stepflow.server"
    keep: int = 2000

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(
                f"log_config.level must be one of {', '.join(LEVELS)}, not {self.level!r}"
            )
        if not (self.python_logger is None or isinstance(self.python_logger, str)):
            raise ValueError(
                "log_config.python_logger must be the name of a logger or None, not "
                f"{self.python_logger!r}"
            )
        if type(self.keep) is not int or self.keep < 1:
            raise ValueError(
                f"log_config.keep must be a whole number from 1 on, not {self.keep!r}"
            )
