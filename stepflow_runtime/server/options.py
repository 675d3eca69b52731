"""ServerOptions: all that ``StepflowRuntime.start`` takes, checked, and what follows.

Contract: a value that cannot work is refused when the options are made, with the
option's name, before anything is started. What the options mean for the process
(arguments, environment, standard input) is computed here, without I/O.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict, get_args

from ..bounded import read_file
from ..errors import ServerStartError
from ..logs.config import LogConfig
from ..private import check_unplanted
from .port import HeldPort
from .restart import RestartPolicy
from .secrecy import Secrets
from .storage import Keeping, Storage, check_lease, merged

if TYPE_CHECKING:
    from .recycling import Limits

__all__ = ["Command", "Exposure", "ServerOptions", "StartOptions", "check_seconds"]

Exposure = Literal["loopback", "any", "require-loopback"]

DEFAULT_CONFIG: Final[Mapping[str, Any]] = {
    "plugins": {"builtin": {"type": "builtin"}},
    "routes": {"/builtin": [{"plugin": "builtin"}], "/": [{"plugin": "builtin"}]},
}

# What a pipe can hold, by the kernel's default limit.
MAX_CONFIG: Final = 1024 * 1024

_FOREVER: Final = 100 * 365 * 24 * 3600

_PREFIX: Final = "STEPFLOW_"
_DEFAULT_LOG_CONFIG: Final = LogConfig()

# Levels at which the libraries that send log records log each sending, which is sent
# again: 30,000 records a second at trace, from a server that does nothing.
_CHATTY: Final = ("trace", "debug")

# What programs need to find others, their files and their language, wherever they come
# from. SYSTEMROOT and those after it are of Windows, where no socket opens without it.
_MINIMAL: Final = frozenset(
    {
        *("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"),
        *("SYSTEMROOT", "SYSTEMDRIVE", "COMSPEC", "PATHEXT", "TEMP", "TMP"),
        *("USERPROFILE", "APPDATA", "LOCALAPPDATA"),
    }
)

_LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost", "::1")
_PROXY_VARIABLES: Final = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


@dataclass(frozen=True)
class Command:
    """What to spawn.

    :ivar argv: the arguments, without the binary
    :ivar env: the whole environment
    :ivar stdin: what the server reads from its standard input, or None for nothing
    :ivar keep_fds: descriptors that it is to inherit
    :ivar directory: its working directory; None: this process's own
    :ivar port: the port that it is told to take, if that is known
    :ivar exposure: who may reach that
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    stdin: bytes | None = field(repr=False)
    keep_fds: tuple[int, ...] = ()
    directory: str | None = None
    port: HeldPort = field(default_factory=HeldPort, repr=False)
    exposure: Exposure = "any"


