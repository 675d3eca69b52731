"""Inputs that nobody has thought of, made of those in the corpus.

An input follows from the corpus, a seed and its number, whatever was made before it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["Mutator"]

# Most are short, so that there are many; what is quadratic shows in a long one.
_SHORT: Final = 16 * 1024
_LONG: Final = 512 * 1024
_NUMBER: Final = re.compile(rb"\d+(?:\.\d+)?")


class Mutator:
    """:param words: what is inserted besides what is there"""

    def __init__(
        self, corpus: Sequence[bytes], words: Sequence[bytes], seed: str
    ) -> None:
        self._corpus = corpus
        self._words = words
        self._seed = seed

    def make(self, number: int) -> bytes:
        rng = random.Random(f"{self._seed}/{number}")
        data = rng.choice(self._corpus)
        for _ in range(rng.choice((1, 1, 2, 3, 5, 10))):
            data = rng.choice(_CHANGES)(self, data, rng)[:_LONG]
        return data if rng.random() < 0.02 else data[:_SHORT]

    def _flip(self, data: bytes, rng: random.Random) -> bytes:
        if not data:
            return bytes([rng.randrange(256)])
        place = rng.randrange(len(data))
        flipped = data[place] ^ (1 << rng.randrange(8))
        return data[:place] + bytes([flipped]) + data[place + 1 :]

    def _overwrite(self, data: bytes, rng: random.Random) -> bytes:
        i, j = _range(data, rng, 8)
        return data[:i] + rng.randbytes(j - i) + data[j:]

    def _delete(self, data: bytes, rng: random.Random) -> bytes:
        i, j = _range(data, rng, 200)
        return data[:i] + data[j:]

    def _truncate(self, data: bytes, rng: random.Random) -> bytes:
        return data[: rng.randint(0, len(data))]

    def _insert(self, data: bytes, rng: random.Random) -> bytes:
        place = rng.randint(0, len(data))
        return data[:place] + rng.choice(self._words) + data[place:]

    def _replace(self, data: bytes, rng: random.Random) -> bytes:
        i, j = _range(data, rng, 20)
        return data[:i] + rng.choice(self._words) + data[j:]

    def _renumber(self, data: bytes, rng: random.Random) -> bytes:
        found = list(_NUMBER.finditer(data, 0, _SHORT))
        if not found:
            return self._insert(data, rng)
        number = rng.choice(found)
        return data[: number.start()] + rng.choice(self._words) + data[number.end() :]

    def _repeat(self, data: bytes, rng: random.Random) -> bytes:
        i, j = _range(data, rng, 500)
        times = rng.choice((2, 2, 3, 10, 100, 5000))
        return data[:i] + data[i:j] * times + data[j:]

    def _splice(self, data: bytes, rng: random.Random) -> bytes:
        other = rng.choice(self._corpus)
        place, start = rng.randint(0, len(data)), rng.randint(0, len(other))
        return data[:place] + other[start:]

    def _shuffle(self, data: bytes, rng: random.Random) -> bytes:
        lines = data.split(b"\n")
        i = rng.randrange(len(lines))
        lines.insert(rng.randrange(len(lines)), lines.pop(i))
        return b"\n".join(lines)


def _range(data: bytes, rng: random.Random, longest: int) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.randint(1, longest))


_CHANGES: Final[Sequence[Callable[[Mutator, bytes, random.Random], bytes]]] = (
    Mutator._flip,
    Mutator._overwrite,
    Mutator._delete,
    Mutator._truncate,
    Mutator._insert,
    Mutator._insert,
    Mutator._replace,
    Mutator._renumber,
    Mutator._renumber,
    Mutator._repeat,
    Mutator._splice,
    Mutator._shuffle,
)
