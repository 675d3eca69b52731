"""StepflowClient: the executor of a Stepflow server elsewhere.

Contract: the calls are those of an embedded runtime (``api``); what is added is the way
there. What is safe to repeat is repeated, with growing pauses; anything else never.
Credentials go to the server and nowhere else: not into a repr, a log or an error.
"""

from __future__ import annotations

import base64
import random
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import SplitResult, unquote, urlsplit

import anyio
from anyio import AsyncContextManagerMixin

from . import wire
from .api import ApiExecutor, next_wait_among_several
from .arguments import check_timeout
from .crew import Crew
from .errors import ConnectionLostError, StepflowError
from .failover import Server, Servers
from .groups import quiet_task_group
from .transport import NO_HEADERS, Heir, Response, Stream, Transport
from .transport.direct import DirectTransport

if TYPE_CHECKING:
    import httpx

__all__ = ["StepflowClient"]

_TIMEOUT: Final = 30.0

# Pauses before a request is repeated, in seconds; each is shortened by chance, so that the
# clients of a server that comes back do not come all at once.
_PAUSES: Final = (0.1, 0.2, 0.5, 1.0, 2.0)

# What proxies answer for a server that is not there just now.
_NOT_NOW: Final = frozenset({429, 502, 503, 504})

# How long a connection may take to be made. A machine that is gone answers nothing at all.
_CONNECTING: Final = 5.0

# How long leaving the client waits for runs to be cancelled whose callers have gone.
_LAST_ERRANDS: Final = 3.0

# A server sends a sign of life every 15 s where nothing happens.
_SILENCE: Final = 60.0


