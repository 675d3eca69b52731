from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from benchmarks import disks
from benchmarks.cases import ALL
from benchmarks.machine import Machine, differences
from benchmarks.measure import (
    FULL,
    QUICK,
    Check,
    Row,
    Sample,
    Spread,
    against,
    alone,
    in_turns,
    load,
    quantile,
    ratios,
    row,
    spread,
)
from benchmarks.plots import fill
from benchmarks.report import Results, comparison, decode, encode, summary, table

ROOT = Path(__file__).parent.parent
MACHINE = Machine(
    cpu="Z80",
    cores=2,
    memory_gb=1,
    kernel="6.0",
    python="3.11.0",
    server="abc",
    packages={"stepflow-runtime": "0.1.0", "anyio": "4.16.0"},
)


def samples(*values: float) -> list[Sample]:
    return [Sample(value, {"p50 ms": 1000 / value}) for value in values]


def results(*rows: Row, machine: Machine = MACHINE) -> Results:
    return Results("python -m benchmarks", "today", machine, list(rows))


def test_a_spread_is_of_the_median_and_what_is_around_it() -> None:
    assert spread([3, 1, 2]) == Spread(2, 1, 3)
    assert spread([4, 1, 2, 3]) == Spread(2.5, 1, 4)
    assert quantile(range(100), 0.99) == 99
    assert quantile([5.0], 0.5) == 5.0


def test_a_ratio_is_that_of_rounds_and_not_that_of_medians() -> None:
    # A machine that is twice as fast in each round as in the one before.
    ours, theirs = [2.0, 4.0, 8.0], [1.0, 2.0, 4.0]
    assert ratios(ours, theirs) == Spread(2, 2, 2)
    # One that was slow in one turn.
    assert ratios([2.0, 2.0, 0.1], [1.0, 1.0, 1.0]).median == 2


def test_sides_take_turns_after_a_round_that_does_not_count() -> None:
    turns: list[str] = []

    def side(name: str) -> Sample:
        turns.append(name)
        return Sample(len(turns))

    found = in_turns({"a": lambda: side("a"), "b": lambda: side("b")}, 2)
    assert turns == ["a", "b"] * 3
    assert [each.value for each in found["a"]] == [3, 5]
    assert [each.value for each in found["b"]] == [4, 6]


def test_a_promise_is_kept_or_missed_or_was_never_made() -> None:
    sides = {"ours": samples(200, 220), "theirs": samples(100, 100)}
    assert against(sides, "ours", "theirs", "at least", 2.0).is_kept is True
    assert against(sides, "ours", "theirs", "at most", 2.0).is_kept is False
    assert against(sides, "ours", "theirs").is_kept is None
    assert alone([30, 60, 40], "at most", 40).is_kept is True
    assert alone([30, 60, 41], "at most", 40).is_kept is False


def test_load_is_made_for_a_time_by_so_many() -> None:
    most = under_way = 0

    async def run() -> None:
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        await anyio.sleep(0.01)
        under_way -= 1

    found = anyio.run(load, run, 3, 0.05)
    assert most == 3
    assert 0 < found.value < 300
    assert found.also["p99 ms"] >= found.also["p50 ms"] >= 10


def test_a_table_tells_promises_and_why_one_is_missed() -> None:
    sides = {"ours": samples(150, 150), "theirs": samples(100, 100)}
    missed = against(sides, "ours", "theirs", "at least", 1.8, "nobody can")
    told = table(
        [
            row("run", "ours", "runs/s", sides["ours"], missed),
            row("run", "theirs", "runs/s", sides["theirs"]),
            row("run", "refused", "runs/s", [], note="too large"),
        ]
    )
    lines = told.splitlines()
    assert lines[0].split() == ["runs/s", "p50", "ms", "beside", "ratio", "promise"]
    assert lines[1].split()[:5] == ["ours", "150", "(150", "to", "150)"]
    assert lines[1].endswith(">= 1.8  MISSED")
    assert "1.50 x" in lines[1]
    assert lines[3].split() == ["refused", "-"]
    assert lines[4:] == ["    refused: too large", "    missed by ours: nobody can"]


def test_the_summary_counts_promises_and_names_those_that_are_missed() -> None:
    kept = Check(Spread(2.0, 2.0, 2.0), "theirs", 1.8)
    missed = Check(Spread(60, 50, 70), None, 50, at_least=False)
    told = summary(
        [
            row("run", "ours", "runs/s", samples(1), kept, missed),
            row("run", "theirs", "runs/s", samples(1)),
        ]
    )
    assert told.splitlines() == [
        "1 promises kept, 1 missed",
        "    run: ours, 60.0 (promised <= 50)",
    ]


