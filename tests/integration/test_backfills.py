"""Backfills in SQL: each date has one run, so many at a time, whatever dies in between."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString
from uuid import UUID

import psycopg
import pytest

from tests.conftest import Connect, Connection
from tests.engine import (
    CHAIN,
    INVALID,
    NOT_READY,
    UNKNOWN,
    cancel,
    column,
    define,
    fail,
    finish,
    get_run,
    refused,
    reopen,
    run_workflow,
    value,
    wait_until_blocked,
)

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
START: LiteralString = """
    SELECT pgflow.start_backfill(%(slug)s, %(dates)s, payload => %(payload)s, max_active => %(max_active)s,
                                 on_existing => %(on_existing)s, newest_first => %(newest_first)s,
                                 stop_on_failure => %(stop_on_failure)s)
"""
SWEEP: LiteralString = "SELECT backfill_id, decided, problem, is_paused FROM pgflow_prefect.advance_backfills(200)"
TAKE: LiteralString = """
    SELECT run_id FROM pgflow_prefect.take_runs(%s, 100, adopt => false, held_by => 'the tests', lease => 600,
                                                max_recoveries => 3, besides => '{}', expired => true)
"""


def days(count: int) -> list[datetime]:
    return [FIRST + timedelta(days=number) for number in range(count)]


def start(db: Connection, dates: Sequence[datetime], slug: str = "daily", **options: object) -> int:
    """Start a backfill and return its id."""
    given = {"slug": slug, "dates": [*dates], "payload": "{}", "max_active": 1, "on_existing": "none"}
    asked = given | {"newest_first": False, "stop_on_failure": False} | options
    return int(str(value_of(db, START, asked)))


def value_of(db: Connection, statement: LiteralString, parameters: dict[str, object]) -> object:
    [[found]] = db.execute(statement, parameters).fetchall()
    return found


def states(db: Connection, backfill: int) -> list[str]:
    """Return the state of each date, in the order of the dates."""
    statement = "SELECT state FROM pgflow.backfill_dates WHERE backfill_id = %s ORDER BY logical_date"
    return [str(each) for each in column(db, statement, backfill)]


def status(db: Connection, backfill: int) -> object:
    return value(db, "SELECT status FROM pgflow.backfills WHERE id = %s", backfill)


def pending(db: Connection) -> list[UUID]:
    """Return the runs that are under way, the earliest date first."""
    found = column(db, "SELECT id FROM pgflow.runs WHERE status = 'pending' ORDER BY logical_date, id")
    return [each for each in found if isinstance(each, UUID)]


def dates_of(db: Connection) -> list[datetime]:
    """Return the logical date of each run that has one."""
    found = column(db, "SELECT logical_date FROM pgflow.runs WHERE logical_date IS NOT NULL ORDER BY logical_date")
    return [each.astimezone(UTC) for each in found if isinstance(each, datetime)]


@pytest.fixture
def daily(db: Connection) -> Connection:
    define(db, "daily", CHAIN)
    return db


def test_the_end_of_a_run_starts_the_next_date_in_its_own_transaction(daily: Connection, connect: Connect) -> None:
    db = daily
    backfill = start(db, days(3))
    assert states(db, backfill) == ["started", "planned", "planned"]
    with db.transaction():
        finish(db, pending(db)[0])
        assert states(db, backfill) == ["ended", "started", "planned"]
        assert states(connect(), backfill) == ["started", "planned", "planned"], "not before the commit"
    while left := pending(db):
        finish(db, left[0])
    assert states(db, backfill) == ["ended"] * 3
    assert status(db, backfill) == "completed"
    assert dates_of(db) == days(3)


@pytest.mark.parametrize("end", [finish, lambda db, run_id: fail(db, run_id, "a"), cancel])
def test_every_end_of_a_run_counts(daily: Connection, end: Any) -> None:
    backfill = start(daily, days(2))
    end(daily, pending(daily)[0])
    assert states(daily, backfill) == ["ended", "started"]


def test_a_run_knows_its_date_and_finds_it_in_its_payload(daily: Connection) -> None:
    backfill = start(daily, days(2), payload='{"region": "north", "logical_date": "of the user"}', max_active=2)
    daily.execute("SET timezone = 'Asia/Tokyo'")  # the payload must not depend on it
    rows = daily.execute("""
        SELECT payload, lower(data_interval), upper(data_interval), backfill_id FROM pgflow.runs ORDER BY logical_date
    """).fetchall()
    (first, *no_interval, _), (second, began, ended, of) = rows
    assert first == {"region": "north", "logical_date": "2026-01-01T00:00:00+00:00"}
    assert no_interval == [None, None], "nothing says when its data begin"
    assert second == {
        "region": "north",
        "logical_date": "2026-01-02T00:00:00+00:00",
        "interval_start": "2026-01-01T00:00:00+00:00",
        "interval_end": "2026-01-02T00:00:00+00:00",
    }
    assert [began, ended] == days(2)
    assert of == backfill


def test_so_many_runs_are_under_way_and_not_more(daily: Connection) -> None:
    backfill = start(daily, days(7), max_active=3)
    seen = []
    while left := pending(daily):
        seen.append(len(left))
        finish(daily, left[-1])
    assert max(seen) == 3
    assert states(daily, backfill) == ["ended"] * 7


def test_the_newest_date_comes_first_if_that_is_wanted(daily: Connection) -> None:
    start(daily, days(3), newest_first=True)
    order = []
    while left := pending(daily):
        order.append(get_run(daily, left[0]).logical_date)
        finish(daily, left[0])
    assert order == days(3)[::-1]


def test_started_twice_a_date_has_one_run(daily: Connection) -> None:
    first = start(daily, days(3), max_active=3)
    second = start(daily, days(4), max_active=3)
    assert states(daily, first) == ["started"] * 3
    assert states(daily, second) == ["left", "left", "left", "started"]
    assert dates_of(daily) == days(4)


def test_two_backfills_that_start_at_one_moment_make_one_run_a_date(daily: Connection, connect: Connect) -> None:
    other = connect()
    with daily.transaction():
        start(daily, days(3), max_active=3)
        late = start(other, days(3), max_active=3)
        assert states(other, late) == ["planned"] * 3, "it waits for no transaction"
    daily.execute(SWEEP)
    assert states(daily, late) == ["left"] * 3
    assert dates_of(daily) == days(3)


@pytest.mark.parametrize(
    ("on_existing", "expected"),
    [
        ("none", {"completed": "left", "failed": "left", "cancelled": "left", "pending": "left"}),
        ("failed", {"completed": "left", "failed": "started", "cancelled": "started", "pending": "left"}),
        ("all", {"completed": "started", "failed": "started", "cancelled": "started", "pending": "left"}),
    ],
)
def test_a_date_that_has_a_run_is_treated_as_asked(
    daily: Connection, on_existing: str, expected: dict[str, str]
) -> None:
    db = daily
    start(db, days(4), max_active=4)
    completed, failed, cancelled, _ = before = pending(db)
    finish(db, completed)
    fail(db, failed, "a")
    cancel(db, cancelled)
    previewed = [
        str(each)
        for each in column(db, "SELECT action FROM pgflow.preview_backfill('daily', %s, %s)", days(4), on_existing)
    ]
    backfill = start(db, days(4), max_active=4, on_existing=on_existing)
    assert states(db, backfill) == [*expected.values()]
    assert [action != "leave" for action in previewed] == [state == "started" for state in expected.values()]
    runs = column(db, "SELECT run_id FROM pgflow.backfill_dates WHERE backfill_id = %s ORDER BY logical_date", backfill)
    for run_id, former, state in zip(runs, before, expected.values(), strict=True):
        assert (run_id != former) == (on_existing == "all" and state == "started")


def test_a_reopened_run_is_awaited_by_the_backfill_that_reopened_it(daily: Connection) -> None:
    db = daily
    start(db, days(2), max_active=2)
    for run_id in pending(db):
        fail(db, run_id, "a")
    backfill = start(db, days(2), on_existing="failed")
    assert states(db, backfill) == ["started", "planned"]
    finish(db, pending(db)[0])
    assert states(db, backfill) == ["ended", "started"]
    finish(db, pending(db)[0])
    assert status(db, backfill) == "completed"
    assert len(dates_of(db)) == 2


def test_a_run_that_a_schedule_has_started_counts_as_the_run_of_its_date(daily: Connection) -> None:
    create = """
        SELECT pgflow_prefect.create_run('daily', '{}', gen_random_uuid(), gen_random_uuid(), 'me', 60, 3, %s, %s)
    """
    daily.execute(create, [FIRST, FIRST - timedelta(days=1)])
    assert states(daily, start(daily, days(2), max_active=2)) == ["left", "started"]
    interval = value(daily, "SELECT lower(data_interval) FROM pgflow.runs WHERE logical_date = %s", FIRST)
    assert interval == FIRST - timedelta(days=1)


def test_a_run_that_is_reopened_by_hand_takes_its_place_again(daily: Connection) -> None:
    db = daily
    backfill = start(db, days(3), stop_on_failure=True)
    [failed] = pending(db)
    fail(db, failed, "a")
    assert status(db, backfill) == "paused"
    assert value(db, "SELECT note FROM pgflow.backfills") == f"run {failed} of 2026-01-01T00:00:00+00:00 has failed"
    reopen(db, failed)
    db.execute("SELECT pgflow.resume_backfill(%s)", [backfill])
    assert states(db, backfill) == ["started", "planned", "planned"], "one at a time"
    finish(db, failed)
    assert states(db, backfill) == ["ended", "started", "planned"]


def test_a_run_that_another_session_is_reopening_has_not_ended(daily: Connection, connect: Connect) -> None:
    backfill, other = start(daily, days(2)), connect()
    [run_id] = pending(daily)
    end_unnoted(daily, run_id)
    with other.transaction():
        reopen(other, run_id)
        daily.execute(SWEEP)
    daily.execute(SWEEP)
    assert (states(daily, backfill), pending(daily)) == (["started", "planned"], [run_id])
    finish(daily, run_id)
    assert states(daily, backfill) == ["ended", "started"]


def test_a_run_that_is_reopened_while_ends_are_noted_has_not_ended(daily: Connection, connect: Connect) -> None:
    backfill, other = start(daily, days(3), max_active=2), connect()
    first, second = pending(daily)
    end_unnoted(daily, first)
    end_unnoted(daily, second)
    daily.execute("""
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_advisory_xact_lock(1, 99); RETURN NEW; END $$;
        CREATE TRIGGER wait BEFORE UPDATE ON pgflow.backfill_dates FOR EACH ROW
            WHEN (NEW.state = 'ended') EXECUTE FUNCTION wait()
    """)
    other.execute("SELECT pg_advisory_lock(1, 99)")
    with ThreadPoolExecutor(1) as pool:
        sweep = pool.submit(daily.execute, SWEEP)
        try:
            wait_until_blocked(other, daily.info.backend_pid)
            reopen(other, second)
        finally:
            other.execute("SELECT pg_advisory_unlock_all()")
        sweep.result()
    assert states(daily, backfill) == ["ended", "started", "started"]
    assert second in pending(daily)


def end_unnoted(db: Connection, run_id: UUID) -> None:
    """Fail a run in a transaction that leaves its backfill to a service."""
    with db.transaction():
        db.execute("SET LOCAL pgflow.leaves_backfills = 'on'")
        fail(db, run_id, "a")


@pytest.mark.parametrize(
    ("initially", "mode"), [("INITIALLY DEFERRED", "SELECT"), ("INITIALLY IMMEDIATE", "SET CONSTRAINTS ALL DEFERRED")]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_end_of_a_run_leaves_deferred_what_its_callers_transaction_has_deferred(
    daily: Connection, initially: LiteralString, mode: LiteralString, when: str
) -> None:
    daily.execute("CREATE TABLE parents (id int PRIMARY KEY)")
    daily.execute(f"CREATE TABLE children (id int REFERENCES parents DEFERRABLE {initially})".encode())
    backfill = start(daily, days(2))
    with daily.transaction():
        daily.execute(mode)
        if when == "before":
            daily.execute("INSERT INTO children VALUES (1)")
        finish(daily, pending(daily)[0])
        if when == "after":
            daily.execute("INSERT INTO children VALUES (1)")
        daily.execute("INSERT INTO parents VALUES (1)")
    daily.execute(SWEEP)  # the trial of the deferred check may have failed
    assert states(daily, backfill) == ["ended", "started"]


def test_a_copy_that_becomes_an_installation_of_its_own_pauses_its_backfills(daily: Connection) -> None:
    ended = start(daily, days(2))
    daily.execute("SELECT pgflow.cancel_backfill(%s)", [ended])
    running = start(daily, days(5)[2:])
    daily.execute("SELECT pgflow_prefect.new_installation()")
    assert (status(daily, running), status(daily, ended)) == ("paused", "cancelled")


def test_a_paused_backfill_starts_nothing_until_it_is_resumed(daily: Connection) -> None:
    db = daily
    backfill = start(db, days(2))
    for _ in range(2):
        db.execute("SELECT pgflow.pause_backfill(%s, 'too much load')", [backfill])
    finish(db, pending(db)[0])
    db.execute(SWEEP)
    assert (states(db, backfill), status(db, backfill)) == (["ended", "planned"], "paused")
    db.execute("SELECT pgflow.resume_backfill(%s)", [backfill])
    assert (states(db, backfill), status(db, backfill)) == (["ended", "started"], "running")


@pytest.mark.parametrize("runs", [True, False])
def test_a_cancelled_backfill_leaves_its_planned_dates(daily: Connection, runs: bool) -> None:
    db = daily
    backfill = start(db, days(4), max_active=2)
    under_way = pending(db)
    db.execute("SELECT pgflow.cancel_backfill(%s, %s, 'wrong dates')", [backfill, runs])
    assert [get_run(db, each).ended_as for each in under_way] == (["cancelled"] * 2 if runs else [None] * 2)
    for each in pending(db):
        finish(db, each)
    assert states(db, backfill) == ["ended", "ended", "left", "left"]
    assert status(db, backfill) == "cancelled"
    assert value(db, "SELECT finished_at IS NOT NULL FROM pgflow.backfills") is True
    with refused(NOT_READY, "it is cancelled"):
        db.execute("SELECT pgflow.resume_backfill(%s)", [backfill])


@pytest.mark.parametrize(
    ("problem", "options", "code"),
    [
        ('unknown workflow "other"', {"slug": "other"}, UNKNOWN),
        ("has no dates", {"dates": []}, INVALID),
        ("has 10001 dates, more than 10000", {"dates": [FIRST - timedelta(hours=n) for n in range(10_001)]}, INVALID),
        ("lies in the future", {"dates": [datetime(2999, 1, 1, tzinfo=UTC)]}, INVALID),
        ("is no object", {"payload": "[1]"}, INVALID),
        ("can't have 0 runs under way", {"max_active": 0}, INVALID),
        ("can't have 1001 runs under way", {"max_active": 1001}, INVALID),
        ('can\'t be "some"', {"on_existing": "some"}, INVALID),
    ],
)
def test_a_backfill_that_makes_no_sense_is_refused(
    daily: Connection, problem: str, options: dict[str, object], code: str
) -> None:
    with refused(code, problem):
        start(daily, **({"dates": days(1)} | options))  # type: ignore[arg-type]
    assert value(daily, "SELECT count(*) FROM pgflow.backfills") == 0


@pytest.mark.parametrize("function", ["pause_backfill", "resume_backfill", "cancel_backfill", "advance_backfill"])
def test_an_unknown_backfill_is_an_error(daily: Connection, function: str) -> None:
    with refused(UNKNOWN, "unknown backfill 7"):
        daily.execute(f"SELECT pgflow.{function}(7)".encode())


def test_live_runs_of_all_workflows_are_taken_before_those_of_backfills(daily: Connection) -> None:
    db = daily
    define(db, "other", CHAIN)
    for slug in ("daily", "other"):
        db.execute("SELECT pgflow_prefect.enable_workflow(%s)", [slug])
    start(db, days(2), max_active=2)
    live = [run_workflow(db, slug).id for slug in ("daily", "other")]
    taken = column(db, TAKE, ["daily", "other"])
    assert set(taken[:2]) == set(live)
    assert len(taken) == 4
    # Those of dead owners, too: a live run that waits is nearer to a person.
    db.execute("UPDATE pgflow_prefect.owners SET lease_until = 'epoch'")
    newer = run_workflow(db, "other").id
    taken = column(db, TAKE, ["daily", "other"])
    assert set(taken[:3]) == {*live, newer}
    assert len(taken) == 5


def test_a_run_of_a_deleted_backfill_is_still_taken(daily: Connection) -> None:
    daily.execute("SELECT pgflow_prefect.enable_workflow('daily')")
    start(daily, days(1))
    daily.execute("DELETE FROM pgflow.backfills")
    assert len(column(daily, TAKE, ["daily"])) == 1


# What goes wrong


FAILING: LiteralString = """
    CREATE FUNCTION public.fails() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.logical_date > '2026-01-01' THEN RAISE 'this day is a holiday'; END IF; RETURN NEW; END $$;
