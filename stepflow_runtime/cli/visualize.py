"""``stepflow-runtime visualize``: the graph of a workflow, without a server.

The graph is the result, so it goes to standard output, or into a file.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .exits import exits

__all__ = ["visualize"]


class Format(StrEnum):
    MERMAID = "mermaid"
    SVG = "svg"


def visualize(
    flow: Annotated[
        str, typer.Argument(help="The workflow: a YAML or JSON file; - for stdin.")
    ],
    format: Annotated[
        Format,
        typer.Option(
            "--format", "-f", help="As text for Mermaid, or as an SVG drawing."
        ),
    ] = Format.MERMAID,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write, instead of stdout."),
    ] = None,
) -> None:
    """Draw the steps of a workflow, and what each takes from which."""
    from .output import print_bytes, write_private

    with exits():
        drawn = _drawn(flow, format)
        if output is None:
            print_bytes(drawn)
        else:
            write_private(output, drawn)


def _drawn(flow: str, format: Format) -> bytes:
    import msgspec

    from .. import flows
    from ..graph import Graph
    from .options import flow_of

    graph = Graph.of(msgspec.json.decode(flows.load(flow_of(flow)).encoded))
    text = graph.svg() if format is Format.SVG else graph.mermaid()
    return f"{text}\n".encode()
