"""``stepflow-runtime validate``: what the server thinks of workflows, and where that is.

Contract: the findings are the result, so they go to standard output; a file that cannot be
read is no finding. Whatever the server finds has a place in the text, if need be the
nearest that there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import typer

from .exits import Exit, exits, tell
from .options import (
    ConfigOption,
    HeaderOption,
    LevelOption,
    Place,
    RemoteOption,
    flow_text,
)

if TYPE_CHECKING:
    from ..api import ApiExecutor

__all__ = ["validate"]

# Of the line that is shown. In a file without line breaks it is the whole file.
_SHOWN: Final = 100


class _Finding(NamedTuple):
    file: str
    line: int
    column: int
    level: str
    message: str
    path: str | None
    kind: str

    @property
    def is_error(self) -> bool:
        return self.level in ("fatal", "error")


def validate(
    flows: Annotated[
        list[str],
        typer.Argument(
            metavar="FLOW...", help="The workflows: YAML or JSON files; - for stdin."
        ),
    ],
    config: ConfigOption = None,
    remote: RemoteOption = None,
    header_env: HeaderOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON.")
    ] = False,
    log_level: LevelOption = "info",
) -> None:
    """Have the server look at workflows; print what it finds, and where.

    It exits with 1 if there is an error; warnings alone are none.
    """
    import anyio

    from .output import print_bytes, print_json
    from .text import counted

    place = Place(config, None, remote, header_env, log_level)
    with exits():
        texts = [flow_text(name) for name in flows]
        findings = anyio.run(_find, place, texts)
        if as_json:
            print_json([each._asdict() for each in findings])
        else:
            lines = {source: text.splitlines() for text, source in texts}
            shown = "".join(_shown(each, lines[each.file]) for each in findings)
            print_bytes(shown.encode(errors="backslashreplace"))
            errors = sum(each.is_error for each in findings)
            numbers = (len(texts), errors, len(findings) - errors)
            tell(", ".join(map(counted, numbers, ("file", "error", "warning"))))
    is_valid = not any(each.is_error for each in findings)
    raise typer.Exit(Exit.SUCCESS if is_valid else Exit.FAILED)


async def _find(place: Place, texts: list[tuple[bytes, str]]) -> list[_Finding]:
    async with place.executor() as executor:
        return [
            finding
            for text, source in texts
            for finding in await _findings(executor, text, source)
        ]


async def _findings(executor: ApiExecutor, text: bytes, source: str) -> list[_Finding]:
    from ..errors import FlowDefinitionError, FlowSyntaxError
    from ..flows import parse
    from ..places import places

    try:
        document = parse(text, source)
        verdict = await executor.validate(document)
    except FlowSyntaxError as exc:
        message = str(exc).removeprefix(f"{source}:{exc.line}:{exc.column}: ")
        place = (exc.line or 1, exc.column or 1)
        return [_Finding(source, *place, "fatal", message, None, "syntax")]
    except FlowDefinitionError as exc:
        message = str(exc).removeprefix(f"{source}: ")
        return [_Finding(source, 1, 1, "fatal", message, None, "document")]
    found = places(text, source, [each.path or "$" for each in verdict.diagnostics])
    return [
        _Finding(source, *place, each.level, each.message, each.path, each.kind)
        for each, place in zip(verdict.diagnostics, found, strict=True)
    ]


def _shown(finding: _Finding, lines: list[bytes]) -> str:
    """As compilers do: the place, the line, and a caret below the column."""
    from .text import one_line

    head = f"{one_line(finding.file)}:{finding.line}:{finding.column}"
    text = f"{head}: {finding.level}: {one_line(finding.message)}\n"
    if finding.line > len(lines):
        return text
    line = lines[finding.line - 1].decode(errors="replace")
    before = line[: finding.column - 1]
    # A line is cut around its column.
    begin = max(0, len(before) - _SHOWN // 2) if len(line) > _SHOWN else 0
    shown = one_line(line[begin : begin + _SHOWN]).rstrip()
    return f"{text}    {shown}\n    {_blank(one_line(before[begin:]))}^\n"


def _blank(text: str) -> str:
    """As wide as the text: a letter may take two columns, and an accent none."""
    from rich.cells import cell_len

    return " " * cell_len(text)
