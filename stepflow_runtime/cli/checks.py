"""What ``doctor`` looks at, one check after the other.

Contract: a check that fails, or takes too long, is a finding, and the next one follows; all
of them together take a minute at most. Nothing is left behind. No store is touched: a flow
is run in memory, whatever the configuration says. A binary that is not the one that was
installed is not executed.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final, Self

import anyio
import msgspec

from .. import __version__, core_yaml
from ..errors import BinaryNotFoundError, ServerStartError, StepflowError
from ..executor import FlowResult
from ..logs.config import LogConfig
from ..runtime import StepflowRuntime
from ..server.binary import VARIABLE, find_binary
from ..server.options import Command, ServerOptions
from ..server.process import ServerProcess
from ..server.provenance import DISTRIBUTION, Provenance, Verdict, examine
from ..server.storage import Keeping
from ..threads import run_abandonable
from .report import Finding, State

__all__ = ["Case", "check_all"]

_ALL_TOGETHER: Final = 60.0
_USUALLY: Final = 10.0

# Of the flow that is run to see whether one can be.
_START: Final = 20.0
_RUN: Final = 10.0
_HELLO: Final = _START + _RUN + 10.0

# A binary that is none of ours may have much to say.
_MOST_SAID: Final = 4096
_PATIENCE: Final = 5.0

# A runtime has some dozen open at a time; what a program has beside them is its own.
_FEW_DESCRIPTORS: Final = 256

_OURS: Final = "stepflow-runtime"
_ALSO: Final = ("stepflow-py", "uvloop")
_REQUIREMENT: Final = re.compile(r"([\w.-]+)\s*([^;]*)")
_PROXY: Final = re.compile(r"(?:http|https|all|grpc|no)_proxy", re.IGNORECASE)

_INSTALL: Final = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
_GREETING: Final = {"hello": "world"}
_LOOPBACK: Final = ("127.0.0.1", "::1")


@dataclass
class Case:
    """What is asked, and what earlier checks have found.

    :ivar config: the configuration for the hello flow
    :ivar chosen: the binary that is asked for; None: as a runtime would find it
    :ivar binary: the one that was found; None if there is none
    :ivar is_foreign: whether another one was installed in its place
    """

    config: Path | None = None
    chosen: Path | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    binary: Path | None = None
    is_foreign: bool = False

    @property
    def handed_down(self) -> Mapping[str, str]:
        """The environment that a server gets."""
        options = ServerOptions()
        return options.command(self.environ, port=0, orchestrator_id="doctor").env


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    :ivar seconds: how long it may take
    """

    name: str
    look: Callable[[Case], Awaitable[Finding]]
    seconds: float = _USUALLY


async def check_all(case: Case, tell: Callable[[Finding], None]) -> None:
    """Make all checks, and tell each finding when it is there."""
    deadline = anyio.current_time() + _ALL_TOGETHER
    for check in CHECKS:
        finding = await _made(check, case, deadline)
        tell(msgspec.structs.replace(finding, name=check.name))


async def _made(check: Check, case: Case, deadline: float) -> Finding:
    limit = min(check.seconds, deadline - anyio.current_time())
    try:
        with anyio.move_on_after(limit):
            return await check.look(case)
    except Exception as exc:  # noqa: BLE001 - told, so that the report goes on
        failure = f"the check itself failed: {type(exc).__name__}: {exc}"
        return _problem(failure, "report it, with this text")
    return _problem(f"no answer within {max(limit, 0):.0f} s")


def _ok(what: str, **details: Any) -> Finding:
    return Finding(name="", state=State.OK, what=what, details=details)


def _warning(what: str, advice: str = "", **details: Any) -> Finding:
    return Finding(
        name="", state=State.WARNING, what=what, advice=advice, details=details
    )


def _problem(what: str, advice: str = "", **details: Any) -> Finding:
    return Finding(
        name="", state=State.PROBLEM, what=what, advice=advice, details=details
    )


# -- Python and its packages -----------------------------------------------------------


def _python(case: Case) -> Finding:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    libc = " ".join(filter(None, platform.libc_ver()))
    what = f"{python}, {system}{libc and f', {libc}'}"
    details = {"python": python, "system": system, "libc": libc}
    match sys.platform:
        case "linux":
            return _ok(what, **details)
        case "darwin" | "win32":
            return _warning(what, "this system is supported, but not tested", **details)
        case _:
            return _problem(what, "servers run on Linux, macOS and Windows", **details)


