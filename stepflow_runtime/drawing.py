"""A graph as an SVG drawing, laid out in layers from the input down to the output.

Contract: pure and deterministic; the document is well-formed XML whatever the names in it
are, needs nothing from elsewhere, and holds no script. A graph that is too big to be drawn
comes out as a list. What is nested in a step is drawn inside of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Final

from .graph import Graph, GraphStep, States, StepState, state_of

__all__ = ["STYLE", "as_svg", "harmless"]

# In pixels.
_LETTER: Final = 7.6
_SMALL_LETTER: Final = 6.9
_MARK: Final = 16
_LINE: Final = 17
_PADDING: Final = 12
_HEIGHT: Final = 46
_PILL: Final = 26
_GAP: Final = 26
_LAYER_GAP: Final = 40
_MARGIN: Final = 14
_NARROWEST: Final = 96
_LONGEST_LABEL: Final = 32

# Of an edge that passes layers, one in each keeps a way free for it.
_MOST_BENDS: Final = 5_000
_SWEEPS: Final = 6

_MOST_LISTED: Final = 200

STYLE: Final = (
    """
.flow{--line:#64748b;--node:#fff;--edge:#94a3b8;--text:#0f172a;--soft:#475569;
--completed:#00734d;--completed-fill:#e3f6ee;--failed:#b33c00;--failed-fill:#ffe9df;
--running:#1d4ed8;--running-fill:#e2ecff;--waiting:#6b7280;--waiting-fill:#f3f4f6;
--cancelled:#6d28d9;--cancelled-fill:#f0ebff;--unused:#94a3b8;--unused-fill:transparent;
--inner:#8881;font:13px ui-sans-serif,system-ui,"Segoe UI",Helvetica,Arial,sans-serif;
height:auto;max-width:100%}
@media(prefers-color-scheme:dark){.flow{--line:#94a3b8;--node:#1e293b;--edge:#64748b;
--text:#f1f5f9;--soft:#a8b4c6;--completed:#34d399;--completed-fill:#0c3329;
--failed:#ff9a66;--failed-fill:#44210f;--running:#7fb0ff;--running-fill:#172c55;
--waiting:#9ca3af;--waiting-fill:#242b38;--cancelled:#c4a9ff;--cancelled-fill:#2d2250;
--unused:#64748b}}
.flow rect{fill:var(--node);stroke:var(--line);stroke-width:1.4}
.flow text{fill:var(--text)}.flow .soft{fill:var(--soft);font-size:11.5px}
.flow .inner{fill:var(--inner);stroke:none}
.flow .edge{fill:none;stroke:var(--edge);stroke-width:1.5}
.flow .maybe{stroke-dasharray:5 4}.flow .head{fill:var(--edge)}
""".strip()
    + "".join(
        f"\n.flow .{state.value}>rect.box"
        f"{{stroke:var(--{state.value});fill:var(--{state.value}-fill)"
        + (";stroke-width:2.6" if state is StepState.FAILED else "")
        + (";stroke-dasharray:5 4" if state is StepState.UNUSED else "")
        + f"}}.flow .{state.value}>text.mark{{fill:var(--{state.value});font-weight:700}}"
        for state in StepState
    )
)


def as_svg(graph: Graph, states: States, style: str = STYLE) -> str:
    """The whole document; it may stand in a page as it is.

    :param style: how it looks; empty where a page says that for all drawings in it
    """
    if not graph.is_drawable:
        return _listed(graph, style)
    plan = _plan(graph)
    width, height = plan.width + 2 * _MARGIN, plan.height + 2 * _MARGIN
    name = f"Workflow {graph.name}" if graph.name else "Workflow"
    body = "".join(_drawn(plan, states, (), _MARGIN, _MARGIN))
    return _document(width, height, name, style, body)


def harmless(text: str) -> str:
    """The text without what a document, or a terminal, would not take as a character."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for each in text
    )


def _document(width: float, height: float, title: str, style: str, body: str) -> str:
    looks = f"<style>{style}</style>" if style else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="flow" role="img" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
        f"<title>{_shown(title)}</title>{looks}{body}</svg>"
    )


