"""The command's words, registered. What each takes and prints is in a room of its own.

Contract: standard output carries results only, to be piped; everything else goes to
standard error. How commands exit: :mod:`.exits`. Nothing is imported here but what it
takes to tell what the commands are: a command imports what it needs when it is called.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import typer

from .batch import batch
from .components import components
from .doctor import doctor
from .exits import EPILOG
from .logs import logs
from .run import run
from .serve import serve
from .validate import validate

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Run Stepflow workflows on a server that lives as long as the command.",
    epilog=EPILOG,
)


@app.callback()
def command() -> None:
    """Run Stepflow workflows on a server that lives as long as the command."""


for _each in (run, batch, validate, components, serve, logs):
    app.command(epilog=EPILOG)(_each)
if find_spec("stepflow_runtime.cli.visualize") is not None:
    app.command(epilog=EPILOG)(
        import_module("stepflow_runtime.cli.visualize").visualize
    )
app.command()(doctor)
