"""What only the released pgflow has: maps, skipped steps, stalled tasks, and what our functions do to it: nothing."""

from collections.abc import AsyncIterator
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from pgflow_prefect.database.connection import connect as open_connection
from pgflow_prefect.database.diagnosis import open_diagnosis
from pgflow_prefect.database.implementations import find_schema
from pgflow_prefect.database.released_script import write_flow_script
from pgflow_prefect.database.schema import install_schema, remove_schema
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.errors import NotOnReleasedError, PgflowPrefectError, SchemaNewerError, UsageError
from pgflow_prefect.models import Status, StepState
from pgflow_prefect.settings import Settings
from pgflow_prefect.shipped import shipped_path
from tests.contract.worlds import BrokenError, ReleasedWorld
from tests.engine import refused
from tests.integration.supabase import borrowed_roles
from tests.json_values import decode
from tests.released_lab import read_objects, run_released_script

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
    released.db.execute("DROP SCHEMA pgflow_prefect CASCADE")
    before = read_objects(released.db)
    await install(released.dsn)
    functions = sorted(released.db.execute(ours, ["pgflow_prefect"]))
    await install(released.dsn)
    assert read_objects(released.db) == before
    assert sorted(released.db.execute(ours, ["pgflow_prefect"])) == functions
    assert functions


REST = """
    SELECT 'schema', nspname, coalesce(nspacl, acldefault('n', nspowner))::text FROM pg_namespace
    UNION ALL SELECT 'relation', c.oid::regclass::text, coalesce(c.relacl, acldefault('r', c.relowner))::text
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname !~ '^pg_'
    UNION ALL SELECT 'function', p.oid::regprocedure::text,
                     md5(p.prosrc) || coalesce(p.proacl, acldefault('f', p.proowner))::text
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname !~ '^pg_'
    UNION ALL SELECT 'trigger', t.tgname || t.tgrelid::regclass, pg_get_triggerdef(t.oid) FROM pg_trigger t
    UNION ALL SELECT 'depends', d.classid::regclass::text, count(*)::text FROM pg_depend d GROUP BY d.classid
    ORDER BY 1, 2, 3
"""
"""All objects of a database, with the rights on them."""


async def remove(dsn: str) -> bool:
    async with await open_connection(dsn, timeout=10) as connection:
        return await remove_schema(connection)


async def install(dsn: str) -> None:
    async with await open_connection(dsn, timeout=10) as connection:
        await install_schema(connection)


async def test_what_is_removed_leaves_no_trace(server_dsn: str, released: ReleasedWorld) -> None:
    await remove(released.dsn)
    before = released.db.execute(REST.encode()).fetchall()
    await install(released.dsn)
    released.flows.define("photos", MAPPED, maps=["resize"])
    released.db.execute("SELECT pgflow_prefect.enable_workflow('photos')")
    run_id = released.flows.start("photos", {})
    released.db.execute(
        "SELECT pgflow_prefect.link_recorded_runs(ARRAY[%s], '{0}', ARRAY[gen_random_uuid()])", [run_id]
    )
    with borrowed_roles(server_dsn, released.dsn):
        run_released_script(released.db, "roles")
        assert await remove(released.dsn)
        released.db.execute("SELECT pgmq.drop_queue('photos')")
        assert released.db.execute(REST.encode()).fetchall() == before
        assert not await remove(released.dsn), "there is nothing left"
        await install(released.dsn)
    assert released.db.execute("SELECT * FROM pgflow_prefect.list_enabled()").fetchall() == [], "it begins anew"


async def test_an_object_of_yours_that_needs_ours_keeps_it_from_being_removed(released: ReleasedWorld) -> None:
    released.db.execute("CREATE VIEW public.shown AS SELECT * FROM pgflow_prefect.flow_runs")
    with pytest.raises(PgflowPrefectError, match=r"view shown depends on table .*: drop that object first"):
        await remove(released.dsn)
    assert released.db.execute("SELECT count(*) FROM public.shown").fetchone() == (0,)
    assert released.db.execute("SELECT count(*) FROM pgflow_prefect.list_enabled()").fetchone() == (0,), (
        "nothing is gone"
    )