class StepflowClient(ApiExecutor, AsyncContextManagerMixin):
    """Runs workflows on a Stepflow server elsewhere: the calls of ``StepflowRuntime``.

    ::

        async with StepflowClient("https://stepflow.example.org", headers=...) as client:
            result = await client.run("workflow.yaml", {"x": 1})

    A client may be used from any thread and any event loop, of asyncio and trio. It may
    also be used without being entered; then a background thread does what must outlive
    calls (cancelling their runs), and :meth:`aclose` or :meth:`close` is to be called.

    :param url: the server's address, ``http://`` or ``https://``, with or without
        ``/api/v1``. A user and password in it are sent by HTTP's basic authentication
    :param headers: sent with each request, ``{"Authorization": "Bearer ..."}``
    :param timeout: seconds in which a server must answer what it need not wait for (a
        run's end is waited for without end); None: 30
    :param http_client: an ``httpx.AsyncClient`` to send all requests by, for certificates,
        authentication or proxies of your own. It stays yours to close, and the client has
        to be entered, in the event loop that it belongs to
    :raises ValueError: naming the parameter, if a value cannot work
    :raises TypeError: naming the parameter, if a value is of the wrong kind

    Proxies are those of the environment (``HTTPS_PROXY``, ``NO_PROXY`` ...).
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        addresses = _addresses(url)
        crew = Crew(may_hire=True)
        seconds = _TIMEOUT if timeout is None else timeout
        check_timeout(seconds)
        checked = _checked_headers(headers)
        servers = Servers(
            [
                Server(
                    address.url,
                    address.prefix,
                    _transport(
                        address,
                        {**address.authorization, **checked},
                        seconds,
                        crew,
                        http_client,
                        connecting=_CONNECTING if len(addresses) > 1 else None,
                    ),
                )
                for address in addresses
            ]
        )
        self._crew = crew
        self._timeout = seconds
        self._servers = servers
        self._needs_entering = http_client is not None
        self._is_closed = False
        # Of a client that nobody has closed: its thread, its connections.
        weakref.finalize(self, crew.retire, servers.close).atexit = False
        super().__init__(crew)

    @property
    def url(self) -> str:
        """The server's address, without credentials and without a slash at the end.

        Of several servers that of the one that is asked first just now.
        """
        return self._servers.favourite.url

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of all servers, in the order in which they were given."""
        return tuple(server.url for server in self._servers.all)

    async def aclose(self) -> None:
        """Close all connections; calls under way fail.

        What callers have left behind (runs to be cancelled) gets some seconds.
        """
        try:
            with anyio.CancelScope(shield=True):
                await self._crew.settle(_LAST_ERRANDS)
                self._is_closed = True
                await self._servers.aclose()
        finally:
            # asyncio's own cancellation stops at no shield; the crew is waited for.
            self._is_closed = True
            self._servers.close()
            self._crew.dismiss()

    def close(self) -> None:
        """The same for a program without an event loop."""
        self._crew.block_until_settled(_LAST_ERRANDS)
        self._is_closed = True
        self._servers.close()
        self._crew.dismiss()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __asynccontextmanager__(self) -> AbstractAsyncContextManager[Self]:
        return self._entered()

    @asynccontextmanager
    async def _entered(self) -> AsyncIterator[Self]:
        async with quiet_task_group() as tasks:
            try:
                if self._crew.loop is None:
                    tasks.start_soon(self._crew.work)
                    await self._crew.wait_at_work()
                self._needs_entering = False
                yield self
            finally:
                await self.aclose()

    def __repr__(self) -> str:
        return f"<StepflowClient {', '.join(self.urls)}>"

    # -- the way there -------------------------------------------------------------

    @property
    def _generation(self) -> int | None:
        return None  # it keeps what it has stored; if it does not, it says so

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        held: float = 0.0,
        heir: Heir | None = None,
        repeatable: bool = False,
        generation: int | None = None,
    ) -> Response:
        """Send it, and send it again while that is safe and may help.

        The next server is asked at once; there is a pause when all have been.
        """
        self._refuse_if_unentered()
        repeatable = repeatable or method == "GET"
        servers = self._servers
        troubles: dict[Server, ConnectionLostError] = {}
        until = time.monotonic() + (len(_PAUSES) + 1) * (self._timeout + held)
        for pause in (*_PAUSES, None):
            for server in servers.in_turn():
                try:
                    if not server.is_known:
                        await self._look_at(server)
                    response = await server.transport.request(
                        method,
                        server.prefix + path,
                        body,
                        headers=headers,
                        held=held,
                        heir=heir,
                    )
                    if response.status not in _NOT_NOW:
                        servers.answered(server)
                        return response
                    trouble: ConnectionLostError = _NotNow(response)
                except ConnectionLostError as exc:
                    trouble = exc
                self._refuse_if_closed(trouble)
                servers.failed(server)
                if not (repeatable or trouble.unsent):
                    return _told([(server, trouble)])
                troubles[server] = trouble
                # Servers that are silent take so long that one of them would have been
                # given up by then.
                if servers.are_several and time.monotonic() > until:
                    return _told(list(troubles.items()))
            if pause is not None:
                await anyio.sleep(pause * random.uniform(0.5, 1.0))
        return _told(list(troubles.items()))

    async def _open_stream(
        self, path: str, *, generation: int | None = None
    ) -> tuple[Stream, int | None]:
        self._refuse_if_unentered()
        servers = self._servers
        troubles: list[tuple[Server, ConnectionLostError]] = []
        for server in servers.in_turn():
            try:
                if not server.is_known:
                    await self._look_at(server)
                stream = await server.transport.stream(server.prefix + path)
            except ConnectionLostError as exc:
                trouble = exc
            else:
                if not servers.are_several:
                    return stream, None
                if stream.status not in _NOT_NOW:
                    servers.answered(server)
                    return _WatchedStream(stream, partial(servers.failed, server)), None
                stream.close()
                trouble = ConnectionLostError(f"it answered {stream.status}")
            self._refuse_if_closed(trouble)
            servers.failed(server)
            troubles.append((server, trouble))
        raise _lost(troubles)

    def _first_wait(self) -> int:
        return 0 if self._servers.are_several else super()._first_wait()

    def _next_wait(self, waited: float) -> int:
        if not self._servers.are_several:
            return super()._next_wait(waited)
        return next_wait_among_several(waited)

    @property
    def _is_gone(self) -> bool:
        return self._is_closed

    def _gone(self) -> StepflowError:
        return ConnectionLostError("the client is closed", unsent=True)

    async def _look_at(self, server: Server) -> None:
        """Look once: an older server would take runs whose results nobody can read.

        :raises ConnectionLostError: unsent, if it does not answer: nothing but this was
        """
        try:
            health = await server.transport.request("GET", server.prefix + wire.HEALTH)
        except ConnectionLostError as exc:
            raise ConnectionLostError(str(exc), unsent=True) from exc
        if health.status in _NOT_NOW:
            raise _NotNow(health, unsent=True)
        self._refuse_outdated(health)
        server.is_known = True

    def _refuse_if_closed(self, exc: ConnectionLostError) -> None:
        if self._is_closed:
            raise ConnectionLostError(
                "the client is closed", unsent=exc.unsent
            ) from exc

    def _refuse_if_unentered(self) -> None:
        if self._needs_entering:
            raise RuntimeError(
                "a StepflowClient with an http_client has to be entered, in the event loop "
                "of that: `async with StepflowClient(...) as client`"
            )


