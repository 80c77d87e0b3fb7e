"""Steps that external workers do: Prefect executes nothing, waits, and shows what PostgreSQL says of them."""

from datetime import timedelta
from typing import LiteralString

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import TaskRun

from pgflow_prefect import StepContext, Workflow
from pgflow_prefect.bindings import External
from pgflow_prefect.database.store import Store
from pgflow_prefect.execution.process.host import Stop
from pgflow_prefect.models import AwaitedStep, StepEnd
from tests.conftest import Connection
from tests.engine import cancel, claim, complete, fail, get_run, get_state, reopen, run_workflow, take, value
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_steps
from tests.integration.waiting import WAITING, await_value, going, going_on, note_active_runs, read_times

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

WORKED: LiteralString = """
    SELECT clock_timestamp() > started_at + interval '1 s' FROM pgflow.step_states WHERE step_slug = 'first'
"""
SECOND: LiteralString = "SELECT max(state_name) FROM pgflow_prefect.task_runs WHERE step_slug = 'second'"


@pytest.fixture
def outside(define: Define) -> Workflow:
    """A workflow first -> second that is external."""
    workflow = Workflow(make_slug())
    define(workflow.slug, ["first", "second"], [("first", "second")])
    return workflow


def check_times(db: Connection, shown: TaskRun, step: str) -> None:
    began, ended = read_times(db, value(db, "SELECT id FROM pgflow.runs"), step)  # type: ignore[arg-type]
    assert shown.start_time is not None
    assert shown.end_time is not None
    for there, here in ((shown.start_time, began), (shown.end_time, ended)):
        assert abs(there.timestamp() - here.timestamp()) < 0.001


async def test_a_step_that_an_external_worker_completes_is_shown_with_its_result_and_times(
    outside: Workflow, db: Connection, client: PrefectClient
) -> None:
    async with going(outside, db) as run:
        await await_value(db, 1, WAITING)
        assert read_steps(db)["first"] == ("pending", 0, None, None), "no attempt was counted"
        assert claim(db, run.run_id, "first").attempt == 1
        await await_value(db, True, WORKED)  # the work takes its time, which Prefect is to show
        complete(db, run.run_id, "first", {"rows": 3})
        await await_value(db, "Waiting", SECOND)
        complete(db, run.run_id, "second", "x" * 5000)
    assert await run.ended.result() == {"second": "x" * 5000}
    assert {slug: state[1] for slug, state in read_steps(db).items()} == {"first": 1, "second": 0}

    flow_run = await read_flow_run(client, outside.slug)
    shown = await await_task_runs(client, flow_run, {"first": "Completed", "second": "Completed"})
    first, second = shown["first"], shown["second"]
    assert first.state is not None
    assert second.state is not None
    assert first.state.message == 'completed outside Prefect: {"rows": 3}'
    assert second.state.message is not None
    assert len(second.state.message) < 1100
    check_times(db, first, "first")
    check_times(db, second, "second")
    assert first.total_run_time > timedelta(seconds=1)


async def test_what_was_completed_before_prefect_looked_is_shown_the_same_way(
    outside: Workflow, db: Connection, client: PrefectClient
) -> None:
    run_id = run_workflow(db, outside.slug).id
    complete(db, run_id, "first", 7)
    async with going_on(outside, run_id) as run:
        await await_value(db, 1, WAITING)
        complete(db, run_id, "second", 8)
    assert run.ended.is_completed()

    shown = await await_task_runs(
        client, await read_flow_run(client, outside.slug), {"first": "Completed", "second": "Completed"}
    )
    assert shown["first"].state is not None
    assert shown["first"].state.message == "completed outside Prefect: 7"
    check_times(db, shown["first"], "first")


