"""Results that are no JSON, or too big for a row: their values are in a storage, and their rows refer to them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.filesystems import LocalFileSystem
from prefect.serializers import CompressedSerializer, PickleSerializer

from pgflow_prefect import Branch, Command, HttpEndpoint, Queue, SqlFunction, StepContext, Workflow
from pgflow_prefect.errors import RunFailedError, UsageError
from pgflow_prefect.handlers.references import MARK
from tests.conftest import Connection
from tests.engine import run_workflow
from tests.http_server import http_server
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run, read_steps
from tests.integration.queues.consumers import consuming

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

BINARY = bytes(range(256))


class Frame:
    """Stands for a class that pydantic does not know, such as a DataFrame."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows


@dataclass
class Report:
    frame: Frame
    raw: bytes


def find_reference(db: Connection, step: str) -> dict[str, Any]:
    result = read_steps(db)[step][2]
    assert list(result) == [MARK]
    return dict(result[MARK])


def list_objects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


async def test_the_next_step_gets_the_value_and_the_row_a_reference_with_its_sha256(
    db: Connection, define: Define, tmp_path: Path
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["make", "take", "all"], [("make", "take"), ("make", "all"), ("take", "all")])
    taken: list[object] = []

    @workflow.step(result_storage=LocalFileSystem(basepath=str(tmp_path)), result_serializer="pickle")
    def make() -> Frame:
        return Frame([1, 2, 3])

    @workflow.step(result_storage=tmp_path.as_uri(), result_serializer=PickleSerializer())
    async def take(make: Frame) -> bytes:
        taken.append(make.rows)
        return BINARY

    @workflow.step("all")
    def join(upstream: dict[str, object]) -> int:
        frame = upstream["make"]
        assert isinstance(frame, Frame)
        taken.extend([frame.rows, upstream["take"]])
        return 7

    assert await workflow.flow() == {"all": 7}
    assert taken == [[1, 2, 3], [1, 2, 3], BINARY]
    first, second = list_objects(tmp_path)
    run_id = read_run(db)[2]
    assert {first.parent.name, second.parent.name} == {str(run_id)}
    for step in ("make", "take"):
        reference = find_reference(db, step)
        stored = (tmp_path / reference["key"]).read_bytes()
        assert (reference["sha256"], reference["size"]) == (sha256(stored).hexdigest(), len(stored))
        assert reference["serializer"] == "pickle"
        assert reference["storage"] == tmp_path.as_uri()
        assert step not in reference["key"], "a slug is no part of a path"


async def test_a_table_of_pandas_goes_from_step_to_step(db: Connection, define: Define, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: `pip install pandas` un-skips it")
    workflow = Workflow(make_slug())
    define(workflow.slug, ["load", "total"], [("load", "total")])
    sold = pandas.DataFrame({"day": pandas.to_datetime(["2027-01-30", None]), "price": [1.5, float("nan")]})

    def load() -> object:
        return sold

    async def total(load: object) -> float:
        pandas.testing.assert_frame_equal(load, sold)
        return float(load["price"].sum())  # type: ignore[index]  # a table, when pandas is there

    load.__annotations__["return"] = total.__annotations__["load"] = pandas.DataFrame  # as users write it
    workflow.step(result_storage=tmp_path, result_serializer="compressed/pickle")(load)
    workflow.step(total)
    assert await workflow.flow() == {"total": 1.5}
    assert find_reference(db, "load")["serializer"] == "compressed/pickle"


@pytest.mark.parametrize("serializer", [None, "json", "compressed/json", "pickle", "compressed/pickle"])
async def test_every_serializer_passes_what_json_can_hold(
    db: Connection, define: Define, tmp_path: Path, serializer: str | None
) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path, result_serializer=serializer)
    define(workflow.slug, ["make", "take", "nothing"], [("make", "take"), ("make", "nothing")])
    value = {"texts": ["a\0b", "é"], "number": 1.5}
    taken: list[object] = []

    @workflow.step
    def make() -> dict[str, Any]:
        return value

    @workflow.step
    async def take(make: dict[str, Any], upstream: dict[str, Any]) -> None:
        taken.extend([make, upstream["make"]])

    @workflow.step
    def nothing(make: object) -> None: ...

    assert await workflow.flow() == {"take": None, "nothing": None}
    assert taken == [value, value]
    assert find_reference(db, "make")["serializer"] == (serializer or "json")
    assert len(list_objects(tmp_path)) == 1, "None needs no object"


