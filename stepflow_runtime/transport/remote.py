"""HTTP and HTTPS by httpx, to a server that may be anywhere: certificates, proxies, all.

Contract: an httpx client belongs to one event loop, so every request is a job of the crew,
and its caller may be in any loop or thread, and goes at once when it is cancelled. No
exception of httpx gets out, nor any text of one that may quote a header or a proxy's URL,
and so credentials. That a request was not sent is claimed only where httpx itself
has told us how far it came. Of an answer no more is kept than of a server nearby, also of
what it becomes when it is decompressed.

The module is imported only where it is wanted: nothing else in the library needs httpx.
"""

from __future__ import annotations

import ssl
import weakref
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from enum import Enum, auto
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import anyio.lowlevel
import httpx

from ..crew import Crew, CrewGoneError, Job, Kind
from ..errors import ConnectionLostError
from ..forks import forget_in_child
from ..loops import Announcer, current_loop
from ..threads import run_blocking
from . import NO_HEADERS, Heir, Response
from .http1 import LONGEST_BODY

__all__ = ["RemoteTransport"]

T = TypeVar("T")

# Each waiting run holds a connection, and each connection a descriptor; a process often
# has 1,024 of them.
_MAX_CONNECTIONS: Final = 256

# Uvicorn, hypercorn and node close idle connections after 5 s, and most others later. Who
# closes first never sends a request into a connection that is being closed.
_KEEPALIVE: Final = 4.0

# A server sends a sign of life every 15 s in a stream, however little happens.
_SILENCE: Final = 60.0

# How long the answer that a cancelled caller left behind is waited for.
_INHERITED_PATIENCE: Final = 60.0

# Closing takes no time, as a rule: TLS connections are closed without a farewell.
_CLOSING_BUDGET: Final = 5.0

# What a stream's reader may be behind. A chunk has 64 KiB at most.
_BUFFERED_CHUNKS: Final = 8


_NOT_ASKED_FOR: Final = (
    "the server's answer is compressed in a way that was not asked for"
)


