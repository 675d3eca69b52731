"""Many runs at a time, and their results as they come.

Contract: so many runs are under way as there may be, while somebody iterates; inputs are
taken where it is iterated, one when there is room for it. The runs are jobs of the
executor's crew, so that nothing has to be entered or left around the iteration; when the
iterator is closed, or nobody holds it any more, they are cancelled.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final, Self

from .crew import Crew, CrewGoneError, Job, Kind
from .errors import StepflowError
from .executor import FlowResult
from .loops import Announcer

__all__ = ["RunMany"]

_AT_ONCE: Final = 50


class RunMany(AsyncIterator[tuple[int, FlowResult]]):
    """The iterator of ``run_many``; see there.

    :param gone: what to raise where there is nobody to run anything
    """

    def __init__(
        self,
        run: Callable[[Any], Awaitable[FlowResult]],
        inputs: Iterable[Any],
        max_concurrent: int | None,
        crew: Crew,
        gone: Callable[[], StepflowError],
    ) -> None:
        self._run = run
        self._inputs = enumerate(inputs)
        self._at_once = max_concurrent or _AT_ONCE
        self._crew = crew
        self._gone = gone
        self._work = _Work()
        self._is_exhausted = False
        self._trouble: BaseException | None = None
        weakref.finalize(self, self._work.cancel).atexit = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, FlowResult]:
        """The next result; tasks may share the iterator.

        :raises StepflowError: as ``run``. Nothing follows then
        """
        work = self._work
        self._top_up()
        await work.changed.wait_until(
            lambda: work.ended or not work.jobs or work.is_closed
        )
        try:
            if work.ended:
                index, job = work.ended.popleft()
                result = await job.wait()
                self._top_up()
                return index, result
            trouble, self._trouble = self._trouble, None
            if trouble is not None:
                raise trouble
        except CrewGoneError:
            self.close()
            raise self._gone() from None
        except BaseException:
            self.close()
            raise
        raise StopAsyncIteration

    def close(self) -> None:
        """Have what is under way cancelled, and yield no more."""
        self._work.cancel()

    async def aclose(self) -> None:
        self.close()

    def _top_up(self) -> None:
        # Results that nobody has taken yet count, too: who reads slowly is not run ahead of.
        work = self._work
        while (
            not self._is_exhausted
            and not work.is_closed
            and len(work.jobs) + len(work.ended) < self._at_once
        ):
            try:
                index, input = next(self._inputs)
                self._begin(index, input)
            except StopIteration:
                self._is_exhausted = True
            except BaseException as exc:  # noqa: BLE001 - raised after what has ended
                self._is_exhausted = True
                self._trouble = exc

    def _begin(self, index: int, input: Any) -> None:
        job = self._crew.send(partial(self._run, input), Kind.PART)
        if job is None:
            raise self._gone()
        self._work.take(index, job)


class _Work:
    """What is under way. Apart from the iterator, which it must not keep alive."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job[FlowResult]] = {}
        self.ended: deque[tuple[int, Job[FlowResult]]] = deque()
        self.changed = Announcer()
        self.is_closed = False

    def take(self, index: int, job: Job[FlowResult]) -> None:
        self.jobs[index] = job
        job.when_ended(partial(self._end, index))

    def cancel(self) -> None:
        self.is_closed = True
        for job in tuple(self.jobs.values()):
            job.cancel()
        self.jobs.clear()
        self.ended.clear()
        self.changed.announce()

    def _end(self, index: int) -> None:
        job = self.jobs.pop(index, None)
        if job is not None:
            self.ended.append((index, job))
            self.changed.announce()
