"""The interpreter that programs of ours are run by, by their path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["find_interpreter"]


def find_interpreter() -> str | None:
    """Return the path of the interpreter that runs us; None if there is none to be had."""
    # An application of its own (frozen, uwsgi) would take our arguments for its own, too.
    name = Path(sys.executable or "").name.lower()
    is_one = "py" in name and not getattr(sys, "frozen", False)
    return sys.executable if is_one and os.access(sys.executable, os.X_OK) else None