def _packages(case: Case) -> Finding:
    ranges = _ranges()
    versions = {_OURS: __version__}
    versions |= {name: _version(name) for name in (*ranges, *_ALSO) if _version(name)}
    what = ", ".join(f"{name} {each}" for name, each in versions.items())
    lines = [f"{name} is not installed" for name in _needed() if name not in versions]
    lines += [
        f"{name} {versions[name]} is not {wanted}"
        for name, wanted in ranges.items()
        if name in versions and not is_within(versions[name], wanted)
    ]
    if lines:
        what = "\n".join([what, *lines])
        return _problem(what, f"pip install --upgrade {_OURS}", **versions)
    return _ok(what, **versions)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _requirements() -> list[str]:
    with suppress(PackageNotFoundError):  # used from its sources
        return requires(_OURS) or []
    return []


def _needed() -> list[str]:
    return [
        match[1]
        for each in _requirements()
        if ";" not in each and (match := _REQUIREMENT.match(each)) is not None
    ]


def _ranges() -> dict[str, str]:
    """What we and our extras for users need, by name."""
    return {
        match[1]: match[2].strip()
        for each in _requirements()
        if ("extra ==" not in each or re.search(r"extra == .(?:trio|cli)\b", each))
        and (match := _REQUIREMENT.match(each)) is not None
    }


def is_within(release: str, wanted: str) -> bool:
    """Whether a version is in a range that is made of ``>=`` and ``<``."""
    for part in wanted.split(","):
        bound = part.strip()
        if bound.startswith(">=") and _numbers(release) < _numbers(bound[2:]):
            return False
        if re.match(r"<[^=]", bound) and _numbers(release) >= _numbers(bound[1:]):
            return False
    return True


