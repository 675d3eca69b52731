"""Which lines of standard error belong together: those of a traceback, or of a panic.

Contract: each line that is fed to a :class:`Grouper` comes back exactly once, and in order,
as a text of its own or joined with its neighbours by newlines. A line that opens no group,
while none is open, comes back at once. Nothing is raised, whatever the lines are, and what
is held back is bounded.

Workers and the server share the pipe, so any line may be a stranger's. A line goes into a
group if the lines around it tell that it is of it: it is indented below it, it repeats
the message that the worker has announced, or it stands before a link to the next traceback.
Where lines cannot tell, silence does: what came in one go, with nothing after it, belongs
together; and if something else came first, each line is an entry of its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from enum import Enum, auto
from typing import Final

__all__ = ["Grouper"]

# A traceback has some hundred lines at most: Python abridges recursion, and workers do not
# print frames of libraries by the thousand. Groups of exceptions may be long.
MOST_LINES: Final = 2000
MOST_BYTES: Final = 1024 * 1024

# So many lines are waited through for one that tells whether they belong to the group. It
# is the longest message that an exception can have whose traceback is to be joined with
# the next; and lines of a worker that never pauses are not held back for longer.
MOST_DOUBTFUL: Final = 100

# A server that looks up the names of its frames pauses for 0.1 s within a backtrace, and a
# process that is starved anywhere. A pause is 5 ms.
PATIENCE: Final = 200

# What the Python worker prints of a component that raised; its traceback comes right after.
_FAILURE: Final = re.compile(rb"Component \S+ failed: ?")
_TRACEBACK: Final = re.compile(
    rb"(\s*)(\+ Exception Group )?Traceback \(most recent call last\):\s*"
)
# Of a syntax error in the program itself there is no more than this.
_SYNTAX_ERROR: Final = re.compile(rb'  File "[^"]+", line \d+\s*')
_BOXED: Final = re.compile(rb"\s*[|+]")
_BOX_END: Final = re.compile(rb"\s*\+-{9,}\s*")
_EXCEPTION: Final = re.compile(rb"[^\s:]+(?::|: .*)?", re.DOTALL)
_LINK: Final = re.compile(
    rb"The above exception was the direct cause of the following exception:"
    rb"|During handling of the above exception, another exception occurred:"
)

_PANIC: Final = re.compile(rb"thread '.*' (?:\(\d+\) )?panicked at ")
_BACKTRACE: Final = b"stack backtrace:"
_BACKTRACE_FRAME: Final = re.compile(rb"\s+\S|\d+: ")
_PANIC_END: Final = re.compile(
    rb"note: (?:run with `RUST_BACKTRACE=|Some details are omitted, run with `RUST_BACKT)"
)

_OPENINGS: Final = (b"panicked at", b" failed:", b"Traceback", b"  File ")
_FAR: Final = 4096

# The server's own lines, and those of a worker whose logging is set up.
_LOG_LINE: Final = re.compile(rb'\{"timestamp": ?"')


class Grouper:
    """Joins the lines of a traceback or a panic."""

    def __init__(self) -> None:
        self._group: _Group | None = None
        self._lines: list[bytes] = []
        self._size = 0
        self._sure = 0  # so many of the lines are known to be of the group
        self._pauses = 0

    @property
    def is_open(self) -> bool:
        """True if something is held back: then pauses and the end have to be told."""
        return self._group is not None

    def feed(self, line: bytes) -> list[bytes]:
        """Take the next line; return the texts that are complete now."""
        if self._group is None:
            return self._begin(line)
        verdict = self._group.judge(line)
        if verdict is _Verdict.NO or not self._has_room(line):
            return [*self._close(), *self._begin(line)]
        self._hold(line, verdict)
        return self.flush() if verdict is _Verdict.LAST else []

    def pause(self) -> list[bytes]:
        """Hear that nothing came for a moment; return what is taken to be complete by that.

        A group that cannot be over, such as a traceback without its exception, stays for
        ``PATIENCE`` pauses.
        """
        if self._group is None:
            return []
        self._pauses += 1
        if self._group.goes_on and self._pauses < PATIENCE:
            return []
        return self.flush()

    def flush(self) -> list[bytes]:
        """Return what is held back, as one text: nothing comes any more."""
        self._sure = len(self._lines)
        return self._close()

    def _begin(self, line: bytes) -> list[bytes]:
        self._group = _group_of(line)
        if self._group is None:
            return [line]
        self._hold(line, _Verdict.YES)
        return []

    def _hold(self, line: bytes, verdict: _Verdict) -> None:
        self._lines.append(line)
        self._size += len(line) + 1
        if verdict is not _Verdict.PERHAPS:
            self._sure = len(self._lines)
            self._pauses = 0

    def _has_room(self, line: bytes) -> bool:
        return len(self._lines) < MOST_LINES and self._size + len(line) <= MOST_BYTES

    def _close(self) -> list[bytes]:
        lines, sure = self._lines, self._sure
        self._group, self._lines, self._size, self._sure = None, [], 0, 0
        return [b"\n".join(lines[:sure]), *lines[sure:]] if lines else []


class _Verdict(Enum):
    """Whether a line is of a group."""

    YES = auto()  # and so are all before it
    LAST = auto()  # as YES, and there is nothing after it
    PERHAPS = auto()
    NO = auto()


class _Group(ABC):
    """One traceback or panic, as far as it has come."""

    def __init__(self) -> None:
        self._doubtful = 0  # so many of the last lines are of it perhaps

    @property
    @abstractmethod
    def goes_on(self) -> bool:
        """True if more is certain to come."""

    def judge(self, line: bytes) -> _Verdict:
        """Take the next line; say whether it is of the group."""
        verdict = self._judge(line)
        self._doubtful = self._doubtful + 1 if verdict is _Verdict.PERHAPS else 0
        return verdict if self._doubtful <= self._most_doubtful else _Verdict.NO

    @abstractmethod
    def _judge(self, line: bytes) -> _Verdict: ...

    @property
    def _most_doubtful(self) -> int:
        return MOST_DOUBTFUL

    def _is_below(self, line: bytes) -> bool:
        """True if a line is indented below one that is known to be of the group."""
        return not self._doubtful and _is_indented(line)


class _Traceback(_Group):
    """A Python traceback with those of its causes and contexts.

    :param message: the first line of the message that the worker has announced, if it has
    """

    def __init__(self, message: bytes | None = None) -> None:
        super().__init__()
        self._part = _Part.FRAMES if message is None else _Part.MESSAGE
        # What came since the announcement, and how much of it is the message.
        self._told = [] if message is None else [message]
        self._message: list[bytes] = []
        self._margin = b""
        # What is left of the message, if the exception's own line has begun to repeat it.
        self._due: deque[bytes] = deque()
        self._has_said_all = False
        self._is_linked = False
        self._was_blank = False

    @property
    def goes_on(self) -> bool:
        if self._part is _Part.BOX:
            return self._is_linked or not self._has_said_all
        return self._is_linked or bool(self._due) or self._part is not _Part.TAIL

    @property
    def _most_doubtful(self) -> int:
        # What is announced comes, after however long a message.
        return MOST_LINES if self._part is _Part.MESSAGE else MOST_DOUBTFUL

    def judge(self, line: bytes) -> _Verdict:
        verdict = super().judge(line)
        self._was_blank = not line.strip()
        if self._told:
            self._told.append(line)
        return verdict

    def open(self, opener: re.Match[bytes]) -> None:
        """Begin the next traceback."""
        self._margin = opener[1]
        self._part = _Part.FRAMES if opener[2] is None else _Part.BOX
        self._has_said_all = self._is_linked = False

    def _judge(self, line: bytes) -> _Verdict:
        if self._due and self._due[0] == line:
            self._due.popleft()
            return _Verdict.YES
        if self._due:
            # Another exception, that only begins with the same words.
            self._due.clear()
            self._has_said_all = False
        if _is_foreign(line):
            return _Verdict.NO
        if (opener := _TRACEBACK.fullmatch(line)) is not None:
            return self._judge_opener(opener)
        if line.strip():
            self._is_linked = self._was_blank and bool(_LINK.fullmatch(line.rstrip()))
        match self._part:
            case _Part.MESSAGE:
                return _Verdict.PERHAPS
            case _Part.FRAMES:
                return self._judge_frame(line)
            case _Part.BOX:
                return self._judge_boxed(line)
            case _Part.TAIL:
                return self._judge_tail(line)

    def _judge_opener(self, opener: re.Match[bytes]) -> _Verdict:
        if not self._is_linked:
            # A traceback whose exception is not the announced one stood in the message.
            is_announced = bool(self._told) and not self._has_said_all
            if not is_announced or self._part in (_Part.FRAMES, _Part.BOX):
                return _Verdict.NO
            self._message = list(self._told)
        self.open(opener)
        return _Verdict.YES

    def _judge_frame(self, line: bytes) -> _Verdict:
        if not line.startswith(self._margin):
            return _Verdict.NO
        line = line[len(self._margin) :]
        if line[:1].isspace():
            return _Verdict.YES
        if _EXCEPTION.fullmatch(line.rstrip()) is None:
            return _Verdict.NO
        self._part = _Part.TAIL
        self._has_said_all = bool(self._message) and _repeats(line, self._message[0])
        if self._has_said_all:
            self._due.extend(self._message[1:])
        return _Verdict.YES

    def _judge_boxed(self, line: bytes) -> _Verdict:
        if line.startswith(self._margin) and _BOXED.match(line):
            # If a group ends with another one, theirs is the same end.
            self._has_said_all = _BOX_END.fullmatch(line) is not None
            return _Verdict.YES
        # Some interpreters let lines of a message stand out of the box.
        return self._judge_tail(line)

    def _judge_tail(self, line: bytes) -> _Verdict:
        if not line.strip():
            return _Verdict.PERHAPS
        if self._is_below(line):
            return _Verdict.YES
        if self._is_linked or not self._has_said_all:
            return _Verdict.PERHAPS
        # It could be a note of the exception, but rather it is the worker's next print.
        return _Verdict.NO


class _Panic(_Group):
    """A Rust panic: where, its message, and a backtrace or the hint that there is none."""

    def __init__(self, header: bytes) -> None:
        super().__init__()
        # Older ones have the message in the header.
        self._has_message = not header.rstrip().endswith(b":")
        self._has_backtrace = False

    @property
    def goes_on(self) -> bool:
        return self._has_backtrace or not self._has_message

    def _judge(self, line: bytes) -> _Verdict:
        if _is_foreign(line) or _TRACEBACK.fullmatch(line):
            return _Verdict.NO
        if _PANIC_END.match(line):
            return _Verdict.LAST
        if self._has_backtrace:
            is_frame = _BACKTRACE_FRAME.match(line) is not None
            return _Verdict.YES if is_frame else _Verdict.NO
        self._has_backtrace = line.rstrip() == _BACKTRACE
        is_message, self._has_message = not self._has_message, True
        if self._has_backtrace or is_message or self._is_below(line):
            return _Verdict.YES
        # Of the later panics of a process there may be no more than the message.
        return _Verdict.PERHAPS


class _Part(Enum):
    """What a traceback has come to."""

    MESSAGE = auto()  # announced before it
    FRAMES = auto()
    BOX = auto()  # of an exception group: it has frames and exceptions in it
    TAIL = auto()  # after the exception


def _group_of(line: bytes) -> _Group | None:
    """The group that a line opens."""
    # First a look that takes no time, whatever the line is made of.
    if not any(each in line[:_FAR] for each in _OPENINGS):
        return None
    line = line[:_FAR] if len(line) > _FAR else line
    if _PANIC.match(line) is not None:
        return _Panic(line)
    if (failure := _FAILURE.match(line)) is not None:
        return _Traceback(line[failure.end() :])
    if (opener := _TRACEBACK.fullmatch(line)) is not None:
        traceback = _Traceback()
        traceback.open(opener)
        return traceback
    return _Traceback() if _SYNTAX_ERROR.fullmatch(line) is not None else None


def _is_foreign(line: bytes) -> bool:
    """True if a line begins something that is part of no traceback and no panic."""
    return any(each.match(line) for each in (_LOG_LINE, _FAILURE, _PANIC))


def _is_indented(line: bytes) -> bool:
    return line[:1].isspace() and not line.isspace()


def _repeats(line: bytes, message: bytes) -> bool:
    """True if the exception in a line is the one with this message.

    Some print less than they say: a SyntaxError leaves out the place.
    """
    text, message = line.rstrip().partition(b": ")[2], message.rstrip()
    return message.startswith(text) if text else not message
