"""What a worker says: log records as lines of JSON that name their run and their step.

Contract: standard error is where everything goes, so the runtime's log has it. A traceback
shows what the user wrote, from there on where it begins, and not how it came to be called.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

import msgspec
from stepflow_py.worker import execution_context

from .calling import FunctionFailed, InputRefused, OutputRefused

__all__ = ["report", "set_up"]

_LEVELS: Final = {"WARNING": "WARN", "CRITICAL": "ERROR"}
_KNOWN: Final = ("DEBUG", "INFO", "WARN", "ERROR")

_OURS: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep
_IMPORTING: Final = ("<frozen importlib", os.path.dirname(importlib.__file__) + os.sep)


def set_up() -> None:
    """Have all records, and all that is printed, come into the runtime's log."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    # Five records for each task.
    logging.getLogger("stepflow_py").setLevel(logging.WARNING)


def report(exc: BaseException) -> None:
    """Print why there is no worker, with the traceback of what the user wrote."""
    sys.stderr.write(f"{_traceback(exc)}\n")


class _Lines(logging.Formatter):
    """Records as the server writes its own."""

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelname, record.levelname)
        message = record.getMessage()
        raised = None if record.exc_info is None else record.exc_info[1]
        if raised is not None and not isinstance(raised, InputRefused | OutputRefused):
            message = f"{message}\n{_traceback(raised)}"
        line: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(
                timespec="microseconds"
            ),
            "level": level if level in _KNOWN else "INFO",
            "message": message,
            "target": record.name,
            "file": record.pathname,
            "line": record.lineno,
        }
        if diags := _diags():
            line["diags"] = diags
        return msgspec.json.encode(line, enc_hook=str).decode(errors="replace")


def _traceback(exc: BaseException) -> str:
    if isinstance(exc, FunctionFailed) and exc.__cause__ is not None:
        exc = exc.__cause__
    lines = traceback.format_exception(type(exc), exc, _of_user(exc.__traceback__))
    return "".join(lines).rstrip("\n")


def _diags() -> dict[str, str]:
    now = execution_context.get()
    ids = {"run_id": now.run_id, "flow_id": now.flow_id, "step_id": now.step_id}
    return {name: value for name, value in ids.items() if value is not None}


def _of_user(frames: TracebackType | None) -> TracebackType | None:
    """A traceback from the user's first frame on; whole, if there is none."""
    rest = frames
    while rest is not None:
        file = rest.tb_frame.f_code.co_filename
        if not file.startswith((_OURS, *_IMPORTING)):
            return rest
        rest = rest.tb_next
    return frames