async def test_the_classic_schema_is_not_removed(dsn: str) -> None:
    with pytest.raises(UsageError, match="its workflows and runs are rows there"):
        await remove(dsn)


LATER = [
    ("runs", "status", "'started', 'completed', 'failed', 'paused'", "pgflow.runs.status may be 'paused'"),
    (
        "step_tasks",
        "status",
        "'queued', 'started', 'completed', 'failed', 'held'",
        "pgflow.step_tasks.status may be 'held'",
    ),
    ("steps", "step_type", "'single', 'map', 'reduce'", "pgflow.steps.step_type may be 'reduce'"),
    ("runs", "remaining_steps", "", "pgflow.runs.remaining_steps is missing"),
]
"""A table, a column, the words that it may have, and what is said of that."""


@pytest.mark.parametrize(("table", "column", "words", "named"), LATER)
async def test_a_later_version_whose_words_are_unknown_is_refused_by_their_names(
    released: ReleasedWorld, table: str, column: str, words: str, named: str
) -> None:
    change = f"ADD CHECK ({column} IN ({words}))" if words else f"RENAME COLUMN {column} TO other"
    released.db.execute(f"ALTER TABLE pgflow.{table} {change}".encode())
    with pytest.raises(SchemaNewerError, match=named):
        async with open_store(Settings(dsn=SecretStr(released.dsn)), size=1, only_reads=True):
            pass
    with pytest.raises(SchemaNewerError, match=named):
        await install(released.dsn)


async def test_a_column_that_is_unknown_is_named_and_changes_nothing(store: Store, released: ReleasedWorld) -> None:
    released.db.execute(
        "ALTER TABLE pgflow.runs ADD COLUMN priority int; ALTER TABLE pgflow.steps ADD COLUMN queue_name text"
    )
    async with open_diagnosis(released.dsn, Settings(dsn=SecretStr(released.dsn))) as diagnosis:
        found = await diagnosis.read_released()
    assert found.unknown == ("runs.priority",)
    assert found.version == ("0.14" if released.implementation.skips else "0.7")
    assert await store.list_workflows() == []


async def test_conditions_and_maps_are_a_part_of_the_definition(store: Store, released: ReleasedWorld) -> None:
    released.flows.define("photos", MAPPED, maps=["resize"])
    rules = (await store.load_definition("photos")).rules
    assert {slug: each.said for slug, each in rules.items()} == {
        "resize": {"map": {"over": "list"}},
    }
    released.flows.define("roots", {"each": []}, maps=["each"])
    assert (await store.load_definition("roots")).maps["each"].over == "payload"
    if released.implementation.skips:
        condition = (
            """required_input_pattern => '{"vip": null}', when_unmet => 'skip-cascade', when_exhausted => 'skip'"""
        )
        unless = """forbidden_input_pattern => '{"choose": {}}'"""
        released.flows.define("gifts", {"choose": [], "wrap": ["choose"]}, choose=condition, wrap=unless)
        rules = (await store.load_definition("gifts")).rules
        assert {slug: each.said for slug, each in rules.items()} == {
            "choose": {"only_if": {"vip": None}, "when_unmet": "skip-cascade", "when_exhausted": "skip"},
            "wrap": {"unless": {"choose": {}}},
        }


async def test_a_step_that_is_to_be_tried_again_has_the_error_of_its_last_attempt(
    store: Store, released: ReleasedWorld
) -> None:
    released.flows.define("shaky", {"only": []}, attempts=2)
    run_id = released.flows.start("shaky", {})

    def fail(step: str, index: int) -> object:
        raise BrokenError("the network is away")

    released.flows.work("shaky", fail)
    state = (await read_states(store, run_id))["only"]
    assert (state.status, state.attempts, state.task_state) == (Status.PENDING, 1, "AwaitingRetry")
    assert (state.error_message, state.started_at) == ("the network is away", None)
    released.flows.claim("shaky")
    state = (await read_states(store, run_id))["only"]
    assert (state.attempts, state.task_state, state.error_message) == (2, None, None)


