"""Nobody else gets in: the port is on loopback, and the server's for as long as it lives."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepflow_runtime import (
    RestartPolicy,
    ServerStartError,
    StepflowError,
    StepflowRuntime,
)
from stepflow_runtime.server import confine as confine_module
from stepflow_runtime.server import port as port_module
from stepflow_runtime.server.confine import (
    CannotConfineError,
    Confinement,
    filter_for,
    loopback_for,
)
from stepflow_runtime.server.options import Command
from stepflow_runtime.server.platform import spawn
from stepflow_runtime.server.port import HeldPort
from stepflow_runtime.server.process import ServerProcess

from .conftest import ECHO, each_backend
from .test_start_failures import worker_config

linux = pytest.mark.skipif(sys.platform != "linux", reason="as on Linux")
pytestmark = [pytest.mark.anyio, linux]

PORT: Final = 7837


# -- the decision ----------------------------------------------------------------------


def sockaddr(address: str, port: int = PORT) -> bytes:
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address)
        return struct.pack("=H", socket.AF_INET6) + struct.pack(
            "!HI16sI", port, 0, packed, 0
        )
    return struct.pack("=H", socket.AF_INET) + struct.pack(
        "!H4s8x", port, socket.inet_aton(address)
    )


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "10.1.2.3", "192.168.0.1", "255.255.255.255", "127.0.0.1"],
)
def test_the_servers_port_is_moved_to_loopback(address: str) -> None:
    assert loopback_for(sockaddr(address), PORT) == (socket.AF_INET, "127.0.0.1")


@pytest.mark.parametrize(
    "address", ["::", "fe80::1", "2001:db8::1", "::ffff:0.0.0.0", "::ffff:127.0.0.1"]
)
def test_also_where_an_ipv6_socket_asks_for_it(address: str) -> None:
    there = loopback_for(sockaddr(address), PORT)
    assert there == (socket.AF_INET6, "::ffff:127.0.0.1")


@pytest.mark.parametrize(
    "asked",
    [
        sockaddr("0.0.0.0", PORT + 1),
        sockaddr("0.0.0.0", 0),
        sockaddr("::", PORT + 1),
        sockaddr("127.1.2.3"),
        sockaddr("::1"),
        sockaddr("::ffff:127.1.2.3"),
        struct.pack("=H", socket.AF_UNIX) + b"/a/path/that/is/long",
        struct.pack("=H", socket.AF_NETLINK) + struct.pack("!H12x", PORT),
        sockaddr("0.0.0.0")[:15],
        sockaddr("::")[:23],
        b"",
    ],
)
def test_everything_else_is_left_alone(asked: bytes) -> None:
    assert loopback_for(asked, PORT) is None


@given(st.binary(max_size=130), st.integers(1, 65535))
@example(sockaddr("0.0.0.0"), PORT)
def test_whatever_is_in_memory_there_is_a_decision(asked: bytes, port: int) -> None:
    """And where a socket is moved, it asked for that port, at another address."""
    there = loopback_for(asked, port)
    if there is not None:
        family, host = there
        assert struct.unpack_from("=H", asked) == (family,)
        assert struct.unpack_from("!H", asked, 2) == (port,)
        assert host.endswith("127.0.0.1")


def verdict(program: bytes, arch: int, number: int) -> int:
    """What a filter returns, of the few instructions that ours has."""
    data = {0: number, 4: arch}
    instructions = [*struct.iter_unpack("=HBBI", program)]
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        if code == 0x20:
            accumulator = data[operand]
        elif code == 0x15:
            at += if_true if accumulator == operand else if_false
        else:
            assert code == 0x06
            return int(operand)


def test_the_filter_asks_about_bind_and_allows_the_rest() -> None:
    ask, allow = 0x7FC00000, 0x7FFF0000
    i386, x32 = 0x40000003, 0x40000000
    for machine in confine_module._MACHINES.values():
        program = filter_for(machine)
        assert verdict(program, machine.audit_arch, machine.bind) == ask
        for number in {*range(500)} - {machine.bind}:
            assert verdict(program, machine.audit_arch, number) == allow
        assert verdict(program, i386, machine.bind) == allow
        assert verdict(program, machine.audit_arch, machine.bind | x32) == allow


# -- the server ------------------------------------------------------------------------


def listening(port: int) -> set[str]:
    """The addresses at which anybody listens on the port."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if int(number, 16) == port and state == "0A":
                found.add(_dotted(address))
    return found


