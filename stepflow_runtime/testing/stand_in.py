"""The program that stands in for ``stepflow-server``: what :class:`FakeServer` starts.

Run by path: ``python -I -S stand_in.py FOLDER [the server's arguments]``. It imports
nothing of this package and nothing but the standard library.

Contract: towards the runtime it does what the server does: log lines as JSON on standard
output, the port on a line of its own among them, health requests, runs by ``POST /runs``,
exit code 0 on SIGTERM. No step is executed: a run's output is its input, or what the script
says. How each life goes is read from ``FOLDER/script.json``; what is to happen meanwhile
comes through a socket, ``FOLDER/<life>/control``, which is there as soon as the life is. What
it was asked to run is written to ``FOLDER/inputs``, a line each, before anything else happens
to it. It is the main thread that ends the process, whoever asks for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_API = "/api/v1"

# Statuses and codes as they travel: numbers.
_RUNNING, _COMPLETED, _FAILED, _CANCELLED = 1, 2, 3, 4
_COMPONENT_FAILED = 3

_MOST_HEAD = 64 * 1024

_writing = {1: threading.Lock(), 2: threading.Lock()}


class End:
    """How and when this life ends by itself; asked for by any thread, done by the main one."""

    def __init__(self) -> None:
        self._code = 0
        self._is_asked_for = threading.Event()

    def ask(self, code: int) -> None:
        """Have it end: with an exit code, or by a signal. Does not return."""
        self._code = code
        self._is_asked_for.set()
        threading.Event().wait()

    def wait(self, seconds: float | None) -> None:
        """Let the others work; returns after so many seconds, unless it is to end."""
        if self._is_asked_for.wait(seconds):
            self.come(self._code)

    def come(self, code: int) -> None:
        if code < 0:
            if code != -signal.SIGKILL:
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
            signal.pause()
        os._exit(code)


def main(folder: str, arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    control, place = _open_control(folder)
    life = _begin_life(folder, place)
    if life["ignores_sigterm"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end = End()
    runs = Runs(life, os.path.join(folder, "inputs"), end)
    _in_thread(_accept, control, lambda connection: _take_orders(connection, end))
    end.wait(life["start_after"])
    if (reason := life["fails"] or _refusal(arguments)) is not None:
        write_log("ERROR", reason)
        os._exit(1)
    listener = socket.create_server(("127.0.0.1", _port_in(arguments)), backlog=128)
    _in_thread(_accept, listener, lambda connection: _converse(connection, life, runs))
    write_flood(life["log_lines"], 100, 1)
    port = listener.getsockname()[1]
    write_log("INFO", f"fake server listening on 127.0.0.1:{port}")
    _write(1, b'{"port":%d}\n' % port)
    end.wait(life["crash_after"])
    end.come(life["exit_code"])


def _open_control(folder: str) -> tuple[socket.socket, str]:
    """The socket that a test speaks to, in a folder that is nobody's life yet."""
    place = os.path.join(folder, f".{os.getpid()}")
    os.mkdir(place)
    control = socket.socket(socket.AF_UNIX)
    control.bind(os.path.join(place, "control"))
    control.listen()
    return control, place


def _begin_life(folder: str, place: str) -> dict[str, Any]:
    """Take the next number; return how this life is to go."""
    with open(os.path.join(folder, "script.json"), encoding="utf-8") as file:
        lives: list[dict[str, Any]] = json.load(file)
    number = 1
    while True:
        try:
            # Fails if that one is there: it is not empty.
            os.rename(place, os.path.join(folder, str(number)))
            return lives[min(number, len(lives)) - 1]
        except OSError:
            number += 1


def _refusal(arguments: list[str]) -> str | None:
    """Why it cannot do what its configuration asks for."""
    if "--config-stdin" not in arguments:
        return None
    storage = json.load(sys.stdin).get("storageConfig") or {}
    if storage.get("type", "inMemory") == "inMemory":
        return None
    return "FakeServer keeps its runs in memory: leave storage= and storageConfig out"


def _port_in(arguments: list[str]) -> int:
    """The server's own flag; what else there is means nothing to a stand-in."""
    if "--port" in arguments:
        return int(arguments[arguments.index("--port") + 1])
    return 0


# -- output ----------------------------------------------------------------------------