async def test_the_settings_of_a_worker_store_what_is_over_the_limit_and_nothing_else(
    db: Connection, define: Define, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_RESULT_LIMIT", "1000")
    monkeypatch.setenv("PGFLOW_RESULT_STORAGE", tmp_path.as_uri())
    workflow = Workflow(make_slug())
    define(workflow.slug, ["big", "small", "join"], [("big", "join"), ("small", "join")])
    taken: list[object] = []

    @workflow.step
    def big() -> str:
        return "x" * 1000

    @workflow.step
    def small() -> str:
        return "x"

    @workflow.step
    def join(big: str, small: str) -> None:
        taken.extend([len(big), small])

    await workflow.flow()
    assert taken == [1000, "x"]
    assert find_reference(db, "big")["size"] == 1002
    assert read_steps(db)["small"][2] == "x"


async def test_a_result_over_the_limit_says_how_to_store_it(
    db: Connection, define: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_RESULT_LIMIT", "1000")
    workflow = Workflow(make_slug())
    define(workflow.slug, ["big"])

    @workflow.step
    def big() -> str:
        return "x" * 1000

    with pytest.raises(RunFailedError, match=r"result_storage=…\) or PGFLOW_RESULT_STORAGE"):
        await workflow.flow()


async def test_functions_endpoints_and_programs_get_the_reference(
    db: Connection, define: Define, tmp_path: Path
) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path)
    steps = ["look", "ask", "execute"]
    define(workflow.slug, ["make", *steps], [("make", step) for step in steps])
    db.execute("CREATE FUNCTION public.look(input jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT input->'make' $$")
    workflow.bind("look", SqlFunction("public.look"))
    workflow.bind("execute", Command(["/bin/cat"]))

    @workflow.step
    def make() -> str:
        return "x" * 100

    async with http_server() as server:
        server.respond(200, b"1")
        workflow.bind("ask", HttpEndpoint(server.url))
        given = await workflow.flow()
    reference = {MARK: find_reference(db, "make")}
    assert given == {"look": reference, "ask": 1, "execute": {"payload": {}, "make": reference}}
    assert [request.json["input"]["make"] for request in server.requests] == [reference]


async def test_a_consumer_gets_the_reference(
    db: Connection, dsn: str, define: Define, tmp_path: Path, redis_url: str
) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path)
    define(workflow.slug, ["make", "send"], [("make", "send")])
    queue = f"{redis_url}?queue={workflow.slug}"
    workflow.bind("send", Queue(queue))

    @workflow.step
    def make() -> str:
        return "x" * 100

    with consuming(queue, lambda given: given["make"], dsn):
        given = await workflow.flow()
    assert given == {"send": {MARK: find_reference(db, "make")}}


async def test_a_branch_takes_its_steps_and_stores_its_result(db: Connection, define: Define, tmp_path: Path) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path, result_serializer="pickle")
    define(workflow.slug, ["choose", "left", "right"], [("choose", "left"), ("choose", "right")])
    taken: list[object] = []

    @workflow.step
    def choose() -> Branch[bytes]:
        return Branch("left", result=BINARY)

    @workflow.step
    def left(choose: bytes) -> None:
        taken.append(choose)

    @workflow.step
    def right(choose: bytes) -> None:
        raise AssertionError("it is skipped")

    await workflow.flow()
    assert taken == [BINARY]


async def test_a_later_process_reads_the_value_and_a_retry_reads_it_again(
    db: Connection, define: Define, tmp_path: Path
) -> None:
    """The first run of the flow ends before the last step; another one, which has executed nothing, goes on."""
    slug, tries = make_slug(), list[bytes]()
    define(slug, ["make", "take"], [("make", "take")])

    def make_workflow() -> Workflow:
        workflow = Workflow(slug, result_storage=tmp_path, result_serializer="compressed/pickle")

        @workflow.step
        def make() -> bytes:
            return BINARY

        @workflow.step(retries=1, result_serializer="json")
        def take(make: bytes) -> None:
            tries.append(make)
            if len(tries) < 3:
                raise ValueError("not yet")

        return workflow

    run_id = run_workflow(db, slug).id
    with pytest.raises(RunFailedError):
        await make_workflow().flow(run_id=run_id)
    db.execute("SELECT pgflow_prefect.reopen_run(%s)", (run_id,))
    assert await make_workflow().flow(run_id=run_id) == {"take": None}
    assert tries == [BINARY] * 3
    assert read_steps(db)["make"][1] == 1, "a completed step is not executed again"


