"""Whether a look at a file waits for nothing but this machine.

A leaf. A thread for each look at a workflow file costs more than the run itself; but on a
network file system, or one that a program serves (FUSE), a look may take for ever, and must
not hold up an event loop. Contract: False unless it is known: only Linux tells.
"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["is_nearby"]

_MOUNTS: Final = "/proc/self/mountinfo"

_LOCAL: Final = frozenset(
    {
        *("bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "overlay"),
        *("ramfs", "squashfs", "tmpfs", "xfs", "zfs"),
    }
)


def is_nearby(path: str) -> bool:
    """Ask the system. Blocks on the file system."""
    try:
        real = os.path.realpath(path)
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as mounts:
            return _is_local(real, mounts.read())
    except (OSError, ValueError):
        return False


def _is_local(path: str, mounts: str) -> bool:
    """Pure: the file system of the innermost mount point that holds the path.

    :param mounts: as in proc(5): ``36 35 98:0 /root /mount/point options - type source ...``
    """
    longest, kind = "", ""
    for line in mounts.splitlines():
        place, _, about = line.partition(" - ")
        fields = place.split(" ")
        if len(fields) < 5 or not about:
            continue
        point = _unescaped(fields[4])
        # Of several at one point, the last one lies on top.
        if len(point) >= len(longest) and _is_inside(path, point):
            longest, kind = point, about.split(" ")[0]
    return kind in _LOCAL


def _is_inside(path: str, point: str) -> bool:
    return point == "/" or path == point or path.startswith(f"{point}/")


def _unescaped(point: str) -> str:
    for octal, plain in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n")):
        point = point.replace(octal, plain)
    return point.replace(r"\134", "\\")
