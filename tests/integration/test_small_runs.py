"""What many small runs cost a process in statements, from the one that takes them to their ends."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from uuid import UUID, uuid4

import anyio
import pytest
from pydantic import SecretStr

from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.definitions.graph import find_leaves
from pgflow_prefect.errors import SupersededError, UnknownRunError
from pgflow_prefect.execution.process import host as hosts
from pgflow_prefect.execution.process.host import ActiveRun, Host, open_host
from pgflow_prefect.execution.process.slots import Slot, Turns
from pgflow_prefect.models import ClaimRequest, Completion, RunEnd, Status, TakenRun, TaskKey
from pgflow_prefect.services.run_fetcher import RunFetcher
from pgflow_prefect.settings import Settings
from pgflow_prefect.waiting import Wakeup
from tests.conftest import Connect, Connection
from tests.engine import define, run_workflow, value

pytestmark = pytest.mark.anyio

RUNS = 50
STEPS = [f"s{number}" for number in range(5)]
CHAIN = {step: STEPS[max(0, number - 1) : number] for number, step in enumerate(STEPS)}
WORKFLOWS = ["one", "two"]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each statement of the store was sent."""
    counted: Counter[str] = Counter()
    fetch = Store._fetch

    async def count(self: Store, query: str, **parameters: object) -> list[dict[str, object]]:
        counted[query] += 1
        return await fetch(self, query, **parameters)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_fetch", count)
    return counted


@pytest.fixture
async def host(product_dsn: str) -> AsyncIterator[Host]:
    settings = Settings(dsn=SecretStr(product_dsn), lease=600, pool_size=6)
    async with open_host(settings) as opened:
        yield opened