@pytest.mark.thorough
async def test_what_ended_together_with_the_run_before_prefect_looked_is_shown_the_same_way(
    outside: Workflow, db: Connection, client: PrefectClient
) -> None:
    async with going(outside, db) as run:
        await await_value(db, 1, WAITING)
        with db.transaction():  # Prefect waits for the first one still
            complete(db, run.run_id, "first", 1)
            complete(db, run.run_id, "second", 2)
    assert await run.ended.result() == {"second": 2}
    shown = await await_task_runs(
        client, await read_flow_run(client, outside.slug), {"first": "Completed", "second": "Completed"}
    )
    check_times(db, shown["second"], "second")


async def test_what_failed_before_prefect_looked_is_shown_the_same_way(
    outside: Workflow, db: Connection, client: PrefectClient
) -> None:
    async with going(outside, db) as run:
        await await_value(db, 1, WAITING)
        with db.transaction():
            complete(db, run.run_id, "first", 1)
            fail(db, run.run_id, "second", "no such list")
    assert run.ended.is_failed()
    shown = await await_task_runs(
        client, await read_flow_run(client, outside.slug), {"first": "Completed", "second": "Failed"}
    )
    assert shown["second"].state is not None
    assert shown["second"].state.message == "no such list"
    check_times(db, shown["second"], "second")


async def test_a_step_that_an_external_worker_fails_is_shown_with_its_message_and_times(
    outside: Workflow, db: Connection, client: PrefectClient
) -> None:
    async with going(outside, db) as run:
        await await_value(db, 1, WAITING)
        fail(db, run.run_id, "first", "no such list")
    assert run.ended.is_failed()

    shown = await await_task_runs(client, await read_flow_run(client, outside.slug), {"first": "Failed"})
    assert shown["first"].state is not None
    assert shown["first"].state.message == "no such list"
    assert shown["first"].run_count == 1
    check_times(db, shown["first"], "first")
    assert read_steps(db) == {"first": ("failed", 0, None, "no such list")}


