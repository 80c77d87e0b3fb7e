"""Flips who does which task every 100 ms, and kills workers of both sides, while a real Airflow executes runs.

    PGFLOW_TEST_AIRFLOW=build/airflow/bin/python python -m tests.airflow.live.flip_storm --runs 200

In the end each task was executed once, or again only after its process was killed; no task is lost; every run has ended
on both sides, with the same results. The exit code is 1 where that is not so.
"""

import argparse
import json
import os
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from tests.acceptance.conftest import CommandLine, Service, Services
from tests.airflow.live.server import Airflow

DAG_ID = "flipped"
STEPS = ("first", "second", "third")
VARIABLE = "PGFLOW_TEST_FLIP_STORM"
"""What the command tells the test: how many runs, kills, and which seed."""

FLIP = 0.1
"""Seconds between two flips."""

LONGEST = 3600.0
"""Seconds after which a storm ends, whatever has become of its runs."""

HANDLERS = """
import os
import time

from pgflow_prefect import Workflow

workflow = Workflow("flipped", when_failed="continue", failed_by="leaves")


def note(payload, step):
    line = f"{payload['airflow_run_id']} {step} {os.getpid()}\\n".encode()
    file = os.open("executed", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)
    time.sleep(0.2)  # the work


@workflow.step
def first(payload):
    note(payload, "first")
    return ["prefect"]


@workflow.step
def second(payload, first):
    note(payload, "second")
    return [*first, "prefect"]


@workflow.step
def third(payload, second):
    note(payload, "third")
    return [*second, "prefect"]
"""


