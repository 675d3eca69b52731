"""Whatever comes from outside: each input that is kept, and as many others as time permits.

``python -m tests.fuzz --minutes 30`` goes on for longer; see there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from .harness import corpus_of, execute, mutator_for, put_down
from .targets import TARGETS, Target

SECONDS = 2.0  # for each target
SEED = os.environ.get("STEPFLOW_FUZZ_SEED", "1")

each_target = pytest.mark.parametrize(
    "target", TARGETS.values(), ids=lambda target: target.name
)


@each_target
def test_what_is_kept_does_no_harm(target: Target) -> None:
    corpus = corpus_of(target)
    assert corpus
    for name, data in corpus.items():
        try:
            execute(target, data)
        except Exception as exc:
            raise AssertionError(f"the input {target.name}/{name}") from exc


@each_target
def test_nor_does_what_is_made_of_it(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mutator = mutator_for(target, SEED)
    until = time.monotonic() + SECONDS
    number = 0
    while time.monotonic() < until:
        data = mutator.make(number)
        try:
            execute(target, data)
        except Exception as exc:
            again = put_down(tmp_path, target, f"{SEED}-{number}", data)
            raise AssertionError(
                f"the input {number} of the seed {SEED}: {again}"
            ) from exc
        number += 1
    with capsys.disabled():
        print(f" {number} inputs ", end="")  # noqa: T201
