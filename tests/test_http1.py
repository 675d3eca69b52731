"""Requests as bytes, and answers from bytes: whatever a server sends, and however it is cut.

No sockets in here; what a server can do with those is in test_hostile_server.py.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepflow_runtime import ConnectionLostError
from stepflow_runtime.transport import http1
from stepflow_runtime.transport.http1 import LONGEST_HEAD, AnswerReader, RequestWriter

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"
OK = HEAD + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"

RECEIVED_AT_ONCE = 64 * 1024  # what the transport gives to a reader, of a head
NOT_LONG = 20.0  # seconds, on whichever machine: what is quadratic takes minutes


class Read(NamedTuple):
    status: int
    content_type: str
    body: bytes
    is_reusable: bool


def read(
    parts: Iterable[bytes], reader: AnswerReader | None = None, *, ends: bool = False
) -> Read:
    """Read one answer as a connection does: until it is complete."""
    reader = reader or AnswerReader()
    reader.begin()
    for part in parts:
        assert not reader.is_complete
        reader.feed(part)
    if ends and not reader.is_complete:
        reader.end()
    assert reader.is_complete
    return Read(
        reader.status, reader.content_type, reader.take_body(), reader.is_reusable
    )


def refusal(parts: Iterable[bytes], reader: AnswerReader | None = None) -> str:
    reader = reader or AnswerReader()
    with pytest.raises(ConnectionLostError) as caught:
        for part in parts:
            reader.feed(part)
    assert not caught.value.unsent
    assert not reader.is_complete
    assert not reader.is_reusable
    return str(caught.value)


def kept_by(reader: AnswerReader) -> int:
    return sum(map(sys.getsizeof, reader._body)) + sys.getsizeof(reader._body)


# -- answers that are well -------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An answer, as bytes and as what it means."""

    raw: bytes
    meaning: Read
    needs_end: bool


TOKENS = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=12)
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=12)
FRAMING = {"content-length", "transfer-encoding", "connection", "proxy-connection"}
# What a parser treats in ways of its own.
SPECIAL = FRAMING | {"upgrade", "content-type"}
HEADERS = st.lists(
    st.tuples(TOKENS.filter(lambda name: name.lower() not in SPECIAL), VALUES),
    max_size=4,
)
MEDIA_TYPES = st.sampled_from(
    ["", "application/json", "Text/Event-Stream; x=y", "a/b;c"]
)
BODIES = st.binary(max_size=60) | st.just(OK) | st.binary(min_size=300, max_size=400)


def lines(headers: Iterable[tuple[str, str]]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers).encode()


@st.composite
def interim_answers(draw: st.DrawFn) -> bytes:
    statuses = draw(st.lists(st.sampled_from([100, 102, 103, 150, 199]), max_size=3))
    return b"".join(
        f"HTTP/1.1 {status} Wait\r\n".encode()
        + lines(draw(HEADERS))
        + draw(st.sampled_from([b"", b"Content-Type: interim/answer\r\n"]))
        + b"\r\n"
        for status in statuses
    )


@st.composite
def chunked_bodies(draw: st.DrawFn, body: bytes) -> bytes:
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=5)))
    pieces = [
        piece
        for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)
        if (piece := body[start:end])
    ]
    extension = st.sampled_from([b"", b";a", b";a=b", b';a="b;\\"c"', b";a=b;c=d"])
    sizes = st.sampled_from(["%x", "%X", "%05x"])
    raw = b"".join(
        (draw(sizes) % len(piece)).encode()
        + draw(extension)
        + b"\r\n"
        + piece
        + b"\r\n"
        for piece in pieces
    )
    trailers = draw(HEADERS)
    if draw(st.booleans()):
        trailers = [*trailers, ("Content-Type", "trailing/type")]
    return raw + b"0" + draw(extension) + b"\r\n" + lines(trailers) + b"\r\n"


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    status = draw(st.sampled_from([200, 201, 204, 304, 400, 404, 413, 500, 599, 999]))
    version = draw(st.sampled_from(["1.1", "1.1", "1.0"]))
    media_type = draw(MEDIA_TYPES)
    body = draw(BODIES)
    headers = draw(HEADERS)
    if media_type:
        headers.append(
            (draw(st.sampled_from(["content-type", "CONTENT-TYPE"])), media_type)
        )
    options = ["", "close", "keep-alive"]
    if version == "1.1":  # in 1.0, the parser takes the word of the first
        options.append("keep-alive, close")
    connection = draw(st.sampled_from(options))
    if connection:
        headers.append(("Connection", connection))
    framing = draw(st.sampled_from(["length", "chunked", "end"]))
    raw_body = body
    if status in (204, 304):
        framing, body, raw_body = "none", b"", b""
    elif framing == "length":
        headers.append(("Content-Length", str(len(body))))
    elif framing == "chunked" and version == "1.1":
        headers.append(
            ("Transfer-Encoding", draw(st.sampled_from(["chunked", "Chunked"])))
        )
        raw_body = draw(chunked_bodies(body))
    else:
        framing = "end"
    keeps = (
        connection == "keep-alive" if version == "1.0" else "close" not in connection
    )
    head = f"HTTP/{version} {status} {draw(VALUES)}\r\n".encode()
    return Answer(
        draw(interim_answers())
        + head
        + lines(draw(st.permutations(headers)))
        + b"\r\n"
        + raw_body,
        Read(
            status,
            media_type.partition(";")[0].strip().lower(),
            body,
            keeps and framing != "end",
        ),
        framing == "end",
    )


