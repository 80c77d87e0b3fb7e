"""What a payload or a result of a few bytes may cost all other users."""

import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from pgflow_prefect import Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import ResultInvalidError, UsageError
from pgflow_prefect.models import Completion, TaskKey
from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection
from tests.engine import CHAIN, INVALID, define, get_run, get_state, refused, run_workflow, statuses, value
from tests.integration.conftest import make_slug
from tests.integration.supabase import RUN
from tests.integration.waiting import going, going_on
from tests.security.conftest import EndUser, Party

TOO_LARGE = "54000"


def nest(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def repeat(number: str, times: int) -> str:
    return f"[{','.join([number] * times)}]"


HOSTILE = {
    "a huge number": '{"n": 1e5000}',
    "a huge negative number": '{"n": [-1e5000]}',
    "a tiny number": '{"n": {"m": 1e-5000}}',
    "an integer of 5001 digits": "7" * 5001,
    "many huge numbers": repeat("1e131000", 2000),
    "many zeros of 16 kB each": repeat("0e-16383", 16_500),
    "a one with 16,000 zeros": f"[1.{'0' * 16_000}]",
    "1001 digits behind the point": f'{{"n": -0.{"1" * 1001}}}',
    "5000 arrays": nest(5000),
    "300 arrays": nest(300),
    "300 objects": '{"a":' * 300 + "1" + "}" * 300,
    "arrays and objects in one another": '[{"a":' * 150 + "1" + "}]" * 150,
    "text that is too long": json.dumps("x" * 33_600_000),
}
ALLOWED = {
    "a large number": '{"n": 1e400}',
    "a small number": '{"n": 1e-400}',
    "1000 digits": "1" * 1000,
    "999 digits behind the point": f"-1.{'1' * 999}",
    "zeros behind the point": "[0.00, 0e-900, 1.50]",
    "200 arrays": nest(200),
    "16 MiB": json.dumps("x" * (16 * 1024 * 1024 - 2)),
    "digits in a text": json.dumps("1" * 100_000),
    "many small numbers": json.dumps([*range(100_000)]),
}

by_name = pytest.mark.parametrize("name", HOSTILE)


@by_name
def test_an_end_user_can_not_start_a_run_with_a_hostile_payload(end_user: EndUser, kit: Connection, name: str) -> None:
    before = value(kit, "SELECT count(*) FROM pgflow.runs")
    with refused(INVALID, 'the payload of a run of workflow "chain" (has|nests)') as caught:
        end_user().execute("SELECT pgflow_api.run_workflow('chain', %s)", [HOSTILE[name]])
    assert "pgflow.limits" in str(caught.value.diag.message_hint)
    assert value(kit, "SELECT count(*) FROM pgflow.runs") == before


@by_name
def test_an_end_user_can_not_insert_one_either(end_user: EndUser, name: str) -> None:
    with refused(INVALID):
        end_user().execute(
            "INSERT INTO pgflow.runs (workflow_slug, id, payload) VALUES ('chain', %s, %s)", [uuid4(), HOSTILE[name]]
        )


@by_name
def test_a_worker_can_not_report_a_hostile_result(party: Party, name: str) -> None:
    worker = party("work")
    for write in (
        "SELECT pgflow.complete_step(%s, 'a', %s)",
        "UPDATE pgflow.step_states SET step_result = %(result)s WHERE run_id = %(run)s",
    ):
        parameters: Any = [RUN, HOSTILE[name]] if "%s" in write else {"run": RUN, "result": HOSTILE[name]}
        with refused(TOO_LARGE, 'the result of step "a" (has|nests)'):
            worker.execute(write.encode(), parameters)


@pytest.mark.parametrize("name", ALLOWED)
def test_large_values_within_the_limits_pass(kit: Connection, name: str) -> None:
    run_id = run_workflow(kit, "chain").id
    kit.execute("SELECT pgflow.run_workflow('chain', %s)", [ALLOWED[name]])
    kit.execute("SELECT pgflow.complete_step(%s, 'a', %s)", [run_id, ALLOWED[name]])
    assert statuses(kit, run_id) == {"a": "completed", "b": "pending"}


def test_only_the_owner_changes_the_limits(kit: Connection, party: Party) -> None:
    kit.execute("UPDATE pgflow.limits SET payload_bytes = 3000, digits = 2000")
    with refused(INVALID, "has 5002 bytes as text, more than the limit of 3000"):
        run_workflow(kit, "chain", "x" * 5000)
    for number in ("1e1500", "1e-1500", f"-1.{'0' * 2000}"):
        kit.execute("SELECT pgflow.run_workflow('chain', %s)", [f'{{"n": {number}}}'])
    for number in ("1e2001", "1e-2001", f"-1.{'0' * 2001}"):
        with refused(INVALID, "has a number of more than 2000 digits"):
            kit.execute("SELECT pgflow.run_workflow('chain', %s)", [f'{{"n": {number}}}'])
    for role in ("define", "run", "work", "observe"):
        with refused("42501"):
            party(role).execute("UPDATE pgflow.limits SET depth = 250")


def plant(db: Connection, workflow: str, payload: str) -> UUID:
    """Start a run with a payload that no check has seen, as one from before there were any."""
    run_id = uuid4()
    db.execute("SET session_replication_role = replica")
    insert = "INSERT INTO pgflow.runs (workflow_slug, id, payload) VALUES (%s, %s, %s)"
    db.execute(insert, [workflow, run_id, payload])
    db.execute("RESET session_replication_role")
    db.execute("SELECT (pgflow.repair_run(%s)).id", [run_id])
    return run_id


def plant_result(db: Connection, run_id: UUID, result: str) -> None:
    db.execute("SELECT pgflow.complete_step(%s, 'a', '1')", [run_id])
    db.execute("SET session_replication_role = replica")
    db.execute("UPDATE pgflow.step_states SET step_result = %s WHERE run_id = %s", [result, run_id])
    db.execute("RESET session_replication_role")


OLD = ["a huge number", "an integer of 5001 digits", "many huge numbers", "5000 arrays", "300 objects"]
OLD += ["many zeros of 16 kB each"]


@pytest.mark.parametrize(
    ("number", "times"), [("1e131000", 2000), ("1e131000", 200_000), ("0e-16383", 2000), ("0e-16383", 16_500)]
)
def test_a_planted_value_is_never_written_as_text_to_find_out_its_size(db: Connection, number: str, times: int) -> None:
    """It says which number is long, and not how many bytes the text has: 32 MB to 26 GB, of some kB that are stored."""
    define(db, "join", {"a": [], "b": ["a"], "other": []})
    stored = repeat(number, times)
    run_id = plant(db, "join", stored)
    assert value(db, "SELECT pg_column_size(payload) < 100000 FROM pgflow.runs")
    told = "has a number of more than 1000 digits"
    with refused(TOO_LARGE, f"the payload of run {run_id} {told}"):
        db.execute("SELECT pgflow.claim_step(%s, 'other')", [run_id])
    plant_result(db, run_id, stored)
    with refused(TOO_LARGE, f'the result of step "a" {told}'):
        db.execute("SELECT pgflow.claim_step(%s, 'b', NULL, NULL, false)", [run_id])
    for statement in (
        "SELECT payload_problem FROM pgflow_prefect.read_run(%s, 60, true)",
        "SELECT result_problem FROM pgflow_prefect.list_step_states(%s) WHERE step_slug = 'a'",
    ):
        assert value(db, statement, run_id) == told
    shown = "SELECT pgflow_prefect.shorten(step_result) FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'a'"
    assert value(db, shown, run_id) == f"not shown: it {told}"


@pytest.mark.parametrize("name", OLD)
def test_an_odd_payload_of_before_hides_no_other_run_and_can_be_cancelled(
    cli: CommandLine, db: Connection, name: str
) -> None:
    define(db, workflow := make_slug(), CHAIN)
    odd, usual = plant(db, workflow, HOSTILE[name]), run_workflow(db, workflow).id
    listed = cli("runs", "--workflow", workflow, "--json")
    assert {each["id"] for each in json.loads(listed.out)} == {str(odd), str(usual)}, listed
    assert [each["payload_problem"] is None for each in json.loads(listed.out)].count(False) == 1
    assert cli("runs", "--workflow", workflow).code == 0
    plant_result(db, usual, HOSTILE[name])
    for run_id in (odd, usual):
        shown = cli("status", str(run_id))
        assert (shown.code, shown.err) == (0, ""), shown
    assert "not shown: it " in shown.out
    assert cli("status", str(odd), "--json").code == 0
    cancelled = cli("cancel", str(odd))
    assert cancelled.code == 0, cancelled
    assert get_run_without_payload(db, odd)["error_message"] == "cancelled"


@pytest.mark.parametrize("column", ["created_at", "finished_at"])
@pytest.mark.parametrize("time", ["infinity", "-infinity", "10000-01-01", "0044-03-15 BC"])
def test_an_odd_time_hides_nothing(cli: CommandLine, db: Connection, column: str, time: str) -> None:
    define(db, workflow := make_slug(), CHAIN)
    run_id = run_workflow(db, workflow).id
    db.execute("SELECT pgflow.complete_step(%s, 'a', '1')", [run_id])
    for table, key in (("runs", "id"), ("step_states", "run_id")):
        db.execute(f"UPDATE pgflow.{table} SET {column} = %s WHERE {key} = %s".encode(), [time, run_id])  # noqa: S608
    for command in (
        ["runs"],
        ["status", str(run_id)],
        ["timeline", str(run_id)],
        ["graph", workflow, "--run", str(run_id)],
    ):
        ended = cli(*command)
        assert (ended.code, ended.err) == (0, ""), ended
    assert cli("cancel", str(run_id)).code == 0


@pytest.mark.thorough
def test_a_run_whose_other_times_are_odd_can_be_looked_at_and_ended(cli: CommandLine, db: Connection) -> None:
    define(db, workflow := make_slug(), CHAIN)
    done: list[str] = []
    for time in ("infinity", "-infinity", "10000-01-01", "0044-03-15 BC"):
        run_id = run_workflow(db, workflow).id
        done.append(str(run_id))
        db.execute("SELECT pgflow.claim_step(%s, 'a')", [run_id])
        db.execute("UPDATE pgflow.step_states SET started_at = %s WHERE run_id = %s", [time, run_id])
        db.execute("UPDATE pgflow.runs SET logical_date = %s WHERE id = %s", [time, run_id])
        db.execute(
            "INSERT INTO pgflow_prefect.owners (run_id, epoch, flow_run_id, held_by, lease_until) "
            "VALUES (%s, 0, gen_random_uuid(), 'a worker', %s)",
            [run_id, time],
        )
        db.execute(
            "INSERT INTO pgflow_prefect.flow_runs (run_id, epoch, flow_run_id) VALUES (%s, 0, gen_random_uuid())",
            [run_id],
        )
        for command in ("status", "timeline", "open", "logs", "cancel", "retry", "cancel"):
            ended = cli(command, str(run_id))
            assert (ended.code, ended.err) == (0, ""), (time, command, ended)
    for words in (
        ["list"],
        ["runs"],
        ["runs", "--json"],
        ["prune", "--workflow", workflow, "--any-age", "--dry-run"],
    ):
        ended = cli(*words)
        assert (ended.code, ended.err) == (0, ""), (words, ended)
    assert cli("reconcile").code in {0, 1}, "1: Prefect does not know the flow runs"
    pruned = cli("prune", *(part for run_id in done for part in ("--run", run_id)))
    assert (pruned.code, pruned.err) == (0, ""), pruned
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 0


@pytest.mark.parametrize("name", ["a huge number", "an integer of 5001 digits", "many huge numbers", "300 arrays"])
@pytest.mark.parametrize("column", ["required_input_pattern", "forbidden_input_pattern"])
def test_a_condition_that_no_command_can_read_is_refused(db: Connection, column: str, name: str) -> None:
    define(db, "chain", CHAIN)
    told = 'a condition of step ".*" of workflow "chain" (has|nests)'
    with refused(INVALID, told):
        db.execute(f"UPDATE pgflow.steps SET {column} = %s WHERE slug = 'b'".encode(), [HOSTILE[name]])  # noqa: S608
    with refused(INVALID, told):
        db.execute(
            f"INSERT INTO pgflow.steps (workflow_slug, slug, {column}) VALUES ('chain', 'd', %s)".encode(),  # noqa: S608
            [HOSTILE[name]],
        )
    db.execute(f"UPDATE pgflow.steps SET {column} = %s WHERE slug = 'b'".encode(), [ALLOWED["1000 digits"]])  # noqa: S608


flows = pytest.mark.usefixtures("pgflow_dsn", "prefect_api")


@flows
@pytest.mark.anyio
@pytest.mark.parametrize("name", OLD)
async def test_a_payload_that_can_not_be_read_fails_its_run_with_the_reason(db: Connection, name: str) -> None:
    workflow = Workflow(make_slug())
    define(db, workflow.slug, {"only": []})

    @workflow.step
    def only(payload: object) -> None:
        raise AssertionError("it was called")

    run_id = plant(db, workflow.slug, HOSTILE[name])
    async with going_on(workflow, run_id):
        pass
    run = get_run_without_payload(db, run_id)
    assert run["status"] == "failed"
    assert "the input of step 'only' can't be read" in run["error_message"]


def get_run_without_payload(db: Connection, run_id: UUID) -> dict[str, Any]:
    [[status, message]] = db.execute("SELECT status, error_message FROM pgflow.runs WHERE id = %s", [run_id])
    return {"status": status, "error_message": message}


@flows
@pytest.mark.anyio
@pytest.mark.parametrize("name", ["a huge number", "many huge numbers", "5000 arrays"])
async def test_a_function_in_sql_with_such_a_result_fails_its_step_and_costs_the_worker_nothing(
    db: Connection, name: str
) -> None:
    workflow = Workflow(make_slug())
    define(db, workflow.slug, {"only": []})
    db.execute("CREATE SCHEMA app; CREATE TABLE app.result (document jsonb)")
    db.execute("INSERT INTO app.result VALUES (%s)", [HOSTILE[name]])
    db.execute("CREATE FUNCTION app.f(jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT document FROM app.result'")
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'only', 'sql', 'app.f')", [workflow.slug])
    async with going(workflow, db) as run:
        pass
    assert "the result of" in str(get_run(db, run.run_id).error_message)
    assert get_state(db, run.run_id, "only").status == "failed"


