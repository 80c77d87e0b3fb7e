"""`record`, and workflows whose runs Prefect hears of later, by the real commands."""

import json
import re
import signal
from uuid import UUID, uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, kill, wait_until
from tests.conftest import Connection
from tests.engine import define, get_run, run_workflow, value

SHOWN = "SELECT count(*) FROM pgflow_prefect.flow_runs"

FAILS = """
from pgflow_prefect import RecordLater, Workflow

workflow = Workflow("{slug}", record=RecordLater(longer_than=3600))


@workflow.step
async def a(payload):
    if payload == "bad":
        raise ValueError("the order has no lines")
    return payload


@workflow.step
async def b(a):
    return a
"""


def make_workflow(cli: CommandLine, db: Connection, text: str) -> str:
    """Define a workflow a -> b with these handlers, and return its slug."""
    slug = f"orders_{uuid4().hex[:8]}"
    define(db, slug, {"a": [], "b": ["a"]})
    cli.write(f"flows/{slug}.py", text.format(slug=slug))
    return slug


def await_ends(db: Connection, run_ids: list[UUID]) -> None:
    wait_until(lambda: all(get_run(db, each).status != "pending" for each in run_ids), "the runs end")


def await_shown(db: Connection, prefect: PrefectView, run_id: UUID, state: str) -> None:
    """Return once Prefect shows a run in this state, of which it was not told at first."""
    count = "SELECT count(*) FROM pgflow_prefect.flow_runs WHERE run_id = %s"
    wait_until(lambda: value(db, count, run_id) == 1, "the run is shown")
    prefect.await_state(run_id, state)


def test_runs_are_executed_unshown_and_recorded_by_the_command(
    services: Services, cli: CommandLine, db: Connection, prefect: PrefectView
) -> None:
    slug = make_workflow(cli, db, FAILS)
    services.start("worker", PGFLOW_RECONCILE_INTERVAL="1")
    good = [run_workflow(db, slug, number).id for number in range(3)]
    bad = run_workflow(db, slug, "bad").id
    await_ends(db, [*good, bad])
    await_shown(db, prefect, bad, "Failed")
    prefect.await_task_states(bad, {"a": "Failed"})
    wait_until(lambda: value(db, SHOWN) == 1 and all(_is_settled(db, each) for each in good), "each is decided on")

    assert f"not shown in Prefect: `pgflow-prefect record {good[0]}` shows it" in cli("status", str(good[0])).lines
    assert "not shown in Prefect" not in cli("status", str(bad)).out
    listed = {each["id"]: each["is_unshown"] for each in json.loads(cli("runs", "--json").out)}
    assert listed == {**dict.fromkeys(map(str, good), True), str(bad): False}
    assert cli("reconcile").lines == ["PostgreSQL and Prefect agree"]

    assert cli("record", "--since", "1h", "--dry-run").lines[1].split() == [slug, "completed", "3"]
    assert value(db, SHOWN) == 1, "a dry run shows nothing"
    assert cli("record", str(good[0])).lines == ["shown in Prefect: 1 run"]
    assert json.loads(cli("record", "--since", "1h", "--workflow", slug, "--json").out) == {"shown": 2, "refused": []}
    assert cli("record", "--since", "1h", "--workflow", slug).lines == ["shown in Prefect: 0 runs"]
    for run_id in good:
        prefect.await_state(run_id, "Completed")
        prefect.await_task_states(run_id, dict.fromkeys("ab", "Completed"))
    assert prefect.count_flow_runs(slug) == 4
    assert "not shown" not in cli("runs").out


def _is_settled(db: Connection, run_id: UUID) -> bool:
    return bool(value(db, "SELECT settled FROM pgflow_prefect.owners WHERE run_id = %s", run_id))


@pytest.mark.once
def test_the_setting_of_the_worker_decides_for_a_workflow_whose_file_says_nothing(
    services: Services, cli: CommandLine, db: Connection, chain: str
) -> None:
    services.start("worker", PGFLOW_RECORD_LATER=f"{chain}::3600")
    run_id = run_workflow(db, chain, {}).id
    await_ends(db, [run_id])
    wait_until(lambda: _is_settled(db, run_id), "it is decided on")
    assert value(db, SHOWN) == 0
    checked = cli("validate", chain, PGFLOW_RECORD_LATER=f"{chain}:100:5")
    assert re.search(r"failed runs, runs from 5 s on, and one in 100 of the others", checked.out)


def test_a_failed_run_that_a_dead_worker_did_not_show_is_shown_by_the_next(
    services: Services, cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    cli.write("gate")
    first = services.start("worker", PGFLOW_RECORD_LATER=f"{chain}::3600", PGFLOW_LEASE="600")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    first.process.send_signal(signal.SIGSTOP)  # it can't tell Prefect of what comes now
    db.execute("SELECT pgflow.fail_run(%s, 'the stock is empty')", [run_id])
    kill(first)
    assert value(db, SHOWN) == 0
    services.start("worker", PGFLOW_RECONCILE_INTERVAL="1")
    await_shown(db, prefect, run_id, "Failed")
    prefect.await_task_states(run_id, {"a": "Completed", "b": "Failed"})


@pytest.mark.once
def test_wrong_usage_is_refused(cli: CommandLine, db: Connection, chain: str) -> None:
    for given, message in (
        (["record"], "which runs? give their ids, or --since 7d"),
        (["record", "latest", "--since", "7d"], "which runs? give their ids, or --since 7d"),
        (["record", "latest", "--status", "failed"], "the ids name the runs: leave out --workflow and --status"),
        (["record", "--since", "soon"], "--since 'soon' is neither"),
        (["record", "--since", "7d", "--workflow", "ordres"], "unknown workflow 'ordres'"),
        (["record", str(run_workflow(db, chain, {}).id)], "has not ended: it can be recorded after its end"),
    ):
        refused = cli(*given)
        assert (refused.code, message in refused.find_error()) == (
            2 if "unknown" not in message else refused.code,
            True,
        )
    refused = cli("worker", PGFLOW_RECORD_LATER=f"{chain}:often")
    assert refused.code == 2
    assert "PGFLOW_RECORD_LATER: Value error, 'chain_" in refused.find_error()


@pytest.mark.once
def test_a_flow_that_needs_a_flow_run_is_refused(cli: CommandLine, db: Connection) -> None:
    slug = make_workflow(cli, db, FAILS + "\nflow = workflow.flow.with_options(retries=2)\n")
    refused = cli("validate", slug)
    assert refused.code == 1
    assert "its runs are recorded later, and its flow has retries of its own" in refused.out
    assert "retries of its own" in cli("worker").find_error()
