"""The real command in a process of its own, and what Prefect's API says afterwards.

Commands that are just called, and services, are forked off a process that has imported Prefect: that is 2 s of CPU less
each. What `start` starts is a process as a user starts it.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from tests.acceptance.chain import CHAIN_HANDLERS
from tests.acceptance.forked import ForkedProcess, Forker, open_forker
from tests.conftest import PREFECT_HOME, Connection
from tests.engine import CHAIN, define, value

TIMEOUT = 300.0
"""Seconds after which something that is waited for will not come any more."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    def find_run_id(self) -> UUID:
        """Return the run's id from the line that names it."""
        [found] = [line.removeprefix("run ") for line in self.lines if line.startswith("run ")][:1]
        return UUID(found)

    def find_error(self) -> str:
        """Return the message, which is all that there is on standard error."""
        assert self.err.startswith("error: "), self.err
        assert self.err.count("error: ") == 1, self.err
        return self.err.removeprefix("error: ").strip()


@dataclass(frozen=True)
class CommandLine:
    """`pgflow-prefect` in a directory and an environment of its own; called, it runs a command to its end."""

    directory: Path
    environment: Mapping[str, str]
    forker: Forker
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    def __call__(self, *arguments: str, stdin: str = "", debug: bool = False, **environment: str) -> Ended:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin.encode())
            given.seek(0)
            process = self.forker.fork(arguments, self.directory, {**self.environment, **environment}, given, out, err)
            try:
                code = process.wait(TIMEOUT * 2)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            ended = Ended(code, out.read().decode(), err.read().decode())
        assert "\x1b" not in ended.out + ended.err, "escape codes where nothing is drawn them"
        assert debug or "Traceback" not in ended.out + ended.err, ended.err
        return ended

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a command and leave it running; the end of the test ends it at the latest."""
        process = subprocess.Popen(
            [sys.executable, "-m", "pgflow_prefect", *arguments],
            cwd=self.directory,
            env={**self.environment, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def write(self, path: str, text: str = "") -> Path:
        """Write a file in the working directory."""
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def remove(self, path: str) -> None:
        (self.directory / path).unlink()

    def executions(self) -> list[str]:
        """Return the steps that the handlers of the chain were executed for, each time that they were."""
        file = self.directory / "executions"
        return file.read_text(encoding="utf-8").split() if file.exists() else []


@dataclass(frozen=True)
class PrefectView:
    """What Prefect's API says of the flow runs of one database's runs."""

    url: str
    db: Connection

    def find_flow_run(self, run_id: UUID) -> dict[str, Any]:
        """Return the flow run that took a run last."""
        latest = "SELECT flow_run_id FROM pgflow_prefect.flow_runs WHERE run_id = %s ORDER BY epoch DESC LIMIT 1"
        return self.read_flow_run(value(self.db, latest, run_id))

    def read_flow_run(self, flow_run_id: object) -> dict[str, Any]:
        """Return a flow run."""
        response = httpx.get(f"{self.url}/flow_runs/{flow_run_id}", timeout=TIMEOUT)
        return dict(response.raise_for_status().json())

    def find_deployment(self, workflow: str) -> dict[str, Any]:
        """Return our deployment of a workflow."""
        response = httpx.get(f"{self.url}/deployments/name/{workflow}/pgflow", timeout=TIMEOUT)
        return dict(response.raise_for_status().json())

    def await_state(self, run_id: UUID, state: str) -> None:
        """Return once the flow run that took a run last is in this state."""

        def is_in_state() -> bool:
            taken = "SELECT EXISTS (SELECT FROM pgflow_prefect.flow_runs WHERE run_id = %s)"
            return bool(value(self.db, taken, run_id)) and self.find_flow_run(run_id)["state_name"] == state

        wait_until(is_in_state, f"Prefect shows {state}")

    def press(self, button: str, flow_run_id: object) -> None:
        """Press Retry or Cancel on the page of a flow run: what Prefect's UI sends."""
        wish = {"Retry": ("SCHEDULED", "AwaitingRetry"), "Cancel": ("CANCELLING", "Cancelling")}[button]
        state = dict(zip(("type", "name"), wish, strict=True))
        url = f"{self.url}/flow_runs/{flow_run_id}/set_state"
        httpx.post(url, json={"state": state}, timeout=TIMEOUT).raise_for_status()

    def press_run(self, workflow: str, payload: object) -> str:
        """Press Run on the page of a workflow's deployment, and return the flow run's id."""
        url = f"{self.url}/deployments/{self.find_deployment(workflow)['id']}/create_flow_run"
        wish = {"parameters": {"payload": payload}}
        return str(httpx.post(url, json=wish, timeout=TIMEOUT).raise_for_status().json()["id"])

    def await_task_states(self, run_id: UUID, states: Mapping[str, str]) -> None:
        """Return once a run's latest flow run has exactly these task runs, by name, in these states."""
        chosen = {"flow_runs": {"id": {"any_": [self.find_flow_run(run_id)["id"]]}}}

        def are_shown() -> bool:
            found = httpx.post(f"{self.url}/task_runs/filter", json=chosen, timeout=TIMEOUT).raise_for_status().json()
            return [(each["name"], each["state_name"]) for each in sorted(found, key=lambda each: each["name"])] == [
                *sorted(states.items())
            ]

        wait_until(are_shown, f"Prefect shows {states}")  # its view comes a little later

    def count_flow_runs(self, workflow: str) -> int:
        chosen = {"flows": {"name": {"any_": [workflow]}}}
        return int(httpx.post(f"{self.url}/flow_runs/count", json=chosen, timeout=TIMEOUT).raise_for_status().json())


