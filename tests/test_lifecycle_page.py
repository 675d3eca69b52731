"""The page on lifecycle: what its diagram draws is what happens, and all that happens."""

from __future__ import annotations

import re
import signal
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import anyio
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from stepflow_runtime import (
    RestartPolicy,
    RuntimeState,
    RuntimeStoppedError,
    ServerExit,
    ServerStartError,
    StateChange,
    StepflowRuntime,
)
from stepflow_runtime.server.options import Command
from stepflow_runtime.server.state import MAY_FOLLOW
from stepflow_runtime.server.supervisor import Supervisor

from .conftest import ECHO, each_backend, wait_until
from .test_life import kill_server
from .test_restart_loop import ALWAYS, Life, Script, on_virtual_time

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = DOCS / "images" / "lifecycle.svg"
PAGE = DOCS / "explanation" / "lifecycle.md"
SVG = "{http://www.w3.org/2000/svg}"

Transition = tuple[str, str]


def drawn() -> list[Transition]:
    edges = ElementTree.parse(PICTURE).iter(f"{SVG}g")
    return [
        (edge.attrib["data-from"], edge.attrib["data-to"])
        for edge in edges
        if edge.get("class") == "edge"
    ]


def transitions(changes: list[StateChange]) -> set[Transition]:
    names = [change.state.name for change in changes]
    return set(pairwise(names))


def live(
    script: Script, leave_after: float, cancel_after: float = 1e6, **options: Any
) -> set[Transition]:
    """The transitions of one life, on virtual time."""
    supervisor = script.supervisor(**options)
    changes: list[StateChange] = []

    async def hold() -> None:
        supervisor.begin()
        try:
            with anyio.move_on_after(cancel_after):
                async with supervisor.running():
                    await anyio.sleep(leave_after)
        except ServerStartError:
            pass

    on_virtual_time(lambda: followed(supervisor, hold, changes))
    return transitions(changes)


async def followed(
    supervisor: Supervisor,
    hold: Callable[[], Awaitable[None]],
    changes: list[StateChange],
) -> None:
    follower = supervisor.journal.follow()
    await hold()
    changes += [change async for change in follower]


FAILS = Life(uptime=None, code=9)
# Each with what is seen in it and in none before.
LIVES: dict[str, Callable[[], set[Transition]]] = {
    "left": lambda: live(Script(), 5),
    "a start that fails": lambda: live(Script(FAILS), 5),
    "a start that is cancelled": lambda: live(Script(Life(1, launch=9)), 5, 3),
    "a crash that is not repaired": lambda: live(Script(Life(1)), 5),
    "crashes": lambda: live(Script(Life(1), FAILS, Life(1)), 9, **ALWAYS),
    "one crash too many": lambda: live(
        Script(Life(1), FAILS), 5, restart_policy=RestartPolicy.ALWAYS, max_restarts=1
    ),
    "left during a restart": lambda: live(
        Script(Life(1), Life(1, launch=9)), 5, **ALWAYS
    ),
}


def never_used() -> set[Transition]:
    supervisor = Script().supervisor()
    changes: list[StateChange] = []

    async def stop() -> None:
        supervisor.ask_to_stop()

    on_virtual_time(lambda: followed(supervisor, stop, changes))
    return transitions(changes)


def test_what_is_drawn_is_what_the_code_allows() -> None:
    allowed = [
        (state.name, after.name) for state in MAY_FOLLOW for after in MAY_FOLLOW[state]
    ]
    assert sorted(drawn()) == sorted(allowed)


def test_whatever_is_drawn_happens_and_nothing_else() -> None:
    lived = [life() for life in [*LIVES.values(), never_used]]
    assert set().union(*lived) == set(drawn())


@given(
    lives=st.lists(
        st.builds(
            Life,
            uptime=st.none() | st.sampled_from([0.5, 1, 70]),
            code=st.sampled_from([-9, 0, 1]),
            launch=st.sampled_from([0, 0.5, 3]),
        ),
        max_size=6,
    ),
    policy=st.sampled_from(RestartPolicy),
    max_restarts=st.integers(0, 3),
    leave_after=st.sampled_from([0, 0.5, 1, 3, 100]),
    cancel_after=st.sampled_from([0, 0.5, 1, 3, 1e6]),
)
def test_however_a_runtime_lives_the_diagram_has_it(
    lives: list[Life],
    policy: RestartPolicy,
    max_restarts: int,
    leave_after: float,
    cancel_after: float,
) -> None:
    options: dict[str, Any] = {"restart_policy": policy, "max_restarts": max_restarts}
    assert live(Script(*lives), leave_after, cancel_after, **options) <= set(drawn())


class _Dying(Script):
    """A server that dies when it is told to, and is heard of a moment later."""

    def __init__(self) -> None:
        super().__init__()
        self.dies = trio.Event()

    async def live(self, supervisor: Supervisor, command: Command) -> ServerExit:
        supervisor._serve(1, 4711)
        await self.dies.wait()
        return ServerExit(code=-9, pid=1, uptime=1)


@pytest.mark.parametrize("policy", RestartPolicy)
def test_a_crash_in_the_moment_of_the_end_is_an_end(policy: RestartPolicy) -> None:
    script = _Dying()
    supervisor = script.supervisor(restart_policy=policy)
    changes: list[StateChange] = []

    async def hold() -> None:
        supervisor.begin()
        async with supervisor.running():
            script.dies.set()
            supervisor.stop_serving()

    on_virtual_time(lambda: followed(supervisor, hold, changes))
    names = [change.state.name for change in changes]
    assert names == ["NEW", "STARTING", "READY", "STOPPING", "STOPPED"]

    async def ask() -> None:
        with pytest.raises(RuntimeStoppedError):
            await supervisor.wait_ready()

    on_virtual_time(ask)


@pytest.mark.anyio
@each_backend
async def test_a_real_server_goes_the_ways_that_are_drawn() -> None:
    runtime = StepflowRuntime.start(
        restart_policy=RestartPolicy.ON_FAILURE, max_restarts=1, recycle_after_runs=1
    )
    follower = runtime.state_changes()
    async with runtime:
        await runtime.run(ECHO, 1)
        await wait_until(lambda: runtime.recycles)
        await runtime.wait_ready()
        kill_server(runtime)
        await wait_until(lambda: runtime.restarts)
        await runtime.wait_ready()
        kill_server(runtime, signal.SIGABRT)
        await wait_until(lambda: runtime.state.is_final)
    names = [change.state.name async for change in follower]
    assert names == [
        *["NEW", "STARTING", "READY"],
        *["RESTARTING", "READY"] * 2,
        "FAILED",
    ]
    assert set(pairwise(names)) <= set(drawn())


def test_the_page_tells_of_every_state_and_every_way() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "../images/lifecycle.svg" in text
    assert [state.name for state in RuntimeState if f"`{state.name}`" not in text] == []
    told = re.findall(r"^\| `(\w+)` → `(\w+)` \|", text, re.MULTILINE)
    assert sorted(told) == sorted(drawn())


def test_the_picture_needs_nothing_from_elsewhere_and_can_be_read_aloud() -> None:
    root = ElementTree.parse(PICTURE).getroot()
    assert root.get("role") == "img"
    named = {
        child.get("id") for child in root if child.tag in (f"{SVG}title", f"{SVG}desc")
    }
    assert set(root.attrib["aria-labelledby"].split()) == named
    text = PICTURE.read_text(encoding="utf-8")
    assert re.findall(r"href|url\((?!#)|@import|<script", text) == []
    assert "prefers-color-scheme: dark" in text
