"""Runs of random workflows while everything fails around them, and the verdict on what became of them."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from tests.faults.breaking import ITEM_SIGNS, break_fences
from tests.faults.broken import BROKEN
from tests.faults.chaos import Chaos
from tests.faults.check import Evidence, collect, find_violations
from tests.faults.copies import Copies
from tests.faults.database import Database
from tests.faults.fleet import Fleet, make_command, make_worker_command
from tests.faults.servers import PATIENCE, Postgres, Prefect
from tests.faults.traffic import Traffic
from tests.faults.troubles import TROUBLES, Say, Scene
from tests.faults.weathers import SETTINGS, WEATHERS, Twin, Weather
from tests.faults.workflows import EXECUTIONS, WORKFLOWS, Steps, draw_workflows, write_workflows
from tests.silent_proxy import silent_proxy

_WORKFLOWS = 6
_UNDECIDED = """
    SELECT count(*) FROM pgflow_prefect.owners o JOIN pgflow.runs r ON r.id = o.run_id
    WHERE r.status <> 'pending' AND NOT o.settled AND pgflow_prefect.is_unshown(o.flow_run_id)
"""
_LOOK = 2.0  # seconds between two looks whether a broken fence has been found
_LINGER = 30.0  # seconds after which the server finds a silent link dead by itself
_MOST = 30  # times the runs that were asked for, with a broken fence: it has been found by then


@dataclass(frozen=True)
class Storm:
    """What is to happen.

    Attributes:
        kind: of `WEATHERS`.
        runs: how many; more, where these are over before everything has gone wrong once.
        seed: decides the workflows, what goes wrong and when.
        workers: how many at a time; fewer, where the weather says so.
        broken: break the storm's fence on purpose.
        level: how many of the fences in PostgreSQL are broken, where they are the storm's; all, where not given.
        later: Prefect hears of the runs later; of one in five that complete, and of those that take long.
        with_rules: the workflows have steps that fail, skip and branch, maps, and rules.
    """

    kind: str
    runs: int
    seed: int
    workers: int = 3
    broken: bool = False
    level: int | None = None
    later: bool = False
    with_rules: bool = False

    @property
    def weather(self) -> Weather:
        return WEATHERS[self.kind]

    @property
    def twin(self) -> Twin | None:
        return self.weather.twin if self.broken else None

    @property
    def signs(self) -> tuple[str, ...]:
        """What the verdict has to have of a storm with a broken fence."""
        if self.twin is None:
            return ()
        return self.twin.signs + ITEM_SIGNS * (self.with_rules and bool(self.twin.level))


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


def run_storms(storms: Sequence[Storm], directory: Path, say: Say) -> list[str]:
    """Let storms blow, in an empty directory, and return what was violated; nothing is left running.

    They share the two servers. Those that leave these alone blow at the same time, each with a database and workers of
    its own.
    """
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres(directory))
        postgres.create_database("prefect")
        postgres.create_login("faults_hog")
        prefect = stack.enter_context(Prefect(directory / "server", postgres.make_dsn("prefect")))
        say("PostgreSQL and Prefect are up")
        together = [storm for storm in storms if storm.broken or not storm.weather.shakes_servers]
        violations: list[str] = []
        calm = threading.Event()
        with ThreadPoolExecutor(max(1, len(together))) as pool:
            blown = [pool.submit(_blow, storm, postgres, prefect, directory, say, calm) for storm in together]
            try:
                for each in blown:
                    violations += each.result()
            except BaseException:
                calm.set()  # the pool waits for all of them
                raise
        for storm in storms:
            if storm not in together:
                violations += _blow(storm, postgres, prefect, directory, say, calm)
        return violations


class CalmError(Exception):
    """The storms are called off."""


def _blow(
    storm: Storm, postgres: Postgres, prefect: Prefect, directory: Path, say: Say, calm: threading.Event
) -> list[str]:
    """Let one storm blow, and return what was violated.

    Raises:
        CalmError: it is called off.
    """
    own = directory / storm.kind
    own.mkdir()

    def say_where(text: str) -> None:
        say(f"{storm.kind}: {text}")

    with ExitStack() as stack:
        blowing = _Blowing(storm, postgres, prefect, own, say_where, stack, calm)
        problems = blowing.blow()
        evidence = blowing.collect()
        say_where(
            f"{len(evidence.runs)} runs, {len(evidence.states)} steps and items, "
            f"{sum(map(len, evidence.executions.values()))} executions"
        )
        found = blowing.judge(evidence)
        if storm.broken:
            verdict = "\n".join(found)
            say_where(", ".join(f"{sign!r} was {'' if sign in verdict else 'not '}found" for sign in storm.signs))
        say_where(f"{len(problems) + len(found)} violations")
        return [f"{storm.kind}: {each}" for each in problems + found]


class _Blowing:
    """One storm while it blows."""

    def __init__(
        self,
        storm: Storm,
        postgres: Postgres,
        prefect: Prefect,
        directory: Path,
        say: Say,
        stack: ExitStack,
        calm: threading.Event,
    ) -> None:
        self._storm = storm
        self._say = say
        self._calm = calm
        self._directory = directory
        weather, twin = storm.weather, storm.twin
        random = Random(f"{storm.seed} runs")  # noqa: S311
        self._mischief = Random(f"{storm.seed} mischief")  # noqa: S311  for another thread, and other ids
        name = storm.kind.replace("-", "_")
        role = f"{name}_worker"
        self._workflows: Mapping[str, Steps] = draw_workflows(
            random,
            _WORKFLOWS,
            twin.longest if twin else weather.longest,
            prefix=name,
            with_rules=storm.with_rules,
            some_plain=storm.broken,  # a step of a run with rules is not completed twice: it would be counted wrong
        )
        write_workflows(self._workflows, directory / "workflows.json")
        self._executions = directory / "executions"
        self._executions.touch()
        postgres.create_login(role)
        postgres.create_database(name)
        self._database = self._open(postgres.make_dsn(name), stack)
        self._shown = self._open(prefect.dsn, stack)
        self._install(role)
        proxy = stack.enter_context(silent_proxy(postgres.make_dsn(name, user=role), linger=_LINGER))
        self._environment = {
            **make_environment(directory),
            **SETTINGS,
            **weather.settings,
            "PGFLOW_DSN": proxy.dsn,
            "PREFECT_API_URL": prefect.url,
        }
        if storm.later:
            self._environment["PGFLOW_RECORD_LATER"] = ",".join(f"{slug}:5:2" for slug in self._workflows)
        if twin:
            self._environment |= twin.settings
            if not twin.level:
                self._environment[BROKEN] = storm.kind
        self._size = min(storm.workers, weather.workers or storm.workers)
        command = make_worker_command(self._environment, weather.concurrency)
        self._fleet = stack.enter_context(Fleet(self._size, command, directory, self._environment))
        copies = Copies(
            postgres,
            self._database,
            self._shown,
            self._mischief,
            directory,
            self._environment,
            role,
            say,
            broken=storm.broken,
        )
        self._copies = copies
        self._traffic = self._make_traffic(random)
        self._scene = Scene(
            self._mischief, self._fleet, postgres, prefect, self._database, role, proxy, copies, self._wait, say
        )
        self._chaos: Chaos | None = None
        self._next_look, self._is_known = 0.0, False

    def _open(self, dsn: str, stack: ExitStack) -> Database:
        database = Database(dsn)
        stack.callback(database.close)
        return database

    def _install(self, role: str) -> None:
        self._database.install(self._workflows, role)
        for option, text in self._storm.weather.options.items():
            self._database.set_option(role, option, text)
        if self._storm.twin and self._storm.twin.level:
            break_fences(self._database.connect(), self._storm.level or self._storm.twin.level)

    def _make_traffic(self, random: Random) -> Traffic:
        at_work = self._size * self._storm.weather.concurrency
        twin = self._storm.twin
        return Traffic(
            self._storm.runs,
            # A worker that is to take a run away from another needs a free place for it.
            at_work // 2 if twin and twin.level else 2 * at_work,
            twin.patience if twin else PATIENCE,
            self._database,
            self._fleet,
            self._executions,
            [*self._workflows],
            random,
            self._say,
        )

    def _wait(self, seconds: float) -> bool:
        assert self._chaos is not None
        return self._chaos.wait(seconds)

    def blow(self) -> list[str]:
        """Blow until everything has gone wrong and all runs are over, and return what is wrong without the check."""
        self._await_workers(self._size if self._storm.broken else 1)
        self._say("the workers are ready")
        with self._make_chaos() as chaos:
            self._chaos = chaos
            self._traffic.watch = self._watch
            if self._storm.broken:
                self._traffic.is_enough = self._has_tried_enough
                self._traffic.is_over = self._is_found
            else:
                self._traffic.is_enough = chaos.has_shown_all
            self._traffic.start_runs()
        self._say("all runs are started")
        problems = self._traffic.await_end()
        self._say("no run is pending" if not problems else "runs are left over")
        if not self._storm.broken and not problems:
            problems += self._await_reconciled()
        return problems + self._fleet.faults + self._copies.problems

    def _watch(self) -> None:
        if self._calm.is_set():
            raise CalmError
        if self._chaos is not None:
            self._chaos.check()

    def _make_chaos(self) -> Chaos:
        weather, twin = self._storm.weather, self._storm.twin
        cards = weather.cards if twin is None or twin.cards is None else twin.cards
        troubles: dict[str, Callable[[], None]] = {card: partial(TROUBLES[card], self._scene) for card in cards}
        return Chaos(self._mischief, cards, troubles, weather.pauses, self._traffic.count_ended)

    def _has_tried_enough(self) -> bool:
        return len(self._traffic.begun) >= _MOST * self._storm.runs

    def _is_found(self) -> bool:
        """Tell whether the verdict has all that the broken fence has to show; a run that is pending is not over yet."""
        if time.monotonic() > self._next_look:
            found = "\n".join(each for each in self.judge(self.collect()) if "is pending" not in each)
            self._is_known = all(sign in found for sign in self._storm.signs)
            self._next_look = time.monotonic() + _LOOK
        return self._is_known

    def collect(self) -> Evidence:
        """Return what there is to judge by."""
        return collect(self._database, self._executions, self._shown)

    def judge(self, evidence: Evidence) -> list[str]:
        """Return what is violated."""
        found = find_violations(evidence, self._workflows, self._traffic.begun, self._storm.weather.redone)
        return [f"run {run_id}: {problem}" for run_id, problem in found]

    def _await_workers(self, count: int) -> None:
        """Return when so many are ready: others come in the middle of it, as those do that replace a killed one."""
        deadline = time.monotonic() + PATIENCE
        while self._fleet.count_ready() < count:
            assert time.monotonic() < deadline, f"there are no {count} workers that are ready"
            self._fleet.tend()
            self._watch()
            time.sleep(0.1)

    def _await_reconciled(self) -> list[str]:
        """Return what Prefect and PostgreSQL still disagree about when the workers have had the time to repair it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self._fleet.tend()
            looked = subprocess.run(
                make_command(self._environment, "reconcile", "--all", "--json"),
                cwd=self._directory,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            found = json.loads(looked.stdout) if looked.stdout.strip() else None
            [[undecided]] = self._database.read(_UNDECIDED)
            if looked.returncode == 0 and found == [] and not undecided:
                self._say("reconcile finds nothing")
                return []
            self._say(f"reconcile finds {'nothing' if found is None else len(found)}, exit code {looked.returncode}")
            if time.monotonic() > deadline and undecided:
                return [f"{undecided} ended runs are neither shown in Prefect nor left unshown"]
            if time.monotonic() > deadline:
                return [f"reconcile still finds, exit code {looked.returncode}: {looked.stdout}{looked.stderr}"]
            time.sleep(3)
