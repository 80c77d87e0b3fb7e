"""Maps written in Python: their items are executed one by one, and each keeps its end."""

from collections import Counter
from typing import Any

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from pydantic import BaseModel

from pgflow_prefect import ItemContext, NotRetriableError, Settings, Skip, SqlFunction, Workflow
from pgflow_prefect.errors import RunFailedError
from pgflow_prefect.execution.process.slots import Turns
from tests.conftest import Connection
from tests.integration.conftest import await_task_runs, make_slug, read_flow_run
from tests.integration.test_flow_rules import push

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]


class Order(BaseModel):
    """What a step returns an array of."""

    number: int


@pytest.fixture
def workflow(pgflow_dsn: str) -> Workflow:
    return Workflow(make_slug())


def read_items(db: Connection, step: str = "price") -> list[tuple[object, ...]]:
    """Return status, attempts and result of each item."""
    return db.execute(
        "SELECT status, attempts, item_result FROM pgflow.step_items WHERE step_slug = %s ORDER BY item_index", [step]
    ).fetchall()


async def test_each_item_of_a_map_is_checked_and_the_results_come_in_their_order(
    pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    keys: list[str] = []

    @workflow.step
    async def orders(payload: int) -> list[Order]:
        return [Order(number=each) for each in range(payload)]

    @workflow.step
    async def rates() -> dict[str, int]:
        return {"factor": 10}

    @workflow.map(over="orders", at_once=3)
    async def price(item: Order, rates: dict[str, int], context: ItemContext) -> int:
        keys.append(context.idempotency_key)
        await anyio.sleep(0.001 * (item.number % 3))  # they end in another order
        assert (context.item_index, context.attempt) == (item.number, 1)
        return item.number * rates["factor"]

    @workflow.map(over="price")
    def label(item: int, payload: int) -> str:
        return f"{item} of {payload}"

    @workflow.step
    async def total(price: list[int], label: list[str]) -> dict[str, Any]:
        return {"price": price, "label": label}

    await push(pgflow_dsn, workflow)
    expected = {"price": [0, 10, 20, 30], "label": ["0 of 4", "10 of 4", "20 of 4", "30 of 4"]}
    assert await workflow.flow(payload=4) == {"total": expected}
    assert len(set(keys)) == 4
    flow_run = await read_flow_run(client, workflow.slug)
    names = ["orders", "rates", "price", "label", "total"]
    names += [f"{step}[{index}]" for step in ("price", "label") for index in range(4)]
    shown = await await_task_runs(client, flow_run, dict.fromkeys(names, "Completed"))
    edges = {each.id for each in shown["price[2]"].task_inputs["upstream"] if hasattr(each, "id")}
    assert edges == {shown["orders"].id, shown["rates"].id}


async def test_an_item_is_tried_again_by_itself(db: Connection, pgflow_dsn: str, workflow: Workflow) -> None:
    calls: Counter[int] = Counter()

    @workflow.map(over="payload.rows", retries=2)
    async def price(item: int) -> int:
        calls[item] += 1
        if calls[item] <= item:
            raise ValueError("not yet")
        return item

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload={"rows": [0, 1, 2]}) == {"price": [0, 1, 2]}
    assert calls == {0: 1, 1: 2, 2: 3}
    assert [attempts for _, attempts, _ in read_items(db)] == [1, 2, 3]


@pytest.mark.thorough
async def test_the_last_attempt_of_an_item_fails_the_map_and_a_retry_executes_only_that_item(
    db: Connection, pgflow_dsn: str, workflow: Workflow, client: PrefectClient
) -> None:
    calls: Counter[int] = Counter()

    @workflow.map(over="payload", retries=1, when_item_fails="continue")
    async def price(item: int) -> int:
        calls[item] += 1
        if item == 1 and calls[item] < 3:
            raise ValueError("broken")
        return item

    await push(pgflow_dsn, workflow)
    with pytest.raises(RunFailedError, match="item 1 failed: ValueError: broken"):
        await workflow.flow(payload=[0, 1, 2])
    flow_run = await read_flow_run(client, workflow.slug)
    shown = {"price": "Failed", "price[0]": "Completed", "price[1]": "Failed", "price[2]": "Completed"}
    await await_task_runs(client, flow_run, shown)
    [[run_id]] = db.execute("SELECT id FROM pgflow.runs").fetchall()
    db.execute("SELECT pgflow.reopen_run(%s)", [run_id])
    assert await workflow.flow(run_id=run_id) == {"price": [0, 1, 2]}
    assert calls == {0: 1, 1: 3, 2: 1}


