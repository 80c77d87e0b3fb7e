"""Who may do what on a database of the released pgflow: the roles of `sql/released/roles.sql`, and Supabase's."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from pgflow_prefect.database.connection import connect as open_connection
from pgflow_prefect.database.diagnosis import open_diagnosis
from pgflow_prefect.database.recording import RecordLink
from pgflow_prefect.database.schema import install_schema, remove_schema
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.models import Claim, ClaimRequest, Completion, Doing, ItemReport, Status, TaskKey
from pgflow_prefect.settings import Settings
from tests.contract.worlds import ReleasedWorld
from tests.engine import refused
from tests.former import COMMITS, read_former
from tests.integration.supabase import DENIED, SUPABASE_ROLES, borrowed_roles, create_role
from tests.json_values import decode
from tests.released_lab import run_released_script

pytestmark = pytest.mark.anyio

FORBIDDEN = (
    "UPDATE pgflow.runs SET status = 'failed'",
    "INSERT INTO pgflow.workers (worker_id, queue_name, function_name) VALUES (gen_random_uuid(), 'photos', 'mine')",
    "DELETE FROM pgflow.step_tasks",
    "SELECT * FROM pgmq.q_photos",
    "SELECT pgflow_prefect.new_installation()",
    "UPDATE pgflow_prefect.installation SET stamp = 'mine'",
    "CREATE TABLE pgflow_prefect.mine (id int)",
)

OWNED = """
    ALTER SCHEMA pgflow OWNER TO ROLE_NAME;
    DO $$ DECLARE each regclass; BEGIN
        EXECUTE format('GRANT CREATE ON DATABASE %I TO ROLE_NAME', current_database());
        FOR each IN SELECT oid FROM pg_class WHERE relnamespace = 'pgflow'::regnamespace AND relkind = 'r' LOOP
            EXECUTE format('ALTER TABLE %s OWNER TO ROLE_NAME', each);
        END LOOP;
    END $$
"""
"""Gives the schema of pgflow to a role, which may create another one."""


@pytest.fixture
def roles(server_dsn: str, released: ReleasedWorld) -> Iterator[None]:
    """Supabase's roles, and ours, on a database with one run."""
    with borrowed_roles(server_dsn, released.dsn):
        run_released_script(released.db, "roles")
        released.flows.define("photos", {"list": []})
        released.flows.start("photos", {})
        yield


def become(dsn: str, role: str) -> str:
    """Return the connection string of a login that has this role."""
    return make_conninfo(dsn, options=f"-c role={role}")


@asynccontextmanager
async def open_as(released: ReleasedWorld, role: str) -> AsyncIterator[Store]:
    settings = Settings(dsn=SecretStr(become(released.dsn, role)))
    async with open_store(settings, size=1, only_reads=True) as store:
        yield store


@pytest.mark.usefixtures("roles")
async def test_a_role_that_executes_does_what_pgflow_allows_and_nothing_else(released: ReleasedWorld) -> None:
    async with open_store(Settings(dsn=SecretStr(released.dsn)), size=1, executes_moved=True) as owner:
        await owner.move_flow("photos")
    settings = Settings(dsn=SecretStr(become(released.dsn, "pgflow_execute")))
    async with open_store(settings, size=1, executes_moved=True) as store:
        await store.use_installation()
        [taken] = await store.take_runs(["photos"], 1)
        assert await store.link_flow_run(taken.run_id, taken.epoch, uuid4(), queued=False)
        asked = ClaimRequest(TaskKey("list"), uuid4(), None, with_payload=True)
        claim = await store.claim_step(taken.run_id, taken.epoch, asked)
        assert (claim.attempt, claim.waits) == (1, False)
        await store.extend_leases([(taken.run_id, taken.epoch)])
        done = Completion(TaskKey("list"), "[1]", claim.attempt, uuid4())
        assert (await store.complete_step(taken.run_id, taken.epoch, done)).status is Status.COMPLETED
        run_id = uuid4()
        epoch = await store.create_run("photos", "{}", run_id, uuid4())
        assert epoch is not None
        claim = await store.claim_step(run_id, epoch, asked)
        fence = {"epoch": epoch, "attempt": claim.attempt, "task_run_id": uuid4()}
        failed = await store.fail_step(run_id, asked.task, "broken", state_name="Failed", **fence)
        assert failed.status is Status.FAILED
        with pytest.raises(PgflowPrefectError, match="permission denied"):
            await store.move_flow_back("photos")
    for statement in ("DELETE FROM pgflow.runs", "UPDATE pgflow.flows SET opt_timeout = 1", *FORBIDDEN[4:]):
        with psycopg.connect(become(released.dsn, "pgflow_execute"), autocommit=True) as db, refused(DENIED):
            db.execute(statement.encode())
    with psycopg.connect(become(released.dsn, "pgflow_work"), autocommit=True) as db, refused(DENIED):
        db.execute("SELECT pgflow_prefect.exhaust_task(run_id, 'list', 0, 'mine') FROM pgflow.runs")


