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

_VERSIONS: Final = frozenset({"1.0", "1.1"})

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
        self.begin()

    def begin(self) -> None:
        """Wait for the answer to the next request."""
        self.is_complete = self.is_reusable = self.has_begun = self.has_head = False
        self._begin_head()

    def _begin_head(self) -> None:
        self.status = 0
        self._content_type = b""
        self._body: list[bytes] = []
        self._length: int | None = None
        self._is_chunked = False
        self._received = 0
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
            if not self.is_complete:
                raise _refused(exc) from exc
            # It was whole, and nobody asked for what follows.
            self.is_reusable = False
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
        return whole

    def _check_size(self, size: int, received_before: int) -> None:
        if self._received > received_before:
            self._barren = 0
            if self._received > self._longest_body:
                raise _too_long("body", self._longest_body)
        else:
            self._barren += size
            if self._barren > LONGEST_HEAD:
                raise _too_long("head", LONGEST_HEAD)

    # -- what the parser tells -------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.is_complete:
            raise _Excess

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head:
            return  # a trailer
        name = name.lower()
        if name == b"content-type":
            self._content_type = value
        elif name == b"content-length":
            self._length = int(value)
        elif name == b"transfer-encoding":
            self._is_chunked = True
            if value.strip().lower() != b"chunked":
                raise _Ambiguous("an encoding that was not asked for")

    def on_headers_complete(self) -> None:
        parser = self._parser
        self.status = status = parser.get_status_code()
        if status < 100 or status == 101:
            raise _Ambiguous(f"the status {status}")
        if parser.get_http_version() not in _VERSIONS:
            raise _Ambiguous(f"HTTP {parser.get_http_version()}")
        if self._length is not None and self._length > self._longest_body:
            raise _too_long("body", self._longest_body)
        self.has_head = status >= 200

    def on_body(self, body: bytes) -> None:
        self._received += len(body)
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


class _Excess(Exception):
    """Something follows an answer."""


class _Ambiguous(Exception):
    """An answer that others may read in another way."""


def _refused(exc: Exception) -> ConnectionLostError:
    # What a callback raised comes as the parser's error, with the real one as its context.
    reason = exc.__context__ or exc
    if isinstance(reason, ConnectionLostError):
        return reason
    return ConnectionLostError(
        f"what answers on the server's port does not speak HTTP: {reason}"
    )


def _too_long(what: str, limit: int) -> ConnectionLostError:
    return ConnectionLostError(
        f"the {what} of the server's answer is longer than {limit} bytes"
    )


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
