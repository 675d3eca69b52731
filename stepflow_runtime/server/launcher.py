"""The launcher: gives a server the signals that a shell would give it.

Run by path: ``python -I -S launcher.py <fd> <LC_CTYPE> <binary> <arguments>``.

Contract: the binary takes this process's place, with its pid, descriptors, environment and
directory, and no signal is ignored any more. If it cannot be executed, the number of the
error is written to ``fd``; else nothing is, and that is closed.

An ignored signal stays ignored through ``exec``, and a Python that was started by ``nohup``,
as a daemon, or with ``&`` by a script ignores some. There is no other way to be rid of them
in a child than to run something in it; and what runs between fork and exec in a program
with threads must not be Python.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    # What `signal` is made of; its enums would cost a third of the start.
    import _signal as signal

__all__: list[str] = []


def _main(told: int, locale: str, command: list[str]) -> None:
    os.set_inheritable(told, False)
    # Python has set it for itself, where the locale is that of C.
    if locale:
        os.environ["LC_CTYPE"] = locale
    else:
        os.environ.pop("LC_CTYPE", None)
    for number in signal.valid_signals():
        try:
            signal.signal(number, signal.SIG_DFL)
        except OSError:
            pass  # SIGKILL and SIGSTOP, which nobody ignores
    try:
        os.execv(command[0], command)
    except OSError as exc:
        os.write(told, b"%d" % (exc.errno or 0))
        os._exit(127)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