@pytest.mark.usefixtures("roles")
async def test_a_role_that_executes_gets_every_kind_of_input(released: ReleasedWorld) -> None:
    """pgflow's functions read them with its rights: the payload, outputs of steps, and elements of either."""
    flows = released.flows
    flows.define("sheet", {"rows": [], "cell": ["rows"], "both": ["rows", "cell"]}, maps=["cell"])
    flows.define("list", {"each": []}, maps=["each"])
    async with open_store(Settings(dsn=SecretStr(released.dsn)), size=1, executes_moved=True) as owner:
        for slug in ("sheet", "list"):
            await owner.move_flow(slug)
    sheet, listed = flows.start("sheet", {"n": 1}), flows.start("list", ["a", "b"])
    settings = Settings(dsn=SecretStr(become(released.dsn, "pgflow_execute")))
    async with open_store(settings, size=1, executes_moved=True) as store:

        async def claim(run_id: UUID, step: str) -> Claim:
            return await store.claim_step(run_id, 1, ClaimRequest(TaskKey(step), uuid4(), None, with_payload=True))

        async def complete(run_id: UUID, step: str, result: str, claimed: Claim) -> None:
            done = Completion(TaskKey(step), result, claimed.attempt, uuid4())
            assert (await store.complete_step(run_id, 1, done)).status is Status.COMPLETED

        async def do_items(run_id: UUID, step: str) -> list[object]:
            await claim(run_id, step)
            begun = await store.work_items(run_id, step, 1, [], wanted=5)
            reports = [ItemReport(each.index, each.attempt, Doing.COMPLETE, str(each.index)) for each in begun.items]
            done = await store.work_items(run_id, step, 1, reports, wanted=5)
            assert done.report.status is Status.COMPLETED
            return [decode(each.item) for each in begun.items]

        assert {each.run_id for each in await store.take_runs(["sheet", "list"], 2)} == {sheet, listed}
        assert await do_items(listed, "each") == ["a", "b"]
        rows = await claim(sheet, "rows")
        assert rows.payload is not None
        assert decode(rows.payload) == {"n": 1}
        await complete(sheet, "rows", "[7, 8]", rows)
        assert await do_items(sheet, "cell") == [7, 8]
        both = await claim(sheet, "both")
        assert both.upstream_results is not None
        assert decode(both.upstream_results) == {"rows": [7, 8], "cell": [0, 1]}
        await complete(sheet, "both", "null", both)
        assert (await store.read_end(sheet, ["both"])).results == {"both": None}


async def look(store: Store) -> UUID:
    """Do what the commands that look do, and return the only run."""
    [run] = await store.list_runs(with_payload=True)
    assert (await store.read_run(run.id)).status is Status.PENDING
    assert (await store.load_run_definition(run.id)).steps == ("list",)
    assert [each.step_slug for each in await store.list_step_states(run.id)] == ["list"]
    assert [each.slug for each in await store.list_workflows()] == ["photos"]
    assert len(await store.list_task_options("photos")) == 2
    return run.id


@pytest.mark.usefixtures("roles")
async def test_a_role_that_executes_does_a_moved_step_and_moves_none(released: ReleasedWorld) -> None:
    released.flows.define("steps", {"list": [], "report": []}, attempts=2)
    async with open_store(Settings(dsn=SecretStr(released.dsn)), size=1, executes_moved=True) as owner:
        await owner.bind_step("steps", "list", "python")
    released.flows.start("steps", {})
    settings = Settings(dsn=SecretStr(become(released.dsn, "pgflow_execute")))
    async with open_store(settings, size=1, executes_moved=True) as store:
        [taken] = await store.take_runs(["steps"], 1)
        asked = ClaimRequest(TaskKey("list"), uuid4(), None, with_payload=True)
        assert (await store.claim_step(taken.run_id, taken.epoch, asked._replace(task=TaskKey("report")))).waits
        claim = await store.claim_step(taken.run_id, taken.epoch, asked)
        fence = {"epoch": taken.epoch, "attempt": claim.attempt, "task_run_id": uuid4()}
        await store.fail_step(taken.run_id, asked.task, "broken", state_name="Failed", **fence)
        claim = await store.claim_step(taken.run_id, taken.epoch, asked)
        done = Completion(TaskKey("list"), "[1]", claim.attempt, uuid4())
        assert (await store.complete_step(taken.run_id, taken.epoch, done)).status is Status.COMPLETED
        released.db.execute("SELECT pgmq.purge_queue('steps')")
        assert [each.step_slug for each in await store.restore_messages(limit=5)] == ["report"]
        with pytest.raises(PgflowPrefectError, match="permission denied"):
            await store.bind_step("steps", "report", "python")
        with pytest.raises(PgflowPrefectError, match="permission denied"):
            await store.bind_step("steps", "list", "external")
    assert released.flows.work("steps", lambda step, index: 1) == [("report", 0)]


