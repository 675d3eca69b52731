"""The documentation: every sample runs, every public name is told of."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import msgspec
import pytest
import typer
import yaml

import stepflow_runtime
from docs.website import hooks
from stepflow_runtime import (
    ApiError,
    FlowResult,
    FlowStatus,
    FlowSyntaxError,
    NotFoundError,
    RunTimeoutError,
    ServerCrashedError,
    ServerExit,
    ServerStartError,
    StepflowRuntime,
    SubmitInterruptedError,
    UnrepresentableValueError,
)
from stepflow_runtime.cli.app import app

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [
        text
        for name, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
        if name == language
    ]


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        check=False,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
REFERENCE = [page for page in PAGES if page.startswith("docs/reference/")]

SAMPLES = [
    pytest.param(sample, id=f"{page}-{number}")
    for page in ("README.md", *PAGES)
    if page != "docs/tutorial.md"  # which is followed, below
    for number, sample in enumerate(blocks(page, "python"), 1)
]


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_runs(sample: str, tmp_path: Path) -> None:
    file = tmp_path / "test_sample.py"
    file.write_text(sample)
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # what it leaves, it leaves elsewhere
    if "import pytest" in sample:
        # Without a configuration pytest-asyncio, which is installed, too, would warn.
        quiet = ("-o", "asyncio_default_fixture_loop_scope=function")
        arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, str(file))
        done = python(*arguments, cwd=tmp_path)
    else:
        done = python(str(file), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_the_clusters_configuration_is_read_up_to_what_the_bundled_server_lacks() -> (
    None
):
    (text,) = [b for b in blocks("docs/how-to/cluster.md", "yaml") if "postgres" in b]
    config = yaml.safe_load(text)
    with pytest.raises(ServerStartError, match="PostgreSQL support was not compiled"):
        StepflowRuntime.start(config)
    of_memory = {**config, "storageConfig": {"type": "inMemory"}}
    del of_memory["leaseManager"]  # that would be asked first, and nobody is there
    with pytest.raises(ServerStartError, match="`nats` feature"):
        StepflowRuntime.start(of_memory)


TUTORIAL = re.compile(
    r"[Ss]ave this as `(?P<name>[^`]+)`:\n\n```\w+\n(?P<content>.*?)^```$"
    r"|In `(?P<edited>[^`]+)`, replace `(?P<old>[^`]+)` by `(?P<new>[^`]+)`"
    r"|^```console\n(?P<command>[^\n]*)\n```.*?^```(?:json|text)\n(?P<shown>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def test_the_tutorial_can_be_followed(tmp_path: Path) -> None:
    """Files are saved and edited, commands print what is shown, and nothing is left out."""
    page = "docs/tutorial.md"
    done = []
    for step in TUTORIAL.finditer(_text(page)):
        if step["name"]:
            (tmp_path / step["name"]).write_text(step["content"])
        elif step["edited"]:
            file = tmp_path / step["edited"]
            assert file.read_text().count(step["old"]) == 1
            file.write_text(file.read_text().replace(step["old"], step["new"]))
        else:
            assert _printed(step["command"], tmp_path) == _as_shown(step["shown"])
        done.append(step.lastgroup)
    files = [*blocks(page, "yaml"), *blocks(page, "python")]
    commands = [each for each in blocks(page, "console") if "pip" not in each]
    assert done.count("content") == len(files)
    assert done.count("shown") == len(commands)
    assert done.count("new") == 1
    assert (tmp_path / "run.html").exists()


def _printed(command: str, folder: Path) -> object:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-c", command.replace(".venv/bin/", "")],
        check=False,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return _as_shown(done.stdout.replace(str(folder) + os.sep, "..."))


def _as_shown(text: str) -> object:
    if not text.startswith("{\n"):
        return text
    return {**msgspec.json.decode(text), "runId": "..."}


def test_the_report_of_the_doctor_looks_as_shown() -> None:
    (command,) = blocks("docs/how-to/command.md", "console")
    (shown,) = [
        b for b in blocks("docs/how-to/command.md", "text") if "hello flow" in b
    ]
    done = python("-m", "stepflow_runtime.cli", *command.split()[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert _names(done.stdout) == _names(shown)


def _names(report: str) -> list[str]:
    """Those of the checks: what they find is this machine's own."""
    return re.findall(r"^(?:ok|warning) +(\S+(?: \S+)?)  ", report, re.MULTILINE)


