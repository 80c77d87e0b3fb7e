"""A worker that stops at any point, as if its plug were pulled, leaves a run that the next one brings to its end."""

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import httpx
import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Service, Services, wait_until
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, column, define, get_run, run_workflow, statuses, value

HANDLERS = '''
"""Handlers of a chain, in a process that kills itself where STOP_AT says: when both runs have come to that point."""

import asyncio
import functools
import os
import signal
from pathlib import Path

from pgflow_prefect import StepContext, Workflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.services import maintenance, worker
from pgflow_prefect.execution.flow import Execution
from pgflow_prefect.execution.steps.step import Step
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.models import ClaimRequest

workflow = Workflow("chain")
arrived = 0


async def arrive(runs=1):
    global arrived
    arrived += runs
    if arrived == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.Event().wait()


def stop(point, owner, name, *, before=False, where=lambda *args, **kwargs: True):
    function = getattr(owner, name)

    @functools.wraps(function)
    async def stopping(*args, **kwargs):
        if before:
            await arrive()
        result = await function(*args, **kwargs)
        if runs := where(*args, **kwargs):
            await arrive(runs)
        return result

    if os.environ.get("STOP_AT") == point:
        setattr(owner, name, stopping)


stop("taken", worker, "create_submission", before=True)
stop("created", worker, "create_submission")
stop("linked", Store, "link_flow_runs", where=lambda _, links, **__: len(links))
stop("claimed", Store, "perform_tasks", where=lambda _, elements, **__: sum(
    isinstance(each.asked, ClaimRequest) and each.asked.task.step_slug == "b" for each in elements))
stop("handled", PythonHandler, "execute", where=lambda handler, *_: handler.step_slug == "b")
stop("finished", Step, "_perform", where=lambda step: step.slug == "b")
stop("ended", Execution, "execute")
maintenance.reconcile = functools.partial(maintenance.reconcile, grace=1, lag=2)  # no other process is at work here


def note(step: str, payload: dict[str, bool]) -> None:
    with Path("executions").open("a") as file:
        file.write(f"{step}{'+' if payload['through_connection'] else '-'}\\n")


@workflow.step
def a(payload: dict[str, bool]) -> int:
    note("a", payload)
    return 1


@workflow.step
def b(a: int, payload: dict[str, bool], context: StepContext) -> int:
    note("b", payload)
    if payload["through_connection"]:
        context.connection.execute("INSERT INTO written VALUES (%s)", [context.run_id])
    return a + 1


@workflow.step
def c(b: int, payload: dict[str, bool]) -> int:
    note("c", payload)
    return b + 1
'''

AT_COMMIT = """
CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER at_commit AFTER UPDATE ON pgflow.step_states DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
WHEN (new.step_slug = 'b' AND new.status = 'completed') EXECUTE FUNCTION wait_for_the_test();
"""
"""Keeps the COMMIT of a completion of `b` from happening, for as long as the test holds the lock."""

WAITING = """
SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND NOT granted
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
AND query_start < clock_timestamp() - interval '1 second'
"""
"""Those that wait for as long as it takes: a statement about several runs first waits for a moment only."""

LIMITS = {"PGFLOW_LEASE": "2", "PGFLOW_RECONCILE_INTERVAL": "2", "PGFLOW_SWEEP_INTERVAL": "0.5"}

COMPLETED = ("Completed",) * 3


@dataclass(frozen=True)
class Outcome:
    """What is so of a run when its process is dead, and when another one has brought it to its end.

    Attributes:
        executed: the steps whose handlers were executed until then.
        statuses: of a, b, c, as far as they have started.
        again: the steps that are executed after that.
        attempts: of a, b, c in the end.
        shown: the states of their task runs in the run's last flow run.
        flow_runs: of the run in the end; all but the last one have crashed.
        claimed_ahead: that process had claimed `c` with the completion of `b`, where that was a statement of ours: the
            number of that attempt is skipped.
    """

    executed: str
    statuses: tuple[str, ...]
    again: str
    attempts: tuple[int, int, int]
    shown: tuple[str, ...]
    flow_runs: int
    claimed_ahead: bool = False


NOTHING_DONE = Outcome("", ("pending",), "abc", (1, 1, 1), COMPLETED, 1)
B_CLAIMED = Outcome("a", ("completed", "pending"), "bc", (1, 2, 1), ("Cached", "Completed", "Completed"), 2)
B_EXECUTED = replace(B_CLAIMED, executed="ab")
B_COMMITTED = Outcome(
    "ab",
    ("completed", "completed", "pending"),
    "c",
    (1, 1, 1),
    ("Cached", "Cached", "Completed"),
    2,
    claimed_ahead=True,
)
ALL_COMMITTED = Outcome("abc", ("completed",) * 3, "", (1, 1, 1), COMPLETED, 1)


@pytest.fixture
def services(cli: CommandLine) -> Iterator[Services]:
    found = Services(cli)
    yield found
    found.stop()


