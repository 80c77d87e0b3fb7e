"""A Prefect user presses Run, Retry and Cancel, and gets nothing beyond that: the database's owner says what runs."""

from collections.abc import Callable
from uuid import UUID, uuid4

import httpx
import pytest

from pgflow_prefect.deployment import bound
from pgflow_prefect.errors import UsageError
from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import CHAIN, INVALID, define, get_run, refused, run_workflow, statuses, value

FAST = {"PGFLOW_LEASE": "2", "PGFLOW_RECONCILE_INTERVAL": "2"}

Ask = Callable[[UUID], str]
"""Starts a flow run of the chain's deployment for a run of the user's choice, and returns its id."""


@pytest.fixture
def ask(prefect: PrefectView, chain: str) -> Ask:
    def press(run_id: UUID) -> str:
        url = f"{prefect.url}/deployments/{prefect.find_deployment(chain)['id']}/create_flow_run"
        wish = {"parameters": {"run_id": str(run_id)}}
        return str(httpx.post(url, json=wish, timeout=TIMEOUT).raise_for_status().json()["id"])

    return press


def await_end(prefect: PrefectView, flow_run: str) -> str:
    wait_until(lambda: prefect.read_flow_run(flow_run)["state_type"] in ("FAILED", "COMPLETED"), "the flow run ends")
    return str(prefect.read_flow_run(flow_run)["state_name"])


def test_run_executes_no_run_that_the_flow_run_was_not_made_for(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str, ask: Ask
) -> None:
    services.start("worker", **FAST)
    cli.write("broken")
    failed = run_workflow(db, chain, {}).id
    wait_until(lambda: get_run(db, failed).status == "failed", "the run fails")
    cli.remove("broken")
    define(db, "other", CHAIN)
    other = run_workflow(db, "other", {}).id
    db.execute("SELECT pgflow.reopen_run(%s)", [failed])
    db.execute("SELECT pgflow_prefect.enable_workflow(%s, false)", [chain])
    never = run_workflow(db, chain, {}).id

    for run_id in (failed, other, never):
        assert await_end(prefect, ask(run_id)) == "Failed"
        assert get_run(db, run_id).status == "pending"
    assert statuses(db, other) == statuses(db, never) == {"a": "pending"}
    assert cli.executions() == ["a", "b"]


def test_a_flow_run_may_take_the_run_that_it_was_made_for_or_one_that_was_never_taken(db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, flow_run, later = run_workflow(db, "chain", {}).id, uuid4(), uuid4()

    def may_take(each: UUID) -> object:
        return value(db, "SELECT pgflow_prefect.is_made_for(%s, %s)", run_id, each)

    assert not may_take(flow_run), "the workflow is not enabled"
    db.execute("SELECT pgflow_prefect.enable_workflow('chain')")
    assert may_take(flow_run)
    db.execute("SELECT pgflow_prefect.take_run(%s, %s, 'me', 60, 3)", [run_id, flow_run])
    assert (may_take(flow_run), may_take(later)) == (True, False)
    db.execute("SELECT pgflow_prefect.release_run(%s, 1)", [run_id])
    assert (may_take(flow_run), may_take(later)) == (True, False), "it was taken once"
    db.execute("SELECT pgflow_prefect.take_run(%s, NULL, 'bridge', 60, 3)", [run_id])
    assert may_take(later), "its flow run is being created, and may begin before the bridge has linked it"


@pytest.mark.parametrize("reason", ["fraud", "cancelled: fraud", "cancelled"])
def test_retry_reopens_no_run_that_was_cancelled(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str, reason: str
) -> None:
    cli.write("gate")
    worker = services.start("worker", **FAST)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    flow_run = prefect.find_flow_run(run_id)["id"]
    db.execute("SELECT pgflow.cancel_run(%s, %s)", [run_id, reason])
    cli.remove("gate")
    worker.await_line(f"run {run_id} of {chain!r}: ")  # it has said to Prefect how the flow run ends

    prefect.press("Retry", flow_run)  # at once it is scheduled, until the worker or its reconcile ends it
    wait_until(lambda: prefect.read_flow_run(flow_run)["state_type"] in ("FAILED", "CANCELLED"), "it has ended again")
    assert get_run(db, run_id).status == "failed"
    assert cli.executions() == ["a", "b"]
    assert cli("retry", str(run_id)).code == 0, "who may write to the database may"
    wait_until(lambda: get_run(db, run_id).status == "completed", "the run completes")


@pytest.mark.anyio
async def test_a_deployment_of_rows_executes_runs_of_its_own_workflow_only(
    pgflow_dsn: str, prefect_api: str, db: Connection
) -> None:
    define(db, "other", {"a": []})
    run_id = run_workflow(db, "other", {}).id
    with pytest.raises(UsageError, match="is one of workflow 'other'"):
        await bound.flow(run_id=run_id)
    assert statuses(db, run_id) == {"a": "pending"}


def test_a_run_whose_id_was_used_first_is_not_executed_with_that_payload(db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id, flow_run = uuid4(), uuid4()
    create = "SELECT pgflow_prefect.create_run('chain', %s, %s, %s, 'me', 60, 3)"
    db.execute("SELECT pgflow.run_workflow('chain', '{\"amount\": 1000000}', %s)", [run_id])
    with refused(INVALID):
        db.execute(create, ['{"amount": 1}', run_id, flow_run])
    assert value(db, "SELECT count(*) FROM pgflow_prefect.owners") == 0

    db.execute(create, ['{"amount": 2}', uuid4(), flow_run])


def test_a_flow_run_finds_its_run_again_though_a_trigger_has_changed_the_payload(db: Connection) -> None:
    define(db, "chain", CHAIN)
    db.execute(
        "CREATE FUNCTION enrich() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN new.payload := new.payload || '{\"more\": 1}'; RETURN new; END $$"
    )
    db.execute("CREATE TRIGGER enrich BEFORE INSERT ON pgflow.runs FOR EACH ROW EXECUTE FUNCTION enrich()")
    run_id, flow_run = uuid4(), uuid4()
    create = "SELECT pgflow_prefect.create_run('chain', '{}', %s, %s, 'me', 60, 3)"
    assert value(db, create, run_id, flow_run) == 1
    assert value(db, create, run_id, flow_run) == 2
