"""Copies of the storm's database, each of which becomes a second installation on the same Prefect server.

First it is a copy that has not said what it is: the rows are those of live runs, and say that their owners are gone.
Nothing that it does may reach Prefect. Then it is a new installation, with workflows and runs of its own.
"""

import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from random import Random
from uuid import UUID

from pgflow_prefect.shipped import shipped_path
from tests.copying import copy_database
from tests.faults.check import collect, find_violations
from tests.faults.database import Database
from tests.faults.fleet import Fleet, make_command, make_worker_command
from tests.faults.servers import PATIENCE, Postgres
from tests.faults.weathers import Redone
from tests.faults.workflows import EXECUTIONS, WORKFLOWS, draw_workflows, write_workflows

_RUNS = 4
_POLL = 0.2  # seconds

# What a copy of last week has: owners that have vanished, and runs that were cancelled in it.
_AGE = """
UPDATE pgflow_prefect.owners SET lease_until = now() - interval '1 hour';
SELECT pgflow.cancel_run(id, 'cancelled in the copy') FROM pgflow.runs
WHERE status = 'pending' AND get_byte(uuid_send(id), 15) % 2 = 0;
UPDATE pgflow.runs SET finished_at = now() - interval '1 hour' WHERE error_message LIKE '%cancelled in the copy%';
"""

_BREAK_FENCE = "UPDATE pgflow_prefect.installation SET stamp = pgflow_prefect.current_stamp()"


class Copies:
    """Makes copies, one after the other, and judges what becomes of their own runs.

    Attributes:
        problems: what was violated.
    """

    def __init__(
        self,
        postgres: Postgres,
        database: Database,
        prefect: Database,
        random: Random,
        directory: Path,
        environment: Mapping[str, str],
        role: str,
        say: Callable[[str], None],
        *,
        broken: bool,
    ) -> None:
        self.problems: list[str] = []
        self._postgres = postgres
        self._original = database
        self._prefect = prefect
        self._random = random
        self._directory = directory
        self._environment = environment
        self._role = role
        self._say = say
        self._broken = broken
        self._made = 0

    def live_through_one(self) -> None:
        """Make a copy, let it live for a while beside the original, and drop it."""
        self._made += 1
        name = f"{self._original.name}_copy_{self._made}"
        directory = self._directory / name
        directory.mkdir()
        self._postgres.create_database(name)
        with ExitStack() as stack:
            stack.callback(self._postgres.drop_database, name)
            database = Database(self._postgres.make_dsn(name))
            stack.callback(database.close)
            copy_database(self._original.dsn, database.dsn)
            environment = {
                **self._environment,
                "PGFLOW_DSN": self._postgres.make_dsn(name, user=self._role),
                "PGFLOW_RECONCILE_INTERVAL": "1",
                WORKFLOWS: str(directory / "workflows.json"),
                EXECUTIONS: str(directory / "executions"),
            }
            self._act_as_the_original(database, environment)
            if not self._broken:
                self._work_beside_the_original(database, directory, environment)

    def _act_as_the_original(self, database: Database, environment: Mapping[str, str]) -> None:
        self._say("a copy acts as the original")
        database.connect().execute(_AGE)
        if self._broken:
            database.connect().execute(_BREAK_FENCE)
        refused = self._reconcile_once_connected(environment)
        if not self._broken and (refused.returncode != 1 or "this database is a copy" not in refused.stderr):
            self.problems.append(f"a copy was not refused, exit code {refused.returncode}: {refused.stderr}")

    def _work_beside_the_original(self, database: Database, directory: Path, environment: Mapping[str, str]) -> None:
        self._say("the copy is a second installation")
        database.connect().execute(shipped_path("sql", "new_installation.sql").read_bytes())
        workflows = draw_workflows(self._random, 2, longest=0.05, prefix=database.name)
        write_workflows(workflows, directory / "workflows.json")
        (directory / "executions").touch()
        database.define(workflows)
        begun: dict[UUID, int] = {}
        with Fleet(1, make_worker_command(environment, _RUNS), directory, environment) as fleet:
            for number in range(_RUNS):
                run_id = UUID(int=self._random.getrandbits(128), version=4)
                begun[run_id] = number
                database.start_run(self._random.choice([*workflows]), run_id, number)
            _await_end(fleet, database, begun)
            looked = self._reconcile_once_connected(environment)
            if looked.returncode != 0:
                self.problems.append(f"a second installation does not agree with Prefect: {looked.stderr}")
            self.problems += fleet.faults
        evidence = collect(database, directory / "executions", self._prefect).of(begun)
        found = find_violations(evidence, workflows, begun, Redone.NOTHING)
        self.problems += [f"run {run_id} of a second installation: {problem}" for run_id, problem in found]
        self._say("the copy is gone")

    def _reconcile_once_connected(self, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        """Call it until it gets a connection: another storm may have filled the server."""
        deadline = time.monotonic() + PATIENCE
        while True:
            done = self._reconcile(environment)
            if "can't connect to PostgreSQL" not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(_POLL)

    def _reconcile(self, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            make_command(environment, "reconcile", "--apply"),
            cwd=self._directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


def _await_end(fleet: Fleet, database: Database, begun: Mapping[UUID, int]) -> None:
    """Return when the copy's own runs have ended, or never will."""
    deadline = time.monotonic() + PATIENCE
    while begun.keys() & {*database.list_pending()} and time.monotonic() < deadline:
        fleet.tend()
        time.sleep(_POLL)
