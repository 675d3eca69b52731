"""RestartPolicy, and the decision what to do about a server that ended unasked.

Pure: exit code and history in, decision out. Time and chance come from the caller.
"""

from __future__ import annotations

import enum
from typing import Final, TypeAlias

import msgspec

__all__ = ["Decision", "GiveUp", "Restart", "RestartPolicy", "decide"]

FIRST_BACKOFF: Final = 0.25
MAX_BACKOFF: Final = 5.0

# After this long in READY a crash is news again, not one more of a series.
FRESH_AFTER: Final = 60.0


class RestartPolicy(enum.Enum):
    """What to do when the server ends without having been asked to."""

    NEVER = "never"
    """Give up: calls raise :exc:`ServerCrashedError`."""

    ON_FAILURE = "on_failure"
    """Restart it unless it exited with code 0."""

    ALWAYS = "always"
    """Restart it whatever its exit code was."""


class Restart(msgspec.Struct, frozen=True):
    """Restart the server after ``delay`` seconds."""

    delay: float


class GiveUp(msgspec.Struct, frozen=True):
    """Leave it; ``reason`` says why, for the user."""

    reason: str


Decision: TypeAlias = Restart | GiveUp


def decide(
    policy: RestartPolicy,
    *,
    exit_code: int,
    restarts: int,
    max_restarts: int,
    chance: float,
) -> Decision:
    """Decide what to do about a server that ended.

    :param exit_code: its exit code; negative: the signal that killed it
    :param restarts: how many restarts there were already in this series of crashes
    :param max_restarts: how many there may be
    :param chance: from 0 to 1, spreads the restarts of many runtimes over time
    """
    if policy is RestartPolicy.NEVER:
        return GiveUp("the restart policy is NEVER")
    if policy is RestartPolicy.ON_FAILURE and exit_code == 0:
        return GiveUp("it exited with code 0 and the restart policy is ON_FAILURE")
    if restarts >= max_restarts:
        return GiveUp(f"it was restarted {restarts} times already (max_restarts)")
    return Restart(_backoff(restarts) * (0.5 + chance / 2))


def _backoff(restarts: int) -> float:
    """The first restart is immediate; then each wait is twice the one before."""
    if restarts == 0:
        return 0.0
    return float(min(FIRST_BACKOFF * 2.0 ** min(restarts - 1, 10), MAX_BACKOFF))
