"""What of a configuration, or an environment, is nobody's to read, and stars in its place.

Contract: pure. A secret is told by the name that it has there, or by its place in a URL;
what is given neither a telling name nor such a place is not known to be one. It stands in
no repr.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import unquote

__all__ = ["Secrets"]

_NAME: Final = re.compile(
    r"(?i:passw|passphrase|secret|token|credential|authorization|cookie"
    r"|(?:api|access|private)[-_]?key)|(?:^|_)(?:KEY|PW|PWD|PASS|PAT)$"
)

# A shorter one could be a part of half the words in the log.
_SHORTEST: Final = 6

_STARS: Final = b"***"

_QUERY: Final = re.compile(r"[?&]([^=&#\s]+)=([^&#\s]+)")


@dataclass(frozen=True)
class Secrets:
    """What is to be hidden in lines.

    :ivar passwords: those of URLs, hidden where they stand in one
    :ivar words: hidden wherever they stand
    """

    passwords: frozenset[str] = field(default=frozenset(), repr=False)
    words: frozenset[str] = field(default=frozenset(), repr=False)
    _wanted: tuple[bytes, ...] = field(init=False, repr=False, compare=False)
    _pattern: re.Pattern[bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        words, passwords = _encoded(self.words), _encoded(self.passwords)
        one = b"(?:" + b"|".join(map(re.escape, passwords)) + b")"
        anywhere = map(re.escape, words)
        in_urls = [b"(?<=:)" + one + b"(?=@)", b"(?<=password=)" + one]
        pattern = b"|".join([*anywhere, *(in_urls if passwords else ())])
        object.__setattr__(self, "_wanted", (*words, *passwords))
        object.__setattr__(self, "_pattern", re.compile(pattern))

    @classmethod
    def of(cls, *places: object) -> Self:
        """Those in configurations and environments, as far as they can be told."""
        passwords: set[str] = set()
        words: set[str] = set()
        for is_named, text in _texts(places):
            if is_named:
                # Whoever prints a key of several lines prints them one by one.
                words.update((text, *text.splitlines()))
            if "://" in text:
                passwords.update(_passwords(text))
                words.update(
                    form
                    for name, value in _QUERY.findall(text)
                    if _NAME.search(name)
                    for form in (value, unquote(value))
                )
        return cls(
            frozenset(passwords),
            frozenset(word for word in words if len(word.strip()) >= _SHORTEST),
        )

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def __or__(self, other: Secrets) -> Secrets:
        return Secrets(self.passwords | other.passwords, self.words | other.words)

    def starred(self, lines: Sequence[bytes]) -> Sequence[bytes]:
        """The lines, with stars in the place of each."""
        # To look for one after the other in all lines at once takes a fraction of what the
        # pattern takes, which tries all of them at each place; and mostly there is none.
        text = b"\n".join(lines)
        if any(word in text for word in self._wanted):
            return [self._pattern.sub(_STARS, line) for line in lines]
        return lines


def _texts(places: object) -> Iterator[tuple[bool, str]]:
    """Every text in there, and whether its name says that it is a secret."""
    left: list[tuple[bool, object]] = [(False, places)]
    while left:
        is_named, value = left.pop()
        if isinstance(value, str):
            yield is_named, value
        elif isinstance(value, Mapping):
            left += [
                (is_named or _is_telling(name, of), of) for name, of in value.items()
            ]
        elif isinstance(value, list | tuple):
            left += [(is_named, each) for each in value]


def _is_telling(name: object, of: object) -> bool:
    if not isinstance(name, str):
        return False
    # A worker's environment that is no mapping is quoted by the server, which refuses it.
    return _NAME.search(name) is not None or (name == "env" and isinstance(of, str))


def _passwords(url: str) -> Iterator[str]:
    """What of a URL is nobody's to read.

    The server prints it when it cannot connect, and that is when it is not as it should
    be: an ``@`` or ``/`` in a password, which are to be quoted there.
    """
    rest = url.partition("://")[2]
    proper = re.split("[/?#]", rest)[0].rpartition("@")[0]
    for credentials in (
        proper,
        rest.rpartition("@")[0],
        rest[: max(rest.find("@"), 0)],
    ):
        if password := credentials.partition(":")[2]:
            yield password
            yield unquote(password)
    yield from re.findall("[?&]password=([^&#]+)", url)


def _encoded(texts: frozenset[str]) -> list[bytes]:
    """As they may stand in lines, the longest first. In JSON they may look different."""
    in_json = (json.dumps(each, ensure_ascii=False)[1:-1] for each in texts)
    longest_first = sorted({*texts, *in_json}, key=len, reverse=True)
    return [each.encode(errors="replace") for each in longest_first]
