"""The command's words, registered. What each takes and prints is in a room of its own.

Contract: standard output carries results only, to be piped; everything else goes to
standard error. How commands exit: :mod:`.exits`. Nothing is imported here but what it
takes to tell what the commands are: a command imports what it needs when it is called.
"""

from __future__ import annotations

import typer

from .batch import batch
from .components import components
from .doctor import doctor
from .exits import EPILOG
from .logs import logs
from .run import run
from .serve import serve
from .validate import validate
from .visualize import visualize

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


for _each in (run, batch, validate, components, serve, logs, visualize):
    app.command(epilog=EPILOG)(_each)
app.command()(doctor)
