"""How the site of the documentation is made, besides what mkdocs does."""

from __future__ import annotations
