"""Annotations of handlers: names that only type checkers import, and functions of every make."""

import functools
import sys
import time
import typing
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgflow_prefect import Workflow
from pgflow_prefect.deployment.deployments.payloads import make_parameter_schema
from pgflow_prefect.deployment.handler_files import load_module
from pgflow_prefect.errors import ArgumentInvalidError, UsageError
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.raw_json import RawJson
from tests.unit.definitions import define

GUARDED = """
from __future__ import annotations

import typing
from typing import TYPE_CHECKING

from pgflow_prefect import Workflow

if {guard}:
    {line}

workflow = Workflow("guarded")


@workflow.step
def step(payload: {annotation} | None = None) -> int:
    return 1


flow = workflow.flow
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        del sys.modules[name]


def load(directory: Path, line: str, annotation: str, guard: str = "TYPE_CHECKING") -> PythonHandler:
    path = directory / "flows" / "guarded.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(GUARDED.format(line=line, annotation=annotation, guard=guard), encoding="utf-8")
    (path.parent / "kinds.py").write_text("class Number(int): ...\nCount = int\n", encoding="utf-8")
    workflow: Workflow = load_module(str(path)).workflow
    handler = workflow.handlers["step"]
    assert workflow.find_problems(define({"step": []})) == []
    assert make_parameter_schema(workflow, define({"step": []}))["properties"]["payload"]
    return handler


@pytest.mark.parametrize(
    ("line", "annotation"),
    [
        ("from collections.abc import Sequence", "Sequence[int]"),
        ("from collections.abc import Sequence as Many", "Many[int]"),
        ("import collections.abc", "collections.abc.Sequence[int]"),
        ("import collections.abc as kinds_of", "kinds_of.Sequence[int]"),
        ("from collections.abc import Sequence\n    from kinds import Count", "Sequence[Count]"),
        ("from . import kinds", "list[kinds.Count]"),
        ("from .kinds import Count", "list[Count]"),
    ],
)
@pytest.mark.parametrize("guard", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_a_name_that_only_type_checkers_import_is_found(
    directory: Path, line: str, annotation: str, guard: str
) -> None:
    handler = load(directory, line, annotation, guard)
    handler.check_payload(RawJson("[1, 2]"))
    with pytest.raises(ArgumentInvalidError, match=r"argument 'payload' does not fit its annotation: 0: "):
        handler.check_payload(RawJson('["one"]'))


def test_an_import_for_type_checkers_that_fails_is_named(directory: Path) -> None:
    path = directory / "guarded.py"
    path.write_text(
        GUARDED.format(line="from not_there import Kind", annotation="Kind", guard="TYPE_CHECKING"), encoding="utf-8"
    )
    [problem] = load_module(str(path)).workflow.find_problems(define({"step": []}))
    assert (
        "name 'Kind' is not defined: line 10 imports it under TYPE_CHECKING only, and importing it now fails" in problem
    )
    assert problem.endswith("Move the import out of `if TYPE_CHECKING:`")


class Adder:
    """A callable instance."""

    def __call__(self, payload: int) -> int:
        return payload + 1


class AsyncAdder:
    async def __call__(self, payload: int) -> int:
        return payload + 1


class Holder:
    def add(self, payload: int) -> int:
        return payload + 1


def add(step: int, payload: int) -> int:
    return payload + step


def times(function: Callable[..., int]) -> Callable[..., int]:
    """Decorate as one should."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> int:
        return function(*args, **kwargs)

    return wrapper


