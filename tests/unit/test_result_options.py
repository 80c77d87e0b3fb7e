"""What `result_storage=` and `result_serializer=` may be, in code and in a worker's settings."""

from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.system import Secret
from prefect.filesystems import LocalFileSystem, RemoteFileSystem
from prefect.serializers import PickleSerializer
from pydantic import ValidationError

from pgflow_prefect import Workflow
from pgflow_prefect.deployment.result_problems import find_result_problems
from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.process.storages import name_block
from pgflow_prefect.execution.result_options import make_result_options, read_result_options
from pgflow_prefect.settings import Settings


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (LocalFileSystem(basepath="/srv/results"), "file:///srv/results"),
        (Path("/srv/results"), "file:///srv/results"),
        ("file:///srv/results", "file:///srv/results"),
        ("memory://results/here", "memory://results/here"),
        (RemoteFileSystem(basepath="memory://user:hidden@results?token=hidden"), "memory://results"),
    ],
)
def test_a_storage_is_a_block_a_path_or_a_url(given: object, name: str) -> None:
    assert name_block(make_result_options(given, None).storage) == name


def test_a_block_is_loaded_by_its_name_only_when_it_is_used() -> None:
    assert make_result_options("s3-bucket/results", None).storage == "s3-bucket/results"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("results", "result_storage='results' is no storage: give a block, the name of one such as"),
        ("./results", "is no storage"),
        ("/srv/results", "is no storage"),
        (3, "result_storage=3 is no storage"),
        (Secret(value="x"), "result_storage is a block of the type Secret, which has no read_path"),
        ("file://host/results", "names no path of this machine"),
        ("memroy://results", "fsspec knows no memroy:// (did you mean 'memory'?)"),
        ("memory://", "must include a location"),
        ("gdrive://results", "needs a package that is not installed here"),
    ],
)
def test_a_bad_storage_is_refused_with_what_to_give(given: object, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_result_options(given, None)
    assert message in str(refused.value)


@pytest.mark.parametrize("url", ["s3://key:hidden@bucket", "memory://results?secret=hidden"])
def test_a_url_with_credentials_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UsageError, match="put them into a block") as refused:
        make_result_options(url, None)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "name", "passes_objects"),
    [
        ("json", "json", False),
        ("compressed/json", "compressed/json", False),
        ("pickle", "pickle", True),
        ("compressed/pickle", "compressed/pickle", True),
        (PickleSerializer(), "pickle", True),
    ],
)
def test_a_serializer_has_its_name_in_prefect(given: Any, name: str, passes_objects: bool) -> None:
    options = make_result_options(None, given)
    assert options.codec is not None
    assert (options.codec.name, options.passes_objects) == (name, passes_objects)


@pytest.mark.parametrize("given", ["pickel", "__unknown__", 7, PickleSerializer])
def test_an_unknown_serializer_is_refused_with_the_known_ones(given: Any) -> None:
    with pytest.raises(UsageError, match="there is 'json', 'pickle', 'compressed/json', 'compressed/pickle'"):
        make_result_options(None, given)


def test_settings_name_a_storage_and_no_serializer_that_runs_code() -> None:
    options = read_result_options(Settings(result_storage="file:///srv/results", result_serializer="compressed/json"))
    assert options.codec is not None
    assert name_block(options.storage) == "file:///srv/results"
    with pytest.raises(ValidationError, match="a step's code names any other one"):
        Settings(result_serializer="pickle")
    with pytest.raises(UsageError, match="PGFLOW_RESULT_STORAGE: result_storage='nowhere' is no storage"):
        read_result_options(Settings(result_storage="nowhere"))


def test_a_step_has_the_options_of_its_workflow_unless_it_names_its_own(tmp_path: Path) -> None:
    workflow = Workflow("w", result_storage=tmp_path, result_serializer="pickle")

    @workflow.step
    def one() -> None: ...

    @workflow.step(result_storage="s3-bucket/results", result_serializer="json")
    def other() -> None: ...

    first, second = workflow.handlers["one"].results, workflow.handlers["other"].results
    assert first.passes_objects
    assert name_block(first.storage) == tmp_path.as_uri()
    assert not second.passes_objects
    assert second.storage == "s3-bucket/results"


def test_a_serializer_without_any_storage_is_a_problem_of_the_step() -> None:
    workflow = Workflow("w")

    @workflow.step(result_serializer="pickle")
    def make() -> bytes:
        return b""

    [problem] = find_result_problems(workflow, Settings())
    assert problem.startswith("step 'make' has result_serializer='pickle' and no storage")
    assert not [*find_result_problems(workflow, Settings(result_storage="file:///srv/results"))]
    [wrong] = find_result_problems(workflow, Settings(result_storage="nowhere"))
    assert wrong.startswith("PGFLOW_RESULT_STORAGE: ")