async def test_an_error_that_no_retry_helps_is_not_tried_again(pgflow_dsn: str, workflow: Workflow) -> None:
    calls: Counter[int] = Counter()

    @workflow.map(over="payload", retries=5, when_item_fails="skip")
    def price(item: int) -> int:
        calls[item] += 1
        if item == 1:
            raise NotRetriableError("never")
        if item == 2:
            raise Skip("not needed")
        return item

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload=[0, 1, 2, 3]) == {"price": [0, 3]}
    assert set(calls.values()) == {1}


async def test_an_item_that_does_not_fit_its_annotation_fails(pgflow_dsn: str, workflow: Workflow) -> None:
    @workflow.map(over="payload")
    async def price(item: Order) -> int:
        return item.number

    await push(pgflow_dsn, workflow)
    with pytest.raises(RunFailedError, match="argument 'item' does not fit its annotation"):
        await workflow.flow(payload=[{"number": 1}, {"number": "x"}])


async def test_an_item_that_takes_too_long_has_its_own_time_out(pgflow_dsn: str, workflow: Workflow) -> None:
    calls: Counter[int] = Counter()

    @workflow.map(over="payload", retries=1, timeout_seconds=0.1)
    async def price(item: int) -> int:
        calls[item] += 1
        if calls[item] == 1 and item == 1:
            await anyio.sleep_forever()
        return item

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload=[0, 1]) == {"price": [0, 1]}
    assert calls[1] == 2


async def test_what_an_item_writes_commits_with_its_completion(
    db: Connection, pgflow_dsn: str, workflow: Workflow
) -> None:
    db.execute("CREATE TABLE seen (n int, attempt int)")

    @workflow.map(over="payload", retries=1)
    def price(item: int, context: ItemContext) -> int:
        context.connection.execute("INSERT INTO seen VALUES (%s, %s)", [item, context.attempt])
        if context.attempt == 1:
            raise ValueError("and what it wrote is rolled back")
        return item

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload=[1, 2]) == {"price": [1, 2]}
    assert sorted(db.execute("SELECT * FROM seen").fetchall()) == [(1, 2), (2, 2)]


async def test_no_more_items_than_it_says_are_executed_at_once(pgflow_dsn: str, workflow: Workflow) -> None:
    working: set[int] = set()
    most = 0

    @workflow.map(over="payload", at_once=4)
    async def price(item: int) -> int:
        nonlocal most
        working.add(item)
        most = max(most, len(working))
        await anyio.sleep(0.001)
        working.discard(item)
        return item

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload=[*range(30)]) == {"price": [*range(30)]}
    assert most == 4


async def test_items_are_claimed_and_reported_in_batches(pgflow_dsn: str, workflow: Workflow, monkeypatch: Any) -> None:
    from pgflow_prefect.database.store import Store  # noqa: PLC0415

    statements: list[int] = []
    work_items = Store.work_items

    async def count(self: Store, *given: Any, **named: Any) -> Any:
        statements.append(len(given[3]))
        return await work_items(self, *given, **named)

    monkeypatch.setattr(Store, "work_items", count)

    @workflow.map(over="payload", at_once=100)
    async def price(item: int) -> int:
        return item

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload=[*range(1000)]) == {"price": [*range(1000)]}
    assert sum(statements) == 1000
    assert len(statements) <= 0.05 * 1000


async def test_a_large_map_has_one_task_run(pgflow_dsn: str, workflow: Workflow, client: PrefectClient) -> None:
    @workflow.map(over="payload", when_item_fails="skip")
    async def price(item: int) -> int:
        if item == 1:
            raise ValueError("broken")
        return item

    await push(pgflow_dsn, workflow)
    flow = workflow.make_flow(Settings(item_task_runs=2))
    assert await flow(payload=[0, 1, 2]) == {"price": [0, 2]}
    flow_run = await read_flow_run(client, workflow.slug)
    await await_task_runs(client, flow_run, {"price": "Completed"})
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]))
    with anyio.fail_after(120):
        while len(shown := await client.read_artifacts(artifact_filter=of_run)) < 2:
            await anyio.sleep(0.1)
    found = {each.type: each for each in shown}
    assert found["progress"].data == 100
    assert "3 of 3 have ended, 1 failed" in str(found["progress"].description)
    assert '"error": "ValueError: broken"' in str(found["table"].data)


async def test_a_map_without_items_completes(pgflow_dsn: str, workflow: Workflow, client: PrefectClient) -> None:
    @workflow.map(over="payload")
    async def price(item: int) -> int:
        raise AssertionError

    @workflow.step
    async def total(price: list[int]) -> int:
        return sum(price)

    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload=[]) == {"total": 0}
    flow_run = await read_flow_run(client, workflow.slug)
    shown = await await_task_runs(client, flow_run, {"price": "Completed", "total": "Completed"})
    assert shown["price"].state is not None
    assert shown["price"].state.message == "it has no items"


