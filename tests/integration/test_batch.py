"""Claims and completions that come at the same time: one statement, and the one that is to blame alone hears of it."""

import json
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import anyio
import psycopg
import pytest

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import PgflowPrefectError, ResultInvalidError, RunNotPendingError, SupersededError
from pgflow_prefect.execution.batch import MOST, Batch, open_batch
from pgflow_prefect.models import Claim, ClaimRequest, Completion, Report, Status, TaskKey
from pgflow_prefect.raw_json import UnreadableJsonError
from tests.conftest import Connection
from tests.engine import define, run_workflow, value
from tests.json_values import decode

pytestmark = pytest.mark.anyio

STEPS = [f"s{number}" for number in range(20)]
GRAPH = {**{step: [] for step in STEPS}, "join": STEPS, "after": ["s0"]}


@pytest.fixture
async def run_id(db: Connection) -> UUID:
    define(db, "wide", GRAPH)
    run_id: UUID = run_workflow(db, "wide").id
    return run_id


@pytest.fixture
async def sent(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many completions and claims each statement had that took several."""
    statements: list[tuple[int, int]] = []
    send = store.complete_and_claim

    async def note(
        run_id: UUID, epoch: int, completions: list[Completion], claims: list[ClaimRequest]
    ) -> tuple[list[Report], list[Claim | SupersededError | RunNotPendingError]]:
        statements.append((len(completions), len(claims)))
        return await send(run_id, epoch, completions, claims)

    monkeypatch.setattr(store, "complete_and_claim", note)
    return statements


@pytest.fixture
async def batch(store: Store, run_id: UUID) -> AsyncIterator[Batch]:
    epoch = await store.take_run(run_id, uuid4())
    assert epoch is not None
    async with open_batch(store, run_id, epoch) as opened:
        yield opened


def ask(step: str) -> ClaimRequest:
    return ClaimRequest(TaskKey(step), uuid4(), None, with_payload=False)


async def claim_all(batch: Batch, steps: list[str]) -> None:
    async with anyio.create_task_group() as group:
        for step in steps:
            group.start_soon(batch.claim, ask(step))


async def test_what_comes_at_the_same_time_goes_in_one_statement(
    batch: Batch, sent: list[tuple[int, int]], db: Connection, run_id: UUID
) -> None:
    await claim_all(batch, STEPS)
    assert sent == [(0, 20)]
    async with anyio.create_task_group() as group:
        for number, step in enumerate(STEPS):
            group.start_soon(batch.complete, Completion(TaskKey(step), json.dumps({"n": number}), 1, uuid4()))
    assert sent == [(0, 20), (20, 0)]
    claim = await batch.claim(ask("join"))
    assert decode(claim.upstream_results) == {step: {"n": number} for number, step in enumerate(STEPS)}
    assert len(sent) == 2, "alone, it is an ordinary claim"
    assert value(db, "SELECT remaining FROM pgflow.runs WHERE id = %s", run_id) == 2


async def test_a_step_is_claimed_together_with_the_completion_that_makes_it_ready(
    batch: Batch, sent: list[tuple[int, int]], db: Connection, run_id: UUID
) -> None:
    await batch.claim(ask("s0"))
    ahead = batch.claim_later(ask("after"))
    report = await batch.complete(Completion(TaskKey("s0"), '"done"', 1, uuid4()))
    assert report.status is Status.COMPLETED
    assert decode((await ahead).upstream_results) == {"s0": "done"}
    assert sent == [(1, 1)]
    attempts = "SELECT attempts FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'after'"
    assert value(db, attempts, run_id) == 1


async def test_one_result_that_cannot_be_stored_keeps_no_other_one_back(
    batch: Batch, db: Connection, run_id: UUID
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


async def test_a_claim_ahead_of_what_is_not_ready_is_refused_and_harms_nothing(batch: Batch) -> None:
    await batch.claim(ask("s0"))
    ahead = batch.claim_later(ask("join"))
    assert (await batch.complete(Completion(TaskKey("s0"), "1", 1, uuid4()))).status is Status.COMPLETED
    with pytest.raises(PgflowPrefectError, match="has not been started"):
        await ahead


async def test_what_python_cannot_read_is_claimed_and_raised_where_it_is_read(batch: Batch, db: Connection) -> None:
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
    results = (await claimed).upstream_results
    assert results is not None
    assert results.text == f'{{"s0": {"9" * 5001}}}'
    with pytest.raises(UnreadableJsonError, match="too many digits"):
        results.decode()


class Signal(BaseException):
    """What Prefect raises for SIGTERM, wherever the event loop is at that moment."""


async def test_a_signal_that_meets_the_statement_is_heard_by_all_who_wait_for_it(
    batch: Batch, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def raise_signal(*_: object) -> None:
        raise Signal

    monkeypatch.setattr(store, "complete_and_claim", raise_signal)
    heard: list[str] = []

    async def claim(step: str) -> None:
        with pytest.raises(Signal):
            await batch.claim(ask(step))
        heard.append(step)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for step in STEPS:
                group.start_soon(claim, step)
    assert sorted(heard) == sorted(STEPS)


async def test_a_former_owner_hears_it_for_each(batch: Batch, store: Store, run_id: UUID) -> None:
    await batch.claim(ask("s0"))
    assert await store.take_run(run_id, uuid4(), force=True)
    ahead = batch.claim_later(ask("s1"))
    assert (await batch.complete(Completion(TaskKey("s0"), "1", 1, uuid4()))).status is Status.PENDING
    with pytest.raises(SupersededError):
        await ahead


async def test_a_connection_that_breaks_is_a_matter_of_the_moment_for_all(
    store: Store, batch: Batch, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.complete_and_claim
    broken = False

    async def cut_once(*arguments: object) -> object:
        nonlocal broken
        if not broken:
            broken = True
            db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        return await real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "complete_and_claim", cut_once)
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
    epoch = await store.take_run(run_id, uuid4())
    assert epoch is not None
    async with open_batch(store, run_id, epoch) as batch:
        await claim_all(batch, steps)
        assert sent == [(0, MOST), (0, 5)]
        large = json.dumps("x" * 700_000)
        async with anyio.create_task_group() as group:
            for step in steps[:3]:
                group.start_soon(batch.complete, Completion(TaskKey(step), large, 1, uuid4()))
    with psycopg.connect(db.info.dsn) as connection:
        query = "SELECT count(*) FROM pgflow.step_states WHERE status = 'completed'"
        assert connection.execute(query).fetchone() == (3,)
