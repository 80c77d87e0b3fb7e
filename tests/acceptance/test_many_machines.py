"""Runs on two of Prefect's workers, their steps on a Dask cluster of two processes: as on as many machines."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import column, define, run_workflow, value

pytestmark = pytest.mark.once

HANDLERS = """
import os
import time
from pathlib import Path

from prefect_dask import DaskTaskRunner

from pgflow_prefect import StepContext, Workflow

workflow = Workflow("SLUG", task_runner=DaskTaskRunner(address="ADDRESS"))


def await_both(name: str, directory: str) -> None:
    # Neither machine is to be so quick that it leaves the other one nothing.
    (Path(directory) / f"{name}_{os.environ['MACHINE']}").touch()
    deadline = time.monotonic() + 120
    while not all((Path(directory) / f"{name}_{machine}").exists() for machine in "ab"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@workflow.step
def start(payload: dict[str, int]) -> int:
    while Path("DIRECTORY/gate").exists():  # until each of Prefect's workers has a run
        time.sleep(0.02)
    return payload["n"]


def add(start: int, context: StepContext) -> int:
    context.connection.execute(
        "INSERT INTO executed VALUES (%s, %s, %s)", (context.run_id, context.step_slug, os.environ["MACHINE"])
    )
    await_both("added", "DIRECTORY")
    return start + 1


for side in ("left", "right"):
    workflow.step(side)(add)


@workflow.step
async def end(left: int, right: int) -> int:
    return left + right
"""

SUBMITTED = "submitting flow run"  # what Prefect's worker logs

DIAMOND = {"start": [], "left": ["start"], "right": ["start"], "end": ["left", "right"]}


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Those that a test starts; at its end they are killed, with all that they have started."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT)


def start(
    processes: list["subprocess.Popen[bytes]"], cli: CommandLine, log: str, *arguments: str, **environment: str
) -> Path:
    """Start a Python module's command that knows nothing of the database, and return its log."""
    bare = {name: text for name, text in cli.environment.items() if not name.startswith("PGFLOW_")}
    path = cli.directory / log
    with path.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=cli.directory,
            env={**bare, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    processes.append(process)
    return path


@pytest.fixture
def scheduler(cli: CommandLine, processes: list["subprocess.Popen[bytes]"]) -> str:
    """The address of a Dask cluster of two worker processes, each of which is told that it is a machine."""
    log = start(processes, cli, "scheduler.log", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard")
    found: list[str] = []

    def is_listening() -> bool:
        lines = [line for line in log.read_text().splitlines() if "Scheduler at:" in line]
        found[:] = [line.split("Scheduler at:")[1].strip() for line in lines]
        return bool(found)

    wait_until(is_listening, "Dask's scheduler listens")
    address = f"tcp://127.0.0.1:{found[0].rpartition(':')[2]}"
    for machine in "ab":
        options = ("--nthreads", "2", "--no-nanny", "--no-dashboard", "--local-directory", str(cli.directory))
        name = f"dask_{machine}.log"
        start(processes, cli, name, "distributed.cli.dask_worker", address, *options, MACHINE=machine)
    wait_until(lambda: log.read_text().count("Register worker") == 2, "both have registered")
    return address


@pytest.fixture
def pool(cli: CommandLine, prefect_api: str, processes: list["subprocess.Popen[bytes]"]) -> str:
    """A pool with two of Prefect's workers, each of which executes one flow run at a time."""
    name = f"pool-{uuid4().hex[:8]}"
    httpx.post(f"{prefect_api}/work_pools/", json={"name": name, "type": "process"}, timeout=TIMEOUT).raise_for_status()
    for machine in "ab":
        options = ("--pool", name, "--type", "process", "--limit", "1", "--name", machine)
        log = f"prefect_{machine}.log"
        start(processes, cli, log, "prefect", "worker", "start", *options, PREFECT_WORKER_QUERY_SECONDS="1")
    return name


@pytest.fixture
def block(cli: CommandLine, prefect_api: str) -> Iterator[str]:
    """The database's address, in Prefect."""
    name = f"database-{uuid4().hex[:8]}"
    assert cli("block", name).out == f"created Prefect block pgflow-database/{name}\n"
    yield name
    found = httpx.get(
        f"{prefect_api}/block_types/slug/pgflow-database/block_documents/name/{name}", timeout=TIMEOUT
    ).raise_for_status()
    httpx.delete(f"{prefect_api}/block_documents/{found.json()['id']}", timeout=TIMEOUT).raise_for_status()


def test_runs_and_their_steps_are_executed_on_all_of_them(
    cli: CommandLine,
    db: Connection,
    services: Services,
    prefect: PrefectView,
    scheduler: str,
    pool: str,
    block: str,
) -> None:
    slug = f"fleet_{uuid4().hex[:8]}"
    define(db, slug, DIAMOND)
    db.execute("CREATE TABLE executed (run_id uuid, step_slug text, machine text)")
    text = HANDLERS.replace("SLUG", slug).replace("ADDRESS", scheduler).replace("DIRECTORY", str(cli.directory))
    cli.write(f"flows/{slug}.py", text)
    gate = cli.write("gate")
    deployed = cli("deploy", slug, "--work-pool", pool, "--block", block)
    assert deployed.code == 0, deployed.err
    services.start("bridge")

    runs = [run_workflow(db, slug, {"n": n}).id for n in range(3)]
    logs = [cli.directory / f"prefect_{machine}.log" for machine in "ab"]
    wait_until(lambda: all(SUBMITTED in log.read_text().lower() for log in logs), "each worker has a run")
    gate.unlink()
    completed = "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'"
    wait_until(lambda: value(db, completed) == len(runs), "all runs complete")

    once = "SELECT count(*) FROM (SELECT DISTINCT run_id, step_slug FROM executed) e"
    assert value(db, once) == value(db, "SELECT count(*) FROM executed") == 2 * len(runs)
    assert column(db, "SELECT DISTINCT machine FROM executed ORDER BY 1") == ["a", "b"]
    assert column(db, "SELECT DISTINCT attempts FROM pgflow.step_states") == [1]
    prefect.await_state(runs[0], "Completed")
    assert (cli("diff", slug, "--json").out, cli("diff", slug).out) == ("[]\n", "")
    prefect.await_task_states(runs[0], dict.fromkeys(["start", "left", "right", "end"], "Completed"))
