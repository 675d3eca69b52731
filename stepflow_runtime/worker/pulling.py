"""Taking tasks from the server, those too that protobuf cannot read.

Contract: a task whose input is nested deeper than protobuf reads is a task all the same, one
without anything to execute. Otherwise it would end the stream, and with it the worker and
whatever that is doing; and nobody would answer for it.
"""

from __future__ import annotations

from typing import Final

import grpc.aio
from google.protobuf.message import DecodeError
from stepflow_py.proto import PullTasksRequest, TaskAssignment

__all__ = ["pull", "task_of"]

_METHOD: Final = "/stepflow.v1.TasksService/PullTasks"
_EXECUTE: Final = TaskAssignment.EXECUTE_FIELD_NUMBER

# How long the fields are that are no bytes, by their wire type.
_FIXED: Final = {1: 8, 5: 4}


def pull(
    channel: grpc.aio.Channel, request: PullTasksRequest
) -> grpc.aio.UnaryStreamCall:
    """The stream of the tasks of a queue."""
    method = channel.unary_stream(
        _METHOD,
        request_serializer=PullTasksRequest.SerializeToString,
        response_deserializer=task_of,
    )
    stream: grpc.aio.UnaryStreamCall = method(request)
    return stream


def task_of(data: bytes) -> TaskAssignment:
    """A task, without what it is to execute if that cannot be read."""
    task = TaskAssignment()
    try:
        task.ParseFromString(data)
    except DecodeError:
        task.ParseFromString(_without(_EXECUTE, data))
    return task


def _without(field: int, data: bytes) -> bytes:
    """A message of protobuf's without one of its fields."""
    kept = bytearray()
    place = 0
    while place < len(data):
        start = place
        tag, place = _number(data, place)
        kind = tag & 7
        if kind == 2:
            length, place = _number(data, place)
            place += length
        elif kind == 0:
            _, place = _number(data, place)
        else:
            place += _FIXED[kind]
        if tag >> 3 != field:
            kept += data[start:place]
    return bytes(kept)


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, place
