"""HTTP/1.1 as bytes: requests written, answers read. No I/O.

Contract: an answer is taken only if it has one meaning. What can be read in two ways (two
lengths, an encoding that was not asked for, another protocol) is refused, and what follows
an answer is never taken for the next one. Whatever a server sends, no more is kept of it
than the limits below. A leaf, but for httptools, which does the parsing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import httptools

from ..errors import ConnectionLostError

__all__ = ["LONGEST_BODY", "LONGEST_HEAD", "AnswerReader", "RequestWriter", "authority"]

# Servers' heads take some hundred bytes. What has no end, such as one interim answer (100
# Continue) after the other, or trailers, counts as a head too.
LONGEST_HEAD: Final = 64 * 1024

# More than any server sends; a body is kept in memory.
LONGEST_BODY: Final = 1024 * 1024 * 1024

# To send two pieces costs more than to copy so many bytes.
_WORTH_A_COPY: Final = 64 * 1024

# So many pieces of a body are made one: each by itself takes far more than its bytes.
_MANY_PIECES: Final = 1024

_VERSIONS: Final = frozenset({"1.0", "1.1"})

# These end with their heads, whatever they announce.
_WITHOUT_BODY: Final = frozenset({204, 304})

_DEFAULTS: Final = {"accept": "application/json", "content-type": "application/json"}


class AnswerReader:
    """Takes down what the parser hears of one answer after the other.

    :ivar status: the status code
    :ivar has_head: whether status and content type are known
    :ivar is_complete: whether the answer is at its end
    :ivar is_reusable: whether another may follow on this connection
    :ivar has_begun: whether a byte of it came
    """

    def __init__(self, longest_body: int = LONGEST_BODY) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._longest_body = longest_body
        self._refusal: ConnectionLostError | None = None
        self.begin()

    def begin(self) -> None:
        """Wait for the answer to the next request."""
        self.is_complete = self.is_reusable = self.has_begun = self.has_head = False
        self._begin_head()

    def _begin_head(self) -> None:
        self.status = 0
        self._content_type = b""
        self._body: list[bytes] = []
        self._joined = 0
        self._length: int | None = None
        self._is_chunked = False
        self._received = self._taken = 0
        self._barren = 0

    @property
    def content_type(self) -> str:
        """The media type without parameters, in lower case, or ``""``."""
        media_type = self._content_type.partition(b";")[0].strip().lower()
        return media_type.decode("latin-1")

    @property
    def missing(self) -> int:
        """How many bytes of the body are still to come; 0 if that is not known."""
        return 0 if self._length is None else self._length - self._received

    def feed(self, data: bytes) -> None:
        """Take in what came.

        :raises ConnectionLostError: if it is no answer that can be trusted
        """
        self.has_begun = True
        received = self._received
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self.is_reusable = False
            refusal = self._refusal or _not_http(exc)
            if not self.is_complete:
                raise refusal from exc
            # It was whole, and nobody asked for what follows.
        if not self.is_complete:
            self._check_size(len(data), received)

    def end(self) -> None:
        """Take note of the connection's end, which some answers have for their end.

        :raises ConnectionLostError: if this one has not
        """
        if not self.has_head or self._is_chunked or self._length is not None:
            raise ConnectionLostError(
                "the server closed the connection in the middle of an answer"
                if self.has_begun
                else "the server closed the connection without an answer"
            )
        self.is_complete = True

    def take_body(self) -> bytes:
        """What has come of the body since it was last taken."""
        body = self._body
        if len(body) == 1:
            (whole,) = body
        else:
            whole = b"".join(body)
        self._body = []
        self._joined = 0
        self._taken = self._received
        return whole

    def _check_size(self, size: int, received_before: int) -> None:
        if self._received > received_before:
            self._barren = 0
            if len(self._body) - self._joined > _MANY_PIECES:
                self._body[self._joined :] = [b"".join(self._body[self._joined :])]
                self._joined += 1
        else:
            self._barren += size
            if self._barren > LONGEST_HEAD:
                raise ConnectionLostError(_too_long("head", LONGEST_HEAD))

    def _refuse(self, reason: str) -> ConnectionLostError:
        """To be raised in a callback: the parser's own error need not lead to it."""
        self._refusal = ConnectionLostError(reason)
        return self._refusal

    # -- what the parser tells -------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.is_complete:
            raise self._refuse("something follows an answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head:
            return  # a trailer
        name = name.lower()
        if name == b"content-type":
            self._content_type = value
        elif name == b"content-length":
            self._length = int(value)
        elif name == b"transfer-encoding":
            if self._is_chunked or value.strip().lower() != b"chunked":
                raise self._refuse(_ambiguous("an encoding that was not asked for"))
            self._is_chunked = True

    def on_headers_complete(self) -> None:
        parser = self._parser
        self.status = status = parser.get_status_code()
        version = parser.get_http_version()
        if status < 100 or status == 101:
            raise self._refuse(_ambiguous(f"the status {status}"))
        if version not in _VERSIONS or (self._is_chunked and version == "1.0"):
            raise self._refuse(_ambiguous(f"HTTP {version}"))
        if status < 200 or status in _WITHOUT_BODY:
            if self._length or self._is_chunked:
                raise self._refuse(_ambiguous(f"a body with the status {status}"))
        elif self._length is not None and self._length > self._longest_body:
            raise self._refuse(_too_long("body", self._longest_body))
        self.has_head = status >= 200

    def on_body(self, body: bytes) -> None:
        self._received += len(body)
        if self._received - self._taken > self._longest_body:
            raise self._refuse(_too_long("body", self._longest_body))
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self.has_head:
            self.is_complete = True
            # Only in here does the parser know it.
            self.is_reusable = self._parser.should_keep_alive()
        else:
            barren = self._barren
            self._begin_head()  # an interim answer (100 Continue): the real one follows
            self._barren = barren


def _not_http(exc: Exception) -> ConnectionLostError:
    reason = exc.__context__
    if isinstance(exc, httptools.HttpParserCallbackError) and not isinstance(
        reason, Exception | None
    ):
        raise reason  # Ctrl-C, in the middle of a callback
    return ConnectionLostError(_ambiguous(exc))


def _ambiguous(reason: object) -> str:
    return f"what answers on the server's port does not speak HTTP: {reason}"


def _too_long(what: str, limit: int) -> str:
    return f"the {what} of the server's answer is longer than {limit} bytes"


class RequestWriter:
    """Makes the bytes of requests to one server.

    :param headers: sent with every request
    """

    def __init__(self, host: str, port: int, headers: Mapping[str, str]) -> None:
        self._host = authority(host, port)
        self._defaults = {
            **_DEFAULTS,
            **{name.lower(): value for name, value in headers.items()},
        }
        self._rest = self._rest_of_head(self._defaults)

    def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> list[bytes]:
        """A request, in one piece or two: a long body is not copied.

        What this is given must be fit to be sent: see ``arguments``.
        """
        rest = self._rest
        if headers:
            rest = self._rest_of_head({**self._defaults, **headers})
        if body is None:
            return [f"{method} {path}{rest}\r\n".encode("latin-1")]
        line = f"{method} {path}{rest}Content-Length: {len(body)}\r\n\r\n"
        head = line.encode("latin-1")
        return [head + body] if len(body) < _WORTH_A_COPY else [head, body]

    def _rest_of_head(self, headers: Mapping[str, str]) -> str:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f" HTTP/1.1\r\nHost: {self._host}\r\n{lines}"


def authority(host: str, port: int) -> str:
    """Host and port as a URL has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
