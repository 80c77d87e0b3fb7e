"""What Prefect's workers load a flow by: it leads them to the flow of this workflow, wherever and whatever it is."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint

from pgflow_prefect.deployment.deployments import make_entrypoint
from pgflow_prefect.deployment.handler_files import load_module
from pgflow_prefect.errors import UsageError

GENERATED = """
from pgflow_prefect import Workflow

workflow = Workflow("first")

flow = workflow.flow
"""

SEVERAL = """
from pgflow_prefect import Workflow

one = Workflow("first")
two = Workflow("second")
three = Workflow("third")

third_flow = three.flow
flow = two.flow.with_options(retries=7)
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - known:
        del sys.modules[name]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(workflow_slug: str, source: str, directory: Path) -> tuple[str, str, int | None]:
    """Return the entrypoint, and the name and retries of the flow that Prefect finds there."""
    load_module(source)
    entrypoint = make_entrypoint(workflow_slug, source, directory)
    found: Flow[..., Any] = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    return entrypoint, found.name, found.retries


def test_a_generated_file_is_loaded_by_its_flow_relative_to_the_working_directory(directory: Path) -> None:
    write(directory / "flows/first.py", GENERATED)

    assert load("first", "flows/first.py", directory) == ("flows/first.py:flow", "first", 0)
    assert load("first", str(directory / "flows/first.py"), directory) == ("flows/first.py:flow", "first", 0)


@pytest.mark.parametrize(
    ("slug", "name", "retries"),
    [("first", "one.flow", 0), ("second", "flow", 7), ("third", "third_flow", 0)],
)
def test_of_several_workflows_in_one_file_each_is_loaded(directory: Path, slug: str, name: str, retries: int) -> None:
    write(directory / "all.py", SEVERAL)

    assert load(slug, "all.py", directory) == (f"all.py:{name}", slug, retries)


def test_a_file_elsewhere_is_named_in_full(directory: Path) -> None:
    path = write(directory / "elsewhere/first.py", GENERATED)
    below = directory / "below"
    below.mkdir()

    assert load("first", path, below) == (f"{path}:flow", "first", 0)
    assert load("first", "below/../elsewhere/first.py", below) == (f"{path}:flow", "first", 0)


@pytest.mark.parametrize(("slug", "name"), [("first", "one.flow"), ("third", "third_flow")])
def test_a_module_is_loaded_by_its_name(directory: Path, slug: str, name: str) -> None:
    write(directory / "handlers_of_mine/__init__.py", "")
    write(directory / "handlers_of_mine/shop.py", SEVERAL)

    assert load(slug, "handlers_of_mine.shop", directory) == (f"handlers_of_mine.shop:{name}", slug, 0)


def test_workflows_that_a_module_imports_from_others_are_loaded_from_it(directory: Path) -> None:
    write(directory / "handlers_of_mine/__init__.py", "from handlers_of_mine.shop import one\n")
    write(directory / "handlers_of_mine/shop.py", SEVERAL)

    assert load("first", "handlers_of_mine", directory) == ("handlers_of_mine:one.flow", "first", 0)


def test_a_file_that_prefect_can_not_load_is_refused(directory: Path) -> None:
    write(directory / "handlers", GENERATED)
    load_module("handlers")

    with pytest.raises(UsageError, match=r"names end in \.py only"):
        make_entrypoint("first", "handlers", directory)
