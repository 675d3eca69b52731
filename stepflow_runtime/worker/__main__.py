"""The worker's program: a process that has a worker, and another one if that dies.

Contract: what it is run by is ``python -P __main__.py JOB``, the job being JSON (see
``job.py``). A worker that ends before it was ready is not started again: then this process
ends with its code, or, when there has been one that was ready, ends the server. So nobody
waits for a worker that is not coming.

This process imports nothing but what the interpreter has already, and no code of the
user's: a fork of it begins anew, with the code as it is by then, at no cost.
"""

from __future__ import annotations

import os
import signal
import sys
import time

# A sweep of the server's session may kill the worker a moment before this process.
_PAUSE = 0.1


def main() -> None:
    if not hasattr(os, "fork"):
        _work(None)
        return
    # Known from the start: when it has died, another process is our parent, and whoever
    # that is must not be taken for it.
    server = os.getppid()
    code, was_ready = _run_worker()
    if not was_ready:
        sys.exit(code)
    while was_ready:
        time.sleep(_PAUSE)
        if os.getppid() != server:
            return
        _say(f"the worker of components= {_told(code)}, and is started again")
        code, was_ready = _run_worker()
    if os.getppid() == server:
        _say("the worker of components= cannot be started again: the server is ended")
        os.kill(server, signal.SIGKILL)


def _run_worker() -> tuple[int, bool]:
    """Have a worker, and wait for its end: its exit code, and whether it was ever ready."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _work(write)
        os._exit(0)
    os.close(write)
    was_ready = bool(os.read(read, 1))
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), was_ready


def _work(ready: int | None) -> None:
    # What functions print, also by C, comes into the log; the server drops standard output.
    os.dup2(2, 1)
    # So that this package is found wherever it is, and nothing else before the path is set.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path.append(root)
    from stepflow_runtime.worker.serving import work

    code = 1
    try:
        code = work(sys.argv[1], ready)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of functions that hang, and what they have left, must not keep it.
        os._exit(code)


def _told(code: int) -> str:
    if code >= 0:
        return f"has ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())


if __name__ == "__main__":
    main()
