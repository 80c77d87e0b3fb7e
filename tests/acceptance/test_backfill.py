"""`backfill` and its commands: what a person types and reads, and that worker and serve execute the dates."""

import json
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import CHAIN, column, define, value

RANGE = ("--from", "2026-01-01", "--to", "2026-01-03")

HANDLERS = """
from pgflow_prefect import StepContext, Workflow

workflow = Workflow("SLUG")


@workflow.step
def a(context: StepContext) -> str:
    assert context.logical_date is not None
    return context.logical_date.isoformat()
"""


@pytest.fixture
def without_prefect(outside: CommandLine, product_dsn: str, db: Connection) -> CommandLine:
    """The command with this test's database, in which there is a workflow, and no Prefect server."""
    define(db, "chain", CHAIN)
    return replace(outside, environment={**outside.environment, "PGFLOW_DSN": product_dsn, "TZ": "UTC"})


def test_the_commands_start_show_and_steer_a_backfill(without_prefect: CommandLine, db: Connection) -> None:
    cli = without_prefect
    assert cli("backfill", "list").out.startswith("no backfills: ")
    arguments = ("backfill", "chain", *RANGE, "--cron", "0 9 * * *", "--timezone", "Europe/Berlin")
    preview = cli(*arguments, "--dry-run")
    assert preview.lines == [
        "logical date\tdata since\twould\tstatus\trun",
        *(f"2026-01-0{n} 08:00:00\t{before} 08:00:00\tstart a run\t-\t-" for n, before in PREVIEWED),
        "3 dates: nothing was started",
    ]
    assert value(db, "SELECT count(*) FROM pgflow.backfills") == 0

    started = cli(*arguments, "--max-active", "2", "--payload", '{"region": "north"}')
    assert (started.code, started.err) == (0, "")
    number = str(value(db, "SELECT id FROM pgflow.backfills"))
    assert started.lines[0] == f"backfill {number} of workflow 'chain': 3 dates, 1 planned, 2 under way"
    shown = cli("backfill", "show", number)
    assert f"backfill {number} of workflow 'chain': running" in shown.lines
    assert "cron 0 9 * * * (Europe/Berlin); oldest first, 2 at a time, on existing: none" in shown.out
    run_id = str(value(db, "SELECT id FROM pgflow.runs ORDER BY logical_date LIMIT 1"))
    assert f"2026-01-01 08:00:00\tstarted\tpending\t{run_id}\t" in shown.lines
    assert f"for the date 2026-01-01 08:00:00, with the data since 2025-12-31 08:00:00; backfill {number}" in (
        cli("status", run_id).lines
    )
    assert "logical date" in cli("runs").lines[0].split("\t")
    again = json.loads(cli(*arguments, "--dry-run", "--json").out)
    assert [each["action"] for each in again] == ["leave", "leave", "start"]

    assert cli("backfill", "pause", number, "--reason", "too much").lines == [
        f"backfill {number} is paused: 3 dates, 1 planned, 2 under way"
    ]
    assert "too much" in cli("backfill", "show", number).lines
    assert json.loads(cli("backfill", "resume", number, "--json").out)["status"] == "running"
    cancelled = cli("backfill", "cancel", number, "--runs")
    assert cancelled.lines == [f"backfill {number} is cancelled: 3 dates, 2 ended (2 failed), 1 left"]
    listed = json.loads(cli("backfill", "list", "--workflow", "chain", "--json").out)
    assert [(each["id"], each["status"], each["left_out"]) for each in listed] == [(int(number), "cancelled", 1)]
    assert f"{number}\tchain\tcancelled" in cli("backfill", "list").out


PREVIEWED = [(1, "2025-12-31"), (2, "2026-01-01"), (3, "2026-01-02")]


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("chian", *RANGE, "--every", "1d"), "(did you mean 'chain'?)"),
        (("chain", *RANGE), "give one of --cron"),
        (("chain", *RANGE, "--every", "1d", "--payload", "[1]"), "the payload of a backfill of workflow"),
        (("chain", *RANGE, "--every", "1d", "--payload", "{"), "the payload is not JSON"),
        (("chain", *RANGE, "--every", "1d", "--max-active", "0"), "--max-active"),
        (("chain", *RANGE, "--every", "1d", "--on-existing", "some"), "--on-existing"),
        (("chain", "--from", "2020-01-01", "--to", "2026-01-01", "--every", "1h"), "more than 10,000 dates"),
        (("show", "77"), "unknown backfill 77"),
        (("resume", "77"), "unknown backfill 77"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(
    without_prefect: CommandLine, arguments: tuple[str, ...], problem: str
) -> None:
    refused = without_prefect("backfill", *arguments)
    assert refused.code == 2
    assert problem in " ".join(refused.err.split())


@pytest.mark.once
def test_a_backfill_that_has_ended_can_not_be_steered(without_prefect: CommandLine, db: Connection) -> None:
    number = str(value(db, "SELECT pgflow.start_backfill('chain', ARRAY['2026-01-01'::timestamptz])"))
    assert without_prefect("backfill", "cancel", number).code == 0
    refused = without_prefect("backfill", "resume", number)
    assert (refused.code, refused.find_error()) == (
        1,
        f"backfill {number} can't go on: it is cancelled. Start another backfill.",
    )


@pytest.mark.parametrize("service", ["worker", "serve"])
def test_a_service_executes_the_dates_one_after_the_other(
    service: str, services: Services, cli: CommandLine, db: Connection, prefect: PrefectView
) -> None:
    slug = f"daily_{uuid4().hex[:8]}"
    define(db, slug, {"a": []})
    cli.write(f"flows/{slug}.py", HANDLERS.replace("SLUG", slug))
    services.start(service)
    cli("enable", slug)
    assert cli("backfill", slug, "--from", "2026-01-01", "--to", "2026-01-02", "--every", "1d").code == 0
    wait_until(lambda: value(db, "SELECT status FROM pgflow.backfills") == "completed", "the backfill ends")
    assert column(db, "SELECT step_result FROM pgflow.step_states ORDER BY created_at") == [
        "2026-01-01T00:00:00+00:00",
        "2026-01-02T00:00:00+00:00",
    ]
    number = value(db, "SELECT id FROM pgflow.backfills")
    for run_id in column(db, "SELECT id FROM pgflow.runs"):
        assert isinstance(run_id, UUID)
        assert f"backfill:{number}" in prefect.find_flow_run(run_id)["tags"]
