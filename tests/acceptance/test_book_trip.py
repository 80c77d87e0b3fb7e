"""The example of a map of children books a trip, each leg as a run of its own."""

import json

import pytest

from pgflow_prefect.shipped import shipped_path
from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection
from tests.engine import get_state

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
