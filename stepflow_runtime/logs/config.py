"""LogConfig: what the server logs, and where its lines go.

Contract: a value that cannot work is refused when the configuration is made, with the
field's name. Nothing is opened or looked at here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import urlsplit

from ..private import PRIVATE
from .entry import LEVELS, LogEntry

__all__ = ["LogConfig", "checked_level", "tells_ends_of_runs"]

FORMATS: Final = ("json", "text")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How the server's log lines are made and where they go.

    With ``capture`` every line becomes a :class:`~stepflow_runtime.LogEntry`: the newest
    are kept for :meth:`~stepflow_runtime.StepflowRuntime.get_recent_logs`, those who
    follow :meth:`~stepflow_runtime.StepflowRuntime.logs` get it, it is a record of the
    Python logger and a line of the file. Without, the lines go as they are into the file,
    or, if there is none, to the standard error of this process.

    :ivar level: the least severe level that the server logs: ``"trace"``, ``"debug"``,
        ``"info"``, ``"warn"`` or ``"error"``
    :ivar format: how lines are written to the file or to standard error: ``"json"`` or
        ``"text"``
    :ivar capture: False makes no records, and hands the lines on as they are. The newest
        are kept all the same, for error messages and :meth:`get_recent_logs`; those of the
        format ``"text"`` undecoded
    :ivar python_logger: the name of the Python logger, or None for no logger
    :ivar file_path: the file that the lines are appended to, or None. Its directory has to
        exist. It is opened anew when it was moved away (rotated)
    :ivar file_mode: who may read a new one, and those that take its place when it was
        rotated, as ``chmod`` has it, but for what the umask takes: nobody else. One that
        exists keeps its mode
    :ivar otlp_endpoint: the address of an OpenTelemetry collector, ``http://host:port``,
        that the server sends its log records to (gRPC, compressed with zstd), in the place
        of its standard output; what is still printed takes the other ways. Of modules that
        are not Stepflow's own, levels below ``"info"`` are not sent
    :ivar otlp_traces: send spans to ``otlp_endpoint``, too. A stop takes a second longer
    :ivar otlp_metrics: send metrics to ``otlp_endpoint``, too, every 10 s
    :ivar keep: how many of the newest entries are kept, as long as they are not over 1 KiB
        each on average, or 32 MiB together if that is more
    :ivar redact: called with each entry before anything else sees it, in threads of ours,
        one call at a time; returns the entry, another one in its place
        (``msgspec.structs.replace``), or None to leave it out. If it raises, what the
        entry said is withheld. A traceback of which it changes the message is not found
        for ``FlowError.logs``
    :raises ValueError: naming the field, if a value is not one of these
    :raises TypeError: naming the field, if a value is of the wrong kind
    """

    level: str = "info"
    format: Literal["json", "text"] = "json"
    capture: bool = True
    python_logger: str | None = "stepflow.server"
    file_path: str | os.PathLike[str] | None = None
    file_mode: int = PRIVATE
    otlp_endpoint: str | None = None
    otlp_traces: bool = False
    otlp_metrics: bool = False
    keep: int = 2000
    redact: Callable[[LogEntry], LogEntry | None] | None = field(
        default=None, repr=False
    )

    def __post_init__(self) -> None:
        _check_one_of("level", self.level, LEVELS)
        _check_one_of("format", self.format, FORMATS)
        for name in ("capture", "otlp_traces", "otlp_metrics"):
            _check_kind(name, getattr(self, name), bool, "True or False")
        if self.python_logger is not None:
            _check_kind(
                "python_logger", self.python_logger, str, "the name of a logger or None"
            )
        if self.file_path is not None:
            _check_kind(
                "file_path", self.file_path, (str, os.PathLike), "a path or None"
            )
            if not (path := os.fspath(self.file_path)) or "\0" in path:
                raise ValueError(f"log_config.file_path: {path!r} is not a path")
        _check_kind("file_mode", self.file_mode, int, "a number like 0o640")
        if self.file_mode & ~0o777 or not self.file_mode & 0o200:
            raise ValueError(
                "log_config.file_mode must let the owner write, and be of rights alone, "
                f"like 0o640, not {self.file_mode:#o}"
            )
        self._check_otlp()
        _check_kind("keep", self.keep, int, "a whole number")
        if self.keep < 1 or self.keep is True:
            raise ValueError(
                f"log_config.keep must be a whole number from 1 on, not {self.keep!r}"
            )
        if self.redact is not None and not callable(self.redact):
            raise TypeError(
                f"log_config.redact must be a function or None, not {self.redact!r}"
            )
        if self.redact is not None and not self.capture:
            raise ValueError(
                "log_config.redact needs capture=True: without it, lines go as they are"
            )
        if self.redact is not None and self.otlp_endpoint is not None:
            raise ValueError(
                "log_config.redact cannot reach what the server itself sends to "
                "log_config.otlp_endpoint; let the collector redact it"
            )

    def _check_otlp(self) -> None:
        if self.otlp_endpoint is None:
            for name in ("otlp_traces", "otlp_metrics"):
                if getattr(self, name):
                    raise ValueError(
                        f"log_config.{name} needs log_config.otlp_endpoint"
                    )
            return
        _check_kind("otlp_endpoint", self.otlp_endpoint, str, "an address or None")
        # The address itself is not shown before it is known to hold no password.
        try:
            parts = urlsplit(self.otlp_endpoint)
            is_good = (
                bool(parts.hostname and parts.port) and self.otlp_endpoint.isascii()
            )
        except ValueError:
            is_good = False
        if is_good and "@" in parts.netloc:
            raise ValueError(
                "log_config.otlp_endpoint cannot have a user name or password: they would "
                "be sent in clear. Set OTEL_EXPORTER_OTLP_HEADERS in env= instead"
            )
        if is_good and set("?#") & set(self.otlp_endpoint):
            raise ValueError(
                "log_config.otlp_endpoint cannot have a query (?) or a fragment (#): it is "
                "shown to everybody who lists processes. Set OTEL_EXPORTER_OTLP_HEADERS in "
                "env= instead"
            )
        if is_good and parts.scheme == "https":
            raise ValueError(
                "log_config.otlp_endpoint must begin with http://: the server has no TLS "
                "for this, and would send everything in clear to an https address. Let a "
                "collector on this machine send it on"
            )
        if not is_good or parts.scheme != "http":
            raise ValueError(
                "log_config.otlp_endpoint must be the address of a collector with its "
                "port, like http://localhost:4317"
            )


def tells_ends_of_runs(config: LogConfig) -> bool:
    """True if the end of each run is a line that we get to see, and can read."""
    is_logged = LEVELS.index(config.level) <= LEVELS.index("info")
    is_readable = config.capture or config.format == "json"
    return is_logged and is_readable and config.otlp_endpoint is None


def checked_level(name: str, level: str | None) -> str:
    """A level as entries have it (``"WARN"``); the least severe one for None.

    :raises ValueError: naming the argument, if there is no such level
    """
    if level is None:
        return LEVELS[0].upper()
    if not isinstance(level, str) or level.lower() not in LEVELS:
        raise ValueError(f"{name} must be one of {', '.join(LEVELS)}, not {level!r}")
    return level.upper()


def _check_one_of(name: str, value: object, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(
            f"log_config.{name} must be one of {', '.join(values)}, not {value!r}"
        )


def _check_kind(
    name: str, value: object, kind: type | tuple[type, ...], wanted: str
) -> None:
    if not isinstance(value, kind):
        # Not the value: it may be an address with a password.
        given = type(value).__name__
        raise TypeError(f"log_config.{name} must be {wanted}, not {given}")
