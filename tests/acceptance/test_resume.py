"""`run --resume`: what is completed is not executed again."""

import os
import signal

import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, find_only_run, wait_until
from tests.conftest import Connection
from tests.engine import get_run, get_state, statuses


def test_a_failed_run_is_reopened_and_only_what_is_not_completed_executes(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    cli.write("broken")
    run_id = cli("run", chain).find_run_id()
    assert cli.executions() == ["a", "b"]
    cli.remove("broken")

    resumed = cli("run", "--resume", str(run_id))

    assert (resumed.code, resumed.err) == (0, "")
    assert "a\tCached" in resumed.lines
    assert cli.executions() == ["a", "b", "b", "c"]
    run = get_run(db, run_id)
    assert (run.status, run.error_message) == ("completed", None)
    assert get_state(db, run_id, "a").attempts == 1
    assert get_state(db, run_id, "b").attempts == 2
    assert prefect.find_flow_run(run_id)["state_name"] == "Completed"
    prefect.await_task_states(run_id, {"a": "Cached", "b": "Completed", "c": "Completed"})

    again = cli("run", "--resume", str(run_id))

    assert (again.code, again.err) == (0, "")
    assert again.lines == [f"run {run_id} is completed: nothing to do"]
    assert len(cli.executions()) == 4
    assert prefect.count_flow_runs(chain) == 2


def test_the_run_of_a_killed_process_goes_on_at_once_on_the_same_machine(
    cli: CommandLine, db: Connection, chain: str
) -> None:
    gate = cli.write("gate")
    process = cli.start("run", chain, PGFLOW_LEASE="600")
    wait_until(lambda: "b" in cli.executions(), "b executes")
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and its parent has not taken note of it
    run_id = find_only_run(db)
    gate.unlink()

    resumed = cli("run", "--resume", str(run_id), PGFLOW_LEASE="600")

    assert (resumed.code, resumed.err) == (0, "")
    assert cli.executions() == ["a", "b", "b", "c"]
    process.wait(TIMEOUT)


def test_an_interrupted_run_stays_pending_and_says_how_to_go_on(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    gate = cli.write("gate")
    process = cli.start("run", chain)
    wait_until(lambda: "b" in cli.executions(), "b executes")

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)

    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    assert "interrupted" in err
    run_id = find_only_run(db)
    assert f"run {run_id} is pending; go on with it: pgflow-prefect run --resume {run_id}" in out
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}

    gate.unlink()
    resumed = cli("run", "--resume", str(run_id))

    assert resumed.code == 0
    assert cli.executions() == ["a", "b", "b", "c"]
    assert get_run(db, run_id).status == "completed"
    prefect.await_task_states(run_id, {"a": "Cached", "b": "Completed", "c": "Completed"})


@pytest.mark.parametrize("pause", [0.02, 0], ids=["waits", "is_busy"])
def test_a_terminated_run_stays_pending_without_a_traceback(
    pause: float, cli: CommandLine, db: Connection, chain: str
) -> None:
    """Also where the event loop is always within a step: a signal there is not to be lost, nor to break anything."""
    handlers = cli.directory / "flows" / f"{chain}.py"
    cli.write(f"flows/{chain}.py", handlers.read_text(encoding="utf-8").replace("sleep(0.02)", f"sleep({pause})"))
    cli.write("gate")
    process = cli.start("run", chain)
    wait_until(lambda: "b" in cli.executions(), "b executes")

    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=TIMEOUT)

    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "Traceback" not in out + err
    assert f"pgflow-prefect run --resume {find_only_run(db)}" in out
    assert statuses(db, find_only_run(db)) == {"a": "completed", "b": "pending"}
    cli.remove("gate")
    assert cli("run", "--resume", str(find_only_run(db))).code == 0, "no process has it"