def test_the_readme_opens_with_the_two_commands() -> None:
    commands = blocks("README.md", "console")
    assert len(commands) == 2
    assert all(command.count("\n") == 1 for command in commands)
    assert "stepflow-runtime run" in commands[0]
    assert commands[1].endswith("-m pytest\n")


def test_every_public_name_is_in_the_reference_and_has_a_docstring() -> None:
    places = [
        name
        for page in REFERENCE
        for name in re.findall(
            r"^::: stepflow_runtime\.(\w+)$", _text(page), re.MULTILINE
        )
    ]
    assert sorted(places) == public_names()
    for name in public_names():
        if name != "FlowSource":
            assert inspect.getdoc(getattr(stepflow_runtime, name)), name


def test_public_classes_can_be_resolved_decoded_and_pickled() -> None:
    result = FlowResult(status=FlowStatus.SUCCESS, run_id="r", output=[1])
    encoded = msgspec.json.encode(result)
    assert msgspec.json.decode(encoded, type=FlowResult) == result
    for name in public_names():
        value = getattr(stepflow_runtime, name)
        # Of those two, anyio's base class stands in the way.
        if inspect.isclass(value) and name not in ("StepflowRuntime", "StepflowClient"):
            typing.get_type_hints(value)
    exit = ServerExit(code=-9, pid=1)
    for error in (
        ApiError("words", status=404, code="NOT_FOUND"),
        NotFoundError("words", status=404, run_id="r"),
        RunTimeoutError("words", run_id="r"),
        SubmitInterruptedError("words"),
        UnrepresentableValueError("words", path="$.x"),
        ServerCrashedError("words", exit=exit),
        FlowSyntaxError("words", source="x", line=1, column=2),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == "words"
        assert vars(copy) == vars(error)


def test_every_option_is_in_the_reference() -> None:
    options = inspect.signature(stepflow_runtime.StepflowRuntime.start).parameters
    reference = _text("docs/reference/runtime.md")
    assert [name for name in options if f"| `{name}` |" not in reference] == []


def test_every_word_of_the_command_is_in_the_reference() -> None:
    reference = _text("docs/reference/command.md")
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        assert f"| `{command.name}" in reference
        for parameter in command.params:
            for word in parameter.opts:
                if word.startswith("-") and word != "--help":
                    assert f"`{word}" in reference, (command.name, word)


def test_every_page_is_in_the_sites_navigation_and_the_other_way_round() -> None:
    nav = yaml.safe_load(_text("mkdocs.yml"))["nav"]
    in_docs = [page.removeprefix("docs/") for page in PAGES]
    assert sorted(_leaves(nav)) == sorted([*in_docs, *hooks.DOCUMENTS.values()])


def _leaves(tree: object) -> Iterator[str]:
    match tree:
        case str():
            yield tree
        case dict():
            for branch in tree.values():
                yield from _leaves(branch)
        case list():
            for branch in tree:
                yield from _leaves(branch)


def test_every_link_leads_somewhere_in_a_view_of_the_repository() -> None:
    """mkdocs looks at those of the site; here, at files and headings as forges have them."""
    broken = [
        (page, target)
        for page in (*hooks.DOCUMENTS, *PAGES)
        for target in re.findall(r"\]\(([^)\s]+)", _prose(page))
        if not re.match(r"https?:", target) and not _leads_somewhere(page, target)
    ]
    assert broken == []


def _leads_somewhere(page: str, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    return file.is_file() and (not anchor or anchor in _anchors(file))


def _anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _prose(str(file)), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {each.replace(" ", "-") for each in words}


def _prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", _text(page), flags=re.MULTILINE | re.DOTALL)


def test_every_promise_of_security_is_shown_by_a_test() -> None:
    """Each row of the threat model that promises something links to its tests, by name."""
    page = _text("docs/explanation/security.md")
    links = re.findall(r"\]\(\.\./\.\./(tests/\S+) \"(\w+)\"\)", page)
    missing = [name for file, name in links if f"def {name}(" not in _text(file)]
    assert missing == []
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| ")]
    threats = [row for row in rows if len(row) == 5][1:]
    assert len(threats) > 10
    unproven = [row[0] for row in threats if "](../../tests/" not in row[3]]
    assert unproven == ["| Another user of this machine"]  # the page says: nothing


def test_the_public_names_are_these() -> None:
    assert public_names() == [
        "AccessDeniedError",
        "ApiError",
        "BackupError",
        "BinaryNotFoundError",
        "ComponentInfo",
        "ComponentList",
        "ConflictError",
        "ConnectionLostError",
        "Diagnostic",
        "Edge",
        "FlowDefinitionError",
        "FlowError",
        "FlowFailedError",
        "FlowId",
        "FlowNotFoundError",
        "FlowResult",
        "FlowSource",
        "FlowStatus",
        "FlowSyntaxError",
        "FlowVariable",
        "Graph",
        "GraphStep",
        "Health",
        "InvalidFlowError",
        "InvalidRequestError",
        "ItemCompleted",
        "ItemCounts",
        "LogConfig",
        "LogEntry",
        "LogFollower",
        "NotFoundError",
        "Omitted",
        "RestartPolicy",
        "RunCompleted",
        "RunCreated",
        "RunEvent",
        "RunInfo",
        "RunLostError",
        "RunStatus",
        "RunTimeoutError",
        "RuntimeState",
        "RuntimeStoppedError",
        "ServerCrashedError",
        "ServerError",
        "ServerExit",
        "ServerFaultError",
        "ServerStartError",
        "StateChange",
        "StepAttempt",
        "StepCompleted",
        "StepInfo",
        "StepReady",
        "StepStarted",
        "StepState",
        "StepflowClient",
        "StepflowError",
        "StepflowExecutor",
        "StepflowRuntime",
        "StepsNeeded",
        "SubRunCreated",
        "SubmitInterruptedError",
        "Timeline",
        "TimelineItem",
        "TimelineLog",
        "TimelineStep",
        "UnknownEvent",
        "UnrepresentableValueError",
        "UnsupportedServerError",
        "ValidationResult",
        "backup_store",
        "component",
    ]


def public_names() -> list[str]:
    return sorted(stepflow_runtime.__all__)


def test_the_changelog_has_a_place_for_what_is_new() -> None:
    assert "## [Unreleased]" in _text("CHANGELOG.md")


@pytest.mark.parametrize(
    ("statement", "more"),
    [
        ("import stepflow_runtime", {"anyio", "msgspec", "stepflow_runtime.api"}),
        (
            "from stepflow_runtime import StepflowClient",
            {"stepflow_runtime.server", "subprocess"},
        ),
        ("from stepflow_runtime import StepflowRuntime", {"stepflow_runtime.timeline"}),
    ],
)
def test_importing_brings_in_nothing_heavy(statement: str, more: set[str]) -> None:
    heavy = {"asyncio", "trio", "httpx", "yaml", "psutil", "ssl", "urllib.request"}
    heavy |= {"typer", "rich", "stepflow_orchestrator", "stepflow_py"} | more
    code = f"import sys; {statement}; print({heavy!r} & set(sys.modules))"
    assert python("-c", code).stdout == "set()\n"


def test_names_are_there_for_type_checkers_as_for_programs() -> None:
    """They stand twice: as imports that only type checkers see, and by module."""
    source = Path(stepflow_runtime.__file__).read_text(encoding="utf-8")
    seen = re.findall(r"^    from \.(\S+) import (\w+) as \2$", source, re.MULTILINE)
    assert {name: module for module, name in seen} == stepflow_runtime._MODULES
    for module, name in seen:
        there = import_module(f"stepflow_runtime.{module}")
        assert getattr(stepflow_runtime, name) is getattr(there, name)
    assert set(stepflow_runtime.__all__) <= set(dir(stepflow_runtime))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = stepflow_runtime.Nothing


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "stepflow_runtime" / "py.typed").exists()
    project = tomllib.loads(_text("pyproject.toml"))["project"]
    assert project["requires-python"] == ">=3.11"


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")
