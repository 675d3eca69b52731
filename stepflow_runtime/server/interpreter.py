"""The interpreter that programs of ours are run by, by their path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["find_interpreter", "named_interpreter"]


def find_interpreter() -> str | None:
    """Return the path of the interpreter that runs us; None if there is none to be had."""
    name = named_interpreter()
    return name if name is not None and os.access(name, os.X_OK) else None


def named_interpreter() -> str | None:
    """Return it as Python has it, without a look at the file."""
    # An application of its own (frozen, uwsgi) would take our arguments for its own, too.
    name = Path(sys.executable or "").name.lower()
    is_one = "py" in name and not getattr(sys, "frozen", False)
    return sys.executable if is_one else None