"""
TRIGGER: LiteralString = (
    "CREATE {} TRIGGER fails AFTER INSERT ON pgflow.runs {} FOR EACH ROW EXECUTE FUNCTION public.fails()"
)


@pytest.mark.parametrize("deferred", [True, False])
def test_a_run_that_can_not_be_started_undoes_no_completion_and_pauses_the_backfill(
    daily: Connection, deferred: bool
) -> None:
    db = daily
    backfill = start(db, days(2))
    db.execute(FAILING)
    parts = ("CONSTRAINT", "DEFERRABLE INITIALLY DEFERRED") if deferred else ("", "")
    db.execute(TRIGGER.format(*parts).encode())
    [run_id] = pending(db)
    finish(db, run_id)
    assert get_run(db, run_id).status == "completed"
    assert states(db, backfill) == ["started", "planned"], "the note went with the error"
    [(of, decided, problem, is_paused)] = db.execute(SWEEP).fetchall()
    assert (of, decided, problem, is_paused) == (backfill, 0, "this day is a holiday", True)
    assert status(db, backfill) == "paused"
    db.execute("DROP TRIGGER fails ON pgflow.runs")
    db.execute("SELECT pgflow.resume_backfill(%s)", [backfill])
    assert states(db, backfill) == ["ended", "started"]


def test_an_error_of_one_backfill_keeps_no_other_one_waiting(daily: Connection) -> None:
    db = daily
    define(db, "other", CHAIN)
    broken, other = start(db, days(2)), start(db, days(2), slug="other")
    db.execute(FAILING.replace("NEW.logical_date", "NEW.workflow_slug = 'daily' AND NEW.logical_date"))
    db.execute(TRIGGER.format("", "").encode())
    for run_id in pending(db):
        db.execute("UPDATE pgflow.runs SET status = 'completed', finished_at = now() WHERE id = %s", [run_id])
    assert {row[0]: row[3] for row in db.execute(SWEEP).fetchall()} == {broken: True, other: False}
    assert states(db, other) == ["ended", "started"]


@pytest.mark.parametrize("steer", ["cancel", "pause"])
def test_an_error_of_a_backfill_that_starts_no_runs_keeps_no_other_one_waiting(daily: Connection, steer: str) -> None:
    db = daily
    define(db, "other", CHAIN)
    broken, other = start(db, days(3), max_active=2), start(db, days(2), slug="other")
    db.execute(f"SELECT pgflow.{steer}_backfill(%s)".encode(), [broken])
    db.execute("""
        CREATE FUNCTION public.fails() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no note, please'; END $$;
        CREATE TRIGGER fails BEFORE UPDATE ON pgflow.backfill_dates FOR EACH ROW
            WHEN (OLD.state = 'started' AND OLD.logical_date = '2026-01-02') EXECUTE FUNCTION public.fails()
    """)
    for run_id in pending(db):
        db.execute("UPDATE pgflow.runs SET status = 'completed', finished_at = now() WHERE id = %s", [run_id])
    assert {row[0]: row[2:] for row in db.execute(SWEEP).fetchall()} == {
        broken: ("no note, please", False),
        other: (None, False),
    }
    assert status(db, broken) == {"cancel": "cancelled", "pause": "paused"}[steer]
    assert states(db, other) == ["ended", "started"]


def test_the_end_of_a_run_does_not_wait_for_a_session_that_holds_the_backfill(
    daily: Connection, connect: Connect
) -> None:
    db, holder = daily, connect()
    backfill = start(db, days(2))
    with holder.transaction():
        holder.execute("SELECT FROM pgflow.backfills FOR UPDATE")
        db.execute("SET lock_timeout = '60s'")
        finish(db, pending(db)[0])
    assert states(db, backfill) == ["started", "planned"]
    db.execute(SWEEP)
    assert states(db, backfill) == ["ended", "started"], "the sweep finds what was left"


def finish_unless_blocked(db: Connection, other: Connection, run_id: UUID) -> bool:
    """End a run on `other`, and return whether that waited for no lock. If it waits, cancel it."""
    with ThreadPoolExecutor(1) as thread:
        ending = thread.submit(finish, other, run_id)
        while not ending.done():
            if value(db, "SELECT cardinality(pg_blocking_pids(%s)) > 0", other.info.backend_pid):
                db.execute("SELECT pg_cancel_backend(%s)", [other.info.backend_pid])
                wait([ending])
                return False
        ending.result()
    return True


def test_the_end_of_a_run_does_not_wait_for_a_session_that_starts_the_next_date(
    daily: Connection, connect: Connect
) -> None:
    db, holder, other = daily, connect(), connect()
    backfill = start(db, days(2))
    with holder.transaction():
        start(holder, days(2)[1:])
        assert finish_unless_blocked(db, other, pending(db)[0])
        assert states(db, backfill) == ["ended", "planned"]
    db.execute(SWEEP)
    assert states(db, backfill) == ["ended", "left"], "the sweep finds what was left"
    assert dates_of(db) == days(2)


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_session_that_holds_the_lock_of_the_next_date_is_named(
    daily: Connection, connect: Connect, newest_first: bool
) -> None:
    holder = connect()
    backfill = start(daily, days(3), newest_first=newest_first)
    # Any role that may connect can take an advisory lock.
    for each in days(3):
        holder.execute("SELECT pg_advisory_lock(k[1], k[2]) FROM pgflow.find_date_lock('daily', %s) AS l (k)", [each])
    finish(daily, pending(daily)[0])
    for _ in range(2):
        [(found, decided, problem, is_paused)] = daily.execute(SWEEP).fetchall()
        assert (found, decided, is_paused) == (backfill, 0, False)
        assert f"the session {holder.info.backend_pid} of the role postgres holds the lock of 2026-01-02" in str(
            problem
        )
    holder.execute("SELECT pg_advisory_unlock_all()")
    [(_, decided, problem, _)] = daily.execute(SWEEP).fetchall()
    assert (decided, problem) == (1, None)


def test_two_backfills_that_meet_from_both_sides_wait_for_none(daily: Connection, connect: Connect) -> None:
    db, up, down = daily, connect(), connect()
    forward, back = start(db, days(3)), start(db, days(4)[1:], newest_first=True)
    first, last = pending(db)
    with up.transaction(), down.transaction():
        finish(up, first)  # starts the second date
        finish(down, last)  # starts the third date
        assert finish_unless_blocked(db, up, pending(up)[0]), "it wants the third date"
        assert finish_unless_blocked(db, down, pending(down)[-1]), "it wants the second date"
    db.execute(SWEEP)
    assert states(db, forward) == ["ended", "ended", "left"]
    assert states(db, back) == ["left", "ended", "ended"]
    assert dates_of(db) == days(4)


GATE: LiteralString = """
    CREATE FUNCTION public.await_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock(7); RETURN NEW; END $$;
    CREATE TRIGGER gate BEFORE INSERT ON pgflow.runs FOR EACH ROW EXECUTE FUNCTION public.await_gate()
