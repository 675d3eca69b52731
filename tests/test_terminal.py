"""Progress, as it is to be seen: in a terminal, and where there is none."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from .conftest import EXAMPLES, processes_left
from .terminal import COMMAND, Terminal, masked
from .test_docs import blocks

# Of four pages the last one takes longer than anybody waits.
PAGES = ("run", str(EXAMPLES / "pages.yaml"), "-i", '{"pages":[50,50,50,60000]}')
PLAIN = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "NO_COLOR": "1"}


def shows_three_of_four(screen: str) -> bool:
    return "3/4" in screen


def documented(words: str) -> str:
    (shown,) = [b for b in blocks("docs/how-to/command.md", "text") if words in b]
    return shown.rstrip("\n")


def test_a_run_is_drawn_as_shown_and_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    with Terminal(*PAGES) as terminal:
        screen = terminal.wait_for(shows_three_of_four)
        assert masked(screen) == masked(documented("pages.yaml  1 of 3 steps"))
        assert b"\x1b[36m" in terminal.written  # what runs is cyan
        terminal.resize(60, 10)
        terminal.press(b"\x03")
        assert terminal.wait() == 130
        assert terminal.shows_cursor
        assert "Traceback" not in terminal.text
    assert processes_left() == []


def test_a_small_terminal_without_unicode_and_colours() -> None:
    with Terminal(*PAGES, columns=40, lines=5, env=PLAIN) as terminal:
        screen = terminal.wait_for(shows_three_of_four)
        assert masked(screen) == (
            "pages.yaml  1 of 3 steps  0.0 s\n"
            "> render                  3/4  0.0 s\n"
            "  > items                 3/4  0.0 s\n"
            "  ... 1 waiting, 1 completed"
        )
        # The blank keeps its style; what follows ESC [ and ends in m has no colour.
        assert b"\x1b[3" not in terminal.written
        os.kill(terminal.pid, 15)
        assert terminal.wait() == -15
    assert processes_left() == []


def test_a_batch_is_drawn_as_shown(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"pages":[]}\n' * 60 + '{"pages":[60000]}\n')
    arguments = [
        "batch",
        str(EXAMPLES / "pages.yaml"),
        "-i",
        str(tmp_path / "in.jsonl"),
    ]
    output = ["-o", str(tmp_path / "out.jsonl")]
    with Terminal(*arguments, *output) as terminal:
        screen = terminal.wait_for(lambda text: "60/61" in text and "/s  ETA" in text)
        assert masked(screen) == masked(documented("60/61"))


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_terminal_that_is_a_printer_gets_lines(term: str) -> None:
    arguments = ("run", str(EXAMPLES / "nested.yaml"), "-i", '{"value":1}')
    quiet = ("--quiet",) if term == "xterm" else ()
    with Terminal(*arguments, *quiet, env={"TERM": term}) as terminal:
        assert terminal.wait() == 0
        lines = masked(terminal.text).splitlines()
        steps = ["inner: completed,  0.0 s", "evaluate: completed,  0.0 s"]
        assert lines[: len(steps)] == (steps if term == "dumb" else ["{", *lines[1:2]])
        assert b"\x1b" not in terminal.written


def test_what_a_workflow_says_moves_no_cursor(tmp_path: Path) -> None:
    step = {
        "id": "a\x1b[2J\u202e\x9b1A",
        "component": "/noop",
        "input": {"x": "\x9b2J"},
    }
    document = {"steps": [step], "output": {"$step": step["id"]}}
    (tmp_path / "flow.json").write_text(json.dumps(document))
    with Terminal("run", str(tmp_path / "flow.json")) as terminal:
        assert terminal.wait() == 0
        assert "a\ufffd[2J\ufffd\ufffd1A" in terminal.text
        assert '"x": "\\u009b2J"' in terminal.text
        assert b"\x1b[2J" not in terminal.written
        assert b"\xc2\x9b" not in terminal.written


def test_without_a_terminal_each_step_is_a_line_on_stderr() -> None:
    done = subprocess.run(
        [COMMAND, "run", str(EXAMPLES / "nested.yaml"), "-i", '{"value": 1}'],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert masked(done.stderr).splitlines() == [
        "inner: completed,  0.0 s",
        "evaluate: completed,  0.0 s",
    ]
    assert json.loads(done.stdout)["outcome"] == "success"
