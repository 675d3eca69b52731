"""Which processes a program has, and which of them it has left behind.

A program of a trial has a mark in its environment, which all that it starts inherits. What
an end has cut loose from its parents is found by that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import psutil

__all__ = ["MARK", "addresses", "kill", "kinds", "marked", "server_pid", "wait_gone"]

MARK: Final = "STEPFLOW_RUNTIME_COMPARISON"
_LISTENS: Final = "0A"


def marked(mark: str) -> list[psutil.Process]:
    """All that live and have the mark, but for this process itself."""
    return [each for each in psutil.process_iter() if _has(each, mark)]


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def wait_gone(mark: str, seconds: float) -> list[psutil.Process]:
    """What is still there when everything is gone, or the time is up."""
    until = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def kill(processes: Iterable[psutil.Process]) -> None:
    """End them, whatever they do, and wait for it."""
    processes = list(processes)
    for each in processes:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=5)


def kinds(processes: Iterable[psutil.Process]) -> str:
    """What they are: ``server, worker``, or ``nothing``."""
    return ", ".join(sorted(filter(None, map(_kind, processes)))) or "nothing"


def _kind(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return kind(words)


def kind(words: list[str]) -> str:
    """What a command line runs; nothing if there is none any more."""
    if not words:
        return ""
    name = Path(words[0]).name
    if name == "stepflow-server":
        return "server"
    is_worker = name == "sleep" or any("worker" in each for each in words)
    return "worker" if is_worker else name


def server_pid() -> int:
    """The server that this process has started."""
    children = psutil.Process().children(recursive=True)
    (pid,) = (each.pid for each in children if _kind(each) == "server")
    return pid


def addresses(port: int) -> str:
    """Where somebody listens at a port, as the kernel says."""
    tables = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
    lines = (line for table in tables for line in table.read_text().splitlines()[1:])
    return ", ".join(sorted(set(listening(lines, port)))) or "nowhere"


def listening(lines: Iterable[str], port: int) -> Iterator[str]:
    """The addresses of ``/proc/net/tcp`` at which somebody listens at a port."""
    for line in lines:
        _, local, _, state = line.split()[:4]
        address, _, number = local.partition(":")
        if state == _LISTENS and int(number, 16) == port:
            yield _readable(address)


def _readable(address: str) -> str:
    octets = bytes.fromhex(address)
    if len(octets) > 4:
        return "::" if not any(octets) else address
    return ".".join(map(str, reversed(octets)))
