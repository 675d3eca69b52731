"""A notebook's kernel, as Jupyter runs one, and cells for it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager

__all__ = ["Kernel", "Told", "running_kernel"]


@dataclass
class Told:
    """What stands below a cell.

    :ivar printed: what it has printed
    :ivar shown: its result, by kind of content
    :ivar error: the name of the exception that ended it, and its words
    """

    printed: str = ""
    shown: dict[str, str] = field(default_factory=dict)
    error: str | None = None


class Kernel:
    def __init__(self, manager: AsyncKernelManager, client: AsyncKernelClient) -> None:
        self._manager = manager
        self._client = client

    async def cell(self, code: str, interrupt_at: str | None = None) -> Told:
        """Run a cell.

        :param interrupt_at: is interrupted once it has printed this
        """
        told = Told()
        with anyio.fail_after(30):
            number = self._client.execute(code, allow_stdin=False)
            while True:
                message = await self._client.get_iopub_msg()
                if message["parent_header"].get("msg_id") != number:
                    continue
                kind, content = message["msg_type"], message["content"]
                if kind == "status" and content["execution_state"] == "idle":
                    return told
                _note(told, kind, content)
                if interrupt_at is not None and interrupt_at in told.printed:
                    interrupt_at = None
                    await self._manager.interrupt_kernel()

    async def value(self, expression: str) -> str:
        """What an expression is, as text; it must not raise."""
        told = await self.cell(f"print({expression})")
        assert told.error is None, told.error
        return told.printed.strip()

    async def restart(self, *, now: bool) -> None:
        """As by the button of a notebook; ``now``: by SIGKILL."""
        await self._manager.restart_kernel(now=now)
        await self._client.wait_for_ready(timeout=30)


def _note(told: Told, kind: str, content: dict[str, Any]) -> None:
    if kind == "stream":
        told.printed += content["text"]
    elif kind in ("execute_result", "display_data"):
        told.shown = content["data"]
    elif kind == "error":
        told.error = f"{content['ename']}: {content['evalue']}"


@asynccontextmanager
async def running_kernel(directory: Path) -> AsyncIterator[Kernel]:
    """A kernel of the Python that runs the tests; it is shut down in the end."""
    ours = {"IPYTHONDIR": str(directory / "ipython")}
    ours["JUPYTER_RUNTIME_DIR"] = str(directory / "jupyter")
    (directory / "jupyter").mkdir()
    with zmq.asyncio.Context() as context:
        manager = AsyncKernelManager(
            context=context, connection_file=str(directory / "jupyter" / "kernel.json")
        )
        await manager.start_kernel(
            cwd=str(directory),
            env={**os.environ, **ours},
            extra_arguments=["--HistoryManager.enabled=False"],
        )
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=60)
            yield Kernel(manager, client)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel()
