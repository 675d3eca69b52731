"""How values look in a notebook: what stands below the cell that they are the result of.

Contract: each is one element, with a style of its own, whose classes begin with
``stepflow-``: it has no id, no script and no link, loads nothing, and changes nothing
beside it. No text of a workflow, a server or a log is more than text in it, and what is a
secret by its name is starred. It takes the notebook's own colours, light or dark, and says
by marks what it says by colours. Whatever is in a value, nothing is raised, and it is no
longer than :data:`LARGEST` and a style: a notebook keeps it in its file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from . import drawing
from .executor import (
    ComponentInfo,
    ComponentList,
    Diagnostic,
    FlowError,
    FlowResult,
    FlowStatus,
    ValidationResult,
)
from .graph import Graph, States, StepState
from .page import Page, strip
from .page_style import CHART
from .page_words import Values, as_text, cut, mark, number_of, size_of
from .timeline import Omitted, Timeline, TimelineItem

__all__ = [
    "LARGEST",
    "components_html",
    "error_html",
    "graph_html",
    "result_html",
    "timeline_html",
    "validation_html",
]

# Characters: of all, of a value, and of one in a table.
LARGEST: Final = 200_000
_LONGEST: Final = 10_000
_CELL: Final = 300

# Bytes, as JSON, of a value that is looked through for secrets, some ten for a microsecond.
_LARGEST_VALUE: Final = 8_000_000
_NAME: Final = 100

_MOST_FINDINGS: Final = 100
_MOST_COMPONENTS: Final = 200
_MOST_INPUTS: Final = 12

# Of a timeline: steps with what they made, items as squares, and items by what failed them.
_MOST_ROWS: Final = 60
_LONGEST_OF_STEP: Final = 1_500
_MOST_OF_STEPS: Final = 40_000
_MOST_SQUARES: Final = 500
_MOST_FAILED: Final = 5
_MOST_STEPS_DRAWN: Final = 150


def result_html(result: FlowResult) -> str:
    return _output(_result(result))


def error_html(error: FlowError) -> str:
    return _output(_error(error, _values(_texts_of(error))))


def validation_html(found: ValidationResult) -> str:
    return _output(_findings(found))


def components_html(components: ComponentList) -> str:
    return _output(_components(components))


def graph_html(graph: Graph) -> str:
    return _output([_drawn(graph, {})], _OF_GRAPHS)


def timeline_html(timeline: Timeline) -> str:
    return _output(_Excerpt(timeline).parts(), _OF_GRAPHS, CHART)


# -- one output ------------------------------------------------------------------------

_STYLE: Final = """
.out{--text:inherit;--soft:#727b84;--rule:#8885;--card:#8881;--completed:#0f8a5f;
--failed:#d64a12;--running:#3578e5;--cancelled:#8b5cf6;--waiting:#727b84;--unused:#727b84;
--warning:#9a6b0a;--on:#fff;--hatch:#fff8;font:13px/1.5 ui-sans-serif,system-ui,"Segoe UI",
Helvetica,Arial,sans-serif;color:inherit;margin:2px 0;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.out .mark{color:var(--c);font-weight:700;display:inline-block;width:1.3em;text-align:center}
.completed{--c:var(--completed)}.failed{--c:var(--failed)}.running{--c:var(--running)}
.warning{--c:var(--warning)}.unused{--c:var(--unused)}
.out .soft,.out small{color:var(--soft)}
.out code,.out pre{font:12px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace;
color:inherit}.out code{background:none;padding:0}
.out pre{margin:4px 0 6px;padding:6px 10px;background:var(--card);border:1px solid var(--rule);
border-radius:4px;white-space:pre-wrap;overflow-wrap:anywhere;max-height:360px;overflow:auto}
.out table{border-collapse:collapse;margin:4px 0;font-size:13px;color:inherit}
.out th,.out td{text-align:left;vertical-align:top;padding:2px 16px 2px 0;border:0;
border-bottom:1px solid var(--rule);white-space:normal;max-width:none;background:none}
.out th{color:var(--soft);font-weight:500;font-size:12px}
.out td.n,.out th.n{text-align:right}
.out summary{cursor:pointer}.out p{margin:4px 0}
.title{font-size:12px;font-weight:600;margin:8px 0 0;color:var(--soft)}
.title small{font-weight:400}
.facts{display:flex;flex-wrap:wrap;gap:2px 22px;margin:6px 0}
.wide,.graph{overflow-x:auto}
@media print{.out pre{max-height:none;overflow:visible}}
""".strip()

# A graph's boxes have the colour of what is behind them: its own style knows only what the
# browser likes, light or dark, which need not be what the notebook is set to.
_OF_GRAPHS: Final = (
    drawing.STYLE
    + """
.out .flow{--node:transparent;--text:currentColor;--soft:#727b84;--line:#727b84;
--edge:#727b84;--completed:#0f8a5f;--completed-fill:#0f8a5f22;--failed:#d64a12;
--failed-fill:#d64a1222;--running:#3578e5;--running-fill:#3578e522;--waiting:#727b84;
--waiting-fill:#8881;--cancelled:#8b5cf6;--cancelled-fill:#8b5cf622;--unused:#727b84}
"""
)

_CLASS_IN_STYLE: Final = re.compile(r"\.([a-z][\w-]*)")
_ATTRIBUTE: Final = re.compile(r' (class|id|href)="([^"]*)"')


def _output(parts: Iterable[str], *styles: str) -> str:
    """One element of what fits; each part is whole in itself."""
    left = LARGEST
    kept, is_cut = [], False
    for part in parts:
        is_cut = is_cut or len(part) > left
        if not is_cut:
            kept.append(part)
            left -= len(part)
    if is_cut:
        kept.append('<p class="soft">And more, which is too much for a notebook.</p>')
    style = _CLASS_IN_STYLE.sub(r".stepflow-\1", "\n".join([*styles, _STYLE]))
    inner = _ATTRIBUTE.sub(_alone, "".join(kept))
    # Headings would be in the notebook's table of contents.
    inner = inner.replace("<h3>", '<div class="stepflow-title">')
    inner = inner.replace("</h3>", "</div>")
    return f'<div class="stepflow-out"><style>{style}</style>{inner}</div>'


def _alone(attribute: re.Match[str]) -> str:
    """An attribute that means the same wherever it stands; texts have no such quotes."""
    name, value = attribute.groups()
    if name != "class":
        return ""  # other outputs have the same ids, and links lead to those
    classes = " ".join(f"stepflow-{each}" for each in value.split())
    return f' class="{classes}"'


def _values(*known: Any, longest: int = _LONGEST) -> Values:
    return Values(known, longest=longest, most=2 * longest)


def _code(text: str, longest: int = _NAME) -> str:
    return f"<code>{as_text(cut(text, longest))}</code>"


def _head(sign: str, words: str, more: Sequence[str] = ()) -> str:
    soft = f' <span class="soft">{" &middot; ".join(more)}</span>' if more else ""
    return f"<div>{sign} <b>{words}</b>{soft}</div>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{each}</th>" for each in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _more(count: int, shown: int, what: str) -> str:
    left = count - shown
    return f'<p class="soft">{number_of(left, f"more {what}")}</p>' if left > 0 else ""


# -- results ---------------------------------------------------------------------------

_STATES: Final = {
    FlowStatus.SUCCESS: StepState.COMPLETED,
    FlowStatus.FAILED: StepState.FAILED,
    FlowStatus.SKIPPED: StepState.UNUSED,
    FlowStatus.RUNNING: StepState.RUNNING,
}


def _result(result: FlowResult) -> Iterator[str]:
    error, output = result.error, result.output
    if (size := size_of(output)) > _LARGEST_VALUE:
        output = Omitted(size)
    values = _values(output, [] if error is None else _texts_of(error))
    more = [f"run {_code(result.run_id)}"]
    if result.item_index:
        more.append(f"item {result.item_index:,}")
    yield _head(mark(_STATES[result.status]), result.status.value, more)
    if error is not None:
        yield from _error(error, values)
    if result.is_success:
        yield values.block("Output" if output is not result.output else "", output)


def _texts_of(error: FlowError) -> list[str]:
    return [error.message, *(entry.message for entry in error.logs)]


def _error(error: FlowError, values: Values) -> Iterator[str]:
    where = [f"<code>{as_text(cut(error.code, _NAME))}</code>"]
    if error.step_id is not None:
        where.append(f"step {_code(error.step_id)}")
    if error.component is not None:
        where.append(_code(error.component))
    if (error.attempts or 0) > 1:
        where.append(f"tried {error.attempts} times")
    yield f"<div>{' &middot; '.join(where)}</div>"
    yield values.block_of_text("", values.text(error.message))
    if error.logs:
        lines = "\n".join(f"{each.level:<5} {each.message}" for each in error.logs)
        number = number_of(len(error.logs), "entry", "entries")
        block = values.block_of_text("", values.text(lines))
        yield f"<details><summary>{number} of the log</summary>{block}</details>"


# -- findings --------------------------------------------------------------------------

_CROSS: Final = mark(StepState.FAILED)
_SIGNS: Final = {
    "fatal": _CROSS,
    "error": _CROSS,
    "warning": '<b class="mark warning">!</b>',
}


def _findings(found: ValidationResult) -> Iterator[str]:
    counts = []
    if found.errors:
        counts.append(number_of(len(found.errors), "error"))
    if found.warnings:
        counts.append(number_of(len(found.warnings), "warning"))
    if found.is_valid:
        yield _head(mark(StepState.COMPLETED), "valid", counts)
    else:
        yield _head(_CROSS, "not valid", counts)
    shown = found.diagnostics[:_MOST_FINDINGS]
    if shown:
        yield _table(("Level", "Path", "Finding"), map(_finding, shown))
    yield _more(len(found.diagnostics), len(shown), "finding")


def _finding(each: Diagnostic) -> tuple[str, str, str]:
    sign = _SIGNS.get(each.level, '<b class="mark">&middot;</b>')
    return (
        f"{sign} {as_text(cut(each.level, 40))}",
        _code(each.path or "$", _CELL),
        as_text(cut(each.message, _CELL)),
    )


# -- components ------------------------------------------------------------------------


def _components(components: ComponentList) -> Iterator[str]:
    failed = components.failed_plugins
    for plugin, reason in [*failed.items()][:_MOST_INPUTS]:
        yield _head(_CROSS, f"plugin {_code(plugin)} failed")
        yield f"<pre>{as_text(cut(reason, 10 * _CELL))}</pre>"
    yield _more(len(failed), _MOST_INPUTS, "failed plugin")
    yield f"<div><b>{number_of(len(components), 'component')}</b></div>"
    shown = components[:_MOST_COMPONENTS]
    if shown:
        yield _table(("Path", "Plugin", "What it does", "Takes"), map(_row, shown))
    yield _more(len(components), len(shown), "component")


def _row(each: ComponentInfo) -> tuple[str, str, str, str]:
    description = " ".join(each.description[: 2 * _CELL].split())
    return (
        _code(each.path),
        as_text(cut(each.plugin, _NAME)),
        as_text(cut(description, _CELL)),
        _inputs(each.input_schema),
    )


def _inputs(schema: object) -> str:
    """The properties of an input, with their types; of one that may be left out: ``?``."""
    properties = _of_kind(_get(schema, "properties"), Mapping, {})
    required = _of_kind(_get(schema, "required"), list | tuple, ())
    shown = [
        f"<code>{as_text(cut(str(name), 40))}{'' if name in required else '?'}</code>"
        f" <small>{as_text(cut(_type(each), 40))}</small>"
        for name, each in [*properties.items()][:_MOST_INPUTS]
    ]
    if (left := len(properties) - len(shown)) > 0:
        shown.append(f"and {left:,} more")
    return ", ".join(shown)


def _type(schema: object) -> str:
    kind = _get(schema, "type")
    if isinstance(kind, list | tuple):
        return " | ".join(each for each in kind[:_MOST_INPUTS] if isinstance(each, str))
    if isinstance(kind, str):
        return kind
    reference: str = _of_kind(_get(schema, "$ref"), str, "")
    return reference.rpartition("/")[2]


def _get(schema: object, name: str) -> object:
    """A part of what should be a schema; a server may say anything."""
    return schema.get(name) if isinstance(schema, Mapping) else None


def _of_kind(value: object, kind: Any, otherwise: Any) -> Any:
    return value if isinstance(value, kind) else otherwise


# -- runs ------------------------------------------------------------------------------


def _drawn(graph: Graph, states: States) -> str:
    if graph.size > _MOST_STEPS_DRAWN or not graph.is_drawable:
        steps = number_of(graph.size, "step")
        return f'<p class="soft">{steps}: too many to be drawn in a notebook.</p>'
    return f'<div class="graph">{drawing.as_svg(graph, states, style="")}</div>'


class _Excerpt(Page):
    """What of a page can stand in a notebook."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__(
            timeline,
            most_rows=_MOST_ROWS,
            longest=_LONGEST_OF_STEP,
            most_text=_MOST_OF_STEPS,
        )
        self._lines_of.clear()  # the log is not here, and no link to it

    def parts(self) -> Iterator[str]:
        timeline = self._timeline
        steps = "".join(
            self._steps()
        )  # first: the notes tell of rows that were left out
        name = as_text(cut(timeline.flow_name or "Run", _NAME))
        yield f"<div><b>{name}</b> {self._badge()}</div>"
        facts = (f"<span><small>{t}</small> {text}</span>" for t, text in self._facts())
        yield f'<div class="facts">{"".join(facts)}</div>'
        yield self._notes()
        if timeline.graph is not None:
            yield _drawn(timeline.graph, timeline.states)
        yield steps
        yield from self._failed_items()
        yield '<p class="soft"><code>timeline.html()</code> is a page of all of it.</p>'

    def _steps(self) -> Iterator[str]:
        if not self._is_batch:
            yield from self._chart_of_all()
            return
        yield from self._overview()
        if len(self._timeline.items) <= _MOST_SQUARES:
            yield strip(self._timeline.items)

    def _failed_items(self) -> Iterator[str]:
        if self._is_batch:
            failed = [each for each in self._timeline.items if each.error is not None]
            yield "".join(map(self._failed_item, failed[:_MOST_FAILED]))
            yield _more(len(failed), _MOST_FAILED, "failed item")

    def _failed_item(self, item: TimelineItem) -> str:
        assert item.error is not None
        told = self._values.text(f"{item.error.code}: {item.error.message}")
        return f"<div>{_CROSS} item {item.index:,}: {as_text(cut(told, _CELL))}</div>"