async def test_a_role_works_right_after_an_upgrade_before_roles_are_made_again(
    server_dsn: str, released: ReleasedWorld
) -> None:
    former = COMMITS[5, 9]
    with borrowed_roles(server_dsn, released.dsn):
        released.db.execute("DROP SCHEMA pgflow_prefect CASCADE")
        for script in ("pgflow_prefect", "moving", "executing", "bindings", "observing", "roles"):
            released.db.execute(read_former(f"sql/released/{script}.sql", former))
        async with await open_connection(released.dsn, timeout=10) as connection:
            await install_schema(connection)
        await test_a_role_that_executes_does_a_moved_step_and_moves_none(released)


@pytest.mark.usefixtures("roles")
async def test_a_role_that_observes_sees_everything_and_writes_nothing(released: ReleasedWorld) -> None:
    async with open_as(released, "pgflow_observe") as store:
        await look(store)
        with pytest.raises(PgflowPrefectError, match="permission denied"):
            await store.enable_workflow("photos")
    settings = Settings(dsn=SecretStr(released.dsn))
    async with open_diagnosis(become(released.dsn, "pgflow_observe"), settings) as diagnosis:
        assert len(await diagnosis.list_queues()) == 1
        assert await diagnosis.list_stalled_tasks(5) == []


@pytest.mark.usefixtures("roles")
async def test_a_role_that_shows_runs_can_do_all_of_that_and_nothing_to_pgflow(released: ReleasedWorld) -> None:
    async with open_as(released, "pgflow_work") as store:
        run_id = await look(store)
        installation = await store.use_installation()
        assert (installation.fits, len(await store.beat(uuid4(), 1))) == (True, 1)
        await store.enable_workflow("photos")
        unshown = await store.list_unshown(["photos"], adopt=True, with_ended=True, since=None, besides=[], limit=10)
        assert [each.id for each in await store.read_unrecorded(unshown)] == [run_id]
        assert await store.link_recorded_runs([RecordLink(run_id, 0, uuid4())]) == {run_id}
        assert await store.list_unsettled(after=None, limit=5) == [run_id]
        assert await store.settle_unshown([(run_id, 0)]) == frozenset(), "it goes on"
        assert await store.forget_deleted_runs(after=None, limit=5) == run_id
    for role in ("pgflow_work", "pgflow_observe"):
        for statement in FORBIDDEN:
            released.db.execute(f"SET ROLE {role}".encode())
            with refused(DENIED):
                released.db.execute(statement.encode())
            released.db.execute("RESET ROLE")


@pytest.mark.usefixtures("roles")
def test_supabases_roles_get_nothing_here(released: ReleasedWorld) -> None:
    for role in SUPABASE_ROLES:
        usage = "SELECT has_schema_privilege(%s, 'pgflow_prefect', 'USAGE')"
        assert released.db.execute(usage, [role]).fetchone() == (False,), role


async def test_an_owner_that_is_no_superuser_installs_and_removes_it(server_dsn: str, released: ReleasedWorld) -> None:
    with borrowed_roles(server_dsn, released.dsn):
        owner = create_role(released.db)
        released.db.execute("DROP SCHEMA pgflow_prefect CASCADE")
        given = OWNED.replace("ROLE_NAME", owner)
        released.db.execute(given.encode())
        async with await open_connection(become(released.dsn, owner), timeout=10) as connection:
            await install_schema(connection)
        async with open_as(released, owner) as store:
            assert await store.list_workflows() == []
            assert (await store.use_installation()).fits
        async with await open_connection(become(released.dsn, owner), timeout=10) as connection:
            assert await remove_schema(connection)