class RemoteTransport:
    """Connections to one server, in the event loop of a crew.

    :param base_url: scheme, host, port and perhaps the beginning of every path; without
        credentials
    :param headers: sent with every request
    :param timeout: seconds for making a connection, and for an answer
    :param crew: does the requests
    :param connect_timeout: seconds for making a connection, if ``timeout`` is not for that
    :param http_client: used as it is in place of our own, and not closed by us; nobody
        else may use it outside the crew's event loop
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str],
        timeout: float,
        crew: Crew,
        http_client: httpx.AsyncClient | None = None,
        connect_timeout: float | None = None,
    ) -> None:
        self._server = _Server(base_url)
        self._headers = _lowered(headers)
        self._timeout = timeout
        self._connect_timeout = timeout
        if connect_timeout is not None:
            self._connect_timeout = min(connect_timeout, timeout)
        self._crew = crew
        self._given = http_client
        self._pool: _Pool | None = None
        self._under_way: set[anyio.CancelScope] = set()
        self._changed = Announcer()
        self._has_begun = False
        self._is_closed = False
        forget_in_child(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._server.origin}>"

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
        await anyio.lowlevel.checkpoint_if_cancelled()
        all_headers = {
            "accept": "application/json",
            "accept-encoding": "gzip",
            **({} if body is None else {"content-type": "application/json"}),
            **self._headers,
            **_lowered(headers),
        }
        job = self._send(partial(self._exchange, method, path, body, all_headers, held))
        try:
            return await self._end_of(job)
        except Exception:
            raise
        except BaseException:
            # The answer may have come at this very moment; somebody has to have it.
            if (
                heir is None
                or self._crew.send(partial(_inherit, job, heir), Kind.ERRAND) is None
            ):
                job.cancel()
            raise

    async def stream(self, path: str) -> _RemoteStream:
        await anyio.lowlevel.checkpoint_if_cancelled()
        buffer = _Buffer()
        pump = self._send(partial(self._pump, path, buffer))
        pump.when_ended(lambda: buffer.end(self._gone()))  # where it did not say so
        stream = _RemoteStream(buffer, pump)
        try:
            await buffer.wait_head()
        except BaseException:
            stream.close()
            raise
        return stream

    async def aclose(self) -> None:
        closing = self._begin_closing()
        if closing is not None:
            with suppress(CrewGoneError):
                return await closing.wait()
        # Nobody works for us any more, but the connections may belong to this very loop.
        if self._pool is not None and self._pool.loop is current_loop():
            await self._close()

    def close(self) -> None:
        """Close every connection, soon; from any thread."""
        self._begin_closing()

    def forget(self) -> None:
        self._pool = None
        self._under_way.clear()
        self._changed = Announcer()
        self._has_begun = False

    # -- on the caller's side ----------------------------------------------------------

    def _send(self, function: Callable[[], Awaitable[T]]) -> Job[T]:
        self._refuse_if_closed()
        self._has_begun = True
        job = self._crew.send(partial(self._while_open, function))
        if job is None:
            raise self._gone(unsent=True)
        return job

    async def _end_of(self, job: Job[T]) -> T:
        try:
            return await job.wait()
        except CrewGoneError:
            raise self._gone() from None

    def _begin_closing(self) -> Job[None] | None:
        self._is_closed = True
        # A crew that hires must not do so for nothing.
        return self._crew.send(self._close) if self._has_begun else None

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise ConnectionLostError("the client is closed", unsent=True)

    def _gone(self, *, unsent: bool = False) -> ConnectionLostError:
        return ConnectionLostError(
            "the client was closed"
            if self._is_closed
            else "the event loop of the client's connections has ended",
            unsent=unsent,
        )

    # -- in the crew's event loop ------------------------------------------------------

    async def _while_open(self, function: Callable[[], Awaitable[T]]) -> T:
        """Await ``function()``, unless this is closed before it ends."""
        with anyio.CancelScope() as scope:
            self._under_way.add(scope)
            try:
                self._refuse_if_closed()
                return await function()
            finally:
                self._under_way.discard(scope)
                self._changed.announce()
        raise self._gone()

    async def _close(self) -> None:
        for scope in tuple(self._under_way):
            scope.cancel()
        pool, self._pool = self._pool, None
        with anyio.move_on_after(_CLOSING_BUDGET, shield=True):
            # Each closes the connection that it uses; the idle ones are left.
            await self._changed.wait_until(lambda: not self._under_way)
            if pool is not None:
                await pool.aclose()

    async def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        held: float,
    ) -> Response:
        patience = self._timeout + held
        call = self._call(patience)
        # The limit for the whole is for a server that sends a byte now and then.
        with call.explained(), anyio.fail_after(patience):
            async with self._answer(call, method, path, body, headers) as answer:
                return Response(
                    answer.status_code, _media_type(answer), await _body(answer)
                )

    async def _pump(self, path: str, buffer: _Buffer) -> None:
        """Take in what the server sends, no faster than it is read."""
        headers = {
            **self._headers,
            "accept": "text/event-stream",
            "cache-control": "no-store",
            # What is compressed comes in lumps, some of them huge.
            "accept-encoding": "identity",
        }
        call = self._call(_SILENCE)
        try:
            with call.explained():
                async with self._answer(call, "GET", path, None, headers) as answer:
                    if _compression(answer):
                        raise ConnectionLostError(_NOT_ASKED_FOR)
                    buffer.begin(answer.status_code, _media_type(answer))
                    await _pour(answer, buffer)
            buffer.end()
        except Exception as exc:  # noqa: BLE001 - raised where it is read
            buffer.end(exc)

    def _call(self, patience: float) -> _Call:
        return _Call(
            self._server,
            self._timeout,
            patience,
            self._connect_timeout,
            is_own=self._given is None,
        )

    @asynccontextmanager
    async def _answer(
        self,
        call: _Call,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; yields when the head of the answer is there."""
        async with self._client(call) as client:
            request = client.build_request(
                method,
                self._server.base_url + path,
                content=body,
                headers=[
                    (name.encode("latin-1"), value.encode("latin-1"))
                    for name, value in headers.items()
                ],
                timeout=call.limits,
                extensions={"trace": call.hear},
            )
            try:
                with anyio.fail_after(self._timeout + call.patience):
                    answer = await client.send(request, stream=True)
            finally:
                await call.drop_unused()
            try:
                yield answer
            finally:
                with anyio.move_on_after(_CLOSING_BUDGET, shield=True):
                    await answer.aclose()

    @asynccontextmanager
    async def _client(self, call: _Call) -> AsyncIterator[httpx.AsyncClient]:
        if self._given is not None:
            if self._given.is_closed:
                raise ConnectionLostError("the http_client is closed", unsent=True)
            yield self._given
            return
        pool = self._pool
        if pool is None or pool.loop is not current_loop():
            pool = self._pool = _Pool()
        async with pool.lent() as client:
            try:
                yield client
            finally:
                if call.has_spoilt_pool:
                    pool.is_retired = True
                    if self._pool is pool:
                        self._pool = None


