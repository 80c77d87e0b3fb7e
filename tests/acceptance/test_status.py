"""What `runs` and `status` tell of runs and of who executes them."""

import json
import re
from uuid import UUID

import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, wait_until
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


@pytest.mark.once
def test_a_watched_run_that_fails_says_so_with_its_exit_code(cli: CommandLine, db: Connection, chain: str) -> None:
    run_id = run_workflow(db, chain, {}).id
    db.execute("SELECT pgflow.fail_step(%s, 'a', 'broken')", [run_id])
    shown = cli("status", str(run_id), "--watch", "--json")
    assert shown.code == 1
    assert json.loads(shown.out)["run"]["status"] == "failed"
    assert cli("status", str(run_id)).code == 0, "looking at it is no failure"


@pytest.mark.once
def test_what_no_process_holds_is_told(cli: CommandLine, db: Connection, chain: str) -> None:
    run_id = run_workflow(db, chain, {}).id
    assert cli("status", str(run_id)).lines[1] == (
        f"no process holds it, and no worker or bridge has served workflow '{chain}' yet: "
        f"`pgflow-prefect worker --adopt` takes it, or `pgflow-prefect run --resume {run_id}`"
    )
    assert cli("enable", chain).code == 0
    later = run_workflow(db, chain, {}).id
    assert cli("status", str(later)).lines[1] == (
        "no process holds it: a worker or a bridge takes it, or `pgflow-prefect run --resume`"
    )


@pytest.mark.once
@pytest.mark.parametrize(("since", "shown"), [("1h", True), ("7d", True), ("0s", False), ("2020-01-01", True)])
def test_runs_since_a_moment(cli: CommandLine, db: Connection, chain: str, since: str, shown: bool) -> None:
    run_id = run_workflow(db, chain, {}).id
    listed = cli("runs", "--since", since, "--status", "pending", "--workflow", chain)
    assert listed.code == 0
    assert (str(run_id) in listed.out) is shown


@pytest.mark.once
@pytest.mark.parametrize("since", ["yesterday", "5", "-1h", "99999999999999d"])
def test_a_moment_that_is_none_is_refused(cli: CommandLine, since: str) -> None:
    refused = cli("runs", f"--since={since}")
    assert refused.code == 2
    assert (
        refused.find_error()
        == f"--since {since!r} is neither a time like 30m, 2h or 7d nor a date and time like 2026-01-31T09:30"
    )


@pytest.mark.once
def test_a_run_that_was_resumed_while_another_process_holds_it_is_left_alone(
    services: Services, cli: CommandLine, db: Connection, chain: str
) -> None:
    gate = cli.write("gate")
    services.start("worker", PGFLOW_LEASE="60")  # however slow this machine is, the worker keeps it
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    refused = cli("run", "--resume", str(run_id), PGFLOW_LEASE="2")
    assert refused.code == 1
    assert re.search(r"error: run .* is held by .*; --force takes it from there", refused.err)
    gate.unlink()
    wait_until(lambda: get_run(db, run_id).status == "completed", "the worker completes it")
    assert cli.executions() == ["a", "b", "c"]


def test_every_command_takes_latest_and_the_beginning_of_an_id(cli: CommandLine, db: Connection, chain: str) -> None:
    first = run_workflow(db, chain, {}, UUID("aaaaaaaa-0000-4000-8000-000000000001")).id
    second = run_workflow(db, chain, {}, UUID("aaaaaaaa-1000-4000-8000-000000000002")).id

    for command in (["status"], ["timeline", "--json"], ["graph", "--run"]):
        shown = {name: cli(*command, name) for name in ("latest", "aaaaaaaa-0", str(first), str(second), "AAAAAAAA1")}
        assert {name: (each.code, each.err) for name, each in shown.items()} == dict.fromkeys(shown, (0, ""))
    assert str(second) in cli("status", "latest").lines[0]
    assert str(first) in cli("status", "aaaaaaaa-0").lines[0]
    cancelled = cli("cancel", "aaaaaaaa0", "--json")
    assert json.loads(cancelled.out)["run"]["id"] == str(first)
    assert json.loads(cli("retry", "aaaaaaaa-0000", "--json").out) == {
        "run": json.loads(cancelled.out)["run"]
        | {
            "status": "pending",
            "ended_as": None,
            "error_message": None,
            "finished_at": None,
            "epoch": get_run(db, first).epoch,
        },
        "enabled": False,
    }
    resumed = cli("run", "--resume", "latest")
    assert (resumed.code, resumed.find_run_id()) == (0, second)
    assert get_run(db, first).status == "pending", "it is not the one that was meant"


