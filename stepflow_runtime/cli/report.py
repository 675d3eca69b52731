"""What ``doctor`` has found, and how it is shown: never with what is nobody's business.

Contract: :class:`Redaction` goes over each text of a finding before it is shown, also over
what servers and workers said. It takes out values of environment variables, passwords in
URLs, and where this user's home is; and what a terminal would obey. It cannot know a secret
that stands nowhere but in a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

import msgspec

from ..server.diagnosis import without_ansi

__all__ = ["Finding", "Redaction", "State", "as_text"]

# A value that is shorter stands in many a word that has nothing to do with it.
_SHORTEST_VALUE: Final = 8
_SHORTEST_SECRET: Final = 4
_OF_SECRETS: Final = re.compile(
    "key|token|secret|passw|pwd|credential|auth|cookie|dsn", re.IGNORECASE
)
_USERINFO: Final = re.compile(r"(?<=://)[^\s\"'<>]*@")
_PARAMETER: Final = re.compile(
    r"\b(\w*(?:key|token|secret|passw(?:or)?d)\w*=)[^\s&\"',;]+", re.IGNORECASE
)

# Names stand below each other.
_STATE_WIDTH: Final = 9
_NAME_WIDTH: Final = 15


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check has found.

    :ivar what: what there is, a line; more lines, if it is what somebody else said
    :ivar advice: what to do about it; empty if there is nothing to do
    :ivar details: the same for programs, where it is made of several things
    """

    name: str
    state: State
    what: str
    advice: str = ""
    details: dict[str, Any] = {}


class Redaction:
    """What must not be told of a user and an environment."""

    def __init__(self, environ: Mapping[str, str], home: str) -> None:
        hidden = [
            (value, name) for name, value in environ.items() if _is_hidden(name, value)
        ]
        # Of two values, the longer one may hold the other.
        self._names = dict(sorted(hidden, key=lambda each: -len(each[0])))
        self._values = _any_of(self._names)
        homes = {home.rstrip("/"), os.path.realpath(home).rstrip("/")} - {""}
        self._homes = re.compile(rf"(?<![\w./-])(?:{_any_of(homes).pattern})(?![\w.-])")

    def finding(self, finding: Finding) -> Finding:
        return msgspec.structs.replace(
            finding,
            what=self(finding.what),
            advice=self(finding.advice),
            details=self._within(finding.details),
        )

    def __call__(self, text: str) -> str:
        text = self._values.sub(lambda match: f"${self._names[match[0]]}", text)
        text = _PARAMETER.sub(r"\1***", _USERINFO.sub("***@", text))
        return _printable(self._homes.sub("~", text))

    def _within(self, value: Any) -> Any:
        if isinstance(value, str):
            return self(value)
        if isinstance(value, dict):
            return {name: self._within(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._within(each) for each in value]
        return value


def _is_hidden(name: str, value: str) -> bool:
    if _OF_SECRETS.search(name):
        return len(value) >= _SHORTEST_SECRET
    # The places of files are what a report is about.
    return len(value) >= _SHORTEST_VALUE and not value.startswith((os.sep, "~"))


def _any_of(texts: Mapping[str, str] | set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _printable(text: str) -> str:
    return "".join(
        each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}"
        for each in without_ansi(text).replace("\t", " ")
    )


def as_text(finding: Finding) -> str:
    """Lines for a person: the state, the name, what there is, and what to do."""
    margin = " " * (_STATE_WIDTH + _NAME_WIDTH)
    first, *others = finding.what.splitlines() or [""]
    head = f"{finding.state:<{_STATE_WIDTH}}{finding.name:<{_NAME_WIDTH}}{first}"
    lines = [head, *(margin + line for line in others)]
    if finding.advice:
        lines.append(f"{margin}-> {finding.advice}")
    return "\n".join(lines)
