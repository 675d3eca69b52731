"""Results, and where they go: standard output, or a file that is this user's alone.

Contract: what is written is whole, in UTF-8 whatever the locale is, and harmless to a
terminal. A reader that is gone is a ``BrokenPipeError``.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ..private import check_unplanted
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

    A new one is nobody else's to read, one that is there keeps its mode.

    :raises OSError: if it cannot be, or what is there was put there by a stranger
    """
    check_unplanted(path)
    there = path.stat() if path.exists() else None
    if there is not None and not stat.S_ISREG(there.st_mode):
        path.write_bytes(content)  # /dev/stdout, a pipe: nothing to be put in its place
        return
    target = Path(os.path.realpath(path))
    fd, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(fd, "wb") as file:
            file.write(content)
        if there is not None:
            os.chmod(beside, stat.S_IMODE(there.st_mode))
        os.replace(beside, target)
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
