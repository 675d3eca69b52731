"""Words and values as HTML: what pages of runs and notebooks have in common.

Contract: no text is more than text in it, in an element as in an attribute, where it has no
quotes; and a value is as long as whoever shows it allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from html import escape
from typing import Any, Final

import msgspec

from .drawing import harmless
from .graph import StepState
from .server.secrecy import Secrets
from .timeline import Omitted

__all__ = [
    "PEEK",
    "Values",
    "as_text",
    "counted",
    "cut",
    "lasting",
    "mark",
    "number_of",
    "size_of",
]

# Characters of a value in a list.
PEEK: Final = 120


def as_text(value: str) -> str:
    return escape(harmless(value), quote=True)


def cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def lasting(duration: timedelta | None) -> str:
    if duration is None:
        return ""
    seconds = max(duration.total_seconds(), 0.0)
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def number_of(number: int, what: str, several: str | None = None) -> str:
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def mark(state: StepState) -> str:
    return f'<b class="mark {state.value}" title="{state.value}">{state.mark}</b>'


class Values:
    """What runs have made, as text that may stand in a page.

    :param values: all that there is; what is a secret by its name in one is in all
    :param longest: so many characters of each are shown
    :param most: and about so many of all together
    """

    def __init__(self, values: Iterable[Any], *, longest: int, most: int) -> None:
        self._longest = longest
        self._left = most
        self._secrets = Secrets.of(*map(_decoded, values))

    def block(self, title: str, value: Any, note: str = "") -> str:
        if isinstance(value, Omitted):
            size = "" if value.size is None else f" ({value.size:,} bytes)"
            return f"<h3>{title} <small>left out{size}</small></h3>"
        return self.block_of_text(title, self.pretty(value), note)

    def block_of_text(self, title: str, text: str, note: str = "") -> str:
        """One whose secrets are starred already."""
        longest = min(self._longest, max(self._left, PEEK))
        self._left -= min(len(text), longest)
        if len(text) > longest:
            note = f"the first of {len(text):,} characters {note}"
        small = f" <small>{note}</small>" if note else ""
        head = f"<h3>{title}{small}</h3>" if title or small else ""
        return f"{head}<pre>{as_text(cut(text, longest))}</pre>"

    def pretty(self, value: Any) -> str:
        encoded = self._starred(_encoded(value))
        with suppress(msgspec.MsgspecError, RecursionError):
            encoded = msgspec.json.format(encoded, indent=2)
        return encoded.decode(errors="replace")

    def peek(self, value: Any) -> str:
        if isinstance(value, Omitted):
            return ""
        encoded = self._starred(_encoded(value))
        return cut(encoded[: 4 * PEEK].decode(errors="replace"), PEEK)

    def text(self, text: str) -> str:
        return self._starred(text.encode(errors="replace")).decode(errors="replace")

    def _starred(self, text: bytes) -> bytes:
        return self._secrets.starred([text])[0] if self._secrets else text


def size_of(value: Any) -> int:
    """How long it is as JSON, in bytes."""
    return len(_encoded(value))


def _encoded(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError):  # by hand: what no server gives
        return f"({type(value).__name__})".encode()


def _decoded(value: Any) -> Any:
    with suppress(msgspec.MsgspecError, RecursionError):
        return msgspec.json.decode(_encoded(value))
    return None


def counted(counts: Mapping[StepState, int]) -> str:
    return ", ".join(
        f"{mark(state)}{counts[state]:,} {state.value}"
        for state in StepState
        if counts.get(state)
    )
