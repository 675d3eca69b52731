"""The long form: ``python -m tests.fuzz --minutes 30 [target]``.

Makes inputs from the corpus until the time is over, for one target or all in turn, and
prints how many a second. What goes wrong is printed with its traceback, and the input put
down in a file for its owner alone, in ``--findings``; ``--replay FILE`` gives it to the
target again. The same ``--seed`` makes the same inputs. The input that is being tried is in
the file ``current`` meanwhile: should the interpreter itself crash, that is it.

With ``--atheris``, where that is installed, coverage guides what is tried, and it ends with
the first finding.
"""

from __future__ import annotations

import argparse
import faulthandler
import mmap
import os
import secrets
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .harness import CORPUS, DEADLINE, execute, mutator_for, put_down
from .targets import TARGETS, Target

ROOM = 1024 * 1024
ROUND = 10.0  # seconds for a target until it is the next one's turn


def main() -> int:
    options = _options()
    targets = [TARGETS[options.target]] if options.target else [*TARGETS.values()]
    if options.replay is not None:
        execute(targets[0], options.replay.read_bytes())
        return 0
    if options.in_atheris:
        return _in_atheris(targets[0], options)
    if options.atheris:
        return max(_with_atheris(target, len(targets), options) for target in targets)
    return _with_mutator(targets, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--in-atheris", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.replay or options.in_atheris) and not options.target:
        parser.error("the target is needed, too")
    return options


# -- our own mutator -------------------------------------------------------------------


def _with_mutator(targets: list[Target], options: argparse.Namespace) -> int:
    mutators = {target: mutator_for(target, options.seed) for target in targets}
    numbers = dict.fromkeys(targets, 0)
    seconds = dict.fromkeys(targets, 0.0)
    findings = 0
    until = time.monotonic() + options.minutes * 60
    with _current(options.findings) as current:
        while time.monotonic() < until:
            for target in targets:
                began = time.monotonic()
                turn = min(began + ROUND, until)
                while time.monotonic() < turn:
                    data = mutators[target].make(numbers[target])
                    current[: len(data) + 1] = data + b"\0"
                    what = f"{options.seed}-{numbers[target]}"
                    findings += _has_failed(target, data, what, options.findings)
                    numbers[target] += 1
                seconds[target] += time.monotonic() - began
            _say(
                f"{until - time.monotonic():.0f} s left, {findings} findings;",
                *(
                    f"{target.name}: {numbers[target]}, {numbers[target] / seconds[target]:.0f}/s;"
                    for target in targets
                    if seconds[target]
                ),
            )
    return 1 if findings else 0


def _has_failed(target: Target, data: bytes, what: str, folder: Path) -> bool:
    # Should even the deadline not be heeded, it tells where that was.
    faulthandler.dump_traceback_later(6 * DEADLINE, exit=True)
    try:
        execute(target, data)
    except Exception:  # noqa: BLE001 - that is what is looked for
        _say(traceback.format_exc(limit=-12))
        _say(put_down(folder, target, what, data))
        return True
    finally:
        faulthandler.cancel_dump_traceback_later()
    return False


@contextmanager
def _current(folder: Path) -> Iterator[mmap.mmap]:
    """Where the input stands that is being tried; of it, what is before the zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "current"
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b") as f:
        f.truncate(ROOM)
        with mmap.mmap(f.fileno(), ROOM) as current:
            yield current
    file.unlink()


# -- atheris ---------------------------------------------------------------------------


def _with_atheris(target: Target, of: int, options: argparse.Namespace) -> int:
    """In a process of its own, which atheris ends."""
    options.findings.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz", "--in-atheris", target.name]
    minutes = str(options.minutes / of)
    command += ["--minutes", minutes, "--findings", str(options.findings)]
    return subprocess.run(command, check=False).returncode


def _in_atheris(target: Target, options: argparse.Namespace) -> int:
    import atheris

    os.umask(0o077)
    found = options.findings / f"{target.name}-corpus"
    found.mkdir(exist_ok=True)
    words = options.findings / f"{target.name}-words"
    words.write_text("".join(f'"{_quoted(word)}"\n' for word in target.words))
    atheris.instrument_all()
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={int(options.minutes * 60)}",
            f"-artifact_prefix={options.findings}/{target.name}-",
            f"-dict={words}",
            "-max_len=16384",
            "-print_final_stats=1",
            str(found),
            str(CORPUS / target.name),
        ],
        lambda data: execute(target, data),
    )
    atheris.Fuzz()
    return 0


def _quoted(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word[:100])


def _say(*words: str) -> None:
    print(*words, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
