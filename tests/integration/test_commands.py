"""Steps that a program does, by a row and in Python."""

import json
from pathlib import Path
from typing import LiteralString
from uuid import uuid4

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import LogFilter

from pgflow_prefect import Command, NamedCommand, Settings, Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.binding_problems import find_all_problems, find_doers, find_missing_here
from tests.conftest import Connection
from tests.engine import column, refused
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run, read_steps
from tests.integration.waiting import going
from tests.unit.test_command import list_marked

pytestmark = [pytest.mark.anyio]

flows = pytest.mark.usefixtures("pgflow_dsn", "prefect_api")

BIND: LiteralString = "SELECT pgflow_prefect.bind_step(%s, %s, 'command', %s, %s)"


def shell(script: str, **options: object) -> Command:
    return Command(["/bin/sh", "-c", script], **options)  # type: ignore[arg-type]  # as a user gives them


@flows
async def test_programs_pass_results_on_by_row_and_in_python(
    define: Define, db: Connection, client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["count", "echo", "wait"], [("count", "echo"), ("count", "wait")])
    workflow.bind("count", shell("echo counting; echo 12345678901234567.890"))
    workflow.bind("wait", shell("echo not needed; exit 99"))
    monkeypatch.setenv("PGFLOW_COMMANDS", json.dumps({"echo": ["/bin/cat"]}))
    db.execute(BIND, [workflow.slug, "echo", "echo", "{}"])
    state = await workflow.flow({"n": 1}, return_state=True)
    assert state.is_completed()
    states = read_steps(db)
    assert states["count"][0] == "completed"
    assert states["wait"][0] == "completed"
    assert column(db, "SELECT step_result::text FROM pgflow.step_states WHERE step_slug = 'echo'") == [
        '{"count": 12345678901234567.890, "payload": {"n": 1}}'
    ]
    assert column(db, "SELECT handler FROM pgflow_prefect.task_runs ORDER BY step_slug") == [
        "command sh",
        "command echo",
        "command sh",
    ]
    flow_run = await read_flow_run(client, workflow.slug)
    runs = await await_task_runs(client, flow_run, {"count": "Completed", "echo": "Completed", "wait": "Skipped"})
    assert runs["wait"].state is not None
    assert runs["wait"].state.message == "not needed"
    logs: list[str] = []
    with anyio.fail_after(180):
        while "counting" not in logs:
            await anyio.sleep(0.05)
            found = await client.read_logs(LogFilter(task_run_id={"any_": [runs["count"].id]}))
            logs = [each.message for each in found]


@flows
async def test_a_time_out_ends_the_program_and_all_that_it_has_started(
    define: Define, db: Connection, client: PrefectClient
) -> None:
    workflow, mark = Workflow(make_slug()), uuid4().hex
    define(workflow.slug, ["slow"])
    script = "sleep 3600 & setsid sleep 3600 & echo still here; wait"
    workflow.bind("slow", shell(script, env={"MARK": mark}, pass_env=["PATH"], timeout_seconds=1))
    state = await workflow.flow(return_state=True)
    assert state.is_failed()
    assert "longer than 1 s" in read_run(db)[1]
    assert list_marked(mark) == []
    await await_task_runs(client, await read_flow_run(client, workflow.slug), {"slow": "TimedOut"})


@pytest.mark.thorough
@flows
async def test_a_run_that_is_cancelled_ends_its_program(define: Define, db: Connection, tmp_path: Path) -> None:
    workflow, mark = Workflow(make_slug()), uuid4().hex
    define(workflow.slug, ["slow"])
    begun = tmp_path / "begun"
    workflow.bind("slow", shell(f"touch {begun}; sleep 3600 & wait", env={"MARK": mark}, pass_env=["PATH"]))
    async with going(workflow, db) as run:
        while not begun.exists():
            await anyio.sleep(0.02)
        db.execute("SELECT pgflow.cancel_run(%s, 'enough')", [run.run_id])
    assert run.ended.is_cancelled()
    assert list_marked(mark) == []


@flows
async def test_retries_end_with_the_message_of_the_last_attempt(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    workflow.bind("only", shell("echo attempt $STEP_ATTEMPT; exit 7", retries=2))
    await workflow.flow(return_state=True)
    status, attempts, _, message = read_steps(db)["only"]
    assert (status, attempts) == ("failed", 3)
    assert "exit code 7. Its last lines:\n    attempt 3" in str(message)


@pytest.mark.parametrize(
    "target",
    ["/bin/sh", "sh -c id", "../stamp", "-x", "", "a\nb", "stamp\n", "$(id)", '["sh","-c","id"]', "é", "x" * 64, None],
)
@pytest.mark.parametrize("kind", ["command", "work-pool"])
def test_a_row_holds_a_name_only(define: Define, db: Connection, kind: str, target: str | None) -> None:
    define("chain", ["a"])
    with refused("23514"):
        db.execute("SELECT pgflow_prefect.bind_step('chain', 'a', %s, %s)", [kind, target])


@flows
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"argv": ["/bin/sh", "-c", "id"]}, "argv: Unexpected keyword argument"),
        ({"env": {"LD_PRELOAD": "x"}}, "env: Unexpected keyword argument"),
        ({"pass_env": ["PGFLOW_DSN"]}, "pass_env: Unexpected keyword argument"),
        ({"cwd": "/"}, "cwd: Unexpected keyword argument"),
        ({"program": "x", "retries": 1}, "program: Unexpected keyword argument"),
    ],
)
async def test_a_rows_options_say_nothing_of_what_is_started(
    define: Define, db: Connection, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], reason: str
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])
    monkeypatch.setenv("PGFLOW_COMMANDS", json.dumps({"stamp": ["/bin/true"]}))
    db.execute(BIND, [workflow.slug, "only", "stamp", json.dumps(options)])
    await workflow.flow(return_state=True)
    assert read_steps(db)["only"][0] == "failed"
    assert reason in str(read_steps(db)["only"][3])


async def test_what_is_missing_here_is_named_before_a_run(
    define: Define, db: Connection, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["a", "b", "c", "d"])
    db.execute(BIND, [workflow.slug, "a", "stamp", "{}"])
    workflow.bind("b", NamedCommand("known"))
    workflow.bind("c", Command(["no-such-program", "--token=hunter2"]))
    workflow.bind("d", shell("true", pass_env=["NO_SUCH_VARIABLE"]))
    monkeypatch.setenv("PGFLOW_COMMANDS", json.dumps({"known": ["/bin/true"]}))
    definition, rows = await store.load_definition(workflow.slug), await store.list_bindings(workflow.slug)
    assert await find_all_problems(store, workflow, definition, rows) == []
    assert find_doers(workflow, definition, rows) == {
        "a": "command stamp",
        "b": "command known",
        "c": "command no-such-program",
        "d": "command sh",
    }
    problems = find_missing_here(workflow, rows, Settings())
    assert len(problems) == 3
    assert "hunter2" not in str(problems)
    for part in ("name no program 'stamp': they name known", "no-such-program is not here", "NO_SUCH_VARIABLE is not"):
        assert any(part in each for each in problems), part
