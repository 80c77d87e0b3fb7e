"""Random backfills of the same dates against a naive model: the state of each date, of each run, of each backfill."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from tests.conftest import Connection
from tests.engine import column, define, value

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
START = """
    SELECT pgflow.start_backfill('daily', %s, max_active => %s, on_existing => %s, newest_first => %s,
                                 stop_on_failure => %s)
"""
SWEEP = "SELECT * FROM pgflow_prefect.advance_backfills(200)"


@dataclass(eq=False)  # two runs of a day differ
class Run:
    day: int
    status: str = "pending"


@dataclass(eq=False)
class Backfill:
    days: list[int]
    max_active: int
    on_existing: str
    newest_first: bool
    stop_on_failure: bool
    status: str = "running"
    states: dict[int, str] = field(init=False)
    runs: dict[int, Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = dict.fromkeys(sorted(self.days), "planned")

    def list_days(self, state: str) -> list[int]:
        return [day for day, each in self.states.items() if each == state]


@dataclass
class Model:
    """What backfills are to do, by looking at everything each time."""

    runs: list[Run] = field(default_factory=list)
    backfills: list[Backfill] = field(default_factory=list)

    def find(self, day: int) -> Run | None:
        return next((run for run in reversed(self.runs) if run.day == day), None)

    def start(self, backfill: Backfill) -> None:
        self.backfills.append(backfill)
        self.advance(backfill)

    def advance(self, backfill: Backfill) -> None:
        for day in backfill.list_days("started"):
            if backfill.runs[day].status != "pending":
                backfill.states[day] = "ended"
                if backfill.runs[day].status == "failed" and backfill.stop_on_failure and backfill.status == "running":
                    backfill.status = "paused"
        while backfill.status == "running" and len(backfill.list_days("started")) < backfill.max_active:
            planned = backfill.list_days("planned")
            if not planned:
                break
            self.decide(backfill, planned[-1] if backfill.newest_first else planned[0])
        if not backfill.list_days("planned") + backfill.list_days("started") and backfill.status != "cancelled":
            backfill.status = "completed"

    def decide(self, backfill: Backfill, day: int) -> None:
        run = self.find(day)
        if run is not None and run.status == "failed" and backfill.on_existing == "failed":
            self.reopen(run)
        elif run is not None and (backfill.on_existing != "all" or run.status == "pending"):
            backfill.states[day] = "left"
            return
        else:
            run = Run(day)
            self.runs.append(run)
        backfill.runs[day], backfill.states[day] = run, "started"

    def reopen(self, run: Run) -> None:
        run.status = "pending"
        for each in self.backfills:
            for day in each.list_days("ended"):
                if each.runs[day] is run:
                    each.states[day] = "started"

    def end(self, run: Run, status: str) -> None:
        run.status = status
        for each in self.backfills:
            if any(each.runs[day] is run for day in each.list_days("started")):
                self.advance(each)

    def sweep(self) -> None:
        for each in self.backfills:
            self.advance(each)


class Lab:
    """The model beside the database, which has to show the same after each event."""

    def __init__(self, db: Connection, seed: int) -> None:
        self.db = db
        self.random = random.Random(seed)  # noqa: S311  which events there are is no secret
        self.model = Model()
        self.ids: list[int] = []
        self.events: list[str] = []

    def find_run(self, run: Run) -> UUID:
        """Return the run of the database: the runs of a day come one after the other."""
        place = [each for each in self.model.runs if each.day == run.day].index(run)
        found = column(
            self.db, "SELECT id FROM pgflow.runs WHERE logical_date = %s ORDER BY created_at", to_date(run.day)
        )
        assert isinstance(found[place], UUID)
        return found[place]  # type: ignore[return-value]

    def act(self) -> None:
        doing = self.random.choice([self.start, self.end, self.end, self.end, self.reopen, self.steer])
        self.events.append(doing.__name__)
        doing()
        self.db.execute(SWEEP)
        self.model.sweep()
        assert self.read() == self.expect(), self.events

    def start(self) -> None:
        pick = self.random
        days = pick.sample(range(6), pick.randint(1, 6))
        made = Backfill(
            days, pick.randint(1, 3), pick.choice(["none", "failed", "all"]), pick.random() < 0.5, pick.random() < 0.3
        )
        options = [made.max_active, made.on_existing, made.newest_first, made.stop_on_failure]
        self.ids.append(int(str(value(self.db, START, [*map(to_date, days)], *options))))
        self.model.start(made)

    def end(self) -> None:
        pending = [run for run in self.model.runs if run.status == "pending"]
        if not pending:
            return
        run = self.random.choice(pending)
        run_id, status = self.find_run(run), self.random.choice(["completed", "failed"])
        if status == "completed":
            self.db.execute("SELECT pgflow.complete_step(%s, 'a', '1')", [run_id])
        else:
            self.db.execute("SELECT pgflow.fail_step(%s, 'a', 'broken')", [run_id])
        self.model.end(run, status)

    def reopen(self) -> None:
        failed = [run for run in self.model.runs if run.status == "failed"]
        if failed:
            run = self.random.choice(failed)
            self.db.execute("SELECT pgflow.reopen_run(%s)", [self.find_run(run)])
            self.model.reopen(run)

    def steer(self) -> None:
        if not self.ids:
            return
        place = self.random.randrange(len(self.ids))
        backfill, number = self.model.backfills[place], self.ids[place]
        what = self.random.choice(["pause", "resume", "cancel"])
        if what == "pause" and backfill.status == "running":
            self.db.execute("SELECT pgflow.pause_backfill(%s)", [number])
            backfill.status = "paused"
        elif what == "resume" and backfill.status == "paused":
            self.db.execute("SELECT pgflow.resume_backfill(%s)", [number])
            backfill.status = "running"
            self.model.advance(backfill)
        elif what == "cancel" and backfill.status in {"running", "paused"} and self.random.random() < 0.3:
            self.db.execute("SELECT pgflow.cancel_backfill(%s)", [number])
            backfill.status = "cancelled"
            for day in backfill.list_days("planned"):
                backfill.states[day] = "left"

    def read(self) -> object:
        runs = self.db.execute("SELECT logical_date, status FROM pgflow.runs").fetchall()
        states = self.db.execute("""
            SELECT backfill_id, array_agg(state ORDER BY logical_date) FROM pgflow.backfill_dates GROUP BY 1 ORDER BY 1
        """).fetchall()
        statuses = column(self.db, "SELECT status FROM pgflow.backfills ORDER BY id")
        return sort((to_day(date), status) for date, status in runs), [each for _, each in states], statuses

    def expect(self) -> object:
        runs = sort((run.day, run.status) for run in self.model.runs)
        backfills = self.model.backfills
        return runs, [[*each.states.values()] for each in backfills], [each.status for each in backfills]


def sort(runs: Iterable[tuple[object, object]]) -> list[tuple[str, str]]:
    return sorted((str(day), str(status)) for day, status in runs)


def to_date(day: int) -> datetime:
    return FIRST + timedelta(days=day)


def to_day(date: object) -> int:
    assert isinstance(date, datetime)
    return (date - FIRST).days


@pytest.mark.parametrize("seed", range(8))
def test_random_backfills_do_what_the_model_does(db: Connection, seed: int) -> None:
    define(db, "daily", {"a": []})
    lab = Lab(db, seed)
    for _ in range(60):
        lab.act()
