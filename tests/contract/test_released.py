"""What only the released pgflow has: maps, skipped steps, and what our functions do to it, which is nothing."""

from collections.abc import AsyncIterator
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from pgflow_prefect.database.connection import connect as open_connection
from pgflow_prefect.database.implementations import find_schema
from pgflow_prefect.database.schema import install_schema
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.models import Status, StepState
from pgflow_prefect.settings import Settings
from pgflow_prefect.shipped import shipped_path
from tests.contract.worlds import BrokenError, ReleasedWorld
from tests.engine import refused
from tests.json_values import decode
from tests.released_lab import read_objects

pytestmark = pytest.mark.anyio

MAPPED = {"list": [], "resize": ["list"], "report": ["resize"]}


@pytest.fixture
async def store(released: ReleasedWorld) -> AsyncIterator[Store]:
    async with open_store(Settings(dsn=SecretStr(released.dsn)), size=1, only_reads=True) as opened:
        yield opened


async def read_states(store: Store, run_id: UUID) -> dict[str, StepState]:
    return {state.step_slug: state for state in await store.list_step_states(run_id)}


def start_mapped(released: ReleasedWorld, items: list[int]) -> UUID:
    released.flows.define("mapped", MAPPED, maps=["resize"])
    run_id = released.flows.start("mapped", {})
    released.flows.work("mapped", lambda step, index: items)
    return run_id


async def test_a_map_is_one_step_with_its_number_of_tasks(store: Store, released: ReleasedWorld) -> None:
    run_id = start_mapped(released, [5, 6, 7])
    begun = (await read_states(store, run_id))["resize"]
    assert (begun.status, begun.tasks, begun.tasks_completed) == (Status.PENDING, 3, 0)
    released.flows.work("mapped", lambda step, index: index * 10, at_most=2)
    half = (await read_states(store, run_id))["resize"]
    assert (half.status, half.tasks, half.tasks_completed) == (Status.PENDING, 3, 2)
    assert half.started_at is not None
    released.flows.work("mapped", lambda step, index: index * 10)
    done = (await read_states(store, run_id))["resize"]
    assert (done.status, done.tasks, done.tasks_completed) == (Status.COMPLETED, 3, 3)
    assert decode(done.step_result) == [0, 10, 20], "in the order of the tasks"
    assert done.handler == "edge"
    assert (await read_states(store, run_id))["report"].tasks is None


async def test_a_map_of_nothing_is_completed_with_an_empty_array(store: Store, released: ReleasedWorld) -> None:
    state = (await read_states(store, start_mapped(released, [])))["resize"]
    assert (state.status, state.tasks, decode(state.step_result)) == (Status.COMPLETED, 0, [])


async def test_one_failed_task_of_a_map_fails_the_run(store: Store, released: ReleasedWorld) -> None:
    run_id = start_mapped(released, [1, 2])

    def do(step: str, index: int) -> object:
        if index == 1:
            raise BrokenError("the disk is full")
        return index

    released.flows.work("mapped", do)
    run = await store.read_run(run_id)
    assert (run.status, run.error_message) == (Status.FAILED, 'step "resize" failed: the disk is full')
    assert (await read_states(store, run_id))["resize"].status is Status.FAILED


async def test_a_skipped_step_is_completed_with_the_reason(store: Store, released: ReleasedWorld) -> None:
    if not released.implementation.skips:
        pytest.skip("this version of pgflow skips no steps: name a directory of 0.14 or later in PGFLOW_TEST_RELEASED")
    condition = """required_input_pattern => '{"vip": true}', when_unmet => 'skip'"""
    released.flows.define("gifts", {"choose": [], "wrap": ["choose"]}, choose=condition)
    run_id = released.flows.start("gifts", {"vip": False})
    state = (await read_states(store, run_id))["choose"]
    assert (state.status, state.skip_reason, state.step_result) == (Status.COMPLETED, "condition_unmet", None)
    assert (state.attempts, state.started_at) == (0, None)
    assert state.finished_at is not None
    [end] = await store.list_step_ends(run_id, ["choose"])
    assert end.skip_reason == "condition_unmet"