"""


@pytest.mark.parametrize("count", [1, 3])
def test_a_statement_that_is_cancelled_while_it_starts_a_date_keeps_the_ends_of_its_runs(
    daily: Connection, connect: Connect, count: int
) -> None:
    """One cancellation ends one wait, and no second wait begins: the gate stays closed all the time."""
    db, gate, other = daily, connect(), connect()
    define(db, "single", {"a": []})
    backfills = [
        start(db, [FIRST + timedelta(days=10 * number + n) for n in (0, 1)], "single") for number in range(count)
    ]
    runs = pending(db)
    db.execute(GATE)
    end: LiteralString = "SELECT count(pgflow.complete_step(id, 'a', '1')) FROM unnest(%s::uuid[]) AS id"
    with gate.transaction(), ThreadPoolExecutor(1) as thread:
        gate.execute("SELECT pg_advisory_xact_lock(7)")
        ending = thread.submit(value, other, end, runs)
        try:
            wait_until_blocked(db, other.info.backend_pid)
        finally:
            db.execute("SELECT pg_cancel_backend(%s)", [other.info.backend_pid])
        assert ending.result() == count
    assert [get_run(db, each).status for each in runs] == ["completed"] * count
    assert [states(db, each) for each in backfills] == [["started", "planned"]] * count
    db.execute(SWEEP)
    assert [states(db, each) for each in backfills] == [["ended", "started"]] * count
    finish(other, pending(db)[0])
    assert states(db, backfills[0]) == ["ended", "ended"], "the next transaction of the session is as before"


def test_a_sweep_with_nothing_to_do_writes_nothing(daily: Connection) -> None:
    start(daily, days(3))
    paused = start(daily, [FIRST + timedelta(days=40)])
    daily.execute("SELECT pgflow.pause_backfill(%s)", [paused])
    assert daily.execute(SWEEP).fetchall() == []


STOPS: LiteralString = """
    CREATE FUNCTION public.count_write() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM set_config('tests.counter', (current_setting('tests.counter')::int - 1)::text, false);
        IF current_setting('tests.counter')::int = 0 THEN
            PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(60);
        END IF;
        RETURN NULL; END $$;
    CREATE TRIGGER dies AFTER INSERT OR UPDATE ON pgflow.runs FOR EACH STATEMENT EXECUTE FUNCTION public.count_write();
    CREATE TRIGGER dies AFTER INSERT OR UPDATE ON pgflow.step_states FOR EACH STATEMENT
        EXECUTE FUNCTION public.count_write();
    CREATE TRIGGER dies AFTER INSERT OR UPDATE ON pgflow.backfills FOR EACH STATEMENT
        EXECUTE FUNCTION public.count_write();
    CREATE TRIGGER dies AFTER INSERT OR UPDATE ON pgflow.backfill_dates FOR EACH STATEMENT
        EXECUTE FUNCTION public.count_write();
