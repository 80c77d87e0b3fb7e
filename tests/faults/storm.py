"""Runs of random workflows while everything fails around them, and the verdict on what became of them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from uuid import UUID

from tests.faults.breaking import break_fences
from tests.faults.chaos import Chaos, Say
from tests.faults.check import collect, find_violations
from tests.faults.database import Database
from tests.faults.fleet import Fleet
from tests.faults.servers import Postgres, Prefect
from tests.faults.workflows import EXECUTIONS, WORKFLOWS, Steps, draw_workflows, write_workflows

_WORKFLOWS = 6
_CONCURRENCY = 4  # runs of a worker at the same time
_STALLED, _STALLED_BROKEN = 120.0, 15.0  # seconds in which no run has ended: none will
_READY_TIMEOUT = 90.0
_RECONCILED = 150.0  # seconds after which Prefect has to show what PostgreSQL has
_LATE = 5.0  # seconds in which those who lost their run to somebody else report


@dataclass(frozen=True)
class Storm:
    """What is to happen.

    Attributes:
        runs: how many; more, where these are over before everything has gone wrong once.
        seed: decides the workflows, what goes wrong and when.
        workers: how many at a time.
        broken_fences: how many of them are broken on purpose; then nothing else goes wrong.
    """

    runs: int
    seed: int
    workers: int = 3
    broken_fences: int = 0


def make_environment(directory: Path) -> dict[str, str]:
    """Return an environment with nothing of this user's settings, for processes that find `tests` beside us."""
    ours = ("PREFECT_", "PGFLOW_", "PG", "FAULTS_")
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    return {
        **inherited,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PREFECT_HOME": str(directory / "home"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",  # a third of the server's work
        "DO_NOT_TRACK": "1",
        WORKFLOWS: str(directory / "workflows.json"),
        EXECUTIONS: str(directory / "executions"),
    }


def run_storm(storm: Storm, directory: Path, say: Say) -> list[str]:
    """Let it blow, in an empty directory, and return what was violated; nothing is left running."""
    random, mischief = Random(storm.seed), Random(storm.seed)  # noqa: S311  a thread each
    workflows = draw_workflows(random, _WORKFLOWS, longest=0.5 if storm.broken_fences else 0.05)
    environment = make_environment(directory)
    write_workflows(workflows, directory / "workflows.json")
    (directory / "executions").touch()
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres(directory))
        database = Database(postgres.dsn)
        stack.callback(database.close)
        database.install(workflows)
        if storm.broken_fences:
            break_fences(database.connect(), storm.broken_fences)
        prefect = stack.enter_context(Prefect(directory / "server", postgres.prefect_dsn))
        environment |= {
            "PGFLOW_DSN": postgres.dsn,
            "PREFECT_API_URL": prefect.url,
            # An owner who extends its lease learns that it has lost its run; where two are wanted, nobody does.
            "PGFLOW_LEASE": "600" if storm.broken_fences else "3",
            "PGFLOW_RECONCILE_INTERVAL": "5",
            "PGFLOW_SWEEP_INTERVAL": "1",
            "PGFLOW_MAX_RECOVERIES": "50",  # these owners vanish because we kill them
        }
        fleet = stack.enter_context(Fleet(storm.workers, _CONCURRENCY, directory, environment))
        say("PostgreSQL and Prefect are up")
        _await_workers(fleet, storm.workers if storm.broken_fences else 1)
        say("the workers are ready")
        traffic = _Traffic(storm, database, fleet, workflows, random, say)
        with ExitStack() as blowing:
            if not storm.broken_fences:
                chaos = blowing.enter_context(Chaos(mischief, fleet, postgres, prefect, traffic.count_ended, say))
                traffic.watch, traffic.is_enough = chaos.check, chaos.has_shown_all
            traffic.start_runs()
        say("all runs are started")
        problems = traffic.await_end()
        say("no run is pending" if not problems else "runs are left over")
        if storm.broken_fences:
            time.sleep(_LATE)
        elif not problems:
            problems += _await_reconciled(fleet, directory, environment, say)
        problems += fleet.faults
        evidence = collect(database, directory / "executions")
        say(
            f"{len(evidence.runs)} runs, {len(evidence.states)} steps, "
            f"{sum(map(len, evidence.executions.values()))} executions"
        )
        found = find_violations(evidence, workflows, traffic.begun)
        return problems + [f"run {run_id}: {problem}" for run_id, problem in found]