@dataclass
class Service:
    """A command that goes on until it is told to stop."""

    process: ForkedProcess
    log: Path

    def await_line(self, text: str) -> None:
        """Return once it has written this."""

        def is_written() -> bool:
            written = self.log.read_text(encoding="utf-8")
            assert text in written or self.process.poll() is None, f"it has ended:\n{written}"
            return text in written

        wait_until(is_written, f"{self.log.name} has {text!r}")

    def wait(self) -> int:
        """Return the exit code, once it has ended."""
        code = self.process.wait(TIMEOUT)
        assert "Traceback" not in self.log.read_text(encoding="utf-8")
        return code


@dataclass
class Services:
    """Starts `worker` and `bridge`, and kills them at the end of the test."""

    cli: CommandLine
    started: list[Service] = field(default_factory=list)

    def start(self, *arguments: str, **environment: str) -> Service:
        """Start a command, and return when it is ready."""
        log = self.cli.directory / f"{arguments[0]}_{len(self.started)}.log"
        wanted = {**self.cli.environment, **environment}
        with log.open("wb") as output, Path(os.devnull).open("rb") as nothing:
            process = self.cli.forker.fork(arguments, self.cli.directory, wanted, nothing, output, output)
        self.started.append(Service(process, log))
        self.started[-1].await_line("ready: ")
        return self.started[-1]

    def stop(self) -> None:
        """Kill those that are left."""
        for service in self.started:
            service.process.kill()
            service.process.wait(TIMEOUT)


def kill(service: Service) -> None:
    """Kill a service, and return when it is dead: until then, what it holds is still its own."""
    service.process.kill()
    service.process.wait(TIMEOUT)


def expire_leases(db: Connection) -> None:
    """Let every lease be over, as it is once nothing has extended it for long, and however young the server is."""
    db.execute("UPDATE pgflow_prefect.owners SET lease_until = 'epoch' WHERE lease_until > 'epoch'")


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Return once something is so; fail if it does not become so."""
    deadline = time.monotonic() + TIMEOUT
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)


def find_only_run(db: Connection) -> UUID:
    found = value(db, "SELECT id FROM pgflow.runs")
    assert isinstance(found, UUID)
    return found


def make_environment(directory: Path) -> dict[str, str]:
    """Return the environment of a user who has set up nothing yet."""
    ours = ("PREFECT_", "PGFLOW_", "PG", "SMTP_", "MAILDIR", "FORCE_COLOR", "NO_COLOR", "TTY_")
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    return {**inherited, "PREFECT_HOME": str(directory / "prefect"), "DO_NOT_TRACK": "1", "TERM": "xterm-256color"}


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    with open_forker(Path(PREFECT_HOME)) as opened:
        yield opened


@pytest.fixture
def outside(tmp_path: Path, forker: Forker) -> Iterator[CommandLine]:
    """The command where neither a database nor Prefect is configured."""
    bare = CommandLine(tmp_path, make_environment(tmp_path), forker)
    yield bare
    for process in bare.started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=TIMEOUT)


@pytest.fixture
def cli(outside: CommandLine, product_dsn: str, prefect_api: str) -> CommandLine:
    """The command with this test's database and a Prefect server."""
    configured = {"PGFLOW_DSN": product_dsn, "PREFECT_API_URL": prefect_api}
    return replace(outside, environment={**outside.environment, **configured})


@pytest.fixture
def services(cli: CommandLine) -> Iterator[Services]:
    found = Services(cli)
    yield found
    found.stop()


@pytest.fixture
def prefect(prefect_api: str, db: Connection) -> PrefectView:
    return PrefectView(prefect_api, db)


@pytest.fixture
def chain(cli: CommandLine, db: Connection) -> str:
    """A workflow a -> b -> c with handlers; its slug is this test's own, for all tests share Prefect's server."""
    slug = f"chain_{uuid4().hex[:8]}"
    define(db, slug, CHAIN)
    cli.write(f"flows/{slug}.py", CHAIN_HANDLERS.replace('Workflow("chain")', f'Workflow("{slug}")'))
    return slug
