"""A workflow's graph: its steps, what each takes from which, and the flows inside of them.

A leaf, and pure. Contract: any document makes a graph, whatever it holds: what is no step is
passed over, a reference to no step is no edge, and what is beyond the limits is left out and
told by ``is_cut``. Nothing is raised, and nothing takes longer than a second.
"""

from __future__ import annotations

import enum
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import msgspec

from .reprs import repr_of

__all__ = ["MOST_DRAWN", "Edge", "Graph", "GraphStep", "States", "StepState"]

# Of one document, with all that is nested in it.
_MOST_STEPS: Final = 20_000
_MOST_VALUES: Final = 250_000
_MOST_NESTED: Final = 8

# What has more steps, or more edges, is nothing that a drawing could show.
MOST_DRAWN: Final = 2_000
_MOST_EDGES_DRAWN: Final = 10_000

# Where it depends on something whether a step's output is taken.
_CHOICES: Final = ("$if", "$coalesce")


class StepState(enum.Enum):
    """How a step stands, or all that a run has of one."""

    WAITING = "waiting"
    """Not begun yet; the run goes on."""
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """Begun, and given up together with its run."""
    UNUSED = "unused"
    """Never begun: nothing needed it, or what it needed failed."""

    @property
    def mark(self) -> str:
        """A character that says the same where colours cannot."""
        return _MARKS[self]


_MARKS: Final = {
    StepState.WAITING: "…",
    StepState.RUNNING: "▸",
    StepState.COMPLETED: "✓",
    StepState.FAILED: "✗",
    StepState.CANCELLED: "⊘",
    StepState.UNUSED: "–",
}

# Mappings with keys of two types are hard to come by: keys of a mapping are invariant.
States: TypeAlias = "Mapping[Any, StepState]"
"""States by step id; a step of a nested flow by the ids of all the steps around it and its
own: ``("outer", "inner")``."""


class Edge(msgspec.Struct, frozen=True):
    """That something is taken from somewhere.

    :ivar source: the place in ``Graph.steps`` of the step that it is taken from; ``None``:
        the flow's input
    :ivar target: the place of the step that takes it; ``None``: the flow's output
    :ivar is_certain: False where a condition decides (``$if``, ``$coalesce``)
    """

    source: int | None
    target: int | None
    is_certain: bool = True


class GraphStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step, as its workflow writes it.

    :ivar id: its id
    :ivar component: what it calls
    :ivar input: its input, with the expressions in it
    :ivar on_error: ``"fail"``, ``"retry"``, ``"useDefault"``, or ``None`` if nothing is said
    :ivar must_execute: whether it is run though nothing takes its output
    :ivar nested: the flows that stand in its input, for ``/map``, say
    """

    id: str
    component: str = ""
    input: Any = None
    on_error: str | None = None
    must_execute: bool = False
    nested: tuple[Graph, ...] = ()

    __repr__ = repr_of()


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of a workflow and what they take from each other.

    :ivar name: the workflow's name, or ``None``
    :ivar steps: its steps, in its order
    :ivar edges: where inputs and the output come from, each once
    :ivar is_cut: whether there is more than this has taken in
    """

    name: str | None = None
    steps: tuple[GraphStep, ...] = ()
    edges: tuple[Edge, ...] = ()
    is_cut: bool = False

    __repr__ = repr_of()

    def _repr_html_(self) -> str:
        from .notebook import graph_html

        return graph_html(self)

    @classmethod
    def of(cls, flow: Mapping[str, Any]) -> Graph:
        """The graph of a document: a parsed workflow file, or what a server has stored."""
        return _Reading().graph(flow)

    @property
    def size(self) -> int:
        """How many steps there are, with those of nested flows."""
        nested = (each for step in self.steps for each in step.nested)
        return len(self.steps) + sum(each.size for each in nested)

    @property
    def is_drawable(self) -> bool:
        """Whether it is small enough to be drawn; if not, it is shown as a list."""
        return self.size <= MOST_DRAWN and self._edge_count <= _MOST_EDGES_DRAWN

    @property
    def _edge_count(self) -> int:
        nested = (each for step in self.steps for each in step.nested)
        return len(self.edges) + sum(each._edge_count for each in nested)

    def mermaid(self, states: States | None = None) -> str:
        """The graph in the language of Mermaid, which many sites draw; without ending newline.

        :param states: how the steps stand, to be told by colours and marks
        """
        return "\n".join(_Mermaid(states or {}).lines(self))

    def svg(self, states: States | None = None) -> str:
        """The graph as an SVG document that needs nothing else, in light and dark.

        :param states: how the steps stand, to be told by colours and marks
        """
        from .drawing import as_svg

        return as_svg(self, states or {})