async def test_a_document_beyond_the_limits_is_named_and_not_shown(store: Store, released: ReleasedWorld) -> None:
    released.flows.define("deep", {"only": []})
    run_id = released.flows.start("deep", {})
    released.db.execute("UPDATE pgflow.runs SET input = %s", ["[" * 250 + "]" * 250])
    released.flows.work("deep", lambda step, index: None)
    released.db.execute(b"""UPDATE pgflow.step_tasks SET output = '[1e5000]'""")
    run = await store.read_run(run_id, with_payload=True)
    assert (run.payload, run.payload_problem) == (None, "nests arrays and objects more than 200 deep")
    state = (await read_states(store, run_id))["only"]
    assert (state.step_result, state.result_problem) == (None, "has a number of more than 1000 digits")


async def test_installing_changes_nothing_of_pgflow_and_a_second_time_changes_nothing(released: ReleasedWorld) -> None:
    ours = (
        "SELECT oid::regprocedure::text, md5(prosrc), proacl::text FROM pg_proc WHERE pronamespace = %s::regnamespace"
    )

    async def install() -> None:
        async with await open_connection(released.dsn, timeout=10) as connection:
            await install_schema(connection)

    released.db.execute("DROP SCHEMA pgflow_prefect CASCADE")
    before = read_objects(released.db)
    await install()
    functions = sorted(released.db.execute(ours, ["pgflow_prefect"]))
    await install()
    assert read_objects(released.db) == before
    assert sorted(released.db.execute(ours, ["pgflow_prefect"])) == functions
    assert functions
    tables = "SELECT count(*) FROM pg_class WHERE relnamespace = 'pgflow_prefect'::regnamespace AND relkind <> 'c'"
    assert released.db.execute(tables).fetchone() == (0,), "it only reads"


async def test_the_scripts_of_the_classic_schema_are_refused(released: ReleasedWorld) -> None:
    with refused("42P06", "the schema pgflow of this database belongs to another program"):
        released.db.execute(shipped_path("sql", "pgflow.sql").read_bytes())
    released.db.execute("ROLLBACK")


def test_the_script_of_the_released_schema_is_refused_elsewhere(dsn: str, empty_dsn: str) -> None:
    for database in (dsn, empty_dsn):
        with psycopg.connect(database, autocommit=True) as db:
            with refused("P0001", "does not have the schema of the released pgflow"):
                db.execute(shipped_path("sql", "released/pgflow_prefect.sql").read_bytes())
            db.execute("ROLLBACK")


async def test_what_executes_runs_is_refused_at_once(released: ReleasedWorld) -> None:
    with pytest.raises(PgflowPrefectError, match="only `list`, `graph`, `runs` and `status` work on it yet"):
        async with open_store(Settings(dsn=SecretStr(released.dsn)), size=1):
            pass


async def test_no_other_role_may_call_the_functions_and_hidden_rows_are_an_error(released: ReleasedWorld) -> None:
    db = released.db
    open_to_all = """
        SELECT oid::regprocedure FROM pg_proc
        WHERE pronamespace = 'pgflow_prefect'::regnamespace AND has_function_privilege('public', oid, 'EXECUTE')
    """
    assert db.execute(open_to_all).fetchall() == []
    role = sql.Identifier(f"reader_{db.info.backend_pid}")
    db.execute(sql.SQL("CREATE ROLE {}").format(role))
    try:
        db.execute(
            sql.SQL("""
                GRANT USAGE ON SCHEMA pgflow, pgflow_prefect TO {0};
                GRANT SELECT ON ALL TABLES IN SCHEMA pgflow TO {0};
                GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgflow_prefect TO {0};
                ALTER TABLE pgflow.runs ENABLE ROW LEVEL SECURITY;
                SET ROLE {0}
            """).format(role)
        )
        with refused("42501", "row-level security policy"):
            db.execute("SELECT * FROM pgflow_prefect.list_workflows()")
        db.execute("RESET ROLE; ALTER TABLE pgflow.runs DISABLE ROW LEVEL SECURITY")
        db.execute(sql.SQL("SET ROLE {}").format(role))
        assert db.execute("SELECT * FROM pgflow_prefect.list_workflows()").fetchall() == []
    finally:
        db.execute("RESET ROLE")
        db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


async def test_the_schema_is_known_by_its_columns(released: ReleasedWorld, dsn: str, empty_dsn: str) -> None:
    found: list[str | None] = []
    for database in (released.dsn, dsn, empty_dsn):
        async with await open_connection(database, timeout=10) as connection:
            implementation, foreign_table = await find_schema(connection)
            assert foreign_table is None
            found.append(None if implementation is None else implementation.name)
    assert found == ["released", "classic", None]
