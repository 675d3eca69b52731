"""The restart loop on virtual time: lives of servers as scripts, hours in milliseconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import (
    RestartPolicy,
    RuntimeState,
    ServerCrashedError,
    ServerExit,
    ServerStartError,
)
from stepflow_runtime.crew import Crew
from stepflow_runtime.server.options import Command, ServerOptions
from stepflow_runtime.server.restart import FRESH_AFTER, MAX_BACKOFF
from stepflow_runtime.server.supervisor import Supervisor


@dataclass
class Life:
    """One incarnation: how long it was READY, or None if it was not launched."""

    uptime: float | None
    code: int = -9
    launch: float = 0.1


FOREVER = Life(uptime=1e9)


class Script:
    """Servers that live as scripted, and what the supervisor did about them."""

    def __init__(self, *lives: Life) -> None:
        self._lives = list(lives)
        self.launched_at: list[float] = []
        self.commands: list[Command] = []
        self.ended_at: list[float] = []

    def supervisor(self, **options: Any) -> Supervisor:
        return _Scripted(self, ServerOptions(**options))

    async def live(self, supervisor: Supervisor, command: Command) -> ServerExit:
        self.launched_at.append(anyio.current_time())
        self.commands.append(command)
        life = self._lives.pop(0) if self._lives else FOREVER
        await anyio.sleep(life.launch)
        try:
            if life.uptime is None:
                exit = ServerExit(code=life.code, pid=1)
                raise ServerStartError("no luck", exit=exit)
            supervisor._serve(1, 4711)
            await anyio.sleep(life.uptime)
            supervisor._withdraw()
            return ServerExit(code=life.code, pid=1, uptime=life.uptime)
        finally:
            self.ended_at.append(anyio.current_time())

    @property
    def delays(self) -> list[float]:
        return [
            round(launched - ended, 6)
            for launched, ended in zip(
                self.launched_at[1:], self.ended_at, strict=False
            )
        ]


class _Scripted(Supervisor):
    def __init__(self, script: Script, options: ServerOptions) -> None:
        super().__init__(options, Crew(), on_stopping=lambda: None)
        self._script = script

    async def _prepare(self) -> Path:
        return Path("/a/server")

    async def _dismiss_guard(self) -> None:
        pass

    async def _incarnate(self, binary: Path) -> ServerExit:
        port = self.journal.now.port or 0
        command = self._options.command(
            {}, port=port, orchestrator_id=self._orchestrator_id
        )
        return await self._script.live(self, command)


def on_virtual_time(function: Callable[[], Awaitable[Any]]) -> Any:
    clock = trio.testing.MockClock(autojump_threshold=0)
    return trio.run(function, clock=clock)


@pytest.fixture(autouse=True)
def _no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepflow_runtime.server.supervisor.random.random", lambda: 1.0)


def play(
    script: Script, seconds: float = 1000, **options: Any
) -> tuple[RuntimeState, int]:
    """Keep a supervisor for so many seconds; return its state then, and its restarts."""
    supervisor = script.supervisor(**options)

    async def main() -> None:
        supervisor.begin()
        async with supervisor.running():
            await anyio.sleep(seconds)
            states.append(supervisor.state)

    states: list[RuntimeState] = []
    on_virtual_time(main)
    return states[0], supervisor.journal.now.restarts


ALWAYS: dict[str, Any] = {"restart_policy": RestartPolicy.ALWAYS, "max_restarts": 100}


def test_each_crash_of_a_row_is_repaired_later_than_the_one_before() -> None:
    script = Script(*[Life(uptime=1)] * 9)
    play(script, **ALWAYS)
    assert script.delays == [0, 0.25, 0.5, 1, 2, 4, 5, 5, 5]


def test_after_a_minute_of_ready_the_row_starts_anew() -> None:
    lives = [Life(1), Life(1), Life(1), Life(FRESH_AFTER), Life(1), Life(1)]
    script = Script(*lives)
    play(script, **ALWAYS)
    assert script.delays == [0, 0.25, 0.5, 0, 0.25, 0.5]


def test_a_moment_less_than_a_minute_is_not_enough() -> None:
    script = Script(Life(1), Life(1), Life(FRESH_AFTER - 0.1), Life(1))
    play(script, **ALWAYS)
    assert script.delays == [0, 0.25, 0.5, 1]


def test_a_server_that_crashes_once_an_hour_is_never_given_up() -> None:
    script = Script(*[Life(3600)] * 500)
    options: dict[str, Any] = {"restart_policy": RestartPolicy.ON_FAILURE}
    state, restarts = play(script, 3601 * 600, **options, max_restarts=1)
    assert (state, restarts) == (RuntimeState.READY, 500)


def test_launches_that_fail_count() -> None:
    script = Script(Life(1), *[Life(uptime=None, code=9)] * 10)
    outcome = play(script, restart_policy=RestartPolicy.ALWAYS, max_restarts=3)
    assert outcome == (RuntimeState.FAILED, 3)
    assert script.delays == [0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("policy", "code", "launches"),
    [
        (RestartPolicy.NEVER, -9, 1),
        (RestartPolicy.NEVER, 0, 1),
        (RestartPolicy.ON_FAILURE, -9, 2),
        (RestartPolicy.ON_FAILURE, 0, 1),
        (RestartPolicy.ALWAYS, 0, 2),
    ],
)
def test_the_policy_decides(policy: RestartPolicy, code: int, launches: int) -> None:
    script = Script(Life(1, code=code))
    play(script, restart_policy=policy)
    assert len(script.commands) == launches


def test_after_a_restart_the_port_and_the_id_are_the_same() -> None:
    script = Script(Life(1), Life(1))
    play(script, **ALWAYS)
    first, second, third = (command.argv for command in script.commands)
    assert first[:2] == ("--port", "0")
    assert second[:2] == ("--port", "4711")
    assert second == third
    assert second[2:4] == first[2:4]
    assert first[2] == "--orchestrator-id"


def test_who_waits_for_ready_waits_through_restarts_until_his_own_time_is_up() -> None:
    async def main() -> None:
        supervisor = script.supervisor(**ALWAYS)
        supervisor.begin()
        async with supervisor.running():
            await anyio.sleep(1.5)  # crashed once, and is being launched anew
            began = anyio.current_time()
            with anyio.move_on_after(3) as impatient:
                await supervisor.wait_ready()
            assert impatient.cancelled_caught
            assert anyio.current_time() - began == pytest.approx(3)
            await supervisor.wait_ready()
            assert anyio.current_time() - began == pytest.approx(19.5)

    script = Script(Life(1), Life(1, launch=20))
    on_virtual_time(main)


def test_who_waits_when_it_is_given_up_hears_why() -> None:
    async def main() -> None:
        supervisor = script.supervisor(
            restart_policy=RestartPolicy.ALWAYS, max_restarts=1
        )
        supervisor.begin()
        async with supervisor.running():
            await anyio.sleep(1.15)
            with pytest.raises(ServerCrashedError, match="restarted 1 times already"):
                await supervisor.wait_ready()

    script = Script(Life(1), Life(uptime=None))
    on_virtual_time(main)


@given(
    lives=st.lists(
        st.builds(
            Life,
            uptime=st.none() | st.floats(0, 100),
            code=st.integers(-31, 255),
            launch=st.floats(0, 20),
        ),
        max_size=15,
    ),
    policy=st.sampled_from(RestartPolicy),
    max_restarts=st.integers(0, 8),
)
def test_whatever_happens_the_loop_keeps_its_rules(
    lives: list[Life], policy: RestartPolicy, max_restarts: int
) -> None:
    script = Script(Life(1), *lives)
    state, restarts = play(
        script, 1e5, restart_policy=policy, max_restarts=max_restarts
    )
    all_lives = [Life(1), *lives, FOREVER]
    lived = all_lives[: len(script.commands)]
    series = 0
    for life, delay in zip(lived, script.delays, strict=False):
        if (life.uptime or 0) >= FRESH_AFTER:
            series = 0
        assert 0 <= delay <= MAX_BACKOFF
        assert (delay == 0) == (series == 0)
        series += 1
        assert series <= max_restarts
        assert policy is not RestartPolicy.NEVER
        assert policy is RestartPolicy.ALWAYS or life.code != 0
    assert restarts == len(script.commands) - 1
    assert (state is RuntimeState.FAILED) == (lived[-1] is not FOREVER)