@st.composite
def cut(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    if draw(st.integers(0, 3)) == 0:
        return [raw[i : i + 1] for i in range(len(raw))]
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=6)))
    parts = zip([0, *cuts], [*cuts, len(raw)], strict=True)
    return [raw[start:end] for start, end in parts if start < end]


@given(st.data(), answers())
def test_an_answer_means_the_same_wherever_it_is_cut(
    data: st.DataObject, answer: Answer
) -> None:
    parts = data.draw(cut(answer.raw))
    assert read(parts, ends=answer.needs_end) == answer.meaning


@given(st.data(), st.lists(answers(), min_size=1, max_size=6))
def test_a_reader_that_was_used_reads_like_a_new_one(
    data: st.DataObject, several: list[Answer]
) -> None:
    reader = AnswerReader()
    for answer in several:
        parts = data.draw(cut(answer.raw))
        assert read(parts, reader, ends=answer.needs_end) == answer.meaning
        if not reader.is_reusable:
            break


@given(
    st.data(), answers(), st.sampled_from([OK, b"x", b"\0" * 9, b"HTTP/1.1 500 X\r\n"])
)
def test_what_follows_an_answer_is_never_seen(
    data: st.DataObject, answer: Answer, excess: bytes
) -> None:
    if answer.needs_end:
        return  # all that follows is its body
    *parts, last = data.draw(cut(answer.raw))
    reader = AnswerReader()
    found = read([*parts, last + excess], reader)
    assert found == answer.meaning._replace(is_reusable=False)
    assert reader.take_body() == b""


@given(st.data(), answers())
def test_an_answer_that_breaks_off_is_none(data: st.DataObject, answer: Answer) -> None:
    if answer.needs_end:
        return
    end = data.draw(st.integers(0, len(answer.raw) - 1))
    reader = AnswerReader()
    if raw := answer.raw[:end]:
        reader.feed(raw)
    with pytest.raises(ConnectionLostError, match="closed the connection"):
        reader.end()
    assert not reader.is_reusable
    assert reader.has_begun == bool(raw)


def test_what_is_missing_is_known_where_it_was_told() -> None:
    reader = AnswerReader()
    assert reader.missing == 0
    reader.feed(HEAD + b"Content-Length: 10\r\n\r\nabc")
    assert reader.missing == 7
    assert reader.take_body() == b"abc"
    reader.feed(b"defg")
    assert (reader.missing, reader.take_body()) == (3, b"defg")
    reader.feed(b"hij")
    assert (reader.missing, reader.is_complete) == (0, True)