def times_async(function: Callable[..., Awaitable[int]]) -> Callable[..., Awaitable[int]]:
    """Decorate an async function in a way that hides that it is one."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Awaitable[int]:
        return function(*args, **kwargs)

    return wrapper


@times
def decorated(payload: int) -> int:
    return payload + 1


@times_async
async def decorated_async(payload: int) -> int:
    return payload + 1


@pytest.mark.parametrize(
    "function", [Adder(), AsyncAdder(), Holder().add, functools.partial(add, 1), decorated, decorated_async]
)
def test_annotations_are_found_however_the_function_was_made(function: Callable[..., Any]) -> None:
    handler = PythonHandler("add", function)
    handler.check_annotations()
    handler.check_payload(RawJson("1"))
    with pytest.raises(ArgumentInvalidError):
        handler.check_payload(RawJson('"one"'))


def test_a_decorator_that_hides_the_arguments_is_refused_with_what_to_add() -> None:
    def hide(function: Callable[..., int]) -> Callable[..., int]:
        def inner(*args: Any, **kwargs: Any) -> int:
            return function(*args, **kwargs)

        return inner

    workflow = Workflow("hidden")
    with pytest.raises(UsageError, match=r"takes \*args: .*write @functools\.wraps\(function\) above"):
        workflow.step("add")(hide(add))


def test_what_a_partial_gives_by_name_is_no_argument() -> None:
    def scale(payload: int, factor: int, *, unit: str) -> str:
        return f"{payload * factor} {unit}"

    handler = PythonHandler("scale", functools.partial(scale, factor=3, unit="kg"))
    assert handler.arguments == ("payload",)
    handler.check_annotations()


@pytest.mark.parametrize("function", [time.time, dict, getattr])
def test_a_function_of_c_whose_arguments_are_not_known_is_refused_with_what_to_write(function: Any) -> None:
    with pytest.raises(UsageError, match="Python can't tell its arguments: write a function that calls it"):
        Workflow("c").step("now")(function)


class DataFrame:
    """As pandas has it."""


DataFrame.__module__ = "pandas.core.frame"


def test_a_table_as_an_annotation_is_refused_with_what_to_pass() -> None:
    def load(payload: DataFrame) -> None: ...

    def transform() -> DataFrame | None: ...

    functions: list[tuple[Callable[..., Any], str]] = [
        (load, "that of argument 'payload', "),
        (transform, "that of its result, "),
    ]
    for function, what in functions:
        with pytest.raises(UsageError) as refused:
            PythonHandler("load", function).check_annotations()
        assert f"the handler of step 'load' has an annotation that can't be used: {what}" in str(refused.value)
        assert "frame.to_dict('records')" in str(refused.value)
        assert "http" not in str(refused.value)


class Order(typing.TypedDict):
    number: int


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="pydantic reads the TypedDict of typing from Python 3.12 on")
@pytest.mark.parametrize("annotation", [Order, list[Order], dict[str, Order | None]])
def test_a_typed_dict_of_typing_is_refused_with_what_to_import(annotation: Any) -> None:
    def load(payload: Any) -> None: ...

    load.__annotations__["payload"] = annotation
    with pytest.raises(UsageError) as refused:
        PythonHandler("load", load).check_annotations()
    assert "that of argument 'payload', " in str(refused.value)
    assert "import it by `from typing_extensions import TypedDict` instead" in str(refused.value)
    assert "http" not in str(refused.value)


def run_cell(text: str, names: dict[str, Any]) -> None:
    exec(text, names)  # noqa: S102


CELL = """
from pgflow_prefect import External
@workflow.step(after=["first"])
def second(payload: int) -> int:
    return payload
workflow.bind("sign", External())
"""


def test_a_cell_of_a_notebook_can_be_run_again() -> None:
    cells: dict[str, Any] = {"__name__": "__main__"}
    run_cell("from pgflow_prefect import Workflow\nworkflow = Workflow('notebook')", cells)
    run_cell(CELL, cells)
    run_cell(CELL.replace("int:", "str:").replace('after=["first"]', "retries=1"), cells)
    workflow = cells["workflow"]
    assert workflow.handlers["second"].function is cells["second"]
    assert workflow.after == {}
    with pytest.raises(UsageError, match="step 'second' of workflow 'notebook' has two handlers"):
        run_cell("workflow.step('second')(lambda: None)", cells)


def test_a_file_with_two_handlers_of_a_step_is_refused() -> None:
    cells: dict[str, Any] = {"__name__": "flows", "__file__": "flows.py"}
    run_cell("from pgflow_prefect import Workflow\nworkflow = Workflow('file')", cells)
    run_cell(CELL, cells)
    with pytest.raises(UsageError, match="step 'second' of workflow 'file' has two handlers: remove one"):
        run_cell(CELL, cells)
