"""``stepflow-runtime visualize``: the graph of a workflow, without a server.

The graph is the result, so it goes to standard output, or into a file. Exit codes: 0 it is
there, 2 the command or the workflow is wrong, or the file cannot be written.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from .. import flows
from ..errors import FlowDefinitionError
from ..graph import Graph
from ..private import write_private

__all__ = ["visualize"]


class Format(StrEnum):
    MERMAID = "mermaid"
    SVG = "svg"


def visualize(
    flow: Annotated[Path, typer.Argument(help="The workflow: a YAML or JSON file.")],
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
    try:
        content = _drawn(flow, format)
        if output is not None:
            write_private(output, content)
    except FlowDefinitionError as exc:
        raise _failed(str(exc)) from None
    except OSError as exc:
        raise _failed(f"cannot write {output}: {exc.strerror}") from None
    if output is None:
        typer.echo(content, nl=False)


def _drawn(flow: Path, format: Format) -> bytes:
    graph = Graph.of(msgspec.json.decode(flows.load(flow).encoded))
    text = graph.svg() if format is Format.SVG else graph.mermaid()
    return f"{text}\n".encode()


def _failed(reason: str) -> typer.Exit:
    typer.echo(f"error: {reason}", err=True)
    return typer.Exit(2)
