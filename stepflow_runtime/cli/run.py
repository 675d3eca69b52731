"""``stepflow-runtime run``: one workflow, its progress, its result.

Contract: the result is all there is on standard output. Cancelled (Ctrl-C, SIGTERM, the time
limit), the run is cancelled where it runs, before the command ends.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

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
    read_input,
    variables_of,
)

if TYPE_CHECKING:
    from ..api import ApiExecutor
    from ..executor import FlowResult, FlowSource
    from .progress import Row, RunProgress

__all__ = ["run"]

# How long the end of the command waits for a run that was given up to be cancelled.
_CANCELLING: Final = 3.0

# How long it waits for what has happened, once the result is there.
_CATCHING_UP: Final = 1.0

# Without a terminal, how often is looked whether there is something to say, and how often
# something is said of steps that take long.
_LOOK: Final = 0.25
_NEWS: Final = 10.0


def run(
    flow: FlowArgument,
    input_text: Annotated[
        str | None, typer.Option("--input", "-i", help="The input, as JSON.")
    ] = None,
    input_file: Annotated[
        str | None,
        typer.Option(
            "--input-file", help="A file with the input as JSON; - for stdin."
        ),
    ] = None,
    variable: VariableOption = None,
    config: ConfigOption = None,
    storage: StorageOption = None,
    remote: RemoteOption = None,
    header_env: HeaderOption = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after which the run is given up."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write an HTML page about the run, for this user to read."),
    ] = None,
    quiet: QuietOption = False,
    log_level: LevelOption = "info",
) -> None:
    """Run one workflow, and print its result as JSON."""
    if flow == "-" == input_file:
        raise typer.BadParameter("the flow and the input cannot both be on stdin")
    value = read_input(input_text, input_file)
    variables = variables_of(variable)
    place = Place(config, storage, remote, header_env, log_level)
    import anyio

    from .output import describe, print_json, write_private

    with exits():
        document, wants_report = flow_of(flow), report is not None
        arguments = (place, document, value, variables, timeout, wants_report, quiet)
        result, page = anyio.run(_run, *arguments)
        if result.error is not None:
            # The result itself says little of why a flow failed; the log may say more.
            tell(f"failed: {result.error}")
        print_json(describe(result))
        if report is not None:
            write_private(report, page)
    raise typer.Exit(Exit.SUCCESS if result.is_success else Exit.FAILED)


async def _run(
    place: Place,
    flow: FlowSource,
    value: Any,
    variables: dict[str, Any],
    timeout: float | None,
    wants_report: bool,
    quiet: bool,
) -> tuple[FlowResult, bytes]:
    """Return the result, and the page about the run."""
    from ..errors import RunTimeoutError

    async with place.executor() as executor:
        began = time.monotonic()
        run_id = await executor.submit(
            flow, value, variables=variables, timeout=timeout
        )
        left = timeout
        if timeout is not None:
            left = max(0.001, timeout - (time.monotonic() - began))
        try:
            if quiet:
                result = await executor.get_result(run_id, timeout=left)
            else:
                name = flow.name if isinstance(flow, Path) else "run"
                result = await _shown(executor, run_id, name, left)
        except BaseException as exc:
            await _cancel(executor, run_id)
            if isinstance(exc, RunTimeoutError):
                message = (
                    f"run {run_id} was not over after {timeout} s, and is cancelled"
                )
                raise RunTimeoutError(message, run_id=run_id) from None
            raise
        page = await _page(executor, run_id) if wants_report else b""
    return result, page


async def _cancel(executor: ApiExecutor, run_id: str) -> None:
    """A server of the command's own ends with it; its store may not, nor one elsewhere."""
    import anyio

    from ..errors import StepflowError

    with suppress(StepflowError), anyio.move_on_after(_CANCELLING, shield=True):
        await executor.cancel(run_id)


async def _page(executor: Any, run_id: str) -> bytes:
    page: str = (await executor.timeline(run_id)).html()
    return page.encode(errors="backslashreplace")


# -- progress ----------------------------------------------------------------------------


async def _shown(
    executor: ApiExecutor, run_id: str, name: str, timeout: float | None
) -> FlowResult:
    from .display import can_draw, drawn, told
    from .progress import RunProgress

    progress = RunProgress(run_id)
    async with AsyncExitStack() as stack:
        if can_draw():
            from .drawing import draw_run

            await stack.enter_async_context(
                drawn(lambda *size: draw_run(progress, name, time.time(), *size))
            )
        else:
            lines = _Lines(progress)
            stack.callback(lines.tell_ended)
            await stack.enter_async_context(told(lines.tell_news, _LOOK))
        return await _followed(executor, run_id, progress, timeout)


async def _followed(
    executor: ApiExecutor,
    run_id: str,
    progress: RunProgress,
    timeout: float | None,
) -> FlowResult:
    """Wait for the result, and take in the events meanwhile.

    The server looks for new events twice a second, and the result is there before them: what
    is missing then, another request brings at once.
    """
    import anyio

    from ..groups import quiet_task_group

    async with quiet_task_group() as tasks:
        tasks.start_soon(_take_in, executor, run_id, progress)
        try:
            result = await executor.get_result(run_id, timeout=timeout)
        finally:
            tasks.cancel_scope.cancel()
    with anyio.move_on_after(_CATCHING_UP):
        await _take_in(executor, run_id, progress)
    return result


async def _take_in(executor: ApiExecutor, run_id: str, progress: RunProgress) -> None:
    from contextlib import aclosing

    from ..errors import StepflowError

    events = executor.events(
        run_id, since=progress.last_sequence_number, include_sub_runs=True
    )
    has_asked = False
    # That something is wrong is told by who waits for the result.
    with suppress(StepflowError):
        async with aclosing(events):
            async for event in events:
                progress.add(event)
                if not has_asked and progress.wants_components:
                    has_asked = True
                    steps = await executor.get_steps(run_id)
                    progress.learn_components(
                        {each.step_id: each.component or "" for each in steps}
                    )


class _Lines:
    """Progress for a log: a line for each step that ended, and news of long ones."""

    def __init__(self, progress: RunProgress) -> None:
        self._progress = progress
        self._told: set[str] = set()
        self._last = time.monotonic()

    def tell_ended(self) -> None:
        for row in self._progress.rows(time.time()):
            if row.depth == 0 and row.phase.is_over and row.label not in self._told:
                self._told.add(row.label)
                self._tell(row)

    def tell_news(self) -> None:
        self.tell_ended()
        if time.monotonic() - self._last >= _NEWS:
            for row in self._progress.rows(time.time()):
                if row.depth == 0 and row.phase and row.label not in self._told:
                    self._tell(row)

    def _tell(self, row: Row) -> None:
        self._last = time.monotonic()
        tell(_words(row))


def _words(row: Row) -> str:
    from .text import one_line, seconds

    words = f"{one_line(row.label)}: {row.phase.name.lower()}"
    if row.total > 1:
        words += f", {row.done} of {row.total} items"
    if row.attempt > 1:
        words += f", attempt {row.attempt}"
    return words if row.elapsed is None else f"{words}, {seconds(row.elapsed)}"