def write_log(level: str, message: str) -> None:
    _write(1, _log_line(level, message))


def write_flood(lines: int, size: int, fd: int) -> None:
    """Write so many lines, as fast as they are taken. Each tells its number."""
    for number in range(lines):
        text = f"line {number + 1} of {lines} ".ljust(size, ".")
        _write(fd, _log_line("INFO", text) if fd == 1 else text.encode() + b"\n")


def _log_line(level: str, message: str) -> bytes:
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    entry = {
        "timestamp": f"{stamp}.{int(now % 1 * 1e6):06}+00:00",
        "level": level,
        "target": "stepflow_fake",
        "file": "stand_in.py",
        "line": 1,
        "message": message,
    }
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _write(fd: int, data: bytes) -> None:
    with _writing[fd]:
        while data:
            data = data[os.write(fd, data) :]


# -- what a test says ------------------------------------------------------------------


def _take_orders(connection: socket.socket, end: End) -> None:
    with connection, connection.makefile("rwb") as channel:
        for line in channel:
            order = json.loads(line)
            if order["do"] == "flood":
                write_flood(order["lines"], order["size"], order["fd"])
            elif order["do"] == "crash":
                end.ask(order["code"])
            channel.write(json.dumps({"pid": os.getpid()}).encode() + b"\n")
            channel.flush()


# -- what the runtime asks -------------------------------------------------------------


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, status: str, message: str) -> None:
        self.code = code
        self.answer = {"error": {"code": code, "message": message, "status": status}}