def test_results_survive_json() -> None:
    sides = {"ours": samples(200, 220), "theirs": samples(100, 100)}
    check = against(sides, "ours", "theirs", "at least", 2.0, "why")
    written = results(
        row("run", "ours", "runs/s", sides["ours"], check, x=50),
        row("run", "theirs", "runs/s", [], note="refused"),
    )
    assert decode(encode(written)) == written


def test_a_comparison_tells_old_and_new_of_what_both_have() -> None:
    old = results(
        row("run", "ours", "runs/s", samples(100, 100), x=50),
        row("stop", "ours", "ms", samples(100)),
        row("gone", "ours", "ms", samples(100)),
    )
    new = results(
        row("run", "ours", "runs/s", samples(150, 150), x=50),
        row("stop", "ours", "ms", samples(102)),
        row("come", "ours", "ms", samples(100)),
    )
    lines = [line.split() for line in comparison(old, new).splitlines()]
    assert lines == [
        ["unit", "old", "new", "change"],
        ["run:", "ours,", "50", "runs/s", "100", "150", "+50%"],
        ["stop:", "ours", "ms", "100", "102", "same"],
    ]


def test_a_comparison_tells_that_the_machine_is_another_one() -> None:
    other = Machine(
        cpu="6502",
        cores=2,
        memory_gb=1,
        kernel="6.0",
        python="3.11.0",
        server="abc",
        packages={"stepflow-runtime": "0.2.0", "anyio": "4.17.0"},
    )
    assert differences(MACHINE, MACHINE) == []
    # Our own version is what is compared.
    assert differences(MACHINE, other) == ["cpu: Z80 → 6502", "anyio: 4.16.0 → 4.17.0"]
    told = comparison(results(), results(machine=other))
    assert told.startswith("not the same machine")


def test_a_page_is_filled_between_its_marks_and_nowhere_else() -> None:
    page = "above\n<!-- measured: costs -->\nold\n<!-- end -->\nbelow\n"
    written = results(row("growth-costs", "a run", "KB", samples(5)))
    filled = fill(page, written)
    assert "| a run | 5.00 |" in filled and "old" not in filled
    assert filled.startswith("above\n") and filled.endswith("\nbelow\n")
    assert fill(filled, written) == filled


def test_a_page_of_which_not_all_was_measured_is_left_alone() -> None:
    page = """
<!-- measured: costs -->
old
<!-- end -->
<!-- measured: stores-kept -->
old
<!-- end -->
"""
    costs = row("growth-costs", "a run", "KB", samples(5))
    assert fill(page, results(costs)) == page
    rates = [
        row(f"stores at {level}", side, "runs/s", samples(rate))
        for level, rate in ((1, 240), (10, 200))
        for side in ("sqlite", "sqlite on tmpfs")
    ]
    filled = fill(page, results(costs, *rates))
    assert "| sqlite | 240 | 200 | all | all |" in filled
    assert "| sqlite on tmpfs | 240 | 200 | all | nothing |" in filled


def test_where_a_run_spends_its_time_is_told_by_stores_that_do_less() -> None:
    took = {
        "in memory": 0.5,
        "sqlite::memory:": 1.5,
        "sqlite, nothing synced": 2.0,
        "sqlite": 4.0,
    }
    rates = [
        row("stores at 1", side, "runs/s", samples(1000 / each))
        for side, each in took.items()
    ]
    page = "<!-- measured: stores-parts -->\n<!-- end -->"
    assert "| 12 syncs | 2.00 | 4.00, sqlite |" in fill(page, results(*rates))
    assert fill(page, results(*rates[:-1])) == page


@pytest.mark.skipif(not disks.can_pretend(), reason="needs a C compiler")
def test_a_process_is_told_another_tale_of_its_disk(tmp_path: Path) -> None:
    program = """
import os, sys, time
with open(sys.argv[1], "wb") as file:
    began = time.monotonic()
    os.fsync(file.fileno())
    print(time.monotonic() - began)
    try:
        os.fsync(9999)
    except OSError:
        print("refused")
"""

    def told(env: dict[str, str]) -> list[str]:
        command = [sys.executable, "-c", program, str(tmp_path / "file")]
        done = subprocess.run(command, env=env, check=True, capture_output=True)
        return done.stdout.decode().split()

    took, refused = told(disks.late(300))
    assert float(took) >= 0.3 and refused == "refused"
    # Nothing is asked of the system: not even whether there is such a file.
    assert len(told(disks.never())) == 1


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names)
    assert all("," not in name for name in names)
    assert QUICK.soak < FULL.soak


@pytest.mark.parametrize("case", ["flows"])
def test_a_case_is_measured_for_real(case: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", case]
    done = subprocess.run(
        [*command, "--json", path],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"== {case}" in done.stdout and "promises kept" in done.stdout
    written = decode(path.read_bytes())
    assert {each.case for each in written.rows} == {case}
    assert all(each.samples for each in written.rows)