class _NotNow(ConnectionLostError):
    """A proxy has answered for a server that is not there just now."""

    def __init__(self, response: Response, *, unsent: bool = False) -> None:
        super().__init__(f"it answered {response.status}", unsent=unsent)
        self.response = response


def _told(troubles: Sequence[tuple[Server, ConnectionLostError]]) -> Response:
    """What the caller is to hear of it: an answer of the last who gave one, or an error.

    :raises ConnectionLostError: if nobody has answered
    """
    for _, trouble in reversed(troubles):
        if isinstance(trouble, _NotNow):
            return trouble.response
    raise _lost(troubles)


def _lost(
    troubles: Sequence[tuple[Server, ConnectionLostError]],
) -> ConnectionLostError:
    if len(troubles) == 1:
        return troubles[0][1]
    told = "; ".join(f"{server.url}: {trouble}" for server, trouble in troubles)
    return ConnectionLostError(
        f"none of the {len(troubles)} servers can be reached. {told}",
        unsent=all(trouble.unsent for _, trouble in troubles),
    )


class _WatchedStream:
    """A stream that tells when it breaks."""

    def __init__(self, stream: Stream, on_break: Callable[[], None]) -> None:
        self._stream = stream
        self._on_break = on_break
        self.status = stream.status
        self.content_type = stream.content_type
        self.close = stream.close

    async def receive(self) -> bytes:
        try:
            return await self._stream.receive()
        except ConnectionLostError:
            self._on_break()
            raise


class _Timed:
    """A direct transport whose server has only so much time."""

    def __init__(self, transport: DirectTransport, timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        held: float = 0.0,
        heir: Heir | None = None,
    ) -> Response:
        seconds = self._timeout + held
        with anyio.move_on_after(seconds):
            return await self._transport.request(
                method, path, body, headers=headers, heir=heir
            )
        raise ConnectionLostError(f"the server did not answer within {seconds:g} s")

    async def stream(self, path: str) -> Stream:
        with anyio.move_on_after(self._timeout):
            return _TimedStream(await self._transport.stream(path))
        raise ConnectionLostError(
            f"the server did not answer within {self._timeout:g} s"
        )

    def close(self) -> None:
        self._transport.close()

    async def aclose(self) -> None:
        await self._transport.aclose()


class _TimedStream:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.status = stream.status
        self.content_type = stream.content_type
        self.close = stream.close

    async def receive(self) -> bytes:
        with anyio.move_on_after(_SILENCE):
            return await self._stream.receive()
        raise ConnectionLostError(f"the server was silent for {_SILENCE:g} s")


def _transport(
    address: _Address,
    headers: Mapping[str, str],
    timeout: float,
    crew: Crew,
    http_client: httpx.AsyncClient | None,
    *,
    connecting: float | None,
) -> Transport:
    """The lean way for plain HTTP; httpx for TLS, proxies and whatever users bring."""
    if http_client is None and address.scheme == "http" and not _has_proxy(address):
        direct = DirectTransport(
            address.port,
            address.host,
            headers=headers,
            crew=crew,
            # Before all time is over: that nothing was sent should be known.
            connect_timeout=min(_CONNECTING, timeout / 2),
        )
        return _Timed(direct, timeout)
    from .transport.remote import RemoteTransport

    return RemoteTransport(
        address.origin,
        headers=headers,
        timeout=timeout,
        connect_timeout=connecting,
        crew=crew,
        http_client=http_client,
    )


