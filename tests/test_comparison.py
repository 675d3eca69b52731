"""The comparison with the official launcher: what its tables are made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.comparison import arena
from benchmarks.comparison.page import Compared, Found, fill, shown, tables
from benchmarks.comparison.processes import kind, listening
from benchmarks.comparison.subjects import OFFICIAL, OURS
from benchmarks.comparison.trials import TRIALS, around
from benchmarks.machine import Machine
from benchmarks.report import decode

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "explanation" / "comparison.md"


def test_of_rounds_numbers_have_a_median_and_words_are_told_that_differ() -> None:
    rounds: list[arena.Answers] = [
        {"seconds": 1.0, "it says": "no", "left": "nothing"},
        {"seconds": 3.0, "it says": "perhaps", "left": "nothing"},
        {"seconds": 2.0, "it says": "no", "left": "server", "also": 4},
    ]
    assert arena.united(rounds) == {
        "seconds": 2.0,
        "it says": "no / perhaps",
        "left": "nothing / server",
        "also": 4,
    }


def test_a_program_ends_by_a_code_or_a_signal() -> None:
    assert arena.ended_as(0) == "exit code 0"
    assert arena.ended_as(-15) == "of SIGTERM"


def test_what_a_process_is_can_be_seen_by_its_command() -> None:
    assert kind(["/x/bin/stepflow-server", "--port", "0"]) == "server"
    assert kind(["python3", "worker.py"]) == kind(["sleep", "60"]) == "worker"
    assert kind(["/bin/cat"]) == "cat"
    assert kind([]) == ""


def test_who_listens_is_told_by_address_and_who_is_connected_is_not() -> None:
    lines = [
        "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000",
        "   1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000",
        "   2: 0500007F:1F90 0100007F:C0DE 01 00000000:00000000 00:00000000",
        "   3: 0600007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000",
    ]
    assert list(listening(lines, 8080)) == ["127.0.0.1", "0.0.0.0"]


def test_an_answer_is_a_number_or_a_word_or_what_somebody_said() -> None:
    assert shown(1000) == "1,000"
    assert shown(10.0109) == "10.0"
    assert shown("server, worker") == "server, worker"
    assert shown("Error: a `x` | y") == "`Error: a 'x' ¦ y`"
    assert shown("E: " + "x" * 500).endswith("x …`")


def test_of_a_long_text_the_place_is_told_that_matters() -> None:
    text = f"{'x' * 90} because of this {'y' * 90}"
    assert around("this", text) == f"... {'x' * 18} because of this {'y' * 39} ..."
    assert around("that", text) == "nothing"


def found(section: str) -> Found:
    answers: dict[str, arena.Answers] = {
        OFFICIAL: {"time to stop": 10.0, "left": "worker"},
        OURS: {"time to stop": 0.5, "reason": "yes"},
    }
    return Found("stop", section, "It is stopped", 3, answers)


def test_a_table_has_the_questions_of_both() -> None:
    lines = tables([found("ending")]).splitlines()
    assert lines[2:] == [
        "| **It is stopped** (median of 3) |  |  |",
        "| time to stop | 10.0 s | 500 ms |",
        "| left | worker |  |",
        "| reason |  | yes |",
    ]


def test_the_page_has_a_table_for_each_trial_and_is_made_as_a_whole() -> None:
    page = PAGE.read_text(encoding="utf-8")
    marks = set(re.findall(r"<!-- measured: ([\w-]+) -->", page))
    sections = {trial.section for trial in TRIALS.values()}
    assert marks == sections | {"machine", "speed"}
    for trial in TRIALS.values():
        assert f"| **{trial.about}**" in page
    speed = decode((DOCS / "plots" / "results.json").read_bytes())
    machine = Machine("Z80", 2, 1, "6.0", "3.11.0", "abc", {})
    one = Compared("command", "today", machine, [found("ending")])
    assert fill(page, one, speed) == page
    all_of_it = Compared("command", "today", machine, [found(x) for x in sections])
    filled = fill(page, all_of_it, speed)
    assert filled.count("| time to stop | 10.0 s | 500 ms |") == len(sections)
    assert "command (today, )" in filled


def test_both_are_tried_by_the_same_lines() -> None:
    asked = {
        subject: arena.once(TRIALS["port"], subject) for subject in (OFFICIAL, OURS)
    }
    assert asked[OURS] == {"the port is bound to": "127.0.0.1"}
    assert asked[OFFICIAL].keys() == asked[OURS].keys()


def test_what_a_trial_leaves_behind_is_told_and_then_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arena, "PATIENCE", 0.1)
    # Whether that is a server is the trial's affair; that none is there any more after it,
    # the fixture's that looks after each test.
    answers = arena.once(TRIALS["SIGKILL"], OFFICIAL)
    assert answers["the program ends"] == "of SIGKILL"
    assert answers[arena.LEFT] in ("server", "nothing")
