"""Maps whose items are done by endpoints, queues and external workers."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from pgflow_prefect import Branch, External, HttpEndpoint, Queue, Skip, Workflow, WorkPool
from pgflow_prefect.consumer import perform
from pgflow_prefect.database.step_transaction import StepTransaction
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.binding_problems import find_all_problems, find_refused_rows
from pgflow_prefect.errors import RunFailedError
from pgflow_prefect.handlers.row_policy import RowPolicy
from tests.conftest import Connection
from tests.engine import define, get_state, run_workflow
from tests.http_server import HttpServer, http_server
from tests.integration.conftest import make_slug
from tests.integration.queues.test_pgqueuer import pgqueuer_tables
from tests.integration.test_engine_outcomes import say
from tests.integration.test_flow_rules import push

pytestmark = [pytest.mark.anyio]


@pytest.fixture
def workflow(pgflow_dsn: str) -> Workflow:
    return Workflow(make_slug())


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    async with http_server() as found:
        yield found


async def double(server: HttpServer, writer: asyncio.StreamWriter) -> None:
    """Answer a request with the double of its item, or of its items."""
    given = server.requests[-1].json["input"]
    answer = 2 * given["item"] if "item" in given else [2 * each for each in given["items"]]
    server.respond(200, json.dumps(answer).encode())
    assert server.answer is not None
    await server.answer(writer)
    server.answer = lambda each: double(server, each)


@pytest.mark.usefixtures("prefect_api")
async def test_an_endpoint_gets_each_item_or_a_batch_of_them(
    pgflow_dsn: str, workflow: Workflow, server: HttpServer
) -> None:
    server.answer = lambda writer: double(server, writer)
    workflow.bind_map("price", HttpEndpoint(server.url), over="payload.rows", at_once=1)
    workflow.bind_map("label", HttpEndpoint(server.url, batch=2), over="price", at_once=1)
    await push(pgflow_dsn, workflow)
    assert await workflow.flow(payload={"rows": [1, 2, 3]}) == {"label": [4, 8, 12]}
    items = [(each.headers["pgflow-step"], each.headers["pgflow-item"]) for each in server.requests]
    assert items == [("price", "0"), ("price", "1"), ("price", "2"), ("label", "0,1"), ("label", "2")]
    keys = {each.headers["idempotency-key"] for each in server.requests}
    assert len(keys) == len(server.requests)
    assert server.requests[0].json["input"] == {"payload": {}, "item": 1}


@pytest.mark.parametrize("by", ["row", "code"])
async def test_a_map_on_a_work_pool_is_found_before_a_run(
    store: Store, pgflow_dsn: str, workflow: Workflow, by: str
) -> None:
    workflow.bind_map("price", External(), over="payload.rows")
    workflow.bind("sum", WorkPool("gpu"))
    await push(pgflow_dsn, workflow)
    loaded = Workflow(workflow.slug)
    if by == "row":
        await store.bind_step(workflow.slug, "price", "work-pool", "gpu")
    else:
        loaded.bind("price", WorkPool("gpu"))
    definition, rows = await store.load_definition(workflow.slug), await store.list_bindings(workflow.slug)
    [problem] = await find_all_problems(store, loaded, definition, rows, others_have_functions=True)
    assert "step 'price' is a map, and work-pool gpu does plain steps only" in problem
    left = await find_all_problems(store, loaded, definition, rows, others_have_functions=True, judge_rows=False)
    assert left == ([problem] if by == "code" else []), "a wrong row does not stop a worker"
    assert find_refused_rows(definition, rows, RowPolicy()) == ([problem] if by == "row" else [])


@pytest.mark.usefixtures("prefect_api")
async def test_items_on_a_queue_are_reported_by_its_worker(db: Connection, pgflow_dsn: str, workflow: Workflow) -> None:
    from pgqueuer.qm import QueueManager  # noqa: PLC0415  an extra
    from pgqueuer.types import QueueExecutionMode  # noqa: PLC0415  an extra

    seen: list[Any] = []
    workflow.bind_map("mail", Queue("pgqueuer:mails"), over="payload.rows")
    await push(pgflow_dsn, workflow)
    results: list[Any] = []

    async def run() -> None:
        results.append(await workflow.flow(payload={"rows": ["a", "b", "c"], "who": "me"}))

    def work(given: dict[str, Any]) -> str:
        seen.append(given)
        if given["item"] == "b":
            raise Skip("no mail for b")
        return f"sent {given['item']}"

    async with pgqueuer_tables(pgflow_dsn) as queries, anyio.create_task_group() as group:
        group.start_soon(run)
        with anyio.fail_after(180):
            while db.execute("SELECT count(*) FROM pgqueuer").fetchone() != (3,):
                await anyio.sleep(0.05)
        manager = QueueManager(queries)

        @manager.entrypoint("mails")
        async def mails(job: Any) -> None:
            await perform(job.payload, work, pgflow_dsn)

        with anyio.fail_after(180):
            await manager.run(mode=QueueExecutionMode.drain)
    assert results == [{"mail": ["sent a", "sent c"]}]
    assert {"payload": {"who": "me"}, "item": "a"} in seen


@pytest.mark.usefixtures("prefect_api")
async def test_external_workers_take_items_of_a_map(db: Connection, pgflow_dsn: str, workflow: Workflow) -> None:
    workflow.bind_map("price", External(), over="payload")
    await push(pgflow_dsn, workflow)
    results: list[Any] = []

    async def run() -> None:
        results.append(await workflow.flow(payload=[1, 2, 3]))

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        taken: list[Any] = []
        with anyio.fail_after(180):
            while len(taken) < 3:
                taken += db.execute(
                    "SELECT * FROM pgflow_prefect.take_items(%s, 'price', 2, '1 hour')", [workflow.slug]
                )
                await anyio.sleep(0.05)
        for run_id, step, index, attempt, item in taken:
            db.execute(
                "SELECT pgflow.complete_items(%s, %s, ARRAY[%s], %s, NULL, ARRAY[%s])",
                [run_id, step, index, json.dumps([10 * item]), attempt],
            )
    assert results == [{"price": [10, 20, 30]}]


def hand_over(db: Connection) -> tuple[Any, str]:
    """Return a run whose map `a` has handed its item 1 to a queue, and the message of that."""
    define(db, "w", {"a": []})
    say(db, "w", "a", step_type="map", when_item_fails="continue")
    run_id = run_workflow(db, "w", [5, 6]).id
    db.execute(
        "SELECT pgflow_prefect.claim_step(%s, 'a', 0, 0, gen_random_uuid(), NULL, true, 'queue', false, "
        "'queue pgqueuer:mails')",
        [run_id],
    )
    db.execute("SELECT pgflow.claim_items(%s, 'a', 2)", [run_id])
    message = {"run_id": str(run_id), "workflow_slug": "w", "step_slug": "a", "attempt": 1, "idempotency_key": "key"}
    return run_id, json.dumps(message | {"item_index": 1, "input": {}})


async def test_a_queue_worker_ends_an_item_once(db: Connection, dsn: str) -> None:
    run_id, message = hand_over(db)
    given: list[Any] = []

    def work(each: Any) -> int:
        given.append(each)
        return 7

    for _ in range(2):
        await perform(message, work, dsn)
    assert given == [{"payload": None, "item": 6}]
    db.execute("SELECT pgflow.complete_items(%s, 'a', ARRAY[0], '[1]')", [run_id])
    assert get_state(db, run_id, "a").step_result == [1, 7]


@pytest.mark.parametrize("outcome", [ValueError("broken"), Branch("b")])
async def test_a_queue_worker_fails_an_item(outcome: Any, db: Connection, dsn: str) -> None:
    run_id, message = hand_over(db)

    def work(each: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    await perform(message, work, dsn)
    db.execute("SELECT pgflow.complete_items(%s, 'a', ARRAY[0], '[1]')", [run_id])
    assert str(get_state(db, run_id, "a").error_message).startswith("item 1 failed: ")


async def await_jobs(db: Connection, count: int) -> None:
    """Wait until so many items were put on queues of pgqueuer."""
    with anyio.fail_after(120):
        while db.execute("SELECT count(*) FROM pgqueuer").fetchone() != (count,):
            await anyio.sleep(0.05)


@pytest.mark.thorough
@pytest.mark.usefixtures("prefect_api")
async def test_only_an_item_whose_time_is_up_counts_as_not_reported(
    db: Connection, pgflow_dsn: str, workflow: Workflow
) -> None:
    workflow.bind_map("unlimited", Queue("pgqueuer:mails", retries=0), over="payload")
    workflow.bind_map("limited", Queue("pgqueuer:mails", retries=0, timeout_seconds=3600), over="payload")
    late = Queue("pgqueuer:mails", retries=0, timeout_seconds=3600)
    workflow.bind_map("late", late, over="payload", when_item_fails="continue")
    await push(pgflow_dsn, workflow)

    async def run() -> None:
        with pytest.raises(RunFailedError, match="no program has reported it within 3600 s"):
            await workflow.flow(payload=[1])

    async with pgqueuer_tables(pgflow_dsn), anyio.create_task_group() as group:
        group.start_soon(run)
        await await_jobs(db, 3)
        [[run_id]] = db.execute("SELECT id FROM pgflow.runs").fetchall()
        for step, message in (("unlimited", "broken"), ("limited", None)):
            db.execute("SELECT pgflow.fail_items(%s, %s, '{0}', ARRAY[%s], '0 s')", [run_id, step, message])
        await await_jobs(db, 5)  # both were handed over once more
        for step in ("unlimited", "limited"):
            assert db.execute("SELECT pgflow.complete_items(%s, %s, '{0}', '[1]')", [run_id, step]).fetchone() == (1,)
        db.execute("UPDATE pgflow.step_items SET due_at = now() WHERE step_slug = 'late'")  # its time is up


@pytest.mark.usefixtures("prefect_api")
async def test_an_item_is_handed_over_again_after_its_commit_was_lost(
    db: Connection, pgflow_dsn: str, workflow: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    defer_items = StepTransaction.defer_items
    losses = [1]

    async def defer(self: StepTransaction, step_slug: str, epoch: int, reports: str) -> None:
        if losses:
            losses.pop()
            cut = db.execute(
                "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND state = 'idle in transaction'"
            ).fetchall()
            assert cut
            pids = [pid for pid, _ in cut]
            with anyio.fail_after(60):
                while db.execute("SELECT FROM pg_stat_activity WHERE pid = ANY (%s)", [pids]).fetchall():
                    await anyio.sleep(0.01)
        await defer_items(self, step_slug, epoch, reports)

    monkeypatch.setattr(StepTransaction, "defer_items", defer)
    workflow.bind_map("mail", Queue("pgqueuer:mails", retries=0), over="payload")
    await push(pgflow_dsn, workflow)
    results: list[Any] = []

    async def run() -> None:
        results.append(await workflow.flow(payload=[1]))

    async with pgqueuer_tables(pgflow_dsn), anyio.create_task_group() as group:
        group.start_soon(run)
        await await_jobs(db, 1)
        db.execute("SELECT pgflow.complete_items(r.id, 'mail', '{0}', '[1]') FROM pgflow.runs r")
    assert results == [{"mail": [1]}]
    assert not losses