@pytest.mark.once
def test_a_cancelled_run_is_called_so_wherever_it_is_shown(cli: CommandLine, db: Connection, chain: str) -> None:
    cancelled, failed = run_workflow(db, chain, {}).id, run_workflow(db, chain, {}).id
    db.execute("SELECT pgflow.cancel_run(%s, 'changed our mind')", [cancelled])
    db.execute("SELECT pgflow.fail_run(%s, 'cancelled, says the carrier')", [failed])

    assert cli("status", str(cancelled)).lines[0].endswith(": cancelled (failed)")
    assert cli("status", str(failed)).lines[0].endswith(": failed")
    assert str(failed) not in cli("runs", "--workflow", chain, "--status", "cancelled").out
    listed = {line.split("\t")[0]: line.split("\t")[2] for line in cli("runs", "--workflow", chain).lines[1:]}
    assert listed == {str(failed): "failed", str(cancelled): "cancelled (failed)"}
    for command in (["status"], ["timeline"]):
        shown = json.loads(cli(*command, str(cancelled), "--json").out)
        run = shown.get("run") if command == ["status"] else shown
        assert (run["status"], run["ended_as"]) == ("failed", "cancelled")
        run = json.loads(cli(*command, str(failed), "--json").out)
        run = run["run"] if command == ["status"] else run
        assert (run["status"], run["ended_as"]) == ("failed", "failed")
    [run] = json.loads(cli("runs", "--workflow", chain, "--status", "cancelled", "--json").out)
    assert (run["id"], run["ended_as"]) == (str(cancelled), "cancelled")


@pytest.mark.once
def test_a_beginning_that_several_ids_have_is_refused_with_these(cli: CommandLine, db: Connection, chain: str) -> None:
    ids = [run_workflow(db, chain, {}, UUID(f"aaaaaaaa-{number}000-4000-8000-000000000000")).id for number in range(7)]
    for command in (["status"], ["cancel"], ["retry"], ["timeline"], ["graph", "--run"], ["run", "--resume"]):
        refused = cli(*command, "aaaa")
        assert refused.code == 2
        listed = ", ".join(map(str, ids[:5]))
        assert refused.find_error() == f"run 'aaaa' is not unique: {listed}, …. Type more of the id"
    assert {get_run(db, run_id).status for run_id in ids} == {"pending"}


@pytest.mark.once
def test_a_beginning_that_no_id_has_is_unknown_and_so_is_the_latest_of_none(cli: CommandLine) -> None:
    unknown, none = cli("status", "abc"), cli("cancel", "latest")
    assert (unknown.code, none.code) == (2, 2)
    assert unknown.find_error() == "unknown run 'abc'; `pgflow-prefect runs` shows the newest"
    assert (
        none.find_error()
        == "there is no run yet: start one with `pgflow-prefect run`, or SELECT pgflow.run_workflow(…)"
    )


@pytest.mark.once
def test_a_run_of_a_disabled_workflow_says_why_it_waits(cli: CommandLine, db: Connection, chain: str) -> None:
    run_id = run_workflow(db, chain, {}).id
    assert cli("disable", chain).code == 0
    assert cli("status", str(run_id)).lines[1] == (
        f"no process holds it, and workflow {chain!r} is disabled: no worker and no bridge takes it. "
        f"`pgflow-prefect enable {chain}`, then `pgflow-prefect worker --adopt`; "
        f"or `pgflow-prefect run --resume {run_id}`"
    )


@pytest.mark.once
def test_a_sync_step_that_was_cancelled_reads_as_prefect_has_it(
    services: Services, cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    gate = cli.write("gate")
    path = f"flows/{chain}.py"
    text = (cli.directory / path).read_text(encoding="utf-8").replace("import asyncio", "import time")
    cli.write(path, text.replace("async def b", "def b").replace("await asyncio.sleep", "time.sleep"))
    services.start("worker", PGFLOW_LEASE="2")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    assert "b\trunning (pending)\tRunning\t1" in cli("status", str(run_id)).out
    assert cli("cancel", str(run_id)).code == 0
    prefect.await_state(run_id, "Cancelled")
    assert "b\tcancelled (failed)\tCancelled\t1" in cli("status", str(run_id)).out
    gate.unlink()
