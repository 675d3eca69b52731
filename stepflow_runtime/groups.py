"""A task group that keeps out of its user's exceptions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

__all__ = ["quiet_task_group"]


@asynccontextmanager
async def quiet_task_group() -> AsyncIterator[TaskGroup]:
    """A task group whose tasks end with its body, and whose body's exception stays itself.

    When the body ends, however it ends, the tasks are cancelled and waited for; the wait
    is shielded, so every task has to bound its own end. Then the body's exception goes
    on, not in an ExceptionGroup. A task that raises cancels the body, and its exception
    leaves in the body's place, by itself too if it is the only one.
    """
    raised: BaseException | None = None
    try:
        with anyio.CancelScope() as ending:
            async with anyio.create_task_group() as tasks:
                try:
                    yield tasks
                except BaseException as exc:  # noqa: BLE001 - raised below
                    raised = exc
                ending.shield = True
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        only = group.exceptions[0] if len(group.exceptions) == 1 else group
        if isinstance(raised, anyio.get_cancelled_exc_class()):
            raised = None  # the body was cancelled because of it
        raise only from only.__cause__ or raised
    except anyio.get_cancelled_exc_class():
        # A cancellation from outside that came while the body ran. asyncio's leaves here
        # in spite of the shield (anyio 4.16), and would take the exception's place.
        if raised is None:
            raise
    if raised is not None:
        raise raised
