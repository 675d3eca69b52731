"""FakeServer: a stand-in for the server's binary, whose lives go as a test says.

Contract: between entering and leaving it, ``binary`` can be started any number of times,
as the real one can; what was started and is still there afterwards belongs to the runtime
that started it. It is a program of its own (``stand_in.py``), so what happens to it happens
to a real process, with real pipes and signals.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from ..server.interpreter import find_interpreter
from .faults import freeze_process, is_frozen, thaw_process

__all__ = ["ECHO", "FakeServer", "Life"]

_PROGRAM: Final = Path(__file__).with_name("stand_in.py")

# A flood waits for its reader; everything else is answered in a millisecond.
_PATIENCE: Final = 60.0

# So much of a path a Unix socket can have, less what comes behind the folder.
_LONGEST_PATH: Final = 70


class _Echo:
    def __repr__(self) -> str:
        return "ECHO"


ECHO: Final[Any] = _Echo()
"""As ``Life.output``: the input of a run comes back as its output."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """How one life of a :class:`FakeServer` goes: from a start to the end of its process.

    :ivar start_after: seconds until it announces its port
    :ivar fails: the words of the error with which it ends before that, with exit code 1
    :ivar log_lines: how many lines it logs before it announces its port
    :ivar output: what every run has for its output, any JSON value; :data:`ECHO`: its input
    :ivar error: the message with which every run fails; None: none does
    :ivar run_seconds: how long a run takes
    :ivar crash_on_run: which run of this life, counted from 1, makes it crash before it is
        answered; None: none does
    :ivar crash_after: after how many seconds of being there it crashes; None: never
    :ivar exit_code: how it crashes: an exit code, or the negative number of a signal
    :ivar is_healthy: False: it answers no health request, ever, as a server does that hangs
    :ivar ignores_sigterm: True: it does not end when it is asked to
    :raises ValueError: if a number is negative, or ``output`` is not JSON; by its name
    """

    start_after: float = 0.0
    fails: str | None = None
    log_lines: int = 0
    output: Any = ECHO
    error: str | None = None
    run_seconds: float = 0.0
    crash_on_run: int | None = None
    crash_after: float | None = None
    exit_code: int = -9
    is_healthy: bool = True
    ignores_sigterm: bool = False

    def __post_init__(self) -> None:
        for name in ("start_after", "run_seconds", "crash_after"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1e9:
                raise ValueError(f"{name} must be from 0 on, not {value!r}")
        _check_count("log_lines", self.log_lines, 0)
        if self.crash_on_run is not None:
            _check_count("crash_on_run", self.crash_on_run, 1)
        if not _is_end(self.exit_code):
            raise ValueError(
                "exit_code must be an exit code (0 to 255), or the negative number of a "
                f"signal that ends a process, not {self.exit_code!r}"
            )
        try:
            json.dumps(self._script(), allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise ValueError(f"output cannot be sent as JSON: {exc}") from exc

    def _script(self) -> dict[str, Any]:
        script = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.output is ECHO:
            del script["output"]
        return script


# Of these a process dies only if it wants to.
_HARMLESS: Final = (
    {"SIGCHLD", "SIGCONT", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU"}
    | {"SIGURG", "SIGWINCH", "SIGINFO"}
)  # fmt: skip


def _is_end(code: int) -> bool:
    signals = {-each for each in signal.Signals if each.name not in _HARMLESS}
    return isinstance(code, int) and (0 <= code <= 255 or code in signals)


def _check_count(name: str, value: int, least: int) -> None:
    if not (isinstance(value, int) and least <= value < 1e9):
        raise ValueError(
            f"{name} must be a whole number from {least} on, not {value!r}"
        )


class FakeServer:
    """A stand-in for the server's binary, to test one's own handling of what can go wrong.

    ::

        with FakeServer(Life(crash_on_run=1), Life(output={"ok": True})) as fake:
            with StepflowRuntime.start(
                binary=fake.binary, restart_policy=RestartPolicy.ON_FAILURE
            ) as runtime:
                ...

    It speaks the start-up protocol, answers health requests, and takes runs (``run``,
    ``submit``, ``get_result``, batches, ``cancel``); it executes no step. What else it is
    asked, it refuses with a ``ServerFaultError``; it refuses to start with a ``storage``. Its
    methods may be called from any thread. They speak to the latest start, through a socket, and
    block for a millisecond; ``flood`` until all is read.

    :param lives: how its lives go, one after the other; the last one stands for all further
        ones. None given: all go well

    On Linux and macOS: it takes a shell, Unix sockets and signals.
    """

    def __init__(self, *lives: Life) -> None:
        self._lives = lives or (Life(),)
        self._folder: Path | None = None
        self._frozen: int | None = None

    def __enter__(self) -> Self:
        """Make the program.

        :raises RuntimeError: on Windows, and where no Python can be executed
        """
        interpreter = find_interpreter()
        if interpreter is None or sys.platform == "win32":
            raise RuntimeError(
                "FakeServer is a Python program behind a shell script: it needs Linux or "
                f"macOS, and a Python that can be executed ({sys.executable!r})"
            )
        # Not where pytest keeps its folders, whose names are long.
        where = "/tmp" if len(tempfile.gettempdir()) > _LONGEST_PATH else None
        folder = Path(tempfile.mkdtemp(prefix="stepflow-fake-", dir=where))
        self._folder = folder
        script = [each._script() for each in self._lives]
        (folder / "script.json").write_text(json.dumps(script), encoding="utf-8")
        command = shlex.join([interpreter, "-I", "-S", str(_PROGRAM), str(folder)])
        self.binary.write_text(
            f'#!/bin/sh\nulimit -c 0\nexec {command} "$@"\n', encoding="utf-8"
        )
        self.binary.chmod(0o700)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        folder, self._folder = self._entered(), None
        shutil.rmtree(folder)

    @property
    def binary(self) -> Path:
        """The path to give as ``binary=``.

        :raises RuntimeError: if it is not entered
        """
        return self._entered() / "stepflow-server"

    @property
    def starts(self) -> int:
        """How often it was started, the starts that failed included."""
        return sum(each.name.isdigit() for each in self._entered().iterdir())

    @property
    def inputs(self) -> list[Any]:
        """The inputs of all runs that arrived, in all its lives, in order of arrival.

        Those of a batch one by one; those that were lost in a crash, too.
        """
        path = self._entered() / "inputs"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_bytes().splitlines()]

    def crash(self, exit_code: int = -9) -> None:
        """Have it end, now; it has ended when this returns.

        :param exit_code: its exit code, or the negative number of a signal
        :raises RuntimeError: if it is not there, or frozen
        """
        Life(exit_code=exit_code)  # checked as there
        self._order(do="crash", code=exit_code)

    def freeze(self) -> None:
        """Have it stand still, as by a debugger: alive, and answering nothing.

        :raises RuntimeError: if it is not there, or frozen already
        """
        pid = self._order(do="tell")
        assert pid is not None
        freeze_process(pid)
        self._frozen = pid

    def thaw(self) -> None:
        """Have it go on after :meth:`freeze`; nothing happens if it is not frozen."""
        pid, self._frozen = self._frozen, None
        if pid is not None:
            thaw_process(pid)

    def flood(
        self,
        lines: int,
        *,
        size: int = 100,
        stream: Literal["stdout", "stderr"] = "stdout",
    ) -> None:
        """Have it print, as fast as its output is read; all is written when this returns.

        :param lines: how many lines: log lines of the level INFO on ``"stdout"``, plain ones
            on ``"stderr"``
        :param size: of how many characters each message is, at least
        :raises RuntimeError: if it is not there, or frozen, or nobody reads its output
        """
        _check_count("lines", lines, 0)
        _check_count("size", size, 0)
        if stream not in ("stdout", "stderr"):
            raise ValueError(f'stream must be "stdout" or "stderr", not {stream!r}')
        fd = 1 if stream == "stdout" else 2
        if self._order(do="flood", lines=lines, size=size, fd=fd) is None:
            raise RuntimeError("the fake server ended before it had written everything")

    def _entered(self) -> Path:
        if self._folder is None:
            raise RuntimeError(
                "FakeServer has to be entered: with FakeServer() as fake"
            )
        return self._folder

    def _order(self, **order: Any) -> int | None:
        """Say something to the life that goes on; return its pid, or None if it has ended."""
        if self._frozen is not None and is_frozen(self._frozen):
            raise RuntimeError("the fake server is frozen: thaw() it first")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_PATIENCE)
            try:
                connection.connect(str(self._entered() / str(self.starts) / "control"))
                connection.sendall(json.dumps(order).encode() + b"\n")
                with connection.makefile("rb") as answers:
                    answer = answers.readline()
            except TimeoutError as exc:
                raise RuntimeError(
                    f"the fake server did not do as it was told ({order['do']}): nobody "
                    "reads its output, or it was frozen by others"
                ) from exc
            except FileNotFoundError as exc:
                raise RuntimeError(
                    "there is no fake server: none is started yet"
                ) from exc
            except ConnectionRefusedError as exc:
                raise RuntimeError("there is no fake server: it has ended") from exc
            except ConnectionError:
                answer = b""
        return json.loads(answer)["pid"] if answer else None
