"""Recycling: a server that has done its share is replaced by a fresh one.

Contract: nobody who calls through this runtime notices but by waiting a moment. The server
is replaced only when no call is under way, no run either, and nothing is left on it that
will be asked for; until then everything goes on. How long calls may be kept waiting for
that moment, and how often, is bounded. What to do when is decided by pure functions.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import anyio

from .. import wire
from ..crew import Crew
from ..errors import ConnectionLostError
from ..events import RunStatus
from ..groups import quiet_task_group
from ..logs.own import report
from ..threads import run_abandonable
from ..traffic import StoredBlob, Traffic
from ..transport import Response
from ..transport.direct import DirectTransport
from .life import Life, Server

__all__ = ["Limits", "Obstacle", "Recycler", "is_worth_telling", "pause_after"]

# How long the gate is closed for calls under way to end. Who comes meanwhile waits. The
# crew needs a second to learn the id of a run whose caller was cancelled.
PATIENCE: Final = 1.5

# Of the time from one try to the next, the gate is closed for a tenth at most.
_OPEN_FOR_EACH_SECOND_CLOSED: Final = 9.0

# A drain this long is no longer than the restart that follows.
_UNNOTICED: Final = 0.1

# Pauses between tries grow up to this.
LONGEST_PAUSE: Final = 60.0

# How often a try may fail before somebody is told: calls and runs end.
_TRIES_BEFORE_TELLING: Final = 3

# What is taken along to the next server, at most: it goes through our own memory.
MOST_BLOBS: Final = 1000
MOST_BYTES: Final = 64 * 1024 * 1024

# How long a fresh server may take to take what was taken along, and the pause after a
# connection that broke. Calls wait for it as they wait for a start.
UNPACKING_TIMEOUT: Final = 10.0
_UNPACKING_PAUSE: Final = 0.1

# Of runs in one of these something is still to come.
_UNFINISHED: Final = (RunStatus.RUNNING, RunStatus.PAUSED)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a server has done its share; None: never.

    :ivar runs: after so many runs
    :ivar memory: above so many bytes of resident memory
    """

    runs: int | None
    memory: int | None

    def is_due(self, *, runs: int, memory: int, fresh_memory: int) -> bool:
        """Decide whether a server is to be replaced.

        :param runs: how many runs it took
        :param memory: what it has now, in bytes; 0 if nobody looked
        :param fresh_memory: what it had at first. Below twice that it is left alone: a
            fresh one would soon be there, too
        """
        if self.runs is not None and runs >= self.runs:
            return True
        return self.memory is not None and memory > max(self.memory, 2 * fresh_memory)


class Obstacle(enum.Enum):
    """Why a server could not be replaced now; the value says it to the user."""

    CALLS = (
        f"calls are under way all the time that take more than {PATIENCE:g} s (an iterator "
        "of events() that is kept counts as one). It waits for a moment without"
    )
    RUNS = (
        "runs are under way that no call of this runtime waits for: submitted ones, or those "
        "of other clients of its port. It waits for their end"
    )
    RESULTS = (
        "runs were submitted whose results were not fetched, and the in-memory store would "
        "take them along. Fetch them with get_result() or get_batch(), or say by "
        "delete_run() that they are not wanted; or configure a durable store"
    )
    BLOBS = (
        "more was stored by put_blob() and store_flow() than is taken along from one "
        f"in-memory store to the next ({MOST_BLOBS} blobs of "
        f"{MOST_BYTES // 1024 // 1024} MiB together). Configure a durable store"
    )


def pause_after(failures: int, closed: float) -> float:
    """Decide how many seconds calls go on undisturbed after a try.

    :param failures: how many have failed in a row; 0: this one succeeded
    :param closed: for how many seconds this one kept calls waiting
    """
    if failures == 0:
        return max(closed - _UNNOTICED, 0.0) * _OPEN_FOR_EACH_SECOND_CLOSED
    growing = min(2.0 ** min(failures - 1, 10), LONGEST_PAUSE)
    return max(growing, closed * _OPEN_FOR_EACH_SECOND_CLOSED)


def is_worth_telling(obstacle: Obstacle, failures: int) -> bool:
    """Decide whether the user should hear of it: if it is for him to remove, or lasts."""
    is_for_user = obstacle in (Obstacle.RESULTS, Obstacle.BLOBS)
    return is_for_user or failures >= _TRIES_BEFORE_TELLING


