"""Runs under load, at several levels, by everybody who can make them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import yaml

from stepflow_runtime import LogConfig, StepflowRuntime

from .. import peers
from ..measure import (
    CPU,
    Case,
    Check,
    Plan,
    Row,
    Sample,
    against,
    in_turns,
    load,
    row,
    spread,
)

__all__ = ["CASES"]

FILE: Final = Path(__file__).parents[2] / "docs/examples/greeting.yaml"
INFO: Final = LogConfig(level="info")

# What is promised of our sides, beside another one, at which levels (none: at each).
Promises = Mapping[str, tuple[float, tuple[int, ...]]]
PROMISES: Final[Promises] = {"official": (1.8, ()), "wrk": (0.9, (50,))}

WRK_REASON: Final = (
    "a run takes {cost:.0f} µs of the one thread that Python code runs in, so {most:,.0f} runs/s "
    "are the most, {share:.2f} x wrk"
)
OFFICIAL_REASON: Final = (
    "a run takes {cost:.0f} µs of processor here, {theirs:.0f} there, {ratio:.2f} x; what it "
    "takes of the server, on the same cores, is the same for both"
)


def run(plan: Plan) -> list[Row]:
    return [
        each for level in plan.levels for each in _level("run", level, plan, _sides)
    ]


def run_logged(plan: Plan) -> list[Row]:
    return [
        each
        for level in plan.levels
        for each in _level("run-logged", level, plan, _logged_sides)
    ]


def _level(
    case: str,
    level: int,
    plan: Plan,
    enter: Callable[[ExitStack], dict[str, peers.Load]],
) -> list[Row]:
    """Everybody at one level; with new servers, which remember all runs."""
    with ExitStack() as stack:
        sides = {
            name: partial(side, level, plan.seconds)
            for name, side in enter(stack).items()
        }
        found = in_turns(sides, plan.rounds)
    return [
        row(
            f"{case} at {level}",
            name,
            "runs/s",
            samples,
            *_checks(found, name, level),
            note=_note(name, samples),
        )
        for name, samples in found.items()
    ]


def _note(side: str, samples: Sequence[Sample]) -> str:
    """The 40 ms are no work of anybody: small packets wait for an acknowledgement."""
    slow = spread(each.also["p99 ms"] for each in samples).median
    if side == "official" and 40 <= slow < 50:
        return "some calls wait 40 ms for a delayed acknowledgement of TCP"
    return ""


def _checks(
    found: Mapping[str, Sequence[Sample]], side: str, level: int
) -> Iterator[Check]:
    if not side.startswith("ours"):
        return
    for other, (promise, levels) in PROMISES.items():
        if other not in found:
            continue
        if levels and level not in levels:
            yield against(found, side, other)
        else:
            yield against(
                found, side, other, "at least", promise, _reason(found, side, other)
            )


def _reason(found: Mapping[str, Sequence[Sample]], side: str, other: str) -> str:
    """Why a promise is out of reach, as far as what a run costs us says so."""
    cost = spread(each.also[CPU] for each in found[side]).median
    if other == "official":
        theirs = spread(each.also[CPU] for each in found[other]).median
        return OFFICIAL_REASON.format(cost=cost, theirs=theirs, ratio=theirs / cost)
    share = 1e6 / cost / spread(each.value for each in found[other]).median
    if share > 1:
        return ""
    return WRK_REASON.format(cost=cost, most=1e6 / cost, share=share)


def _sides(stack: ExitStack) -> dict[str, peers.Load]:
    port, _ = stack.enter_context(peers.bare_server())
    flow_id = peers.store(port)
    sides = {
        "ours, asyncio": stack.enter_context(peers.in_lane("asyncio", peers.ours)),
        "ours, uvloop": stack.enter_context(peers.in_lane("uvloop", peers.ours)),
        "ours, trio": stack.enter_context(peers.in_lane("trio", peers.ours)),
        "ours, hosted": stack.enter_context(peers.in_lane("asyncio", peers.hosted)),
        "official": stack.enter_context(peers.in_lane("asyncio", peers.official)),
        "httpx": stack.enter_context(
            peers.in_lane("asyncio", partial(peers.httpx_client, port))
        ),
        "raw sockets": partial(peers.raw, port, flow_id),
    }
    if peers.has_wrk():
        sides["wrk"] = partial(peers.wrk, port, flow_id)
    return sides


def _logged_sides(stack: ExitStack) -> dict[str, peers.Load]:
    """With each server's log read by somebody."""
    enter = stack.enter_context
    to_logger = LogConfig(level="info", python_logger=enter(_counted_logger()).name)
    sides = {
        "ours, asyncio": enter(peers.in_lane("asyncio", partial(peers.ours, INFO))),
        "ours, trio": enter(peers.in_lane("trio", partial(peers.ours, INFO))),
        "ours, asyncio, as records": enter(
            peers.in_lane("asyncio", partial(peers.ours, to_logger))
        ),
        "official": enter(peers.in_lane("asyncio", partial(peers.official, "info"))),
    }
    if peers.has_wrk():
        port, _ = enter(peers.bare_server("info", drain=True))
        sides["wrk"] = partial(peers.wrk, port, peers.store(port))
    return sides


@contextmanager
def _counted_logger() -> Iterator[logging.Logger]:
    """A logger that takes all, and has the cheapest handler there is."""
    logger = logging.getLogger("benchmark.records")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [logging.NullHandler()]
    yield logger


def flows(plan: Plan) -> list[Row]:
    """A workflow by its id, from a file, as a mapping; each known to the server already."""
    with peers.lane("asyncio") as portal:
        start = StepflowRuntime.start(log_config=peers.QUIET)
        with portal.wrap_async_context_manager(start) as runtime:
            by_id = portal.call(runtime.store_flow, FILE)
            ways = {
                "ours, FlowId": by_id,
                "ours, file": FILE,
                "ours, mapping": yaml.safe_load(FILE.read_text()),
            }
            found = in_turns(
                {
                    name: partial(
                        portal.call,
                        load,
                        partial(runtime.run, way, {"name": "Ada"}),
                        1,
                        plan.seconds,
                    )
                    for name, way in ways.items()
                },
                plan.rounds,
            )
    took = {
        name: [Sample(1e6 / each.value) for each in samples]
        for name, samples in found.items()
    }
    return [
        row("flows", "ours, FlowId", "µs/run", took["ours, FlowId"]),
        row(
            "flows",
            "ours, file",
            "µs/run",
            took["ours, file"],
            against(took, "ours, file", "ours, FlowId", "at most", 1.15),
        ),
        row(
            "flows",
            "ours, mapping",
            "µs/run",
            took["ours, mapping"],
            against(took, "ours, mapping", "ours, FlowId"),
        ),
    ]


CASES: Final = (
    Case("run", "runs per second, at several levels", run),
    Case(
        "run-logged", "the same with the server's log read, at level info", run_logged
    ),
    Case("flows", "a run by FlowId, from a file, and of a mapping", flows),
)