@pytest.mark.anyio
async def test_the_store_says_what_is_wrong(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    with pytest.raises(UsageError, match=r"the payload of a run of workflow .* nests"):
        await store.create_run("chain", nest(300), uuid4())
    epoch = await store.create_run("chain", "{}", run_id := uuid4(), uuid4())
    assert epoch is not None
    db.execute("SELECT pgflow.claim_step(%s, 'a')", [run_id])
    with pytest.raises(ResultInvalidError, match='the result of step "a" has a number of more than 1000 digits'):
        await store.complete_step(run_id, epoch, Completion(TaskKey("a"), "1e5000", 1, uuid4()))


@pytest.mark.parametrize(
    "options",
    [HOSTILE["many huge numbers"], HOSTILE["many zeros of 16 kB each"], json.dumps({"note": "x" * 20_000})],
)
def test_a_binder_can_not_hide_a_bomb_in_the_options(party: Party, options: str) -> None:
    with refused(INVALID, "the options of a binding"):
        party("define").execute("SELECT pgflow_prefect.bind_step('chain', 'a', 'external', NULL, %s)", [options])


LONG = "x" * 20_000_000


def test_the_reason_of_an_end_user_is_kept_as_far_as_a_person_reads(end_user: EndUser, kit: Connection) -> None:
    end_user().execute("SELECT pgflow_api.cancel_run(%s, %s)", [RUN, LONG])
    for column in (
        "SELECT length(error_message) FROM pgflow.runs WHERE status = 'failed' AND starts_with(error_message, 'xxx')",
        "SELECT length(error_message) FROM pgflow.step_states WHERE starts_with(error_message, 'xxx')",
        "SELECT length(reason) FROM pgflow_api.requests",
    ):
        assert value(kit, column) == 10_004, column


def test_a_worker_can_not_write_a_message_without_end(kit: Connection, party: Party) -> None:
    worker = party("work")
    worker.execute("SELECT pgflow.fail_step(%s, 'a', %s)", [RUN, LONG])
    worker.execute("UPDATE pgflow.runs SET error_message = %s", [LONG])
    for table in ("runs", "step_states"):
        assert value(kit, f"SELECT max(length(error_message)) < 10100 FROM pgflow.{table}") is True  # noqa: S608


def test_a_message_of_a_usual_length_stays_as_it_is(kit: Connection, party: Party) -> None:
    message = "\N{SNOWMAN}" * 10_000 + " …"
    party("work").execute("SELECT pgflow.fail_step(%s, 'a', %s)", [RUN, message])
    assert get_state(kit, RUN, "a").error_message == message