class Recycler:
    """Sees to it that a server is replaced when it is due.

    :param health_interval: seconds between two looks at its memory
    """

    def __init__(
        self,
        limits: Limits,
        server: Server,
        traffic: Traffic,
        crew: Crew,
        health_interval: float,
    ) -> None:
        self._limits = limits
        self._server = server
        self._traffic = traffic
        self._crew = crew
        self._health_interval = health_interval
        self._runs_before = 0
        self._memory = 0
        self._fresh_memory = 0
        self._luggage: dict[str, _Packed] = {}
        self._told: set[Obstacle] = set()
        self._not_before = 0.0

    async def work(self) -> None:
        """Look after one life of the server after the other, until it is cancelled."""
        seen = 0
        try:
            while True:
                life = await self._server.wait_life(seen)
                seen = life.incarnation
                await self._see_through(life)
        finally:
            self._traffic.open()

    async def _see_through(self, life: Life) -> None:
        """Look after one life until it is replaced, or has ended by itself."""
        with anyio.CancelScope() as scope:
            async with quiet_task_group() as tasks:
                tasks.start_soon(self._cancel_when_over, life, scope)
                await self._unpack(life)
                self._runs_before, self._memory = self._traffic.runs, 0
                self._traffic.open()
                if self._limits.memory is not None:
                    tasks.start_soon(self._watch_memory, life.pid)
                await self._replace_when_due(life)

    async def _cancel_when_over(self, life: Life, scope: anyio.CancelScope) -> None:
        await self._server.wait_life_over(life.incarnation)
        scope.cancel()

    # -- when it is due ------------------------------------------------------------

    def _is_due(self) -> bool:
        return self._limits.is_due(
            runs=self._traffic.runs - self._runs_before,
            memory=self._memory,
            fresh_memory=self._fresh_memory,
        )

    async def _wait_due(self) -> None:
        if self._limits.runs is not None:
            self._traffic.call_at(self._runs_before + self._limits.runs)
        await self._traffic.changed.wait_until(self._is_due)
        self._traffic.call_at(float("inf"))

    async def _watch_memory(self, pid: int) -> None:
        self._fresh_memory = 0
        while True:
            # No thread to be had for it: another time.
            with suppress(RuntimeError):
                self._memory = await run_abandonable(_resident_memory, pid)
                self._fresh_memory = self._fresh_memory or self._memory
                if self._is_due():
                    self._traffic.changed.announce()
            await anyio.sleep(self._health_interval)

    # -- the drain -----------------------------------------------------------------

    async def _replace_when_due(self, life: Life) -> None:
        await self._wait_due()
        await anyio.sleep_until(self._not_before)
        failures = 0
        async with aclosing(DirectTransport(life.port, max_connections=1)) as transport:
            while True:
                closed = 0.0
                # The most of it while calls go on; what comes meanwhile, in the drain.
                obstacle = await self._pack(transport)
                if obstacle is None:
                    began = anyio.current_time()
                    obstacle = await self._drain_and_replace(life, transport)
                    closed = anyio.current_time() - began
                if obstacle is None:
                    self._not_before = anyio.current_time() + pause_after(0, closed)
                    return
                failures += 1
                self._luggage.clear()
                self._tell(obstacle, failures)
                if obstacle is Obstacle.BLOBS:
                    await anyio.sleep_forever()  # in this life there will only be more
                left = self._traffic.unfetched()
                await anyio.sleep(pause_after(failures, closed))
                await self._wait_fetched(left)

    async def _wait_fetched(self, left: list[str]) -> None:
        """Wait for what was left to be fetched when a drain failed: another would, too.

        Not for all: there may be somebody who submits and fetches all the time.
        """
        with anyio.move_on_after(LONGEST_PAUSE) as patience:
            await self._traffic.wait_fetched(left)
        if patience.cancelled_caught:
            self._tell(Obstacle.RESULTS, 1)
            await self._traffic.wait_fetched(left)

    async def _drain_and_replace(
        self, life: Life, transport: DirectTransport
    ) -> Obstacle | None:
        """Close the gate, and replace the server if it falls still; or open it again."""
        obstacle: Obstacle | None = Obstacle.CALLS
        self._traffic.forget_unfetched(but_of=life.incarnation)
        self._traffic.close()
        try:
            with anyio.move_on_after(PATIENCE) as patience:
                await self._traffic.wait_drained()
                await self._crew.wait_errands_done()
                obstacle = await self._obstacle(transport)
                # No await from here on: nothing can come in between.
                if obstacle is None and not self._server.replace(life.incarnation):
                    obstacle = Obstacle.CALLS
            if patience.cancelled_caught and self._traffic.is_waiting_for_results:
                obstacle = Obstacle.RESULTS
        finally:
            if obstacle is not None:
                self._traffic.reclaim()
                self._traffic.open()
        return obstacle

    async def _obstacle(self, transport: DirectTransport) -> Obstacle | None:
        """What is in the way, now that nobody calls and nothing is left to be fetched."""
        if (obstacle := await self._pack(transport)) is not None:
            return obstacle
        if await _has_unfinished_runs(transport):
            return Obstacle.RUNS
        return None

    def _tell(self, obstacle: Obstacle, failures: int) -> None:
        """Say it once: what is so is mostly so for long."""
        if obstacle not in self._told and is_worth_telling(obstacle, failures):
            self._told.add(obstacle)
            report(
                logging.WARNING,
                "the Stepflow server is due to be recycled, and cannot be yet: %s",
                obstacle.value,
            )

    # -- what is taken along -------------------------------------------------------

    async def _pack(self, transport: DirectTransport) -> Obstacle | None:
        """Take what users may ask for by its id from this server; what is new of it."""
        blobs = self._traffic.blobs
        if len(blobs) > MOST_BLOBS:
            return Obstacle.BLOBS
        size = sum(len(each.content) for each in self._luggage.values())
        for blob_id in blobs.keys() - self._luggage.keys():
            response = await _get(transport, f"/blobs/{blob_id}", _AS_STORED)
            if response is None:
                return Obstacle.CALLS
            if response.status >= 300:
                self._traffic.forget_blob(blob_id)  # it died with an earlier life
                continue
            self._luggage[blob_id] = _Packed(blobs[blob_id], response.body)
            size += len(response.body)
            if size > MOST_BYTES:
                return Obstacle.BLOBS
        return None

    async def _unpack(self, life: Life) -> None:
        """Give it to the fresh server, before anybody calls."""
        with anyio.move_on_after(UNPACKING_TIMEOUT):
            async with aclosing(DirectTransport(life.port, max_connections=1)) as there:
                while self._luggage:
                    try:
                        await self._unpack_to(there)
                    except ConnectionLostError:
                        # It ends, and so does this; or we are out of descriptors.
                        await anyio.sleep(_UNPACKING_PAUSE)
        if self._luggage:
            report(
                logging.ERROR,
                "a fresh Stepflow server did not take %d of the blobs that were stored on the "
                "old one",
                len(self._luggage),
            )
            self._luggage.clear()

    async def _unpack_to(self, transport: DirectTransport) -> None:
        for blob_id, packed in tuple(self._luggage.items()):
            response = await packed.unpack(transport)
            if response.status < 300:
                del self._luggage[blob_id]
            else:
                raise ConnectionLostError(f"it answered {response.status}")


