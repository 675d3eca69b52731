"""What is measured: a file for each group of cases."""

from __future__ import annotations

from . import bulk, growth, logs, running, servers, soak, starting

__all__ = ["ALL"]

ALL = (
    *starting.CASES,
    *running.CASES,
    *servers.CASES,
    *bulk.CASES,
    *logs.CASES,
    *soak.CASES,
    *growth.CASES,
)