class Runs:
    """The runs of one life, in memory."""

    def __init__(self, life: dict[str, Any], inputs: str, end: End) -> None:
        self._life = life
        self._inputs = inputs
        self._end = end
        self._lock = threading.Lock()
        self._runs: dict[str, dict[str, Any]] = {}

    def begin(self, asked: dict[str, Any], _: dict[str, str]) -> dict[str, Any]:
        with self._lock:
            number = len(self._runs) + 1
            run = {
                "id": f"{os.getpid():08x}-{number:08x}",
                "flow": asked["flowId"],
                "inputs": asked["input"],
                "status": _RUNNING,
                "created": _now(),
                "until": time.monotonic() + self._life["run_seconds"],
                "over": threading.Event(),
            }
            self._runs[run["id"]] = run
            with open(self._inputs, "ab", buffering=0) as file:
                file.write(b"".join(_line_of(each) for each in run["inputs"]))
        write_log("INFO", f"run {run['id']} with {len(run['inputs'])} inputs")
        if number == self._life["crash_on_run"]:
            self._end.ask(self._life["exit_code"])
        patience = asked.get("timeoutSecs", 300) if asked.get("wait") else 0
        self._wait(run, patience)
        is_over = run["status"] != _RUNNING
        return {"summary": _summary(run), "results": self._results(run) * is_over}

    def tell(self, run_id: str, query: dict[str, str]) -> dict[str, Any]:
        run = self._of(run_id)
        if query.get("wait") == "true":
            self._wait(run, float(query.get("timeoutSecs", 300)))
        self._wait(run, 0)
        return {"summary": _summary(run), "steps": []}

    def items(self, run_id: str, _: dict[str, str]) -> dict[str, Any]:
        run = self._of(run_id)
        self._wait(run, 0)
        return {"results": self._results(run)}

    def cancel(self, run_id: str) -> dict[str, Any]:
        run = self._of(run_id)
        with self._lock:
            if run["status"] == _RUNNING:
                run["status"] = _CANCELLED
                run["over"].set()
        return {"summary": _summary(run)}

    def all(self) -> dict[str, Any]:
        return {"runs": [_summary(each) for each in reversed(self._runs.values())]}

    def _of(self, run_id: str) -> dict[str, Any]:
        if run_id not in self._runs:
            raise Refusal(404, "NOT_FOUND", f"run '{run_id}' not found")
        return self._runs[run_id]

    def _wait(self, run: dict[str, Any], patience: float) -> None:
        left = run["until"] - time.monotonic()
        run["over"].wait(max(min(left, patience), 0.0))
        with self._lock:
            if run["status"] == _RUNNING and left <= patience:
                failed = self._life["error"] is not None
                run["completed"] = _now()
                run["status"] = _FAILED if failed else _COMPLETED

    def _results(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        if run["status"] == _FAILED:
            end = {"errorMessage": self._life["error"], "errorCode": _COMPONENT_FAILED}
            return [_item(run, index, end) for index, _ in enumerate(run["inputs"])]
        if run["status"] != _COMPLETED:
            return [_item(run, index, {}) for index, _ in enumerate(run["inputs"])]
        return [
            _item(run, index, {"output": self._life.get("output", each)})
            for index, each in enumerate(run["inputs"])
        ]


def _item(run: dict[str, Any], index: int, end: dict[str, Any]) -> dict[str, Any]:
    return {"itemIndex": index, "status": run["status"], **end}


def _summary(run: dict[str, Any]) -> dict[str, Any]:
    total, status = len(run["inputs"]), run["status"]
    counts = {
        "completed": total * (status == _COMPLETED),
        "failed": total * (status == _FAILED),
        "running": total * (status in (_RUNNING, _CANCELLED)),
    }
    return {
        "runId": run["id"],
        "rootRunId": run["id"],
        "flowId": run["flow"],
        "status": status,
        "items": {"total": total, "cancelled": 0, **counts},
        "createdAt": run["created"],
        "completedAt": run.get("completed"),
    }


def _line_of(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _answer(
    method: str, target: str, body: bytes, life: dict[str, Any], runs: Runs
) -> dict[str, Any]:
    path, _, text = target.partition("?")
    query = dict(each.partition("=")[::2] for each in text.split("&"))
    match (method, *path.removeprefix(_API).strip("/").split("/")):
        case ("GET", "health"):
            if not life["is_healthy"]:
                threading.Event().wait()
            return {"status": "healthy", "timestamp": _now(), "build": {}}
        case ("POST", "flows"):
            stored = not json.loads(body).get("dryRun", False)
            diagnostics: dict[str, Any] = {"diagnostics": []}
            digest = hashlib.sha256(body).hexdigest()
            return {"flowId": digest, "stored": stored, "diagnostics": diagnostics}
        case ("POST", "blobs"):
            return {"blobId": hashlib.sha256(body).hexdigest()}
        case ("POST", "runs"):
            return runs.begin(json.loads(body), query)
        case ("GET", "runs"):
            return runs.all()
        case ("GET", "runs", run_id):
            return runs.tell(run_id, query)
        case ("GET", "runs", run_id, "items"):
            return runs.items(run_id, query)
        case ("GET", "runs", _, "steps"):
            return {"steps": []}
        case ("POST", "runs", run_id, "cancel"):
            return runs.cancel(run_id)
    raise Refusal(501, "UNIMPLEMENTED", f"FakeServer does not do {method} {path}")


# -- HTTP/1.1, as far as the runtime speaks it ------------------------------------------


def _converse(connection: socket.socket, life: dict[str, Any], runs: Runs) -> None:
    with connection, connection.makefile("rb") as incoming:
        for method, target, body in _requests(incoming):
            code, answer = 200, {}
            try:
                answer = _answer(method, target, body, life, runs)
            except Refusal as refusal:
                code, answer = refusal.code, refusal.answer
            encoded = json.dumps(answer).encode()
            head = (
                f"HTTP/1.1 {code} -\r\ncontent-type: application/json\r\n"
                f"content-length: {len(encoded)}\r\n\r\n"
            )
            connection.sendall(head.encode() + encoded)


def _requests(incoming: Any) -> Iterator[tuple[str, str, bytes]]:
    while line := incoming.readline(_MOST_HEAD):
        method, target, _ = line.decode("latin-1").split(" ")
        length = 0
        while (header := incoming.readline(_MOST_HEAD)) not in (b"\r\n", b""):
            name, _, value = header.partition(b":")
            if name.strip().lower() == b"content-length":
                length = int(value)
        yield method, target, incoming.read(length)


# -- threads ---------------------------------------------------------------------------


def _accept(listener: socket.socket, serve: Callable[[socket.socket], object]) -> None:
    while True:
        connection, _ = listener.accept()
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _in_thread(_until_gone, serve, connection)


def _until_gone(
    serve: Callable[[socket.socket], object], connection: socket.socket
) -> None:
    try:
        serve(connection)
    except ConnectionError:
        pass  # whoever asked has gone


def _in_thread(work: Callable[..., object], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
