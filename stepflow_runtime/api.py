"""The executor's calls over the Stepflow HTTP API, whatever is at the other end.

Contract: it turns calls into requests and answers into values; it knows neither how bytes
travel (``transport``), nor what became of a server that is gone (the subclasses), nor what
the fields are called (``wire``). What it remembers of the flows it stored holds as long as the
server's store does. Tasks of several event loops, in several threads, may use one.

Waiting: the first request of :meth:`ApiExecutor.run` asks the server to wait for a moment
only. A short run is over by then, in one request. From the answer to a longer one its id is
known, so that it can be waited for, for as long as it takes, and cancelled on the server
when its caller goes. A caller that goes in that first moment leaves the answer to the crew.
Where that answer may be lost for good, while the run lives on, the first request waits not at all.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    NoReturn,
    Self,
    TypeVar,
    TypeVarTuple,
    Unpack,
)

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from . import flows, numerals, wire
from .arguments import (
    as_batch,
    as_header,
    as_input,
    as_inputs,
    as_overrides,
    as_segment,
    as_server_writes,
    as_variables,
    check_count,
    check_flag,
    check_max_concurrent,
    check_on_unknown,
    check_text,
    check_timeout,
    check_uuid,
)
from .crew import Crew, Kind
from .errors import (
    ApiError,
    ConnectionLostError,
    InvalidFlowError,
    InvalidRequestError,
    NotFoundError,
    RunTimeoutError,
    StepflowError,
    SubmitInterruptedError,
    UnrepresentableValueError,
    UnsupportedServerError,
)
from .events import RunStatus, StepStarted
from .executor import (
    ComponentList,
    Diagnostic,
    FlowError,
    FlowId,
    FlowResult,
    FlowSource,
    FlowVariable,
    Health,
    OnUnknown,
    Overrides,
    RunInfo,
    StepInfo,
    ValidationResult,
    Variables,
)
from .following import EventFollower
from .kernel import wake_on_interrupts
from .logs.entry import LogEntry
from .many import RunMany
from .refusals import refusal
from .representable import SIXTY_FOUR_BITS, representable
from .traffic import FREE, FreeTraffic, Hold, StoredBlob
from .transport import NO_HEADERS, Heir, Response, Stream

if TYPE_CHECKING:
    from .timeline import Timeline

__all__ = ["ApiExecutor", "SubmitMark", "next_wait_among_several"]

T = TypeVar("T")
Args = TypeVarTuple("Args")

# Whole seconds for which the first request of a run lets the server wait. A caller that is
# cancelled within them does not know the run's id yet; so they are few.
_FIRST_WAIT: Final = 1

# And each further one. What is between us and a server far away (proxies, load balancers)
# ends connections in which nothing happens, mostly after 60 s.
_NEXT_WAIT: Final = 30

# Where several servers share a store, about a quarter of what was waited so far, within these.
# A server wakes who waits for the runs that it has itself; where another one has the run, the
# end is heard of when the wait is over.
_SHORTEST_WAIT: Final = 1
_LONGEST_WAIT: Final = 5

# The server answers a waiting request at once for a run that is paused.
_STILL_RUNNING_PAUSE: Final = 0.1

# How long the crew tries to cancel a run that nobody waits for any more.
_CANCEL_PATIENCE: Final = 30.0

# Threads that look after workflow files.
_FILE_THREADS: Final = 4

# How many flows we remember having stored. A program that makes up flows as it goes must
# not make us grow with it; forgetting one costs two requests.
_REMEMBERED_FLOWS: Final = 1000

# Of a batch that is not over, or was given up, there may be no results: so many are made
# up. What a server tells beyond that is no count.
_MOST_WITHOUT_RESULT: Final = 10_000_000

_RUNS: Final = f"{wire.API}/runs"

# How often a flow is stored for one run, where servers forget it.
_MOST_STORES: Final = 3

# How often a run is submitted again, if it may be submitted twice. A run that ends its
# server must not end one after the other.
_MOST_RESUBMITS: Final = 2

# Of a failed run with more items than this nobody reads all events to count attempts.
_COUNTED_ITEMS: Final = 100

# How long a failed run's reasons may take to be found out: no part of its time limit.
_REASON_PATIENCE: Final = 5.0


def next_wait_among_several(waited: float) -> int:
    """For how many seconds one of several servers is asked to wait for a run's end."""
    return min(max(_SHORTEST_WAIT, int(waited / 4)), _LONGEST_WAIT)