async def test_a_handler_of_a_plain_step_for_a_map_fails_the_run_and_says_why(
    db: Connection, pgflow_dsn: str, workflow: Workflow
) -> None:
    @workflow.step
    async def price(payload: list[int]) -> list[int]:
        return payload

    await push(pgflow_dsn, workflow)
    db.execute("UPDATE pgflow.steps SET step_type = 'map'")
    with pytest.raises(RunFailedError, match="is a map in the database, and its handler is not"):
        await workflow.flow(payload=[1])


@pytest.mark.thorough
async def test_an_sql_function_does_items_one_by_one_or_in_batches(
    db: Connection, pgflow_dsn: str, workflow: Workflow
) -> None:
    db.execute("CREATE SCHEMA shop")
    db.execute("CREATE TABLE shop.calls (input jsonb)")
    db.execute("""
        CREATE FUNCTION shop.price(input jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO shop.calls VALUES (input);
            RETURN to_jsonb((input ->> 'item')::int * (input -> 'rates' ->> 'factor')::int);
        END $$
    """)
    db.execute("""
        CREATE FUNCTION shop.label(input jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO shop.calls VALUES (input);
            RETURN (SELECT jsonb_agg('no ' || e.item ORDER BY e.place)
                    FROM jsonb_array_elements_text(input -> 'items') WITH ORDINALITY AS e (item, place));
        END $$
    """)

    @workflow.step
    async def rates() -> dict[str, int]:
        return {"factor": 10}

    workflow.bind_map("price", SqlFunction("shop.price"), over="payload.rows", after=["rates"])
    workflow.bind_map("label", SqlFunction("shop.label", batch=3), over="price")
    await push(pgflow_dsn, workflow)
    result = await workflow.flow(payload={"rows": [1, 2, 3, 4], "who": "me"})
    assert result == {"label": ["no 10", "no 20", "no 30", "no 40"]}
    calls: list[dict[str, Any]] = [each for [each] in db.execute("SELECT input FROM shop.calls").fetchall()]  # type: ignore[misc]
    assert {"payload": {"who": "me"}, "rates": {"factor": 10}, "item": 3} in calls
    assert sorted(len(each["items"]) for each in calls if "items" in each) == [1, 3]


@pytest.mark.thorough
async def test_another_owner_goes_on_and_repeats_no_item_that_has_ended(
    db: Connection, pgflow_dsn: str, workflow: Workflow
) -> None:
    calls: Counter[int] = Counter()
    hangs, gate = [True], anyio.Event()

    @workflow.map(over="payload", at_once=2)
    async def price(item: int) -> int:
        calls[item] += 1
        if item >= 3 and hangs[0]:
            await gate.wait()
        return item

    await push(pgflow_dsn, workflow)
    former = workflow.make_flow(Settings(lease=600))

    async def execute() -> None:
        state = await former(payload=[*range(6)], return_state=True)
        assert state.name == "Superseded"

    async with anyio.create_task_group() as group:
        group.start_soon(execute)
        with anyio.fail_after(120):
            while [each[0] for each in read_items(db)].count("completed") < 3:
                await anyio.sleep(0.05)
        hangs[0] = False
        db.execute("UPDATE pgflow_prefect.owners SET lease_until = 'epoch'")  # as after the death of its process
        [[run_id]] = db.execute("SELECT id FROM pgflow.runs").fetchall()
        assert await workflow.flow(run_id=run_id) == {"price": [*range(6)]}
        gate.set()  # and the late reports of the former owner change nothing
    assert [calls[item] for item in range(3)] == [1, 1, 1]
    assert [result for _, _, result in read_items(db)] == [*range(6)]
    assert db.execute("SELECT recoveries FROM pgflow_prefect.owners").fetchone() == (0,)  # the map had made progress


async def test_a_map_waits_for_its_turn_before_it_tries_an_item_again(
    pgflow_dsn: str, workflow: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[Turns] = []
    is_working = has_begun = False
    failed: list[int] = []
    overtaking: list[int] = []

    def make_turns(*given: Any) -> Turns:
        turns.append(Turns(*given))
        return turns[-1]

    monkeypatch.setattr("pgflow_prefect.execution.process.host.Turns", make_turns)

    @workflow.map(over="payload", retries=1000, retry_delay_seconds=0.2)
    async def price(item: int) -> int:
        if is_working:
            overtaking.append(item)
        if not has_begun:
            failed.append(item)
            raise ValueError("not yet")
        return item

    @workflow.step
    async def report() -> int:
        nonlocal is_working, has_begun
        is_working = has_begun = True
        with anyio.fail_after(120):
            while turns[0].count_next() == 1 and not overtaking:  # no step waits for a turn yet
                await anyio.sleep(0.01)
        is_working = False
        return 1

    await push(pgflow_dsn, workflow)
    flow = workflow.make_flow(Settings(concurrency=1))
    assert await flow(payload=[0]) == {"price": [0], "report": 1}
    assert failed, "the map was not first"
    assert not overtaking