def _listed(graph: Graph, style: str) -> str:
    head = f"{graph.size} steps, too many to be drawn. The first of them:"
    lines = [head, *(step.id for step in graph.steps[:_MOST_LISTED])]
    texts = "".join(
        f'<text x="{_MARGIN}" y="{_MARGIN + _LINE * place}">{_shown(_cut(line, 100))}</text>'
        for place, line in enumerate(lines, 1)
    )
    return _document(800, _LINE * len(lines) + 3 * _MARGIN, head, style, texts)


def _shown(text: str) -> str:
    return escape(harmless(text).replace("\n", " "), quote=True)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


# -- what is to be drawn ---------------------------------------------------------------


@dataclass(eq=False)
class _Node:
    """A step, the input, the output, or the bend of an edge; and where its centre is.

    :ivar floor: where its layer ends: its edges go straight down to there, so that they lead
        through no box beside it
    """

    width: float
    height: float
    label: str = ""
    step: GraphStep | None = None
    inner: tuple[_Plan, ...] = ()
    layer: int = 0
    x: float = 0
    y: float = 0
    floor: float = 0
    above: list[_Node] = field(default_factory=list)
    below: list[_Node] = field(default_factory=list)

    @property
    def is_bend(self) -> bool:
        return not self.label


@dataclass
class _Plan:
    """A flow, laid out.

    :ivar edges: each with the nodes that it passes
    """

    nodes: list[_Node]
    edges: list[tuple[list[_Node], bool]]
    width: float
    height: float


def _plan(graph: Graph) -> _Plan:
    steps = [_step_node(each) for each in graph.steps]
    ends = _Node(60, _PILL, "input"), _Node(66, _PILL, "output")
    edges = [
        (
            ends[0] if edge.source is None else steps[edge.source],
            ends[1] if edge.target is None else steps[edge.target],
            edge.is_certain,
        )
        for edge in graph.edges
    ]
    used = {id(node) for source, target, _ in edges for node in (source, target)}
    nodes = [*steps, *(each for each in ends if id(each) in used)]
    rank = _put_in_layers(nodes, [(source, target) for source, target, _ in edges])
    # Of a cycle, which no server runs, the edges that lead back are not followed.
    forward = [each for each in edges if rank[id(each[0])] < rank[id(each[1])]]
    ways = _with_bends(forward, nodes)
    layers = _ordered(nodes)
    width, height = _place(layers)
    return _Plan(nodes, ways, width, height)


def _step_node(step: GraphStep) -> _Node:
    inner = tuple(_plan(each) for each in step.nested)
    longest = max(
        len(_cut(step.id, _LONGEST_LABEL)) * _LETTER,
        len(_cut(step.component, _LONGEST_LABEL)) * _SMALL_LETTER,
    )
    width = max(_NARROWEST, longest + _MARK + 2 * _PADDING)
    height = float(_HEIGHT)
    for each in inner:
        width = max(width, each.width + 2 * _PADDING)
        height += each.height + 2 * _PADDING
    return _Node(width, height, step.id or " ", step, inner)


