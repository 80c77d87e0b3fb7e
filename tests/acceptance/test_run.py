"""Runs that go well, and the commands that show them."""

import json
from uuid import UUID, uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView
from tests.conftest import Connection
from tests.engine import get_run, get_state, insert_run, statuses, value

DONE = {"a": "completed", "b": "completed", "c": "completed"}
SHOWN = {"a": "Completed", "b": "Completed", "c": "Completed"}


def test_a_run_completes_in_postgres_and_in_prefect(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    ran = cli("run", chain, "--payload", '{"start": 40}')

    assert (ran.code, ran.err) == (0, "")
    run_id = ran.find_run_id()
    flow_run = prefect.find_flow_run(run_id)
    assert ran.lines[:3] == [
        f"handlers: flows/{chain}.py",
        f"run {run_id}",
        f"in Prefect: {prefect.url.removesuffix('/api')}/runs/flow-run/{flow_run['id']}",
    ]
    assert ran.lines[3:9] == [f"{step}\t{state}" for step in "abc" for state in ("Running", "Completed")]
    assert ran.lines[9].startswith("completed in ")
    run = get_run(db, run_id)
    assert (run.status, run.payload, run.remaining) == ("completed", {"start": 40}, 0)
    assert statuses(db, run_id) == DONE
    assert get_state(db, run_id, "c").step_result == {"sum": 42}
    assert flow_run["state_name"] == "Completed"
    assert flow_run["parameters"] == {"run_id": str(run_id)}, "the payload stays in PostgreSQL"
    prefect.await_task_states(run_id, SHOWN)
    assert cli.executions() == ["a", "b", "c"]


@pytest.mark.once
def test_a_payload_comes_from_a_file_or_from_standard_input(cli: CommandLine, db: Connection, chain: str) -> None:
    cli.write("payload.json", '{"start": 1}')

    from_file = cli("run", chain, "--payload", "@payload.json")
    from_stdin = cli("run", chain, "--payload", "-", "--json", stdin='{"start": 2}')

    assert get_run(db, from_file.find_run_id()).payload == {"start": 1}
    told = json.loads(from_stdin.out)
    assert from_stdin.err == ""
    assert told["run"]["payload"] == {"start": 2}
    assert told["run"]["status"] == "completed"
    assert told["url"].endswith(told["run"]["flow_run_id"])


@pytest.mark.once
def test_a_run_without_a_payload_has_an_empty_object(cli: CommandLine, db: Connection, chain: str) -> None:
    cli.write("elsewhere/handlers.py", (cli.directory / f"flows/{chain}.py").read_text(encoding="utf-8"))

    ran = cli("run", chain, "--handlers", "elsewhere/handlers.py", "--debug", debug=True)

    assert ran.code == 0
    assert get_run(db, ran.find_run_id()).payload == {}
    assert "Beginning flow run" in ran.err, "Prefect's own messages"


def test_a_run_that_sql_inserted_by_hand_is_executed(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    run_id = insert_run(db, chain)

    ran = cli("run", "--resume", str(run_id))

    assert (ran.code, ran.err) == (0, "")
    assert ran.find_run_id() == run_id
    assert get_run(db, run_id).status == "completed"
    assert statuses(db, run_id) == DONE
    prefect.await_task_states(run_id, SHOWN)


def test_runs_lists_the_newest_first_and_filters(cli: CommandLine, db: Connection, chain: str) -> None:
    assert cli("runs").out.startswith("no runs: start one with")

    completed = _insert_finished(db, chain)
    pending = value(db, "SELECT id FROM pgflow.run_workflow(%s, '{}')", chain)

    header, *lines = cli("runs").lines
    assert header.split("\t") == ["run", "workflow", "status", "created", "took", "steps", "error"]
    assert [line.split("\t")[:3] for line in lines] == [
        [str(pending), chain, "pending"],
        [str(completed), chain, "completed"],
    ]
    found = json.loads(cli("runs", "--status", "completed", "--workflow", chain, "--json").out)
    assert [each["id"] for each in found] == [str(completed)]
    assert len(cli("runs", "--limit", "1").lines) == 2


def test_status_shows_every_step_those_that_wait_too(cli: CommandLine, db: Connection, chain: str) -> None:
    run_id = value(db, "SELECT id FROM pgflow.run_workflow(%s, '{}')", chain)
    db.execute("SELECT pgflow.complete_step(%s, 'a', '\"first\"')", [run_id])

    plain = cli("status", str(run_id))
    told = json.loads(cli("status", str(run_id), "--json").out)

    assert plain.lines[0] == f"run {run_id} of workflow {chain!r}: pending"
    rows = [line.split("\t") for line in plain.lines[2:]]
    assert rows[0] == ["step", "status", "in Prefect", "attempts", "took", "done by", "result or error"]
    assert [row[:2] for row in rows[1:]] == [["a", "completed"], ["b", "pending"], ["c", "waiting"]]
    assert rows[1][-1] == '"first"'
    assert (told["run"]["id"], told["run"]["status"]) == (str(run_id), "pending")
    assert [(step["step_slug"], step["status"]) for step in told["steps"]] == [("a", "completed"), ("b", "pending")]
    assert told["waiting"] == ["c"]


def _insert_finished(db: Connection, workflow: str) -> UUID:
    run_id = uuid4()
    db.execute("SELECT pgflow.run_workflow(%s, '{}', %s)", [workflow, run_id])
    for step in "abc":
        db.execute("SELECT pgflow.complete_step(%s, %s, '1')", [run_id, step])
    return run_id
