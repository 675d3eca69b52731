"""``python -m benchmarks``: how fast the library is, beside its peers and its limits."""

from __future__ import annotations
