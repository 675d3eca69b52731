"""A watch over the lease by which a server has its runs.

A server of Stepflow 0.13 that could not renew its lease in time (etcd was away or has lost
its data, the server itself was frozen or starved) never gets another one. It goes on, and
takes new runs, and whoever has a lease takes all of them from it, while they are under way:
each would run twice, for ever. Contract: such a server is replaced, as soon as etcd tells
that it has no lease. The fresh one has a lease, and the runs of its own id. As long as no
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
_LOOKS: Final = 2

_ANSWER_TIMEOUT: Final = 2.0


class _Range(msgspec.Struct):
    count: str = "0"


_decode_range = msgspec.json.Decoder(_Range).decode


def is_lost(looks: list[bool | None]) -> bool:
    """Decide whether a server has no lease.

    :param looks: what etcd has told of it, the newest last; None: nothing
    """
    return looks[-_LOOKS:] == [False] * _LOOKS


class LeaseWatch:
    """Sees to it that a server without a lease is replaced.

    :param server_id: its orchestrator id
    """

    def __init__(self, leases: Leases, server_id: str, server: Server) -> None:
        self._endpoints = leases.endpoints
        self._pause = max(leases.ttl / 3, 1.0)
        key = f"{leases.prefix}/heartbeats/{server_id}".encode()
        self._question = msgspec.json.encode(
            {"key": base64.b64encode(key).decode(), "count_only": True}
        )
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
                    "the Stepflow server (pid %d) has lost its lease, and is replaced: "
                    "others may have taken its runs, so that steps run twice",
                    life.pid,
                )
                self._server.replace(life.incarnation)

    async def _cancel_when_over(self, life: Life, scope: anyio.CancelScope) -> None:
        await self._server.wait_life_over(life.incarnation)
        scope.cancel()

    async def _wait_lost(self) -> None:
        looks: list[bool | None] = []
        while not is_lost(looks):
            await anyio.sleep(self._pause)
            looks = [*looks[-_LOOKS:], await self._look()]

    async def _look(self) -> bool | None:
        """Ask one etcd after the other whether the server has a lease; None: none tells."""
        for endpoint in self._endpoints:
            with anyio.move_on_after(_ANSWER_TIMEOUT):
                try:
                    return await self._ask(endpoint)
                except (ConnectionLostError, msgspec.DecodeError, _RefusedError):
                    continue
        return None

    async def _ask(self, endpoint: str) -> bool:
        parts = urlsplit(endpoint)
        assert parts.hostname is not None
        transport = DirectTransport(parts.port or 80, parts.hostname, max_connections=1)
        async with aclosing(transport):
            answer = await transport.request("POST", "/v3/kv/range", self._question)
        if answer.status != 200:
            raise _RefusedError
        return _decode_range(answer.body).count != "0"


class _RefusedError(Exception):
    """This etcd cannot tell: it has no leader, say."""
