"""A real etcd for one test: private, on loopback, in a directory of its own.

Contract: an etcd that a test started is gone after it, whatever state it was left in. Where
no etcd is installed, the test is skipped.
"""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

__all__ = ["Etcd", "etcd"]

_PATIENCE: Final = 20.0
_HOST: Final = "127.0.0.1"


def _free_ports() -> tuple[int, int]:
    # etcd has to be told its ports: it advertises them, and comes back to them.
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind((_HOST, 0))
        return one.getsockname()[1], other.getsockname()[1]


class Etcd:
    """An etcd that can be ended, robbed of its data, and started again."""

    def __init__(self, program: str, directory: Path) -> None:
        self._data = directory / "etcd"
        self._port, peers = _free_ports()
        self.url = f"http://{_HOST}:{self._port}"
        self._argv = [
            program,
            *("--data-dir", str(self._data)),
            *("--listen-client-urls", self.url),
            *("--advertise-client-urls", self.url),
            *("--listen-peer-urls", f"http://{_HOST}:{peers}"),
            *("--initial-advertise-peer-urls", f"http://{_HOST}:{peers}"),
            *("--initial-cluster", f"default=http://{_HOST}:{peers}"),
            *("--logger", "zap", "--log-level", "error"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(
            self._argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _PATIENCE
        while not self._is_healthy():
            assert self._process.poll() is None, "etcd ended"
            assert time.monotonic() < deadline, "etcd does not answer"
            time.sleep(0.02)

    def end(self) -> None:
        """Kill it (SIGKILL); its data stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def lose_data(self) -> None:
        shutil.rmtree(self._data)

    def living(self) -> dict[str, Any]:
        """The servers that have a lease: their ids, and what they last said."""
        prefix = "/stepflow/leases/heartbeats/"
        last = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        answer = self._ask(
            "POST", "/v3/kv/range", key=_encoded(prefix), range_end=_encoded(last)
        )
        return {
            base64.b64decode(each["key"]).decode().removeprefix(prefix): json.loads(
                base64.b64decode(each["value"])
            )
            for each in answer.get("kvs", [])
        }

    def _is_healthy(self) -> bool:
        try:
            return bool(self._ask("GET", "/health").get("health") == "true")
        except (OSError, http.client.HTTPException, ValueError):
            return False

    def _ask(self, method: str, path: str, **body: str) -> Any:
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=5)
        try:
            connection.request(method, path, json.dumps(body))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    """One that is not started yet."""
    program = shutil.which("etcd") or shutil.which("/usr/bin/etcd")
    if program is None:
        pytest.skip("no etcd is installed here (Debian: etcd-server)")
    server = Etcd(program, tmp_path)
    try:
        yield server
    finally:
        server.end()