class ApiExecutor(ABC):
    """Runs workflows on a server; how that is reached is for the subclass to say.

    Each call holds the server while it is under way, and its parts do not: those would
    wait at a gate that only the end of the call can open.

    :param crew: does what outlives calls
    :param traffic: is told of what is under way on the server
    """

    def __init__(self, crew: Crew, traffic: FreeTraffic = FREE) -> None:
        self.__crew = crew
        self.__traffic = traffic
        self.__stored = _Stored()
        wake_on_interrupts()

    @property
    @abstractmethod
    def _generation(self) -> int | None:
        """Changes when the server may have lost what it had stored; None if none is there."""

    @abstractmethod
    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        held: float = 0.0,
        heir: Heir | None = None,
        repeatable: bool = False,
        generation: int | None = None,
    ) -> Response:
        """As :meth:`~stepflow_runtime.transport.Transport.request`.

        :param repeatable: whether it may be sent again, if nobody knows whether it arrived,
            even to a server that has lost what it had stored
        :param generation: makes sense only to the server that this was the generation of
        """

    @abstractmethod
    async def _open_stream(
        self, path: str, *, generation: int | None = None
    ) -> tuple[Stream, int | None]:
        """As :meth:`~stepflow_runtime.transport.Transport.stream`; and whose it is."""

    def _mark_submit(self) -> SubmitMark | None:
        """Something by which a run that was submitted could be found; None: it could not."""
        return None

    async def _find_submitted(
        self, mark: SubmitMark | None, loss: ConnectionLostError | None
    ) -> str | None:
        """The id of the run that an interrupted submit has begun; None if it has begun none.

        :param loss: how it was interrupted
        :raises SubmitInterruptedError: if nobody knows
        """
        raise SubmitInterruptedError(
            f"the connection broke while a run was being submitted ({loss}); nobody knows "
            "whether it has begun"
        ) from loss

    @property
    @abstractmethod
    def _is_gone(self) -> bool:
        """True if nothing can be sent any more."""

    @abstractmethod
    def _gone(self) -> StepflowError:
        """What to raise then."""

    # -- runs ----------------------------------------------------------------------

    async def run(
        self,
        flow: FlowSource,
        input: Any = None,
        overrides: Overrides | None = None,
        *,
        variables: Variables | None = None,
        variables_from_env: bool = False,
        timeout: float | None = None,
        on_unknown: OnUnknown = "raise",
    ) -> FlowResult:
        """Run a workflow and wait for its end, however long it takes.

        The workflow is sent to the server once and then known by its content (by what
        ``stat`` says of it, if it is a file).

        :param flow: the path of a YAML or JSON file; the document as a mapping, or as what
            ``stepflow_py``'s ``FlowBuilder`` builds; or a :class:`FlowId`
        :param input: the flow's input: any JSON value, or what becomes one (dataclasses,
            msgspec and pydantic models, datetimes, UUIDs, enums, paths, tuples ...).
            Whole numbers within ±2^53 come back as they are; a float without a fraction
            comes back as an int
        :param overrides: properties to merge into steps, by step id:
            ``{"step1": {"input": {"x": 1}}}``; what is not named stays, None removes
        :param variables: values for the flow's ``$variable`` references
        :param variables_from_env: whether variables that the flow annotates with an
            ``env_var`` are taken from this process's environment, if they are set there and
            not given in ``variables``. Their text counts as JSON if it is, else as a string
        :param timeout: seconds after which the run is given up and cancelled on the
            server; None: never
        :param on_unknown: what to do if the connection broke while the run was being
            submitted, so that nobody knows whether it has begun: ``"raise"``, or
            ``"resubmit"``, by which the workflow may run twice. A runtime with ``storage``
            in a file finds out, and never comes to that
        :return: how it ended; a flow that failed is a result too
        :raises FlowDefinitionError: if the workflow cannot be read or is not valid
        :raises UnrepresentableValueError: if input, overrides or variables hold something
            that would not arrive as it is; tells where
        :raises TypeError: if an argument is of the wrong kind
        :raises RunTimeoutError: if ``timeout`` seconds were over first
        :raises ApiError: if the server refuses the run
        :raises SubmitInterruptedError: if the connection broke, so that nobody knows
            whether the run has begun
        :raises ConnectionLostError: if there is no connection to the server
        :raises RunLostError: if an embedded server died meanwhile, its store was in memory,
            and it is being restarted
        :raises ServerCrashedError: if it died and is not restarted
        :raises RuntimeStoppedError: if the runtime is not running

        While an embedded server restarts, the call waits; with a ``storage`` that keeps
        the run, also for a run that was under way. Cancellation ends the wait at once and
        has the run cancelled on the server, which in Stepflow 0.13 marks it as cancelled
        and lets its steps go on to their end.
        """
        inputs = [as_input(input)]
        limit = _time_limit(timeout)
        with self.__traffic.hold() or await self.__wait_hold(limit):
            with limit:
                answer, generation = await self.__create(
                    flow,
                    inputs,
                    overrides,
                    variables,
                    variables_from_env=variables_from_env,
                    wait=self._first_wait(),
                    on_unknown=on_unknown,
                )
                self.__traffic.took(1, generation)
                summary = answer.summary
                results: Sequence[Any] = answer.results
                if not summary.has_ended:
                    limit.concerns(summary.run_id)
                    try:
                        details, _ = await self.__wait_for_end(
                            summary.run_id, generation
                        )
                        summary = details.summary
                    except GeneratorExit:  # as garbage of a loop that was closed
                        raise
                    except anyio.get_cancelled_exc_class():
                        self.__have_cancelled(summary.run_id)
                        raise
                    results = await self.__items(summary, generation)
            result = wire.flow_result(summary, results[0] if results else None)
            if result.is_failed:
                (result,) = await self.__with_reasons([result])
            return result

    async def submit(
        self,
        flow: FlowSource,
        input: Any = None,
        overrides: Overrides | None = None,
        *,
        variables: Variables | None = None,
        variables_from_env: bool = False,
        timeout: float | None = None,
        on_unknown: OnUnknown = "raise",
    ) -> str:
        """Start a run, and return its id without waiting for its end.

        Takes what :meth:`run` takes, and raises what it raises; but ``timeout`` is for the
        server to take the run. Cancelled while it is being taken, it is cancelled there.
        """
        inputs = [as_input(input)]
        limit = _time_limit(timeout)
        with self.__traffic.hold() or await self.__wait_hold(limit):
            with limit:
                answer, generation = await self.__create(
                    flow,
                    inputs,
                    overrides,
                    variables,
                    variables_from_env=variables_from_env,
                    on_unknown=on_unknown,
                )
            run_id = answer.summary.run_id
            self.__traffic.took(1, generation, run_id)
        return run_id

    async def get_result(
        self, run_id: str, *, timeout: float | None = None
    ) -> FlowResult:
        """Wait for the end of a run that was started elsewhere, and return its result.

        :param run_id: what :meth:`submit` returned, or another client
        :param timeout: seconds to wait at most. The run goes on after that, as after a
            cancellation: it is not this call's
        :raises NotFoundError: if the server does not know the run
        :raises ValueError: if it is a batch of several items: see :meth:`get_batch`
        :raises RunTimeoutError: if ``timeout`` seconds were over first
        """
        limit = _time_limit(timeout, "is not over yet", run_id)
        with self.__traffic.hold(run_id) or await self.__wait_hold(limit, run_id):
            with limit:
                details, generation = await self.__wait_for_end(run_id)
                if details.summary.items.total > 1:
                    raise ValueError(
                        f"run {run_id} is a batch of {details.summary.items.total} items: "
                        "get_batch() has their results"
                    )
                items = await self.__items(details.summary, generation)
            result = wire.flow_result(details.summary, items[0] if items else None)
            (result,) = await self.__with_reasons([result], details)
            self.__traffic.fetched(details.summary.run_id)
            return result

    async def submit_batch(
        self,
        flow: FlowSource,
        inputs: Iterable[Any],
        max_concurrent: int | None = None,
        overrides: Overrides | None = None,
        *,
        variables: Variables | None = None,
        variables_from_env: bool = False,
        timeout: float | None = None,
        on_unknown: OnUnknown = "raise",
    ) -> str:
        """Start one run with many inputs, and return its id without waiting for its end.

        :param inputs: an input for each item, at least one; all are sent at once
        :param max_concurrent: how many items the server has under way at a time, at least
            1; None: as many as it likes (Stepflow 0.13: 10)
        :param timeout: seconds for the server to take the run
        :raises ValueError: if there is no input, or ``max_concurrent`` is less than 1

        The rest is as for :meth:`submit`.
        """
        check_max_concurrent(max_concurrent)
        items = as_batch(inputs)
        limit = _time_limit(timeout)
        with self.__traffic.hold() or await self.__wait_hold(limit):
            with limit:
                answer, generation = await self.__create(
                    flow,
                    items,
                    overrides,
                    variables,
                    variables_from_env=variables_from_env,
                    max_concurrent=max_concurrent,
                    on_unknown=on_unknown,
                )
            batch_id = answer.summary.run_id
            self.__traffic.took(len(items), generation, batch_id)
        return batch_id

    async def get_batch(
        self,
        batch_id: str,
        include_results: bool = True,
        *,
        wait: bool = True,
        timeout: float | None = None,
    ) -> tuple[RunInfo, list[FlowResult]]:
        """Wait for a batch, and return how it stands and what became of each item.

        :param batch_id: what :meth:`submit_batch` returned; the id of any run will do
        :param include_results: whether the results are wanted; if not, the list is empty
        :param wait: False returns at once; what is not over then ``is_running``. Stepflow
            0.13 tells how items ended only when all have
        :param timeout: seconds to wait at most. The batch goes on after that, as after a
            cancellation; :meth:`cancel` cancels it
        :return: the run, and one result for each input, in the order of the inputs; a
            failed item is a failed result
        :raises NotFoundError: if the server does not know the batch
        :raises RunTimeoutError: if ``timeout`` seconds were over first
        """
        check_flag("include_results", include_results)
        check_flag("wait", wait)
        limit = _time_limit(timeout, "is not over yet", batch_id)
        with self.__traffic.hold(batch_id) or await self.__wait_hold(limit, batch_id):
            with limit:
                if wait:
                    details, generation = await self.__wait_for_end(batch_id)
                else:
                    details, generation = await self.__details(batch_id)
                summary = details.summary
                if not include_results:
                    return wire.run_info(summary), []
                found = await self.__items(summary, generation)
                items = {each.item_index: each for each in found}
                count = max(summary.items.total, len(items))
                if count - len(items) > _MOST_WITHOUT_RESULT:
                    raise UnsupportedServerError(
                        f"the server tells of {count} items of run {batch_id}, and of the "
                        f"results of {len(items)}",
                        status=200,
                        run_id=batch_id,
                    )
            results = [
                wire.flow_result(summary, items.get(index))
                if index in items
                else msgspec.structs.replace(
                    wire.flow_result(summary, None), item_index=index
                )
                for index in range(count)
            ]
            results = await self.__with_reasons(results, details)
            if summary.has_ended:
                self.__traffic.fetched(summary.run_id)
            return wire.run_info(summary), results

    def run_many(
        self,
        flow: FlowSource,
        inputs: Iterable[Any],
        max_concurrent: int | None = None,
        overrides: Overrides | None = None,
        *,
        variables: Variables | None = None,
        variables_from_env: bool = False,
        timeout: float | None = None,
        on_unknown: OnUnknown = "raise",
    ) -> RunMany:
        """Run a workflow on each input, and yield ``(index, result)`` as they end.

        ``async for index, result in executor.run_many(flow, inputs): ...``. Each input is a
        run of its own; inputs are taken when there is room for them, so they may be
        endless. Left early (``break``), an exception or a cancellation in the loop: the runs
        under way are cancelled, at the latest when the iterator is garbage;
        ``contextlib.aclosing`` does it at once.

        :param inputs: the inputs; the index counts them, from 0
        :param max_concurrent: how many are under way at a time, at least 1; None: 50
        :param timeout: seconds for each run

        The iteration raises what :meth:`run` raises, and ends with that. The rest is as
        for :meth:`run`.
        """
        check_max_concurrent(max_concurrent)
        run = partial(
            self.run,
            flow,
            overrides=overrides,
            variables=variables,
            variables_from_env=variables_from_env,
            timeout=timeout,
            on_unknown=on_unknown,
        )
        check_on_unknown(on_unknown)
        return RunMany(run, as_inputs(inputs), max_concurrent, self.__crew, self._gone)

    async def cancel(self, run_id: str) -> RunInfo:
        """Cancel a run, and return how it stands then.

        A run that is over is left as it is; the server would call it cancelled. Who waits
        for the run hears at once. Stepflow 0.13 only marks it: steps under way, and
        those after them, go on, and when the last one has ended the run counts as
        completed after all.

        :raises NotFoundError: if the server does not know the run
        """
        with self.__traffic.hold(run_id) or await self.__traffic.wait_hold(run_id):
            return await self.__cancel(run_id)

    async def __cancel(self, run_id: str) -> RunInfo:
        path = f"/runs/{as_segment('run_id', run_id)}"
        found, generation = await self.__ask_whom(
            wire.decode_summary, "GET", path, run_id=run_id
        )
        if not found.summary.has_ended:
            found = await self.__ask(
                wire.decode_summary,
                "POST",
                f"{path}/cancel",
                b"{}",
                repeatable=True,
                generation=generation,
                run_id=run_id,
            )
        return wire.run_info(found.summary)

    async def get_run(self, run_id: str) -> RunInfo:
        """Return how a run stands.

        :raises NotFoundError: if the server does not know the run
        """
        with self.__traffic.hold(run_id) or await self.__traffic.wait_hold(run_id):
            return await self.__run_info(run_id)

    async def __run_info(self, run_id: str) -> RunInfo:
        path = f"/runs/{as_segment('run_id', run_id)}"
        found = await self.__ask(wire.decode_summary, "GET", path, run_id=run_id)
        return wire.run_info(found.summary)

    async def list_runs(
        self,
        *,
        status: RunStatus | None = None,
        flow_name: str | None = None,
        root_run_id: str | None = None,
        parent_run_id: str | None = None,
        roots_only: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[RunInfo]:
        """Return the runs that the server knows, the newest first.

        :param status: only those that stand so
        :param flow_name: only those of workflows of that name
        :param root_run_id: only that run and those that it, and they, have started
        :param parent_run_id: only those that this run has started itself
        :param roots_only: only those that no run has started
        :param limit: so many at most; None: as many as the server gives
        :param offset: how many to leave out first
        """
        # What the server does not understand of these, it leaves out without a word.
        if status is not None and not isinstance(status, RunStatus):
            raise TypeError(f"status must be a RunStatus, not {status!r}")
        if status is RunStatus.UNKNOWN:
            raise ValueError("status: nothing can be asked for by RunStatus.UNKNOWN")
        if flow_name is not None:
            check_text("flow_name", flow_name)
        if root_run_id is not None:
            check_uuid("root_run_id", root_run_id)
        if parent_run_id is not None:
            check_uuid("parent_run_id", parent_run_id)
        check_flag("roots_only", roots_only)
        for name, number in (("limit", limit), ("offset", offset)):
            if number is not None:
                check_count(name, number, least=0)
        filters = wire.query(
            status=None if status is None else status.value,
            flowName=flow_name,
            rootRunId=root_run_id,
            parentRunId=parent_run_id,
            rootsOnly=roots_only or None,
            limit=limit,
            offset=offset or None,
        )
        with self.__traffic.hold() or await self.__traffic.wait_hold():
            found = await self.__ask(wire.decode_run_list, "GET", f"/runs{filters}")
        return [wire.run_info(each) for each in found.runs]

    async def get_steps(
        self, run_id: str, *, item_index: int | None = None
    ) -> list[StepInfo]:
        """Return how the steps of a run stand, those that were begun.

        :param item_index: only those of this item, from 0
        :raises NotFoundError: if the server does not know the run
        """
        if item_index is not None:
            check_count("item_index", item_index, least=0)
        with self.__traffic.hold(run_id) or await self.__traffic.wait_hold(run_id):
            return await self.__steps(run_id, item_index)

    async def __steps(self, run_id: str, item_index: int | None) -> list[StepInfo]:
        path = f"/runs/{as_segment('run_id', run_id)}"
        filters = wire.query(itemIndex=item_index)
        found = await self.__ask(
            wire.decode_run_steps, "GET", f"{path}/steps{filters}", run_id=run_id
        )
        if not found.steps:
            # So the server answers for a run that it does not know, too.
            await self.__run_info(run_id)
        return [wire.step_info(each) for each in found.steps]

    def events(
        self,
        run_id: str,
        *,
        since: int = 0,
        include_results: bool = False,
        include_sub_runs: bool = False,
    ) -> EventFollower:
        """Follow what happens in a run: what has happened so far, and then what comes.

        ``async for event in executor.events(run_id): ...`` ends after ``RunCompleted``, or
        when the run was cancelled and nothing more comes. A connection that breaks is made
        anew, and goes on where it was: no event is lost, and none comes twice.

        :param since: the ``sequence_number`` to begin with
        :param include_results: whether the ends of steps carry their results
        :param include_sub_runs: whether the events of runs that it starts come, too
        :raises NotFoundError: while iterating, if the server does not know the run

        The rest is as for :meth:`get_result`. To stop reading needs no closing;
        ``contextlib.aclosing`` closes the connection at once.
        """
        check_count("since", since, least=0)
        check_flag("include_results", include_results)
        check_flag("include_sub_runs", include_sub_runs)
        return self.__follow(
            run_id, since, include_results, include_sub_runs, self.__traffic
        )

    def __follow(
        self,
        run_id: str,
        since: int = 0,
        include_results: bool = False,
        include_sub_runs: bool = False,
        traffic: FreeTraffic = FREE,
    ) -> EventFollower:
        parameters = wire.query(
            # The server wants the id again.
            runId=run_id,
            includeResults=include_results or None,
            includeSubRuns=include_sub_runs or None,
        )
        run = _OneRun(f"/runs/{as_segment('run_id', run_id)}", run_id)
        return EventFollower(
            partial(self.__event_stream, run, parameters),
            partial(self.__look, run),
            as_server_writes(run_id),
            since,
            lambda: self._is_gone,
            traffic,
        )

    async def timeline(self, run_id: str, *, timeout: float | None = None) -> Timeline:
        """Return what happened in a run so far, and when, to be looked at.

        ``Path("run.html").write_text((await executor.timeline(run_id)).html())`` makes a
        page of it. It takes what the journal, the steps, the results and the workflow of the
        run take, and for an embedded server its log. Of a batch with more than 100 items,
        the outputs of steps are left out for most; so are outputs beyond 8 MiB.

        :param timeout: seconds after which it is given up
        :raises NotFoundError: if the server does not know the run
        :raises RunTimeoutError: if ``timeout`` seconds were over first

        The rest is as for :meth:`get_result`.
        """
        from .history import Source, read_timeline  # only who looks pays for it

        limit = _time_limit(timeout, "has not been read to its end", run_id)
        source = Source(
            run=self.__run_info,
            document=lambda flow_id: self.__document(FlowId(flow_id)),
            steps=self.__steps,
            results=self.__results,
            events=partial(self.__follow, include_sub_runs=True),
            now=self.__now,
            logs=self._logs_of_runs,
            logs_of_failures=self._logs_of_failures,
        )
        hold = self.__traffic.hold(run_id) or await self.__wait_hold(limit, run_id)
        with hold, limit:
            return await read_timeline(source, as_server_writes(run_id))

    async def __results(self, run_id: str) -> list[FlowResult]:
        details, generation = await self.__details(run_id)
        found = await self.__items(details.summary, generation)
        return [wire.flow_result(details.summary, each) for each in found]

    async def __now(self) -> datetime | None:
        return wire.health(
            await self.__ask(wire.decode_health, "GET", "/health", repeatable=True)
        ).timestamp

    async def delete_run(self, run_id: str) -> None:
        """Have the server forget a run that is over.

        The in-memory store of Stepflow 0.13 says that it did, and keeps it.

        :raises NotFoundError: if the server does not know the run
        :raises ConflictError: if it is not over
        """
        path = f"/runs/{as_segment('run_id', run_id)}"
        with self.__traffic.hold(run_id) or await self.__traffic.wait_hold(run_id):
            await self.__ask(
                wire.decode_nothing, "DELETE", path, repeatable=True, run_id=run_id
            )
        self.__traffic.fetched(as_server_writes(run_id))

    # -- flows ---------------------------------------------------------------------

    async def validate(self, flow: FlowSource) -> ValidationResult:
        """Have the server look at a workflow. It is not stored.

        :raises FlowNotFoundError: if the file cannot be read
        :raises FlowSyntaxError: if it is not YAML or JSON
        :raises InvalidFlowError: if it holds what JSON cannot carry
        """
        with self.__traffic.hold() or await self.__traffic.wait_hold():
            if isinstance(flow, FlowId):
                loaded = flows.encode(await self.__document(flow), f"flow {flow}")
            else:
                loaded = await self.__load(flow)
            return await self.__analyse(loaded)

    async def store_flow(self, flow: FlowSource) -> FlowId:
        """Store a workflow on the server, unless it is known to be there; return its id.

        :raises FlowDefinitionError: if the workflow cannot be read or is not valid
        :raises ApiError: if the server refuses it for another reason
        """
        with self.__traffic.hold() or await self.__traffic.wait_hold():
            flow_id = await self.__store(flow)
            self.__traffic.stored(StoredBlob(flow_id, "flow"))
        return flow_id

    async def get_flow_variables(self, flow: FlowSource) -> dict[str, FlowVariable]:
        """Return the variables that a workflow declares, by name. It is stored for that.

        :raises FlowDefinitionError: if the workflow cannot be read or is not valid
        :raises NotFoundError: if there is no flow of this id
        """
        with self.__traffic.hold() or await self.__traffic.wait_hold():
            return await self.__declared(await self.__store(flow))

    async def __declared(self, flow_id: FlowId) -> dict[str, FlowVariable]:
        path = f"/flows/{as_segment('flow', flow_id)}/variables"
        found = await self.__ask(
            wire.decode_flow_variables, "GET", path, repeatable=True, flow_id=flow_id
        )
        return wire.flow_variables(found)

    async def list_components(self, *, include_schemas: bool = True) -> ComponentList:
        """Return the components that workflows can use here.

        :param include_schemas: whether with the schemas of their input and output
        :return: a list; what plugins could not tell theirs is in ``failed_plugins``
        """
        check_flag("include_schemas", include_schemas)
        filters = wire.query(excludeSchemas=None if include_schemas else True)
        with self.__traffic.hold() or await self.__traffic.wait_hold():
            found = await self.__ask(
                wire.decode_components, "GET", f"/components{filters}", repeatable=True
            )
        return wire.component_list(found)

    # -- blobs and the rest --------------------------------------------------------

    async def put_blob(self, data: Any, *, filename: str | None = None) -> str:
        """Store data on the server; return its id, which its content determines.

        :param data: bytes, or any JSON value but ``None``, or what becomes one. Integers
            from -2^63 to 2^64-1 stay as they are (in a blob, not in what a workflow makes
            of it)
        :param filename: a name to go with it
        :raises UnrepresentableValueError: if it would not arrive as it is
        """
        if filename is not None:
            check_text("filename", filename)
        if isinstance(data, bytes | bytearray | memoryview):
            kind = "binary"
            headers = {"content-type": "application/octet-stream"}
            if filename is not None:
                headers["x-blob-filename"] = as_header("filename", filename)
            body = bytes(data)
        elif data is None:
            raise UnrepresentableValueError(
                "data $: the server does not store null: wrap it, [None]", path="$"
            )
        else:
            kind = "data"
            headers = {}
            value = representable(data, name="data", whole=SIXTY_FOUR_BITS)
            value = numerals.exactly(value)
            body = wire.data_blob_request(wire.encode(value), filename)
        with self.__traffic.hold() or await self.__traffic.wait_hold():
            stored = await self.__ask(
                wire.decode_stored_blob,
                "POST",
                "/blobs",
                body,
                headers=headers,
                repeatable=True,
            )
            self.__traffic.stored(StoredBlob(stored.blob_id, kind, filename))
        return stored.blob_id

    async def get_blob(self, blob_id: str) -> Any:
        """Return what is stored under an id: bytes as bytes, a JSON value as that.

        :raises NotFoundError: if there is none
        """
        path = f"/blobs/{as_segment('blob_id', blob_id)}"
        with self.__traffic.hold() or await self.__traffic.wait_hold():
            response = await self._request("GET", wire.API + path, repeatable=True)
            found = await self.__decoded(
                wire.decode_blob, response, "GET", path, {"blob_id": blob_id}
            )
            if found.blob_type != "binary" and not numerals.may_be_misread(
                response.body
            ):
                return found.data
            # As it is stored. As JSON it has no bytes, and its numbers went through the
            # server's parser once more.
            response = await self._request(
                "GET",
                wire.API + path,
                headers={"accept": "application/octet-stream"},
                repeatable=True,
            )
            if found.blob_type == "binary" and response.status < 300:
                return response.body
            return await self.__decoded(
                msgspec.json.decode, response, "GET", path, {"blob_id": blob_id}
            )

    async def health(self) -> Health:
        """Ask the server how it is.

        :raises ServerError: if an embedded server is not there
        :raises ConnectionLostError: if one elsewhere does not answer
        """
        with self.__traffic.hold() or await self.__traffic.wait_hold():
            found = await self.__ask(
                wire.decode_health, "GET", "/health", repeatable=True
            )
        return wire.health(found)

    # -- for subclasses --------------------------------------------------------------

    def _refuse_outdated(self, health: Response) -> None:
        """Refuse a server by its answer to a health request, before it is asked for more.

        :raises UnsupportedServerError: if it is none that is supported
        """
        if health.status < 300 and (version := wire.outdated_version(health.body)):
            raise UnsupportedServerError(
                f"this server says that its version is {version}; supported are "
                f"{wire.SUPPORTED}",
                status=health.status,
            )

    def _first_wait(self) -> int:
        """For how many seconds a server is asked to wait for a run's end when it takes it.

        While it waits, nobody knows the run's id: should its answer be lost, and nobody can
        find out what became of the run, 0 makes that moment as short as it can be.
        """
        return _FIRST_WAIT

    def _next_wait(self, waited: float) -> int:
        """For how many seconds a server is asked next to wait for a run's end.

        :param waited: seconds that were waited so far
        """
        return _NEXT_WAIT

    async def _logs_of_failures(
        self, run_id: str, since: datetime | None, errors: Sequence[FlowError]
    ) -> list[tuple[LogEntry, ...]]:
        """What the server has logged of each of a run's failures."""
        return [()] * len(errors)

    async def _logs_of_runs(
        self, run_ids: Sequence[str], limit: int
    ) -> Sequence[LogEntry]:
        """What the server has logged of these runs, the newest lines, oldest first."""
        return ()

    # -- flows, underneath ---------------------------------------------------------

    async def __store(self, flow: FlowSource) -> FlowId:
        if isinstance(flow, FlowId):
            return flow
        if isinstance(flow, str) or hasattr(flow, "__fspath__"):
            key: _FlowKey = await self.__file_key(os.fspath(flow))
            if (known := self.__stored.get(self._generation, key)) is not None:
                return known
            loaded = await _in_thread(flows.load, flow)
        else:
            loaded = flows.load(flow)
            key = flows.content_key(loaded)
            if (known := self.__stored.get(self._generation, key)) is not None:
                return known
        generation = self._generation
        verdict = await self.__analyse(loaded)
        if any(each.level == "fatal" for each in verdict.diagnostics):
            raise InvalidFlowError(
                _listed(loaded.source, verdict),
                source=loaded.source,
                diagnostics=verdict.diagnostics,
            )
        # ``POST /flows`` would analyse and store in one, but it takes every number of the
        # document through a float: a step with the input ``duration_ms: 50`` is stored with
        # ``50.0``, and a component that wants an integer fails. ``POST /blobs`` stores what
        # it is given, and runs take its id; but it looks at nothing.
        stored = await self.__ask(
            wire.decode_stored_blob,
            "POST",
            "/blobs",
            wire.blob_request(loaded.encoded),
            repeatable=True,
        )
        flow_id = FlowId(stored.blob_id)
        self.__stored.remember(generation, key, flow_id)
        return flow_id

    async def __file_key(self, path: str) -> flows.FileKey:
        if self.__stored.is_nearby(path):
            try:
                return flows.stat_key(path)
            except StepflowError:
                raise
            except Exception:  # noqa: BLE001 - whatever it is that forbids it
                # Programs may have a guard against calls that block their event loops
                # (blockbuster), that knows nothing of microseconds.
                self.__stored.forbid_nearby()
        key, nearby = await _in_thread(flows.look_at, path)
        if nearby:
            self.__stored.remember_nearby(path)
        return key

    async def __load(self, flow: FlowSource) -> flows.Flow:
        if isinstance(flow, str) or hasattr(flow, "__fspath__"):
            return await _in_thread(flows.load, flow)
        return flows.load(flow)

    async def __analyse(self, flow: flows.Flow) -> ValidationResult:
        path = "/flows"
        request = wire.flow_request(
            flows.without_retry_limits(flow.encoded), dry_run=True
        )
        response = await self._request(
            "POST", wire.API + path, request, repeatable=True
        )
        if response.status in (400, 422) and wire.is_of_server(response.body):
            message = wire.fault_of(response.body).message
            return ValidationResult(diagnostics=(Diagnostic("fatal", message),))
        answer = await self.__decoded(
            wire.decode_stored_flow, response, "POST", path, {}
        )
        # Its id is not that of the flow as it is stored: it is made of other numbers.
        findings = answer.findings()
        if flow.is_empty:
            # The server would run it, and return null.
            message = "this workflow is empty: it has neither steps nor an output"
            findings.insert(0, Diagnostic("fatal", message))
        return ValidationResult(diagnostics=tuple(findings))

    async def __document(self, flow_id: FlowId) -> dict[str, Any]:
        path = f"/flows/{as_segment('flow', flow_id)}"
        found = await self.__ask(
            wire.decode_flow, "GET", path, repeatable=True, flow_id=flow_id
        )
        return found.flow

    async def __variables_from_env(
        self, flow_id: FlowId, given: Variables | None
    ) -> Mapping[str, Any]:
        annotated = self.__stored.env_names(flow_id)
        if annotated is None:
            declared = await self.__declared(flow_id)
            annotated = {
                name: each.env_var
                for name, each in declared.items()
                if each.env_var is not None
            }
            self.__stored.remember_env_names(flow_id, annotated)
        return {**numerals.exactly(flows.from_environment(annotated)), **(given or {})}

    # -- runs, underneath ----------------------------------------------------------

    async def __wait_hold(
        self, limit: _TimeLimit | _NoTimeLimit, run_id: str | None = None
    ) -> FreeTraffic | Hold:
        with limit:
            return await self.__traffic.wait_hold(run_id)

    async def __create(
        self,
        flow: FlowSource,
        inputs: list[Any],
        overrides: Overrides | None,
        variables: Variables | None,
        *,
        variables_from_env: bool,
        on_unknown: OnUnknown,
        max_concurrent: int | None = None,
        wait: int = 0,
    ) -> tuple[wire.RunAnswer, int | None]:
        """Start a run. Whoever is cancelled in here has it cancelled on the server."""
        check_flag("variables_from_env", variables_from_env)
        check_on_unknown(on_unknown)
        overrides = as_overrides(overrides)
        variables = as_variables(variables)
        heir: Heir = self.__cancel_what_began
        if (mark := self._mark_submit()) is not None:
            heir = partial(self.__cancel_what_began, mark=mark)
        stores = 0
        interruptions: list[SubmitInterruptedError] = []
        while True:
            flow_id = flow if type(flow) is FlowId else await self.__store(flow)
            if variables_from_env:
                variables = await self.__variables_from_env(flow_id, variables)
            body = wire.run_request(
                flow_id,
                inputs,
                overrides=overrides,
                variables=variables if mark is None else mark.among(variables),
                max_concurrent=max_concurrent,
                wait=wait,
            )
            try:
                response = await self._request(
                    "POST", _RUNS, body, held=wait, heir=heir
                )
                answer = await self.__decoded(
                    wire.decode_run, response, "POST", "/runs", {"flow_id": flow_id}
                )
                return answer, response.generation
            except NotFoundError:
                stores += 1
                if isinstance(flow, FlowId) or stores == _MOST_STORES:
                    raise
                # The server was restarted after that, and its store was in memory.
                self.__stored.forget(flow_id)
            except InvalidRequestError as exc:
                if overrides:
                    await self.__explain_overrides(flow_id, overrides, exc)
                raise
            except ConnectionLostError as exc:
                if exc.unsent and not interruptions:
                    raise
                try:
                    found = await self.__what_began(mark, exc, heir)
                except SubmitInterruptedError as interruption:
                    interruptions.append(interruption)
                    if on_unknown == "raise" or len(interruptions) > _MOST_RESUBMITS:
                        raise
                else:
                    if found is not None:
                        return found

    async def __what_began(
        self, mark: SubmitMark | None, loss: ConnectionLostError, heir: Heir
    ) -> tuple[wire.RunAnswer, int | None] | None:
        """What the interrupted answer would have said; None if there is no such run.

        :raises SubmitInterruptedError: if nobody knows
        """
        try:
            run_id = await self._find_submitted(mark, loss)
            if run_id is None:
                return None
            details, generation = await self.__details(run_id)
            items: Sequence[Any] = ()
            if details.summary.has_ended:
                items = await self.__items(details.summary, generation)
        except anyio.get_cancelled_exc_class():
            self.__crew.send(partial(heir, None), Kind.ERRAND)
            raise
        return wire.RunAnswer(details.summary, tuple(items)), generation

    async def __explain_overrides(
        self, flow_id: FlowId, overrides: Mapping[str, Any], cause: ApiError
    ) -> None:
        """The server says no more than that it "failed to apply workflow overrides"."""
        try:
            steps = flows.step_ids(await self.__document(flow_id))
        except StepflowError:
            return
        unknown = [step for step in overrides if step not in steps]
        if unknown:
            raise InvalidRequestError(
                f"overrides: this workflow has no step {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(map(repr, steps))}",
                status=cause.status,
                code=cause.code,
                reason=cause.reason,
                flow_id=flow_id,
            ) from cause

    async def __wait_for_end(
        self, run_id: str, generation: int | None = None
    ) -> tuple[wire.RunDetails, int | None]:
        path = f"/runs/{as_segment('run_id', run_id)}"
        began = anyio.current_time()
        while True:
            seconds = self._next_wait(anyio.current_time() - began)
            details, generation = await self.__ask_whom(
                wire.decode_run_details,
                "GET",
                path + wire.query(wait=True, timeoutSecs=seconds),
                held=seconds,
                generation=generation,
                run_id=run_id,
            )
            if details.summary.has_ended:
                return details, generation
            await anyio.sleep(_STILL_RUNNING_PAUSE)

    async def __details(self, run_id: str) -> tuple[wire.RunDetails, int | None]:
        path = f"/runs/{as_segment('run_id', run_id)}"
        return await self.__ask_whom(
            wire.decode_run_details, "GET", path, run_id=run_id
        )

    async def __items(self, summary: Any, generation: int | None) -> Sequence[Any]:
        run_id = summary.run_id
        path = f"/runs/{as_segment('run_id', run_id)}"
        found = await self.__ask(
            wire.decode_run_items,
            "GET",
            f"{path}/items",
            generation=generation,
            run_id=run_id,
        )
        if not found.results and summary.items.total:
            # So the server answers for a run that it does not know, too: it was restarted.
            await self.__ask(
                wire.decode_summary,
                "GET",
                path,
                generation=generation,
                run_id=run_id,
            )
        return found.results

    def __have_cancelled(self, run_id: str) -> None:
        """Leave it to the crew: the caller is on its way out."""
        self.__crew.send(partial(self.__cancel_quietly, run_id), Kind.ERRAND)

    async def __cancel_what_began(
        self, response: Response | None, mark: SubmitMark | None = None
    ) -> None:
        if response is None:
            if mark is not None:
                await self.__cancel_marked(mark)
            return
        with suppress(*wire.NOT_UNDERSTOOD):
            summary = wire.decode_run(response.body).summary
            if response.status >= 300:
                return
            self.__traffic.took(summary.items.total, response.generation)
            if not summary.has_ended:
                await self.__cancel_quietly(summary.run_id)

    async def __cancel_marked(self, mark: SubmitMark) -> None:
        with suppress(StepflowError), anyio.move_on_after(_CANCEL_PATIENCE):
            if (run_id := await self._find_submitted(mark, None)) is not None:
                await self.__cancel(run_id)

    async def __cancel_quietly(self, run_id: str) -> None:
        with suppress(StepflowError), anyio.move_on_after(_CANCEL_PATIENCE):
            await self.__cancel(run_id)  # the drain of a server waits for the crew, too

    async def __look(self, run: _OneRun) -> RunInfo:
        found, run.generation = await self.__ask_whom(
            wire.decode_summary,
            "GET",
            run.path,
            generation=run.generation,
            run_id=run.run_id,
        )
        return wire.run_info(found.summary)

    async def __event_stream(self, run: _OneRun, parameters: str, since: int) -> Stream:
        path = f"{run.path}/events"
        stream, run.generation = await self._open_stream(
            f"{wire.API}{path}{parameters}&since={since}", generation=run.generation
        )
        if stream.status < 300 and stream.content_type == "text/event-stream":
            return stream
        try:
            body = b""
            while data := await stream.receive():
                body += data
        finally:
            stream.close()
        response = Response(stream.status, stream.content_type, body)
        about = {"run_id": run.run_id}
        if stream.status < 300:
            await self.__refuse_version(response, "not a stream of events", about)
        raise refusal(response, "GET", path, about)

    # -- why a run failed ----------------------------------------------------------

    async def __with_reasons(
        self, results: list[FlowResult], details: wire.RunDetails | None = None
    ) -> list[FlowResult]:
        """The results, those that failed with what the server knows of the reasons."""
        places = [place for place, each in enumerate(results) if each.is_failed]
        if not places:
            return results
        failed = [results[place] for place in places]
        # That they failed is known all the same.
        with suppress(StepflowError), anyio.move_on_after(_REASON_PATIENCE):
            if details is None:
                details, _ = await self.__details(failed[0].run_id)
            explained = await self.__explained(failed, details)
            for place, result in zip(places, explained, strict=True):
                results[place] = result
        return results

    async def __explained(
        self, failed: list[FlowResult], details: wire.RunDetails
    ) -> list[FlowResult]:
        # The first one of an item: those that take something from it fail after it.
        latest_first = sorted(details.steps, key=lambda step: -step.journal_seqno)
        steps = {
            step.item_index: step
            for step in map(wire.step_info, latest_first)
            if step.error is not None
        }
        # Of a run that the server has given up the events never end.
        attempts = await self.__attempts(details) if steps else {}
        errors = []
        for result in failed:
            error = result.error
            assert error is not None
            if (step := steps.get(result.item_index)) is not None:
                error = msgspec.structs.replace(
                    error,
                    step_id=step.step_id,
                    component=step.component,
                    attempts=attempts.get((step.item_index, step.step_id)),
                )
            errors.append(error)
        logs = await self._logs_of_failures(
            failed[0].run_id, details.summary.created_at, errors
        )
        return [
            msgspec.structs.replace(
                result, error=msgspec.structs.replace(error, logs=entries)
            )
            for result, error, entries in zip(failed, errors, logs, strict=True)
        ]

    async def __attempts(self, details: wire.RunDetails) -> dict[tuple[int, str], int]:
        """How often each step of each item was tried: only the events know."""
        summary = details.summary
        if (
            RunStatus(summary.status) is not RunStatus.FAILED
            or summary.items.total > _COUNTED_ITEMS
        ):
            return {}
        attempts: dict[tuple[int, str], int] = {}
        events = self.__follow(summary.run_id)
        try:
            async for event in events:
                if isinstance(event, StepStarted):
                    step = (event.item_index, event.step_id)
                    attempts[step] = max(attempts.get(step, 0), event.attempt)
        finally:
            events.close()
        return attempts

    # -- requests ------------------------------------------------------------------

    async def __ask(
        self,
        decode: Callable[[bytes], T],
        method: str,
        path: str,
        body: bytes | None = None,
        **options: Any,
    ) -> T:
        """Send a request; return the value in its answer."""
        value, _ = await self.__ask_whom(decode, method, path, body, **options)
        return value

    async def __ask_whom(
        self,
        decode: Callable[[bytes], T],
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        held: float = 0.0,
        heir: Heir | None = None,
        repeatable: bool = False,
        generation: int | None = None,
        **about: str,
    ) -> tuple[T, int | None]:
        """Send a request; return the value in its answer, and whose answer it is.

        :param about: ``run_id``, ``flow_id`` or ``blob_id``, for the error
        :raises ApiError: if the answer is an error, or is not what was asked for
        """
        response = await self._request(
            method,
            wire.API + path,
            body,
            headers=headers,
            held=held,
            heir=heir,
            repeatable=repeatable,
            generation=generation,
        )
        value = await self.__decoded(decode, response, method, path, about)
        return value, response.generation

    async def __decoded(
        self,
        decode: Callable[[bytes], T],
        response: Response,
        method: str,
        path: str,
        about: Mapping[str, str],
    ) -> T:
        if response.status >= 300:
            raise refusal(response, method, path, about)
        try:
            return decode(response.body)
        except wire.NOT_UNDERSTOOD as exc:
            reason = exc
        await self.__refuse_version(response, str(reason), about)

    async def __refuse_version(
        self, response: Response, trouble: str, about: Mapping[str, str]
    ) -> NoReturn:
        """A server answers 200 without a body to a path that it does not know."""
        found = await self.__version()
        raise UnsupportedServerError(
            f"the server's answer is not of the shape that this library knows "
            f"({response.content_type or 'no content type'}: {trouble}). {found}; "
            f"supported are {wire.SUPPORTED}",
            status=response.status,
            **about,
        )

    async def __version(self) -> str:
        try:
            response = await self._request("GET", wire.HEALTH, repeatable=True)
            version = wire.health(wire.decode_health(response.body)).version
        except (StepflowError, *wire.NOT_UNDERSTOOD):
            return "It does not tell its version either"
        return f"It says that its version is {version or 'none'}"


@dataclass(frozen=True)
class SubmitMark:
    """What a submit is marked with: a variable that no workflow asks for.

    :ivar made_at: when it was made, before the run was, as ``time.time`` says
    :ivar made_after: the same by ``time.monotonic``, which nobody can set back
    """

    name: str
    value: str
    made_at: float
    made_after: float

    @property
    def began(self) -> float:
        """A time, by the clock of now and of then, before which the run cannot have begun."""
        return min(self.made_at, time.time() - (time.monotonic() - self.made_after))

    def among(self, variables: Mapping[str, Any] | None) -> Mapping[str, Any]:
        return {**(variables or {}), self.name: self.value}


class _OneRun:
    """A run that is asked for again and again, and the life of the server that has it."""

    def __init__(self, path: str, run_id: str) -> None:
        self.path = path
        self.run_id = run_id
        self.generation: int | None = None


# -- what is remembered ------------------------------------------------------------------

_FlowKey = bytes | flows.FileKey


class _Stored:
    """The flows that the server is known to have, and what of them is asked for again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: dict[tuple[int | None, _FlowKey], FlowId] = {}
        self._env_names: dict[FlowId, Mapping[str, str]] = {}
        self._nearby: dict[str, bool] = {}
        self._is_nearby_forbidden = False

    def get(self, generation: int | None, key: _FlowKey) -> FlowId | None:
        return self._ids.get((generation, key))

    def remember(self, generation: int | None, key: _FlowKey, flow_id: FlowId) -> None:
        with self._lock:
            _make_room(self._ids)
            self._ids[generation, key] = flow_id

    def forget(self, flow_id: FlowId) -> None:
        with self._lock:
            for key in [key for key, each in self._ids.items() if each == flow_id]:
                del self._ids[key]

    def is_nearby(self, path: str) -> bool:
        """True if a look at this file is known to wait for no other machine."""
        return path in self._nearby

    def remember_nearby(self, path: str) -> None:
        with self._lock:
            _make_room(self._nearby)
            if not self._is_nearby_forbidden:
                self._nearby[path] = True

    def forbid_nearby(self) -> None:
        """Let every look at a file be one of a thread."""
        with self._lock:
            self._is_nearby_forbidden = True
            self._nearby.clear()

    def env_names(self, flow_id: FlowId) -> Mapping[str, str] | None:
        return self._env_names.get(flow_id)

    def remember_env_names(self, flow_id: FlowId, names: Mapping[str, str]) -> None:
        with self._lock:
            _make_room(self._env_names)
            self._env_names[flow_id] = names


def _make_room(remembered: dict[Any, Any]) -> None:
    while len(remembered) >= _REMEMBERED_FLOWS:
        del remembered[next(iter(remembered))]


# -- files ------------------------------------------------------------------------------


async def _in_thread(function: Callable[[Unpack[Args]], T], *args: *Args) -> T:
    """Call ``function`` where it may block.

    The program's own threads may all be waiting for this very call.
    """
    return await anyio.to_thread.run_sync(function, *args, limiter=_threads())


_file_threads: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar(
    "stepflow_runtime file threads"
)


def _threads() -> anyio.CapacityLimiter:
    """The limit of this event loop: a limiter belongs to one."""
    try:
        return _file_threads.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_FILE_THREADS)
        _file_threads.set(limiter)
        return limiter


def _listed(source: str, verdict: ValidationResult) -> str:
    return "\n  ".join(
        [f"{source} is not a valid workflow:", *map(str, verdict.errors)]
    )


# -- time --------------------------------------------------------------------------------


class _TimeLimit:
    """Ends the block after so many seconds. Of several blocks, one after the other, the first
    begins them.

    :raises RunTimeoutError: if it was ended
    """

    def __init__(self, seconds: float, verdict: str, run_id: str | None) -> None:
        check_timeout(seconds)
        self._run_id = run_id
        self._seconds = seconds
        self._deadline: float | None = None
        self._verdict = verdict

    def concerns(self, run_id: str) -> None:
        """What the error is to name; to be told when it is known."""
        self._run_id = run_id

    def __enter__(self) -> Self:
        if self._deadline is None:
            self._deadline = anyio.current_time() + self._seconds
        self._scope = anyio.CancelScope(deadline=self._deadline)
        self._scope.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scope.__exit__(exc_type, exc, traceback)
        if self._scope.cancelled_caught:
            run = f"run {self._run_id}" if self._run_id else "the run"
            raise RunTimeoutError(
                f"the timeout of {self._seconds} s is over, and {run} {self._verdict}",
                run_id=self._run_id,
            ) from None


class _NoTimeLimit:
    """What most calls have: one for all of them."""

    def concerns(self, run_id: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


_UNLIMITED: Final = _NoTimeLimit()


def _time_limit(
    seconds: float | None,
    verdict: str = "is being cancelled on the server",
    run_id: str | None = None,
) -> _TimeLimit | _NoTimeLimit:
    return _UNLIMITED if seconds is None else _TimeLimit(seconds, verdict, run_id)
