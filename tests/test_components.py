"""Python functions as components: declared, served by a worker of their own, and refused."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from stepflow_runtime import (
    ComponentInfo,
    FlowResult,
    RestartPolicy,
    RuntimeState,
    ServerCrashedError,
    ServerStartError,
    StepflowRuntime,
    component,
)
from stepflow_runtime.server.options import ServerOptions

from . import functions
from .conftest import TRIO, each_backend, wait_until

SERVED: list[Callable[..., Any]] = [
    functions.greet,
    functions.every_kind,
    functions.returns,
    functions.fails,
    functions.fails_later,
    functions.meet,
    functions.count_in_context,
    functions.describe_process,
    functions.plain,
    functions.wrapped,
]
INPUT = {
    "point": {"x": 1},
    "colour": "red",
    "when": "2024-01-02T03:04:05Z",
    "price": "1.50",
    "tree": {"value": 1, "children": [{"value": 2}]},
    "options": {"fast": True},
    "by_number": {"7": "seven"},
    "model": {"number": 1},
}


def of_one(component: str, input: object) -> dict[str, Any]:
    """A flow of one step."""
    return {
        "name": "one step",
        "description": "Calls a component",
        "steps": [{"id": "a", "component": component, "input": input}],
        "output": {"$step": "a"},
    }


async def result_of(
    runtime: StepflowRuntime, name: str, /, **input: object
) -> FlowResult:
    return await runtime.run(of_one(f"/python/{name}", {"$input": "$"}), input)


async def call(runtime: StepflowRuntime, name: str, /, **input: object) -> Any:
    return (await result_of(runtime, name, **input)).unwrap()


async def failure(runtime: StepflowRuntime, name: str, /, **input: object) -> str:
    error = (await result_of(runtime, name, **input)).error
    assert error is not None
    return str(error)


@each_backend
@pytest.mark.anyio
async def test_functions_are_steps() -> None:
    async with StepflowRuntime.start(components=SERVED) as runtime:
        await _check_values(runtime)
        await _check_refused_inputs(runtime)
        await _check_refused_outputs(runtime)
        await _check_failures(runtime)
        await _check_process(runtime)
        known = {each.path.strip("/"): each for each in await runtime.list_components()}
        _check_schemas(known["greet"], known["every-kind"])
        # What the configuration has without them is still there.
        assert (await runtime.run(of_one("/noop", 1))).unwrap() == 1


async def _check_values(runtime: StepflowRuntime) -> None:
    assert await call(runtime, "greet", name="Ada") == "Hello, Ada!"
    assert await call(runtime, "greet", name="Ada", times=2.0) == (
        "Hello, Ada! Hello, Ada!"
    )
    assert await call(runtime, "every-kind", **INPUT) == {
        "point": {"x": 1, "y": 0.5},
        "colour": "red",
        "when": "2024-01-02T03:04:05Z",
        "price": "2.50",
        "tree": {"value": 1, "children": [{"value": 2, "children": []}]},
        "options": {"fast": True},
        "model": {"number": 1},
        "small": 3,
        "mode": "slow",
        "maybe": None,
        "anything": None,
    }
    assert await call(runtime, "plain", text="loud") == "LOUD"
    assert await call(runtime, "wrapped", number=1) == 2
    assert await call(runtime, "returns", what="nothing") is None


async def _check_refused_inputs(runtime: StepflowRuntime) -> None:
    for changed, words in (
        ({"point": {"x": 1.5}}, "Expected `int`, got `float` - at `$.point.x`"),
        ({"small": 10}, "Expected `int` <= 9 - at `$.small`"),
        ({"mode": "fast"}, "Invalid enum value 'fast' - at `$.mode`"),
        ({"model": {"number": -1}}, "a number below 0 - at `$.model`"),
        ({"smal": 1}, "Object contains unknown field `smal`"),
    ):
        told = await failure(runtime, "every-kind", **{**INPUT, **changed})
        refusal = f"the input does not fit every-kind: {words}"
        assert told.startswith(
            f"step 'a' (/python/every-kind): {refusal} (INVALID_INPUT)"
        )
    assert "missing required field `name`" in await failure(runtime, "greet")
    deep: Any = 1
    for _ in range(60):  # protobuf would end the stream, and with it the worker
        deep = [deep]
    told = await failure(runtime, "wrapped", number=deep)
    assert "the input has too many containers inside one another" in told


async def _check_refused_outputs(runtime: StepflowRuntime) -> None:
    for what, words in (
        ("bytes", "what it returned, $: bytes has no form in JSON"),
        ("object", "JSON has no form for it"),
        ("long", "takes 5000005 bytes, and the server takes"),
        ("numbers", "takes 4400005 bytes"),
        ("deep", "is inside of 30 containers"),
        ("exact", "beyond ±2^53"),
    ):
        assert words in await failure(runtime, "returns", what=what)


async def _check_failures(runtime: StepflowRuntime) -> None:
    result = await result_of(runtime, "fails", how="call")
    assert result.error is not None
    assert result.error.code == "COMPONENT_FAILED"
    assert result.error.message == "OverflowError: 3 is too much"
    warning, traceback = result.error.logs
    assert (warning.level, warning.target) == ("WARN", "tests.fails")
    for entry in (warning, traceback):
        assert (entry.run_id, entry.step_id) == (result.run_id, "a")
    # From the user's first line on.
    lines = traceback.message.splitlines()
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[2].startswith(f'  File "{functions.__file__}", line ')
    assert "_refuse(3)" in traceback.message
    assert lines[-1] == "OverflowError: 3 is too much"
    printed = [each.message for each in runtime.get_recent_logs()]
    assert "a print of call" in printed

    told = await failure(runtime, "fails", how="cause")
    assert "RuntimeError: two\n  lines (COMPONENT_FAILED)" in told
    assert "OverflowError: 4 is too much" in told
    for how, words in (
        ("key", "KeyError: 'name'"),
        ("exit", "SystemExit: bye"),
        ("stop", "StopIteration: 1"),
    ):
        assert words in await failure(runtime, "fails", how=how)
    for how, words in (("cancelled", "CancelledError"), ("exit", "SystemExit: 3")):
        assert words in await failure(runtime, "fails_later", how=how)


async def _check_process(runtime: StepflowRuntime) -> None:
    places: list[int] = []

    async def meet() -> None:
        places.append(await call(runtime, "meet"))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(meet)
    assert sorted(places) == [0, 1, 2]
    counts = [await call(runtime, "count_in_context") for _ in range(2)]
    assert counts == [1, 1]
    described = await call(runtime, "describe_process")
    workers = psutil.Process(runtime.pid).children(recursive=True)
    assert described.pop("pid") in [each.pid for each in workers]
    assert described == {
        "directory": os.getcwd(),
        "argv": [],
        "main": functions.__name__,
    }


def _check_schemas(greet: ComponentInfo, every_kind: ComponentInfo) -> None:
    assert greet.description == "Greets somebody.\n\nAs often as it is told to."
    assert greet.input_schema == {
        "title": "greet",
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "times": {"type": "integer", "default": 1},
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    assert greet.output_schema == {"type": "string"}
    schema = every_kind.input_schema
    assert schema is not None
    assert sorted(schema["required"]) == sorted(INPUT)
    assert schema["properties"]["tree"] == {"$ref": "#/$defs/Tree"}
    assert schema["properties"]["small"]["maximum"] == 9
    assert schema["properties"]["model"] == {"$ref": "#/$defs/Inner"}
    assert schema["$defs"]["Inner"] == {"type": "object"}
    assert schema["$defs"]["Tree"]["properties"]["children"]["items"] == (
        {"$ref": "#/$defs/Tree"}
    )


def test_a_runtime_in_a_thread_takes_its_worker_along_and_a_file_is_joined(
    tmp_path: Path,
) -> None:
    config = tmp_path / "config.yml"
    config.write_text(
        "plugins: {own: {type: builtin}}\nroutes: {/mine: [{plugin: own}]}\n"
    )
    with StepflowRuntime.start(
        config, components=[functions.describe_process]
    ) as runtime:
        described = asyncio.run(call(runtime, "describe_process"))
        assert psutil.pid_exists(described["pid"])
        # As the program's, and not the folder of the file as other workers have it.
        assert described["directory"] == os.getcwd()
        assert asyncio.run(runtime.run(of_one("/mine/noop", 1))).unwrap() == 1
    assert not psutil.pid_exists(described["pid"])


# Whatever the loop is, it only waits here.
@pytest.mark.parametrize("anyio_backend", [TRIO])
@pytest.mark.anyio
async def test_a_fresh_server_has_the_code_as_it_is_by_then_and_so_has_a_fresh_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "changing.py"

    def write(version: int) -> None:
        file.write_text(f"import os\ndef tell(): return [{version}, os.getpid()]\n")
        # What is compiled is known by the file's time, in whole seconds.
        os.utime(file, (version, version))

    write(1)
    monkeypatch.syspath_prepend(tmp_path)
    tell = import_module(file.stem).tell
    async with StepflowRuntime.start(
        components=[tell], restart_policy=RestartPolicy.ON_FAILURE, max_restarts=1
    ) as runtime:
        version, worker = await call(runtime, "tell")
        assert version == 1
        write(2)
        os.kill(worker, signal.SIGKILL)
        await wait_until(lambda: _says(runtime, "was killed by SIGKILL"))
        version, again = await call(runtime, "tell")
        assert version == 2
        assert again != worker
        write(3)
        server = runtime.pid
        assert server is not None
        os.kill(server, signal.SIGKILL)
        await wait_until(lambda: runtime.restarts == 1)
        await runtime.wait_ready()
        version, worker = await call(runtime, "tell")
        assert version == 3
        # One that cannot come up again ends the server: nobody waits for it for ever.
        file.write_text("import nothing_of_that_name\n")
        os.kill(worker, signal.SIGKILL)
        await wait_until(lambda: runtime.state is RuntimeState.FAILED)
        with pytest.raises(
            ServerCrashedError, match="No module named 'nothing_of_that"
        ):
            await call(runtime, "tell")


def test_a_worker_whose_server_dies_alone_ends_and_lets_others_live(
    real_binary: Path,
) -> None:
    """Here this process is the parent of what is left, as init is elsewhere."""
    options = ServerOptions(components=[functions.plain]).anchored()
    command = options.command(os.environ, port=0, orchestrator_id="alone")
    assert command.stdin is not None
    server = psutil.Popen(
        [real_binary, *command.argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=command.env,
    )
    with server.stdin as stdin:
        stdin.write(command.stdin)
    with server.stdout as stdout:
        while b'"port":' not in stdout.readline():  # the worker is ready by then
            pass
        workers = server.children(recursive=True)
        assert len(workers) == 2
        server.kill()
        server.wait()
    gone, alive = psutil.wait_procs(workers, timeout=15)
    assert (len(gone), alive) == (2, [])


def _says(runtime: StepflowRuntime, words: str) -> bool:
    return any(words in each.message for each in runtime.get_recent_logs())


def test_what_an_import_raises_is_told_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(ServerStartError) as caught:
        StepflowRuntime.start(
            components=[functions.greet], env={"TEST_IMPORT_FAILS": "it"}
        )
    assert time.monotonic() - began < 15  # the server alone would wait 30 s
    told = str(caught.value)
    assert "LookupError: no luck with it" in told
    assert "loading.py" not in told


SCRIPT = """
import asyncio
from stepflow_runtime import StepflowRuntime, component

