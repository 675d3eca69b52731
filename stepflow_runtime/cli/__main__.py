"""``python -m stepflow_runtime.cli``: the command, where its script is not on the path."""

from __future__ import annotations

from . import main

main()
