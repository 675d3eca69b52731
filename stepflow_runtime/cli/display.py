"""Where progress is shown: a terminal that can be drawn on, plain lines, or nowhere.

Contract: standard error only, and nothing of it matters to the work: a terminal that is gone is
not told any more. A drawing takes a twentieth of the time at most: after one that took
long, the next one waits.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import anyio

from ..groups import quiet_task_group

if TYPE_CHECKING:
    from rich.console import Console

    from .drawing import Glyphs, Line

__all__ = ["can_draw", "drawn", "told"]

# Seconds between two drawings, and how much longer than the drawing itself.
_BETWEEN: Final = 0.1
_SHARE: Final = 20

Draw = Callable[[int, int, "Glyphs"], "list[Line]"]


def can_draw() -> bool:
    """True if standard error is a terminal that is more than a printer."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    return os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown", "")


@asynccontextmanager
async def drawn(draw: Draw) -> Any:
    """Draw again and again while the block lasts, and once more at its end.

    :param draw: makes lines of at most so many columns, and so many of them
    """
    console = _console()
    glyphs = _glyphs(console.encoding)
    with _live(console) as update:

        def draw_once() -> float:
            began = time.monotonic()
            width, height = console.size
            # At the end of the last line there must be room for the ^C that is echoed.
            update(draw(width - 3, height - 1, glyphs))
            return time.monotonic() - began

        async def draw_on() -> None:
            while True:  # noqa: ASYNC110 - it is time that is waited for
                await anyio.sleep(max(_BETWEEN, _SHARE * draw_once()))

        try:
            async with quiet_task_group() as tasks:
                tasks.start_soon(draw_on)
                try:
                    yield
                finally:
                    tasks.cancel_scope.cancel()
        finally:
            draw_once()


@asynccontextmanager
async def told(say: Callable[[], None], every: float) -> Any:
    """Call ``say`` every so many seconds while the block lasts."""

    async def say_on() -> None:
        while True:
            await anyio.sleep(every)
            say()

    async with quiet_task_group() as tasks:
        tasks.start_soon(say_on)
        try:
            yield
        finally:
            tasks.cancel_scope.cancel()


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, force_terminal=True)


def _glyphs(encoding: str) -> Glyphs:
    from .drawing import ASCII, UNICODE

    try:
        "".join([*UNICODE.marks.values(), *UNICODE[1:]]).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


@contextmanager
def _live(console: Console) -> Iterator[Callable[[list[Line]], None]]:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from .progress import Phase

    colours = {
        Phase.WAITING: "dim",
        Phase.RUNNING: "cyan",
        Phase.COMPLETED: "green",
        Phase.FAILED: "red",
    }

    def text(line: Line) -> Text:
        style = "bold" if line.phase is None else colours[line.phase]
        return Text(line.text, style=style, no_wrap=True, overflow="crop")

    is_gone = False

    def update(lines: list[Line]) -> None:
        nonlocal is_gone
        if is_gone:
            return
        try:
            live.update(Group(*map(text, lines)), refresh=True)
        except OSError:
            is_gone = True

    live = Live(
        console=console,
        auto_refresh=False,  # it would take a thread
        vertical_overflow="crop",
        redirect_stdout=False,
    )
    # Of a terminal that is gone, nobody has to know.
    with suppress(OSError):
        live.start()
    try:
        yield update
    finally:
        with suppress(OSError):
            live.stop()