# -- reading a document ----------------------------------------------------------------


class _Reading:
    """Reads one document, and counts what it has seen of it."""

    def __init__(self) -> None:
        self._steps_left = _MOST_STEPS
        self._values_left = _MOST_VALUES
        self._is_cut = False

    def graph(self, flow: object, depth: int = 0) -> Graph:
        flow = flow if isinstance(flow, Mapping) else {}
        steps = [*self._steps(flow.get("steps"), depth)]
        places: dict[str, int] = {}
        for place, step in enumerate(steps):
            places.setdefault(step.id, place)
        edges: dict[tuple[int | None, int | None], bool] = {}
        for place, step in enumerate(steps):
            self._connect(edges, step.input, place, places)
        self._connect(edges, flow.get("output"), None, places)
        name = flow.get("name")
        return Graph(
            name=name if isinstance(name, str) else None,
            steps=tuple(steps),
            edges=tuple(Edge(*ends, certain) for ends, certain in edges.items()),
            is_cut=self._is_cut,
        )

    def _steps(self, steps: object, depth: int) -> Iterator[GraphStep]:
        for step in steps if isinstance(steps, list | tuple) else ():
            if not isinstance(step, Mapping) or not isinstance(step.get("id"), str):
                continue
            if not self._steps_left:
                self._is_cut = True
                return
            self._steps_left -= 1
            input = step.get("input")
            yield GraphStep(
                id=step["id"],
                component=_text(step.get("component")),
                input=input,
                on_error=_action(step.get("onError")),
                must_execute=step.get("mustExecute") is True,
                nested=tuple(self._nested(input, depth)),
            )

    def _nested(self, input: object, depth: int) -> Iterator[Graph]:
        for value, _ in self._values(input, enters_literals=True):
            if _is_flow(value):
                if depth == _MOST_NESTED:
                    self._is_cut = True
                    return
                yield self.graph(value, depth + 1)

    def _connect(
        self,
        edges: dict[tuple[int | None, int | None], bool],
        expression: object,
        target: int | None,
        places: Mapping[str, int],
    ) -> None:
        for value, is_certain in self._values(expression):
            source = _source(value, places)
            if source is not _NOWHERE:
                ends = (source, target)
                edges[ends] = edges.get(ends, False) or is_certain

    def _values(
        self, root: object, *, enters_literals: bool = False
    ) -> Iterator[tuple[Mapping[Any, Any], bool]]:
        """Every mapping in there, and whether it counts in any case.

        What stands in a ``$literal`` is no expression, and what stands in a nested flow
        refers to that flow's steps.
        """
        left: deque[tuple[object, bool]] = deque([(root, True)])
        while left:
            value, is_certain = left.popleft()
            if not self._values_left:
                self._is_cut = True
                return
            self._values_left -= 1
            if isinstance(value, list | tuple):
                left.extend((each, is_certain) for each in value)
            elif isinstance(value, Mapping):
                yield value, is_certain
                if _is_flow(value) or ("$literal" in value and not enters_literals):
                    continue
                is_certain = is_certain and not any(each in value for each in _CHOICES)
                left.extend((each, is_certain) for each in value.values())


class _Nowhere(enum.Enum):
    NOWHERE = 0


_NOWHERE: Final = _Nowhere.NOWHERE


def _source(
    value: Mapping[Any, Any], places: Mapping[str, int]
) -> int | None | _Nowhere:
    if "$literal" in value:
        return _NOWHERE
    if isinstance(step := value.get("$step"), str):
        return places.get(step, _NOWHERE)
    if "$input" in value:
        return None
    return _source_of_old(value.get("$from"), places)


def _source_of_old(origin: object, places: Mapping[str, int]) -> int | None | _Nowhere:
    """Of ``{"$from": {"step": "a"}}``, as workflows were written before."""
    if not isinstance(origin, Mapping):
        return _NOWHERE
    if isinstance(step := origin.get("step"), str):
        return places.get(step, _NOWHERE)
    return None if "workflow" in origin else _NOWHERE


