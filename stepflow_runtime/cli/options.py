"""The options that several commands share, and what becomes of them.

Contract: what is wrong with an option is told before anything is started, by the option's
name. Standard input is read once, and no more of it than a request may carry.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeAlias

import typer

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from ..api import ApiExecutor
    from ..executor import FlowSource

__all__ = [
    "ConfigOption",
    "FlowArgument",
    "HeaderOption",
    "LevelOption",
    "Place",
    "QuietOption",
    "RemoteOption",
    "StorageOption",
    "VariableOption",
    "flow_of",
    "json_of",
    "read_input",
    "variables_of",
]

FlowArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="FLOW", help="The workflow: a YAML or JSON file; - for stdin."
    ),
]
ConfigOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A Stepflow configuration file."),
]
StorageOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--storage", help="Where runs are kept: an sqlite file. Without: in memory."
    ),
]
RemoteOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--remote",
        metavar="URL",
        envvar="STEPFLOW_RUNTIME_REMOTE",
        help="A server that is there already, in the place of one of the command's own.",
    ),
]
HeaderOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--header-env",
        metavar="VARIABLE",
        help="With --remote: an environment variable that holds a header, 'Name: value'. "
        "Arguments are seen by everybody on this machine.",
    ),
]
VariableOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--variable", "-v", help="NAME=VALUE; the value as JSON, or text."),
]
LevelOption: TypeAlias = Annotated[
    str,
    typer.Option("--log-level", help="What the server logs, if something is wrong."),
]
QuietOption: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress on standard error.")
]

# What the server takes in one request.
_LONGEST_INPUT: Final = 250 * 2**20


class Place(NamedTuple):
    """Where workflows run: on a server of the command's own, or elsewhere."""

    config: Path | None = None
    storage: str | None = None
    remote: str | None = None
    header_env: list[str] | None = None
    log_level: str = "info"

    def executor(self) -> AbstractAsyncContextManager[ApiExecutor]:
        """:raises typer.BadParameter: if the options do not go together"""
        if self.remote is None:
            if self.header_env:
                raise typer.BadParameter("--header-env needs --remote")
            return self._embedded()
        for name in ("config", "storage"):
            if getattr(self, name) is not None:
                raise typer.BadParameter(
                    f"--{name} is for a server of the command's own: not with --remote"
                )
        return _elsewhere(self.remote, dict(map(_header, self.header_env or ())))

    def _embedded(self) -> AbstractAsyncContextManager[ApiExecutor]:
        from ..logs.config import LogConfig
        from ..runtime import StepflowRuntime

        try:
            # Without a logger: what matters of the log is in the errors.
            log_config = LogConfig(level=self.log_level, python_logger=None)
        except ValueError as exc:
            raise typer.BadParameter(str(exc)) from None
        # In its own event loop this checks the options, and starts nothing yet.
        return _Later(
            lambda: StepflowRuntime.start(
                self.config, storage=self.storage, log_config=log_config
            )
        )


class _Later:
    """Makes the runtime where it is entered: ``start`` outside a loop would start it."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self._made: Any = None

    async def __aenter__(self) -> ApiExecutor:
        self._made = self._make()
        entered: ApiExecutor = await self._made.__aenter__()
        return entered

    async def __aexit__(self, *exc_info: object) -> bool | None:
        left: bool | None = await self._made.__aexit__(*exc_info)
        return left


def _elsewhere(
    url: str, headers: dict[str, str]
) -> AbstractAsyncContextManager[ApiExecutor]:
    from contextlib import asynccontextmanager

    from ..client import StepflowClient
    from ..hosting.signals import unwinding_on_sigterm

    @asynccontextmanager
    async def entered() -> Any:
        # As around a runtime: what is under way there is to be cancelled.
        with unwinding_on_sigterm():
            async with StepflowClient(url, headers=headers) as client:
                yield client

    return entered()


def _header(variable: str) -> tuple[str, str]:
    text = os.environ.get(variable)
    if text is None:
        raise typer.BadParameter(f"--header-env: {variable} is not set")
    name, colon, value = text.partition(":")
    if not (colon and name.strip()):
        raise typer.BadParameter(f"--header-env: {variable} holds no 'Name: value'")
    return name.strip(), value.strip()


# -- workflows and inputs ----------------------------------------------------------------


def flow_of(argument: str) -> FlowSource:
    """The path, or the document that stands on standard input.

    :raises FlowDefinitionError: if that is none
    """
    if argument != "-":
        return Path(argument)
    from ..flows import parse

    text, source = flow_text("-")
    return parse(text, source)


def flow_text(argument: str) -> tuple[bytes, str]:
    """A workflow's text, and what it is to be called; ``.json`` at its end if it is that.

    :raises OSError: if it cannot be read
    """
    from ..bounded import LARGEST_FILE, read_file

    if argument != "-":
        return read_file(argument), argument
    text = read_stdin(LARGEST_FILE)
    return text, "<stdin>.json" if text.lstrip()[:1] == b"{" else "<stdin>"


def read_input(text: str | None, file: str | None) -> Any:
    if text is not None and file is not None:
        raise typer.BadParameter("give --input or --input-file, not both")
    if text is not None:
        return json_of(os.fsencode(text), "--input")
    if file is None:
        return {}
    try:
        content = read_stdin(_LONGEST_INPUT) if file == "-" else _read(file)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise typer.BadParameter(f"cannot read {file}: {reason}") from None
    return json_of(content, f"--input-file {file}")


def _read(file: str) -> bytes:
    """A file or a pipe, such as the shell's ``<(command)``."""
    with open(file, "rb") as opened:
        return _bounded(opened.read(_LONGEST_INPUT + 1), file, _LONGEST_INPUT)


def read_stdin(at_most: int) -> bytes:
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return _bounded(sys.stdin.buffer.read(at_most + 1), "standard input", at_most)


def _bounded(content: bytes, name: str, at_most: int) -> bytes:
    if len(content) > at_most:
        raise ValueError(f"{name} is more than {at_most} bytes, and no more are read")
    return content


def json_of(text: bytes, origin: str) -> Any:
    import msgspec

    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise typer.BadParameter(f"{origin} is not JSON: {exc}") from None


def variables_of(texts: list[str] | None) -> dict[str, Any]:
    return dict(map(_variable, texts or ()))


def _variable(text: str) -> tuple[str, Any]:
    import msgspec

    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"--variable takes NAME=VALUE, not {text!r}")
    try:
        return name, msgspec.json.decode(os.fsencode(value))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return name, value