def _dotted(address: str) -> str:
    packed = struct.pack(
        f"={len(address) // 8}I",
        *struct.unpack(f"!{len(address) // 8}I", bytes.fromhex(address)),
    )
    return socket.inet_ntop(
        socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed
    )


@contextmanager
def watching(port: int, seen: set[str]) -> Iterator[None]:
    """Look all the time where anybody listens on the port."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.update(listening(port))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def our_seccomp() -> set[str]:
    """The modes of seccomp that our threads are in."""
    return {
        line.split()[1]
        for status in Path("/proc/self/task").glob("*/status")
        for line in status.read_text().splitlines()
        if line.startswith(("Seccomp:", "NoNewPrivs:"))
    }


async def test_the_port_is_on_loopback_from_its_first_moment_and_after_restarts() -> (
    None
):
    port, seen = free_port(), set[str]()
    with watching(port, seen):
        async with StepflowRuntime.start(
            port=port, restart_policy=RestartPolicy.ALWAYS
        ) as runtime:
            assert our_seccomp() == {"0"}  # nothing is changed for us
            for _ in range(2):
                assert runtime.pid is not None
                os.kill(runtime.pid, 9)
                assert (await runtime.run(ECHO, 1)).output == 1
                assert runtime.port == port
                assert listening(port) == {"127.0.0.1"}
    assert seen <= {"127.0.0.1"}  # where many sockets are, a look takes its time


def test_likewise_of_a_hosted_runtime() -> None:
    with StepflowRuntime.start() as runtime:
        assert listening(runtime.port) == {"127.0.0.1"}
        assert asyncio.run(runtime.run(ECHO, 1)).output == 1


async def test_any_is_what_the_server_does_by_itself() -> None:
    async with StepflowRuntime.start(exposure="any") as runtime:
        assert listening(runtime.port) == {"0.0.0.0"}
        assert (await runtime.run(ECHO, 1)).output == 1


@each_backend
async def test_the_variable_for_the_port_is_heeded(anyio_backend: Any) -> None:
    port = free_port()
    for value, expected in ((str(port), port), ("0", None)):
        async with StepflowRuntime.start(env={"STEPFLOW_PORT": value}) as runtime:
            assert runtime.port == (expected or runtime.port)
            assert listening(runtime.port) == {"127.0.0.1"}


@each_backend
async def test_a_variable_that_is_no_port_is_for_the_server_to_refuse(
    anyio_backend: Any,
) -> None:
    for value in ("65536", "-1", "x"):
        with pytest.raises(ServerStartError, match="--port"):
            async with StepflowRuntime.start(env={"STEPFLOW_PORT": value}):
                pytest.fail("it became ready")


@pytest.mark.parametrize("exposure", ["public", "", None, True])
def test_another_exposure_is_refused(exposure: Any) -> None:
    with pytest.raises(ValueError, match="exposure must be one of 'loopback', 'any'"):
        StepflowRuntime.start(exposure=exposure)


@each_backend
def test_a_neighbour_in_another_network_does_not_reach_it(anyio_backend: Any) -> None:
    backend = anyio_backend[0]
    done = subprocess.run(
        [sys.executable, "-m", "tests.namespaces", backend],
        capture_output=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode == 77:
        pytest.skip("network namespaces are not to be had here")
    assert json.loads(done.stdout) == {
        "any": True,  # so the cable is there
        "loopback": False,
        "require-loopback": False,
    }, done.stderr


# -- what the server starts ------------------------------------------------------------

BINDS = """\
#!{python}
import os, socket, sys
port = int(sys.argv[1])
told = []
for family, kind, address in (
    (socket.AF_INET, socket.SOCK_STREAM, ("0.0.0.0", 0)),
    (socket.AF_INET6, socket.SOCK_STREAM, ("::", 0)),
    (socket.AF_INET, socket.SOCK_DGRAM, ("0.0.0.0", port)),
    (socket.AF_UNIX, socket.SOCK_STREAM, "{path}"),
    (socket.AF_UNIX, socket.SOCK_STREAM, "\\0{path}"),
    (socket.AF_INET, socket.SOCK_STREAM, ("192.0.2.1", 0)),
):
    with socket.socket(family, kind) as bound:
        try:
            bound.bind(address)
            name = bound.getsockname()
            if family == socket.AF_UNIX:
                told.append(os.fsdecode(name).replace("\\0", "@"))
            else:
                told.append(name[0])
        except OSError as exc:
            told.append(str(exc.errno))
