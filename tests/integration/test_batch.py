"""Claims and completions that come at the same time: one statement, and the one that is to blame alone hears of it."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import anyio
import psycopg
import pytest

from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import PgflowPrefectError, ResultInvalidError, SupersededError
from pgflow_prefect.execution.batch import MOST, Batch, RunBatch
from pgflow_prefect.models import (
    Claim,
    ClaimRequest,
    Completion,
    Failure,
    Report,
    Status,
    TaskElement,
    TaskKey,
)
from tests.conftest import Connect, Connection
from tests.engine import define, run_workflow, value
from tests.integration.conftest import TENURE
from tests.json_values import decode

pytestmark = pytest.mark.anyio

MakeStore = Callable[[int], AbstractAsyncContextManager[Store]]

STEPS = [f"s{number}" for number in range(20)]
GRAPH = {**{step: [] for step in STEPS}, "join": STEPS, "after": ["s0"]}


@pytest.fixture
async def run_id(db: Connection) -> UUID:
    define(db, "wide", GRAPH)
    run_id: UUID = run_workflow(db, "wide").id
    return run_id


@pytest.fixture
async def sent(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many reports and claims each statement of several had."""
    statements: list[tuple[int, int]] = []
    send = store.perform_tasks

    async def note(
        elements: Sequence[TaskElement], *, lock_timeout: float | None = None
    ) -> list[Report | Claim | PgflowPrefectError | None]:
        claims = sum(isinstance(each.asked, ClaimRequest) for each in elements)
        statements.append((len(elements) - claims, claims))
        return await send(elements, lock_timeout=lock_timeout)

    monkeypatch.setattr(store, "perform_tasks", note)
    return statements


@pytest.fixture
async def batch(store: Store, run_id: UUID) -> AsyncIterator[RunBatch]:
    async with open_run(Batch(store), store, run_id) as opened:
        yield opened


@pytest.fixture
def make_store(product_dsn: str) -> MakeStore:
    """A function that opens a store of so many connections."""

    @asynccontextmanager
    async def make(size: int) -> AsyncIterator[Store]:
        async with open_pool(product_dsn, size=size, timeout=10) as pool:
            yield Store(pool, TENURE)

    return make


@pytest.fixture
async def store(make_store: MakeStore) -> AsyncIterator[Store]:
    async with make_store(2) as opened:
        yield opened


@asynccontextmanager
async def open_run(batch: Batch, store: Store, run_id: UUID) -> AsyncIterator[RunBatch]:
    epoch = await store.take_run(run_id, uuid4())
    assert epoch is not None
    async with batch.open(run_id, epoch) as opened:
        yield opened


def ask(step: str) -> ClaimRequest:
    return ClaimRequest(TaskKey(step), uuid4(), None, with_payload=False)


async def claim_all(batch: RunBatch, steps: list[str]) -> None:
    async with anyio.create_task_group() as group:
        for step in steps:
            group.start_soon(batch.claim, ask(step))


async def test_requests_that_come_at_the_same_time_share_a_statement(
    batch: RunBatch, sent: list[tuple[int, int]], db: Connection, run_id: UUID
) -> None:
    await claim_all(batch, STEPS)
    assert sent == [(0, 20)]
    async with anyio.create_task_group() as group:
        for number, step in enumerate(STEPS):
            group.start_soon(batch.complete, Completion(TaskKey(step), json.dumps({"n": number}), 1, uuid4()))
    assert sent == [(0, 20), (20, 0)]
    claim = await batch.claim(ask("join"))
    assert decode(claim.upstream_results) == {step: {"n": number} for number, step in enumerate(STEPS)}
    assert sent[2:] == [(0, 1)]
    assert value(db, "SELECT remaining FROM pgflow.runs WHERE id = %s", run_id) == 2


async def test_a_step_is_claimed_together_with_the_completion_that_makes_it_ready(
    batch: RunBatch, sent: list[tuple[int, int]], db: Connection, run_id: UUID
) -> None:
    await batch.claim(ask("s0"))
    ahead = batch.claim_later(ask("after"))
    report = await batch.complete(Completion(TaskKey("s0"), '"done"', 1, uuid4()))
    assert report.status is Status.COMPLETED
    assert decode((await ahead).upstream_results) == {"s0": "done"}
    assert sent == [(0, 1), (1, 1)]
    attempts = "SELECT attempts FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'after'"
    assert value(db, attempts, run_id) == 1