@dataclass(frozen=True)
class Stage:
    """Two runs of a chain a -> b -> c: what `b` writes in one of them, it writes through `context.connection`."""

    services: Services
    db: Connection
    prefect: PrefectView
    workflow: str

    def begin(self, **environment: str) -> tuple[Service, dict[str, UUID]]:
        """Start a worker and the runs, by the sign that marks each one's executions."""
        worker = self.services.start("worker", **LIMITS, **environment)
        return worker, {
            sign: run_workflow(self.db, self.workflow, {"through_connection": sign == "+"}).id for sign in "+-"
        }

    def check(self, runs: Mapping[str, UUID], expected: Outcome) -> None:
        """Look at the runs after the end of their process, start another one, and look again when it is done."""
        for sign, run_id in runs.items():
            assert tuple(statuses(self.db, run_id).values()) == expected.statuses
            assert self.executed(sign) == expected.executed
        assert self.count_rows() == ("b" not in expected.again), "it is there when the completion is"

        self.services.start("worker", **LIMITS)
        for sign, run_id in runs.items():
            wait_until(lambda run_id=run_id: get_run(self.db, run_id).status == "completed", "the run completes")  # type: ignore[misc]
            assert self.executed(sign) == expected.executed + expected.again
            attempts = "SELECT attempts FROM pgflow.step_states WHERE run_id = %s ORDER BY step_slug"
            skipped = expected.claimed_ahead and sign == "-"
            assert tuple(column(self.db, attempts, run_id)) == ((1, 1, 2) if skipped else expected.attempts)
        assert self.count_rows() == 1, "what is written through the connection is there exactly once"

        for run_id in runs.values():
            self.prefect.await_state(run_id, "Completed")
            self.prefect.await_task_states(run_id, dict(zip("abc", expected.shown, strict=True)))
            assert len(self.find_flow_runs(run_id)) == expected.flow_runs
            wait_until(lambda run_id=run_id: not self.find_open(run_id), "nothing of it is shown as alive")  # type: ignore[misc]
        assert self.prefect.count_flow_runs(self.workflow) == len(runs) * expected.flow_runs

    def executed(self, sign: str) -> str:
        return "".join(each[0] for each in self.services.cli.executions() if each[1] == sign)

    def count_rows(self) -> object:
        return value(self.db, "SELECT count(*) FROM written")

    def find_flow_runs(self, run_id: UUID) -> list[object]:
        found = "SELECT DISTINCT flow_run_id FROM pgflow_prefect.flow_runs WHERE run_id = %s"
        return column(self.db, found, run_id)

    def find_open(self, run_id: UUID) -> list[str]:
        """Return the states of what Prefect shows as not ended: flow runs of this run, and their task runs."""
        flow_runs = [str(each) for each in self.find_flow_runs(run_id)]
        shown = [self.prefect.read_flow_run(each) for each in flow_runs]
        chosen = {"flow_runs": {"id": {"any_": flow_runs}}}
        shown += httpx.post(f"{self.prefect.url}/task_runs/filter", json=chosen, timeout=TIMEOUT).json()
        return [each["state_name"] for each in shown if each["state_type"] not in ("COMPLETED", "CRASHED")]


@pytest.fixture
def stage(services: Services, db: Connection, prefect: PrefectView, cli: CommandLine) -> Stage:
    slug = f"stops_{uuid4().hex[:8]}"
    define(db, slug, CHAIN)
    db.execute("CREATE TABLE written (run_id uuid)")
    cli.write(f"flows/{slug}.py", HANDLERS.replace('Workflow("chain")', f'Workflow("{slug}")'))
    return Stage(services, db, prefect, slug)


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        pytest.param("taken", NOTHING_DONE, id="run taken, flow run not created"),
        pytest.param("created", NOTHING_DONE, id="flow run created, not linked"),
        pytest.param("linked", replace(NOTHING_DONE, flow_runs=2), id="flow run linked, not begun"),
        pytest.param("claimed", B_CLAIMED, id="step claimed"),
        pytest.param("handled", B_EXECUTED, id="handler done"),
        pytest.param("finished", B_COMMITTED, id="finish committed, Prefect has not heard"),
        pytest.param("ended", ALL_COMMITTED, id="run completed, Prefect has not heard"),
    ],
)
def test_a_worker_that_kills_itself(stage: Stage, point: str, expected: Outcome) -> None:
    worker, runs = stage.begin(STOP_AT=point)
    assert worker.wait() == -signal.SIGKILL
    stage.check(runs, expected)


@pytest.mark.parametrize(
    ("commits", "expected"),
    [
        pytest.param(False, B_EXECUTED, id="before the finish commits"),
        pytest.param(True, B_COMMITTED, id="finish committed, process has not heard"),
    ],
)
def test_a_worker_that_is_killed_while_postgres_commits(
    stage: Stage, connect: Connect, commits: bool, expected: Outcome
) -> None:
    stage.db.execute(AT_COMMIT)
    holder = connect()
    holder.execute("SELECT pg_advisory_lock(1)")
    worker, runs = stage.begin()
    wait_until(lambda: len(column(stage.db, WAITING)) == len(runs), "both runs wait for their COMMIT")
    backends = column(stage.db, WAITING)

    worker.process.kill()
    worker.process.wait(TIMEOUT)
    if not commits:
        stage.db.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", [backends])
    holder.execute("SELECT pg_advisory_unlock(1)")
    alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
    wait_until(lambda: value(stage.db, alive, backends) == 0, "what the process left in PostgreSQL has ended")

    stage.check(runs, expected)
