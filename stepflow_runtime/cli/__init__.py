"""The ``stepflow-runtime`` command.

Its libraries come with the extra ``cli``; this module says so where they are missing.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command with this process's arguments, and exit."""
    try:
        from .app import app
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as exc:
        if exc.name not in ("typer", "rich"):
            raise
        sys.exit(
            "the stepflow-runtime command needs its extra: "
            "pip install 'stepflow-runtime[cli]'"
        )
    app()