@component
def shout(text: str) -> str:
    return text.upper() + __name__

FLOW = {
    "name": "shout", "description": "Shouts",
    "steps": [{"id": "a", "component": "/python/shout", "input": {"text": "hi "}}],
    "output": {"$step": "a"},
}

async def main():
    async with StepflowRuntime.start(components=[shout]) as runtime:
        print((await runtime.run(FLOW)).unwrap())
"""
GUARDED = f'{SCRIPT}\nif __name__ == "__main__":\n    asyncio.run(main())\n'
UNGUARDED = f"{SCRIPT}\nasyncio.run(main())\n"


def python(
    *arguments: str, cwd: Path, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_functions_of_a_script_are_found_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(GUARDED)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "tool.py").write_text(GUARDED)
    assert python("script", cwd=tmp_path).stdout == "HI __mp_main__\n"
    as_module = python("-m", "package.tool", cwd=tmp_path)
    assert as_module.stdout == "HI package.tool\n"


def test_a_script_without_a_guard_starts_one_runtime_and_is_told(
    tmp_path: Path,
) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = python("script.py", cwd=tmp_path)
    assert done.returncode == 1
    assert 'put what starts it below if __name__ == "__main__":' in done.stderr


LATER = """
import asyncio, dataclasses, json
from typing import TYPE_CHECKING
from stepflow_runtime import StepflowRuntime, component

