"""A payload that does not fit what a handler says of it begins no run, whichever way it comes."""

from uuid import uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import define, value

pytestmark = pytest.mark.once

HANDLERS = """
import datetime as dt

from pgflow_prefect import Workflow

workflow = Workflow({slug!r})


@workflow.step
def load(payload: dt.date) -> str:
    return payload.isoformat()


@workflow.step
def report(load: str, payload: dt.date) -> str:
    return load


flow = workflow.flow
"""
REASON = "step 'load': argument 'payload' does not fit its annotation: Input should be a valid date"


@pytest.fixture
def slug(cli: CommandLine, db: Connection) -> str:
    slug = f"dated_{uuid4().hex[:8]}"
    define(db, slug, {"load": [], "report": ["load"]})
    cli.write(f"flows/{slug}.py", HANDLERS.format(slug=slug))
    return slug


def test_run_refuses_a_payload_before_there_is_a_run(cli: CommandLine, db: Connection, slug: str) -> None:
    refused = cli("run", slug, "--payload", '"tomorrow"')
    assert refused.code == 2
    assert refused.find_error().startswith(f"workflow '{slug}' can't begin with this payload: {REASON}")
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 0
    assert cli("run", slug, "--payload", '"2026-07-01"').code == 0


@pytest.mark.parametrize("service", ["worker", "serve"])
def test_a_payload_from_prefects_form_is_refused_before_there_is_a_run(
    services: Services, db: Connection, prefect: PrefectView, slug: str, service: str
) -> None:
    services.start(service)
    flow_run = prefect.press_run(slug, "tomorrow")

    wait_until(lambda: prefect.read_flow_run(flow_run)["state_name"] == "Failed", "the flow run fails")
    assert REASON in prefect.read_flow_run(flow_run)["state"]["message"]
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 0
    prefect.press_run(slug, "2026-07-01")
    wait_until(
        lambda: value(db, "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'") == 1, "the run completes"
    )


def test_a_payload_keeps_every_digit_from_the_command_line_to_json(cli: CommandLine, db: Connection) -> None:
    slug = f"exact_{uuid4().hex[:8]}"
    define(db, slug, {"echo": []})
    db.execute("CREATE SCHEMA IF NOT EXISTS app")
    db.execute("CREATE FUNCTION app.echo(input jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT input'")
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'echo', 'sql', 'app.echo')", [slug])
    numbers = '{"long": 12345678901234567.89, "money": 1.10, "big": 18446744073709551617}'
    cli.write("numbers.json", numbers)
    for payload in (numbers, "@numbers.json"):
        ran = cli("run", slug, "--payload", payload, "--json")
        shown = cli("status", "latest", "--json").out
        listed = cli("runs", "--workflow", slug, "--limit", "1", "--json").out
        assert value(db, "SELECT step_result->'payload' = %s::jsonb FROM pgflow.step_states", numbers) is True
        for printed, times in ((ran.out, 1), (shown, 2), (listed, 1)):
            for number in ("12345678901234567.89", "1.10", "18446744073709551617"):
                assert printed.count(f": {number}") == times, printed
        db.execute("DELETE FROM pgflow.step_states")
        db.execute("DELETE FROM pgflow.runs")
