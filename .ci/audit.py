"""Whether a known vulnerability is in what users get with us: our own requirements, and theirs.

    audit.py PIP-AUDIT PYTHON

PIP-AUDIT is asked about what PYTHON's pip would install now of our dependencies and of the
extras that are for users; nothing is installed. Exit codes: 0 nothing was found, or nobody
could be asked, which is printed; 1 there is a vulnerability, and a version without it.

pip-audit itself exits with 0, and says that it knows of no vulnerability, if a registry tells
of none, as mirrors do. So a version that is known to be vulnerable is asked about as well:
unless that one is reported, nothing was audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WHAT = ".[trio,cli]"

# None of our dependencies, and vulnerable for certain (CVE-2020-28493, and later ones).
CANARY = ("jinja2", "2.11.2")

SERVICES = ("pypi", "osv")
SECONDS = 25.0


def main(pip_audit: str, python: str) -> int:
    try:
        pins = [*_resolved(python), CANARY]
    except (subprocess.SubprocessError, ValueError) as exc:
        print(f"not audited: what would be installed is not known: {exc}")  # noqa: T201
        return 0
    reports = []
    with tempfile.TemporaryDirectory() as directory:
        requirements = Path(directory, "requirements.txt")
        requirements.write_text("".join(f"{name}=={each}\n" for name, each in pins))
        for service in SERVICES:
            reports.append(_report(pip_audit, service, requirements))
            if _is_sound(reports[-1]):
                break
    lines, outcome = verdict(reports)
    print("\n".join(lines))  # noqa: T201
    return outcome


def verdict(reports: Sequence[dict[str, Any] | None]) -> tuple[list[str], int]:
    """Pure: what pip-audit's reports, in JSON, come to; None for one that there is not."""
    told = [each for each in reports if each is not None and _is_sound(each)]
    if not told:
        return ["not audited: no service that knows vulnerabilities can be reached"], 0
    lines, outcome = [], 0
    for dependency in _others(told[0]):
        name = f"{dependency['name']} {dependency.get('version', '')}".strip()
        if "vulns" not in dependency:
            lines.append(f"not audited: {name}: {dependency.get('skip_reason')}")
        for vulnerability in dependency.get("vulns", ()):
            fixed = ", ".join(vulnerability["fix_versions"])
            outcome |= bool(fixed)
            what = f"fixed in {fixed}" if fixed else "not fixed yet"
            lines.append(f"vulnerable: {name}: {vulnerability['id']}, {what}")
    return lines or [f"audited, and well: {len(_others(told[0]))} packages"], outcome


def _is_sound(report: dict[str, Any] | None) -> bool:
    """Whether it knows of the vulnerability that everybody should know of."""
    return report is not None and any(
        each["name"] == CANARY[0] and each.get("vulns")
        for each in report["dependencies"]
    )


def _others(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in report["dependencies"] if each["name"] != CANARY[0]]


def _resolved(python: str) -> list[tuple[str, str]]:
    """The packages that an installation would bring, but for our own."""
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        + ["--report", "-", WHAT],
        check=True,
        stdout=subprocess.PIPE,
        timeout=2 * SECONDS,
    )
    found = [each["metadata"] for each in json.loads(done.stdout)["install"]]
    pins = [(each["name"], each["version"]) for each in found]
    return [pin for pin in pins if pin[0] != "stepflow-runtime"]


def _report(pip_audit: str, service: str, requirements: Path) -> dict[str, Any] | None:
    """What a service says; None if it says nothing that can be read."""
    try:
        done = subprocess.run(
            [pip_audit, "--vulnerability-service", service, "--format", "json"]
            + ["--progress-spinner", "off", "--timeout", "5"]
            + ["--no-deps", "--disable-pip", "--requirement", str(requirements)],
            check=False,
            capture_output=True,
            timeout=SECONDS,
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return report


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