bound = socket.socket()
bound.setblocking({blocking})
bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
bound.bind(({address!r}, port))
bound.listen()
told += [bound.getsockname()[0], str(bound.getblocking()), str(os.get_inheritable(bound.fileno()))]
print(" ".join(told), flush=True)
"""


@pytest.mark.parametrize(
    ("blocking", "address"), [(True, "0.0.0.0"), (False, "127.0.0.1")]
)
def test_every_other_bind_is_as_before_also_while_nobody_here_runs(
    tmp_path: Path, blocking: bool, address: str
) -> None:
    """Also where the server asks for loopback by itself, which is held for it.

    Spawned from a thread that ends; then this one sleeps, as a blocked loop does.
    """
    script = tmp_path / "binds"
    path = str(tmp_path / "socket")
    known = {"python": sys.executable, "path": path}
    script.write_text(BINDS.format(**known, blocking=blocking, address=address))
    script.chmod(0o755)
    with held(0) as port:
        command = Command(
            argv=(str(port.number),),
            env=os.environ,
            stdin=None,
            port=port,
            exposure="require-loopback",
        )
        child = in_a_thread(lambda: spawn(script, command))
        try:
            began = time.monotonic()
            while not (told := child.stdout.read(0.1)):
                assert time.monotonic() < began + 20, child.stderr.read(0)
                time.sleep(0.05)
            assert told.decode().split() == [
                *("0.0.0.0", "::", "0.0.0.0", path, f"@{path}"),
                str(errno.EADDRNOTAVAIL),
                *("127.0.0.1", str(blocking), "False"),
            ]
            assert child.exposed is None
        finally:
            child.sweep(spare_leader=False, timeout=5)
            child.reap()
            child.close()


def in_a_thread(function: Callable[[], Any]) -> Any:
    outcome: Future[Any] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except Exception as exc:  # noqa: BLE001 - raised by who waits for it
            outcome.set_exception(exc)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return outcome.result()


def confined(port: HeldPort, program: str) -> str:
    """What a Python program prints that is confined; its argument is the port."""

    def run() -> str:
        confinement = Confinement(port, strict=False)
        try:
            done = subprocess.run(
                [sys.executable, "-c", program, str(port.number)],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
            return done.stdout
        finally:
            confinement.close()

    printed: str = in_a_thread(run)
    return printed


BINDS_AMONG_SIGNALS = """
import signal, socket, sys
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
for _ in range(500):
    with socket.socket() as bound:
        bound.bind(("0.0.0.0", int(sys.argv[1])))
