"""What a disk takes to sync, and servers that are told another tale of it.

A library that is loaded before the C library answers ``fsync`` and ``fdatasync`` of a server:
at once, or late. So a faster and a slower disk can be measured on the one there is. It is
compiled when it is needed; without a compiler those sides are missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from .measure import Sample, quantile

__all__ = ["MEMORY", "can_pretend", "late", "never", "sync_time"]

# Files there are in memory, and go with the machine.
MEMORY: Final = Path("/dev/shm")

_SOURCE: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

static int answer(const char *name, int fd) {
    long more = atol(getenv("SYNC_MICROSECONDS"));
    if (more < 0)
        return 0;
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int done = sync(fd);
    struct timespec wait = {more / 1000000, more % 1000000 * 1000};
    nanosleep(&wait, 0);
    return done;
}

int fsync(int fd) { return answer("fsync", fd); }
int fdatasync(int fd) { return answer("fdatasync", fd); }
"""


def can_pretend() -> bool:
    return shutil.which("cc") is not None


def never() -> dict[str, str]:
    """The environment of a server whose syncs do nothing: the least that a disk can take."""
    return _environment(-1)


def late(milliseconds: float) -> dict[str, str]:
    """The environment of a server whose syncs take so much longer than they do."""
    return _environment(int(1000 * milliseconds))


def _environment(microseconds: int) -> dict[str, str]:
    library = Path(_compiled().name) / "sync.so"
    return {"LD_PRELOAD": str(library), "SYNC_MICROSECONDS": str(microseconds)}


@cache
def _compiled() -> TemporaryDirectory[str]:
    """A folder with the library in it, which goes with this process."""
    folder = TemporaryDirectory()
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", "sync.so", "-ldl"],
        cwd=folder.name,
        input=_SOURCE,
        text=True,
        check=True,
    )
    return folder


def sync_time(count: int = 200) -> Sample:
    """Milliseconds of a sync after a page was appended, which is what a commit does."""
    page, took = b"x" * 4096, []
    with TemporaryDirectory() as folder, open(Path(folder) / "pages", "wb", 0) as file:
        for _ in range(count):
            file.write(page)
            began = time.perf_counter()
            os.fsync(file.fileno())
            took.append(1e3 * (time.perf_counter() - began))
    return Sample(quantile(took, 0.5), {"p99 ms": quantile(took, 0.99)})
