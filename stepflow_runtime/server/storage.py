"""Where a server keeps its runs: what ``storage=`` and ``lease=`` say, and configurations.

Contract: pure. Values that cannot work are refused with the option's name; a store that a
configuration names already is never overruled. URLs can hold passwords: they are in no
repr and no message.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, unquote, urlsplit

import msgspec

from .secrecy import Secrets

__all__ = ["Keeping", "Leases", "Storage", "check_lease", "merged"]

# The server's own limits are 100 at the start, and then 10 every 30 s: of 1,000 runs that
# a crash interrupted, the last would go on after three quarters of an hour.
_ALL: Final = 1_000_000

# A server that is alone recovers its runs when it starts. It must not look for orphans
# later: without leases, it takes runs that have just begun for some, and runs them twice.
_ALONE: Final = {"enabled": False, "maxStartupRecovery": _ALL}

# With leases the orphans are a neighbour's. The server counts its own runs among those
# that it may claim, so that fewer than all could be none. A server whose lease has expired
# loses its runs while they are under way: it must last longer than sqlite's wait for a
# writer that is stuck, which is 5 s.
_SHARED: Final = {
    "enabled": True,
    "maxStartupRecovery": _ALL,
    "maxClaimsPerCheck": _ALL,
    "checkIntervalSecs": 1,
    "leaseTtlSecs": 10,
}

# With less, the server's own loop panics at its start, and nothing is ever taken over: it
# renews the lease each third of it, in whole seconds.
_LEAST: Final = {"leaseTtlSecs": 3, "checkIntervalSecs": 1}

_SERVERS_TTL: Final = 30
_SERVERS_PREFIX: Final = "/stepflow/leases"

# The server takes a second connection while it holds one, where sub-runs end: as many at once as
# there are connections wait for each other, 30 s, and fail (of its own 10, with 20 runs of
# ``/map``). And connections poll for sqlite's lock, and give up after 5 s: so they share a cache,
# in which they queue. docs/durability.md has the figures.
_CONNECTIONS: Final = 100

_POSTGRES: Final = ("postgresql", "postgres")
_SQLITE: Final = "sqlite:"


@dataclass(frozen=True)
class Storage:
    """What ``storage=`` names.

    :ivar path: the file, if it is an sqlite store
    :ivar url: that of a database elsewhere
    """

    path: Path | None = None
    url: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, value: object) -> Self:
        """Take what was given.

        :raises ValueError: if it names no store
        :raises TypeError: if it is of the wrong kind
        """
        if isinstance(value, str) and "://" in value:
            return cls(url=_checked_url(value))
        if not isinstance(value, str | os.PathLike):
            raise TypeError(
                "storage must be the path of a file, the URL of a PostgreSQL database or "
                f"None, not {type(value).__name__}"
            )
        path = os.fspath(value)
        if not isinstance(path, str) or not path or "\0" in path:
            raise ValueError("storage: this is not the path of a file")
        if path == ":memory:":
            raise ValueError("storage: a store in memory is what None stands for")
        if path.startswith(_SQLITE):
            raise ValueError("storage: of an sqlite store, give the path alone")
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ValueError("storage: the path is not valid Unicode") from None
        return cls(path=Path(path))

    def config(self) -> dict[str, Any]:
        """The server's configuration of it; the path has to be absolute by then."""
        if self.path is None:
            return {"type": "postgres", "databaseUrl": self.url, "autoMigrate": True}
        # As a URL: unquoted, a % or ? in the path would lead to another file.
        url = f"sqlite:{quote(str(self.path))}?mode=rwc&cache=shared"
        return {
            "type": "sqlite",
            "databaseUrl": url,
            "maxConnections": _CONNECTIONS,
            "autoMigrate": True,
        }


def _checked_url(url: str) -> str:
    scheme = url.partition(":")[0].lower()
    if scheme not in _POSTGRES:
        raise ValueError(
            "storage: the URL of a database must begin with postgresql://; an sqlite store "
            "is given by its path"
        )
    if not url.isprintable() or " " in url:
        raise ValueError("storage: this is not a valid URL")
    return url