signal.setitimer(signal.ITIMER_REAL, 0)
print("bound")
"""


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))


@pytest.mark.skipif(
    sys.platform != "linux" or _kernel() < (5, 19), reason="as of Linux 5.19"
)
def test_a_signal_does_not_have_bind_ask_twice() -> None:
    """The second time the first socket would be there already: address in use."""
    with held(0) as port:
        assert confined(port, BINDS_AMONG_SIGNALS) == "bound\n"


BINDS_ONCE = """
import socket, sys
try:
    socket.socket().bind(("0.0.0.0", int(sys.argv[1])))
except OSError as exc:
    print(exc.errno)
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def break_down(*_: object) -> bool:
        raise MemoryError

    monkeypatch.setattr(Confinement, "_answer_next", break_down)
    with held(0) as port:
        assert confined(port, BINDS_ONCE) == f"{errno.ENOSYS}\n"


@contextmanager
def held(number: int) -> Iterator[HeldPort]:
    port = HeldPort()
    port.take(number)
    try:
        yield port
    finally:
        port.release()


@each_backend
async def test_a_worker_binds_what_it_likes(worker_env: dict[str, str]) -> None:
    """A real worker of the server; it says what it got, and fails, so that we hear of it."""
    script = """
        import socket, sys
        bound = socket.socket()
        bound.bind(("0.0.0.0", 0))
        print("the worker got", bound.getsockname()[0], file=sys.stderr)
        sys.exit(3)
    """
    config = worker_config("python3", "-c", textwrap.dedent(script))
    with pytest.raises(ServerStartError, match="the worker got 0.0.0.0"):
        async with StepflowRuntime.start(config, env=worker_env):
            pytest.fail("it became ready")


# -- where it cannot be had ------------------------------------------------------------


@pytest.fixture(autouse=True)
def _not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine_module, "_warned", False)


@each_backend
async def test_another_processor_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(confine_module, "_MACHINES", {})
    for _ in range(2):
        async with StepflowRuntime.start() as runtime:
            assert listening(runtime.port) == {"0.0.0.0"}
    (warning,) = [each for each in caplog.records if each.name == "stepflow_runtime"]
    assert warning.levelno == logging.WARNING
    words = warning.getMessage()
    for word in (
        "all network interfaces",
        "x86_64 and aarch64",
        "firewall",
        "exposure=",
    ):
        assert word in words


@each_backend
async def test_and_nothing_is_started_if_it_is_required(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(confine_module, "_MACHINES", {})
    started = tmp_path / "started"
    script = tmp_path / "server"
    script.write_text(f"#!/bin/sh\ntouch {started}\n")
    script.chmod(0o755)
    with pytest.raises(ServerStartError, match="x86_64 and aarch64 only") as caught:
        async with StepflowRuntime.start(exposure="require-loopback", binary=script):
            pytest.fail("it became ready")
    assert 'exposure="require-loopback"' in str(caught.value)
    assert not started.exists()


@pytest.mark.parametrize("exposure", ["loopback", "require-loopback"])
@each_backend
async def test_a_memory_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, exposure: Any
) -> None:
    """As where another security module forbids it: noticed when the server is running."""

    def memory(question: object) -> bytes:
        raise PermissionError(errno.EPERM, "Operation not permitted", "/proc/1/mem")

    monkeypatch.setattr(confine_module, "_memory", memory)
    if exposure == "require-loopback":
        with pytest.raises(ServerStartError, match="Permission denied"):
            async with StepflowRuntime.start(exposure=exposure):
                pytest.fail("it became ready")
        return
    async with StepflowRuntime.start(exposure=exposure) as runtime:
        assert listening(runtime.port) == {"0.0.0.0"}
    assert "/proc/1/mem" in caplog.text


async def test_a_server_that_nobody_was_asked_about(
    fake_server: Callable[[str], Path],
) -> None:
    """As one that had its socket from elsewhere: what it says of it is not enough."""
    script = fake_server('echo "{\\"port\\":$2}"; exec sleep 100')
    with pytest.raises(ServerStartError, match="was not asked about"):
        async with StepflowRuntime.start(exposure="require-loopback", binary=script):
            pytest.fail("it became ready")


