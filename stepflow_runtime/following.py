"""Following a run: the server's stream of events, and what keeps it whole.

Contract: every event once, in order, over as many connections as it takes. Several events
may share a sequence number, and the server resumes *with* the one it is asked for; so the
follower keeps what it has seen of the last number, and skips that much.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from typing import Final, Self

import anyio
import msgspec

from . import wire
from .errors import ConnectionLostError, StepflowError, UnsupportedServerError
from .events import RunCompleted, RunEvent
from .executor import RunInfo
from .traffic import FREE, FreeTraffic, Hold
from .transport import ServerRestartedError, Stream

__all__ = ["EventFollower"]

# How often in a row a connection may bring nothing new before it is given up, and the
# seconds before each new one.
_PAUSES: Final = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)

# The longest line that is taken in: a result travels in one, and requests end at 250 MiB.
_LONGEST_LINE: Final = 256 * 1024 * 1024

# So many events may have one number; a run of 1000 items was seen to have ten that do.
_MOST_SHARING: Final = 100_000

# Of those, what is longer is kept as a digest.
_SHORT: Final = 1024


class EventFollower(AsyncIterator[RunEvent]):
    """The iterator of ``events``; see there.

    :param connect: opens the stream from a sequence number on
    :param look: tells how the run stands
    :param is_closed: whether there is no way any more by which to connect
    :param traffic: of the server, which is held from the first event that is asked for to
        the last one, however many connections that takes
    """

    def __init__(
        self,
        connect: Callable[[int], Awaitable[Stream]],
        look: Callable[[], Awaitable[RunInfo]],
        run_id: str,
        since: int,
        is_closed: Callable[[], bool] = bool,
        traffic: FreeTraffic = FREE,
    ) -> None:
        self._traffic = traffic
        self._holding = _Holding()
        self._is_closed = is_closed
        self._is_reading = False
        self._connect = connect
        self._look = look
        self._run_id = run_id
        self._since = since
        self._lines = _Lines()
        self._seen_of_last: list[bytes] = []
        self._to_skip: Counter[bytes] = Counter()
        self._failures = 0
        self._was_over = False
        self._is_over = False
        weakref.finalize(self, self._lines.close).atexit = False
        weakref.finalize(self, self._holding.release).atexit = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RunEvent:
        """The next event. Cancelled, it loses none: the next call goes on.

        :raises anyio.BusyResourceError: if another task is waiting for it
        """
        if self._is_reading:
            raise anyio.BusyResourceError("reading from")
        self._is_reading = True
        try:
            if not (self._is_over or self._holding.is_held):
                self._holding.take(
                    self._traffic.hold(self._run_id)
                    or await self._traffic.wait_hold(self._run_id)
                )
            return await self._next()
        except (StepflowError, StopAsyncIteration):
            self._holding.release()
            raise
        finally:
            self._is_reading = False

    async def _next(self) -> RunEvent:
        while not self._is_over:
            try:
                if not self._lines.is_open:
                    await self._reconnect()
                line = await self._lines.next()
            except ServerRestartedError:
                self._lines.close()
                continue
            except ConnectionLostError:
                self._lines.close()
                self._failures += 1
                if self._failures > len(_PAUSES) or self._is_closed():
                    raise
                continue
            if line is None:
                self._lines.close()
                self._failures += 1
                if self._failures > len(_PAUSES):
                    raise ConnectionLostError(
                        f"the events of run {self._run_id} end before the run does"
                    )
            elif line.startswith(b"data:"):
                if (event := self._take(line)) is not None:
                    return event
            elif line.startswith(b":"):
                await self._look_whether_over()
        raise StopAsyncIteration

    def close(self) -> None:
        """Close the connection, and yield no more; from any thread."""
        self._is_over = True
        self._lines.close()
        self._holding.release()

    async def aclose(self) -> None:
        self.close()

    async def _reconnect(self) -> None:
        if self._failures:
            await anyio.sleep(_PAUSES[self._failures - 1])
        self._to_skip = Counter(map(_canonical, self._seen_of_last))
        if self._since:
            # After a run's last event the server's stream is silent, and never ends.
            run = await self._look()
            self._was_over = run.has_ended
            last = run.last_sequence_number
            if last is not None and self._since > last:
                self.close()
                raise StopAsyncIteration
        stream = await self._connect(self._since)
        if self._is_over:  # in the meantime
            stream.close()
        else:
            self._lines.open(stream)

    def _take(self, line: bytes) -> RunEvent | None:
        data = line[5:].strip()
        try:
            event = wire.event(wire.decode_event(data))
        except wire.NOT_UNDERSTOOD as exc:
            raise UnsupportedServerError(
                f"an event of run {self._run_id} is not of the shape that this library "
                f"knows: {exc}",
                status=200,
                run_id=self._run_id,
            ) from exc
        if event.sequence_number == self._since and self._is_to_be_skipped(data):
            return None
        if event.sequence_number != self._since:
            self._since = event.sequence_number
            self._seen_of_last.clear()
        self._remember(data)
        self._failures = 0
        if isinstance(event, RunCompleted) and event.run_id == self._run_id:
            self.close()
        return event

    def _remember(self, data: bytes) -> None:
        if len(self._seen_of_last) == _MOST_SHARING:
            raise UnsupportedServerError(
                f"more than {_MOST_SHARING} events of run {self._run_id} have one number",
                status=200,
                run_id=self._run_id,
            )
        self._seen_of_last.append(_trace(data))

    def _is_to_be_skipped(self, data: bytes) -> bool:
        if not self._to_skip:
            return False
        event = _canonical(_trace(data))
        if is_seen := self._to_skip[event] > 0:
            self._to_skip[event] -= 1
        return is_seen

    async def _look_whether_over(self) -> None:
        """A keep-alive: nothing has happened for some seconds.

        A run that was cancelled need not come to a ``RunCompleted``, and nothing follows
        after the last event. Only a second one in a row counts: events may be under way.
        """
        is_over = (await self._look()).has_ended
        if is_over and self._was_over:
            self.close()
        self._was_over = is_over


def _trace(data: bytes) -> bytes:
    """What is kept of an event: if it carries a long result, not that."""
    if len(data) <= _SHORT:
        return data
    return b"sha256:" + sha256(_canonical(data)).hexdigest().encode()


def _canonical(data: bytes) -> bytes:
    """The same for the same event: a server that was restarted shuffles its fields.

    What cannot be read, such as a text in a field that nobody looks at, stays as it is.
    """
    try:
        return msgspec.json.encode(msgspec.json.decode(data), order="deterministic")
    except (*wire.NOT_UNDERSTOOD, UnicodeEncodeError):
        return data


class _Holding:
    """The hold on the server. Apart from the follower, which it must not keep alive."""

    def __init__(self) -> None:
        self._hold: FreeTraffic | Hold | None = None

    @property
    def is_held(self) -> bool:
        return self._hold is not None

    def take(self, hold: FreeTraffic | Hold) -> None:
        if isinstance(hold, Hold):
            hold.loop = None  # a follower may be read in another one after that
        self._hold = hold

    def release(self) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()


class _Lines:
    """The lines of a stream. Apart from the follower, which it must not keep alive."""

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self._lines: deque[bytes] = deque()
        self._rest = bytearray()

    @property
    def is_open(self) -> bool:
        return self._stream is not None

    def open(self, stream: Stream) -> None:
        self._stream = stream

    def close(self) -> None:
        stream, self._stream = self._stream, None
        self._lines.clear()
        self._rest.clear()
        if stream is not None:
            stream.close()

    async def next(self) -> bytes | None:
        """The next line that is not empty; None at the end."""
        while not self._lines:
            stream = self._stream
            if stream is None or not (data := await stream.receive()):
                return None
            self._feed(data)
        return self._lines.popleft()

    def _feed(self, data: bytes) -> None:
        first, *others = data.split(b"\n")
        self._rest += first
        if len(self._rest) > _LONGEST_LINE:
            raise ConnectionLostError(f"a line of more than {_LONGEST_LINE} bytes")
        if not others:
            return
        *whole, last = [bytes(self._rest), *others]
        self._lines.extend(line for line in whole if line.strip())
        self._rest = bytearray(last)
