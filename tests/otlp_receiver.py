"""A receiver of OpenTelemetry's protocol (OTLP over gRPC), in threads, that keeps what it gets.

Contract: within the ``with`` block it listens on a port of 127.0.0.1 and answers each
request once it is in ``requests``; after it, no thread and no descriptor is left.

It is made of h2 and not of grpcio: the server compresses all that it sends with zstd,
which grpcio does not know; and grpcio's threads and descriptors stay for ever.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import zstandard
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces

__all__ = ["OtlpReceiver", "Request", "attributes"]

_SERVICE: Final = "/opentelemetry.proto.collector.{}Service/Export"
_REQUESTS: Final[Mapping[str, Callable[[], Any]]] = {
    _SERVICE.format("logs.v1.Logs"): logs.ExportLogsServiceRequest,
    _SERVICE.format("trace.v1.Trace"): traces.ExportTraceServiceRequest,
    _SERVICE.format("metrics.v1.Metrics"): metrics.ExportMetricsServiceRequest,
}

# What a gRPC message begins with: whether it is compressed, and its length.
_PREFIX: Final = 5
# An empty message is a good answer to each of the three requests.
_EMPTY: Final = bytes(_PREFIX)


@dataclass
class Request:
    """One request: its headers, and the message in it."""

    headers: Mapping[str, str]
    message: Any


@dataclass
class _Stream:
    headers: Mapping[str, str]
    body: bytearray = field(default_factory=bytearray)


class OtlpReceiver:
    """A collector that collects, and nothing else.

    :ivar requests: what came in, the oldest first
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def log_records(self) -> list[Any]:
        return [
            record
            for resource in self._all("resource_logs")
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    def spans(self) -> list[Any]:
        return [
            span
            for resource in self._all("resource_spans")
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def metrics(self) -> list[Any]:
        return [
            metric
            for resource in self._all("resource_metrics")
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]

    def resources(self) -> list[dict[str, Any]]:
        """The attributes of what each request came from."""
        names = ("resource_logs", "resource_spans", "resource_metrics")
        return [attributes(each.resource) for name in names for each in self._all(name)]

    def _all(self, name: str) -> Iterator[Any]:
        for request in list(self.requests):
            yield from getattr(request.message, name, ())

    # -- its life ------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A shutdown wakes the threads; a close would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for connection in self._connections:
            with suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._start(self._serve, connection)

    # -- a connection --------------------------------------------------------------

    def _serve(self, connection: socket.socket) -> None:
        http = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        )
        http.initiate_connection()
        streams: dict[int, _Stream] = {}
        # Either is how it looks when the client goes away.
        with connection, suppress(OSError, h2.exceptions.ProtocolError):
            connection.sendall(http.data_to_send())
            while chunk := connection.recv(65536):
                for event in http.receive_data(chunk):
                    self._take(event, http, streams)
                connection.sendall(http.data_to_send())

    def _take(
        self,
        event: h2.events.Event,
        http: h2.connection.H2Connection,
        streams: dict[int, _Stream],
    ) -> None:
        match event:
            case h2.events.RequestReceived():
                headers = {str(name): str(value) for name, value in event.headers}
                streams[event.stream_id] = _Stream(headers)
            case h2.events.DataReceived():
                streams[event.stream_id].body += event.data
                http.acknowledge_received_data(
                    event.flow_controlled_length, event.stream_id
                )
            case h2.events.StreamReset():
                streams.pop(event.stream_id, None)
            case h2.events.StreamEnded():
                self._keep(streams.pop(event.stream_id))
                _answer(http, event.stream_id)

    def _keep(self, stream: _Stream) -> None:
        message = _REQUESTS[stream.headers[":path"]]()
        message.ParseFromString(_decompressed(stream))
        self.requests.append(Request(stream.headers, message))


def _decompressed(stream: _Stream) -> bytes:
    is_compressed, message = stream.body[0], bytes(stream.body[_PREFIX:])
    assert int.from_bytes(stream.body[1:_PREFIX]) == len(message)
    if not is_compressed:
        return message
    assert stream.headers["grpc-encoding"] == "zstd"
    # A frame without its length in the header can be read as a stream only.
    return zstandard.ZstdDecompressor().decompressobj().decompress(message)


def _answer(http: h2.connection.H2Connection, stream_id: int) -> None:
    headers = [(":status", "200"), ("content-type", "application/grpc")]
    http.send_headers(stream_id, headers)
    http.send_data(stream_id, _EMPTY)
    http.send_headers(stream_id, [("grpc-status", "0")], end_stream=True)


def attributes(of: Any) -> dict[str, Any]:
    """The attributes of a log record, a span, a resource ..., as a dictionary."""
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value"))
        for each in of.attributes
    }
