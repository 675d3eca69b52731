"""``python -m benchmarks``: all that we promise of speed, beside our peers, in one run.

Needs the extra ``bench``, and wrk for the limit (``apt-get install wrk``). A promise that is
missed is told, and is no error: this measures, it does not judge.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from . import peers
from .cases import ALL
from .machine import this_machine
from .measure import FULL, QUICK, Case, Row
from .report import Results, comparison, decode, encode, machine_lines, summary, table


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = _parser().parse_args(arguments)
    old = decode(chosen.compare.read_bytes()) if chosen.compare else None
    results = Results(
        command=_command(chosen),
        at=time.strftime("%Y-%m-%d %H:%M %Z"),
        machine=this_machine(server_version()),
        rows=[],
    )
    print(machine_lines(results), flush=True)
    if not peers.has_wrk():
        print("wrk is not installed: the limit is not measured")
    for case in chosen.only or ALL:
        results.rows.extend(measured(case, quick=chosen.quick))
        if chosen.json:
            chosen.json.write_bytes(encode(results))
    print(f"\n{summary(results.rows)}")
    if old is not None:
        print(f"\n{comparison(old, results)}")


def measured(case: Case, *, quick: bool) -> list[Row]:
    """Measure a case, and print its tables."""
    began = time.perf_counter()
    rows = case.measure(QUICK if quick else FULL)
    took = time.perf_counter() - began
    print(f"\n== {case.name}: {case.about} ({took:.0f} s)")
    for name in dict.fromkeys(each.case for each in rows):
        print(f"\n{name}")
        print(table([each for each in rows if each.case == name]), flush=True)
    return rows


def server_version() -> str:
    """What a server tells of its build."""
    with peers.bare_server() as (port, _):
        url = f"http://127.0.0.1:{port}/api/v1/health"
        with urllib.request.urlopen(url) as answer:
            build = json.load(answer)["build"]
    return f"{build['gitVersion']}, {build['rustcVersion'].partition(' (')[0]}"


def _command(chosen: argparse.Namespace) -> str:
    words = ["python -m benchmarks"]
    if chosen.quick:
        words.append("--quick")
    if chosen.only:
        words.append(f"--only {','.join(case.name for case in chosen.only)}")
    return " ".join(words)


def _cases(names: str) -> list[Case]:
    known = {case.name: case for case in ALL}
    try:
        return [known[name] for name in names.split(",")]
    except KeyError as exc:
        raise argparse.ArgumentTypeError(
            f"there is no case {exc}; there are {', '.join(known)}"
        ) from exc


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="about a minute, and less to be relied on"
    )
    parser.add_argument(
        "--only", type=_cases, metavar="CASE[,CASE]", help="these cases, not all"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results there"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="and compare them with earlier ones",
    )
    return parser


if __name__ == "__main__":
    main()