def _put_in_layers(
    nodes: Sequence[_Node], edges: Sequence[tuple[_Node, _Node]]
) -> Mapping[int, int]:
    """Each node below all that it takes from; returns an order in which that is so.

    Of a cycle, one edge leads against the order.
    """
    below: dict[int, list[_Node]] = {id(node): [] for node in nodes}
    open_edges = dict.fromkeys(below, 0)
    for source, target in edges:
        below[id(source)].append(target)
        open_edges[id(target)] += 1
    ready = [node for node in reversed(nodes) if not open_edges[id(node)]]
    waiting = iter(nodes)
    rank: dict[int, int] = {}
    while len(rank) < len(nodes):
        if ready:
            node = ready.pop()
        else:  # a cycle: to be begun somewhere
            node = next(each for each in waiting if id(each) not in rank)
        if id(node) in rank:
            continue
        rank[id(node)] = len(rank)
        for each in below[id(node)]:
            open_edges[id(each)] -= 1
            if id(each) not in rank:
                each.layer = max(each.layer, node.layer + 1)
                if not open_edges[id(each)]:
                    ready.append(each)
    takers = {id(target) for _, target in edges}
    for node in nodes:
        if id(node) not in takers and below[id(node)]:
            # What takes nothing stands right above those that take from it.
            node.layer = max(min(each.layer for each in below[id(node)]) - 1, 0)
    return rank


def _with_bends(
    edges: Sequence[tuple[_Node, _Node, bool]], nodes: list[_Node]
) -> list[tuple[list[_Node], bool]]:
    bends = sum(target.layer - source.layer - 1 for source, target, _ in edges)
    ways = []
    for source, target, is_certain in edges:
        way = [source]
        if bends <= _MOST_BENDS:
            passed = range(source.layer + 1, target.layer)
            way += [_Node(4, 0, layer=layer) for layer in passed]
        way.append(target)
        nodes.extend(way[1:-1])
        for upper, lower in pairwise(way):
            upper.below.append(lower)
            lower.above.append(upper)
        ways.append((way, is_certain))
    return ways


# -- where it is drawn -----------------------------------------------------------------


def _ordered(nodes: Sequence[_Node]) -> list[list[_Node]]:
    """The layers, in each the nodes near those that they are connected with."""
    layers: list[list[_Node]] = [
        [] for _ in range(max((n.layer for n in nodes), default=-1) + 1)
    ]
    for node in nodes:
        layers[node.layer].append(node)
    for layer in layers:
        _number(layer)
    for sweep in range(_SWEEPS):
        downwards = sweep % 2 == 0
        for layer in layers if downwards else reversed(layers):
            layer.sort(
                key=lambda node: _mean(node.above if downwards else node.below, node)
            )
            _number(layer)
    return layers


def _number(layer: Sequence[_Node]) -> None:
    for place, node in enumerate(layer):
        node.x = place - (len(layer) - 1) / 2


def _mean(neighbours: Sequence[_Node], node: _Node) -> float:
    if not neighbours:
        return node.x
    return sum(each.x for each in neighbours) / len(neighbours)


def _place(layers: Sequence[Sequence[_Node]]) -> tuple[float, float]:
    y = 0.0
    for layer in layers:
        height = max(node.height for node in layer)
        for node in layer:
            node.y = y + node.height / 2
            node.floor = y + height
        y += height + _LAYER_GAP
        _spread(layer, [node.x * (_NARROWEST + _GAP) for node in layer])
    for sweep in range(_SWEEPS):
        downwards = sweep % 2 == 0
        for layer in layers if downwards else reversed(layers):
            _spread(
                layer,
                [
                    _mean(node.above if downwards else node.below, node)
                    for node in layer
                ],
            )
    nodes = [node for layer in layers for node in layer]
    if not nodes:
        return _NARROWEST, _PILL
    left = min(node.x - node.width / 2 for node in nodes)
    for node in nodes:
        node.x -= left
    return max(node.x + node.width / 2 for node in nodes), y - _LAYER_GAP


def _spread(layer: Sequence[_Node], wanted: Sequence[float]) -> None:
    """Put each as near as can be to where it is wanted, and none upon another."""
    gaps = [(left.width + right.width) / 2 + _GAP for left, right in pairwise(layer)]
    rightwards, leftwards = [*wanted], [*wanted]
    for place, gap in enumerate(gaps, 1):
        rightwards[place] = max(wanted[place], rightwards[place - 1] + gap)
    for place in range(len(gaps) - 1, -1, -1):
        leftwards[place] = min(wanted[place], leftwards[place + 1] - gaps[place])
    # Both keep the gaps, and so does what is half-way between them.
    for node, one, other in zip(layer, rightwards, leftwards, strict=True):
        node.x = (one + other) / 2


