"""Prefect's server goes away in the middle of a run, and comes back: PostgreSQL does not wait for it."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import get_run, run_workflow, value
from tests.faults.servers import Prefect

AWAY = float(os.environ.get("AWAY_SECONDS", "20"))
"""Seconds for which Prefect's server is away, and it takes some more to start: say 60 for a thorough test.

Without `PGFLOW_`, for of what begins so the tests hear nothing.
"""


@pytest.fixture
def server(tmp_path: Path, make_database: Callable[[str | None], str]) -> Iterator[Prefect]:
    with Prefect(tmp_path / "server", make_database(None)) as own:
        yield own


@pytest.fixture
def cli(outside: CommandLine, product_dsn: str, server: Prefect) -> CommandLine:
    """The command with a server of this test's own, and all of Prefect's settings at their defaults."""
    return replace(
        outside, environment={**outside.environment, "PGFLOW_DSN": product_dsn, "PREFECT_API_URL": server.url}
    )


@pytest.fixture
def services(cli: CommandLine) -> Iterator[Services]:
    found = Services(cli)
    yield found
    found.stop()


def await_completion(db: Connection, run_id: UUID, when: str) -> None:
    wait_until(lambda: bool(get_run(db, run_id).status == "completed"), f"run {run_id} completes {when}")


@pytest.mark.timeout(300 + AWAY)
def test_runs_do_not_wait_for_prefect_and_are_shown_when_it_is_back(
    services: Services, db: Connection, cli: CommandLine, server: Prefect, chain: str
) -> None:
    gate = cli.write("gate")
    worker = services.start("worker", PGFLOW_RECONCILE_INTERVAL="5")
    under_way = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    server.stop()
    gone = time.monotonic()

    gate.unlink()
    await_completion(db, under_way, "without Prefect, which is away until this test has it back")
    took = time.monotonic() - gone
    begun = [run_workflow(db, chain, {}).id for _ in range(3)]
    while time.monotonic() < gone + AWAY:
        assert worker.process.poll() is None, worker.log.read_text(encoding="utf-8")
        time.sleep(0.5)
    server.start()
    back = time.monotonic()
    for run_id in begun:
        await_completion(db, run_id, "when Prefect is back")
    print(f"steps under way: {took:.1f} s; Prefect away: {back - gone:.0f} s", end="; ")
    print(f"runs begun meanwhile: {time.monotonic() - back:.1f} s after that", end="; ")

    assert Counter(cli.executions()) == dict.fromkeys("abc", 4), "each step was executed once"
    assert value(db, "SELECT max(attempts) FROM pgflow.step_states") == 1
    prefect = PrefectView(server.url, db)
    for run_id in (under_way, *begun):
        prefect.await_state(run_id, "Completed")
        prefect.await_task_states(run_id, dict.fromkeys("abc", "Completed"))
    assert prefect.count_flow_runs(chain) == 4
    print(f"all shown: {time.monotonic() - back:.1f} s")