def _await_workers(fleet: Fleet, count: int) -> None:
    """Return when so many are ready: others come in the middle of it, as those do that replace a killed one."""
    deadline = time.monotonic() + _READY_TIMEOUT
    while fleet.count_ready() < count:
        assert time.monotonic() < deadline, f"there are no {count} workers that are ready"
        fleet.tend()
        time.sleep(0.1)


class _Traffic:
    """Starts the runs, no more of them at a time than keep the workers busy."""

    def __init__(
        self,
        storm: Storm,
        database: Database,
        fleet: Fleet,
        workflows: Mapping[str, Steps],
        random: Random,
        say: Say,
    ) -> None:
        self.begun: dict[UUID, int] = {}
        self.watch: Callable[[], None] = lambda: None
        self.is_enough: Callable[[], bool] = lambda: True
        self._storm = storm
        self._database = database
        self._fleet = fleet
        self._workflows = [*workflows]
        self._random = random
        self._say = say
        self._ended = 0
        self._patience = _STALLED_BROKEN if storm.broken_fences else _STALLED
        # Who is to take a run away from another needs a free place for it.
        self._most = storm.workers * _CONCURRENCY // 2 if storm.broken_fences else 2 * storm.workers * _CONCURRENCY
        self._progress_at = time.monotonic()

    def count_ended(self) -> int:
        return self._ended

    def start_runs(self) -> None:
        while (wanted := self._count_wanted()) and not self._is_stalled(pending := self._look()):
            for _ in range(min(self._most - len(pending), wanted)):
                run_id = UUID(int=self._random.getrandbits(128), version=4)
                self.begun[run_id] = len(self.begun)
                self._database.start_run(self._random.choice(self._workflows), run_id, self.begun[run_id])
            time.sleep(0.2)

    def _count_wanted(self) -> int:
        """Return how many runs have still to be started."""
        return max(self._storm.runs - len(self.begun), 0 if self.is_enough() else 1)

    def await_end(self) -> list[str]:
        """Return once no run is pending, or none ends any more: those that are left."""
        while pending := self._look():
            if self._is_stalled(pending):
                return [f"run {run_id}: pending, and nothing has ended for {self._patience:g} s" for run_id in pending]
            time.sleep(0.2)
        return []

    def _look(self) -> list[UUID]:
        self._fleet.tend()
        self.watch()
        return self._database.list_pending()

    def _is_stalled(self, pending: list[UUID]) -> bool:
        if (ended := len(self.begun) - len(pending)) != self._ended:
            if ended // 50 != self._ended // 50:
                self._say(f"{ended} runs have ended")
            self._ended, self._progress_at = ended, time.monotonic()
        return time.monotonic() > self._progress_at + self._patience


def _await_reconciled(fleet: Fleet, directory: Path, environment: Mapping[str, str], say: Say) -> list[str]:
    """Return what Prefect and PostgreSQL still disagree about when the workers have had the time to repair it."""
    deadline = time.monotonic() + _RECONCILED
    while True:
        fleet.tend()
        looked = subprocess.run(
            [sys.executable, "-m", "pgflow_prefect", "reconcile", "--all", "--json"],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        found = json.loads(looked.stdout) if looked.stdout.strip() else None
        if looked.returncode == 0 and found == []:
            say("reconcile finds nothing")
            return []
        say(f"reconcile finds {'nothing' if found is None else len(found)}, exit code {looked.returncode}")
        if time.monotonic() > deadline:
            return [f"reconcile still finds, exit code {looked.returncode}: {looked.stdout}{looked.stderr}"]
        time.sleep(3)
