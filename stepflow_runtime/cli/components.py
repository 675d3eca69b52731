"""``stepflow-runtime components``: what workflows can call, with a configuration or a server."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .exits import Exit, exits, tell
from .options import (
    ConfigOption,
    HeaderOption,
    LevelOption,
    Place,
    RemoteOption,
)

if TYPE_CHECKING:
    from ..executor import ComponentInfo, ComponentList

__all__ = ["components"]

# A description is cut to what is left of the terminal's line, but to no less than this.
_LEAST: int = 20


def components(
    config: ConfigOption = None,
    remote: RemoteOption = None,
    header_env: HeaderOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON, with their schemas.")
    ] = False,
    log_level: LevelOption = "info",
) -> None:
    """List the components that workflows can use.

    A plugin that cannot tell its components is named on standard error, and exits with 1.
    """
    import anyio

    from .output import print_bytes, print_json

    place = Place(config, None, remote, header_env, log_level)
    with exits():
        found = anyio.run(_list, place, as_json)
        for plugin, reason in found.failed_plugins.items():
            tell(f"the plugin {plugin} does not tell its components: {reason}")
        found.sort(key=lambda each: each.path)
        if as_json:
            print_json([_described(each) for each in found])
        else:
            print_bytes(_table(found).encode(errors="backslashreplace"))
    raise typer.Exit(Exit.SUCCESS if found.is_complete else Exit.FAILED)


async def _list(place: Place, with_schemas: bool) -> ComponentList:
    async with place.executor() as executor:
        return await executor.list_components(include_schemas=with_schemas)


def _described(component: ComponentInfo) -> dict[str, Any]:
    return {
        "path": component.path,
        "plugin": component.plugin,
        "description": component.description,
        "inputSchema": component.input_schema,
        "outputSchema": component.output_schema,
    }


def _table(found: ComponentList) -> str:
    from .text import one_line

    rows = [
        tuple(map(one_line, (each.path, each.plugin, each.description)))
        for each in found
    ]
    widths = [max((len(row[place]) for row in rows), default=0) for place in (0, 1)]
    room = None
    if sys.stdout.isatty():
        room = max(_LEAST, shutil.get_terminal_size().columns - sum(widths) - 4)
    return "".join(
        f"{path:<{widths[0]}}  {plugin:<{widths[1]}}  {words[:room]}".rstrip() + "\n"
        for path, plugin, words in rows
    )