@dataclass(frozen=True)
class _Packed:
    blob: StoredBlob
    content: bytes

    def unpack(self, transport: DirectTransport) -> Awaitable[Response]:
        post = partial(transport.request, "POST", wire.API + "/blobs")
        filename = self.blob.filename
        if self.blob.kind == "flow":
            return post(wire.blob_request(self.content))
        if self.blob.kind == "data":
            return post(wire.data_blob_request(self.content, filename))
        headers = dict(_AS_BYTES)
        if filename is not None:
            headers["x-blob-filename"] = filename
        return post(self.content, headers=headers)


_AS_STORED: Final = {"accept": "application/octet-stream"}
_AS_BYTES: Final = {"content-type": "application/octet-stream"}


async def _get(
    transport: DirectTransport, path: str, headers: dict[str, str] | None = None
) -> Response | None:
    """The server's answer, or None if it has none: then it is about to be no more."""
    try:
        return await transport.request("GET", wire.API + path, headers=headers or {})
    except ConnectionLostError:
        return None


async def _has_unfinished_runs(transport: DirectTransport) -> bool:
    """Ask for runs of whomever that are not over; True also if nobody can tell."""
    for status in _UNFINISHED:
        query = wire.query(status=status.value, limit=1)
        response = await _get(transport, f"/runs{query}")
        if response is None or response.status >= 300:
            return True
        with suppress(*wire.NOT_UNDERSTOOD):
            if not wire.decode_run_list(response.body).runs:
                continue
        return True
    return False


def _resident_memory(pid: int) -> int:
    """In bytes; 0 if it has just ended."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
