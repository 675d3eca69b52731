"""For the tests of programs that use a runtime: faults, and a server that has them by order.

With pytest, the fixture ``stepflow_runtime`` and what else the plugin has come by themselves
where this package is installed; see ``plugin``.
"""

from __future__ import annotations

from .fake import ECHO, FakeServer, Life
from .faults import crash, freeze, thaw, wait_restarted

__all__ = ["ECHO", "FakeServer", "Life", "crash", "freeze", "thaw", "wait_restarted"]
