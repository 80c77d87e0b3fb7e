"""Prefect's own buttons, and ours: Retry, Cancel and Run, each of them twice."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.acceptance.conftest import (
    TIMEOUT,
    CommandLine,
    PrefectView,
    Service,
    Services,
    find_only_run,
    kill,
    wait_until,
)
from tests.conftest import Connection
from tests.engine import column, get_run, get_state, run_workflow, statuses, value

FAST = {"PGFLOW_LEASE": "2", "PGFLOW_RECONCILE_INTERVAL": "2"}
"""A worker hears of a cancellation when it extends its leases."""

PATIENT = {**FAST, "PGFLOW_LEASE": "60"}
"""However slow this machine is, no worker loses a run to another one."""


@contextmanager
def frozen(service: Service) -> Iterator[None]:
    """Keep a service from working: what is done meanwhile has all been done before it goes on."""
    service.process.send_signal(signal.SIGSTOP)
    yield
    service.process.send_signal(signal.SIGCONT)


def test_retry_executes_only_what_is_not_completed(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    cli.write("broken")
    worker = services.start("worker", **FAST)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: get_run(db, run_id).status == "failed", "the run fails")
    prefect.await_state(run_id, "Failed")
    flow_run = prefect.find_flow_run(run_id)["id"]

    cli.remove("broken")
    with frozen(worker):
        for _ in range(2):
            prefect.press("Retry", flow_run)
    wait_until(lambda: get_run(db, run_id).status == "completed", "the run completes")

    prefect.await_state(run_id, "Completed")
    assert prefect.find_flow_run(run_id)["id"] == flow_run
    assert cli.executions() == ["a", "b", "b", "c"]
    prefect.await_task_states(run_id, {"a": "Cached", "b": "Completed", "c": "Completed"})


@pytest.mark.parametrize("by", ["Prefect", "the command", "SQL"])
def test_cancel_stops_working_steps(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str, by: str
) -> None:
    cli.write("gate")
    worker = services.start("worker", **FAST)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    flow_run = prefect.find_flow_run(run_id)["id"]

    for _ in range(2):
        if by == "SQL":
            db.execute("SELECT pgflow.cancel_run(%s)", [run_id])
        elif by == "the command":
            assert cli("cancel", str(run_id), "--reason", "wrong list").code == 0
    if by == "Prefect":
        with frozen(worker):
            for _ in range(2):
                prefect.press("Cancel", flow_run)
    prefect.await_state(run_id, "Cancelled")

    reason = {"Prefect": "cancelled in Prefect", "the command": "cancelled: wrong list", "SQL": "cancelled"}[by]
    assert (get_run(db, run_id).status, get_run(db, run_id).error_message) == ("failed", reason)
    assert statuses(db, run_id) == {"a": "completed", "b": "failed"}
    assert get_state(db, run_id, "b").error_message == reason
    prefect.await_task_states(run_id, {"a": "Completed", "b": "Cancelled"})

    cli.remove("gate")
    assert cli("retry", str(run_id)).code == 0
    wait_until(lambda: get_run(db, run_id).status == "completed", "after a retry, it completes")
    assert cli.executions() == ["a", "b", "b", "c"]


def test_cancel_stops_a_run_of_the_command_line(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    cli.write("gate")
    process = cli.start("run", chain)
    wait_until(lambda: "b" in cli.executions(), "b executes")
    run_id = find_only_run(db)
    prefect.press("Cancel", prefect.find_flow_run(run_id)["id"])

    _, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (1, f"error: run {run_id} failed: cancelled in Prefect\n")
    assert statuses(db, run_id) == {"a": "completed", "b": "failed"}
    prefect.await_state(run_id, "Cancelled")


def test_a_cancelled_run_whose_process_is_gone_is_not_taken_over(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    cli.write("gate")
    killed = services.start("worker", **FAST)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    kill(killed)
    prefect.press("Cancel", prefect.find_flow_run(run_id)["id"])
    services.start("worker", **FAST)

    wait_until(lambda: get_run(db, run_id).status == "failed", "the run is cancelled")
    assert get_run(db, run_id).error_message == "cancelled in Prefect"
    prefect.await_state(run_id, "Cancelled")
    assert cli.executions() == ["a", "b"]


@pytest.mark.once
def test_run_creates_a_run_with_the_payload(
    services: Services, db: Connection, prefect: PrefectView, chain: str
) -> None:
    for _ in range(2):  # two workers: each flow run is executed by one of them
        services.start("worker", **PATIENT)
    pressed = {prefect.press_run(chain, {"start": 40}) for _ in range(2)}

    wait_until(lambda: column(db, "SELECT status FROM pgflow.runs") == ["completed"] * 2, "both runs complete")
    assert {str(each) for each in column(db, "SELECT flow_run_id FROM pgflow_prefect.owners")} == pressed
    assert column(db, "SELECT payload FROM pgflow.runs") == [{"start": 40}] * 2
    assert value(db, "SELECT max(attempts) FROM pgflow.step_states") == 1


@pytest.mark.once
def test_run_with_a_run_id_that_is_none_does_the_worker_no_harm(
    services: Services, db: Connection, prefect: PrefectView, chain: str
) -> None:
    worker = services.start("worker", **FAST)
    url = f"{prefect.url}/deployments/{prefect.find_deployment(chain)['id']}/create_flow_run"
    wish = {"parameters": {"run_id": "nonsense"}, "enforce_parameter_schema": False}
    pressed = httpx.post(url, json=wish, timeout=TIMEOUT).raise_for_status().json()["id"]
    wait_until(lambda: prefect.read_flow_run(pressed)["state_name"] == "Failed", "the flow run fails")

    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: get_run(db, run_id).status == "completed", "the worker goes on")
    assert worker.process.poll() is None


def test_without_prefect_retry_and_cancel_work_on_the_rows(cli: CommandLine, db: Connection, chain: str) -> None:
    run_id = run_workflow(db, chain, {}).id
    away = "http://127.0.0.1:9/api"
    cancelled = cli("cancel", str(run_id), PREFECT_API_URL=away)
    assert (cancelled.code, cancelled.out) == (0, f"run {run_id} is cancelled\n")
    assert get_run(db, run_id).status == "failed"

    retried = cli("retry", str(run_id), PREFECT_API_URL=away)
    assert retried.code == 0
    assert retried.lines[0] == f"run {run_id} is pending"
    assert f"`pgflow-prefect enable {chain}`" in retried.lines[1], "what takes it, where no service does"
    assert get_run(db, run_id).status == "pending"


@pytest.mark.once
def test_a_completed_run_is_neither_retried_nor_cancelled(cli: CommandLine, db: Connection, chain: str) -> None:
    run_id = run_workflow(db, chain, {}).id
    for step in "abc":
        db.execute("SELECT pgflow.complete_step(%s, %s, '1')", [run_id, step])
    for command, message in (("retry", "nothing to retry"), ("cancel", "nothing to cancel")):
        refused = cli(command, str(run_id))
        assert (refused.code, refused.find_error()) == (1, f"run {run_id} is completed: there is {message}")