async def test_a_result_that_can_not_be_stored_delays_no_other_result(
    batch: RunBatch, db: Connection, run_id: UUID
) -> None:
    await claim_all(batch, STEPS[:3])
    outcomes: dict[str, object] = {}

    async def complete(step: str, result: str) -> None:
        try:
            outcomes[step] = (await batch.complete(Completion(TaskKey(step), result, 1, uuid4()))).status
        except PgflowPrefectError as error:
            outcomes[step] = type(error)

    async with anyio.create_task_group() as group:
        group.start_soon(complete, "s0", "1")
        group.start_soon(complete, "s1", '"\\u0000"')
        group.start_soon(complete, "s2", "null")
    assert outcomes == {"s0": Status.COMPLETED, "s1": ResultInvalidError, "s2": Status.COMPLETED}
    found = "SELECT jsonb_typeof(step_result) FROM pgflow.step_states WHERE run_id = %s AND step_slug = 's2'"
    assert db.execute(found, [run_id]).fetchone() == ("null",)


async def test_an_early_claim_of_a_step_that_is_not_ready_is_refused_and_harms_nothing(batch: RunBatch) -> None:
    await batch.claim(ask("s0"))
    ahead = batch.claim_later(ask("join"))
    assert (await batch.complete(Completion(TaskKey("s0"), "1", 1, uuid4()))).status is Status.COMPLETED
    with pytest.raises(PgflowPrefectError, match="has not been started"):
        await ahead


async def test_an_input_beyond_the_limits_is_refused_to_the_step_that_reads_it_alone(
    batch: RunBatch, db: Connection
) -> None:
    await batch.claim(ask("s0"))
    await batch.complete(Completion(TaskKey("s0"), "1", 1, uuid4()))
    # As a row from before results were checked: jsonb holds it, and Python's int does not.
    db.execute("SET session_replication_role = replica")
    db.execute("UPDATE pgflow.step_states SET step_result = repeat('9', 5001)::jsonb WHERE step_slug = 's0'")
    db.execute("RESET session_replication_role")

    async with anyio.create_task_group() as group:
        claimed = batch.claim_later(ask("after"))
        group.start_soon(batch.claim, ask("s1"))
        group.start_soon(batch.claim, ask("s2"))
    with pytest.raises(ResultInvalidError, match='"s0" has a number of more than 1000 digits'):
        await claimed


class Signal(BaseException):
    """What Prefect raises for SIGTERM, wherever the event loop is at that moment."""


