"""Runs that others execute: Prefect shows them, holds no slot for them, and lets go of them at once."""

import signal
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.acceptance.test_deploy import pool, prefect_worker
from tests.conftest import Connection
from tests.engine import CHAIN, complete, define, get_run, run_workflow, statuses, value

__all__ = ["pool"]

WORK = """
import time
from pathlib import Path

from pgflow_prefect import Workflow

workflow = Workflow("SLUG")


@workflow.step
def second(first: int, payload: int) -> int:
    with Path("spans").open("a") as file:
        file.write(f"begin {payload}\\n")
    while Path("gate").exists():
        time.sleep(0.02)
    with Path("spans").open("a") as file:
        file.write(f"end {payload}\\n")
    return first + payload


@workflow.step
def beside() -> int:
    return 1
"""


def is_waiting(db: Connection, run_id: UUID, step: str) -> bool:
    statement = "SELECT count(*) FROM pgflow_prefect.task_runs WHERE run_id = %s AND step_slug = %s AND state_name = %s"
    return value(db, statement, run_id, step, "Waiting") == 1


def test_a_run_that_waits_holds_no_slot_and_two_never_work_at_once(
    cli: CommandLine, services: Services, db: Connection
) -> None:
    slug = f"waits_{uuid4().hex[:8]}"
    define(db, slug, {"first": [], "beside": [], "second": ["first"]})
    cli.write(f"flows/{slug}.py", WORK.replace("SLUG", slug))
    worker = services.start("worker", "--concurrency", "1")
    ids = [run_workflow(db, slug, number).id for number in range(3)]
    wait_until(lambda: all(is_waiting(db, each, "first") for each in ids), "all three runs wait")

    gate = cli.write("gate")
    for run_id in ids:
        complete(db, run_id, "first", 40)
    spans = cli.directory / "spans"
    wait_until(spans.exists, "one of them works")
    wait_until(lambda: value(db, "SELECT count(*) FROM pgflow.step_states WHERE step_slug = 'second'") == 3, "ready")
    gate.unlink()
    wait_until(lambda: all(get_run(db, each).status == "completed" for each in ids), "all complete")
    words = spans.read_text(encoding="utf-8").split()
    assert words[::4] == ["begin"] * 3
    assert words[2::4] == ["end"] * 3
    assert words[1::4] == words[3::4], "one after the other"
    assert worker.process.poll() is None


def test_sigterm_hands_runs_that_wait_back_at_once(
    cli: CommandLine, services: Services, db: Connection, prefect: PrefectView
) -> None:
    slug = f"waits_{uuid4().hex[:8]}"
    define(db, slug, CHAIN)
    assert cli("observe", slug).code == 0
    first = services.start("worker")
    run_id = run_workflow(db, slug).id
    wait_until(lambda: is_waiting(db, run_id, "a"), "it waits")
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 0
    assert value(db, "SELECT lease_until = '-infinity' FROM pgflow_prefect.owners")
    assert prefect.find_flow_run(run_id)["state_name"] == "HandedBack"

    complete(db, run_id, "a", 1)
    services.start("worker", "--workflow", slug)
    wait_until(lambda: is_waiting(db, run_id, "b"), "another worker waits on")
    for step in "bc":
        complete(db, run_id, step, 1)
    prefect.await_state(run_id, "Completed")
    prefect.await_task_states(run_id, dict.fromkeys("abc", "Completed"))
    assert value(db, "SELECT max(attempts) FROM pgflow.step_states") == 0, "nothing was executed"


@pytest.mark.once
def test_the_deployments_of_a_whole_import_execute_nothing(
    cli: CommandLine, services: Services, db: Connection, prefect: PrefectView, pool: str, tmp_path: Path
) -> None:
    slugs = [f"live_{uuid4().hex[:8]}" for _ in range(2)]
    for slug in slugs:
        define(db, slug, CHAIN)
    assert cli("import", "--all", "--deploy", "--work-pool", pool).code == 0
    services.start("bridge")
    ids = [run_workflow(db, slug).id for slug in slugs]
    with prefect_worker(cli, pool, tmp_path / "elsewhere"):
        for step in "abc":  # by the workers that there were before
            for run_id in ids:
                wait_until(partial(is_waiting, db, run_id, step), f"Prefect waits for {step}")
                claimed = db.execute("SELECT * FROM pgflow_prefect.claim_external_step(%s, %s)", [run_id, step])
                assert claimed.fetchone() is not None
                complete(db, run_id, step, step)
        for run_id in ids:
            prefect.await_state(run_id, "Completed")
            prefect.await_task_states(run_id, dict.fromkeys("abc", "Completed"))
    assert [statuses(db, each) for each in ids] == [dict.fromkeys("abc", "completed")] * 2
    assert value(db, "SELECT max(attempts) FROM pgflow.step_states") == 1, "only by those who claimed"
