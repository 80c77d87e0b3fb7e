"""A step on a work pool, with Prefect's own worker: its process dies, and so does the worker that waits for it."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import LiteralString
from uuid import uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, expire_leases, kill, wait_until
from tests.acceptance.test_deploy import pool, prefect_worker
from tests.conftest import Connection
from tests.engine import column, define, get_run, run_workflow, value

pytestmark = pytest.mark.once

__all__ = ["pool"]

HANDLERS = """
import os
import time
from pathlib import Path

from pgflow_prefect import StepContext, Workflow

workflow = Workflow("{slug}")


@workflow.step
def heavy(payload: str, context: StepContext) -> dict[str, int]:
    begun = Path(payload, f"begun-{{context.attempt}}.part")
    begun.write_text(str(os.getpid()))
    begun.rename(begun.with_suffix(""))
    while not Path(payload, f"go-{{context.attempt}}").exists():
        time.sleep(0.02)
    return {{"attempt": context.attempt, "process": os.getpid()}}
"""


def test_a_step_on_a_work_pool_outlives_its_process_and_the_worker_that_waits(
    cli: CommandLine, services: Services, db: Connection, prefect: PrefectView, pool: str, tmp_path: Path
) -> None:
    slug = f"pooled_{uuid4().hex[:8]}"
    define(db, slug, {"heavy": []})
    cli = services.cli = replace(
        cli, environment={**cli.environment, "PGFLOW_WORK_POOLS": json.dumps({"big": {"pool": pool}})}
    )
    cli.write(f"flows/{slug}.py", HANDLERS.format(slug=slug))
    assert "work-pool big" in cli("bind", slug, "heavy", "--work-pool", "big", "--retries", "1").out
    assert cli("validate", slug).code == 0

    def read_process(attempt: int) -> int:
        begun = tmp_path / f"begun-{attempt}"
        wait_until(begun.exists, f"a process of the pool has begun attempt {attempt}")
        return int(begun.read_text())

    with prefect_worker(cli, pool, tmp_path / "elsewhere"):
        first = services.start("worker", f"flows/{slug}.py")
        run_id = run_workflow(db, slug, str(tmp_path)).id
        os.kill(read_process(1), signal.SIGKILL)
        db.execute("UPDATE pgflow_prefect.external_claims SET claimed_until = 'epoch'")  # as after a lease
        process = read_process(2)
        waits: LiteralString = "SELECT task_run_id FROM pgflow_prefect.task_runs WHERE state_name = 'Deferred'"
        former = value(db, waits)
        kill(first)
        expire_leases(db)
        services.start("worker", f"flows/{slug}.py")
        wait_until(lambda: value(db, waits) != former, "another worker waits for the same attempt")
        (tmp_path / "go-2").touch()
        wait_until(lambda: get_run(db, run_id).status == "completed", "the run completes")
    assert column(db, "SELECT step_result FROM pgflow.step_states") == [{"attempt": 2, "process": process}]
    assert not (tmp_path / "begun-3").exists()
    prefect.await_task_states(run_id, {"heavy": "Completed"})
