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
from typing import Final

import anyio

from ..errors import ServerError, ServerStartError
from ..forks import forget_in_child
from ..logs.own import report
from ..loops import Announcer
from ..server.supervisor import Supervisor
from ..threads import run_blocking

__all__ = ["Portal"]

# From the last that a thread of ours does to its being gone for the interpreter.
_LAST_BREATH: Final = 1.0

_open: set[Portal] = set()


class Portal:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._over = Announcer()
        self._is_over = False
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
        except RuntimeError as exc:
            _open.discard(self)
            error = ServerStartError(f"no thread for the server's supervisor: {exc}")
            self._supervisor.give_up_start(error)
            raise error from exc

    def close(self, within: float | None = None) -> None:
        """Have the server stopped, and wait for it; see ``StepflowRuntime.stop``.

        Blocks, unless it is called by a callback that the thread is waiting for.
        """
        self._supervisor.ask_to_stop(within)
        if not self._supervisor.is_calling():
            self._join()

    async def aclose(self, within: float | None = None) -> None:
        """The same for tasks of any event loop. Cancellation waits."""
        self._supervisor.ask_to_stop(within)
        with anyio.CancelScope(shield=True):
            if self._supervisor.is_calling():
                await self._supervisor.journal.wait_until(
                    lambda: self._supervisor.state.is_final
                )
                return
            with anyio.move_on_after(self._supervisor.longest_stop):
                await self._over.wait_until(lambda: self._is_over)
            await run_blocking(self._join, _LAST_BREATH)

    def forget(self) -> None:
        """In a forked child: the thread was not inherited."""
        self._is_over = True
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
            self._is_over = True
            self._over.announce()

    async def _live(self) -> None:
        supervisor = self._supervisor
        async with supervisor.running():
            await supervisor.journal.wait_until(lambda: supervisor.state.is_final)

    def _join(self, patience: float | None = None) -> None:
        if self._is_over:
            patience = _LAST_BREATH
        elif patience is None:
            patience = self._supervisor.longest_stop
        if not self._over.block_until(lambda: self._is_over, patience):
            # A callback of the program's (a log handler, say) holds the thread up, perhaps
            # because it waits for the very thread that waits here.
            report(logging.ERROR, "a stop was held up; the server is killed")
            self._supervisor.kill()
            return
        self._thread.join(_LAST_BREATH)


def _close_all() -> None:
    """Stop the servers that the program has forgotten, all at the same time."""
    portals = tuple(_open)
    for portal in portals:
        portal._supervisor.ask_to_stop()
    for portal in portals:
        portal.close()


atexit.register(_close_all)
