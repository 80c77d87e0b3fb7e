"""Hooks of the user's flow: under every command they run once, where the run was executed."""

import json
from uuid import UUID, uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import define, get_run, run_workflow, value

HANDLERS = """
import asyncio
from pathlib import Path

from pgflow_prefect import Workflow

workflow = Workflow("SLUG")


@workflow.step
async def work(payload: str):
    if payload == "fail":
        raise ValueError("no")
    if payload == "wait":
        Path("begun").touch()
        await asyncio.Event().wait()


flow = workflow.flow


@flow.on_completion
@flow.on_failure
@flow.on_cancellation
def tell(flow, flow_run, state):
    with Path("told").open("a") as file:
        file.write(f"{flow_run.id} {state.type.value}\\n")
"""


@pytest.fixture
def slug(cli: CommandLine, db: Connection) -> str:
    name = f"hooks_{uuid4().hex[:8]}"
    define(db, name, {"work": []})
    cli.write(f"flows/{name}.py", HANDLERS.replace("SLUG", name))
    return name


def read_told(cli: CommandLine) -> list[list[str]]:
    file = cli.directory / "told"
    return [line.split() for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@pytest.mark.parametrize(("payload", "state"), [("well", "COMPLETED"), ("fail", "FAILED")])
def test_run_runs_them(
    cli: CommandLine, db: Connection, prefect: PrefectView, slug: str, payload: str, state: str
) -> None:
    ended = cli("run", slug, "--payload", json.dumps(payload))
    assert read_told(cli) == [[prefect.find_flow_run(ended.find_run_id())["id"], state]]
    assert cli("reconcile", "--apply").code == 0
    assert len(read_told(cli)) == 1


@pytest.mark.parametrize("service", ["worker", "serve"])
def test_a_service_runs_them(
    service: str, services: Services, cli: CommandLine, db: Connection, prefect: PrefectView, slug: str
) -> None:
    services.start(service)
    failing = run_workflow(db, slug, "fail").id
    well = run_workflow(db, slug, "well").id
    wait_until(lambda: len(read_told(cli)) == 2, "both runs are told of")

    def wish(button: str | None) -> UUID:
        """Begin a run, and cancel it: in PostgreSQL, or with Prefect's button."""
        waiting = run_workflow(db, slug, "wait").id
        wait_until((cli.directory / "begun").exists, "its handler works")
        (cli.directory / "begun").unlink()
        if button:
            prefect.press(button, prefect.find_flow_run(waiting)["id"])
        else:
            value(db, "SELECT pgflow.cancel_run(%s, 'cancelled: enough')", waiting)
        wait_until(lambda: get_run(db, waiting).status == "failed", "the run is cancelled")
        prefect.await_state(waiting, "Cancelled")
        return waiting

    by_sql, by_button = wish(None), wish("Cancel")
    expected = {(well, "COMPLETED"), (failing, "FAILED"), (by_sql, "CANCELLED"), (by_button, "CANCELLED")}
    wait_until(lambda: len(read_told(cli)) >= len(expected), "all runs are told of")
    told = [(flow_run, "CANCELLED" if state == "CANCELLING" else state) for flow_run, state in read_told(cli)]
    assert sorted(told) == sorted((prefect.find_flow_run(run_id)["id"], state) for run_id, state in expected)