async def _inherit(job: Job[Response], heir: Heir) -> None:
    try:
        with anyio.fail_after(_INHERITED_PATIENCE):
            response = await job.wait()
    except BaseException:
        job.cancel()
        raise
    await heir(response)


async def _body(answer: httpx.Response) -> bytes:
    if answer.is_stream_consumed:
        return await answer.aread()  # an event hook of the caller's client has read it
    take_in = _Intake(_compression(answer))
    chunks = answer.aiter_raw()
    try:
        async for chunk in chunks:
            take_in(chunk)
    finally:
        await _finish(answer, chunks)
    return take_in.whole()


class _Intake:
    """The body of an answer, decompressed as it comes, and refused when it gets too long.

    httpx decompresses by itself, but as much as a chunk holds: some kilobytes may be
    gigabytes.
    """

    def __init__(self, compression: str) -> None:
        if compression not in ("", "gzip"):
            raise ConnectionLostError(_NOT_ASKED_FOR)
        self._content = bytearray()
        self._inflater = zlib.decompressobj(wbits=31) if compression else None
        self._has_begun = False

    def __call__(self, chunk: bytes) -> None:
        self._has_begun = self._has_begun or bool(chunk)
        room = LONGEST_BODY - len(self._content)
        self._content += self._inflated(chunk, room + 1)
        if len(self._content) > LONGEST_BODY:
            raise ConnectionLostError(
                f"the body of the server's answer is longer than {LONGEST_BODY} bytes"
            )

    def whole(self) -> bytes:
        if self._inflater is not None and self._has_begun and not self._inflater.eof:
            raise httpx.DecodingError("cut off")
        return bytes(self._content)

    def _inflated(self, chunk: bytes, at_most: int) -> bytes:
        if self._inflater is None:
            return chunk
        try:
            inflated = self._inflater.decompress(chunk, at_most)
        except zlib.error as exc:
            raise httpx.DecodingError(str(exc)) from exc
        if self._inflater.unused_data:  # it would be kept, without an end
            raise httpx.DecodingError("something follows")
        return inflated


async def _pour(answer: httpx.Response, buffer: _Buffer) -> None:
    chunks = answer.aiter_bytes()
    try:
        async for chunk in chunks:
            if chunk:
                await buffer.put(chunk)
    finally:
        await _finish(answer, chunks)


async def _finish(answer: httpx.Response, chunks: AsyncIterator[bytes]) -> None:
    """Close the answer, and let the generators of httpx run into that.

    There are six of them, one in the other, and the outermost does not close the rest.
    """
    with anyio.move_on_after(_CLOSING_BUDGET, shield=True):
        await answer.aclose()
        with suppress(Exception):  # whatever reading from what is closed leads to
            async for _ in chunks:
                pass


