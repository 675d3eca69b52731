"""How much of a user's file is taken, and the file itself: read whole, if it is one.

A leaf. Contract: what the path names may be anything: a pipe that nobody writes to, a
device without an end, a file that grows under our hands. The answer is its content, or an
``OSError`` that says what it is; it waits for no other process, and takes no more memory
than the limit. What is in the file is for others to judge, by the limits that stand here.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

__all__ = [
    "LARGEST_FILE",
    "MOST_ALIASED",
    "MOST_DIGITS",
    "MOST_LEVELS",
    "MOST_VALUES",
    "read_file",
]

# What is within all of these, and what is not, is known in less than a second, with less
# than 100 MB: tests/test_hostile_files.py.
LARGEST_FILE: Final = 6 * 2**20
# How many containers may be inside one another: the server reads no deeper.
MOST_LEVELS: Final = 125
# Of a document, with its keys. In YAML an alias counts as all that it stands for.
MOST_VALUES: Final = 250_000
# In all the strings that aliases stand for. As JSON, a character can take six bytes.
MOST_ALIASED: Final = 2**20
# Of an integer. int() takes quadratic time, unless Python is told to refuse long ones; it
# can be told any number from this on. The server takes sixteen.
MOST_DIGITS: Final = 640

# Should something else have come to the file's place since we looked: O_NONBLOCK, since to
# open a pipe waits for a writer; O_NOCTTY, since to open a terminal may make it ours.
_FLAGS: Final = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)

_KINDS: Final = {
    stat.S_IFDIR: (errno.EISDIR, os.strerror(errno.EISDIR)),
    stat.S_IFIFO: (errno.EINVAL, "Is a pipe, and no regular file"),
    stat.S_IFCHR: (errno.EINVAL, "Is a device, and no regular file"),
    stat.S_IFBLK: (errno.EINVAL, "Is a device, and no regular file"),
    stat.S_IFSOCK: (errno.EINVAL, "Is a socket, and no regular file"),
}


def read_file(path: str | os.PathLike[str], at_most: int = LARGEST_FILE) -> bytes:
    """The content of a regular file. Blocks on the file system.

    :raises OSError: if there is none, if it is something else, or longer than ``at_most``
    """
    try:
        status = os.stat(path)
    except ValueError as exc:  # a NUL in the name
        raise OSError(errno.EINVAL, str(exc), os.fspath(path)) from exc
    # Before it is opened: to open a device can do something (a watchdog starts to count).
    _check(status, path, at_most)
    with open(path, "rb", opener=_open) as file:
        status = os.fstat(file.fileno())
        _check(status, path, at_most)
        # Nothing instead of no bytes: a file of the kernel's that waits as a pipe does.
        content = file.read(status.st_size + 1) or b""
        if len(content) > status.st_size:  # it grows, or has no size, as those in /proc
            content += file.read(at_most + 1 - len(content))
    if len(content) > at_most:
        raise _too_long(path, f"more than {at_most}", at_most)
    return content


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | _FLAGS)


def _check(status: os.stat_result, path: str | os.PathLike[str], at_most: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        unknown = (errno.EINVAL, "Is no regular file")
        number, words = _KINDS.get(stat.S_IFMT(status.st_mode), unknown)
        raise OSError(number, words, os.fspath(path))
    if status.st_size > at_most:
        raise _too_long(path, str(status.st_size), at_most)


def _too_long(path: str | os.PathLike[str], length: str, at_most: int) -> OSError:
    words = f"Is {length} bytes long, and at most {at_most} are read"
    return OSError(errno.EFBIG, words, os.fspath(path))