# -- answers that can be read in two ways ----------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"Content-Length: 2, 2\r\n\r\nab",
        HEAD + b"Content-Length: +2\r\n\r\nab",
        HEAD + b"Content-Length: -1\r\n\r\nab",
        HEAD + b"Content-Length: 0x2\r\n\r\nab",
        HEAD + b"Content-Length: 1 2\r\n\r\nab",
        HEAD + b"Content-Length: 1_2\r\n\r\nab",
        HEAD + b"Content-Length: \r\n\r\nab",
        HEAD + b"Content-Length : 2\r\n\r\nab",
        HEAD + b"Content-Length: %d\r\n\r\nab" % (2**64 + 2),
        HEAD + b"Content-Length: %s\r\n\r\nab" % (b"9" * 5000),
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"Content-Length: 2\r\n\r\n0\r\n\r\n",
        CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\nab",
        HEAD + b"Transfer-Encoding: identity\r\n\r\nab",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: \r\n\r\nab",
        HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        (
            b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        ),
        b"HTTP/1.1 100 Continue\r\nContent-Length: %d\r\n\r\n%s" % (len(OK), OK) + OK,
        b"HTTP/1.1 103 X\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + OK,
        b"HTTP/1.1 100 Continue\r\nConnection: close\r\n\r\n" + OK,
        b"HTTP/1.1 204 No Content\r\nContent-Length: %d\r\n\r\n%s" % (len(OK), OK),
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + OK,
        b"HTTP/1.1 000 X\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 99 X\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 099 X\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 1000 X\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/0.9 200 OK\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nab",
        b"http/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab",
        b" HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab",
        b"<html>it works</html>",
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"\x16\x03\x01\x00\xff",
        HEAD + b"X: a\r\n folded\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"X: a\nContent-Length: 2\r\n\r\nab",
        HEAD + b"X: a\rContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab",
        HEAD + b"X: a\0\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"X\0: a\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b": a\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"X\r\nContent-Length: 2\r\n\r\nab",
        CHUNKED + b"\r\n2\nab\n0\n\n",
        CHUNKED + b"\r\n2;a\nb\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"\r\n-2\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"\r\n0x2\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"\r\n2 \r\nab\r\n0\r\n\r\n",
        CHUNKED + b"\r\n\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"\r\n2\r\nabXX0\r\n\r\n",
        CHUNKED + b"\r\n2\r\nabc\r\n0\r\n\r\n",
        CHUNKED + b"\r\n10000000000000002\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"\r\n0\r\nContent-Length: 5\r\n\r\n",
    ],
)
@pytest.mark.parametrize("bytewise", [False, True])
def test_what_has_more_than_one_meaning_is_refused(raw: bytes, bytewise: bool) -> None:
    parts = [raw[i : i + 1] for i in range(len(raw))] if bytewise else [raw]
    assert "does not speak HTTP" in refusal(parts)


@pytest.mark.parametrize(
    "raw",
    [
        CHUNKED + b"\r\n0\r\nConnection: close\r\n\r\n",
        CHUNKED + b"\r\n0\r\nTransfer-Encoding: gzip\r\n\r\n",
        HEAD
        + b"Connection: close\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_whoever_is_in_doubt_does_not_use_the_connection_again(raw: bytes) -> None:
    assert read([raw]) == (200, "", b"", False)


def test_an_offer_of_another_protocol_is_not_taken() -> None:
    raw = OK.replace(b"\r\n", b"\r\nUpgrade: h2c\r\nConnection: upgrade\r\n", 1)
    assert read([raw])[:3] == (200, "application/json", b"{}")


@pytest.mark.parametrize(
    "around", [KeyError("mine"), ConnectionLostError("", unsent=True)]
)
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "Expected HTTP/"),
        (b"HTTP/1.1 000 X\r\n\r\n", "the status 0"),
        (HEAD + b"Content-Length: 101\r\n\r\n", "longer than 100 bytes"),
    ],
)
def test_what_the_caller_is_handling_is_not_taken_for_the_reason(
    around: Exception, raw: bytes, words: str
) -> None:
    """An exception raised inside an ``except`` gets that one for its context."""
    try:
        raise around
    except Exception:  # noqa: BLE001 - that is the point
        assert words in refusal([raw], AnswerReader(longest_body=100))


def test_ctrl_c_in_the_middle_of_an_answer_is_not_swallowed() -> None:
    class Interrupted(AnswerReader):
        def on_headers_complete(self) -> None:
            raise KeyboardInterrupt

    reader = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        reader.feed(OK)
    assert not reader.is_reusable


# -- anything at all -------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    [
        *(
            HEAD,
            CHUNKED,
            OK,
            b"\r\n",
            b"\n",
            b"\r",
            b"\0",
            b": ",
            b"HTTP/1.1 ",
            b"HTTP/1.0 ",
        ),
        *(
            b"200",
            b"204",
            b"100",
            b"101",
            b"304",
            b" ",
            b"0\r\n\r\n",
            b"2\r\nab\r\n",
            b"ffff",
        ),
        *(
            b"Content-Length: 5\r\n",
            b"Content-Length: 0\r\n",
            b"Content-Length:",
            b";a=b",
        ),
        *(
            b"Transfer-Encoding: chunked\r\n",
            b"Connection: close\r\n",
            b"Upgrade: x\r\n",
        ),
        *(
            b"Connection: upgrade\r\n",
            b"Content-Type: a/b\r\n",
            b"\xff\xfe",
            b'"',
            b"GET ",
        ),
    ]
)
ANYTHING = st.lists(FRAGMENTS | st.binary(max_size=8), min_size=1, max_size=15)