def _has_proxy(address: _Address) -> bool:
    import urllib.request  # takes some 20 ms to come

    proxies = urllib.request.getproxies()
    if not (proxies.get("http") or proxies.get("all")):
        return False
    return not urllib.request.proxy_bypass(f"{address.host}:{address.port}")


def _addresses(url: object) -> list[_Address]:
    """Of one server or of several: at least one, and none twice."""
    if isinstance(url, str):
        return [_Address.of(url)]
    if not isinstance(url, Sequence) or isinstance(url, bytes | bytearray):
        raise TypeError(
            f"url must be a string or a sequence of strings, not {type(url).__name__}"
        )
    if not url:
        raise ValueError("url is an empty sequence; it must have one at least")
    addresses = [_Address.of(each, f"url[{index}]") for index, each in enumerate(url)]
    known: dict[str, int] = {}
    for index, address in enumerate(addresses):
        if (first := known.setdefault(address.url, index)) != index:
            raise ValueError(f"url[{index}] is that of url[{first}]: {address.url}")
    return addresses


@dataclass(frozen=True)
class _Address:
    """Where a server is.

    :ivar prefix: the path before ``/api/v1``, without a slash at the end
    :ivar authorization: the header for the credentials that the URL had
    """

    scheme: str
    host: str
    port: int
    prefix: str
    authorization: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, url: object, name: str = "url") -> Self:
        """Take a URL apart. It may hold credentials: errors do not show it.

        :param name: what errors call it
        :raises ValueError: if it is none of a server
        """
        if not isinstance(url, str):
            raise TypeError(f"{name} must be a string, not {type(url).__name__}")
        parts = _parts(url)
        if parts is None:
            raise ValueError(
                f"{name} is not a valid URL (is its user or password percent-encoded?)"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"{name} must begin with http:// or https:// and a host, like "
                '"http://localhost:7837"'
            )
        if parts.query or parts.fragment:
            raise ValueError(
                f"{name} must not have a query (?) or a fragment (#); in a user or password "
                "they have to be percent-encoded"
            )
        path = parts.path.rstrip("/").removesuffix(wire.API)
        if not (path.isascii() and path.isprintable()) or set(path) & set(" @"):
            raise ValueError(
                f"{name}: its path, user and password have to be percent-encoded"
            )
        return cls(
            scheme=parts.scheme,
            host=_host(parts.hostname, name),
            port=parts.port or (443 if parts.scheme == "https" else 80),
            prefix=path,
            authorization=_basic_authorization(parts),
        )

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def url(self) -> str:
        return self.origin + self.prefix


def _parts(url: str) -> SplitResult | None:
    """None if it has none. Why not is told to nobody: it may quote the password."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - checked where it is read
    except ValueError:
        return None
    return parts


def _host(host: str, name: str) -> str:
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError as exc:
        raise ValueError(f"{name}: its host is not a valid name: {exc}") from None


def _basic_authorization(parts: SplitResult) -> dict[str, str]:
    if parts.username is None and parts.password is None:
        return {}
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"authorization": f"Basic {credentials}"}


def _checked_headers(headers: object) -> dict[str, str]:
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise TypeError(
            f"headers must be a mapping of strings, not {type(headers).__name__}"
        )
    checked = {}
    for name, value in headers.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError(f"headers must map strings to strings; {name!r} does not")
        if not _is_token(name):
            raise ValueError(f"headers: {name!r} is not the name of a header")
        if not _is_field(value):
            # The value is not shown: it may be a secret.
            raise ValueError(f"headers: the value of {name!r} cannot be sent")
        if name.lower() in _OURS:
            raise ValueError(f"headers: {name!r} is set by each request itself")
        checked[name.lower()] = value
    return checked


_OURS: Final = frozenset(
    {
        *("accept", "connection", "content-encoding", "content-length"),
        *("content-type", "expect", "host", "te", "trailer"),
        *("transfer-encoding", "upgrade"),
    }
)


def _is_token(name: str) -> bool:
    return (
        bool(name)
        and name.isascii()
        and name.replace("-", "").replace("_", "").isalnum()
    )


def _is_field(value: str) -> bool:
    return all(" " <= c != "\x7f" and c <= "\xff" or c == "\t" for c in value)