async def test_an_annotation_may_name_classes_that_have_fields_of_unknown_classes(
    define: Define, tmp_path: Path
) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path, result_serializer="pickle")
    define(workflow.slug, ["make", "take"], [("make", "take")])
    taken: list[object] = []

    @workflow.step
    def make() -> list[Report]:
        return [Report(Frame([1]), BINARY)]

    @workflow.step
    def take(make: list[Report]) -> Report:
        taken.extend([make[0].frame.rows, make[0].raw])
        return make[0]

    await workflow.flow()
    assert taken == [[1], BINARY]


async def test_a_value_of_another_class_than_the_annotation_fails_the_step(
    db: Connection, define: Define, tmp_path: Path
) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path, result_serializer="pickle")
    define(workflow.slug, ["make", "take"], [("make", "take")])

    @workflow.step
    def make() -> Any:
        return BINARY

    @workflow.step(retries=2)
    def take(make: Frame) -> None:
        raise AssertionError("it is no Frame")

    with pytest.raises(RunFailedError, match="argument 'make' does not fit its annotation: Input should be an inst"):
        await workflow.flow()
    assert read_steps(db)["take"][1] == 1


async def test_a_step_gets_plain_json_where_its_upstream_step_was_done_by_another_program(
    db: Connection, define: Define, tmp_path: Path
) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path, result_serializer="pickle")
    define(workflow.slug, ["make", "take"], [("make", "take")])

    @workflow.step
    def make() -> list[int]:
        raise AssertionError("another program has completed it")

    @workflow.step
    def take(make: list[int]) -> bytes:
        return bytes(make)

    run_id = uuid4()
    db.execute("SELECT pgflow.run_workflow(%s, '{}', %s)", (workflow.slug, run_id))
    db.execute("SELECT pgflow.complete_step(%s, 'make', '[1, 2]')", (run_id,))
    await workflow.flow(run_id=run_id)
    assert PickleSerializer().loads((tmp_path / find_reference(db, "take")["key"]).read_bytes()) == b"\1\2"


def remove(path: Path) -> None:
    path.unlink()


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, "the result of step 'make' is missing from file://"),
        (change, "the result of step 'make' has changed in file://"),
        (cut, "the result of step 'make' has changed in file://"),
    ],
    ids=["missing", "changed", "shorter"],
)
async def test_a_spoiled_object_fails_the_next_step_at_once_with_one_sentence(
    db: Connection, define: Define, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path, result_serializer="pickle")
    define(workflow.slug, ["make", "spoil", "take"], [("make", "spoil"), ("make", "take"), ("spoil", "take")])

    @workflow.step
    def make() -> bytes:
        return BINARY

    @workflow.step("spoil")
    def spoil_it() -> None:
        [stored] = list_objects(tmp_path)
        spoil(stored)

    @workflow.step(retries=3)
    def take(make: bytes) -> None:
        raise AssertionError("there is no value")

    with pytest.raises(RunFailedError):
        await workflow.flow()
    status, attempts, _, error = read_steps(db)["take"]
    assert (status, attempts) == ("failed", 1)
    assert error.startswith(message)
    assert "\n" not in error


