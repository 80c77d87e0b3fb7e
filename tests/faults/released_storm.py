"""A storm on the released pgflow: our workers and players of its Edge worker take turns while everything fails.

A mover gives the flows to Prefect and back, each second pgflow requeues what it takes for stalled, workers of ours are
killed or stopped until another one has their runs, and PostgreSQL crashes.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from uuid import UUID

import psutil
import psycopg
from psycopg.types.json import Jsonb

from pgflow_prefect.database.implementations.released import describe_released
from pgflow_prefect.shipped import shipped_path
from tests.edge_worker import EdgeFunction, EdgeTask, EdgeWorker
from tests.faults.breaking import break_released_fences
from tests.faults.database import Database
from tests.faults.fleet import Fleet, make_command
from tests.faults.released_check import TOO_MANY, BegunRun, ReleasedEvidence, collect_released, find_released_violations
from tests.faults.released_flows import FLOWS, FREEZE, SECONDS, do_task, make_payload
from tests.faults.servers import PATIENCE, Postgres, Prefect
from tests.faults.storm import make_environment
from tests.faults.troubles import Say
from tests.faults.weathers import SETTINGS
from tests.released_lab import FAKE, install_released, open_flows

_OBSERVATIONS = """
CREATE SCHEMA faults;
CREATE TABLE faults.written (run_id uuid, step_slug text, task_index int);
CREATE TABLE faults.completions (run_id uuid, step_slug text, task_index int, is_ours boolean);
CREATE FUNCTION faults.note_completion() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO faults.completions
    SELECT new.run_id, new.step_slug, new.task_index,
           EXISTS (SELECT FROM pgflow_prefect.moved_flows m WHERE m.worker_id = new.last_worker_id);
    RETURN NULL;
END
$$;
CREATE TRIGGER note_completion AFTER UPDATE OF status ON pgflow.step_tasks FOR EACH ROW
WHEN (new.status = 'completed') EXECUTE FUNCTION faults.note_completion();
"""

_TIMEOUT = 1  # second: after 31 of them, pgflow takes a task for stalled
_HEARTBEAT = 0.2  # seconds between two signs of life of an Edge worker: it soon hears that it is to stop
_PLACES = 4  # runs that a worker executes at a time
# Workers often look for runs that they can take over, and a former owner hears of it by its report alone.
_HASTY = {"PGFLOW_LEASE": "600", "PGFLOW_SWEEP_INTERVAL": "0.5"}
_LOOK = 0.2  # seconds
_PAUSES = 5  # after so many, a broken fence counts as not found
_HEARD = 120.0  # seconds in which the report of a worker that goes on is heard
# What a lease's end means: the owner was stopped for longer than its lease.
_EXPIRE = """
UPDATE pgflow_prefect.run_owners SET lease_until = 'epoch'
WHERE lease_until BETWEEN clock_timestamp() AND '9999-12-31' AND held_by = (
    SELECT o.held_by FROM pgflow_prefect.run_owners o WHERE o.run_id = %s)
RETURNING run_id
"""


@dataclass(frozen=True)
class ReleasedStorm:
    """What is to happen.

    Attributes:
        runs: how many.
        seed: decides what goes wrong and when.
        workers: of ours.
        items: tasks of a map.
        seconds: for which a task works.
        flip: seconds between two moves of the flows; where not given, each waits for tasks of the side that has them.
        kills: seconds between two kills of a worker of ours, at most; where not given, workers are only stopped for a
            while, and the flows stay where they are.
        crashes: how often PostgreSQL crashes.
        broken: break the fences on purpose.
        flows: that runs are started of.
    """

    runs: int
    seed: int
    workers: int = 2
    items: int = 20
    seconds: float = 0.02
    flip: float | None = None
    kills: float | None = 6.0
    crashes: int = 1
    broken: bool = False
    flows: tuple[str, ...] = field(default=tuple(FLOWS))


def run_released_storm(storm: ReleasedStorm, directory: Path, say: Say) -> list[str]:
    """Let it blow in an empty directory, and return what was violated; nothing is left running."""
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres(directory))
        postgres.create_database("prefect")
        prefect = stack.enter_context(Prefect(directory / "server", postgres.make_dsn("prefect")))
        say("PostgreSQL and Prefect are up")
        return _Blowing(storm, postgres, prefect, directory, say).blow()


def install_flows(dsn: str, source: str) -> None:
    """Install the released pgflow, our schema, the storm's flows, and what notes each completion."""
    install_released(dsn, source)
    with open_flows(dsn) as flows:
        for script in describe_released(skips=True).scripts:
            flows.db.execute(shipped_path("sql", script).read_bytes())
        for slug, plan in FLOWS.items():
            flows.define(slug, plan.steps, maps=plan.maps, attempts=4, **plan.options)
        flows.db.execute("UPDATE pgflow.flows SET opt_timeout = %s", [_TIMEOUT])
        flows.db.execute(_OBSERVATIONS)


