"""Hooks of the user's flow: under every command they run once, where the run was executed."""

import json
from uuid import UUID, uuid4

import httpx
import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import define, get_run, run_workflow, value

pytestmark = pytest.mark.once

HANDLERS = """
import asyncio
from pathlib import Path

from pgflow_prefect import Workflow
from prefect.variables import Variable

workflow = Workflow("SLUG")


@workflow.step
async def work(payload: str):
    if payload == "fail":
        raise ValueError("no")
    if payload == "wait":
        Path("begun").touch()
        await asyncio.Event().wait()


flow = workflow.flow


def leave(flow, flow_run, state):
    raise SystemExit("the next hook runs all the same")


def tell(flow, flow_run, state):
    with Path(Variable.get("VARIABLE")).open("a") as file:
        file.write(f"{flow_run.id} {state.type.value}\\n")


FLOW
"""


BY_DECORATOR = """
for add in (flow.on_completion, flow.on_failure, flow.on_cancellation):
    add(leave)
    add(tell)
"""
BY_OPTION = """
both = [leave, tell]
flow = flow.with_options(on_completion=both, on_failure=both, on_cancellation=both)
"""


@pytest.fixture
def slug(cli: CommandLine, db: Connection, prefect_api: str) -> str:
    name = f"hooks_{uuid4().hex[:8]}"
    define(db, name, {"work": []})
    body = {"name": name, "value": "told"}  # a hook that is sync asks Prefect for it
    httpx.post(f"{prefect_api}/variables/", json=body, timeout=TIMEOUT).raise_for_status()
    return name


def write(cli: CommandLine, slug: str, flow: str) -> None:
    """Write the file that has the handlers, and says this of its flow."""
    text = HANDLERS.replace("SLUG", slug).replace("VARIABLE", slug).replace("FLOW", flow)
    cli.write(f"flows/{slug}.py", text)


def read_told(cli: CommandLine) -> list[list[str]]:
    file = cli.directory / "told"
    return [line.split() for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@pytest.mark.parametrize(("payload", "state"), [("well", "COMPLETED"), ("fail", "FAILED")])
def test_run_runs_them(
    cli: CommandLine, db: Connection, prefect: PrefectView, slug: str, payload: str, state: str
) -> None:
    write(cli, slug, BY_DECORATOR)
    ended = cli("run", slug, "--payload", json.dumps(payload))
    assert read_told(cli) == [[prefect.find_flow_run(ended.find_run_id())["id"], state]]
    assert cli("reconcile", "--apply").code == 0
    assert len(read_told(cli)) == 1


@pytest.mark.parametrize(("service", "flow"), [("worker", BY_DECORATOR), ("serve", BY_OPTION)], ids=["worker", "serve"])
def test_a_service_runs_them(
    service: str, flow: str, services: Services, cli: CommandLine, db: Connection, prefect: PrefectView, slug: str
) -> None:
    write(cli, slug, flow)
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


TWO_FLOWS = """
hourly = flow.with_options(retries=1)
nightly = flow.with_options(retries=3)
del flow
"""


@pytest.mark.parametrize("command", ["validate", "run", "worker", "serve"])
def test_of_two_flows_of_which_none_is_called_flow_neither_is_chosen(
    command: str, cli: CommandLine, db: Connection
) -> None:
    define(db, "two_flows", {"work": []})
    write(cli, "two_flows", TWO_FLOWS)
    what = ["flows/two_flows.py"] if command in ("worker", "serve") else ["two_flows"]
    ended = cli(command, *what)
    assert ended.code == (1 if command == "validate" else 2), ended.out + ended.err
    assert "its file has several flows, hourly and nightly" in ended.out + ended.err
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 0
