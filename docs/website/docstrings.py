"""Docstrings, which are written for Sphinx's eyes and for ``help()``, as Markdown.

griffe reads the fields (``:param x:``, ``:raises X:`` ...). What it leaves to us is

- roles: ``:meth:`start``` is a link to ``start``, if that is in the reference, and code if not;
- blocks of code that follow ``::``;
- exceptions, which become links, too;
- the calls of an executor. They are documented where they are written, in ``ApiExecutor``, and
  shown as those of ``StepflowExecutor``, the protocol that says what they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from griffe import (
    Alias,
    Class,
    Docstring,
    DocstringSectionRaises,
    ExprName,
    Extension,
    Module,
    Object,
)

_ROLE: Final = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`([^`]+)`")
_BLOCK: Final = re.compile(r"::\n\n((?:    .*\n|\n)*    .*)")
_PACKAGE: Final = "stepflow_runtime"
_PUBLIC: Final = ("", "testing")  # the modules whose names are public
_CALLS: Final = "api.ApiExecutor"
_PROTOCOL: Final = "executor.StepflowExecutor"


def markdown(text: str, place_of: Callable[[str], str | None]) -> str:
    """A docstring's text as Markdown.

    :param place_of: the anchor in the reference of what a role names, if it has one
    """
    return _ROLE.sub(
        lambda role: _link(role[1], place_of(role[1].lstrip("~."))),
        _BLOCK.sub(_fenced, text),
    )


def _link(words: str, place: str | None) -> str:
    shown = words.rpartition(".")[2] if words.startswith("~") else words
    return f"[`{shown}`][{place}]" if place else f"`{shown}`"


def _fenced(block: re.Match[str]) -> str:
    code = "\n".join(line.removeprefix("    ") for line in block[1].splitlines())
    return f":\n\n```python\n{code}\n```"


class SphinxAsMarkdown(Extension):
    """Goes through the docstrings of all that is public, once the package is read."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        if pkg.path != _PACKAGE:
            return
        _document(pkg[_PROTOCOL], pkg[_CALLS])
        public = dict(_public(pkg))
        for thing in public.values():
            for each in _with_members(thing):
                if each.docstring:
                    place_of = _Scope(public, each).place_of
                    each.docstring.value = markdown(each.docstring.value, place_of)
                    _link_errors(each.docstring, pkg)


def _document(protocol: Class, calls: Class) -> None:
    """Gives a protocol's methods the docstrings of those that do what it says."""
    for name, method in protocol.members.items():
        written = calls[name].docstring
        assert written is not None, name
        method.docstring = Docstring(
            written.value, parent=method, parser=written.parser
        )


def _link_errors(docstring: Docstring, package: Module) -> None:
    """Has ``:raises X:`` name the public X, which griffe takes for a word."""
    for section in docstring.parsed:
        if isinstance(section, DocstringSectionRaises):
            for error in section.value:
                if error.annotation in package.members:
                    error.annotation = ExprName(error.annotation, parent=package)


def _public(package: Module) -> Iterator[tuple[str, Object]]:
    """What the reference shows, and the anchor of each."""
    for module in _PUBLIC:
        if module and module not in package.members:
            continue
        scope = package[module] if module else package
        for name, member in scope.members.items():
            if name.startswith("_") or (member.is_alias and not _is_ours(member)):
                continue
            thing = member.final_target if member.is_alias else member
            if not thing.is_module:
                yield f"{scope.path}.{name}", thing


def _is_ours(alias: Alias) -> bool:
    return alias.target_path.startswith(f"{_PACKAGE}.")


def _with_members(thing: Object) -> Iterator[Object]:
    yield thing
    for name, member in thing.members.items():
        if not name.startswith("_") and not member.is_alias:
            yield member


class _Scope:
    """What names mean in a docstring."""

    def __init__(self, public: dict[str, Object], thing: Object) -> None:
        self._public = public
        self._places = {each.path: place for place, each in public.items()}
        self._places[f"{_PACKAGE}.{_CALLS}"] = f"{_PACKAGE}.StepflowExecutor"
        self._class = thing if thing.is_class else thing.parent

    def place_of(self, name: str) -> str | None:
        return self._of_the_class(name) or self._of_the_package(name)

    def _of_the_class(self, name: str) -> str | None:
        if not isinstance(self._class, Class):
            return None
        for each in (self._class, *self._class.mro()):
            if name in each.members and each.path in self._places:
                return f"{self._places[each.path]}.{name}"
        return None

    def _of_the_package(self, name: str) -> str | None:
        name = name.removeprefix(f"{_PACKAGE}.")
        for module in _PUBLIC:
            scope = f"{_PACKAGE}.{module}".rstrip(".")
            if f"{scope}.{name.partition('.')[0]}" in self._public:
                return f"{scope}.{name}"
        return None
