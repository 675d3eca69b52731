"""Where ``stepflow-server`` is.

The binary comes with the wheel ``stepflow-orchestrator``. That package is not imported:
only its place is looked up, since we use its ``bin/`` and not its launcher.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..errors import BinaryNotFoundError

__all__ = ["find_binary"]

VARIABLE: Final = "STEPFLOW_SERVER_BINARY"
_PACKAGE: Final = "stepflow_orchestrator"
_NAME: Final = "stepflow-server.exe" if sys.platform == "win32" else "stepflow-server"
_REMEDY: Final = (
    "Install the wheel for this platform (pip install --only-binary :all: "
    "stepflow-orchestrator; it exists for Linux on x86_64 and aarch64, macOS and Windows), "
    f"or name a binary with binary= or the environment variable {VARIABLE}."
)


def find_binary(
    option: str | os.PathLike[str] | None, environ: Mapping[str, str]
) -> Path:
    """Return the absolute path of the binary: the option, the variable, or the wheel's.

    :raises BinaryNotFoundError: telling what was looked for and how to mend it
    """
    if option is not None:
        return _checked(Path(option), "given as binary=")
    if named := environ.get(VARIABLE):
        return _checked(Path(named), f"named by the environment variable {VARIABLE}")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BinaryNotFoundError(
            "the package stepflow-orchestrator, which carries the stepflow-server binary, "
            f"is not installed. {_REMEDY}"
        )
    return _checked(
        Path(spec.submodule_search_locations[0], "bin", _NAME),
        "expected in the package stepflow-orchestrator",
    )


def _checked(path: Path, origin: str) -> Path:
    path = path.absolute()
    if not path.exists():
        raise BinaryNotFoundError(
            f"there is no stepflow-server binary at {path} ({origin}). {_REMEDY}"
        )
    if not path.is_file():
        raise BinaryNotFoundError(f"{path} ({origin}) is not a file. {_REMEDY}")
    if not os.access(path, os.X_OK):
        raise BinaryNotFoundError(
            f"{path} ({origin}) is not executable for this user. Make it so "
            f"(chmod +x {path}), or: {_REMEDY}"
        )
    return path
