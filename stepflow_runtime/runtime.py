"""StepflowRuntime: the handle that a user holds.

Thin: it joins a supervisor, which sees to it that a server is there, and a client, which
speaks to it. What it adds is the meaning of a broken connection: never a bare connection
error, but what became of the server.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

import anyio
from anyio import AsyncContextManagerMixin
from anyio.abc import TaskStatus

from .client import StepflowClient
from .errors import ConnectionLostError, RunLostError, RuntimeStoppedError
from .executor import FlowResult, FlowSource
from .logs.config import LogConfig
from .logs.entry import LogEntry
from .server.options import ServerOptions
from .server.process import ServerExit
from .server.restart import RestartPolicy
from .server.supervisor import Ready, RuntimeState, Supervisor
from .transport.loopback import HOST, LoopbackTransport

__all__ = ["StepflowRuntime"]


class StepflowRuntime(AsyncContextManagerMixin):
    """A Stepflow server inside this program.

    Made by :meth:`start`, and started when it is entered::

        async with StepflowRuntime.start() as runtime:
            result = await runtime.run("workflow.yaml", {"x": 1})

    or when it is hosted as a task: ``await task_group.start(runtime.serve)``. Works the
    same under asyncio and trio. When it is left, by whatever way, the server and
    everything it spawned is gone.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._supervisor = Supervisor(options)
        self._client: StepflowClient | None = None
        self._client_incarnation = 0

    @classmethod
    def start(
        cls,
        config_path: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        *,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        inherit_env: bool = True,
        log_config: LogConfig | None = None,
        restart_policy: RestartPolicy = RestartPolicy.NEVER,
        max_restarts: int = 3,
        startup_timeout: float = 30.0,
        shutdown_timeout: float = 5.0,
        health_interval: float = 5.0,
        health_timeout: float = 5.0,
        max_health_failures: int = 3,
        on_crash: Callable[[int], Any] | None = None,
        binary: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Return a handle of a server that starts when the handle is entered.

        Checks the options and does nothing else.

        :param config_path: the path of a Stepflow configuration file, or the configuration
            itself as a mapping (it goes through the server's standard input, never through
            a file). ``None``: the built-in components, as ``/builtin/x`` and as ``/x``
        :param port: the port to listen on; ``None``: one that is free
        :param env: environment variables for the server and its workers, over the inherited
            ones. A ``STEPFLOW_<FLAG>`` in here has the say about that flag of the server,
            unless an option here sets it
        :param inherit_env: whether the server inherits this process's environment. Its
            ``STEPFLOW_*`` variables are never inherited
        :param log_config: what the server logs, and where it goes
        :param restart_policy: what to do when the server ends unasked. The first start is
            never repeated: what fails there (a wrong configuration) fails again
        :param max_restarts: how many restarts in a row before the server is given up; the
            count starts anew after 60 s of READY
        :param startup_timeout: seconds until the server must be READY
        :param shutdown_timeout: seconds that the server has to end by itself when the
            runtime is left; after that it is killed
        :param health_interval: seconds between two health requests
        :param health_timeout: seconds that the server has to answer one
        :param max_health_failures: how many may fail in a row before the server counts as
            hung, and is killed
        :param on_crash: called with the exit code (negative: the signal) when the server
            ended unasked: in a thread, and what it returns is awaited if it can be. What it
            raises is logged. When the runtime is left, it has ``shutdown_timeout`` left
        :param binary: the ``stepflow-server`` to use; ``None``: that of the environment
            variable ``STEPFLOW_SERVER_BINARY``, or else the installed one
        :raises ValueError: naming the option, if a value cannot work
        :raises TypeError: naming the option, if a value is of the wrong kind
        """
        return cls(
            ServerOptions(
                config_path=config_path,
                port=port,
                env={} if env is None else env,
                inherit_env=inherit_env,
                log_config=LogConfig() if log_config is None else log_config,
                restart_policy=restart_policy,
                max_restarts=max_restarts,
                startup_timeout=startup_timeout,
                shutdown_timeout=shutdown_timeout,
                health_interval=health_interval,
                health_timeout=health_timeout,
                max_health_failures=max_health_failures,
                on_crash=on_crash,
                binary=binary,
            )
        )

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncIterator[Self]:
        async with self._supervisor.running():
            try:
                yield self
            finally:
                # In this order: no call may make a new client after this one is closed.
                self._supervisor.stop_serving()
                await self._close_client()

    async def serve(
        self, *, task_status: TaskStatus[Self] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Run the server until the surrounding task group is cancelled.

        For a task group or nursery of your own::

            await nursery.start(runtime.serve)

        returns the handle when the server is READY. Cancellation stops the server.

        :raises ServerStartError: if the server does not become READY
        :raises ServerCrashedError: if the server is lost for good; the task group then
            cancels the other tasks
        """
        async with self:
            task_status.started(self)
            await self._supervisor.wait_failed()

    async def run(
        self,
        flow: FlowSource,
        input: Any = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
    ) -> FlowResult:
        """Run a workflow and wait for its end.

        The workflow is sent to the server once and then known by its content (by what
        ``stat`` says of it, if it is a file).

        :param flow: the path of a YAML or JSON file, or the document as a mapping
        :param input: the flow's input, any value that JSON can carry
        :param overrides: properties to replace, by step id:
            ``{"step1": {"input": {"x": 1}}}``
        :param variables: values for the flow's ``$variable`` references
        :return: how it ended; a flow that failed is a result too
        :raises FlowDefinitionError: if the workflow cannot be read or is not valid
        :raises TypeError: if ``flow`` is no path and no mapping, or if input, overrides or
            variables hold something that cannot be written as JSON
        :raises ApiError: if the server refuses the run
        :raises ConnectionLostError: if the server lives, but broke the connection off
        :raises RunLostError: if the server died meanwhile, and is being restarted
        :raises ServerCrashedError: if the server died and is not restarted
        :raises RuntimeStoppedError: if the runtime is not running

        While the server restarts, the call waits. Cancellation ends the wait at once; the
        run itself goes on in the server.
        """
        while True:
            ready = await self._supervisor.wait_ready()
            client = await self._client_of(ready)
            try:
                return await client.run(flow, input, overrides, variables=variables)
            except ConnectionLostError as exc:
                loss = await self._supervisor.explain_loss(ready.incarnation)
                if loss is None:
                    raise
                if not (exc.unsent and isinstance(loss, RunLostError)):
                    raise loss from exc
                # The request never left: it waits for the next server like a later one.

    async def wait_ready(self) -> None:
        """Wait until the server is READY.

        :raises ServerStartError: if it does not start
        :raises ServerCrashedError: if it is lost for good
        :raises RuntimeStoppedError: if the runtime is not running
        """
        await self._supervisor.wait_ready()

    def get_recent_logs(self, limit: int = 100) -> list[LogEntry]:
        """Return the newest log entries of the server and its workers, the newest last.

        How many are kept is ``LogConfig.keep``. They can be read after the runtime was
        left, too.
        """
        return self._supervisor.logs.newest(limit)

    @property
    def state(self) -> RuntimeState:
        """Where the runtime is in its life."""
        return self._supervisor.state

    @property
    def port(self) -> int:
        """The server's port. It stays the same over restarts.

        :raises RuntimeStoppedError: if the server was never READY
        """
        if self._supervisor.port is None:
            raise RuntimeStoppedError(
                "the server has no port yet: this runtime is not started"
            )
        return self._supervisor.port

    @property
    def url(self) -> str:
        """The server's base URL, without a slash at the end.

        :raises RuntimeStoppedError: if the server was never READY
        """
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process id of the server, or None while there is none."""
        return self._supervisor.pid

    @property
    def restarts(self) -> int:
        """How many times the server was restarted."""
        return self._supervisor.restarts

    @property
    def last_exit(self) -> ServerExit | None:
        """How the server last ended unasked, or None if it never did."""
        return self._supervisor.last_exit

    def __repr__(self) -> str:
        state, port = self._supervisor.state.value, self._supervisor.port
        where = f" at {self.url}" if port is not None else ""
        return f"<StepflowRuntime {state}{where}>"

    async def _client_of(self, ready: Ready) -> StepflowClient:
        """The client of this incarnation: what the last one's had stored, died with it."""
        if self._client is None or self._client_incarnation != ready.incarnation:
            before, self._client = (
                self._client,
                StepflowClient(LoopbackTransport(ready.port)),
            )
            self._client_incarnation = ready.incarnation
            client = self._client
            await _close(before)
            return client
        return self._client

    async def _close_client(self) -> None:
        client, self._client = self._client, None
        await _close(client)


async def _close(client: StepflowClient | None) -> None:
    if client is not None:
        with anyio.CancelScope(shield=True):
            await client.aclose()
