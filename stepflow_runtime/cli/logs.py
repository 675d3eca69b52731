"""``stepflow-runtime logs``: a log file of a runtime, filtered, for people or for programs.

Contract: reads what ``LogConfig(file_path=...)`` writes, and what the server itself does as
JSON; every line is an entry, also one that is none of theirs. Memory is bounded by the longest
line. What a terminal would obey comes out as an escape.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from .exits import exits

if TYPE_CHECKING:
    from ..logs.entry import LogEntry

__all__ = ["logs"]

_LOOK: Final = 0.2
_CHUNK: Final = 2**16
_LONGEST: Final = 16 * 2**20
_AGO: Final = re.compile(r"(\d+)([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_COLOURS: Final = {
    "ERROR": typer.colors.RED,
    "WARN": typer.colors.YELLOW,
    "DEBUG": typer.colors.BRIGHT_BLACK,
    "TRACE": typer.colors.BRIGHT_BLACK,
}


def logs(
    file: Annotated[str, typer.Argument(help="The log file; - for stdin.")],
    level: Annotated[
        str | None, typer.Option(help="Only entries as severe as this, or more.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Only those of this run.")
    ] = None,
    step: Annotated[
        str | None, typer.Option("--step", help="Only those of this step.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Only newer ones: 90s, 10m, 2h, 1d, or a date."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes.")
    ] = False,
    format: Annotated[
        str,
        typer.Option(metavar="json|text", help="Without: text on a terminal."),
    ] = "",
) -> None:
    """Read a log file: pretty on a terminal, JSON in a pipe."""
    if format not in ("", "json", "text"):
        raise typer.BadParameter("--format is one of json, text")
    from ..logs.config import checked_level
    from ..logs.entry import LEVELS, decode
    from .output import print_bytes

    try:
        least = LEVELS.index(checked_level("--level", level).lower())
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
    after = None if since is None else _moment(since)
    show = _shower(format or ("text" if sys.stdout.isatty() else "json"))

    def is_wanted(entry: LogEntry) -> bool:
        return (
            LEVELS.index(entry.level.lower()) >= least
            and (run is None or entry.run_id == run)
            and (step is None or entry.step_id == step)
            and (after is None or entry.timestamp >= after)
        )

    with exits():
        for lines in _chunks(file, follow):
            entries = (decode(line, "stdout") for line in lines)
            shown = b"".join(show(entry) for entry in entries if is_wanted(entry))
            if shown:
                print_bytes(shown)


def _moment(text: str) -> datetime:
    if match := _AGO.fullmatch(text):
        ago = timedelta(**{_UNITS[match[2]]: int(match[1])})
        return datetime.now(UTC) - ago
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"--since takes 90s, 10m, 2h, 1d, or a date like 2026-11-23T18:00, not {text!r}"
        ) from None
    return moment.astimezone()  # one without an offset is of this machine's zone


def _shower(format: str) -> Callable[[LogEntry], bytes]:
    from ..logs.rendering import as_json, as_text

    def show(entry: LogEntry) -> bytes:
        if format == "json":
            return as_json(entry) + b"\n"
        text = as_text(entry)
        colour = _COLOURS.get(entry.level)
        if colour is None or not sys.stdout.isatty() or "NO_COLOR" in os.environ:
            return text + b"\n"
        return typer.style(text.decode(), fg=colour).encode() + b"\n"

    return show


# -- files -----------------------------------------------------------------------------


def _chunks(name: str, follow: bool) -> Iterator[list[bytes]]:
    """The lines of the file, as they come, some at a time."""
    rest = b""
    for data in _data(name, follow):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _LONGEST:
            lines, rest = [*lines, rest], b""
        yield [line for line in lines if line]
    if rest:
        yield [rest]


def _data(name: str, follow: bool) -> Iterator[bytes]:
    if name == "-":
        with open(sys.stdin.fileno(), "rb", closefd=False) as file:
            yield from iter(lambda: file.read1(_CHUNK), b"")
        return
    while True:
        with Path(name).open("rb") as file:
            yield from iter(lambda file=file: file.read1(_CHUNK), b"")  # type: ignore[misc]
            while follow and not _is_another(file, name):
                time.sleep(_LOOK)
                yield from iter(lambda file=file: file.read1(_CHUNK), b"")  # type: ignore[misc]
        if not follow:
            return


def _is_another(file: BufferedReader, name: str) -> bool:
    """True if the file was moved away, and another one is there, or if it was cut."""
    with suppress(OSError):
        now, then = os.stat(name), os.fstat(file.fileno())
        is_moved = (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)
        return is_moved or then.st_size < file.tell()
    return False
