"""The page of a timeline: nothing in it is anybody else's, and a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepflow_runtime import (
    FlowError,
    FlowResult,
    FlowStatus,
    Graph,
    ItemCounts,
    LogEntry,
    Omitted,
    RunCompleted,
    RunCreated,
    RunEvent,
    RunInfo,
    RunStatus,
    StepAttempt,
    StepCompleted,
    StepInfo,
    StepReady,
    StepsNeeded,
    StepStarted,
    StepState,
    SubRunCreated,
    Timeline,
    TimelineItem,
    TimelineLog,
    TimelineStep,
)
from stepflow_runtime.following import EventFollower
from stepflow_runtime.history import Source, read_timeline

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


class Reader(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.others: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)

    @property
    def links(self) -> set[str]:
        hrefs = [attributes.get("href") for _, attributes in self.elements]
        return {each for each in hrefs if each is not None}

    @property
    def ids(self) -> list[str]:
        ids = [attributes.get("id") for _, attributes in self.elements]
        return [each for each in ids if each is not None]


# Every element that the page is made of, and every attribute that one can have.
OURS = {
    **dict.fromkeys(("html", "meta", "title", "style", "head", "body"), ()),
    **dict.fromkeys(("header", "nav", "footer", "h1", "h2", "h3", "div", "span"), ()),
    **dict.fromkeys(("dl", "dt", "dd", "ul", "ol", "li", "p", "b", "i", "small"), ()),
    **dict.fromkeys(("table", "tr", "th", "td", "br", "code", "pre", "a"), ()),
    **dict.fromkeys(("details", "summary", "svg", "g", "rect", "path", "text"), ()),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "id", "title"),
    *("style", "href", "open", "xmlns", "role", "width", "height", "viewbox", "x", "y"),
    *("rx", "d", "text-anchor", "preserveaspectratio"),
}
STYLE = re.compile(
    r"--depth:\d+|--tick:\d+\.\d+%"
    r"|left:(?:\d+\.\d+%|min\(\d+\.\d+%,100% - 3px\);width:\d+\.\d+%)"
)


def check(page: str) -> Reader:
    """No element, attribute, style or link in there is any but ours."""
    assert page.isascii()
    reader = Reader(page)
    for tag, attributes in reader.elements:
        assert tag in OURS, tag
        assert attributes.keys() <= ATTRIBUTES
        if "style" in attributes:
            assert STYLE.fullmatch(attributes["style"] or ""), attributes
        assert re.fullmatch(r"[\w -]*", attributes.get("class") or "")
    assert not reader.others
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.links <= {f"#{each}" for each in reader.ids}
    return reader


NASTY = st.sampled_from(
    [
        *(
            "</script><script>alert(1)</script>",
            "<!--",
            "-->",
            "]]>",
            "<?php",
            "<![CDATA[",
        ),
        *(
            "\"' onload='x",
            "</pre></details></style>",
            "&lt;b&gt;&amp;",
            "&#60;img src=x>",
        ),
        *("\u2028\u2029", "\x00\x1b[2J\x9b", "\ud800\udfff", "\u202e", "javascript:x"),
    ]
)
TEXT = st.lists(NASTY | st.text(max_size=4), min_size=1, max_size=3).map("".join)
JSON = st.recursive(
    TEXT | st.none() | st.integers() | st.builds(Omitted, st.none() | st.integers()),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def timelines(draw: st.DrawFn, depth: int = 0) -> Timeline:
    text = draw(st.lists(TEXT, min_size=8, max_size=8))
    error = FlowError(code=text[0], message=text[1])
    state = draw(st.sampled_from(StepState))
    count = draw(st.sampled_from([1, 2, 21]))
    flow = {
        "name": text[2],
        "steps": [{"id": text[3], "component": text[4], "input": text}],
    }
    attempts = tuple(
        StepAttempt(
            number=n, state=state, started=at(n), ended=at(n + 1), reason=text[5]
        )
        for n in range(draw(st.integers(0, 2)))
    )
    steps = [
        TimelineStep(
            step_id=text[3],
            step_index=0,
            item_index=item,
            state=state,
            component=text[4],
            ready=at(-1),
            attempts=attempts,
            output=draw(JSON),
            error=error,
        )
        for item in range(count)
    ]
    log = TimelineLog(
        entry=LogEntry(
            timestamp=at(1), level=text[6], message=text[7], stream="stderr"
        ),
        run_id=text[0],
        item_index=0,
        step_id=text[3],
    )
    inner = draw(timelines(depth + 1)) if depth == 0 else None
    return Timeline(
        run_id=f"{text[0]}{depth}",
        status=draw(st.sampled_from(RunStatus)),
        flow_id=text[1],
        flow_name=text[2],
        started=draw(st.none() | st.just(NOON)),
        seen=at(3),
        graph=Graph.of(flow),
        items=tuple(
            TimelineItem(
                index=item, state=state, started=NOON, ended=at(1), output=draw(JSON)
            )
            for item in range(count)
        ),
        steps=tuple(steps),
        sub_runs=() if inner is None else (inner,),
        parent_step_id=draw(st.none() | st.just(text[3])),
        logs=(log,),
        notes=(text[5],),
    )


@settings(max_examples=25)
@given(timelines())
def test_no_text_is_more_than_text(timeline: Timeline) -> None:
    reader = check(timeline.html())
    title = timeline.flow_name or ""
    shown = "".join(each if each.isprintable() else "\ufffd" for each in title)
    texts = "".join(reader.texts).replace("\n", "\ufffd").replace("\t", "\ufffd")
    assert shown[:90] in texts


# -- whatever a server says -----------------------------------------------------------

PLACES = st.sampled_from([0, 1, 2, -1, 10**9, -(10**9)])
TIMES = st.none() | st.sampled_from(
    [NOON, at(5), at(-5), NOON.replace(tzinfo=None), datetime.max.replace(tzinfo=UTC)]
)
RUNS = st.sampled_from(["r", "r", "r", "s", "s", "t", "", "\ud800"])
EVENTS = st.lists(
    st.one_of(
        *(
            st.builds(
                kind,
                sequence_number=PLACES,
                run_id=RUNS,
                timestamp=TIMES,
                **{
                    name: values
                    for name, values in {
                        "item_index": PLACES,
                        "step_index": PLACES,
                        "step_id": TEXT,
                        "step_ids": st.tuples(st.sampled_from(["a", "b", "?"])),
                        "attempt": PLACES,
                        "status": st.sampled_from(RunStatus),
                        "parent_run_id": RUNS,
                        "item_count": PLACES,
                    }.items()
                    if name in kind.__struct_fields__
                },
            )
            for kind in (StepsNeeded, StepReady, StepStarted, StepCompleted)
            + (RunCreated, SubRunCreated, RunCompleted)
        )
    ),
    max_size=12,
)
INFOS = st.builds(
    RunInfo,
    run_id=st.just("r"),
    status=st.sampled_from(RunStatus),
    flow_id=st.none() | st.just("f"),
    items=st.builds(ItemCounts, total=PLACES),
    created_at=TIMES,
    completed_at=TIMES,
)
STEP_INFOS = st.builds(
    StepInfo,
    step_id=TEXT,
    status=st.sampled_from(RunStatus),
    step_index=PLACES,
    item_index=PLACES,
    error=st.none() | st.builds(FlowError, code=TEXT, message=TEXT),
)
RESULTS = st.builds(
    FlowResult,
    status=st.sampled_from(FlowStatus),
    run_id=st.just("r"),
    item_index=PLACES,
    error=st.none() | st.builds(FlowError, code=TEXT, message=TEXT),
)


class Played:
    """Events that a server has sent, and no more."""

    def __init__(self, events: list[RunEvent]) -> None:
        self._events = iter(events)

    def __aiter__(self) -> Played:
        return self

    async def __anext__(self) -> RunEvent:
        for event in self._events:
            return event
        raise StopAsyncIteration

    def close(self) -> None: ...


NEEDED = StepsNeeded(
    sequence_number=0, run_id="r", timestamp=None, item_index=0, step_ids=("a",)
)
SUB_RUN = SubRunCreated(
    sequence_number=0,
    run_id="s",
    timestamp=None,
    parent_run_id="r",
    flow_id="",
    item_count=0,
)
INFO = RunInfo(
    run_id="r",
    status=RunStatus.UNKNOWN,
    flow_id="f",
    items=ItemCounts(total=0),
    created_at=None,
    completed_at=None,
)
STEP_INFO = StepInfo(step_id="x", status=RunStatus.UNKNOWN, step_index=1, item_index=0)


@settings(max_examples=60)
@example(
    INFO, [NEEDED, SUB_RUN], [STEP_INFO], [], None
)  # of a flow that has no such step
@given(
    INFOS,
    EVENTS,
    st.lists(STEP_INFOS, max_size=3),
    st.lists(RESULTS, max_size=3),
    TIMES,
)
def test_whatever_a_server_says_makes_a_page(
    info: RunInfo,
    events: list[RunEvent],
    steps: list[StepInfo],
    results: list[FlowResult],
    now: datetime | None,
) -> None:
    async def told(value: Any, *_: Any) -> Any:
        return value

    flow = {
        "steps": [
            {"id": "a", "component": "/x"},
            {
                "id": "b",
                "component": "/map",
                "input": {"f": {"steps": [{"component": 1}]}},
            },
        ]
    }
    messages = [
        "item=1, step=999999999",
        "Retrying step 'a' (reason: x, attempt: 1, delay: 9s)",
    ]
    entries = [
        LogEntry(
            timestamp=NOON, level="INFO", message=each, stream="stdout", run_id="r"
        )
        for each in messages
    ]
    source = Source(
        run=partial(told, info),
        document=partial(told, flow),
        steps=partial(told, steps),
        results=partial(told, results),
        events=lambda run_id: cast(EventFollower, Played(events)),
        now=partial(told, now),
        logs=partial(told, entries),
        logs_of_failures=lambda run_id, since, errors: told([()] * len(errors)),
    )
    check(anyio.run(read_timeline, source, "r").html())


def one_step(**fields: Any) -> Timeline:
    step = TimelineStep(
        step_id="a",
        step_index=0,
        item_index=0,
        state=StepState.COMPLETED,
        attempts=(
            StepAttempt(
                number=1, state=StepState.FAILED, started=at(0), ended=at(0.25)
            ),
            StepAttempt(
                number=2,
                state=StepState.COMPLETED,
                started=at(0.25),
                ended=at(1),
                pause=0.5,
            ),
        ),
        **fields,
    )
    flow = {
        "steps": [{"id": "a", "component": "/x", "input": {"password": "hunter22"}}]
    }
    entry = LogEntry(
        timestamp=at(0.1), level="INFO", message="step 'a' told", stream="stdout"
    )
    return Timeline(
        run_id="r",
        status=RunStatus.COMPLETED,
        started=NOON,
        ended=at(1),
        seen=at(1),
        graph=Graph.of(flow),
        items=(
            TimelineItem(index=0, state=StepState.COMPLETED, output="hunter22 again"),
        ),
        steps=(step,),
        logs=(TimelineLog(entry=entry, run_id="r", item_index=0, step_id="a"),),
    )


def test_steps_and_lines_of_the_log_lead_to_each_other() -> None:
    reader = check(one_step().html())
    assert {"#s0-0-0", "#l0"} <= reader.links


def test_bars_are_where_the_times_are() -> None:
    page = one_step().html()
    bars = re.findall(
        r'<i class="(\w+)"[^>]* style="left:min\(([\d.]+)%,[^;]*;width:([\d.]+)', page
    )
    assert bars == [
        ("failed", "0.00", "25.00"),
        ("pause", "25.00", "50.00"),
        ("completed", "75.00", "25.00"),
    ]


def test_what_is_a_secret_by_its_name_is_starred_wherever_it_stands() -> None:
    page = one_step(output={"api_key": "sk-0123456", "x": "by sk-0123456"}).html()
    assert "hunter22" not in page and "sk-0123456" not in page
    assert page.count("***") >= 3


def batch(count: int) -> Timeline:
    states = [
        StepState.FAILED if n % 97 == 5 else StepState.COMPLETED for n in range(count)
    ]
    steps = tuple(
        TimelineStep(
            step_id=name,
            step_index=place,
            item_index=n,
            state=state,
            attempts=(
                StepAttempt(
                    number=1,
                    state=state,
                    started=at(n / 9 + place),
                    ended=at(n / 9 + place + 1),
                ),
            ),
            output={"n": n},
        )
        for n, state in enumerate(states)
        for place, name in enumerate("ab")
    )
    items = tuple(
        TimelineItem(
            index=n,
            state=state,
            started=at(n / 9),
            ended=at(n / 9 + 2),
            output={"some": "x" * 80},
        )
        for n, state in enumerate(states)
    )
    flow = {"steps": [{"id": "a", "component": "/x"}, {"id": "b", "component": "/y"}]}
    return Timeline(
        run_id="r",
        status=RunStatus.FAILED,
        flow_name="batch",
        started=NOON,
        ended=at(count / 9 + 2),
        graph=Graph.of(flow),
        items=items,
        steps=steps,
    )


def test_ten_thousand_items_are_a_page_that_can_be_read() -> None:
    timeline = batch(10_000)
    began = time.monotonic()
    page = timeline.html()
    assert time.monotonic() - began < 20
    assert len(page) < 6_000_000
    reader = check(page)
    assert {f"i{n}" for n in range(10_000)} <= set(reader.ids)
    # Those that failed come first, step by step, and each group of items can be jumped to.
    assert {"#d5", "#d102", "#c0", "#c19"} <= reader.links
    assert "104 failed" in "".join(reader.texts)


@pytest.mark.skipif(
    (CHROMIUM := shutil.which("chromium")) is None, reason="there is no chromium"
)
def test_a_browser_shows_it_and_has_nothing_to_refuse(tmp_path: Path) -> None:
    file = tmp_path / "run.html"
    file.write_text(batch(2_000).html(), encoding="cp1252")
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--enable-logging=stderr", "--window-size=1200,900"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            *(f"--screenshot={tmp_path / 'run.png'}", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert "Refused to" not in done.stderr and "CONSOLE" not in done.stderr
    assert len(Reader(done.stdout).ids) > 2_000
    assert "✗ failed" in done.stdout
    assert (tmp_path / "run.png").stat().st_size > 20_000