if TYPE_CHECKING:
    from nowhere import Stranger

@component
def grow(tree: Tree, more: list[Tree] | None = None) -> Tree:
    return Tree(tree.height + len(more or ()), tree)

@component
def meet(stranger: Stranger) -> None: ...

@dataclasses.dataclass
class Tree:
    height: int
    before: Tree | None = None

FLOW = {
    "name": "grow", "description": "Grows",
    "steps": [{"id": "a", "component": "/python/grow", "input": {"$input": "$"}}],
    "output": {"$step": "a"},
}

async def main():
    try:
        StepflowRuntime.start(components=[meet])
    except ValueError as exc:
        print(exc)
    async with StepflowRuntime.start(components=[grow]) as runtime:
        (info,) = [c for c in await runtime.list_components() if c.plugin == "python"]
        print(info.input_schema["properties"]["tree"])
        result = await runtime.run(FLOW, {"tree": {"height": 2}, "more": [{"height": 1}]})
        print(json.dumps(result.unwrap(), sort_keys=True))

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("from __future__ import annotations", id="as text"),
        pytest.param(
            "",
            id="deferred",
            marks=pytest.mark.skipif(
                sys.version_info < (3, 14),
                reason="annotations wait since Python 3.14 (PEP 649)",
            ),
        ),
    ],
)
def test_annotations_may_name_what_comes_later(first: str, tmp_path: Path) -> None:
    """And what is there for type checkers only is told of, when it is needed."""
    (tmp_path / "script.py").write_text(first + LATER)
    done = python("script.py", cwd=tmp_path)
    refused, schema, grown = done.stdout.splitlines() or [done.stderr] * 3
    assert "an annotation of __main__.meet cannot be read" in refused
    assert "Stranger" in refused
    assert "Tree" in schema
    assert grown == '{"before": {"before": null, "height": 2}, "height": 3}'


