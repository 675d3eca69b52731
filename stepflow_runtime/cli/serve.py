"""``stepflow-runtime serve``: a server in the foreground, kept alive, until it is told to stop.

Contract: the URL is all there is on standard output, one line, written when the server is
READY. Its log goes to standard error. When the command ends, by whatever way, the server and its
workers are gone.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .exits import exits
from .options import ConfigOption, LevelOption, StorageOption

if TYPE_CHECKING:
    from pathlib import Path

    from ..runtime import StepflowRuntime
    from ..server.options import Exposure, StartOptions

__all__ = ["serve"]

_RESTARTS = ("on-failure", "always", "never")
_EXPOSURES = ("loopback", "require-loopback", "any")


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
    from ..groups import quiet_task_group
    from ..runtime import StepflowRuntime

    runtime = StepflowRuntime.start(config, **options)
    async with quiet_task_group() as tasks:
        tasks.start_soon(_print_logs, runtime, log_format)
        await runtime.serve(task_status=_Announcement())


class _Announcement:
    """Tells the URL as soon as there is one."""

    def started(self, runtime: StepflowRuntime | None = None) -> None:
        from .output import print_bytes

        assert runtime is not None
        print_bytes(f"{runtime.url}\n".encode())


async def _print_logs(runtime: StepflowRuntime, format: str) -> None:
    from ..logs.rendering import as_json, as_text
    from ..threads import run_abandonable
    from .output import write_whole

    render = as_json if format == "json" else as_text
    if sys.stderr is None:
        return
    fd = sys.stderr.fileno()
    try:
        async for entry in runtime.logs(recent=2000):
            await run_abandonable(write_whole, fd, render(entry) + b"\n")
    except OSError:
        return  # nobody reads it any more, and the server is needed all the same