async def test_a_storage_that_refuses_fails_the_step_and_no_row_refers_to_it(
    db: Connection, define: Define, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    workflow = Workflow(make_slug(), result_storage=tmp_path / "file")
    define(workflow.slug, ["make"])

    @workflow.step
    def make() -> int:
        return 1

    with pytest.raises(RunFailedError, match="the result can't be written in file://"):
        await workflow.flow()
    assert read_steps(db)["make"][2] is None


async def test_an_unknown_block_fails_the_step_and_names_it(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug(), result_storage="local-file-system/nowhere")
    define(workflow.slug, ["make"])

    @workflow.step(retries=3)
    def make() -> int:
        return 1

    with pytest.raises(RunFailedError, match="there is no Prefect block 'local-file-system/nowhere'"):
        await workflow.flow()
    assert read_steps(db)["make"][1] == 1


async def test_a_saved_block_is_found_by_its_name(db: Connection, define: Define, tmp_path: Path) -> None:
    name = f"results-{uuid4().hex[:8]}"
    await LocalFileSystem(basepath=str(tmp_path)).asave(name)
    workflow = Workflow(make_slug(), result_storage=f"local-file-system/{name}", result_serializer="pickle")
    define(workflow.slug, ["make", "take"], [("make", "take")])
    taken: list[bytes] = []

    @workflow.step
    def make() -> bytes:
        return BINARY

    @workflow.step
    def take(make: bytes) -> None:
        taken.append(make)

    await workflow.flow()
    assert taken == [BINARY]
    assert find_reference(db, "make")["storage"] == f"local-file-system/{name}"


async def test_a_value_that_the_serializer_can_not_write_fails_the_step(
    db: Connection, define: Define, tmp_path: Path
) -> None:
    workflow = Workflow(
        make_slug(), result_storage=tmp_path, result_serializer=CompressedSerializer(serializer="pickle")
    )
    define(workflow.slug, ["make"])

    @workflow.step(retries=3)
    def make() -> object:
        return threading.Lock()

    with pytest.raises(RunFailedError, match="step 'make': the result can't be written with its serializer"):
        await workflow.flow()
    assert list_objects(tmp_path) == []


async def test_each_attempt_writes_an_object_of_its_own(db: Connection, define: Define, tmp_path: Path) -> None:
    """So the late attempt of a former owner can't change what the row refers to."""
    workflow = Workflow(make_slug(), result_storage=tmp_path)
    define(workflow.slug, ["make"])
    attempts: list[int] = []

    @workflow.step(retries=1)
    def make(context: StepContext) -> int:
        attempts.append(context.attempt)
        if len(attempts) == 1:
            raise ValueError("again")
        return context.attempt

    await workflow.flow()
    reference = find_reference(db, "make")
    assert reference["attempt"] == attempts[-1]
    assert reference["key"].endswith(f"-0-{attempts[-1]}")


async def test_the_process_that_knows_no_storage_says_so(db: Connection, define: Define, tmp_path: Path) -> None:
    slug = make_slug()
    define(slug, ["make", "take"], [("make", "take")])
    former, later = Workflow(slug, result_storage=tmp_path), Workflow(slug)

    @former.step
    def make() -> int:
        return 1

    @former.step("take")
    def fail(make: int) -> int:
        raise ValueError("here it ends")

    @later.step("make")
    def make_again() -> int:
        return 1

    @later.step
    def take(make: int) -> int:
        return make

    run_id = run_workflow(db, slug).id
    with pytest.raises(RunFailedError, match="here it ends"):
        await former.flow(run_id=run_id)
    db.execute("SELECT pgflow_prefect.reopen_run(%s)", (run_id,))
    with pytest.raises(RunFailedError, match="this process knows none for it: name it by result_storage="):
        await later.flow(run_id=run_id)


@pytest.mark.parametrize("stored", [False, True], ids=["rows", "storage"])
async def test_a_handler_may_return_what_looks_like_a_reference(
    define: Define, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    fake = {MARK: {"storage": "x", "key": "y", "sha256": "0" * 64, "size": 1, "serializer": "pickle", "attempt": 1}}
    if stored:
        monkeypatch.setenv("PGFLOW_RESULT_STORAGE", tmp_path.as_uri())
    workflow = Workflow(make_slug())
    define(workflow.slug, ["make", "take"], [("make", "take")])
    taken: list[object] = []

    @workflow.step
    def make() -> dict[str, Any]:
        return fake

    @workflow.step
    def take(make: dict[str, Any]) -> None:
        taken.append(make)

    await workflow.flow()
    assert taken == [fake]


async def test_a_name_of_a_task_run_can_have_the_reference_of_a_stored_result(
    client: PrefectClient, define: Define, tmp_path: Path
) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path, result_serializer="pickle")
    define(workflow.slug, ["make", "take"], [("make", "take")])

    @workflow.step
    def make() -> Frame:
        return Frame([1])

    @workflow.step(task_run_name="take {make[$pgflow_result][serializer]}")
    def take(make: Frame) -> None:
        assert make.rows == [1]

    await workflow.flow()
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"make": "Completed", "take pickle": "Completed"})


async def test_a_program_loads_the_result_of_a_step(db: Connection, define: Define, tmp_path: Path) -> None:
    workflow = Workflow(make_slug(), result_storage=tmp_path)
    define(workflow.slug, ["frame", "text", "later"], [("frame", "later"), ("text", "later")])

    @workflow.step(result_serializer="pickle")
    def frame() -> Frame:
        return Frame([1, 2])

    @workflow.step
    def text() -> str:
        return "a"

    @workflow.step
    def later(frame: Frame) -> None:
        raise ValueError("no")

    with pytest.raises(RunFailedError):
        await workflow.flow()
    run_id = read_run(db)[2]
    assert (await workflow.load_result(run_id, "frame")).rows == [1, 2]
    assert await workflow.load_result(run_id, "text") == "a"
    with pytest.raises(UsageError, match="has no result of step 'later': the step is not completed"):
        await workflow.load_result(run_id, "later")
    with pytest.raises(UsageError, match="is one of workflow"):
        await Workflow("another").load_result(run_id, "frame")