@given(ANYTHING, st.booleans(), st.sampled_from([3, 50, 1000]))
@example([HEAD, b"\r\n", b"abcdefgh"], False, 3)
def test_whatever_comes_is_an_answer_or_a_lost_connection(
    parts: list[bytes], ends: bool, longest_body: int
) -> None:
    reader = AnswerReader(longest_body)
    try:
        for part in parts:
            reader.feed(part)
            assert sum(map(len, reader._body)) <= longest_body
            if reader.is_complete:
                break
        else:
            if not ends:
                return
            reader.end()
    except ConnectionLostError as exc:
        assert not exc.unsent
        assert not reader.is_reusable
    else:
        assert reader.has_head
        assert 200 <= reader.status <= 999
        assert len(reader.take_body()) <= longest_body


@given(ANYTHING, st.integers(1, 40))
def test_the_end_of_one_answer_does_not_depend_on_the_cuts(
    parts: list[bytes], size: int
) -> None:
    """Any bytes: in one piece or in many, what is read of them is the same."""

    def outcome(pieces: Iterable[bytes]) -> object:
        reader = AnswerReader()
        try:
            for piece in pieces:
                reader.feed(piece)
                if reader.is_complete:
                    break
            else:
                reader.end()
        except ConnectionLostError:
            return None
        return reader.status, reader.content_type, reader.take_body()

    raw = b"".join(parts)
    assert outcome([raw]) == outcome(
        raw[i : i + size] for i in range(0, len(raw), size)
    )


# -- what has no end -------------------------------------------------------------------