UNDER_A_FILTER = """
import anyio, sys
from stepflow_runtime import ServerStartError, StepflowRuntime

async def main():
    try:
        async with StepflowRuntime.start(exposure="require-loopback"):
            print("ready")
    except ServerStartError as exc:
        print(exc)

anyio.run(main)
"""


def test_a_program_that_is_confined_itself_is_told_so() -> None:
    """There can be one filter that asks; a program below one is a worker of a runtime's."""

    with held(0) as port:
        assert "another filter" in confined(port, UNDER_A_FILTER)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EINVAL, "older than Linux 5.9"),
        (errno.ENOSYS, "older than Linux 5.9"),
        (errno.EPERM, "a container's profile"),
        (errno.EACCES, "a container's profile"),
    ],
)
def test_what_the_kernel_refuses_is_explained(number: int, words: str) -> None:
    assert words in str(confine_module._refusal("X", number))


def test_a_python_without_ctypes_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctypes", None)
    with held(0) as port, pytest.raises(CannotConfineError, match="no ctypes"):
        Confinement(port, strict=False)


@pytest.mark.parametrize("spare", range(4))
def test_a_moment_without_descriptors_opens_no_port(spare: int) -> None:
    """That it cannot be had now does not mean that it cannot be had here."""

    def confine_with(spare: int) -> None:
        free = [os.dup(0) for _ in range(4)]
        for fd in free:
            os.close(fd)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], hard))
        try:
            Confinement(port, strict=False).close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with held(0) as port:
        if spare == 3:  # two for a pipe, one for the listener
            in_a_thread(lambda: confine_with(spare))
            return
        with pytest.raises(OSError, match="Too many open files") as caught:
            in_a_thread(lambda: confine_with(spare))
        assert not isinstance(caught.value, CannotConfineError)


@each_backend
async def test_nor_does_one_without_ports(
    monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """As where loopback is down; which port the server takes, it alone would know."""

    def bound(number: int) -> socket.socket:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(port_module, "_bound", bound)
    with pytest.raises(ServerStartError, match=r"no port of 127\.0\.0\.1 .* assign"):
        async with StepflowRuntime.start():
            pytest.fail("it became ready")


def test_a_port_that_is_not_known_cannot_be_kept() -> None:
    with pytest.raises(CannotConfineError, match="it alone knows"):
        Confinement(HeldPort(), strict=False)


# -- never a stranger ------------------------------------------------------------------


class Stranger:
    """Tries all the time to get the port, and reads what it is sent if it does."""

    def __init__(self, port: int, address: str) -> None:
        self.heard: list[bytes] = []
        self.tries = 0
        self._where = (address, port)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._over.is_set():
            self.tries += 1
            with socket.socket() as mine, suppress(OSError):
                mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                mine.bind(self._where)
                mine.listen()
                mine.settimeout(0.05)
                with mine.accept()[0] as victim:
                    victim.settimeout(0.05)
                    self.heard.append(victim.recv(1000))


@pytest.mark.parametrize("exposure", ["loopback", "any"])
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
@each_backend
async def test_a_stranger_never_gets_a_request(exposure: Any, address: str) -> None:
    """Whoever grabs for the port between crash and restart gets nothing to hear."""
    served = 0
    async with StepflowRuntime.start(
        exposure=exposure, restart_policy=RestartPolicy.ALWAYS, max_restarts=1000
    ) as runtime:
        with Stranger(runtime.port, address) as stranger:
            for _ in range(4):
                if (pid := runtime.pid) is not None:
                    os.kill(pid, 9)
                # Where the server binds the port by itself, the stranger may keep it from
                # starting, but no more than that.
                with anyio.move_on_after(20 if exposure == "loopback" else 1):
                    served += await is_served(runtime)
    assert stranger.heard == []
    assert stranger.tries > 100
    assert served == 4 or exposure == "any"


async def is_served(runtime: StepflowRuntime) -> bool:
    while True:
        with suppress(StepflowError):  # the call came before the end was noticed
            return bool((await runtime.run(ECHO, 1)).output == 1)


def test_a_held_port_is_nobody_elses() -> None:
    """In none of the ways that there are to share one; and afterwards anybody's."""

    def gets(number: int) -> bool:
        for option in (0, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            for address in ("127.0.0.1", "0.0.0.0"):
                with socket.socket() as mine, suppress(OSError):
                    if option:
                        mine.setsockopt(socket.SOL_SOCKET, option, 1)
                    mine.bind((address, number))
                    return True
        return False

    with held(0) as port:
        assert port.number > 0
        assert not gets(port.number)
        port.lend()
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port.number))
            server.listen()
            port.keep()
            assert not gets(port.number)
            with held(port.number) as again:
                assert again.number == port.number
                again.lend()  # it has nothing to lend
                assert not gets(port.number)
        assert not gets(port.number)
    assert gets(port.number)
    port.take(0)  # it is over, whoever was late
    assert gets(port.number)


