"""Results, and where they go: standard output, or a file that is this user's alone.

Contract: what is written is whole, in UTF-8 whatever the locale is, and harmless to a
terminal. A reader that is gone is a ``BrokenPipeError``.
"""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ..private import PRIVATE, check_unplanted
from .text import harmless_json

__all__ = ["describe", "print_bytes", "print_json", "write_private"]


def print_json(value: Any) -> None:
    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    print_bytes(harmless_json(text) + b"\n")


def print_bytes(data: bytes) -> None:
    """Write to standard output, at once."""
    sys.stdout.flush()
    write_whole(sys.stdout.fileno(), data)


def write_whole(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_private(path: Path, content: bytes) -> None:
    """Put a file in the place of what is there; half of it never is.

    :raises OSError: if it cannot be
    """
    check_unplanted(path)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_bytes(content)  # /dev/stdout, a pipe: nothing to be put in its place
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
    try:
        try:
            write_whole(fd, content)
        finally:
            os.close(fd)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def describe(result: Any) -> dict[str, Any]:
    """A result in the shape that Stepflow's own schema gives flow results."""
    described: dict[str, Any] = {"outcome": result.status.value}
    if result.is_success:
        described["result"] = result.output
    elif result.error is not None:
        described["error"] = {
            "code": result.error.code,
            "message": result.error.message,
        }
    return {**described, "runId": result.run_id}
