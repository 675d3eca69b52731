"""What CI makes of an audit: a service that says nothing is no service that finds nothing."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).parent.parent / ".ci" / "audit.py"

CANARY = {
    "name": "jinja2",
    "version": "2.11.2",
    "vulns": [{"id": "PYSEC-2021-66", "fix_versions": ["2.11.3"]}],
}
CLEAN = {"name": "anyio", "version": "4.16.0", "vulns": []}
MENDED = {**CLEAN, "vulns": [{"id": "PYSEC-1", "fix_versions": ["5.0"]}]}
UNMENDED = {**CLEAN, "vulns": [{"id": "PYSEC-2", "fix_versions": []}]}
# What pip-audit says, with exit code 0, if the registry is a mirror that tells nothing.
SKIPPED = {"name": "anyio", "skip_reason": "Dependency not found on PyPI"}
SILENT = {**CANARY, "vulns": []}
UNKNOWN = {"name": "jinja2", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.skipif(not AUDIT.exists(), reason="not in a source distribution")
@pytest.mark.parametrize(
    ("reports", "words", "outcome"),
    [
        ([[CLEAN, CANARY]], "audited, and well: 1 packages", 0),
        ([[MENDED, CANARY]], "vulnerable: anyio 4.16.0: PYSEC-1, fixed in 5.0", 1),
        ([[UNMENDED, CANARY]], "vulnerable: anyio 4.16.0: PYSEC-2, not fixed yet", 0),
        ([[SKIPPED, CANARY]], "not audited: anyio: Dependency not found", 0),
        ([[SKIPPED, UNKNOWN]], "not audited: no service", 0),
        ([[CLEAN, SILENT]], "not audited: no service", 0),
        ([None, None], "not audited: no service", 0),
        ([None, [MENDED, CANARY]], "PYSEC-1", 1),
    ],
)
def test_what_an_audit_comes_to(
    reports: list[list[Any] | None], words: str, outcome: int
) -> None:
    verdict = runpy.run_path(str(AUDIT))["verdict"]
    (line,), code = verdict([each and {"dependencies": each} for each in reports])
    assert line.startswith(words) or words in line
    assert code == outcome