async def test_what_a_step_was_skipped_for_is_said_in_words(store: Store, released: ReleasedWorld) -> None:
    if not released.implementation.skips:
        pytest.skip("this version of pgflow skips no steps")
    condition = """required_input_pattern => '{"vip": true}', when_unmet => 'skip-cascade'"""
    steps = {"choose": [], "wrap": ["choose"], "pack": []}
    released.flows.define("gifts", steps, choose=condition, pack="when_exhausted => 'skip'")
    run_id = released.flows.start("gifts", {"vip": False})

    def fail(step: str, index: int) -> object:
        raise BrokenError("no paper")

    released.flows.work("gifts", fail)
    states = await read_states(store, run_id)
    assert {slug: each.skip_message for slug, each in states.items()} == {
        "choose": "its condition is not met",
        "wrap": "a step that it waits for was skipped",
        "pack": "its handler failed: no paper",
    }
    assert (await store.read_run(run_id)).status is Status.COMPLETED


async def test_tasks_that_wait_and_workers_that_live_are_counted(released: ReleasedWorld) -> None:
    released.flows.define("photos", MAPPED, maps=["resize"])
    released.flows.start("photos", {})
    async with open_diagnosis(released.dsn, Settings(dsn=SecretStr(released.dsn))) as diagnosis:
        [before] = await diagnosis.list_queues()
        assert (before.queued, before.started, before.live_workers, before.functions) == (1, 0, 0, ())
        released.flows.claim("photos")
        [during] = await diagnosis.list_queues()
        assert (during.queued, during.started, during.live_workers, during.functions) == (0, 1, 1, ("edge",))
        released.db.execute("UPDATE pgflow.workers SET last_heartbeat_at = now() - interval '1 minute'")
        assert await diagnosis.list_stalled_tasks(5) == []
        released.db.execute(
            "UPDATE pgflow.step_tasks SET queued_at = now() - interval '1 hour', started_at = now() - interval '1 hour'"
        )
        [stalled] = await diagnosis.list_stalled_tasks(5)
        assert (stalled.step_slug, stalled.is_given_up, stalled.tasks) == ("list", False, 1)
        [after] = await diagnosis.list_queues()
        assert after.live_workers == 0


async def test_a_task_that_pgflow_gave_up_is_named(released: ReleasedWorld) -> None:
    if not released.implementation.skips:
        pytest.skip("this version of pgflow puts no task back")
    released.flows.define("photos", MAPPED, maps=["resize"])
    released.flows.start("photos", {})
    for _ in range(4):
        released.flows.claim("photos")
        released.db.execute(
            "UPDATE pgflow.step_tasks SET queued_at = now() - interval '1 hour', started_at = now() - interval '1 hour'"
        )
        released.db.execute("SELECT pgflow.requeue_stalled_tasks()")
    async with open_diagnosis(released.dsn, Settings(dsn=SecretStr(released.dsn))) as diagnosis:
        [stalled] = await diagnosis.list_stalled_tasks(5)
    assert (stalled.is_given_up, stalled.requeued) == (True, 3)


async def test_the_exported_sql_makes_the_same_flow_again(store: Store, released: ReleasedWorld) -> None:
    condition = """required_input_pattern => '{"list": [1]}', when_unmet => 'fail', timeout => 7"""
    options = {"report": condition if released.implementation.skips else "timeout => 7, start_delay => 3"}
    released.flows.define("photos", MAPPED, maps=["resize"], attempts=5, **options)
    definition, tried = await store.load_definition("photos"), await store.list_task_options("photos")
    script = write_flow_script(definition, tried)
    released.db.execute("DELETE FROM pgflow.deps; DELETE FROM pgflow.steps; DELETE FROM pgflow.flows")
    for _ in range(2):
        released.db.execute(script.encode())
    assert await store.load_definition("photos") == definition
    assert sorted(await store.list_task_options("photos"), key=str) == sorted(tried, key=str)


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
    with pytest.raises(NotOnReleasedError, match="On that, these commands work: `list`, `graph`, `runs`"):
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
                GRANT SELECT ON ALL TABLES IN SCHEMA pgflow, pgflow_prefect TO {0};
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
            schema = await find_schema(connection)
            assert (schema.foreign_table, schema.unknown) == (None, ())
            found.append(None if schema.implementation is None else schema.implementation.name)
    assert found == ["released", "classic", None]
