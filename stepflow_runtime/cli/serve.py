"""``stepflow-runtime serve``: a server in the foreground, kept alive, until it is told to stop.

Contract: the URL is all there is on standard output, one line, written when the server is
READY. Its log goes to standard error. When the command ends, by whatever way, the server and its
workers are gone.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from .exits import exits
from .options import ConfigOption, LevelOption, StorageOption

if TYPE_CHECKING:
    from pathlib import Path

    from ..runtime import StepflowRuntime
    from ..server.options import Exposure, StartOptions

__all__ = ["serve"]

# How many of the lines that were logged before anybody listened, and how many may wait.
_FIRST: Final = 2000
_MOST_WAITING: Final = 100_000

# Seconds between two writes, and for the last one.
_GATHERING: Final = 0.02
_LAST_LINES: Final = 1.0

_RESTARTS: Final = ("on-failure", "always", "never")
_EXPOSURES: Final = ("loopback", "require-loopback", "any")


def serve(
    config: ConfigOption = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Without: one that is free.")
    ] = None,
    storage: StorageOption = None,
    restart: Annotated[
        str,
        typer.Option(metavar="|".join(_RESTARTS), help="When the server ends unasked."),
    ] = "on-failure",
    max_restarts: Annotated[
        int, typer.Option(min=0, help="In a row, before the server is given up.")
    ] = 3,
    exposure: Annotated[
        str,
        typer.Option(
            metavar="|".join(_EXPOSURES),
            help="Who may reach it: it asks nobody's name.",
        ),
    ] = "loopback",
    log_level: LevelOption = "info",
    log_format: Annotated[
        str,
        typer.Option(
            metavar="json|text",
            help="Of the log on standard error. Without: text on a terminal.",
        ),
    ] = "",
) -> None:
    """Run a server until Ctrl-C or SIGTERM, and print its URL when it is ready.

    It exits with 3 if the server does not start, or is lost for good.
    """
    _check("--restart", restart, _RESTARTS)
    _check("--exposure", exposure, _EXPOSURES)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    chosen = log_format or ("text" if is_terminal else "json")
    _check("--log-format", chosen, ("json", "text"))
    import anyio

    from ..logs.config import LogConfig
    from ..server.restart import RestartPolicy

    with exits():
        options: StartOptions = {
            "port": port,
            "storage": storage,
            "restart_policy": RestartPolicy[restart.upper().replace("-", "_")],
            "max_restarts": max_restarts,
            "exposure": cast("Exposure", exposure),
            # Captured, since what workers print may be meant for the terminal.
            "log_config": LogConfig(level=log_level, python_logger=None),
        }
        anyio.run(_serve, config, options, chosen)


def _check(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{option} is one of {', '.join(allowed)}")


async def _serve(config: Path | None, options: StartOptions, log_format: str) -> None:
    import anyio

    from ..groups import quiet_task_group
    from ..runtime import StepflowRuntime

    runtime = StepflowRuntime.start(config, **options)
    printer = _LogPrinter(runtime, log_format)
    async with quiet_task_group() as tasks:
        tasks.start_soon(printer.take)
        tasks.start_soon(printer.print)
        try:
            await runtime.serve(task_status=_Announcement())
        finally:
            # What a server says last is why it ended.
            with anyio.move_on_after(_LAST_LINES, shield=True):
                await printer.wait_printed()


class _Announcement:
    """Tells the URL as soon as there is one."""

    def started(self, runtime: StepflowRuntime | None = None) -> None:
        from .output import print_bytes

        assert runtime is not None
        print_bytes(f"{runtime.url}\n".encode())


class _LogPrinter:
    """Writes the log to standard error, many lines at a time: each write takes a thread.

    Nobody need read them: then they are dropped, and the server goes on.
    """

    def __init__(self, runtime: StepflowRuntime, format: str) -> None:
        import anyio

        from ..logs.rendering import as_json, as_text

        self._entries = runtime.logs(recent=_FIRST)
        self._render = as_json if format == "json" else as_text
        self._fd = None if sys.stderr is None else sys.stderr.fileno()
        self._lines: list[bytes] = []
        self._has_lines = anyio.Event()
        self._has_ended = False
        self._is_over = anyio.Event()

    async def take(self) -> None:
        async for entry in self._entries:
            if len(self._lines) < _MOST_WAITING:
                self._lines.append(self._render(entry))
                self._has_lines.set()
        self._has_ended = True
        self._has_lines.set()

    async def print(self) -> None:
        import anyio

        from ..threads import run_abandonable
        from .output import write_whole

        while not self._has_ended or self._lines:
            await self._has_lines.wait()
            self._has_lines = anyio.Event()
            lines, self._lines = self._lines, []
            if self._fd is None or not lines:
                continue
            try:
                await run_abandonable(write_whole, self._fd, b"\n".join([*lines, b""]))
            except OSError:
                self._fd = None
            await anyio.sleep(_GATHERING)
        self._is_over.set()

    async def wait_printed(self) -> None:
        await self._is_over.wait()