class _Server:
    """Where to: the URL, and its parts for messages."""

    def __init__(self, base_url: str) -> None:
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL:
            raise ValueError("the server's URL is not well-formed") from None
        self.base_url = base_url.rstrip("/")
        self.host = url.raw_host.decode("ascii")
        self.port = url.port or {"http": 80, "https": 443}.get(url.scheme)
        self.origin = f"{url.scheme}://{url.netloc.decode('ascii')}"


class _Pool:
    """An httpx client of ours, and the event loop that it belongs to."""

    def __init__(self) -> None:
        self.loop = current_loop()
        self.is_retired = False
        self._client: httpx.AsyncClient | None = None
        self._making = anyio.Lock()
        self._users = 0

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[httpx.AsyncClient]:
        """The client; it is made when it is first wanted."""
        self._users += 1
        try:
            yield self._client or await self._made()
        finally:
            self._users -= 1
            if self.is_retired and not self._users:
                await self.aclose()

    async def aclose(self) -> None:
        if self._client is not None:
            with anyio.move_on_after(_CLOSING_BUDGET, shield=True):
                await self._client.aclose()

    async def _made(self) -> httpx.AsyncClient:
        async with self._making:
            if self._client is None:
                # Certificates are read from files, many of them.
                self._client = await run_blocking(_make_client)
            return self._client


def _make_client() -> httpx.AsyncClient:
    from .. import __version__

    try:
        return httpx.AsyncClient(
            headers={"user-agent": f"stepflow-runtime/{__version__}"},
            limits=httpx.Limits(
                max_connections=_MAX_CONNECTIONS, keepalive_expiry=_KEEPALIVE
            ),
            follow_redirects=False,
            trust_env=True,
        )
    except OSError as exc:
        raise ConnectionLostError(
            "the CA certificates cannot be read; look at SSL_CERT_FILE and SSL_CERT_DIR: "
            f"{exc}",
            unsent=True,
        ) from exc
    except ImportError:
        raise ConnectionLostError(
            "the environment asks for a SOCKS proxy; install httpx[socks] for that",
            unsent=True,
        ) from None
    except (httpx.InvalidURL, ValueError):
        raise ConnectionLostError(
            "the environment's proxy is not a URL that can be used; look at HTTP_PROXY, "
            "HTTPS_PROXY, ALL_PROXY and NO_PROXY (in a password, / @ : and # have to be "
            "written as %2F %40 %3A and %23)",
            unsent=True,
        ) from None


# -- how far a request came, and what its failure means --------------------------------


class _Stage(Enum):
    UNKNOWN = auto()  # a caller's own transport tells us nothing
    UNSENT = auto()
    SENT = auto()  # some of it, perhaps
    ANSWERED = auto()  # the head of the answer is there


# What cannot happen to a request that has reached anything.
_BEFORE_SENDING: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
    UnicodeError,
)

_FAILURES: Final = (
    httpx.HTTPError,
    httpx.InvalidURL,
    httpx.StreamError,
    TimeoutError,  # of anyio's deadlines
    UnicodeError,  # of host names, and of headers
)


