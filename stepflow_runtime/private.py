"""Files of ours: for this user alone, and never in a place that a stranger has prepared.

A leaf. Contract: nothing that is there already is changed, but for a file that the user has
asked to be written. What is refused is refused by the
rule of Linux (fs.protected_symlinks, fs.protected_regular), also where that is turned off,
and for those ways that it does not see: a link that is looked up before it is followed,
what sqlite opens beside a store. Who plants something between our look and our use of it
is left to the system.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

__all__ = ["PRIVATE", "check_unplanted", "create_private"]

# For this user to read and write, and nobody else.
PRIVATE: Final = 0o600


def create_private(path: Path) -> None:
    """Make an empty file that is nobody else's to read.

    One that is there is not even opened: to close it again would undo the locks of sqlite
    that this process has on it.

    :raises FileExistsError: if there is something; a link counts, wherever it leads
    :raises OSError: if no file can be there
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    os.close(os.open(path, flags, PRIVATE))


def check_unplanted(path: str | os.PathLike[str]) -> None:
    """Refuse what a stranger has put where everybody may put something: a file, a link.

    That is a directory like /tmp, in which nobody may remove what others have. Whose it is
    says who may read what we write there, or where a link leads.

    :raises PermissionError: if it is neither ours nor the directory's owner's
    """
    try:
        found = os.lstat(path)
        directory = os.stat(os.path.dirname(os.path.abspath(path)))
    except OSError:
        return  # there is nothing, or nothing to be had: whoever opens it will say so
    if not directory.st_mode & stat.S_ISVTX or not directory.st_mode & stat.S_IWOTH:
        return
    if found.st_uid not in (os.geteuid(), directory.st_uid):
        what = "link" if stat.S_ISLNK(found.st_mode) else "file"
        reason = (
            f"It is a {what} of another user's, in a directory that all can write to"
        )
        raise PermissionError(errno.EACCES, reason, os.fspath(path))
