"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import msgspec

__all__ = ["Machine", "differences", "this_machine"]

_PACKAGES = (
    "stepflow-runtime",
    "stepflow-orchestrator",
    "stepflow-py",
    "anyio",
    "grpcio",
    "httptools",
    "httpx",
    "msgspec",
    "protobuf",
    "trio",
    "uvloop",
)


class Machine(msgspec.Struct, frozen=True):
    """A machine, and what is installed there."""

    cpu: str
    cores: int
    memory_gb: int
    kernel: str
    python: str
    server: str
    packages: dict[str, str]
    commit: str = ""
    load: float = 0.0


def this_machine(server: str) -> Machine:
    """Look around.

    :param server: the version that the server tells
    """
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(pages / 2**30),
        kernel=platform.release(),
        python=platform.python_version(),
        server=server,
        packages={name: _version(name) for name in _PACKAGES},
        commit=_commit(),
        load=round(os.getloadavg()[0], 2),
    )


def differences(old: Machine, new: Machine) -> list[str]:
    """In what two machines differ, so that their numbers cannot be compared just so.

    Our own version does not count: that is what is compared.
    """
    found = [
        f"{name}: {getattr(old, name)} → {getattr(new, name)}"
        for name in ("cpu", "cores", "memory_gb", "kernel", "python", "server")
        if getattr(old, name) != getattr(new, name)
    ]
    for name in sorted((old.packages.keys() | new.packages.keys()) - {_PACKAGES[0]}):
        before, now = old.packages.get(name, "none"), new.packages.get(name, "none")
        if before != now:
            found.append(f"{name}: {before} → {now}")
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """What is checked out here, if anything is."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
