"""The server's port, held for as long as its runtime lives.

Contract: from :meth:`HeldPort.take` until :meth:`HeldPort.release` no other process gets to
listen on the port of 127.0.0.1, of whatever user it is: not before the server starts, and
not between a crash and the restart either. So whoever answers there is the server, and the
client never talks to a stranger.

How: a socket of ours is bound to the port, and never listens. Nobody may bind the same
address then, unless both sockets carry ``SO_REUSEADDR`` and neither listens. The server's
carries it, and ours does from :meth:`~HeldPort.lend` to :meth:`~HeldPort.keep`: while we
make the server's socket (``confine``), or, where it does that itself, while it starts. Who
else binds the port in that moment can only make the start fail: one of them gets to listen,
and the server announces nothing if it is not the one.
(``inet_csk_bind_conflict`` in Linux's net/ipv4/inet_connection_sock.c, which asks the same
again at ``listen``.) Other systems share addresses differently: there nothing is held.
"""

from __future__ import annotations

import socket
import sys
import threading
from typing import Final

from ..forks import forget_in_child, no_forks

__all__ = ["LOOPBACK", "HeldPort"]

LOOPBACK: Final = "127.0.0.1"


class HeldPort:
    """A port of 127.0.0.1 that only our server gets. For any thread.

    :ivar number: the port; 0 if the server is to choose, where nothing can be held
    """

    def __init__(self) -> None:
        self.number = 0
        self._holder: socket.socket | None = None
        self._lock = threading.Lock()
        self._is_released = False
        forget_in_child(self)

    def take(self, number: int) -> None:
        """Take a port. One that cannot be had is not held: the server will say why.

        :param number: 0 for one that is free
        :raises OSError: if none is
        """
        self.number = number
        if sys.platform != "linux":
            return
        with no_forks(), self._lock:  # a forked child must know what to close
            if self._is_released:
                return
            try:
                self._holder = _bound(number)
            except OSError:
                if number == 0:
                    raise
            else:
                self.number = self._holder.getsockname()[1]

    def lend(self) -> None:
        """Let the server bind the port, too."""
        self._share(True)

    def keep(self) -> None:
        """Let nobody else bind it from now on."""
        self._share(False)

    def release(self) -> None:
        """Hold it no longer, and never again."""
        with no_forks(), self._lock:
            self._is_released = True
            holder, self._holder = self._holder, None
            if holder is not None:
                holder.close()

    def forget(self) -> None:
        """The same in a forked child, where nobody is in here, whatever the lock says."""
        self._lock = threading.Lock()
        self.release()

    def _share(self, shared: bool) -> None:
        with self._lock:
            if self._holder is not None:
                self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, shared)


def _bound(number: int) -> socket.socket:
    holder = socket.socket()
    try:
        try:
            holder.bind((LOOPBACK, number))
        except OSError:
            # Connections of the last server that had it may linger: TIME_WAIT.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            holder.bind((LOOPBACK, number))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)
    except BaseException:
        holder.close()
        raise
    return holder