@dataclass
class FlipStorm:
    """A storm, and what was seen of it.

    Attributes:
        airflow: whose workers are killed, too.
        services: the workers here.
        dsn: the database here.
        runs: how many.
        kills: how many workers of each side are killed.
        seed: of the flips.
    """

    airflow: Airflow
    services: Services
    dsn: str
    runs: int
    kills: int
    seed: int = 0
    flips: int = field(default=0, init=False)
    killed: dict[str, set[int]] = field(default_factory=lambda: {"airflow": set(), "prefect": set()}, init=False)
    workers: list[Service] = field(default_factory=list, init=False)
    _over: threading.Event = field(default_factory=threading.Event, init=False)

    @property
    def cli(self) -> CommandLine:
        """The command line."""
        return self.services.cli

    def blow(self) -> list[str]:
        """Return what is wrong once every run has ended, or too much time has passed. The DAG's policy is in place."""
        self.cli.write("flows/flipped.py", HANDLERS)
        self.workers = [self.services.start("worker") for _ in range(2)]
        names = [f"run_{number}" for number in range(self.runs)]
        with self._flipping():
            for name in names:
                self.airflow.trigger(DAG_ID, name)
            self._kill_by_progress()
            deadline = time.monotonic() + LONGEST
            while (left := self._count_open()) and time.monotonic() < deadline:
                self.airflow.give_up(self.killed["airflow"])  # the last sign of life may have come after the first time
                time.sleep(0.5)
        return [*([f"{left} runs have not ended"] if left else []), *self._check(names)]

    @contextmanager
    def _flipping(self) -> Iterator[None]:
        thread = threading.Thread(target=self._flip, name="flips")
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _flip(self) -> None:
        """Flip rows by the clock."""
        chance = random.Random(self.seed)  # noqa: S311  no secret
        moved: set[str] = set()
        with psycopg.connect(self.dsn, autocommit=True) as db:
            while not self._over.wait(FLIP):
                step = chance.choice(STEPS)
                if step in moved:
                    db.execute("SELECT pgflow_prefect.undo_binding(%s, %s)", [DAG_ID, step])
                else:
                    db.execute("SELECT pgflow_prefect.bind_step(%s, %s, 'python')", [DAG_ID, step])
                moved ^= {step}
                self.flips += 1

    def _kill_by_progress(self) -> None:
        """Kill a worker of each side whenever another share of the tasks was executed."""
        whole = self.runs * len(STEPS)
        for number in range(1, self.kills + 1):
            wanted = whole * number // (self.kills + 1)
            deadline = time.monotonic() + LONGEST
            while len(self.list_executed()) < wanted and time.monotonic() < deadline:
                time.sleep(0.1)
            self._kill_tree("prefect", self.workers[number % 2].process.pid)
            self.workers[number % 2] = self.services.start("worker")
            self._kill_airflow_worker()

    def _kill_airflow_worker(self) -> None:
        """Kill a worker of Airflow's executor that has a task, and let Airflow notice."""
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline and self._count_open():
            running = {pid for [pid] in self.airflow.ask("SELECT pid FROM task_instance WHERE state = 'running'")}
            for each in psutil.process_iter(["cmdline"]):
                if self._is_worker(each) and running.intersection(_list_below(each)):
                    self._kill_tree("airflow", each.pid)
                    self.airflow.give_up(self.killed["airflow"])
                    return
            time.sleep(0.05)

    def _is_worker(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return (
                "LocalExecutor" in " ".join(process.info["cmdline"] or [])
                and process.parent() is not None
                and self._is_ours(process.parent())
            )
        return False

    def _is_ours(self, process: psutil.Process | None) -> bool:
        """Tell whether a process is the scheduler of this Airflow."""
        return process is not None and process.cwd() == self.airflow.home

    def _kill_tree(self, side: str, pid: int) -> None:
        """Kill a process and all below it, as a machine that fails does."""
        with suppress(psutil.NoSuchProcess):
            whole = [psutil.Process(pid)]
            whole += whole[0].children(recursive=True)
            for each in whole:
                with suppress(psutil.NoSuchProcess):
                    each.suspend()  # so that none is replaced by another one meanwhile
            whole += [each for each in psutil.Process(pid).children(recursive=True) if each not in whole]
            for each in whole:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
                    self.killed[side].add(each.pid)

    def list_executed(self) -> list[tuple[str, str, str, int]]:
        """Return what was executed: the run, the task, the side and the process."""
        ours = self.cli.directory / "executed"
        found = [
            (run, task, "airflow", int(pid))
            for dag, run, task, pid in map(str.split, self.airflow.read_executions())
            if dag == DAG_ID
        ]
        if ours.exists():
            lines = map(str.split, ours.read_text("utf-8").splitlines())
            found += [(run, task, "prefect", int(pid)) for run, task, pid in lines]
        return found

    def _count_open(self) -> int:
        [[there]] = self.airflow.ask(
            "SELECT count(*) FROM dag_run WHERE dag_id = %s AND state NOT IN ('success', 'failed')", DAG_ID
        )
        with psycopg.connect(self.dsn, autocommit=True) as db:
            [[here]] = db.execute("SELECT count(*) FROM pgflow.runs WHERE status = 'pending'").fetchall()
        return max(int(there), int(here))

    def _check(self, names: list[str]) -> list[str]:
        executed = defaultdict(list)
        for run, task, side, pid in self.list_executed():
            executed[run, task].append((side, pid))
        with psycopg.connect(self.dsn, autocommit=True) as db:
            rows = db.execute(
                "SELECT r.payload ->> 'airflow_run_id', s.step_slug, r.status, s.status, s.step_result"
                " FROM pgflow.runs r JOIN pgflow.step_states s ON s.run_id = r.id"
            ).fetchall()
        results = {(run, step): (run_status, status, result) for run, step, run_status, status, result in rows}
        wrong = []
        for run in names:
            if (state := self.airflow.read_run(DAG_ID, run)) != "success":
                wrong.append(f"{run} is {state} in Airflow")
            for place, task in enumerate(STEPS):
                there = self.airflow.read_result(DAG_ID, run, task)
                run_status, status, result = results.get((run, task), (None, None, None))
                if (run_status, status) != ("completed", "completed"):
                    wrong.append(f"{run} is {run_status} here, and its {task} is {status}")
                if there != result:
                    wrong.append(f"{task} of {run} is {there} in Airflow, and {result} here")
                done = executed[run, task]
                if sum(pid not in self.killed[side] for side, pid in done) > 1 or not done:
                    wrong.append(f"{task} of {run} was executed by {done}")
                if isinstance(result, list) and result[place] not in {side for side, _ in done}:
                    wrong.append(f"{task} of {run} has the result of {result[place]}, and was executed by {done}")
        return wrong

    def describe(self) -> str:
        """Return what has happened, in a line."""
        executed = self.list_executed()
        sides = {side: sum(each[2] == side for each in executed) for side in self.killed}
        again = len(executed) - len({each[:2] for each in executed})
        return (
            f"{self.runs} runs, {self.flips} flips; executed by Airflow {sides['airflow']}, here {sides['prefect']}; "
            f"again after a kill {again}; killed processes: Airflow's {len(self.killed['airflow'])}, "
            f"ours {len(self.killed['prefect'])}"
        )


def _list_below(process: psutil.Process) -> set[int]:
    """Return the processes below one."""
    with suppress(psutil.Error):
        return {each.pid for each in process.children(recursive=True)}
    return set()


def main() -> None:
    """Blow the storm by pytest, whose fixtures start the servers and end them."""
    parser = argparse.ArgumentParser(prog="python -m tests.airflow.live.flip_storm", description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10, help="workers of each side")
    parser.add_argument("--seed", type=int, default=0, help="of the flips")
    os.environ[VARIABLE] = json.dumps(vars(parser.parse_args()))
    test = str(Path(__file__).with_name("test_flip_storm.py"))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-s", "-q", "-o", f"timeout={2 * LONGEST:.0f}", test]
    os.execv(sys.executable, command)  # noqa: S606  pytest is the process that Ctrl-C ends


if __name__ == "__main__":
    main()
