"""The example of a map of children books a trip, each leg as a run of its own; and what a killed process leaves."""

import json
import os

import pytest

from pgflow_prefect.shipped import shipped_path
from tests.acceptance.conftest import TIMEOUT, CommandLine, wait_until
from tests.conftest import Connection
from tests.engine import column, get_state, value

pytestmark = pytest.mark.once

FILE = str(shipped_path("flows", "book_trip.py"))


def test_each_leg_is_a_run_that_the_same_command_executes(cli: CommandLine, db: Connection) -> None:
    db.execute(shipped_path("flows", "book_trip", "workflow.sql").read_bytes())
    checked = cli("validate", "book_trip", "--handlers", FILE)
    ran = cli("run", "book_trip", "--handlers", FILE, "--payload", json.dumps({"places": ["Bern", "Basel", "Ghent"]}))
    assert checked.code == 0, checked.out
    assert "child book_leg" in checked.out
    assert ran.code == 0, ran.err
    run_id = ran.find_run_id()
    assert get_state(db, run_id, "confirm").step_result == {"text": "Bern - Basel, Basel - Ghent", "price": "190"}
    shown = cli("status", str(run_id))
    assert "step book[1] is run" in shown.out
    assert "runs book_leg" in cli("graph", "book_trip").out
    exported = cli("export", "book_trip").out
    assert "child_workflow = 'book_leg'" in exported
    db.execute(exported.encode())  # again: changes nothing
    pushed = cli("push", FILE)  # agrees
    assert pushed.code == 0, pushed.err
    crowded = cli("serve", FILE, "--limit", "1")
    assert crowded.code == 2, crowded.err
    assert "'book_trip', which waits for one of 'book_leg'" in crowded.err


NESTED = """
from pathlib import Path
from time import sleep

from pgflow_prefect import Child, Workflow

inner = Workflow("inner")


@inner.step
def pay(payload: int) -> int:
    with Path("paid").open("a") as file:
        file.write("paid ")
    while Path("gate").exists():
        sleep(0.05)
    return payload


outer = Workflow("outer")
outer.bind("settle", Child("inner", payload="payload"))


@outer.step
def tell(settle: dict[str, int]) -> int:
    return settle["pay"]
"""


def test_a_killed_process_loses_no_child_and_starts_no_second_one(cli: CommandLine, db: Connection) -> None:
    file = cli.write("nested.py", NESTED)
    gate = cli.write("gate")
    assert cli("push", str(file), "--yes").code == 0
    process = cli.start("run", "outer", "--handlers", str(file), "--payload", "7", PGFLOW_LEASE="600")
    wait_until((cli.directory / "paid").exists, "the child executes")
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    [parent] = column(db, "SELECT id FROM pgflow.runs WHERE workflow_slug = 'outer'")
    gate.unlink()

    resumed = cli("run", "--resume", str(parent), "--handlers", str(file), PGFLOW_LEASE="600")

    process.wait(TIMEOUT)
    assert resumed.code == 0, resumed.err
    [child] = column(db, "SELECT id FROM pgflow.runs WHERE workflow_slug = 'inner'")
    assert value(db, "SELECT step_result FROM pgflow.step_states WHERE step_slug = 'tell'") == 7
    assert value(db, "SELECT attempts FROM pgflow.step_states WHERE run_id = %s", child) == 2
    assert value(db, "SELECT attempts FROM pgflow.step_states WHERE step_slug = 'settle'") == 1