# -- drawing ---------------------------------------------------------------------------


def _drawn(
    plan: _Plan, states: States, path: tuple[str, ...], left: float, top: float
) -> Iterator[str]:
    for way, is_certain in plan.edges:
        yield _edge(way, is_certain, left, top)
    for node in plan.nodes:
        if node.step is not None:
            x = left + node.x - node.width / 2
            y = top + node.y - node.height / 2
            yield from _box(node, node.step, states, (*path, node.step.id), x, y)
        elif not node.is_bend:
            yield _pill(node, left, top)


def _edge(way: Sequence[_Node], is_certain: bool, left: float, top: float) -> str:
    x, y = left + way[0].x, top + way[0].y + way[0].height / 2
    path = [f"M{x:.1f} {y:.1f}V{(y := top + way[0].floor):.1f}"]
    for node in way[1:]:
        new_x, new_y = left + node.x, top + node.y - node.height / 2
        if node is way[-1]:
            new_y -= 6
        middle = (y + new_y) / 2
        path.append(
            f"C{x:.1f} {middle:.1f} {new_x:.1f} {middle:.1f} {new_x:.1f} {new_y:.1f}"
        )
        x, y = new_x, new_y
        if node.is_bend:
            y = top + node.floor
            path.append(f"V{y:.1f}")
    head = f"M{x - 4:.1f} {y - 1:.1f}L{x + 4:.1f} {y - 1:.1f}L{x:.1f} {y + 6:.1f}z"
    dashed = "" if is_certain else " maybe"
    return f'<path class="edge{dashed}" d="{"".join(path)}"/><path class="head" d="{head}"/>'


def _pill(node: _Node, left: float, top: float) -> str:
    x, y = left + node.x, top + node.y
    return (
        f'<g><rect x="{x - node.width / 2:.1f}" y="{y - _PILL / 2:.1f}" '
        f'width="{node.width:.0f}" height="{_PILL}" rx="{_PILL / 2:.0f}"/>'
        f'<text class="soft" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">'
        f"{node.label}</text></g>"
    )


def _box(
    node: _Node,
    step: GraphStep,
    states: States,
    path: tuple[str, ...],
    x: float,
    y: float,
) -> Iterator[str]:
    state = state_of(states, path)
    told = f": {state.value}" if state else ""
    yield f'<g class="{state.value if state else "step"}">'
    yield f"<title>{_shown(f'{step.id} ({step.component}){told}')}</title>"
    yield (
        f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{node.width:.1f}" '
        f'height="{node.height:.1f}" rx="8"/>'
    )
    if state:
        yield f'<text class="mark" x="{x + _PADDING:.1f}" y="{y + 20:.1f}">{state.mark}</text>'
    indent = _PADDING + (_MARK if state else 0)
    yield (
        f'<text x="{x + indent:.1f}" y="{y + 20:.1f}">'
        f"{_shown(_cut(step.id, _LONGEST_LABEL))}</text>"
        f'<text class="soft" x="{x + indent:.1f}" y="{y + 37:.1f}">'
        f"{_shown(_cut(step.component, _LONGEST_LABEL))}</text>"
    )
    y += _HEIGHT
    for each in node.inner:
        margin = (node.width - each.width) / 2
        yield (
            f'<rect class="inner" x="{x + _PADDING / 2:.1f}" y="{y:.1f}" '
            f'width="{node.width - _PADDING:.1f}" height="{each.height + 1.5 * _PADDING:.1f}" rx="6"/>'
        )
        yield from _drawn(each, states, path, x + margin, y + _PADDING * 0.75)
        y += each.height + 2 * _PADDING
    yield "</g>"
