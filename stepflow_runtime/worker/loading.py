"""Finding the functions of a job in their modules, in a process of their own.

Contract: modules are imported by their names, and a script under the name that those have
in multiprocessing's processes, so that what stands below ``if __name__ == "__main__":`` is
left alone. A script without such a guard starts its runtime here again, which is refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any, Final

from ..components import Place
from .job import Job

__all__ = ["enter", "load", "under_way"]

_SCRIPT: Final = "__mp_main__"


def enter(job: Job) -> None:
    """Make this process find modules and files as the program does."""
    os.chdir(job.directory)
    sys.path[:] = [os.path.join(job.directory, each) for each in job.path]
    sys.argv[1:] = []


# Asked by who starts a runtime: sys.modules has this module in a worker alone.
is_under_way = False


@contextmanager
def under_way() -> Iterator[None]:
    """Refuse runtimes that are started by what is imported."""
    global is_under_way
    is_under_way = True
    try:
        yield
    finally:
        is_under_way = False


def load(place: Place) -> Callable[..., Any]:
    """The function that stands at a place; whatever its module raises passes through.

    :raises AttributeError: if it is not there
    """
    module = _module(place)
    function: Callable[..., Any] = getattr(module, place.attribute)
    return function


def _module(place: Place) -> ModuleType:
    if place.module is None:
        assert place.file is not None
        return sys.modules.get(_SCRIPT) or _from_file(_SCRIPT, place.file)
    try:
        return importlib.import_module(place.module)
    except ModuleNotFoundError as exc:
        is_it = exc.name is not None and f"{place.module}.".startswith(f"{exc.name}.")
        if not is_it or place.file is None:
            raise
        return _from_file(
            place.module, place.file
        )  # it came by other ways than the path


def _from_file(name: str, file: str) -> ModuleType:
    loader = SourceFileLoader(name, file)
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if name == _SCRIPT:  # as classes and pickles of the script's have it
        sys.modules["__main__"] = module
    loader.exec_module(module)
    return module
