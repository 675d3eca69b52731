"""A watch over the lease by which a server has its runs.

A server of Stepflow 0.13 that could not renew its lease in time (etcd was away or has lost
its data, the server itself was frozen or starved) never gets another one; and once its
connection to etcd was broken, for a moment only, it renews the one that it has no more. It
goes on, and takes new runs, and whoever has a lease takes all of them from it, while they
are under way: each would run twice, for ever. Contract: such a server is replaced, as soon
as etcd tells that it has no lease, or does not renew it; so the latter mostly is before
the lease has run out. The fresh one has a lease, and the runs of its own id. As long as no
etcd answers there is nothing to be done: nobody else has a lease then either.
"""

from __future__ import annotations

import base64
import logging
from contextlib import aclosing
from typing import Final
from urllib.parse import urlsplit

import anyio
import msgspec

from ..errors import ConnectionLostError
from ..groups import quiet_task_group
from ..logs.own import report
from ..transport.direct import DirectTransport
from .life import Life, Server
from .storage import Leases

__all__ = ["LeaseWatch", "is_lost"]

# The lease is made when the server has recovered its runs, so it may be missing at first;
# and one look may fall into the moment in which it is made anew.
_MISSING: Final = 2

# We look as often as the server renews it, so that one look may come between two of those.
# Three are two thirds of the lease: the next look could come too late.
_UNCHANGED: Final = 3

_ANSWER_TIMEOUT: Final = 2.0


class _Key(msgspec.Struct):
    version: str


class _Range(msgspec.Struct):
    kvs: list[_Key] = []


_decode_range = msgspec.json.Decoder(_Range).decode


def is_lost(looks: list[int | None]) -> bool:
    """Decide whether a server has no lease, or will have none for much longer.

    :param looks: how often it has renewed its lease, as etcd has told, the newest last; 0:
        it has none; None: no etcd has told anything
    """
    newest = looks[-1]
    if newest is None:
        return False
    enough = _MISSING if newest == 0 else _UNCHANGED
    return looks[-enough:] == [newest] * enough


class LeaseWatch:
    """Sees to it that a server without a lease is replaced.

    :param server_id: its orchestrator id
    """

    def __init__(self, leases: Leases, server_id: str, server: Server) -> None:
        self._endpoints = leases.endpoints
        self._pause = max(leases.ttl / 3, 1.0)
        key = f"{leases.prefix}/heartbeats/{server_id}".encode()
        self._question = msgspec.json.encode({"key": base64.b64encode(key).decode()})
        self._server = server

    async def work(self) -> None:
        """Look after one life of the server after the other, until it is cancelled."""
        seen = 0
        while True:
            life = await self._server.wait_life(seen)
            seen = life.incarnation
            await self._see_through(life)

    async def _see_through(self, life: Life) -> None:
        with anyio.CancelScope() as scope:
            async with quiet_task_group() as tasks:
                tasks.start_soon(self._cancel_when_over, life, scope)
                await self._wait_lost()
                report(
                    logging.WARNING,
                    "the Stepflow server (pid %d) does not renew its lease, and is replaced: "
                    "others may have taken its runs, so that steps run twice",
                    life.pid,
                )
                self._server.replace(life.incarnation)

    async def _cancel_when_over(self, life: Life, scope: anyio.CancelScope) -> None:
        await self._server.wait_life_over(life.incarnation)
        scope.cancel()

    async def _wait_lost(self) -> None:
        looks: list[int | None] = [None]
        while not is_lost(looks):
            await anyio.sleep(self._pause)
            looks = [*looks[-_UNCHANGED:], await self._look()]

    async def _look(self) -> int | None:
        """Ask one etcd after the other how often the lease was renewed; None: none tells."""
        for endpoint in self._endpoints:
            with anyio.move_on_after(_ANSWER_TIMEOUT):
                try:
                    return await self._ask(endpoint)
                except (ConnectionLostError, ValueError, _RefusedError):
                    continue  # ValueError: no etcd's answer, or no name of a host
        return None

    async def _ask(self, endpoint: str) -> int:
        parts = urlsplit(endpoint)
        assert parts.hostname is not None
        transport = DirectTransport(parts.port or 80, parts.hostname, max_connections=1)
        async with aclosing(transport):
            answer = await transport.request("POST", "/v3/kv/range", self._question)
        if answer.status != 200:
            raise _RefusedError
        # Each renewal writes the key anew.
        return sum(int(each.version) for each in _decode_range(answer.body).kvs)


class _RefusedError(Exception):
    """This etcd cannot tell: it has no leader, say."""
