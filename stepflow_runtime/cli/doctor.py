"""``stepflow-runtime doctor``: what is here, whether it works, and what to do if not.

The report is the result, so it goes to standard output: a line for each check, as it is
made, or all of it as JSON. Exit codes: 0 nothing is wrong (there may be warnings), 1 there
is a problem, 2 the command itself is wrong, 130 it was interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Final

import anyio
import msgspec
import typer

from .report import Finding, Redaction, State, as_text

__all__ = ["doctor"]

_COLOURS: Final = {State.WARNING: typer.colors.YELLOW, State.PROBLEM: typer.colors.RED}


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="A Stepflow configuration file to run the hello flow with. "
            "The store that it names is left alone.",
        ),
    ] = None,
    binary: Annotated[
        Path | None,
        typer.Option(help="The stepflow-server to look at, instead of the usual one."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON.")
    ] = False,
) -> None:
    """Look at everything that a server needs, run a flow, and report.

    The report has no values of environment variables in it, and no passwords of URLs.
    """
    from .checks import Case, check_all  # which takes `run` some time to import

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever a path is made of
    redact = Redaction(os.environ, os.path.expanduser("~"))
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(redact.finding(finding))
        if not as_json:
            _print(findings[-1])

    try:
        anyio.run(check_all, Case(config=config, chosen=binary), tell)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    counts = Counter(each.state for each in findings)
    if as_json:
        _print_json(findings)
    else:
        typer.echo(_summary(counts))
    raise typer.Exit(1 if counts[State.PROBLEM] else 0)


def _print(finding: Finding) -> None:
    text = as_text(finding)
    colour = None if "NO_COLOR" in os.environ else _COLOURS.get(finding.state)
    state, rest = text[: len(finding.state)], text[len(finding.state) :]
    typer.echo(typer.style(state, fg=colour) + rest)  # no colour where no terminal is


def _summary(counts: Counter[State]) -> str:
    problems, warnings = counts[State.PROBLEM], counts[State.WARNING]
    if not problems and not warnings:
        return "All is well."
    return f"Problems: {problems}. Warnings: {warnings}."


def _print_json(findings: list[Finding]) -> None:
    is_well = all(each.state is not State.PROBLEM for each in findings)
    report = {"ok": is_well, "findings": findings}
    typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
