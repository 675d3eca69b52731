"""How the commands exit, one table for all of them.

Contract: whatever ends a command's work passes :func:`exits`, which says why on standard
error, in words and without a traceback, and leaves with the code that the table has for it.
What is none of ours to know (a bug) passes as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Final

import typer

__all__ = ["EPILOG", "Exit", "exits", "refuse", "tell"]


class Exit(IntEnum):
    SUCCESS = 0
    FAILED = 1
    WRONG_INPUT = 2
    SERVER_FAILED = 3
    TIMED_OUT = 4
    INTERRUPTED = 130
    BROKEN_PIPE = 141


EPILOG: Final = (
    "Exit codes: 0 success; 1 the flow, or an item, failed (of validate, components and "
    "doctor: they found something wrong); 2 the command, its input or the workflow is wrong; "
    "3 the server could not be started or reached, or was lost; 4 the time limit was over; "
    "130 Ctrl-C; 141 nobody reads the output any more; 143 SIGTERM."
)


def tell(message: str) -> None:
    """Say something on standard error; what a terminal would obey comes out harmless."""
    from .text import printable

    # Whoever closed it does not want to know, and that is no reason to stop.
    with suppress(OSError):
        typer.echo(printable(message), err=True)


def refuse(message: str) -> typer.Exit:
    """The command, its input or the workflow is wrong."""
    tell(f"error: {message}")
    return typer.Exit(Exit.WRONG_INPUT)


@contextmanager
def exits() -> Iterator[None]:
    """Turn what ends the block into words and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None
    except BrokenPipeError:
        _let_go_of_stdout()
        raise typer.Exit(Exit.BROKEN_PIPE) from None
    except Exception as exc:
        code = _code(exc)
        if code is None:
            raise
        tell(f"error: {exc}")
        raise typer.Exit(code) from None


def _code(exc: Exception) -> Exit | None:
    from .. import errors

    if isinstance(exc, errors.RunTimeoutError):
        return Exit.TIMED_OUT
    of_servers = (
        errors.ServerError,
        errors.ConnectionLostError,
        errors.AccessDeniedError,
        errors.ServerFaultError,
        errors.UnsupportedServerError,
    )
    if isinstance(exc, of_servers):
        return Exit.SERVER_FAILED
    # Of what the library raises, a wrong option is a ValueError that names it.
    is_input = isinstance(exc, errors.StepflowError | OSError | ValueError)
    return Exit.WRONG_INPUT if is_input else None


def _let_go_of_stdout() -> None:
    """Python flushes it once more at its end, and would complain."""
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
