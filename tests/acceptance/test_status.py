"""What `runs` and `status` tell of runs and of who executes them."""

import json
import re

import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, Services, wait_until
from tests.conftest import Connection
from tests.engine import get_run, run_workflow


def test_a_watched_run_is_shown_to_its_end(services: Services, cli: CommandLine, db: Connection, chain: str) -> None:
    gate = cli.write("gate")
    services.start("worker")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    holder = cli("status", str(run_id)).lines[1]
    watching = cli.start("status", str(run_id), "--watch")
    gate.unlink()

    out, err = watching.communicate(timeout=TIMEOUT)
    assert (watching.returncode, err) == (0, "")
    assert re.fullmatch(r"held by [\w.-]+:\d+", holder)
    assert f"run {run_id} of workflow '{chain}': completed" in out
    assert "c\tcompleted\tCompleted\t1" in out


def test_a_watched_run_that_fails_says_so_with_its_exit_code(cli: CommandLine, db: Connection, chain: str) -> None:
    run_id = run_workflow(db, chain, {}).id
    db.execute("SELECT pgflow.fail_step(%s, 'a', 'broken')", [run_id])
    shown = cli("status", str(run_id), "--watch", "--json")
    assert shown.code == 1
    assert json.loads(shown.out)["run"]["status"] == "failed"
    assert cli("status", str(run_id)).code == 0, "looking at it is no failure"


def test_what_nobody_holds_is_told(cli: CommandLine, db: Connection, chain: str) -> None:
    run_id = run_workflow(db, chain, {}).id
    assert cli("status", str(run_id)).lines[1] == (
        "nobody holds it: a worker or a bridge takes it, or `pgflow-prefect run --resume`"
    )


@pytest.mark.parametrize(("since", "shown"), [("1h", True), ("7d", True), ("0s", False), ("2020-01-01", True)])
def test_runs_since_a_moment(cli: CommandLine, db: Connection, chain: str, since: str, shown: bool) -> None:
    run_id = run_workflow(db, chain, {}).id
    listed = cli("runs", "--since", since, "--status", "pending", "--workflow", chain)
    assert listed.code == 0
    assert (str(run_id) in listed.out) is shown


@pytest.mark.parametrize("since", ["yesterday", "5", "-1h", "99999999999999d"])
def test_a_moment_that_is_none_is_refused(cli: CommandLine, since: str) -> None:
    refused = cli("runs", f"--since={since}")
    assert refused.code == 2
    assert refused.find_error() == f"--since {since!r}: give 30m, 2h or 7d, or a date and time like 2026-01-31T09:30"


def test_a_run_that_was_resumed_while_another_process_holds_it_is_left_alone(
    services: Services, cli: CommandLine, db: Connection, chain: str
) -> None:
    gate = cli.write("gate")
    services.start("worker", PGFLOW_LEASE="2")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    refused = cli("run", "--resume", str(run_id), PGFLOW_LEASE="2")
    assert refused.code == 1
    assert re.search(r"error: run .* is held by .*; --force takes it from there", refused.err)
    gate.unlink()
    wait_until(lambda: get_run(db, run_id).status == "completed", "the worker completes it")
    assert cli.executions() == ["a", "b", "c"]