def check_lease(endpoints: object) -> None:
    """Check what ``lease=`` was given.

    :raises ValueError: if it cannot work
    :raises TypeError: if it is of the wrong kind
    """
    if isinstance(endpoints, str | bytes) or not isinstance(endpoints, Sequence):
        raise TypeError(
            'lease must be a list of etcd endpoints, ["http://127.0.0.1:2379"], not '
            f"{type(endpoints).__name__}"
        )
    if not endpoints:
        raise ValueError("lease: at least one etcd endpoint is needed")
    for index, endpoint in enumerate(endpoints):
        if not isinstance(endpoint, str):
            raise TypeError(
                f"lease[{index}] must be a string, not {type(endpoint).__name__}"
            )
        if not _is_endpoint(endpoint):
            raise ValueError(
                f'lease[{index}] must be a URL like "http://127.0.0.1:2379" (the server '
                "speaks with etcd without TLS)"
            )
        parts = urlsplit(endpoint)
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                f"lease[{index}]: the server sends no user or password to etcd"
            )
        if parts.query or parts.fragment:
            raise ValueError(
                f"lease[{index}]: an endpoint has neither a query (?) nor a fragment (#)"
            )


def merged(
    config: Mapping[str, Any], storage: Storage | None, lease: Sequence[str] | None
) -> dict[str, Any]:
    """A configuration, and in it the store and the leases that were asked for.

    What it says of recovery stays; what it does not say is set as it fits.

    :raises ValueError: naming the option, if it has one already
    """
    together = dict(config)
    if storage is not None:
        if config.get("storageConfig") is not None:
            raise ValueError(
                "storage: the configuration names a store already (storageConfig); leave "
                "one of the two out"
            )
        together["storageConfig"] = storage.config()
    if lease is not None:
        if config.get("leaseManager") is not None:
            raise ValueError(
                "lease: the configuration names a lease manager already (leaseManager); "
                "leave one of the two out"
            )
        if not Keeping.of(together).may_outlive:
            raise ValueError(
                "lease: there is nothing to share without storage=, or a store in the "
                "configuration: this one is in memory"
            )
        together["leaseManager"] = {"type": "etcd", "endpoints": list(lease)}
    given = config.get("recovery")
    if given is None or isinstance(given, Mapping):
        is_shared = Leases.of(together) is not None
        fitting = _SHARED if is_shared else _ALONE
        together["recovery"] = recovery = {**fitting, **(given or {})}
        if is_shared:
            _check_recovery(recovery)
    return together


def _check_recovery(recovery: Mapping[str, Any]) -> None:
    if not _claims(recovery):
        raise ValueError(
            "lease: the configuration says recovery.enabled: false, by which the server "
            "neither renews its lease nor takes anything over"
        )
    for name, least in _LEAST.items():
        value = recovery[name]
        if isinstance(value, int) and value < least:
            raise ValueError(
                f"lease: recovery.{name} in the configuration is {value}, and with less "
                f"than {least} the server takes nothing over"
            )


class Leases(msgspec.Struct, frozen=True):
    """By what servers share a store.

    :ivar endpoints: of the etcd that has the leases
    :ivar prefix: of their keys there
    :ivar ttl: for how many seconds one lasts that is not renewed
    """

    endpoints: tuple[str, ...]
    prefix: str = _SERVERS_PREFIX
    ttl: float = _SERVERS_TTL

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self | None:
        """What a configuration says; None if each server is alone."""
        leases = config.get("leaseManager")
        if not isinstance(leases, Mapping) or leases.get("type") in (None, "noOp"):
            return None
        endpoints = leases.get("endpoints")
        given = endpoints if isinstance(endpoints, list | tuple) else ()
        prefix, recovery = leases.get("key_prefix"), config.get("recovery")
        ttl = recovery.get("leaseTtlSecs") if isinstance(recovery, Mapping) else None
        return cls(
            endpoints=tuple(filter(None, map(_endpoint, given))),
            prefix=prefix if isinstance(prefix, str) else _SERVERS_PREFIX,
            ttl=ttl if isinstance(ttl, int) else _SERVERS_TTL,
        )