@pytest.mark.parametrize("how", ["-c", "-"])
def test_functions_that_are_in_no_file_are_refused(how: str, tmp_path: Path) -> None:
    arguments = ("-c", GUARDED) if how == "-c" else ("-",)
    done = python(*arguments, cwd=tmp_path, stdin=GUARDED)
    assert done.returncode == 1
    assert "ValueError: components: __main__.shout was typed in" in done.stderr
    assert "%%writefile" in done.stderr


# -- refused before anything starts ----------------------------------------------------


class _Holder:
    def method(self) -> None: ...


def _many(*arguments: int) -> None: ...


def _loose(**named: int) -> None: ...


def _by_place(number: int, /) -> None: ...


def _stepwise() -> Any:
    yield 1


def _of_object(thing: _Holder) -> None: ...


def _of_nothing(thing: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@component(name="greet")
def _second(name: str) -> None: ...


def _local() -> Callable[..., None]:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: 1, "is a lambda, which no worker can find: use def"),
        (_local(), "is defined inside of a function"),
        (_Holder.method, "is defined in a class"),
        (_Holder().method, "is a method, and its object stays here"),
        (print, "is no function"),
        (_Holder, "is no function"),
        (_many, "takes *arguments: 'int'"),
        (_loose, "takes **named: 'int'"),
        (_by_place, "takes 'number' by position alone"),
        (_stepwise, "is a generator: return a list"),
        (_of_object, "the parameter 'thing' of tests.test_components._of_object"),
        (_of_nothing, "name 'Nowhere' is not defined"),
        (_second, "there are two by the name 'greet'"),
    ],
)
def test_what_no_worker_could_call_is_refused(function: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match="^components: ") as caught:
        StepflowRuntime.start(components=[functions.greet, function])
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["", "a/b", "{a}", "a b", "..", "ä", "x" * 101, 3])
def test_a_name_is_one_segment_of_a_path(name: Any) -> None:
    with pytest.raises(
        (ValueError, TypeError), match="the name of a component must be"
    ):
        component(name=name)


def test_a_component_is_the_function_that_it_was() -> None:
    assert functions.greet("Ada", times=2) == "Hello, Ada! Hello, Ada!"
    assert component(functions.plain) is functions.plain


def test_components_are_a_list() -> None:
    with pytest.raises(TypeError, match="^components must be a list of functions"):
        StepflowRuntime.start(components=functions.greet)  # type: ignore[arg-type]


def test_a_configuration_keeps_what_it_has() -> None:
    plugin, route = {"python": {"type": "builtin"}}, {"/python": [{"plugin": "b"}]}
    for config, words in (
        ({"plugins": plugin, "routes": {}}, "'python' among its plugins already"),
        ({"plugins": {}, "routes": route}, "'/python' among its routes already"),
        ({"plugins": {}}, "has no routes"),
    ):
        with pytest.raises(ValueError, match=f"^components: .*{words}"):
            StepflowRuntime.start(config, components=[functions.greet])
    with pytest.raises(ValueError, match="^components cannot be merged"):
        StepflowRuntime.start(
            components=[functions.greet], env={"STEPFLOW_CONFIG": "x.yml"}
        )


def test_without_the_extra_it_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stepflow_py", None)
    with pytest.raises(
        ValueError, match=r'pip install "stepflow-runtime\[components\]"'
    ):
        StepflowRuntime.start(components=[functions.greet])
