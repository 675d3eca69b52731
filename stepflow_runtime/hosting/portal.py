"""A supervisor in a background thread, with an event loop of its own.

Contract: from :meth:`Portal.open` on there is a thread that keeps the server; it ends when
the server is stopped or lost for good, and the server is gone when it has ended. Nothing
of the caller's runs in it but the callbacks that were handed in: calls are made in the
callers' own loops. It is a daemon, and waits for no thread that is not: an interpreter
that ends joins all others before it tells anybody. What is still there when the program
ends is stopped then.
"""

from __future__ import annotations

import atexit
import logging
import threading
from contextlib import suppress
from typing import Final

import anyio

from ..errors import ServerError, ServerStartError
from ..forks import forget_in_child
from ..logs.own import report
from ..server.supervisor import Supervisor
from ..threads import run_abandonable
from .signals import begin_end, prepare_last_word

__all__ = ["Portal"]

# From the end of the server to that of the thread there are microseconds; unless an
# on_crash is still running, which has a time of its own.
_LAST_BREATH: Final = 0.3

_open: set[Portal] = set()


class Portal:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._thread = threading.Thread(
            target=self._run, name="stepflow-runtime", daemon=True
        )

    def open(self) -> None:
        """Start the thread, and with it the server. Does not wait for either.

        :raises ServerStartError: if there is no thread to be had
        """
        self._supervisor.begin()
        _open.add(self)
        forget_in_child(self)
        try:
            self._thread.start()
        except BaseException as exc:
            # There is no thread to be had; or a KeyboardInterrupt came, and then there may
            # be one, which ends at once.
            _open.discard(self)
            error = ServerStartError(f"no thread for the server's supervisor: {exc!r}")
            self._supervisor.give_up_start(error)
            if isinstance(exc, RuntimeError):
                raise error from exc
            raise

    def close(self, within: float | None = None) -> None:
        """Have the server stopped, and wait for it; see ``StepflowRuntime.stop``."""
        self._supervisor.ask_to_stop(within)
        if self._thread.ident is None:
            return  # a signal handler, that interrupted `open`: it ends at once
        self._supervisor.block_until_over()
        if self._is_ending():
            self._thread.join(_LAST_BREATH)

    async def aclose(self, within: float | None = None) -> None:
        """The same for tasks of any event loop. Cancellation waits."""
        self._supervisor.ask_to_stop(within)
        await self._supervisor.wait_stopped()
        if self._is_ending():
            with anyio.CancelScope(shield=True), suppress(RuntimeError):
                await run_abandonable(self._thread.join, _LAST_BREATH)

    def forget(self) -> None:
        """In a forked child: the thread was not inherited."""
        _open.discard(self)

    def _run(self) -> None:
        try:
            anyio.run(self._live)
        except ServerError:
            pass  # whoever waits for the server hears of it from the supervisor
        except BaseException as exc:  # noqa: BLE001 - nobody else would hear of it
            report(logging.CRITICAL, "the server's supervisor broke down", exc=exc)
            error = ServerStartError(f"the server's supervisor broke down: {exc!r}")
            error.__cause__ = exc
            self._supervisor.give_up_start(error)
        finally:
            _open.discard(self)

    async def _live(self) -> None:
        supervisor = self._supervisor
        if supervisor.state.is_final:
            return
        async with supervisor.running(in_loop_of_its_own=True):
            await supervisor.journal.wait_until(lambda: supervisor.state.is_final)

    def _is_ending(self) -> bool:
        """True if the thread can be waited for: it has nothing left to do but to end."""
        return self._supervisor.state.is_final and not self._supervisor.is_calling()


def _close_all() -> None:
    """Stop the servers that the program has forgotten, all at the same time."""
    begin_end()
    portals = tuple(_open)
    for portal in portals:
        portal._supervisor.ask_to_stop()
    for portal in portals:
        portal.close()
    prepare_last_word()


atexit.register(_close_all)
