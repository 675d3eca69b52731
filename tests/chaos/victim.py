"""A program that lives with runtimes, to be killed: ``python victim.py HOW CONFIG``."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

import anyio

from stepflow_runtime import RestartPolicy, StepflowError, StepflowRuntime

ECHO = {
    "steps": [{"id": "a", "component": "/noop", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}
SLEEP = {"steps": [{"id": "a", "component": "/sleep", "input": {"duration_ms": 20}}]}


def say(what: str) -> None:
    os.write(1, what.encode() + b"\n")


async def call(runtime: StepflowRuntime) -> None:
    try:
        for number in range(5):
            await runtime.run(ECHO, number)
            await runtime.run(SLEEP)
    except StepflowError:
        pass


async def use(runtime: StepflowRuntime) -> None:
    """Runs, a crash in the middle of them, and more runs."""
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(call, runtime)
        await anyio.sleep(0.02)
        if runtime.pid is not None:
            say("crash")
            os.kill(runtime.pid, signal.SIGKILL)
        tasks.start_soon(call, runtime)


async def live(config: str | None) -> None:
    async with StepflowRuntime.start():  # SIGTERM always finds one
        while True:
            say("start")
            async with StepflowRuntime.start(
                config, restart_policy=RestartPolicy.ALWAYS, max_restarts=100
            ) as runtime:
                await use(runtime)
                say("stop")


def live_hosted(config: str | None) -> None:
    with StepflowRuntime.start():
        while True:
            say("start")
            with StepflowRuntime.start(
                config, restart_policy=RestartPolicy.ALWAYS, max_restarts=100
            ) as runtime:
                asyncio.run(use(runtime))
                say("stop")


def live_twice(config: str | None) -> None:
    """Two at a time, in two threads: one guard for both."""
    threading.Thread(target=live_hosted, args=(config,), daemon=True).start()
    live_hosted(config)


if __name__ == "__main__":
    how, config = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    try:
        if how == "hosted":
            live_hosted(config)
        elif how == "twice":
            live_twice(config)
        else:
            anyio.run(live, config, backend=how)
    finally:
        say("unwound")
