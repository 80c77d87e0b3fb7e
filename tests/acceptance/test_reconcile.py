"""`reconcile`: PostgreSQL and Prefect disagree, and are brought together again."""

import json
from uuid import UUID

import httpx
import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView
from tests.conftest import Connection
from tests.engine import define, get_run, run_workflow, wait_until_true


@pytest.fixture(autouse=True)
def short_lease(cli: CommandLine) -> None:
    """Leases of one second: each also holds for its own length after the start of the database's server."""
    assert isinstance(cli.environment, dict)
    cli.environment["PGFLOW_LEASE"] = "1"


def make_old(db: Connection) -> None:
    """Let all this have been an hour ago, and PostgreSQL have been up for longer than a lease."""
    wait_until_true(db, "SELECT clock_timestamp() > pg_postmaster_start_time() + interval '1 s'")
    db.execute("UPDATE pgflow.runs SET finished_at = finished_at - interval '1 hour'")
    db.execute("UPDATE pgflow_prefect.owners SET lease_until = clock_timestamp() - interval '1 hour'")


def crash(prefect: PrefectView, run_id: UUID) -> None:
    """Have Prefect show that a run's flow run crashed."""
    url = f"{prefect.url}/flow_runs/{prefect.find_flow_run(run_id)['id']}/set_state"
    httpx.post(url, json={"state": {"type": "CRASHED"}, "force": True}, timeout=TIMEOUT).raise_for_status()


def test_a_disagreement_is_named_and_repaired(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    run_id = cli("run", chain).find_run_id()
    prefect.await_task_states(run_id, {"a": "Completed", "b": "Completed", "c": "Completed"})
    make_old(db)
    crash(prefect, run_id)

    named = cli("reconcile")
    assert named.code == 1
    assert named.lines[0] == "class\trun\tworkflow\twhat is\trepair"
    kind, run, workflow, found, repair = named.lines[1].split("\t")
    assert (kind, run, workflow) == ("crashed_then_completed", str(run_id), chain)
    assert found.startswith("it is completed, and flow run ")
    assert repair == "flow run to Completed"
    assert "reconcile --apply" in named.err

    [told] = json.loads(cli("reconcile", "--json").out)
    assert (told["kind"], told["run_id"], told["repaired"]) == ("crashed_then_completed", str(run_id), False)
    assert prefect.find_flow_run(run_id)["state_type"] == "CRASHED", "looking changes nothing"

    applied = cli("reconcile", "--apply")
    assert (applied.code, applied.err) == (0, "")
    assert applied.lines == named.lines
    assert prefect.find_flow_run(run_id)["state_type"] == "COMPLETED"

    again = cli("reconcile", "--apply")
    assert (again.code, again.lines) == (0, ["PostgreSQL and Prefect agree"])
    crash(prefect, run_id)
    assert cli("reconcile").code == 0, "what was seen to agree is not looked at again"
    assert cli("reconcile", "--all", "--apply", "--json").code == 0
    assert prefect.find_flow_run(run_id)["state_type"] == "COMPLETED"


@pytest.mark.once
def test_without_prefect_it_says_what_the_rows_say(cli: CommandLine, db: Connection) -> None:
    define(db, "alone", {"only": []})
    run_id = run_workflow(db, "alone").id
    db.execute("SELECT pgflow_prefect.take_run(%s, gen_random_uuid(), 'a process', 1, 3)", [run_id])
    make_old(db)

    for apply in ((), ("--apply",)):
        told = cli("reconcile", "--json", *apply, PREFECT_API_URL="http://127.0.0.1:1/api")

        assert told.code == 1
        assert [(each["kind"], each["run_id"]) for each in json.loads(told.out)] == [("zombie", str(run_id))]
        assert "can't be used" in told.find_error()
        assert "Prefect could not be asked" in told.err
        assert get_run(db, run_id).status == "pending"
