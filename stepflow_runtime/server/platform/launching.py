"""Popen, but for a server that is to ignore no signal that this process ignores.

Contract: what is started has the pid, descriptors and environment that Popen gives it. Popen
itself resets what Python ignores (SIGPIPE, SIGXFSZ). Where the program ignores more, or was
started so, a launcher of ours goes before (``server/launcher.py``), for some 10 ms; where
there is no interpreter to run that, it is logged, and the server starts as it is.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...logs.own import report
from ..interpreter import find_interpreter

__all__ = ["popen"]

_PROGRAM: Final = Path(__file__).parent.with_name("launcher.py")

# What Popen resets.
_RESET: Final = {"SIGPIPE", "SIGXFZ", "SIGXFSZ"}


def popen(
    words: Sequence[str],
    *,
    env: Mapping[str, str],
    pass_fds: Sequence[int],
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start a program, with no signal ignored. Blocks until it is executed.

    :raises OSError: if it cannot be
    """
    ignored = _ignored()
    python = find_interpreter() if ignored else None
    if ignored and (python is None or not _PROGRAM.is_file()):
        python = None
        report(
            logging.WARNING,
            "the Stepflow server and its workers ignore %s, as this process does: no "
            "Python interpreter is there to start them otherwise",
            ", ".join(ignored),
        )
    if python is None:
        return subprocess.Popen(words, env=env, pass_fds=pass_fds, **options)
    told, telling = os.pipe()
    try:
        try:
            launcher = [python, "-I", "-S", str(_PROGRAM)]
            process = subprocess.Popen(
                [*launcher, str(telling), env.get("LC_CTYPE", ""), *words],
                env=env,
                pass_fds=[*pass_fds, telling],
                **options,
            )
        finally:
            os.close(telling)
        error = os.read(told, 16)
    finally:
        os.close(told)
    if error:
        with process:  # it has ended
            pass
        raise OSError(int(error), os.strerror(int(error)), words[0])
    return process


def _ignored() -> list[str]:
    """The names of the signals that a child would ignore."""
    ignored = (
        getattr(number, "name", f"signal {number}")  # real-time signals have none
        for number in sorted(signal.valid_signals())
        if signal.getsignal(number) is signal.SIG_IGN
    )
    return [name for name in ignored if name not in _RESET]
