"""One of several programs that share a store: ``python member.py STORE ETCD [RUNS]``.

It asks for so many runs, and stays until no run in the store is unfinished, its own or
another member's. Kill one in the midst of it: another one goes on with its runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

from stepflow_runtime import RestartPolicy, RunStatus, StepflowRuntime

FLOW = Path(__file__).with_name("two_naps.yaml")


async def main(store: str, etcd: str, runs: int = 0) -> None:
    async with StepflowRuntime.start(
        storage=store, lease=[etcd], restart_policy=RestartPolicy.ON_FAILURE
    ) as runtime:

        async def submit(number: int) -> None:
            async with at_once:
                await runtime.submit(FLOW, number)

        at_once = anyio.CapacityLimiter(20)
        async with anyio.create_task_group() as tasks:
            for number in range(runs):
                tasks.start_soon(submit, number)
        print("submitted", flush=True)
        while unfinished := await runtime.list_runs(
            status=RunStatus.RUNNING, limit=1000
        ):
            print(len(unfinished), "unfinished", flush=True)
            await anyio.sleep(1)


if __name__ == "__main__":
    store, etcd, *runs = sys.argv[1:]
    anyio.run(main, store, etcd, *map(int, runs))
