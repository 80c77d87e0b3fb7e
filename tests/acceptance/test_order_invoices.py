"""The example of a map writes an invoice for each order."""

import json

import pytest

from pgflow_prefect.shipped import shipped_path
from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection
from tests.engine import get_state

pytestmark = pytest.mark.once

RUN = ("run", "order_invoices", "--handlers", str(shipped_path("flows", "order_invoices.py")))


def test_each_order_has_its_invoice_and_an_order_that_fails_stops_no_other(cli: CommandLine, db: Connection) -> None:
    db.execute(shipped_path("flows", "order_invoices", "workflow.sql").read_bytes())
    orders = [
        {"number": 1, "country": "DE", "net": "100.00"},
        {"number": 2, "country": "CH", "net": "50.00", "cancelled": True},
        {"number": 3, "country": "AT", "net": "10.00"},
    ]

    ran = cli(*RUN, "--payload", json.dumps({"orders": orders}))
    failed = cli(*RUN, "--payload", json.dumps({"orders": [{"number": 4, "country": "XX", "net": 1}, *orders]}))

    assert ran.code == 0
    run_id = ran.find_run_id()
    assert get_state(db, run_id, "invoice").step_result == [
        {"order": 1, "tax": "19.00", "total": "119.00"},
        {"order": 3, "tax": "2.00", "total": "12.00"},
    ]
    assert get_state(db, run_id, "summary").step_result == {"invoices": 2, "total": "131.00"}
    assert failed.code == 1
    assert "there is no tax rate for 'XX'" in failed.err
    ends = db.execute(
        "SELECT status FROM pgflow.step_items WHERE run_id <> %s ORDER BY item_index", [run_id]
    ).fetchall()
    assert ends == [("failed",), ("completed",), ("completed",), ("completed",)]
