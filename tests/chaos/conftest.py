"""How much chaos, and the table at the end of it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from .ledger import LEDGER, Account


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How many faults: few in the short form, which CI runs, and many in the long one."""

    def rounds(short: int, long: int) -> int:
        return long if request.config.getoption("--chaos") == "long" else short

    return rounds


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Account:
    doc = request.function.__doc__ or request.node.name
    variant = getattr(request.node, "callspec", None)
    return LEDGER.open(
        doc.strip().rstrip(".") + (f" [{variant.id}]" if variant else "")
    )


@pytest.fixture
def chance() -> random.Random:
    """Another chaos each time; a failure's report shows the seed."""
    seed = random.randrange(10**6)
    print("seed", seed)  # noqa: T201
    return random.Random(seed)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEDGER.accounts:
        terminalreporter.section("chaos")
        for line in LEDGER.table():
            terminalreporter.write_line(line)