class _Blowing:
    """One storm while it blows."""

    def __init__(self, storm: ReleasedStorm, postgres: Postgres, prefect: Prefect, directory: Path, say: Say) -> None:
        self._storm, self._postgres, self._say = storm, postgres, say
        self._random = Random(storm.seed)  # noqa: S311
        postgres.create_database("released")
        self._dsn = postgres.make_dsn("released")
        install_flows(self._dsn, FAKE)
        self._database = Database(self._dsn)
        if storm.broken:
            break_released_fences(self._database.connect())
        environment = {
            **make_environment(directory),
            **SETTINGS,
            "PGFLOW_DSN": self._dsn,
            "PREFECT_API_URL": prefect.url,
            SECONDS: str(storm.seconds),
            FREEZE: str(directory / "freeze"),
            **(_HASTY if storm.broken else {}),
        }
        command = make_command(environment, "worker", "tests.faults.released_handlers", "--concurrency", str(_PLACES))
        self._fleet = Fleet(storm.workers, command, directory, environment)
        self._begun: dict[UUID, BegunRun] = {}
        self._over = threading.Event()
        self._freeze = directory / "freeze"
        self._crashed = self._moves = self._paused = 0
        self._failures: list[BaseException] = []

    def blow(self) -> list[str]:
        self._move(here=True)
        with self._fleet, ExitStack() as stack:
            for flow in FLOWS:
                stack.enter_context(EdgeFunction(partial(self._make_edge, flow), self._dsn, f"edge_{flow}"))
            self._await(lambda: self._fleet.count_ready() == self._storm.workers, "the workers are ready")
            acts = [self._requeue, self._break, *([self._flip] if self._storm.kills is not None else [])]
            with ExitStack() as beside:
                for act in acts:
                    beside.enter_context(self._beside(act))
                found = self._start_runs()
            evidence = collect_released(self._database)
        ours = sum(ours for _, ours in evidence.completions.values())
        self._say(f"{len(evidence.runs)} runs, {len(evidence.tasks)} tasks, {ours} completed by workers of ours")
        self._say(f"the flows were moved {self._moves} times, a worker was stopped {self._paused} times")
        problems = [*(found if self._storm.broken else self._judge(evidence)), *self._fleet.faults]
        self._say(f"{len(problems)} violations")
        self._database.close()
        return [f"released: {each}" for each in problems]

    def _judge(self, evidence: ReleasedEvidence) -> list[str]:
        return find_released_violations(evidence, self._begun)

    def _start_runs(self) -> list[str]:
        """Start the runs, some at a time, until all have ended; return what a broken fence has shown."""
        last, before = time.monotonic(), (0, 0)
        while True:
            self._look()
            [[started, ended]] = self._database.read(
                "SELECT count(*) FILTER (WHERE status = 'started'), count(*) FILTER (WHERE status <> 'started') "
                "FROM pgflow.runs"
            )
            [[done]] = self._database.read("SELECT count(*) FROM faults.completions")
            if (progress := (int(str(ended)), int(str(done)))) != before:
                last, before = time.monotonic(), progress
            if self._storm.broken and ((found := self._find_signs()) or self._paused >= _PAUSES):
                return found
            wanted = max(self._storm.runs - len(self._begun), self._is_too_calm())
            for _ in range(min(wanted, self._at_a_time - int(str(started)))):
                self._start_run()
            if not wanted and not started:
                self._say("no run goes on")
                return []
            if time.monotonic() > last + PATIENCE:
                self._say("nothing moves any more")
                return []
            time.sleep(_LOOK)

    @property
    def _at_a_time(self) -> int:
        # A worker that is to take a run away from another needs a free place for it.
        return _PLACES * self._storm.workers // (2 if self._storm.broken else 1)

    def _is_too_calm(self) -> bool:
        """Tell whether not everything has gone wrong yet, so that one more run is wanted."""
        return self._storm.broken or not self._paused or self._crashed < self._storm.crashes

    def _find_signs(self) -> list[str]:
        """Return what shows the broken fences: it is wrong whatever becomes of the runs."""
        return [each for each in self._judge(collect_released(self._database)) if TOO_MANY in each]

    def _start_run(self) -> None:
        number = len(self._begun)
        run_id = UUID(int=self._random.getrandbits(128), version=4)
        run = BegunRun(self._storm.flows[number % len(self._storm.flows)], number, self._storm.items)
        self._begun[run_id] = run
        payload = Jsonb(make_payload(number, run.items))
        # Twice, where the answer to the first one was lost, it is the same run.
        self._database.read(
            "SELECT pgflow.start_flow(%s, %s, %s) WHERE NOT EXISTS (SELECT FROM pgflow.runs WHERE run_id = %s)",
            [run.flow, payload, run_id, run_id],
        )

    def _make_edge(self, flow: str) -> EdgeWorker:
        return EdgeWorker(self._dsn, flow, self._execute, function=f"edge_{flow}", heartbeat=_HEARTBEAT, poll=1)

    def _execute(self, task: EdgeTask) -> object:
        time.sleep(self._storm.seconds)
        return do_task(task.step, task.index, self._begun[task.run_id].number, self._storm.items)

    def _look(self) -> None:
        self._fleet.tend()
        if self._failures:
            raise self._failures[0]

    def _await(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            assert time.monotonic() < deadline, f"waited in vain until {what}"
            self._look()
            time.sleep(_LOOK)
        self._say(what)

    @contextmanager
    def _beside(self, act: Callable[[Database], None]) -> Iterator[None]:
        """Do something again and again while the block runs, on a connection of its own."""

        def repeat() -> None:
            database = Database(self._dsn)
            try:
                while not self._over.is_set():
                    act(database)
            except BaseException as error:  # noqa: BLE001  raised again, in the main thread
                self._failures.append(error)
            finally:
                database.close()

        thread = threading.Thread(target=repeat, name=act.__name__)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _requeue(self, database: Database) -> None:
        with suppress(psycopg.OperationalError):
            database.read("SELECT pgflow.requeue_stalled_tasks()")
        self._over.wait(1.0)

    def _flip(self, database: Database) -> None:
        """Give the flows back to pgflow's workers, and take them again."""
        for here in (False, True):
            if self._storm.flip is None:
                self._await_progress(database)
            else:
                self._over.wait(self._storm.flip)
            self._move(here=here, database=database)

    def _await_progress(self, database: Database) -> None:
        """Return once some tasks were completed, or all is over."""
        count = "SELECT count(*) FROM faults.completions"
        [[before]] = database.read(count)
        wanted = int(str(before)) + self._random.randint(5, 25)
        while int(str(database.read(count)[0][0])) < wanted and not self._over.wait(_LOOK):
            pass

    def _move(self, *, here: bool, database: Database | None = None) -> None:
        statement = "SELECT pgflow_prefect.move_flow(%s)" if here else "SELECT pgflow_prefect.move_flow_back(%s)"
        for flow in FLOWS:
            (database or self._database).read(statement, [flow])
        self._moves += 1

    def _break(self, database: Database) -> None:
        """Stop a worker of ours for a while, kill one, and crash PostgreSQL: each after some more tasks."""
        self._await_progress(database)
        self._pause(database)
        if self._storm.kills is None:
            return
        self._await_progress(database)
        if self._over.wait(self._random.uniform(self._storm.kills / 3, self._storm.kills)):
            return
        self._say(f"killed {self._fleet.kill_one(self._random)}")
        if self._crashed < self._storm.crashes:
            self._crashed += 1
            self._postgres.crash(self._random.uniform(0.5, 2.0))
            self._say("PostgreSQL is back after a crash")

    def _pause(self, database: Database) -> None:
        """Stop a worker in the middle of a task until another one has completed that task; then it reports, too."""
        frozen = self._freeze.with_suffix(".frozen")
        frozen.unlink(missing_ok=True)
        self._freeze.touch()
        while not frozen.exists():
            if self._over.wait(_LOOK):
                return
        process_id, run_id, step = frozen.read_text(encoding="utf-8").split()
        process = psutil.Process(int(process_id))
        try:
            while process.status() != psutil.STATUS_STOPPED and not self._over.wait(_LOOK):
                pass
            database.read(_EXPIRE, [run_id])
            self._say(f"a worker has stopped in step {step} of run {run_id}, and its lease is over")
            done = "SELECT count(*) FROM faults.completions WHERE run_id = %s AND step_slug = %s"
            while database.read(done, [run_id, step]) == [(0,)] and not self._over.wait(_LOOK):
                pass
        finally:
            os.kill(process.pid, signal.SIGCONT)
        self._say("another worker has completed it, and the first one goes on")
        if self._storm.broken:
            self._over.wait(_HEARD)  # the storm is over when its report has shown the broken fence
        self._paused += 1
