"""``stepflow-runtime batch``: a workflow on each line of a file, and a line for each result.

Contract: results come in the order of the inputs, while later ones run; so many are ahead of
the first one that is missing, and no more, whatever the number of inputs. An item that fails is
a line, and no reason to stop.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer

from .exits import Exit, exits, tell
from .options import (
    ConfigOption,
    FlowArgument,
    HeaderOption,
    LevelOption,
    Place,
    QuietOption,
    RemoteOption,
    StorageOption,
    VariableOption,
    flow_of,
    variables_of,
)

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from ..api import ApiExecutor
    from ..executor import FlowId, FlowSource
    from .ledger import Output, Seal
    from .lines import InputLines
    from .progress import BatchProgress

__all__ = ["batch"]

# How many results may wait for an earlier one, for each that is under way; and how many
# at least.
_AHEAD: Final = 4
_LEAST_AHEAD: Final = 200

# Lines that end within so many seconds are written by one write, which takes a thread.
_GATHERING: Final = 0.01

# Without a terminal, how often it is said how things stand.
_NEWS: Final = 5.0

# How long an interrupted command tries to write what has ended before.
_LAST_LINES: Final = 2.0


class _Job(NamedTuple):
    place: Place
    flow: FlowSource
    variables: dict[str, Any]
    inputs: str
    output: Path | None
    concurrency: int
    timeout: float | None
    quiet: bool


def batch(
    flow: FlowArgument,
    inputs: Annotated[
        str,
        typer.Option(
            "--inputs", "-i", help="The inputs, a line of JSON each; - for stdin."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the results there instead of stdout. A file with the first of "
            "them is gone on with.",
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-n", min=1, help="How many run at a time.")
    ] = 50,
    variable: VariableOption = None,
    config: ConfigOption = None,
    storage: StorageOption = None,
    remote: RemoteOption = None,
    header_env: HeaderOption = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after which an item has failed."),
    ] = None,
    quiet: QuietOption = False,
    log_level: LevelOption = "info",
) -> None:
    """Run one workflow on each line of a file; print a line of JSON for each.

    The same command again, after it was interrupted, goes on with its --output.
    """
    if flow == "-" == inputs:
        raise typer.BadParameter("the flow and the inputs cannot both be on stdin")
    variables = variables_of(variable)
    place = Place(config, storage, remote, header_env, log_level)
    import anyio

    with exits():
        job = _Job(
            *(place, flow_of(flow), variables, inputs, output),
            *(concurrency, timeout, quiet),
        )
        progress = anyio.run(_batch, job)
        if not quiet:
            tell(_verdict(progress))
    raise typer.Exit(Exit.FAILED if progress.failed else Exit.SUCCESS)


def _verdict(progress: BatchProgress) -> str:
    from .text import counted, seconds

    words = f"{counted(progress.done, 'item')}, {progress.failed} failed"
    if progress.kept:
        words += f", {progress.kept} were there already"
    return f"{words}, in {seconds(progress.elapsed(time.monotonic()))}"


async def _batch(job: _Job) -> BatchProgress:
    import msgspec

    from .. import flows
    from ..threads import run_blocking
    from .ledger import Ledger, Printer, Seal
    from .lines import InputLines
    from .progress import BatchProgress

    executor = job.place.executor()  # which checks the options
    loaded = await run_blocking(flows.load, job.flow)
    variables = msgspec.json.encode(job.variables, order="deterministic")
    seal = Seal(loaded.encoded, variables)
    with await run_blocking(InputLines, job.inputs) as lines:
        total = await lines.count()
        output: Output = Printer(sys.stdout.fileno())
        if job.output is not None:
            output = await Ledger.open(job.output)
        try:
            progress = BatchProgress(time.monotonic(), total)
            async with executor as server:
                flow_id = await server.store_flow(job.flow)
                line = _Pipeline(job, server, flow_id, seal, output, progress)
                async with _shown(progress, job):
                    await line.run(lines)
        except BaseException:
            if job.output is not None:
                tell(f"the same command goes on with {job.output}")
            raise
        finally:
            await output.close()
    return progress


def _shown(progress: BatchProgress, job: _Job) -> AbstractAsyncContextManager[Any]:
    from contextlib import nullcontext

    from .display import can_draw, drawn, told
    from .drawing import batch_words, draw_batch

    if job.quiet:
        return nullcontext()
    # Results that scroll by would leave half a drawing in each line.
    if can_draw() and (job.output is not None or not sys.stdout.isatty()):
        return drawn(
            lambda width, _, glyphs: draw_batch(
                progress, time.monotonic(), width, glyphs
            )
        )
    return told(lambda: tell(", ".join(batch_words(progress, time.monotonic()))), _NEWS)


class _Pipeline:
    """Inputs in, runs side by side, results out in order."""

    def __init__(
        self,
        job: _Job,
        executor: ApiExecutor,
        flow_id: FlowId,
        seal: Seal,
        output: Output,
        progress: BatchProgress,
    ) -> None:
        import anyio

        self._run = partial(
            executor.run, flow_id, variables=job.variables, timeout=job.timeout
        )
        self._seal = seal
        self._output = output
        self._progress = progress
        self._slots = anyio.Semaphore(job.concurrency)
        self._room = anyio.Semaphore(max(_LEAST_AHEAD, _AHEAD * job.concurrency))
        self._ended: dict[int, bytes] = {}
        self._next = 0
        self._has_ended = anyio.Event()
        self._trouble: Exception | None = None

    async def run(self, lines: InputLines) -> None:
        """:raises StepflowError: what keeps the items from being run"""
        import anyio

        from ..groups import quiet_task_group

        async with quiet_task_group() as background:
            try:
                async with anyio.create_task_group() as workers:
                    background.start_soon(self._write_on, workers)
                    await self._feed(lines, workers)
            finally:
                background.cancel_scope.cancel()
        if self._trouble is not None:
            raise self._trouble

    async def _feed(self, lines: InputLines, workers: TaskGroup) -> None:
        from ..errors import StepflowError

        index = 0
        try:
            async for line, value in lines:
                prefix = self._seal.prefix(index, line)
                has_failed = self._output.kept(prefix)
                if has_failed is None:
                    await self._room.acquire()
                    await self._slots.acquire()
                    workers.start_soon(self._work, index, prefix, value, workers)
                else:
                    self._progress.keep(has_failed=has_failed)
                    self._next = index + 1
                index += 1
            self._output.check_end()
        except StepflowError as exc:  # what was begun is brought to its end
            self._trouble = exc

    async def _work(
        self, index: int, prefix: bytes, value: Any, workers: TaskGroup
    ) -> None:
        from ..errors import StepflowError

        self._progress.begin()
        try:
            line, has_failed = await self._outcome(prefix, value)
        except StepflowError as exc:
            self._stop(exc, workers)
            return
        finally:
            self._slots.release()
        self._progress.end(time.monotonic(), has_failed=has_failed)
        self._ended[index] = line
        self._has_ended.set()

    async def _outcome(self, prefix: bytes, value: Any) -> tuple[bytes, bool]:
        from ..errors import RunTimeoutError, UnrepresentableValueError
        from .ledger import failure, line_of

        try:
            result = await self._run(value)
        except RunTimeoutError as exc:
            return failure(prefix, "TIMEOUT", str(exc)), True
        except UnrepresentableValueError as exc:
            return failure(prefix, "INVALID_INPUT", str(exc)), True
        return line_of(prefix, result), not result.is_success

    def _stop(self, exc: Exception, workers: TaskGroup) -> None:
        self._trouble = self._trouble or exc
        workers.cancel_scope.cancel()

    async def _write_on(self, workers: TaskGroup) -> None:
        import anyio

        try:
            while True:
                await self._has_ended.wait()
                await anyio.sleep(_GATHERING)
                self._has_ended = anyio.Event()
                await self._write()
        except OSError as exc:
            self._stop(exc, workers)
        finally:
            # What is there is worth to be kept, whatever the end is.
            if self._trouble is None or not isinstance(self._trouble, OSError):
                with anyio.move_on_after(_LAST_LINES, shield=True):
                    await self._write()

    async def _write(self) -> None:
        lines = []
        while (line := self._ended.pop(self._next, None)) is not None:
            lines.append(line)
            self._next += 1
        if lines:
            await self._output.write(b"".join(lines))
            for _ in lines:
                self._room.release()