async def test_a_signal_during_a_statement_reaches_all_steps_that_wait_for_it(
    batch: RunBatch, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def raise_signal(*_: object, **__: object) -> None:
        raise Signal

    monkeypatch.setattr(store, "perform_tasks", raise_signal)
    heard: list[str] = []

    async def claim(step: str) -> None:
        with pytest.raises(Signal):
            await batch.claim(ask(step))
        heard.append(step)

    with anyio.fail_after(180):
        async with anyio.create_task_group() as group:
            for step in STEPS:
                group.start_soon(claim, step)
    assert sorted(heard) == sorted(STEPS)


async def test_a_former_owner_hears_it_for_each(batch: RunBatch, store: Store, run_id: UUID) -> None:
    await batch.claim(ask("s0"))
    assert await store.take_run(run_id, uuid4(), force=True)
    ahead = batch.claim_later(ask("s1"))
    assert (await batch.complete(Completion(TaskKey("s0"), "1", 1, uuid4()))).status is Status.PENDING
    with pytest.raises(SupersededError):
        await ahead


async def test_a_connection_that_breaks_is_a_matter_of_the_moment_for_all(
    dsn: str, db: Connection, monkeypatch: pytest.MonkeyPatch, run_id: UUID
) -> None:
    async with open_pool(dsn, size=2, timeout=10) as pool:  # a pooler would open another one
        store = Store(pool, TENURE)
        async with open_run(Batch(store), store, run_id) as batch:
            await check_broken_connection(store, batch, db, monkeypatch)


async def check_broken_connection(
    store: Store, batch: RunBatch, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.perform_tasks
    broken = False

    async def cut_once(*arguments: Any, **named: Any) -> object:
        nonlocal broken
        if not broken:
            broken = True
            db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        return await real(*arguments, **named)

    monkeypatch.setattr(store, "perform_tasks", cut_once)
    with pytest.raises(ExceptionGroup) as refused:
        await claim_all(batch, STEPS[:2])
    assert {type(each).__name__ for each in refused.value.exceptions} == {"TransientError"}
    await store.drop_broken_connections()
    await claim_all(batch, STEPS[:2])


async def test_more_than_fits_goes_with_the_next_statement(
    store: Store, db: Connection, monkeypatch: pytest.MonkeyPatch, sent: list[tuple[int, int]]
) -> None:
    steps = [f"s{number}" for number in range(MOST + 5)]
    define(db, "wider", {step: [] for step in steps})
    run_id = run_workflow(db, "wider").id
    async with open_run(Batch(store), store, run_id) as batch:
        await claim_all(batch, steps)
        assert sent == [(0, MOST), (0, 5)]
        large = json.dumps("x" * 700_000)
        async with anyio.create_task_group() as group:
            for step in steps[:3]:
                group.start_soon(batch.complete, Completion(TaskKey(step), large, 1, uuid4()))
    with psycopg.connect(db.info.dsn) as connection:
        query = "SELECT count(*) FROM pgflow.step_states WHERE status = 'completed'"
        assert connection.execute(query).fetchone() == (3,)


async def open_runs(stack: AsyncExitStack, batch: Batch, store: Store, run_ids: list[UUID]) -> list[RunBatch]:
    return [await stack.enter_async_context(open_run(batch, store, each)) for each in run_ids]


@pytest.fixture
def run_ids(db: Connection) -> list[UUID]:
    """Runs of several workflows."""
    for slug in ("one", "two", "three"):
        define(db, slug, {"a": [], "b": ["a"]})
    return [run_workflow(db, slug).id for slug in ("one", "two", "three") for _ in range(10)]


async def test_runs_of_several_workflows_share_their_statements(
    store: Store, sent: list[tuple[int, int]], run_ids: list[UUID]
) -> None:
    statuses: list[Status] = []
    async with AsyncExitStack() as stack:

        async def work(run: RunBatch) -> None:
            claim = await run.claim(ask("a"))
            ahead = run.claim_later(ask("b"))
            await run.complete(Completion(TaskKey("a"), "1", claim.attempt, uuid4()))
            report = await run.complete(Completion(TaskKey("b"), "2", (await ahead).attempt, uuid4()))
            statuses.append(report.status)

        runs = await open_runs(stack, Batch(store), store, run_ids)
        async with anyio.create_task_group() as group:
            for run in runs:
                group.start_soon(work, run)
    assert statuses == [Status.COMPLETED] * 30
    assert sent == [(0, 30), (30, 30), (30, 0)]
    ends = [(await store.read_end(each, ["b"])).results for each in run_ids]
    assert ends == [{"b": 2}] * 30


LOCKS = {
    "run": "SELECT FROM pgflow.runs WHERE id = %s FOR UPDATE",
    "step": "SELECT FROM pgflow.step_states WHERE run_id = %s FOR UPDATE",
    "task run": "SELECT FROM pgflow_prefect.task_runs WHERE run_id = %s FOR UPDATE",
}


@pytest.mark.parametrize("locked", LOCKS)
async def test_a_run_with_a_locked_row_keeps_no_other_run_waiting(
    locked: str, make_store: MakeStore, connect: Connect, run_ids: list[UUID]
) -> None:
    holder = connect()
    async with make_store(6) as store, AsyncExitStack() as stack:
        batch = Batch(store)
        runs = await open_runs(stack, batch, store, run_ids)

        async def work(run: RunBatch) -> None:
            for step in ("a", "b"):
                claim = await run.claim(ask(step))
                await run.complete(Completion(TaskKey(step), "1", claim.attempt, uuid4()))

        await runs[0].claim(ask("a"))
        async with anyio.create_task_group() as waiting:
            with holder.transaction():
                holder.execute(LOCKS[locked].encode(), [run_ids[0]])
                waiting.start_soon(runs[0].complete, Completion(TaskKey("a"), "1", 1, uuid4()))
                with anyio.fail_after(180):  # the lock is held until they are done
                    async with anyio.create_task_group() as group:
                        for run in runs[1:]:
                            group.start_soon(work, run)
        assert (await store.read_results(run_ids[0], ["a"])).keys() == {"a"}


async def test_more_locked_runs_than_there_are_connections_keep_no_other_run_waiting(
    make_store: MakeStore, connect: Connect, run_ids: list[UUID]
) -> None:
    holder, locked = connect(), run_ids[:20]
    async with make_store(4) as store, AsyncExitStack() as stack:
        runs = await open_runs(stack, Batch(store), store, run_ids)
        async with anyio.create_task_group() as waiting:
            with holder.transaction():
                holder.execute("SELECT FROM pgflow.runs WHERE id = ANY(%s) FOR UPDATE", [locked])
                for run in runs[:20]:
                    waiting.start_soon(run.claim, ask("a"))
                with anyio.fail_after(180):
                    for _ in range(5):
                        for run in runs[20:]:
                            await run.claim(ask("a"))
        assert [each.attempts for each in await store.list_step_states(run_ids[0])] == [1]


async def test_only_the_element_that_caused_an_error_gets_it(
    store: Store, sent: list[tuple[int, int]], db: Connection, run_ids: list[UUID]
) -> None:
    db.execute("ALTER TABLE pgflow.step_states ADD CONSTRAINT odd CHECK (step_result IS DISTINCT FROM '13')")
    heard: dict[int, object] = {}
    async with AsyncExitStack() as stack:
        runs = await open_runs(stack, Batch(store), store, run_ids)
        async with anyio.create_task_group() as group:
            for run in runs:
                group.start_soon(run.claim, ask("a"))

        async def complete(number: int) -> None:
            try:
                completion = Completion(TaskKey("a"), str(number), 1, uuid4())
                heard[number] = (await runs[number].complete(completion)).status
            except PgflowPrefectError as error:
                heard[number] = type(error)

        sent.clear()
        async with anyio.create_task_group() as group:
            for number in range(30):
                group.start_soon(complete, number)
    assert heard == {number: PgflowPrefectError if number == 13 else Status.COMPLETED for number in range(30)}
    assert len(sent) <= 2 * 5 + 2, "halved, and not one by one"


async def test_a_run_that_is_taken_over_delays_no_other_run(store: Store, run_ids: list[UUID]) -> None:
    outcomes: list[object] = []
    async with AsyncExitStack() as stack:
        runs = await open_runs(stack, Batch(store), store, run_ids)
        assert await store.take_run(run_ids[4], uuid4(), force=True)

        async def claim(run: RunBatch) -> None:
            try:
                outcomes.append((await run.claim(ask("a"))).attempt)
            except SupersededError as error:
                outcomes.append(error.run_id)

        async with anyio.create_task_group() as group:
            for run in runs:
                group.start_soon(claim, run)
    assert sorted(outcomes, key=str) == [1] * 29 + [run_ids[4]]


async def test_a_closed_run_drops_its_requests_and_other_runs_go_on(store: Store, run_ids: list[UUID]) -> None:
    async with AsyncExitStack() as stack:
        batch = Batch(store)
        [run] = await open_runs(stack, batch, store, run_ids[:1])
        async with open_run(batch, store, run_ids[1]) as left:
            dropped = left.claim_later(ask("a"))
        assert dropped.cancelled()
        assert (await run.claim(ask("a"))).attempt == 1
    assert [each.attempts for each in await store.list_step_states(run_ids[1])] == [0]


async def test_a_small_run_does_not_wait_for_all_requests_of_a_large_run(
    store: Store, sent: list[tuple[int, int]], db: Connection, run_ids: list[UUID]
) -> None:
    steps = [f"s{number}" for number in range(5 * MOST)]
    define(db, "large", {step: [] for step in steps})
    large_id = run_workflow(db, "large").id
    async with AsyncExitStack() as stack:
        large, small = await open_runs(stack, Batch(store), store, [large_id, run_ids[0]])
        claims = [large.claim_later(ask(step)) for step in steps]
        await small.claim(ask("a"))
        await small.complete(Completion(TaskKey("a"), "1", 1, uuid4()))
        assert len(sent) == 2
        assert not claims[-1].done()
        for each in claims:
            await each
    assert sent == [(0, MOST), (1, MOST - 1), *[(0, MOST)] * 3, (0, 2)]


async def test_a_failure_is_reported_together_with_completions(
    store: Store, sent: list[tuple[int, int]], run_ids: list[UUID]
) -> None:
    async with AsyncExitStack() as stack:
        runs = await open_runs(stack, Batch(store), store, run_ids[:2])
        async with anyio.create_task_group() as group:
            for run in runs:
                group.start_soon(run.claim, ask("a"))
        async with anyio.create_task_group() as group:
            group.start_soon(runs[0].fail, Failure(TaskKey("a"), "broken", "Failed", 1, uuid4()))
            group.start_soon(runs[1].complete, Completion(TaskKey("a"), "1", 1, uuid4()))
    assert sent == [(0, 2), (2, 0)]
    end = await store.read_end(run_ids[0], [])
    assert (end.status, end.error_message) == (Status.FAILED, 'step "a" failed: broken')
