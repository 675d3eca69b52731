"""What was done to the runtimes, and what became of it: counted, and printed as a table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

__all__ = ["LEDGER", "Account"]


@dataclass
class Account:
    """One kind of fault.

    :ivar injected: how many faults there were
    :ivar survived: after how many of them all was as it should be
    :ivar left: processes that were left behind
    :ivar calls: calls made under the faults
    :ivar told: those of them that ended in one of the library's own errors
    :ivar lost: those that never came back, or with anything else
    :ivar recoveries: seconds from a fault to READY
    """

    fault: str
    injected: int = 0
    survived: int = 0
    left: int = 0
    calls: int = 0
    told: int = 0
    lost: int = 0
    recoveries: list[float] = field(default_factory=list)

    def row(self) -> list[str]:
        median = statistics.median(self.recoveries) if self.recoveries else None
        worst = max(self.recoveries) if self.recoveries else None
        counts = (
            self.injected,
            self.survived,
            self.left,
            self.calls,
            self.told,
            self.lost,
        )
        times = ["" if s is None else f"{s * 1000:.0f} ms" for s in (median, worst)]
        return [self.fault, *map(str, counts), *times]


HEAD = ["fault", "injected", "survived", "left", "calls", "told", "lost"]
HEAD += ["to READY", "worst"]


class Ledger:
    def __init__(self) -> None:
        self.accounts: list[Account] = []

    def open(self, fault: str) -> Account:
        account = Account(fault)
        self.accounts.append(account)
        return account

    def table(self) -> list[str]:
        rows = [HEAD, *(account.row() for account in self.accounts)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(
                cell.ljust(width) if number == 0 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]


LEDGER = Ledger()
