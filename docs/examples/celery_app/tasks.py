"""Tasks that run workflows, in processes that each have a Stepflow server of their own.

celery -A tasks worker
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

from stepflow_runtime import RestartPolicy, ServerError, StepflowRuntime

NAP = Path(__file__).with_name("nap.yaml")

app = Celery("tasks")
app.config_from_object("celeryconfig")

_lock = threading.Lock()
_runtime: StepflowRuntime | None = None


def the_runtime() -> StepflowRuntime:
    """The runtime of this process. Never called where processes are forked from."""
    global _runtime
    with _lock:
        if _runtime is None:
            _runtime = StepflowRuntime.start(restart_policy=RestartPolicy.ON_FAILURE)
        return _runtime


@worker_process_init.connect
def start(**_: Any) -> None:
    the_runtime()  # so that the first task finds it there


@worker_process_shutdown.connect
def stop(**_: Any) -> None:
    if _runtime is not None:
        _runtime.stop()


class NapFailed(Exception):
    """What is wrong, as one string: so Celery's result backends bring it back whole."""


@app.task(autoretry_for=(ServerError,), max_retries=3, retry_backoff=True)
def nap(name: str, duration_ms: int = 10) -> Any:
    input = {"name": name, "duration_ms": duration_ms}
    result = asyncio.run(the_runtime().run(NAP, input))
    if result.error is not None:
        raise NapFailed(f"{result.error.code}: {result.error.message}")
    return result.output