class _Call:
    """Listens to how a request fares.

    :param timeout: seconds for sending, and for a free connection
    :param patience: seconds for the answer
    :param connect_timeout: seconds for making a connection
    :param is_own: whether the httpx client is one of ours
    """

    def __init__(
        self,
        server: _Server,
        timeout: float,
        patience: float,
        connect_timeout: float,
        *,
        is_own: bool,
    ) -> None:
        self.patience = patience
        self.has_spoilt_pool = False
        self._server = server
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._is_own = is_own
        self._stage = _Stage.UNSENT if is_own else _Stage.UNKNOWN
        self._peer = server.origin  # whom we are talking to
        self._unused: Any = None  # a connection that nothing was sent on

    @property
    def limits(self) -> httpx.Timeout:
        return httpx.Timeout(
            self._timeout, connect=self._connect_timeout, read=self.patience
        )

    async def hear(self, event: str, info: Mapping[str, Any]) -> None:
        """Told by httpcore what it does: the extension "trace"."""
        what = event.partition(".")[2]
        if self._stage is _Stage.UNKNOWN:
            self._stage = _Stage.UNSENT
        if what == "connect_tcp.started":
            self._peer = self._named(info["host"], info["port"])
        elif what == "start_tls.started":
            if info["server_hostname"] == self._server.host:
                self._peer = self._server.origin
        elif what == "connect_tcp.complete":
            self._unused = info["return_value"]
        elif what == "start_tls.complete":
            # In another's pool, HTTP/2 may have others use it already.
            self._unused = info["return_value"] if self._is_own else None
        elif what == "send_request_headers.started":
            if info["request"].method != b"CONNECT":  # which is for a proxy
                self._stage = _Stage.SENT
                self._unused = None
        elif what == "receive_response_headers.complete" and self._stage is _Stage.SENT:
            self._stage = _Stage.ANSWERED

    async def drop_unused(self) -> None:
        """Close a connection that nothing was sent on, because it failed in the making.

        httpcore forgets it where TLS was to begin, if it is cancelled; and a proxy's
        tunnel without TLS keeps its place in the pool for ever, so that the pool is not
        to be used any longer.
        """
        unused, self._unused = self._unused, None
        if unused is not None:
            self.has_spoilt_pool = True
            with anyio.move_on_after(_CLOSING_BUDGET, shield=True):
                await unused.aclose()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what httpx raises into ConnectionLostError."""
        try:
            yield
        except _FAILURES as exc:
            cause = _root(exc)
            raise ConnectionLostError(
                self._words(exc, cause), unsent=self._is_unsent(exc)
            ) from cause

    def _is_unsent(self, exc: Exception) -> bool:
        if self._stage is _Stage.UNKNOWN:
            return isinstance(exc, _BEFORE_SENDING)
        # HTTP/1.1, which is all that ours speaks, is checked before it is sent.
        is_refused_by_us = self._is_own and isinstance(exc, httpx.LocalProtocolError)
        return self._stage is _Stage.UNSENT or is_refused_by_us

    def _words(self, exc: Exception, cause: OSError | None) -> str:
        """What happened. Of the words of others only those that can hold no secret."""
        match exc:
            case httpx.TimeoutException() | TimeoutError():
                return self._words_for_timeout(exc)
            case httpx.ProxyError():
                return (
                    f"the proxy {self._peer} makes no connection to "
                    f"{self._server.origin}: {exc}"
                )
            case httpx.ConnectError():
                return self._words_for_connecting(cause)
            case (
                httpx.LocalProtocolError()
                | httpx.InvalidURL()
                | httpx.UnsupportedProtocol()
                | UnicodeError()
            ):
                return (
                    f"a request to {self._server.origin} is not as HTTP wants it; look for "
                    "line breaks and blanks at the ends of headers (a token read from a "
                    "file?), and at the URL"
                )
            case httpx.DecodingError():
                return f"the answer of {self._peer} is not compressed as it says"
            case httpx.RemoteProtocolError():
                return (
                    f"the connection to {self._peer} ended in the middle of an answer, or "
                    "the answer is not HTTP"
                    if self._stage is _Stage.ANSWERED
                    else f"{self._peer} closed the connection without an answer, or does "
                    "not speak HTTP"
                )
            case httpx.NetworkError():
                return f"the connection to {self._peer} broke{_colon(cause)}"
        return f"the request to {self._server.origin} failed: {type(exc).__name__}"

    def _words_for_timeout(self, exc: Exception) -> str:
        if isinstance(exc, httpx.PoolTimeout):
            return f"no connection was free within {self._timeout:g} s"
        if isinstance(exc, httpx.ConnectTimeout):
            return f"no connection to {self._peer} within {self._connect_timeout:g} s"
        if isinstance(exc, httpx.WriteTimeout):
            return f"{self._peer} took nothing within {self._timeout:g} s"
        if self._stage is _Stage.UNSENT:
            return f"no connection to {self._server.origin} within {self.patience:g} s"
        return f"no answer from {self._peer} within {self.patience:g} s"

    def _words_for_connecting(self, cause: OSError | None) -> str:
        match cause:
            case ssl.SSLCertVerificationError():
                return (
                    f"the certificate of {self._peer} could not be verified: "
                    f"{cause.verify_message}; if it comes from a CA of your own, let the "
                    "environment variable SSL_CERT_FILE name that CA's certificate, or "
                    "pass an http_client with an SSL context that trusts it"
                )
            case ssl.SSLError():
                return f"no TLS with {self._peer}: {cause.reason or cause}"
        return f"no connection to {self._peer}{_colon(cause)}"

    def _named(self, host: str, port: int) -> str:
        if (host, port) == (self._server.host, self._server.port):
            return self._server.origin
        return f"{host}:{port} (on the way to {self._server.origin})"


def _root(exc: BaseException) -> OSError | None:
    """What the operating system, or TLS, said; None after a timeout, which is ours."""
    if isinstance(exc, (httpx.TimeoutException, TimeoutError)):
        return None
    root = None
    following: BaseException | None = exc
    while following is not None:
        if isinstance(following, OSError):
            root = following
        if isinstance(following, BaseExceptionGroup):
            following = following.exceptions[0]
        else:
            following = following.__cause__ or following.__context__
    return root


def _colon(cause: OSError | None) -> str:
    return "" if cause is None else f": {cause}"


def _lowered(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _media_type(answer: httpx.Response) -> str:
    value: str = answer.headers.get("content-type", "")
    return value.partition(";")[0].strip().lower()


def _compression(answer: httpx.Response) -> str:
    """How the body is compressed; empty if it is not."""
    value: str = answer.headers.get("content-encoding", "")
    compression = value.strip().lower()
    return "" if compression == "identity" else compression


# -- streams ---------------------------------------------------------------------------


class _Buffer:
    """Bytes on their way from the crew's event loop to a reader in any other."""

    def __init__(self) -> None:
        self.status = 0
        self.content_type = ""
        self._chunks: deque[bytes] = deque()
        self._changed = Announcer()
        self._has_ended = False
        self._error: Exception | None = None

    def begin(self, status: int, content_type: str) -> None:
        self.content_type = content_type
        self.status = status
        self._changed.announce()

    async def put(self, chunk: bytes) -> None:
        """Add it, and wait until there is room for another one."""
        self._chunks.append(chunk)
        self._changed.announce()
        await self._changed.wait_until(lambda: len(self._chunks) < _BUFFERED_CHUNKS)

    def end(self, error: Exception | None = None) -> None:
        """There will be no more of it; the first time counts."""
        if not self._has_ended:
            self._error = error
            self._has_ended = True
            self._changed.announce()

    async def wait_head(self) -> None:
        await self._changed.wait_until(lambda: self.status or self._has_ended)
        if not self.status:
            self._raise_error()

    async def take(self) -> bytes:
        """Wait for a chunk; ``b""`` if there are no more."""
        await anyio.lowlevel.checkpoint()
        await self._changed.wait_until(lambda: self._chunks or self._has_ended)
        try:
            chunk = self._chunks.popleft()
        except IndexError:
            self._raise_error()
            return b""
        self._changed.announce()
        return chunk

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class _RemoteStream:
    """A reader's end. Closed, at the latest, when nobody has it any more."""

    def __init__(self, buffer: _Buffer, pump: Job[None]) -> None:
        self._buffer = buffer
        self._stop = weakref.finalize(self, _stop, buffer, pump)
        self._stop.atexit = False

    @property
    def status(self) -> int:
        return self._buffer.status

    @property
    def content_type(self) -> str:
        return self._buffer.content_type

    async def receive(self) -> bytes:
        return await self._buffer.take()

    def close(self) -> None:
        self._stop()


def _stop(buffer: _Buffer, pump: Job[None]) -> None:
    buffer.end(ConnectionLostError("the answer was closed before its end"))
    pump.cancel()