async def test_what_a_worker_prints_is_no_announcement(
    fake_server: Callable[[str], Path],
) -> None:
    """It may have inherited the server's output; only the port that was asked for counts."""
    lines = [
        '{"port":1}',
        '{"port":65536}',
        '{"port":-1}',
        '{"port":1e400}',
        '{"port":"x"}',
        '{"port":1,"\\377":1}',  # printf makes it a byte that is no text
    ]
    with held(0) as port:
        command = Command(argv=(), env=os.environ, stdin=None, port=port)
        script = "\n".join(f"printf '{line}\\n'" for line in lines)
        process = await ServerProcess.spawn(fake_server(script), command)
        await process.wait_exit()
        written = process.stdout.read() or b""
        assert b'{"port":1,"\xff":1}' in written
        assert [process.hear(line) for line in written.splitlines()] == [False] * 6
        assert process.hear(b'{"port":%d}' % port.number)
        with anyio.fail_after(5):
            assert await process.wait_port() == port.number
        await process.end(lambda: 0)
        process.close()


def test_a_child_that_is_forked_while_we_bind_does_not_get_the_servers_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would keep the port, and let clients wait, when the server has ended."""
    binding, over = threading.Event(), threading.Event()
    check = confine_module._check_still_there

    def check_slowly(*arguments: Any) -> None:
        binding.set()
        over.wait(0.2)
        check(*arguments)

    monkeypatch.setattr(confine_module, "_check_still_there", check_slowly)
    reading, writing = os.pipe()
    with held(0) as port:
        binder = threading.Thread(target=confined, args=(port, BINDS_ONCE))
        binder.start()
        assert binding.wait(20)
        pid = os.fork()
        if pid == 0:
            os.write(writing, json.dumps(listening_here()).encode())
            os._exit(0)
        over.set()
        os.waitpid(pid, 0)
        binder.join()
    assert json.loads(os.read(reading, 10_000)) == []
    os.close(reading)
    os.close(writing)


def listening_here() -> list[int]:
    """The ports of the sockets of this process that listen."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError), socket.socket(fileno=os.dup(fd)) as copy:
            if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append(copy.getsockname()[1])
    return found


def test_a_forked_child_holds_neither_the_port_nor_the_listener() -> None:
    with StepflowRuntime.start() as runtime:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            links = []
            for name in os.listdir("/proc/self/fd"):
                with suppress(OSError):
                    links.append(os.readlink(f"/proc/self/fd/{name}"))
            held = [each for each in links if "seccomp" in each]
            os.write(writing, json.dumps(held).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        assert json.loads(os.read(reading, 10_000)) == []
        os.close(reading)
        os.close(writing)
        assert asyncio.run(runtime.run(ECHO, 1)).output == 1
