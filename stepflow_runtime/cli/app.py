"""The command's words: what they take, what they print, how they exit.

Standard output carries results only, as JSON, to be piped; everything else goes to
standard error. Exit codes: 0 the flow succeeded, 1 it failed (the result says why), 2 the
command, its input or the workflow is wrong, 3 the server could not be started or died. The
commands ``doctor`` and ``visualize`` have rooms of their own.
"""

from __future__ import annotations

import os
import sys
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
import typer

from ..errors import ServerError, StepflowError
from ..executor import FlowResult, FlowStatus
from ..logs.config import LogConfig
from ..runtime import StepflowRuntime
from ..server.diagnosis import without_ansi
from .doctor import doctor
from .visualize import visualize

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Run Stepflow workflows on a server that lives as long as the command.",
)


class Exit(IntEnum):
    SUCCESS = 0
    FLOW_FAILED = 1
    WRONG_INPUT = 2
    SERVER_FAILED = 3


@app.callback()
def command() -> None:
    """Run Stepflow workflows on a server that lives as long as the command."""


app.command()(doctor)
app.command()(visualize)


@app.command()
def run(
    flow: Annotated[Path, typer.Argument(help="The workflow: a YAML or JSON file.")],
    input_text: Annotated[
        str | None, typer.Option("--input", "-i", help="The input, as JSON.")
    ] = None,
    input_file: Annotated[
        str | None,
        typer.Option(
            "--input-file", help="A file with the input as JSON; - for stdin."
        ),
    ] = None,
    variable: Annotated[
        list[str] | None,
        typer.Option(
            "--variable", "-v", help="NAME=VALUE; the value as JSON, or text."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A Stepflow configuration file."),
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="What the server logs, if something goes wrong.")
    ] = "info",
) -> None:
    """Run one workflow, and print its result as JSON."""
    value = _input(input_text, input_file)
    variables = dict(map(_variable, variable or []))
    try:
        result = anyio.run(_run, config, _log_config(log_level), flow, value, variables)
    except ServerError as exc:
        raise _failed(exc, Exit.SERVER_FAILED) from None
    except StepflowError as exc:
        raise _failed(exc, Exit.WRONG_INPUT) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    _print_json(_described(result))
    raise typer.Exit(Exit.SUCCESS if result.is_success else Exit.FLOW_FAILED)


async def _run(
    config: Path | None,
    log_config: LogConfig,
    flow: Path,
    value: Any,
    variables: dict[str, Any],
) -> FlowResult:
    async with StepflowRuntime.start(config, log_config=log_config) as runtime:
        result = await runtime.run(flow, value, variables=variables)
    _tell_why(result)
    return result


def _tell_why(result: FlowResult) -> None:
    """The result says little of why a flow failed ("step failed"); the log may say more."""
    if result.error is not None:
        typer.echo(f"failed: {without_ansi(str(result.error))}", err=True)


def _described(result: FlowResult) -> dict[str, Any]:
    """The result in the shape that Stepflow's own schema gives flow results."""
    described: dict[str, Any] = {"outcome": result.status.value}
    if result.status is FlowStatus.SUCCESS:
        described["result"] = result.output
    elif result.error is not None:
        described["error"] = {
            "code": result.error.code,
            "message": result.error.message,
        }
    return {**described, "runId": result.run_id}


def _input(text: str | None, file: str | None) -> Any:
    if text is not None and file is not None:
        raise typer.BadParameter("give --input or --input-file, not both")
    if text is not None:
        return _json(os.fsencode(text), "--input")
    if file is None:
        return {}
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as exc:
        raise typer.BadParameter(f"cannot read {file}: {exc.strerror}") from None
    return _json(content, f"--input-file {file}")


def _json(text: bytes, origin: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise typer.BadParameter(f"{origin} is not JSON: {exc}") from None


def _variable(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"--variable takes NAME=VALUE, not {text!r}")
    try:
        return name, msgspec.json.decode(os.fsencode(value))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return name, value


def _log_config(level: str) -> LogConfig:
    try:
        return LogConfig(level=level)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None


def _failed(exc: Exception, code: Exit) -> typer.Exit:
    typer.echo(f"error: {exc}", err=True)
    return typer.Exit(code)


def _print_json(value: Any) -> None:
    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    typer.echo(text.decode())
