"""A notebook's kernel, and its event loop: an interrupt has to wake it.

A leaf. When a cell awaits something, the kernel answers SIGINT by a callback in its loop, and
does not wake that for it: the cell is interrupted when something else happens there, with a
run that takes half an hour after half an hour. asyncio has its loop woken by each signal, from the first
handler on that it is given. So it is given one, for a signal that nobody sends.

Contract: only in the main thread of a kernel, while its loop runs; elsewhere, and where
somebody handles that signal, nothing is changed. SIGINT is not touched.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import suppress
from typing import Any

from .loops import current_loop

__all__ = ["wake_on_interrupts"]


def wake_on_interrupts() -> None:
    """Have the interrupts of this kernel heard at once, if this is one."""
    if not _is_kernel() or threading.current_thread() is not threading.main_thread():
        return
    unused = getattr(signal, "SIGURG", None)
    add_handler = getattr(current_loop(), "add_signal_handler", None)
    if unused is None or add_handler is None:
        return
    if signal.getsignal(unused) is signal.SIG_DFL:  # which ignores it
        with suppress(NotImplementedError):  # on Windows, where signals wake it anyway
            add_handler(unused, _nothing)


def _is_kernel() -> bool:
    get_shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and hasattr(get_shell(), "kernel")


def _nothing() -> None:
    pass
