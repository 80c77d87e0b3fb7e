"""Two flow runs for one run: who has taken it last writes, the other one is refused and leaves it alone."""

import re
import signal
from collections.abc import Iterator
from uuid import UUID

import httpx
import psutil
import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, expire_leases, wait_until
from tests.conftest import Connection
from tests.engine import get_run, get_state, run_workflow, statuses, value

STEP_B = """
@workflow.step
async def b(a: int) -> int:
    note("b")
"""

STEP_B_THAT_FREEZES = """
@workflow.step
async def b(a: int, payload: dict[str, bool], context: AsyncStepContext) -> int:
    note("b")
    with Path("keys").open("a") as file:
        file.write(f"{context.idempotency_key}\\n")
    if payload["through_connection"]:
        await context.connection.execute("INSERT INTO written VALUES (%s)", [context.attempt])
    if Path("freeze").exists():
        Path("freeze").unlink()
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread, and with it all the others
        return 1000  # and the report is on its way before anything else is heard
"""

STALE = "was taken over by another flow run; this one stops"


@pytest.fixture
def services(cli: CommandLine) -> Iterator[Services]:
    found = Services(cli)
    yield found
    found.stop()


def rewrite(cli: CommandLine, workflow: str, *replacements: tuple[str, str]) -> None:
    path = f"flows/{workflow}.py"
    text = (cli.directory / path).read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    cli.write(path, text)


def read_logs(prefect: PrefectView, flow_run_id: object) -> list[str]:
    """Return what Prefect shows on the page of a flow run as its log."""
    chosen = {"logs": {"flow_run_id": {"any_": [flow_run_id]}}}
    found = httpx.post(f"{prefect.url}/logs/filter", json=chosen, timeout=TIMEOUT).raise_for_status().json()
    return [str(each["message"]) for each in found]


def await_completion(db: Connection, run_id: UUID) -> None:
    wait_until(lambda: bool(get_run(db, run_id).status == "completed"), "the run completes")


@pytest.mark.parametrize("through_connection", [False, True], ids=["plain", "through context.connection"])
def test_an_owner_that_was_taken_for_dead_is_refused_when_it_writes(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str, through_connection: bool
) -> None:
    imports = "import asyncio\nimport signal\nimport threading\n"
    rewrite(
        cli,
        chain,
        ("import asyncio\n", imports),
        ("import Workflow", "import AsyncStepContext, Workflow"),
        (STEP_B, STEP_B_THAT_FREEZES),
    )
    db.execute("CREATE TABLE written (attempt int)")
    cli.write("freeze")
    limits = {"PGFLOW_LEASE": "600", "PGFLOW_SWEEP_INTERVAL": "0.5", "PGFLOW_RECONCILE_INTERVAL": "600"}
    first = services.start("worker", **limits)
    run_id = run_workflow(db, chain, {"through_connection": through_connection}).id
    wait_until(lambda: psutil.Process(first.process.pid).status() == psutil.STATUS_STOPPED, "the worker is frozen")
    former = prefect.find_flow_run(run_id)["id"]
    expire_leases(db)

    gate = cli.write("gate")  # where the second worker's b waits
    services.start("worker", **limits)
    wait_until(lambda: cli.executions() == ["a", "b", "b"], "another worker has taken the run")
    assert value(db, "SELECT stale_writes FROM pgflow_prefect.owners") == 0
    first.process.send_signal(signal.SIGCONT)
    first.await_line(f"run {run_id} of {chain!r}: Superseded")
    assert prefect.read_flow_run(former)["state_name"] == "Superseded"
    wait_until(lambda: f"run {run_id} {STALE}" in read_logs(prefect, former), "its log says so")
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}, "it has written nothing, and failed nothing"
    # Its completion; and, where that is a statement of ours, the claim of the next step with it.
    assert value(db, "SELECT stale_writes FROM pgflow_prefect.owners") in (1, 2)

    gate.unlink()
    await_completion(db, run_id)
    assert get_state(db, run_id, "c").step_result == {"sum": 2}
    shown = cli("status", str(run_id))
    assert re.search(r"refused (1 write|2 writes) of former owners", shown.out), shown.out
    assert value(db, "SELECT array_agg(attempt) FROM written") == ([2] if through_connection else None)
    keys = (cli.directory / "keys").read_text(encoding="utf-8").split()
    assert keys == [f"{run_id}/b"] * 2, "the service that b calls can tell that both are the same"
    assert cli.executions() == ["a", "b", "b", "c"], "who was refused does not try to get it back"
    prefect.await_state(run_id, "Completed")
    prefect.await_task_states(run_id, {"a": "Cached", "b": "Completed", "c": "Completed"})


def test_a_run_that_a_living_worker_holds_is_taken_by_force_only(
    services: Services, db: Connection, cli: CommandLine, prefect: PrefectView, chain: str
) -> None:
    gate = cli.write("gate")
    worker = services.start("worker", PGFLOW_LEASE="60", PGFLOW_RECONCILE_INTERVAL="600")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    former = prefect.find_flow_run(run_id)["id"]
    holder = value(db, "SELECT held_by FROM pgflow_prefect.owners")
    assert str(holder).endswith(f":{worker.process.pid}")

    refused = cli("run", "--resume", str(run_id), PGFLOW_LEASE="2")
    assert refused.code == 1
    assert f"run {run_id} is held by {holder}" in refused.err
    assert "waiting 2 s for the lease to run out" in refused.err
    assert "--force takes it from there" in refused.err
    assert cli.executions() == ["a", "b"], "the worker goes on, and no other process has begun"

    process = cli.start("run", "--resume", str(run_id), "--force", PGFLOW_LEASE="2")
    worker.await_line("it was taken over")
    wait_until(lambda: prefect.read_flow_run(former)["state_name"] == "Superseded", "the worker has stopped")
    wait_until(lambda: cli.executions() == ["a", "b", "b"], "b executes again")
    assert get_run(db, run_id).status == "pending", "stopping does not fail it"
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}
    gate.unlink()
    out, err = process.communicate(timeout=TIMEOUT)

    assert (process.returncode, err) == (0, ""), out
    assert get_run(db, run_id).status == "completed"
    assert cli.executions() == ["a", "b", "b", "c"]
    assert prefect.find_flow_run(run_id)["state_name"] == "Completed"
    assert worker.process.poll() is None, "the worker lives, for the next run"