async def test_a_failure_that_an_external_worker_reports_is_not_tried_again(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", External(retries=3))
    async with going(workflow, db) as run:
        await await_value(db, 1, WAITING)
        fail(db, run.run_id, "only", "no such list")
    assert run.ended.is_failed()
    assert get_run(db, run.run_id).error_message == 'step "only" failed: no such list'


@pytest.mark.thorough
async def test_a_step_beside_handlers_waits_while_they_work(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, "abcd", [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])
    done: list[str] = []

    @workflow.step
    def a() -> int:
        return 1

    @workflow.step
    def c(a: int) -> int:
        done.append("c")
        return a + 1

    @workflow.step
    def d(b: int, c: int) -> int:
        return b + c

    async with going(workflow, db) as run:
        await await_value(db, "completed", "SELECT max(status) FROM pgflow.step_states WHERE step_slug = 'c'")
        await await_value(db, 1, WAITING)
        complete(db, run.run_id, "b", 40)
    assert await run.ended.result() == {"d": 42}


@pytest.mark.thorough
async def test_waiting_ends_after_its_time_out(define: Define, db: Connection, client: PrefectClient) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", External(timeout_seconds=0.5))
    async with going(workflow, db) as run:
        pass
    assert run.ended.is_failed()
    message = "step 'only': no program has reported it within 0.5 s"
    assert read_steps(db) == {"only": ("failed", 0, None, message)}
    await await_task_runs(client, await read_flow_run(client, workflow.slug), {"only": "TimedOut"})


async def test_after_its_time_a_step_may_be_waited_for_once_more(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    # Enough retries for a machine that is too slow to report within the time of one.
    workflow.bind("only", External(timeout_seconds=1, retries=100, retry_delay_seconds=0.5))
    async with going(workflow, db) as run:
        await await_value(db, "AwaitingRetry", "SELECT max(state_name) FROM pgflow_prefect.task_runs")
        await await_value(db, 1, WAITING)
        complete(db, run.run_id, "only", 1)
    assert run.ended.is_completed()


async def test_a_run_that_is_stopped_because_its_last_step_is_done_is_completed(
    define: Define, db: Connection, client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    begun = note_active_runs(monkeypatch)
    async with going(workflow, db) as run:
        await await_value(db, 1, WAITING)
        complete(db, run.run_id, "only", 1)
        begun[0].stop(Stop.ENDED)  # who extends the leases has heard of it first
    assert run.ended.is_completed()
    await await_task_runs(client, await read_flow_run(client, workflow.slug), {"only": "Completed"})


async def test_a_report_at_the_time_out_counts(define: Define, db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", External(timeout_seconds=0.3))

    async def look(store: Store, awaited: list[AwaitedStep]) -> list[StepEnd]:
        complete(db, awaited[0].run_id, "only", 1)
        return []  # as if it had looked just before

    monkeypatch.setattr(Store, "watch_steps", look)
    async with going(workflow, db) as run:
        pass
    assert run.ended.is_completed()
    assert get_state(db, run.run_id, "only").step_result == 1


async def test_a_run_that_is_cancelled_is_waited_for_no_longer(
    outside: Workflow, db: Connection, client: PrefectClient
) -> None:
    async with going(outside, db) as run:
        await await_value(db, 1, WAITING)
        cancel(db, run.run_id, "cancelled: wrong list")
    assert run.ended.is_cancelled()
    shown = await await_task_runs(client, await read_flow_run(client, outside.slug), {"first": "Cancelled"})
    assert shown["first"].state is not None
    # A Prefect server looks from time to time for what is left of cancelled flow runs, and may have been there first.
    assert shown["first"].state.message in {"cancelled: wrong list", "The parent flow run was cancelled."}


async def test_a_step_of_a_run_that_failed_elsewhere_is_waited_for_no_longer(
    define: Define, db: Connection, client: PrefectClient
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["left", "right"])
    async with going(workflow, db) as run:
        await await_value(db, 2, WAITING)
        fail(db, run.run_id, "left", "broken")
    assert run.ended.is_failed()
    await await_task_runs(client, await read_flow_run(client, workflow.slug), {"left": "Failed", "right": "Cancelled"})


async def test_a_process_that_loses_the_run_while_it_waits_stops_and_leaves_the_run_alone(
    outside: Workflow, db: Connection, client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_LEASE", "1")  # the process hears of it within a third of that
    async with going(outside, db) as run:
        await await_value(db, 1, WAITING)
        take(db, run.run_id)
    assert run.ended.name == "Superseded"
    await await_task_runs(client, await read_flow_run(client, outside.slug), {"first": "Superseded"})
    assert get_run(db, run.run_id).status == "pending"
    assert read_steps(db) == {"first": ("pending", 0, None, None)}


async def test_draining_hands_back_a_waiting_run_and_the_next_owner_waits_on(
    define: Define, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", External(timeout_seconds=600))
    begun = note_active_runs(monkeypatch)
    async with going(workflow, db) as first:
        await await_value(db, 1, WAITING)
        since = value(db, "SELECT updated_at FROM pgflow_prefect.task_runs")
        begun[0].drain()
    assert first.ended.name == "HandedBack"
    assert value(db, "SELECT lease_until = '-infinity' FROM pgflow_prefect.owners"), "the lease is over"

    async with going_on(workflow, first.run_id) as second:
        await await_value(db, 2, "SELECT epoch FROM pgflow_prefect.owners")
        await await_value(db, 1, WAITING)
        assert value(db, "SELECT updated_at FROM pgflow_prefect.task_runs") == since
        complete(db, first.run_id, "only", 1)
    assert second.ended.is_completed()


async def test_the_time_counts_from_the_first_wait_of_any_process(
    define: Define, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", External(timeout_seconds=600))
    begun = note_active_runs(monkeypatch)
    async with going(workflow, db) as run:
        await await_value(db, 1, WAITING)
        begun[0].drain()
    db.execute("UPDATE pgflow_prefect.task_runs SET updated_at = updated_at - interval '10 minutes'")
    with anyio.fail_after(180):
        async with going_on(workflow, run.run_id) as second:
            pass
    assert second.ended.is_failed()
    assert get_state(db, run.run_id, "only").error_message == "step 'only': no program has reported it within 600 s"


@pytest.mark.thorough
@pytest.mark.parametrize("seen", [True, False])
async def test_a_cancelled_run_that_is_reopened_has_all_its_time_again(
    define: Define, db: Connection, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", External(timeout_seconds=600))
    begun = note_active_runs(monkeypatch)
    async with going(workflow, db) as run:
        await await_value(db, 1, WAITING)
        db.execute("UPDATE pgflow_prefect.task_runs SET updated_at = updated_at - interval '10 minutes'")
        cancel(db, run.run_id)
        if not seen:
            begun[0].stop(Stop.ENDED)  # who extends the leases has heard of it first
    reopen(db, run.run_id)
    async with going_on(workflow, run.run_id) as second:
        await await_value(db, 1, WAITING)
        complete(db, run.run_id, "only", 1)
    assert second.ended.is_completed()


CONNECTED: LiteralString = """
    SELECT count(*) > 0 FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'pgflow-prefect'
"""


async def test_waiting_survives_connections_that_are_cut(outside: Workflow, db: Connection) -> None:
    async with going(outside, db) as run:
        await await_value(db, 1, WAITING)
        for _ in range(3):
            db.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'pgflow-prefect'"
            )
            await await_value(db, True, CONNECTED)
        complete(db, run.run_id, "first", 1)
        await await_value(db, "Waiting", SECOND)
        complete(db, run.run_id, "second", 2)
    assert run.ended.is_completed()


async def test_a_stub_counts_as_no_handler(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["stub"])

    @workflow.step(unimplemented=True)
    def stub(context: StepContext) -> None:
        raise AssertionError("there is no work here yet")

    async with going(workflow, db) as run:
        await await_value(db, 1, WAITING)
        complete(db, run.run_id, "stub", "theirs")
    assert await run.ended.result() == {"stub": "theirs"}


@pytest.mark.thorough
@pytest.mark.timeout(300)
async def test_a_thousand_steps_are_waited_for_at_once_by_one_poller(
    define: Define, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_CONCURRENCY", "10")
    monkeypatch.setenv("PGFLOW_POOL_SIZE", "3")
    looking = most_looking = looks = most = 0
    look = Store.watch_steps

    async def counted(store: Store, awaited: list[AwaitedStep]) -> list[StepEnd]:
        nonlocal looking, most_looking, looks, most
        looking, looks, most = looking + 1, looks + 1, max(most, len(awaited))
        most_looking = max(most_looking, looking)
        try:
            return await look(store, awaited)
        finally:
            looking -= 1

    monkeypatch.setattr(Store, "watch_steps", counted)
    workflow = Workflow(make_slug())
    define(workflow.slug, [f"s{n}" for n in range(1000)])
    async with going(workflow, db) as run:
        await await_value(db, 1000, WAITING)
        while most < 1000:
            await anyio.sleep(0.05)
        before, began = looks, anyio.current_time()
        await anyio.sleep(2)
        took = anyio.current_time() - began
        assert looks - before <= took / 0.1 + 1, "never more than ten looks a second"
        assert most_looking == 1
        connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgflow-prefect'"
        assert int(str(value(db, connections + " AND datname = current_database()"))) <= 3 + 1, "the pool, and leases"
        db.execute("SELECT pgflow.complete_step(run_id, step_slug, '1') FROM pgflow.step_states WHERE run_id = %s",
                   [run.run_id])  # fmt: skip
    assert run.ended.is_completed()
    assert value(db, "SELECT count(*) FROM pgflow.step_states WHERE status = 'completed' AND attempts = 0") == 1000
    assert value(db, "SELECT count(*) FROM pgflow_prefect.task_runs WHERE state_name = 'Completed'") == 1000