@pytest.fixture
def run_ids(db: Connection) -> list[UUID]:
    for slug in WORKFLOWS:
        define(db, slug, CHAIN)
        db.execute("SELECT pgflow_prefect.enable_workflow(%s, true)", [slug])
    return [run_workflow(db, slug, {}).id for slug in WORKFLOWS for _ in range(RUNS // 2)]


async def execute(host: Host, taken: TakenRun) -> RunEnd:
    """Do what a worker and its flow do for a run, but for Prefect."""
    flow_run_id = uuid4()
    with ExitStack() as held:
        held.enter_context(host.reserve(taken.run_id, taken.epoch))
        assert await host.link(taken, flow_run_id)
        begun = host.begin(taken.run_id, flow_run_id)
        assert begun is not None
        epoch, linked = begun
        run = held.enter_context(host.execute(taken.run_id, epoch, flow_run_id, linked))
        graph = (await host.load_plan(run)).graph
        async with host.batch.open(run.run_id, epoch) as batch:
            claimed = batch.claim_later(ClaimRequest(TaskKey("s0"), uuid4(), None, with_payload=True))
            for step, following in zip(STEPS, [*STEPS[1:], None], strict=True):
                attempt = (await claimed).attempt
                if following is not None:
                    claimed = batch.claim_later(ClaimRequest(TaskKey(following), uuid4(), None, with_payload=True))
                await batch.complete(Completion(TaskKey(step), f'"{run.run_id}"', attempt, uuid4()))
            run.result_sizes = batch.sizes
        return await host.read_end(run, find_leaves(graph))


async def test_fifty_small_runs_cost_a_fraction_of_a_statement_each(
    host: Host, sent: Counter[str], run_ids: list[UUID], db: Connection
) -> None:
    taken = await host.store.take_runs(WORKFLOWS, RUNS)
    ends: dict[UUID, RunEnd] = {}

    async def note(run: TakenRun) -> None:
        ends[run.run_id] = await execute(host, run)

    async with anyio.create_task_group() as group:
        for each in taken:
            group.start_soon(note, each)
    assert {run_id: end.results for run_id, end in ends.items()} == {each: {"s4": str(each)} for each in run_ids}
    assert {end.status for end in ends.values()} == {Status.COMPLETED}
    assert sent["load_run_definition"] == len(WORKFLOWS)
    assert not sent.keys() & {"read_run", "take_run", "link_flow_run", "read_end", "claim_step", "complete_step"}
    assert sent.total() <= 0.5 * RUNS, sent
    assert value(db, "SELECT count(*) FROM pgflow_prefect.flow_runs") == RUNS


async def test_runs_that_come_and_go_fifty_at_a_time_cost_one_and_a_half_statements_at_most(
    host: Host, sent: Counter[str], run_ids: list[UUID], db: Connection
) -> None:
    """A slot that gets free wakes the fetcher, as in a worker: runs begin and end one by one, and not in step."""
    run_ids += [run_workflow(db, slug, {}).id for slug in WORKFLOWS for _ in range(75)]
    ended: list[UUID] = []

    async def handle(taken: TakenRun, slot: Slot) -> None:
        ended.append((await execute(host, taken)).id)
        if len(ended) == len(run_ids):
            fetcher.stop()

    fetcher = RunFetcher(
        host.store, handle, slots=RUNS, sweep_interval=600, adopt=False, workflow_slugs=WORKFLOWS, wakeup=Wakeup()
    )
    async with anyio.create_task_group() as group:
        await fetcher.run(group)
    assert sorted(ended) == sorted(run_ids)
    assert sent.total() <= 1.5 * len(run_ids), sent


async def take_one(host: Host) -> TakenRun:
    [taken] = await host.store.take_runs(["one"], 1)
    return taken


async def test_a_run_that_was_taken_over_after_its_reservation_is_not_begun(host: Host, run_ids: list[UUID]) -> None:
    taken = await take_one(host)
    assert await host.store.take_run(taken.run_id, uuid4(), force=True)
    flow_run_id = uuid4()
    assert not await host.link(taken, flow_run_id)
    assert host.begin(taken.run_id, flow_run_id) is None


async def test_a_run_that_is_taken_over_after_it_was_linked_is_lost_at_its_first_claim(
    host: Host, run_ids: list[UUID]
) -> None:
    taken = await take_one(host)
    flow_run_id = uuid4()
    assert await host.link(taken, flow_run_id)
    assert await host.store.take_run(taken.run_id, uuid4(), force=True)
    begun = host.begin(taken.run_id, flow_run_id)
    assert begun is not None
    async with host.batch.open(taken.run_id, begun[0]) as batch:
        with pytest.raises(SupersededError):
            await batch.claim(ClaimRequest(TaskKey("s0"), uuid4(), None, with_payload=True))


async def test_a_run_that_has_ended_before_it_was_linked_is_read_as_it_is(host: Host, run_ids: list[UUID]) -> None:
    taken = await take_one(host)
    await host.store.cancel_run(taken.run_id, "enough")
    flow_run_id = uuid4()
    assert await host.link(taken, flow_run_id)
    assert host.begin(taken.run_id, flow_run_id) is None


async def test_a_flow_run_begins_its_run_once(host: Host, run_ids: list[UUID]) -> None:
    taken = await take_one(host)
    flow_run_id = uuid4()
    assert await host.link(taken, flow_run_id)
    assert host.begin(taken.run_id, uuid4()) is None, "of another flow run"
    assert await host.link(taken, flow_run_id), "again: nothing new"
    assert host.begin(taken.run_id, flow_run_id) is not None
    assert host.begin(taken.run_id, flow_run_id) is None
    assert await host.store.take_run(taken.run_id, flow_run_id) == taken.epoch + 1, "Prefect tries it again"


async def test_an_owner_that_is_locked_keeps_no_other_run_from_its_link(
    host: Host, run_ids: list[UUID], connect: Connect
) -> None:
    taken = await host.store.take_runs(WORKFLOWS, RUNS)
    holder = connect()
    async with anyio.create_task_group() as waiting:
        with holder.transaction():
            holder.execute("SELECT FROM pgflow_prefect.owners WHERE run_id = %s FOR UPDATE", [taken[-1].run_id])
            waiting.start_soon(host.link, taken[-1], uuid4())
            with anyio.fail_after(60):  # the lock is held until they are done
                async with anyio.create_task_group() as group:
                    for each in taken[:-1]:
                        group.start_soon(host.link, each, uuid4())
    assert host.begin(taken[-1].run_id, uuid4()) is None


async def test_a_link_survives_the_loss_of_all_connections(host: Host, db: Connection, run_ids: list[UUID]) -> None:
    taken = await host.store.take_runs(WORKFLOWS, 2 * host.store.connections)
    cut = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()"""
    db.execute(cut)
    linked = [await host.link(each, uuid4()) for each in taken]
    assert linked == [True] * len(taken)


async def test_many_owners_that_are_locked_leave_connections_to_the_other_runs(
    host: Host, run_ids: list[UUID], connect: Connect, sent: Counter[str]
) -> None:
    taken = await host.store.take_runs(WORKFLOWS, RUNS)
    locked, free = taken[: 2 * host.store.connections], taken[2 * host.store.connections :]
    holder = connect()
    linked: list[bool] = []

    async def link(each: TakenRun) -> None:
        linked.append(await host.link(each, uuid4()))

    async with anyio.create_task_group() as waiting:
        with holder.transaction():
            holder.execute(
                "SELECT FROM pgflow_prefect.owners WHERE run_id = ANY(%s) FOR UPDATE",
                [[each.run_id for each in locked]],
            )
            for each in locked:
                waiting.start_soon(link, each)
            with anyio.fail_after(60):  # the locks are held until they are done
                while sent["link_flow_runs"] <= 2 * len(locked):  # each one has been found locked, and is asked again
                    await anyio.sleep(0.01)
                for each in free:
                    await execute(host, each)
    assert linked == [True] * len(locked)


async def test_a_run_that_is_gone_keeps_no_other_run_from_its_end(host: Host, run_ids: list[UUID]) -> None:
    ends: list[object] = []

    async def read(run_id: UUID) -> None:
        run = ActiveRun(run_id, 1, Turns(1), result_sizes={"s4": 1})
        try:
            ends.append((await host.read_end(run, ["s4"])).id)
        except UnknownRunError:
            ends.append("gone")

    async with anyio.create_task_group() as group:
        for run_id in (*run_ids[:3], uuid4()):
            group.start_soon(read, run_id)
    assert sorted(map(str, ends)) == sorted([*map(str, run_ids[:3]), "gone"])


async def test_a_run_with_large_results_reads_its_end_alone(
    host: Host, sent: Counter[str], run_ids: list[UUID]
) -> None:
    large = ActiveRun(run_ids[0], 1, Turns(1), result_sizes={"s4": hosts.SMALL + 1})
    unknown = ActiveRun(run_ids[1], 1, Turns(1), result_sizes={"s0": 1})
    for run in (large, unknown):
        await host.read_end(run, ["s4"])
    assert (sent["read_end"], sent["read_ends"]) == (2, 0)


async def test_a_run_keeps_its_definition_whatever_others_began_with(
    host: Host, db: Connection, run_ids: list[UUID]
) -> None:
    db.execute("INSERT INTO pgflow.steps VALUES ('one', 'later')")
    newer = run_workflow(db, "one", {}).id
    plans: dict[UUID, set[str]] = {}
    for taken in await host.store.take_runs(["one"], RUNS):
        flow_run_id = uuid4()
        assert await host.link(taken, flow_run_id)
        begun = host.begin(taken.run_id, flow_run_id)
        assert begun is not None
        plan = await host.load_plan(ActiveRun(taken.run_id, begun[0], Turns(1), linked=begun[1]))
        plans[taken.run_id] = set(plan.definition.steps)
    assert plans == {each: {*STEPS} for each in run_ids[: RUNS // 2]} | {newer: {*STEPS, "later"}}


async def test_a_process_keeps_the_definitions_that_it_used_last(
    host: Host, db: Connection, run_ids: list[UUID], sent: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "MOST_STEPS", 7)
    for _ in range(2):
        for taken in await host.store.take_runs(WORKFLOWS[:1], 2) + await host.store.take_runs(WORKFLOWS[1:], 2):
            flow_run_id = uuid4()
            assert await host.link(taken, flow_run_id)
            begun = host.begin(taken.run_id, flow_run_id)
            assert begun is not None
            await host.load_plan(ActiveRun(taken.run_id, begun[0], Turns(1), linked=begun[1]))
    assert sent["load_run_definition"] == 4, "room for one of them: both are read again"


async def test_two_processes_share_the_runs_that_wait_and_take_each_once(
    host: Host, db: Connection, run_ids: list[UUID]
) -> None:
    run_ids += [run_workflow(db, slug, {}).id for slug in WORKFLOWS for _ in range(250)]
    taken: list[list[UUID]] = [[], []]

    async def take_all(store: Store, mine: list[UUID]) -> None:
        while runs := await store.take_runs(WORKFLOWS, 20):
            mine += [each.run_id for each in runs]

    async with open_store(host.settings) as other, anyio.create_task_group() as group:
        group.start_soon(take_all, host.store, taken[0])
        group.start_soon(take_all, other, taken[1])
    # One of them may have found those that the other was about to take locked, and looked no more.
    rest = [each.run_id for each in await host.store.take_runs(WORKFLOWS, len(run_ids))]
    assert sorted([*taken[0], *taken[1], *rest]) == sorted(run_ids)