def _numbers(release: str) -> list[int]:
    match = re.match(r"\s*(\d+(?:\.\d+)*)", release)
    numbers = [int(each) for each in match[1].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


# -- the binary ------------------------------------------------------------------------


def _binary(case: Case) -> Finding:
    try:
        case.binary = find_binary(case.chosen, case.environ)
    except BinaryNotFoundError as exc:
        return _problem(str(exc))
    return _ok(f"{case.binary} ({_origin(case)})", path=str(case.binary))


def _origin(case: Case) -> str:
    if case.chosen is not None:
        return "given by --binary"
    if case.environ.get(VARIABLE):
        return f"named by {VARIABLE}"
    return f"in the package {DISTRIBUTION}"


def _provenance(case: Case) -> Finding:
    if case.binary is None:
        return _warning("not tried: there is no binary")
    is_chosen = case.chosen is not None or bool(case.environ.get(VARIABLE))
    found = examine(case.binary, chosen=is_chosen)
    case.is_foreign = found.verdict is Verdict.DIFFERS
    what = f"{found.reason}{_described(found)}"
    details: dict[str, Any] = {
        "verdict": found.verdict.value,
        "writers": list(found.writers),
    }
    if found.found is not None:
        details |= {"sha256": found.found.sha256, "size": found.found.size}
    match found.verdict:
        case Verdict.DIFFERS:
            advice = f"do not run it; find out who changed it, and {_INSTALL}"
            return _problem(what, advice, **details)
        case Verdict.DAMAGED_RECORD | Verdict.UNREADABLE:
            return _problem(what, _INSTALL, **details)
        case Verdict.MATCHES if not found.writers:
            return _ok(what, **details)
        case Verdict.MATCHES:
            advice = "see to it that only you, or root, can replace what you run"
            return _warning(what, advice, **details)
        case Verdict.UNRECORDED:
            return _warning(
                what, f"to have one that can be checked: {_INSTALL}", **details
            )
        case Verdict.ELSEWHERE:
            advice = "compare the hash with what its makers publish"
            return _warning(what, advice, **details)


def _described(found: Provenance) -> str:
    lines = [f"it is a link to {found.target}"] if found.target else []
    if found.found is not None:
        lines.append(f"sha256 {found.found.sha256}, {found.found.size} bytes")
    if found.verdict is Verdict.DIFFERS and found.recorded and found.recorded.sha256:
        lines.append(f"RECORD: sha256 {found.recorded.sha256}")
    lines += found.writers
    return "".join(f"\n{each}" for each in lines)


def _not_to_execute(case: Case) -> Finding | None:
    if case.binary is None:
        return _warning("not tried: there is no binary")
    if case.is_foreign:
        return _warning("not tried: the binary is not the one that was installed")
    return None


async def _answers(case: Case) -> Finding:
    """Whether it can be executed at all, apart from ports and configurations."""
    if (untried := _not_to_execute(case)) is not None:
        return untried
    assert case.binary is not None
    try:
        code, said = await _asked(case.binary, case.handed_down)
    except ServerStartError as exc:
        return _problem(str(exc))
    if code == 0:
        return _ok(said, version=said)
    if code == 2 and "--version" in said:  # 0.13 does not know that flag, and says so
        return _ok(f"it can be executed; it tells no version ({said})")
    ended = "does not end" if code is None else f"ended with {code}"
    return _problem(f"asked for --version, it {ended}: {said or 'it said nothing'}")


async def _asked(binary: Path, env: Mapping[str, str]) -> tuple[int | None, str]:
    """Its exit code, None if it did not end, and the first line of what it said."""
    command = Command(argv=("--version",), env=env, stdin=None)
    process = await ServerProcess.spawn(binary, command)
    code, has_ended = None, False
    try:
        said = await run_abandonable(_first_words, process)
        with anyio.move_on_after(_PATIENCE):
            await process.wait_exit()
            has_ended = True
    finally:
        code = await process.end(lambda: 0.0)
        process.close()
    line = said.decode(errors="replace").strip().partition("\n")[0]
    return code if has_ended else None, line[:200]


def _first_words(process: ServerProcess) -> bytes:
    """What it says on both of its outputs, up to a limit of bytes and of seconds."""
    said = b""
    until = time.monotonic() + _PATIENCE
    for pipe in (process.stdout, process.stderr):
        while len(said) < _MOST_SAID:
            more = pipe.read(max(until - time.monotonic(), 0))
            if not more:
                break
            said += more
    return said


# -- the environment -------------------------------------------------------------------


def _environment(case: Case) -> Finding:
    """Names alone: a value can be a secret."""
    left_out = set(case.environ) - set(case.handed_down) - {VARIABLE}
    if not left_out:
        return _ok("no stray STEPFLOW_ variables")
    names = ", ".join(sorted(left_out))
    advice = "servers do not inherit them: give env= what is meant for the server"
    return _warning(f"set, and without effect: {names}", advice, names=sorted(left_out))


def _proxies(case: Case) -> Finding:
    names = sorted(filter(_PROXY.fullmatch, case.environ))
    if all(name.lower() == "no_proxy" for name in names):
        return _ok("no proxies are set")
    own = case.environ.get("no_proxy") or case.environ.get("NO_PROXY") or ""
    if any(host in own for host in ("127.0.0.1", "localhost", "*")):
        how = "loopback is excepted"
    else:
        how = "loopback is not excepted, but servers and their workers get it so"
    return _ok(f"{', '.join(names)}; {how}", names=names)


def _kernel(case: Case) -> Finding:
    if sys.platform != "linux":
        return _ok(f"nothing that we ask for on {sys.platform}")
    lacking = []
    if not _has_pidfd():
        lacking.append("pidfd")
    if not os.access(f"/proc/{os.getpid()}/stat", os.R_OK):
        lacking.append("/proc")
    if lacking:
        advice = "without it, what servers leave behind is found less surely"
        return _warning(f"lacking: {', '.join(lacking)}", advice, lacking=lacking)
    return _ok("pidfd, /proc")


def _has_pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _loopback(case: Case) -> Finding:
    """A port as the server takes one, and a connection to it."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(_PATIENCE)
            address = listener.getsockname()
            with socket.create_connection(address, _PATIENCE):
                listener.accept()[0].close()
    except OSError as exc:
        advice = "a sandbox or a firewall may forbid it"
        return _problem(f"no connection to 127.0.0.1: {exc}", advice)
    return _ok("a port on 127.0.0.1 can be had, and connected to")


def _descriptors(case: Case) -> Finding:
    if sys.platform == "win32":
        return _ok("no limit on Windows")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _ok("open files: unlimited")
    what = f"open files: {soft} at most"
    if soft < _FEW_DESCRIPTORS:
        return _warning(what, "ulimit -n: let it be 1024 or more", soft=soft, hard=hard)
    return _ok(what, soft=soft, hard=hard)


# -- a flow ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """What the hello flow is run with.

    :ivar config: as a runtime takes it
    :ivar noop: where the component is that returns its input; None if it is nowhere
    :ivar note: what there is to say of that
    """

    config: Any = None
    noop: str | None = "/noop"
    note: str = ""

    @classmethod
    def of(cls, path: Path | None) -> Self:
        """Read a configuration file.

        A store of the user's is left alone: a server would go on with the runs in it.

        :raises OSError: if the file cannot be read
        :raises core_yaml.YamlSyntaxError: if it is no YAML
        """
        if path is None:
            return cls()
        config = core_yaml.parse(path.read_bytes())
        if not isinstance(config, dict):
            return cls(path)  # the server says what is wrong
        noop = find_noop(config)
        if not Keeping.of(config).may_outlive:
            return cls(path, noop)
        config = {"workingDirectory": str(path.absolute().parent), **config}
        for name in ("leaseManager", "recovery"):
            config.pop(name, None)
        config["storageConfig"] = {"type": "inMemory"}
        return cls(config, noop, "; in memory: its store was left alone")


def find_noop(config: Mapping[str, Any]) -> str | None:
    """Pure: the path of the built-in ``/noop``, if a route leads there for certain."""
    plugins, routes = config.get("plugins"), config.get("routes")
    if not (isinstance(plugins, Mapping) and isinstance(routes, Mapping)):
        return None
    for prefix, rules in routes.items():
        rule = rules[0] if isinstance(rules, list) and rules else None
        if isinstance(rule, Mapping) and set(rule) == {"plugin"}:
            plugin = plugins.get(rule["plugin"])
            if isinstance(plugin, Mapping) and plugin.get("type") == "builtin":
                return f"{prefix.rstrip('/')}/noop"
    return None


async def _hello(case: Case) -> Finding:
    if (untried := _not_to_execute(case)) is not None:
        return untried
    assert case.binary is not None
    try:
        setting = await run_abandonable(_Setting.of, case.config)
        return await _ran(case.binary, setting)
    except (StepflowError, OSError, core_yaml.YamlSyntaxError) as exc:
        return _problem(str(exc) or type(exc).__name__)


async def _ran(binary: Path, setting: _Setting) -> Finding:
    result, times = None, _Times()
    async with StepflowRuntime.start(
        setting.config,
        binary=binary,
        startup_timeout=_START,
        log_config=LogConfig(python_logger=None),
    ) as runtime:
        times.add("started")
        if setting.noop is not None:
            step = {"id": "a", "component": setting.noop, "input": {"$input": "$"}}
            flow = {"name": "hello", "steps": [step], "output": {"$step": "a"}}
            result = await runtime.run(flow, _GREETING, timeout=_RUN)
            times.add("ran")
        hosts = await run_abandonable(_hosts, runtime.pid) if runtime.pid else []
        times.skip()
    times.add("stopped")
    return _told(setting, times, hosts, result)


def _told(
    setting: _Setting, times: _Times, hosts: list[str], result: FlowResult | None
) -> Finding:
    listens = f"; it listened on {', '.join(hosts)}" if hosts else ""
    what = f"{times}{listens}{setting.note}"
    details = {**times.seconds, "hosts": hosts}
    if result is None:
        advice = "no flow was run: the configuration has no plain route to /noop"
        return _warning(what, advice, **details)
    if result.output != _GREETING:
        return _problem(f"{what}\n{_why(result)}", "", **details)
    if any(host not in _LOOPBACK for host in hosts):
        advice = "other machines can reach servers here, which ask for no password"
        return _warning(what, advice, **details)
    return _ok(what, **details)


def _hosts(pid: int) -> list[str]:
    """The addresses that a process listens on; none if the system does not tell."""
    import psutil

    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return []
    addresses = [
        each.laddr for each in connections if each.status == psutil.CONN_LISTEN
    ]
    return sorted({address.ip for address in addresses if address})


class _Times:
    """How long each of several things has taken, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, Any] = {}
        self._last = anyio.current_time()

    def add(self, name: str) -> None:
        now = anyio.current_time()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now

    def skip(self) -> None:
        """What has happened until now counts for nothing."""
        self._last = anyio.current_time()

    def __str__(self) -> str:
        return ", ".join(
            f"{name} in {each:.3f} s" for name, each in self.seconds.items()
        )


def _why(result: FlowResult) -> str:
    error = result.error
    if error is None:
        return f"the flow gave {result.output!r}"
    return "\n".join([f"the flow failed: {error}", *map(str, error.logs)])


def _look(function: Callable[[Case], Finding]) -> Callable[[Case], Awaitable[Finding]]:
    """One that blocks: in a thread, which is left alone when it takes too long."""

    async def look(case: Case) -> Finding:
        return await run_abandonable(function, case)

    return look


CHECKS: Final = (
    Check("python", _look(_python)),
    Check("packages", _look(_packages)),
    Check("binary", _look(_binary)),
    Check("provenance", _look(_provenance)),
    Check("answers", _answers),
    Check("environment", _look(_environment)),
    Check("proxies", _look(_proxies)),
    Check("kernel", _look(_kernel)),
    Check("loopback", _look(_loopback)),
    Check("descriptors", _look(_descriptors)),
    Check("hello flow", _hello, _HELLO),
)
