"""Text for terminals: what strangers wrote, made harmless; figures for people.

A leaf. Contract: pure. Step ids, messages and outputs come from whoever wrote the workflow
and the components: none of it moves the cursor, changes a colour or reverses a line.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["counted", "harmless_json", "one_line", "printable", "seconds"]

_COLOUR: Final = re.compile(r"\x1b\[[0-9;:]*m")

# JSON escapes the controls of ASCII but DEL; terminals take U+009B for the beginning of a
# command.
_UNESCAPED: Final = re.compile(rb"\x7f|\xc2[\x80-\x9f]")


def printable(text: str) -> str:
    """Lines as they are, and in the place of controls a mark."""
    text = _COLOUR.sub("", text).replace("\t", " ")
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}"
        for each in text
    )


def one_line(text: str) -> str:
    return " ".join(printable(text).split("\n"))


def harmless_json(encoded: bytes) -> bytes:
    """The same JSON, with controls as their escapes."""
    if encoded.isascii() and b"\x7f" not in encoded:
        return encoded
    return _UNESCAPED.sub(lambda match: b"\\u%04x" % match[0][-1], encoded)


def seconds(duration: float) -> str:
    """A duration, short: ``0.4 s``, ``2:05``, ``1:02:05``."""
    if duration < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(int(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(number: int, what: str) -> str:
    """A number of things: ``1 file``, ``2 files``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