def _is_flow(value: Mapping[Any, Any]) -> bool:
    steps = value.get("steps")
    return isinstance(steps, list | tuple) and any(
        isinstance(each, Mapping) and "component" in each for each in steps[:1]
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _action(on_error: object) -> str | None:
    action = on_error.get("action") if isinstance(on_error, Mapping) else None
    return action if isinstance(action, str) else None


# -- Mermaid ---------------------------------------------------------------------------

# Of a label. Mermaid gives up on texts of more than 50,000 characters.
_LONGEST: Final = 60

# Names of ours stand for the steps; their ids are only in labels. There, what is none of
# these is written as its number: quotes would end the label, and others are Markdown.
_PLAIN: Final = re.compile(r"(?<=[^\W_])[-._](?=[^\W_])|[^\W_]| |/")

_COLOURS: Final = {
    StepState.WAITING: "fill:#f3f4f6,stroke:#6b7280,color:#111827",
    StepState.RUNNING: "fill:#dbeafe,stroke:#1d4ed8,color:#111827",
    StepState.COMPLETED: "fill:#d1f5e4,stroke:#00734d,color:#111827",
    StepState.FAILED: "fill:#ffe0d1,stroke:#b33c00,color:#111827,stroke-width:3px",
    StepState.CANCELLED: "fill:#ede9fe,stroke:#6d28d9,color:#111827",
    StepState.UNUSED: "fill:#ffffff,stroke:#9ca3af,color:#6b7280,stroke-dasharray:4 3",
}


class _Mermaid:
    def __init__(self, states: States) -> None:
        self._states = states
        self._used: set[StepState] = set()

    def lines(self, graph: Graph) -> Iterator[str]:
        yield "flowchart TD"
        if not graph.is_drawable:
            yield f'  many["{graph.size} steps: too many to be drawn"]'
            return
        yield from self._flow(graph, "s", (), "  ")
        for state in StepState:
            if state in self._used:
                yield f"  classDef {state.value} {_COLOURS[state]}"

    def _flow(
        self, graph: Graph, prefix: str, path: tuple[str, ...], indent: str
    ) -> Iterator[str]:
        for place, step in enumerate(graph.steps):
            yield from self._step(step, f"{prefix}{place}", (*path, step.id), indent)
        ends = {(e.source is None, e.target is None) for e in graph.edges}
        if any(takes for takes, _ in ends):
            yield f"{indent}{prefix}in([input])"
        if any(gives for _, gives in ends):
            yield f"{indent}{prefix}out([output])"
        for edge in graph.edges:
            source = "in" if edge.source is None else edge.source
            target = "out" if edge.target is None else edge.target
            arrow = "-->" if edge.is_certain else "-.->"
            yield f"{indent}{prefix}{source} {arrow} {prefix}{target}"

    def _step(
        self, step: GraphStep, name: str, path: tuple[str, ...], indent: str
    ) -> Iterator[str]:
        state = state_of(self._states, path)
        mark = f"{state.mark} " if state else ""
        label = f"{mark}{_label(step.id)}"
        if step.component:
            label += f"<br/>{_label(step.component)}"
        if not step.nested:
            yield f'{indent}{name}["{label}"]{_class(state)}'
        else:
            yield f'{indent}subgraph {name}["{label}"]'
            for number, each in enumerate(step.nested):
                yield from self._flow(each, f"{name}_{number}_", path, indent + "  ")
            yield f"{indent}end"
            if state:
                yield f"{indent}class {name} {state.value}"
        if state:
            self._used.add(state)


def state_of(states: States, path: tuple[str, ...]) -> StepState | None:
    if len(path) == 1 and path[0] in states:
        return states[path[0]]
    return states.get(path)


def _class(state: StepState | None) -> str:
    return f":::{state.value}" if state else ""


def _label(text: str) -> str:
    shown = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return "".join(_escaped(shown)) or " "


def _escaped(text: str) -> Iterable[str]:
    for place, character in enumerate(text):
        if _PLAIN.match(text, place):
            yield character
        elif character.isprintable():
            yield f"#{ord(character)};"
        else:  # control characters, and halves of surrogates
            yield "\N{REPLACEMENT CHARACTER}"