"""


def mortal(connect: Connect, die_at: int) -> Connection:
    """Return a connection whose backend ends at its write of this number."""
    connection = connect()
    connection.execute("SELECT set_config('tests.counter', %s, false)", [str(die_at)])
    return connection


@pytest.mark.parametrize("what", ["start", "end", "sweep"])
def test_killed_between_any_two_writes_each_date_has_one_run(daily: Connection, connect: Connect, what: str) -> None:
    db = daily
    db.execute("SET tests.counter = 0")
    db.execute(STOPS)
    dates = iter(chunks(40, 3))
    survived = False
    for die_at in range(1, 40):
        wanted = next(dates)
        if what != "start":
            start(db, wanted)
        if what == "sweep":
            db.execute("UPDATE pgflow.runs SET status = 'completed' WHERE status = 'pending'")
        try:
            act(mortal(connect, die_at), what, wanted)
            survived = True
        except psycopg.OperationalError:
            pass
        start(db, wanted, max_active=3)  # what was left is done now, and nothing twice
        db.execute(SWEEP)
        while left := pending(db):
            finish(db, left[0])
        assert [each for each in dates_of(db) if each in wanted] == wanted
        if survived:
            break
    assert survived, "it was killed at each of its writes, and then no more"
    assert die_at > 3


def chunks(count: int, size: int) -> Iterator[list[datetime]]:
    everything = days(count * size)
    return (everything[place : place + size] for place in range(0, len(everything), size))


def act(connection: Connection, what: str, dates: Sequence[datetime]) -> None:
    if what == "start":
        start(connection, dates)
    elif what == "sweep":
        connection.execute(SWEEP)
    else:
        finish(connection, pending(connection)[0])


def test_many_dates_that_are_left_are_decided_in_portions(daily: Connection) -> None:
    many = [FIRST + timedelta(hours=number) for number in range(2500)]
    db = daily
    db.execute("""
        INSERT INTO pgflow.runs (workflow_slug, id, payload, status, logical_date)
        SELECT 'daily', gen_random_uuid(), '{}', 'completed', date FROM unnest(%s::timestamptz[]) AS date
    """, [many])  # fmt: skip
    backfill = start(db, many)
    assert states(db, backfill).count("left") == 1000
    decided = 0
    while found := db.execute(SWEEP).fetchall():
        decided += int(str(found[0][1]))
    assert decided == 1500
    assert status(db, backfill) == "completed"


def test_old_backfills_go_once_their_runs_are_gone(daily: Connection) -> None:
    db = daily
    prune: LiteralString = "SELECT pgflow_prefect.prune_backfills('1 microsecond', NULL)"
    start(db, days(1))
    assert value(db, prune) == 0, "it goes on"
    [run_id] = pending(db)
    finish(db, run_id)
    assert value(db, prune) == 0, "its run is there"
    db.execute("SELECT pgflow_prefect.prune_run(%s)", [run_id])
    assert value(db, prune) == 1
    assert value(db, "SELECT count(*) FROM pgflow.backfill_dates") == 0


@pytest.mark.parametrize("maintain", ["SELECT", "ANALYZE"])
def test_pruning_backfills_does_not_read_the_runs_of_others(daily: Connection, maintain: LiteralString) -> None:
    """Counted in rows that are read: old backfills are cheap to find, however many runs and other backfills stay."""
    db = daily
    add_ended: LiteralString = """
        WITH added AS (
            INSERT INTO pgflow.backfills (workflow_slug, max_active, status, finished_at)
            SELECT 'daily', 1, 'completed', clock_timestamp() - %s * interval '1 day'
            FROM generate_series(1, %s) RETURNING id
        ) INSERT INTO pgflow.backfill_dates (backfill_id, logical_date, state, run_id)
        SELECT id, '2026-01-01'::timestamptz + day * interval '1 day', 'ended', gen_random_uuid()
        FROM added, generate_series(1, 50) day
    """
    add_runs: LiteralString = """
        INSERT INTO pgflow.runs (workflow_slug, id, payload, status)
        SELECT 'daily', gen_random_uuid(), '{}', 'completed' FROM generate_series(1, 5000)
    """
    read: LiteralString = """
        SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_xact_user_tables
        WHERE schemaname = 'pgflow' AND relname IN ('runs', 'backfill_dates')
    """
    db.execute(add_runs)
    db.execute(add_ended, [1, 40])
    db.execute(add_ended, [100, 10])
    db.execute(maintain)
    with db.transaction():
        before = int(str(value(db, read)))
        assert value(db, "SELECT pgflow_prefect.prune_backfills('30 days', NULL)") == 10
        spent = int(str(value(db, read))) - before
    assert spent <= 10 * 50 * 2, "each of their dates is read and deleted"


def test_a_deleted_run_counts_as_ended(daily: Connection) -> None:
    db = daily
    backfill = start(db, days(2))
    [run_id] = pending(db)
    db.execute("DELETE FROM pgflow.step_states WHERE run_id = %s", [run_id])
    db.execute("DELETE FROM pgflow.runs WHERE id = %s", [run_id])
    db.execute(SWEEP)
    assert states(db, backfill) == ["ended", "started"]


@pytest.mark.thorough
@pytest.mark.parametrize("maintain", ["SELECT", "ANALYZE", "VACUUM ANALYZE"])
@pytest.mark.parametrize("is_empty", [True, False])
def test_each_of_many_dates_costs_what_each_of_few_does(
    daily: Connection, maintain: LiteralString, is_empty: bool
) -> None:
    """Counted in rows that are read: nothing is quadratic in the dates, whatever statistics there are."""
    db = daily
    if is_empty:
        db.execute(maintain)
    read: LiteralString = """
        SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_xact_user_tables
        WHERE schemaname = 'pgflow'
    """

    def cost(first: datetime, count: int) -> float:
        total = 0
        with db.transaction():  # within one, the statistics are not handed on
            start(db, [first + timedelta(hours=number) for number in range(count)])
            for _ in range(count):
                [run_id] = pending(db)
                before = int(str(value(db, read)))
                finish(db, run_id)
                total += int(str(value(db, read))) - before
        return total / count

    for number in range(6):
        cost(FIRST - timedelta(days=365 + number), 2)
    if not is_empty:
        db.execute(maintain)
    few, many = cost(FIRST, 20), cost(FIRST + timedelta(days=30), 200)
    assert many < 2 * few