def endlessly(start: bytes, again: bytes, size: int) -> Iterator[bytes]:
    """``start``, and ``again`` a thousand times 64 KB; in pieces of ``size``."""
    yield start
    some = again * (2 * max(size, len(again)) // len(again))
    offset = 0
    for _ in range(1000 * RECEIVED_AT_ONCE // size):
        yield some[offset : offset + size]
        offset = (offset + size) % len(again)


@pytest.mark.parametrize("size", [1, 1000, RECEIVED_AT_ONCE])
@pytest.mark.parametrize(
    ("start", "again"),
    [
        (HEAD, b"X-Y: zzzzzzzzzzzzzzzz\r\n"),
        (HEAD + b"X: ", b"y"),
        (HEAD, b"x"),
        (b"HTTP/1.1 200 ", b"x"),
        (b"", b"\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"),
        (b"", b"HTTP/1.1 199 X\r\nContent-Length: 0\r\n\r\n"),
        (CHUNKED + b"\r\n0\r\n", b"X-Y: zzzzzzzzzzzzzzzz\r\n"),
        (CHUNKED + b"\r\n0\r\nX: ", b"y"),
        (CHUNKED + b"\r\n2;a", b"b"),
        (CHUNKED + b'\r\n2;a="', b"b"),
        (CHUNKED + b"\r\n2", b";a=b"),
        (CHUNKED + b"\r\n", b"0"),
    ],
)
def test_what_has_no_end_is_refused_soon_and_not_kept(
    start: bytes, again: bytes, size: int
) -> None:
    fed = 0

    def counted() -> Iterator[bytes]:
        nonlocal fed
        for part in endlessly(start, again, size):
            fed += len(part)
            yield part

    began = time.monotonic()
    reader = AnswerReader()
    words = refusal(counted(), reader)
    assert time.monotonic() - began < NOT_LONG
    assert f"the head of the server's answer is longer than {LONGEST_HEAD}" in words
    assert fed <= len(start) + LONGEST_HEAD + max(size, RECEIVED_AT_ONCE)
    assert kept_by(reader) < 1000


@pytest.mark.parametrize("start", [HEAD, HEAD + b"X: "])
def test_a_hundred_megabytes_of_headers_are_not_kept(start: bytes) -> None:
    again = b"x" * RECEIVED_AT_ONCE if start.endswith(b" ") else b"X-Y: zz\r\n" * 7000
    tracemalloc.start()
    try:
        refusal([start, *[again] * (100_000_000 // len(again))])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * LONGEST_HEAD


def test_a_body_that_is_announced_too_long_is_not_begun() -> None:
    reader = AnswerReader(longest_body=100)
    head = HEAD + b"Content-Length: %d\r\n\r\n"
    assert read([head % 100 + b"x" * 100], reader).body == b"x" * 100
    reader.begin()
    assert "the body of the server's answer is longer than 100" in refusal(
        [head % 101], reader
    )
    assert "body" in refusal([head % (http1.LONGEST_BODY + 1)])
    assert "body" in refusal([head % (2**64 - 1)])


@pytest.mark.parametrize(
    ("start", "end"),
    [(CHUNKED + b"\r\n%x\r\n", b"\r\n0\r\n\r\n"), (HEAD + b"\r\n", b"")],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_that_grows_too_long_is_given_up(
    start: bytes, end: bytes, size: int
) -> None:
    start = start % 101 if b"%" in start else start
    raw = start + b"x" * 101 + end
    reader = AnswerReader(longest_body=100)
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert "the body of the server's answer is longer than 100" in refusal(
        parts, reader
    )
    assert len(reader.take_body()) <= 100


def test_a_body_of_small_chunks_takes_little_more_than_its_bytes() -> None:
    part = b"2\r\nab\r\n" * 9000
    reader = AnswerReader()
    reader.feed(CHUNKED + b"\r\n")
    for _ in range(100):
        reader.feed(part)
    assert kept_by(reader) < 1.5 * 1_800_000
    for _ in range(20_000):
        reader.feed(b"2\r\nab\r\n")
    assert kept_by(reader) < 1.5 * 1_840_000
    reader.feed(b"0\r\n\r\n")
    assert reader.take_body() == b"ab" * 920_000


def test_what_was_taken_of_a_body_counts_no_more() -> None:
    """A stream of events may go on for months."""
    reader = AnswerReader(longest_body=100)
    reader.feed(CHUNKED + b"\r\n")
    for _ in range(50):
        reader.feed(b"50\r\n" + b"x" * 80 + b"\r\n")
        assert reader.take_body() == b"x" * 80
    reader.feed(b"5a\r\n" + b"x" * 90 + b"\r\n")
    assert "body" in refusal([b"5a\r\n" + b"x" * 90 + b"\r\n"], reader)


# -- requests --------------------------------------------------------------------------


def test_requests_are_bytes() -> None:
    write = RequestWriter("::1", 80, {"Authorization": "x"}).request
    assert write("GET", "/a?b", None, {}) == [
        (
            b"GET /a?b HTTP/1.1\r\nHost: [::1]:80\r\naccept: application/json\r\n"
            b"content-type: application/json\r\nauthorization: x\r\n\r\n"
        )
    ]
    (raw,) = write("POST", "/", b"{}", {"accept": "a/b", "x": "y"})
    head, _, body = raw.partition(b"\r\n\r\n")
    assert body == b"{}"
    assert head.split(b"\r\n")[1:] == [
        *(b"Host: [::1]:80", b"accept: a/b", b"content-type: application/json"),
        *(b"authorization: x", b"x: y", b"Content-Length: 2"),
    ]
    assert write("POST", "/", b"", {})[0].endswith(b"\r\nContent-Length: 0\r\n\r\n")


def test_a_long_body_is_not_copied() -> None:
    write = RequestWriter("127.0.0.1", 1, {}).request
    body = b"x" * 1_000_000
    head, sent = write("POST", "/", body, {})
    assert sent is body
    assert head.endswith(b"\r\nContent-Length: 1000000\r\n\r\n")


@given(st.sampled_from(["GET", "POST", "DELETE"]), st.none() | st.binary(max_size=100))
def test_a_request_is_read_as_it_was_meant(method: str, body: bytes | None) -> None:
    import httptools

    class Reader:
        body = b""
        is_complete = False

        def on_url(self, url: bytes) -> None:
            self.url = url

        def on_body(self, body: bytes) -> None:
            self.body += body

        def on_message_complete(self) -> None:
            self.is_complete = True

    reader = Reader()
    parser = httptools.HttpRequestParser(reader)
    for part in RequestWriter("h", 1, {}).request(method, "/x%20y?z", body, {}):
        parser.feed_data(part)
    assert parser.get_method() == method.encode()
    assert (reader.url, reader.body, reader.is_complete) == (
        b"/x%20y?z",
        body or b"",
        True,
    )
    assert parser.should_keep_alive()