class StartOptions(TypedDict, total=False):
    """The keyword options of :meth:`StepflowRuntime.start`, for those that pass them on."""

    port: int | None
    exposure: Exposure
    env: Mapping[str, str | None] | None
    inherit_env: bool
    log_config: LogConfig | None
    restart_policy: RestartPolicy
    max_restarts: int
    startup_timeout: float
    shutdown_timeout: float
    health_interval: float
    health_timeout: float
    max_health_failures: int
    recycle_after_runs: int | None
    recycle_above_memory: int | None
    storage: str | os.PathLike[str] | None
    lease: Sequence[str] | None
    orchestrator_id: str | None
    on_crash: Callable[[int], Any] | None
    handle_signals: bool
    binary: str | os.PathLike[str] | None


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The options of one runtime; see :meth:`StepflowRuntime.start` for their meaning.

    :raises ValueError: naming the option, if a value cannot work
    :raises TypeError: naming the option, if it is of the wrong kind
    """

    # Values of the configuration and of the environment can be secrets: never in a repr.
    config_path: str | os.PathLike[str] | Mapping[str, Any] | None = field(
        default=None, repr=False
    )
    port: int | None = None
    exposure: Exposure = "loopback"
    env: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    inherit_env: bool = True
    log_config: LogConfig = field(default_factory=LogConfig)
    restart_policy: RestartPolicy = RestartPolicy.NEVER
    max_restarts: int = 3
    startup_timeout: float = 30.0
    shutdown_timeout: float = 5.0
    health_interval: float = 5.0
    health_timeout: float = 5.0
    max_health_failures: int = 3
    recycle_after_runs: int | None = None
    recycle_above_memory: int | None = None
    # A database's URL can hold a password.
    storage: str | os.PathLike[str] | None = field(default=None, repr=False)
    lease: Sequence[str] | None = field(default=None, repr=False)
    orchestrator_id: str | None = None
    on_crash: Callable[[int], Any] | None = None
    handle_signals: bool = True
    binary: str | os.PathLike[str] | None = None
    _config_stdin: bytes | None = field(init=False, repr=False, default=None)

    @classmethod
    def of(
        cls,
        config_path: str | os.PathLike[str] | Mapping[str, Any] | None,
        options: StartOptions,
    ) -> Self:
        """The options as ``start`` takes them, where None can stand for the default."""
        given: dict[str, Any] = {**options}
        for name in ("env", "log_config"):
            if given.get(name) is None:
                given.pop(name, None)
        return cls(config_path=config_path, **given)

    def __post_init__(self) -> None:
        self._check_storage()
        self._check_config()
        if self.port is not None:
            _check_whole("port", self.port, 0, 65535)
        _check_choice("exposure", self.exposure, get_args(Exposure))
        _check_env(self.env)
        _check_kind("inherit_env", self.inherit_env, bool)
        _check_kind("log_config", self.log_config, LogConfig)
        _check_kind("restart_policy", self.restart_policy, RestartPolicy)
        _check_whole("max_restarts", self.max_restarts, 0)
        check_seconds("startup_timeout", self.startup_timeout)
        check_seconds("shutdown_timeout", self.shutdown_timeout)
        check_seconds("health_interval", self.health_interval)
        check_seconds("health_timeout", self.health_timeout)
        _check_whole("max_health_failures", self.max_health_failures, 1)
        if self.recycle_after_runs is not None:
            _check_whole("recycle_after_runs", self.recycle_after_runs, 1)
        if self.recycle_above_memory is not None:
            _check_whole("recycle_above_memory", self.recycle_above_memory, 1)
        if self.orchestrator_id is not None:
            _check_id("orchestrator_id", self.orchestrator_id)
        if self.on_crash is not None and not callable(self.on_crash):
            raise TypeError(
                f"on_crash must be a function or None, not {self.on_crash!r}"
            )
        _check_kind("handle_signals", self.handle_signals, bool)
        if self.binary is not None:
            _check_kind("binary", self.binary, (str, os.PathLike))

    def anchored(self) -> Self:
        """A copy in which paths are absolute, and the configuration is whole. Blocks.

        The server takes the configuration file's directory as written for its workers'
        working directory, and fails to spawn them in "". A file that a store is to be
        merged into is read here, and handed over by standard input.

        :raises OSError: if this process's own working directory is gone
        :raises ServerStartError: if the store cannot be merged into that file
        """
        options = self
        if self.storage is not None and self._given_storage().path is not None:
            options = replace(options, storage=self._followed(self.storage))
        if self.config_path is None or isinstance(self.config_path, Mapping):
            return options
        options = replace(options, config_path=Path(self.config_path).absolute())
        if self.storage is not None or self.lease is not None:
            options._merge_into_file()
        return options

    def command(
        self, inherited: Mapping[str, str], *, port: int, orchestrator_id: str
    ) -> Command:
        """What to spawn, given the environment of this process.

        :param port: 0 lets the server choose
        """
        return Command(
            argv=self._argv(port, orchestrator_id),
            env=self._environment(inherited),
            stdin=None if self._is_set("CONFIG") else self._config_stdin,
            exposure=self.exposure,
        )

    def wanted_port(self) -> int | None:
        """The port that the server is to have; 0 for any. None: only it knows."""
        if (given := self._given("PORT")) is None:
            return self.port or 0
        try:
            port = int(given)
        except ValueError:
            return None  # it will say that this is no port
        return port if 0 <= port <= 65535 else None

    @property
    def is_whole(self) -> bool:
        """True if no file has to be read to know the configuration."""
        return self._config_stdin is not None or self._is_set("CONFIG")

    def keeping(self) -> Keeping:
        """What becomes of runs when the server ends. Blocks: it may read a file."""
        if self._is_set("CONFIG"):
            return Keeping()
        if self._config_stdin is not None:
            return Keeping.of(json.loads(self._config_stdin))
        try:
            return Keeping.of(self._file())
        except ServerStartError:  # the server will say what is wrong with it
            return Keeping()

    def owner(self) -> str | None:
        """The server's id, as far as the user has chosen it."""
        given = self._given("ORCHESTRATOR_ID")
        return self.orchestrator_id if given is None else given

    def secrets(self) -> Secrets:
        """What of ``env=`` is to be hidden where the server, or a worker, prints it."""
        return Secrets.of(self.env)

    def describe_storage(self) -> str:
        """Where runs are kept, for messages: without the credentials of a URL."""
        if self.storage is None:
            return "the store that its configuration names"
        if (path := self._given_storage().path) is not None:
            return str(path)
        return "the database of storage="

    def limits(self) -> Limits | None:
        """When the server is to be recycled; None if it never is."""
        if self.recycle_after_runs is self.recycle_above_memory is None:
            return None
        from .recycling import Limits  # most programs do without

        return Limits(runs=self.recycle_after_runs, memory=self.recycle_above_memory)

    def describe_config(self) -> str:
        """Where the configuration comes from, for messages."""
        if self._is_set("CONFIG"):
            return "the configuration file named by STEPFLOW_CONFIG in env="
        if self.config_path is None:
            return "the built-in configuration"
        if isinstance(self.config_path, Mapping):
            return "the configuration given as a mapping"
        return f"the configuration file {self.config_path}"

    def describe_logs(self) -> str:
        """Where else the server's words went, for messages."""
        if self.log_config.otlp_endpoint is None or self._is_set("LOG_DESTINATION"):
            return ""
        return "\nIts log is sent to the collector of log_config.otlp_endpoint."

    def _argv(self, port: int, orchestrator_id: str) -> tuple[str, ...]:
        flags = {
            "PORT": ("--port", str(port)),
            "ORCHESTRATOR_ID": ("--orchestrator-id", orchestrator_id),
            **self._log_flags(),
            "CONFIG": self._config_flags(),
        }
        # A variable that the user set for the server by name has the say there. The port
        # that it tells is the one that we pass on: see wanted_port().
        return tuple(
            word
            for name, words in flags.items()
            if not self._is_set(name) or (name == "PORT" and port)
            for word in words
        )

    def _log_flags(self) -> dict[str, tuple[str, ...]]:
        log = self.log_config
        flags: dict[str, tuple[str, ...]] = {
            "LOG_LEVEL": ("--log-level", log.level),
            "LOG_DESTINATION": ("--log-destination", "stdout"),
            # Entries are made of JSON; lines that are not captured go as they are.
            "LOG_FORMAT": ("--log-format", "json" if log.capture else log.format),
        }
        if log.otlp_endpoint is None:
            return flags
        flags["LOG_DESTINATION"] = ("--log-destination", "otlp")
        flags["OTLP_ENDPOINT"] = ("--otlp-endpoint", log.otlp_endpoint)
        if log.otlp_traces:
            flags["TRACE_ENABLED"] = ("--trace-enabled",)
        if log.otlp_metrics:
            flags["METRICS_ENABLED"] = ("--metrics-enabled",)
        if log.level in _CHATTY:
            flags["OTHER_LOG_LEVEL"] = ("--other-log-level", "info")
        return flags

    def _config_flags(self) -> tuple[str, ...]:
        if self._config_stdin is not None:
            return ("--config-stdin",)
        return ("--config", str(self.config_path))

    def _is_set(self, name: str) -> bool:
        return self._given(name) is not None

    def _given(self, name: str) -> str | None:
        """A flag's variable, if ``env=`` sets it and no option says otherwise."""
        return None if name in self._chosen() else self.env.get(_PREFIX + name)

    def _chosen(self) -> set[str]:
        """The flags whose options are not at their defaults.

        Not the destination of the logs, which has no option of its own: so a variable can
        keep them out of an ``otlp_endpoint`` that is given for traces or metrics.
        """
        log, default = self.log_config, _DEFAULT_LOG_CONFIG
        chosen = {
            "PORT": self.port is not None,
            "CONFIG": self.config_path is not None,
            "ORCHESTRATOR_ID": self.orchestrator_id is not None,
            "LOG_LEVEL": log.level != default.level,
            "LOG_FORMAT": log.capture or log.format != default.format,
            "OTLP_ENDPOINT": log.otlp_endpoint is not None,
            "TRACE_ENABLED": log.otlp_traces,
            "METRICS_ENABLED": log.otlp_metrics,
        }
        return {name for name, is_chosen in chosen.items() if is_chosen}

    def _environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        env = {
            name: value
            for name, value in inherited.items()
            if self._is_handed_down(name)
        }
        _except_loopback_from_proxies(env)
        given = {_same(name) for name in self.env}
        env = {name: value for name, value in env.items() if _same(name) not in given}
        env.update(
            (name, value) for name, value in self.env.items() if value is not None
        )
        return env

    def _is_handed_down(self, name: str) -> bool:
        if not self.inherit_env:
            return _same(name) in _MINIMAL
        # Every flag of the server also reads STEPFLOW_<FLAG>, and workers read more of
        # them: what stands there by accident must not steer this server.
        return not name.upper().startswith(_PREFIX)

    def _check_storage(self) -> None:
        if self.storage is not None:
            self._given_storage()
        if self.lease is not None:
            check_lease(self.lease)
        if (self.storage, self.lease) != (None, None) and self._is_set("CONFIG"):
            name = "lease" if self.storage is None else "storage"
            raise ValueError(
                f"{name} cannot be merged into the configuration that STEPFLOW_CONFIG in "
                "env= names: give that as config_path"
            )

    def _given_storage(self) -> Storage:
        return Storage.of(self.storage)

    def _followed(self, storage: str | os.PathLike[str]) -> Path:
        try:
            check_unplanted(storage)
        except PermissionError as exc:
            raise ServerStartError(f"storage: {storage} cannot be used: {exc}") from exc
        return Path(os.path.realpath(storage))

    def _check_config(self) -> None:
        config = DEFAULT_CONFIG if self.config_path is None else self.config_path
        if isinstance(config, Mapping):
            self._hand_over("config_path: this mapping", self._merged(config))
        elif not isinstance(config, str | os.PathLike):
            raise TypeError(
                "config_path must be the path of a configuration file, a mapping or None, "
                f"not {type(config).__name__}"
            )

    def _merged(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.storage is None and self.lease is None:
            return dict(config)
        storage = None if self.storage is None else self._given_storage()
        return merged(config, storage, self.lease)

    def _merge_into_file(self) -> None:
        path = self.config_path
        assert isinstance(path, Path)
        config = {"workingDirectory": str(path.parent), **self._file()}
        try:
            self._hand_over(f"{path}: it", self._merged(config))
        except ValueError as exc:
            raise ServerStartError(f"{exc}\nThe configuration is {path}.") from exc

    def _file(self) -> dict[str, Any]:
        """What the configuration file says, as the server reads it."""
        from .. import core_yaml  # PyYAML takes some milliseconds to come

        path = self.config_path
        assert isinstance(path, str | os.PathLike)
        try:
            config = core_yaml.parse(read_file(path))
        except (OSError, core_yaml.YamlSyntaxError) as exc:
            raise ServerStartError(
                f"the configuration file {path} cannot be read: {exc}"
            ) from exc
        if not isinstance(config, dict):
            raise ServerStartError(
                f"the configuration file {path} holds no mapping, but "
                f"{type(config).__name__}"
            )
        return config

    def _hand_over(self, what: str, config: Mapping[str, Any]) -> None:
        """Have the server read it from its standard input."""
        try:
            encoded = json.dumps(config, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as exc:
            raise ValueError(f"{what} cannot be written as JSON: {exc}") from exc
        if len(encoded) > MAX_CONFIG:
            raise ValueError(
                f"{what} takes {len(encoded)} bytes as JSON, and at most {MAX_CONFIG} can "
                "be handed over; put it into a file"
            )
        object.__setattr__(self, "_config_stdin", encoded)


def _same(name: str) -> str:
    """What is equal for two names of one variable: Windows takes no notice of case."""
    return name.upper() if os.name == "nt" else name


def _except_loopback_from_proxies(env: dict[str, str]) -> None:
    """Keep the workers' calls to our server from going through a proxy.

    gRPC reads the proxy variables, and sends even calls to 127.0.0.1 to the proxy.
    """
    if not any(name in env or name.upper() in env for name in _PROXY_VARIABLES):
        return
    exceptions = env.get("no_proxy") or env.get("NO_PROXY") or ""
    hosts = [host.strip() for host in exceptions.split(",") if host.strip()]
    hosts += [host for host in _LOOPBACK_HOSTS if host not in hosts]
    env["no_proxy"] = env["NO_PROXY"] = ",".join(hosts)


def _check_env(env: object) -> None:
    if not isinstance(env, Mapping):
        raise TypeError(f"env must be a mapping of strings, not {type(env).__name__}")
    for name, value in env.items():
        if not (isinstance(name, str) and isinstance(value, str | None)):
            raise TypeError(
                f"env must map strings to strings, or to None; {name!r} does not"
            )
        if not name or "=" in name or "\0" in name or "\0" in (value or ""):
            # The value is not shown: it may be a secret.
            raise ValueError(f"env: {name!r} cannot be set in an environment")
        try:
            os.fsencode(name + (value or ""))
        except UnicodeEncodeError:
            raise ValueError(f"env: {name!a} is not valid Unicode") from None


def _check_id(name: str, value: object) -> None:
    _check_kind(name, value, str)
    assert isinstance(value, str)
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{name} must be a name that can be printed, not {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {wanted}, not {value!r}")


def _check_kind(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(each.__name__ for each in kinds)
        raise TypeError(f"{name} must be of type {wanted}, not {type(value).__name__}")


def _check_whole(name: str, value: object, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if not least <= value <= most:
        upto = f"from {least} to {most}" if most < math.inf else f"{least} or more"
        raise ValueError(f"{name} must be {upto}, not {value}")


def check_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if value != math.inf and not 0 < value < _FOREVER:
        raise ValueError(
            f"{name} must be more than 0 seconds and less than a century, or infinite"
        )
