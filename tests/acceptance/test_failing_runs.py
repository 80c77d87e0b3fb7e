"""Runs that fail: PostgreSQL and Prefect say the same, and so does the command."""

import json
from uuid import UUID

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView
from tests.conftest import Connection
from tests.engine import column, get_run, get_state, run_workflow, statuses


def test_a_handler_that_raises_fails_the_run_everywhere(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    cli.write("broken")

    failed = cli("run", chain)

    assert failed.code == 1
    run_id = failed.find_run_id()
    assert "RuntimeError: the disk is full" in failed.find_error()
    assert str(run_id) in failed.find_error()
    assert failed.lines[-1] == "b\tFailed"
    assert statuses(db, run_id) == {"a": "completed", "b": "failed"}, "c never starts"
    assert get_state(db, run_id, "b").error_message == "RuntimeError: the disk is full"
    run = get_run(db, run_id)
    assert run.status == "failed"
    assert "the disk is full" in str(run.error_message)
    flow_run = prefect.find_flow_run(run_id)
    assert flow_run["state_type"] == "FAILED"
    assert "the disk is full" in flow_run["state"]["message"]
    prefect.await_task_states(run_id, {"a": "Completed", "b": "Failed"})

    shown = cli("status", str(run_id))
    assert [line.split("\t")[:3] for line in shown.lines[-3:]] == [
        ["a", "completed", "Completed"],
        ["b", "failed", "Failed"],
        ["c", "not reached", ""],
    ]
    assert "the disk is full" in shown.lines[1]
    assert "the disk is full" in cli("runs", "--status", "failed").lines[1]


@pytest.mark.once
def test_a_value_that_does_not_fit_an_annotation_fails_the_step_and_is_not_shown(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    begun = run_workflow(db, chain, {"start": "a-secret-word"}).id  # SQL knows of no annotation
    failed = cli("run", "--resume", str(begun), "--json")

    assert failed.code == 1
    told = json.loads(failed.out)["run"]
    reason = "step 'a': argument 'payload' does not fit its annotation: start: Input should be a valid integer"
    assert told["status"] == "failed"
    assert reason in told["error_message"]
    assert "a-secret-word" not in told["error_message"] + failed.err
    run_id = UUID(told["id"])
    assert statuses(db, run_id) == {"a": "failed"}
    flow_run = prefect.find_flow_run(run_id)
    assert flow_run["state_type"] == "FAILED"
    assert reason in flow_run["state"]["message"]
    assert cli.executions() == []


@pytest.mark.once
def test_without_prefect_there_is_no_run(cli: CommandLine, db: Connection, chain: str) -> None:
    url = "http://127.0.0.1:1/api"
    failed = cli("run", chain, PREFECT_API_URL=url)

    assert failed.code == 1
    assert f"Prefect's API at {url} can't be used" in failed.find_error()
    assert column(db, "SELECT id FROM pgflow.runs") == []


@pytest.mark.once
def test_debug_shows_where_an_error_comes_from(cli: CommandLine) -> None:
    failed = cli("graph", "nothing", "--debug", debug=True)

    assert failed.code == 2
    assert "Traceback (most recent call last)" in failed.err
    assert failed.err.splitlines()[-1].startswith("error: unknown workflow 'nothing'")