def _endpoint(given: object) -> str | None:
    """One as we can ask it; the server knows some that we do not."""
    if not isinstance(given, str):
        return None
    url = given if "://" in given else f"http://{given}"
    return url if _is_endpoint(url) else None


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - checked where it is read
    except ValueError:
        return False
    return parts.scheme == "http" and bool(parts.hostname)


@dataclass(frozen=True)
class Keeping:
    """How long what a server stores lives, as far as its configuration tells.

    :ivar may_outlive: whether something may outlive the server; False only if it is sure
    :ivar resumes: whether it is sure that runs go on after the server was restarted
    :ivar path: the sqlite file in which the runs are, if they are in one
    :ivar leases: by what other servers may use the store at the same time; None: not at all
    :ivar is_relative: whether it is a matter of the server's working directory where
    :ivar secrets: what the configuration has of them, which the server may print
    :ivar made: the sqlite files that the server would make, for all to read
    :ivar claims: whether it takes other servers' runs over, alive or not, where no leases say
    """

    may_outlive: bool = True
    resumes: bool = False
    path: Path | None = None
    leases: Leases | None = None
    is_relative: bool = False
    secrets: Secrets = field(default_factory=Secrets)
    made: tuple[Path, ...] = ()
    claims: bool = True

    @classmethod
    def of(cls, config: object) -> Self:
        if not isinstance(config, Mapping):
            return cls()
        stores = _stores(config.get("storageConfig"))
        # The journal tells how far an unfinished run has come.
        journal = _sqlite_path(stores[-1])
        return cls(
            may_outlive=any(map(_may_outlive, stores)),
            resumes=all(map(_is_durable, stores)) and _recovers(config.get("recovery")),
            path=journal if journal == _sqlite_path(stores[0]) else None,
            leases=Leases.of(config),
            is_relative=any(map(_is_relative, stores)),
            secrets=Secrets.of(config),
            made=tuple(dict.fromkeys(filter(None, map(_made_by_server, stores)))),
            claims=_claims(config.get("recovery")),
        )


def _stores(config: object) -> tuple[object, object, object]:
    """The configurations of metadata, blobs and journal."""
    if not isinstance(config, Mapping) or "metadata" not in config:
        return (config, config, config)
    metadata = config["metadata"]
    blobs, journal = config.get("blobs"), config.get("journal")
    return (
        metadata,
        metadata if blobs is None else blobs,
        metadata if journal is None else journal,
    )


def _may_outlive(store: object) -> bool:
    if store is None:
        return False
    return not isinstance(store, Mapping) or store.get("type") != "inMemory"


def _is_durable(store: object) -> bool:
    """True if what is stored there outlives the server for certain."""
    if not isinstance(store, Mapping):
        return False
    match store.get("type"):
        case "sqlite" | "postgres":
            url = store.get("databaseUrl")
            return isinstance(url, str) and not (
                ":memory:" in url or "mode=memory" in url
            )
        case "filesystem":  # without a directory it is a temporary one
            return isinstance(store.get("directory"), str)
        case _:
            return False


def _sqlite_path(store: object) -> Path | None:
    if not isinstance(store, Mapping) or store.get("type") != "sqlite":
        return None
    url = store.get("databaseUrl")
    if not (isinstance(url, str) and url.startswith(_SQLITE) and _is_durable(store)):
        return None
    path = url.removeprefix(_SQLITE).removeprefix("//").partition("?")[0]
    return Path(unquote(path)) if path else None


def _made_by_server(store: object) -> Path | None:
    path = _sqlite_path(store)
    if path is None or not isinstance(store, Mapping):
        return None
    query = str(store["databaseUrl"]).partition("?")[2]
    return path if "mode=rwc" in query.split("&") else None


def _is_relative(store: object) -> bool:
    if isinstance(store, Mapping) and store.get("type") == "filesystem":
        directory = store.get("directory")
        return isinstance(directory, str) and not Path(directory).is_absolute()
    path = _sqlite_path(store)
    return path is not None and not path.is_absolute()


def _claims(recovery: object) -> bool:
    return not isinstance(recovery, Mapping) or recovery.get("enabled") is not False


def _recovers(recovery: object) -> bool:
    return not isinstance(recovery, Mapping) or recovery.get("maxStartupRecovery") != 0
