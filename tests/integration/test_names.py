"""Names and tags of task runs, and names of flow runs, as Prefect shows them."""

import logging
from typing import Any

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, SecretStr

from pgflow_prefect import External, SqlFunction, Workflow
from pgflow_prefect.errors import UsageError
from tests.conftest import Connection
from tests.engine import complete, run_workflow
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run
from tests.integration.live import Engine, execute_by
from tests.integration.waiting import TIMEOUT, WAITING, await_value

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


class Order(BaseModel):
    id: int
    key: SecretStr = SecretStr("")
    region: str = "eu"


async def read_named(client: PrefectClient, slug: str) -> FlowRun:
    """Return the flow run once it has no name of Prefect's or ours: its name is sent beside the run."""
    with anyio.fail_after(TIMEOUT):
        while not (found := await read_flow_run(client, slug)).name.startswith("order"):
            await anyio.sleep(0.05)
    return found


@pytest.mark.parametrize("task_runner", [None, ThreadPoolTaskRunner()], ids=["our engine", "Prefect's engine"])
async def test_task_runs_have_the_names_and_tags_of_their_steps(
    define: Define, db: Connection, client: PrefectClient, task_runner: Any
) -> None:
    slug = make_slug()
    define(slug, ["fetch", "send", "look", "plain"], [("fetch", "send")])
    db.execute("CREATE FUNCTION public.look(input jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT input'")
    workflow = Workflow(slug, task_runner=task_runner)

    @workflow.step(tags=["net", "slow"], task_run_name="fetch {payload.id} {payload[region]} {payload.key}")
    def fetch(payload: Order) -> dict[str, Any]:
        return {"rows": 3, "token": "t-0-k-e-n"}

    def name_send(parameters: dict[str, Any]) -> str:
        return f"send {parameters['fetch']['rows']} rows, {parameters['fetch']['token']}"

    @workflow.step(task_run_name=name_send, retries=1)
    async def send(fetch: dict[str, Any]) -> None: ...

    workflow.bind("look", SqlFunction("public.look"), tags=["net"], task_run_name="look at {payload[id]}")

    @workflow.step
    def plain() -> None: ...

    with anyio.fail_after(TIMEOUT):
        await workflow.flow({"id": 7, "key": "hush-hush"})
    flow_run = await read_flow_run(client, slug)
    names = ["fetch 7 eu ********", "send 3 rows, ********", "look at 7", "plain"]
    shown = await await_task_runs(client, flow_run, dict.fromkeys(names, "Completed"))
    assert {name: {*run.tags} - {*flow_run.tags} for name, run in shown.items()} == {
        names[0]: {"net", "slow"},
        names[1]: set(),
        names[2]: {"net"},
        names[3]: set(),
    }
    assert {run.run_count for run in shown.values()} == {1}


async def test_a_task_run_has_its_name_while_it_is_running(
    define: Define, db: Connection, client: PrefectClient
) -> None:
    slug = make_slug()
    define(slug, ["approve", "work"])
    workflow = Workflow(slug)
    workflow.bind("approve", External(), task_run_name="approve {payload[id]}")
    go_on = anyio.Event()

    @workflow.step(task_run_name="work {payload[id]}")
    async def work(payload: dict[str, int]) -> None:
        await go_on.wait()

    run_id = run_workflow(db, slug, {"id": 7}).id
    with anyio.fail_after(TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: workflow.flow(run_id=run_id))
            await await_value(db, 1, WAITING)
            shown: dict[str, TaskRun] = {}
            while {*shown} != {"approve 7", "work 7"}:
                await anyio.sleep(0.05)
                flow_run = await read_flow_run(client, slug)
                found = await client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}))
                shown = {run.name: run for run in found}
            assert {run.state_name for run in shown.values()} == {"Running"}
            go_on.set()
            complete(db, run_id, "approve")


async def test_a_name_that_can_not_be_made_keeps_no_step_from_being_executed(
    define: Define, client: PrefectClient, caplog: pytest.LogCaptureFixture
) -> None:
    slug = make_slug()
    define(slug, ["one", "two"])
    workflow = Workflow(slug)

    @workflow.step(task_run_name="of {payload[day]}")
    async def one(payload: dict[str, int]) -> int:
        return 1

    def fail(payload: dict[str, int]) -> str:
        raise ValueError("no such day")

    @workflow.step(task_run_name=fail)
    async def two(payload: dict[str, int]) -> int:
        return 2

    caplog.set_level(logging.ERROR)
    assert await workflow.flow({"id": 1}) == {"one": 1, "two": 2}
    await await_task_runs(client, await read_flow_run(client, slug), {"one": "Completed", "two": "Completed"})
    said = [message for message in caplog.messages if "task_run_name" in message]
    assert len(said) == 2
    assert any("LookupError: there is no payload[day]" in message for message in said)
    assert any("ValueError: no such day" in message for message in said)


NAMINGS: dict[str, Any] = {
    "a template": "order {payload.id} in {payload[region]}: {payload[key]}",
    "a function of the payload": lambda payload: f"order {payload['id']} in {payload['region']}: {payload['key']}",
    "a function of all": lambda parameters: "order {id} in {region}: {key}".format(**parameters["payload"]),
}


@pytest.mark.parametrize("starts", ["by a call", "by SQL"])
@pytest.mark.parametrize("naming", NAMINGS)
async def test_a_flow_run_is_named_after_the_payload_without_its_secrets(
    naming: str, starts: str, engine: Engine, define: Define, db: Connection, client: PrefectClient
) -> None:
    slug = make_slug()
    define(slug, ["work"])
    workflow = Workflow(slug)

    @workflow.step
    async def work(payload: Order) -> None: ...

    flow = workflow.flow.with_options(flow_run_name=NAMINGS[naming])
    payload = {"id": 7, "key": "hush-hush"}
    parameters: dict[str, Any] = {"payload": payload}
    if starts == "by SQL":
        parameters = {"run_id": str(run_workflow(db, slug, payload).id)}
    with anyio.fail_after(TIMEOUT):
        state, _ = await execute_by(engine, flow, parameters)
    assert state.is_completed()
    assert read_run(db)[0] == "completed"
    assert (await read_named(client, slug)).name == "order 7 in eu: ********"


def test_a_name_that_needs_what_there_is_not_is_refused_where_it_is_written() -> None:
    workflow = Workflow("orders")
    with pytest.raises(UsageError, match=r"task_run_name of step 'send' needs order: there is payload"):

        @workflow.step(task_run_name="{order[id]}")
        def send(payload: dict[str, int]) -> None: ...

    with pytest.raises(UsageError, match="tags='net' is a text: give a list"):
        workflow.step(tags="net")
    with pytest.raises(UsageError, match=r"task_run_name of step 'send' is 7: give a text"):
        workflow.bind("send", External(), task_run_name=7)  # type: ignore[arg-type]
    workflow.bind("send", External(), task_run_name="{fetch[id]}")
    [problem] = workflow.find_problems(workflow.definition)
    assert problem == "task_run_name of step 'send' needs fetch: there is payload, upstream"
