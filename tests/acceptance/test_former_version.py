"""A worker of the former version goes on while `init` of this one upgrades the database that it works on."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.acceptance.chain import CHAIN_HANDLERS
from tests.acceptance.conftest import TIMEOUT, CommandLine, wait_until
from tests.conftest import Connection
from tests.engine import CHAIN, define, get_run, run_workflow, value
from tests.former import extract_former

pytestmark = pytest.mark.once

EXECUTED_TWICE = "SELECT count(*) FROM pgflow.step_states WHERE attempts <> 1 AND status = 'completed'"


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the former version; a clone without its commit skips the tests."""
    folder = tmp_path_factory.mktemp("former")
    extract_former(folder)
    return folder


@pytest.fixture
def database(empty_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def new(outside: CommandLine, empty_dsn: str, prefect_api: str) -> CommandLine:
    """The command of this version."""
    configured = {"PGFLOW_DSN": empty_dsn, "PREFECT_API_URL": prefect_api}
    return replace(outside, environment={**outside.environment, **configured})


def start(cli: CommandLine, *arguments: str, log: str, **environment: str) -> "subprocess.Popen[str]":
    """Start a command whose output goes into a file."""
    with (cli.directory / log).open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgflow_prefect", *arguments],
            cwd=cli.directory,
            env={**cli.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
        )
    cli.started.append(process)
    return process


def await_line(cli: CommandLine, process: "subprocess.Popen[str]", log: str, text: str) -> None:
    def is_written() -> bool:
        written = (cli.directory / log).read_text()
        assert text in written or process.poll() is None, f"it has ended:\n{written}"
        return text in written

    wait_until(is_written, f"{log} has {text!r}")


def is_completed(db: Connection, run_id: UUID) -> bool:
    return bool(get_run(db, run_id).status == "completed")


def test_a_former_worker_finishes_its_run_and_takes_further_ones_after_an_upgrade(
    new: CommandLine, database: Connection, former: Path
) -> None:
    path = {"PYTHONPATH": str(former)}
    installed = subprocess.run(
        [sys.executable, "-m", "pgflow_prefect", "init"],
        cwd=new.directory, env={**new.environment, **path}, capture_output=True, text=True, timeout=TIMEOUT, check=True,
    )  # fmt: skip
    assert "pgflow 2, pgflow_prefect 6" in installed.stdout, "this is the former version"
    slug = f"chain_{uuid4().hex[:8]}"  # Prefect's server is that of all tests
    define(database, slug, CHAIN)
    database.execute("SELECT pgflow_prefect.enable_workflow(%s)", [slug])
    new.write(f"flows/{slug}.py", CHAIN_HANDLERS.replace('Workflow("chain")', f'Workflow("{slug}")'))
    gate = new.write("gate")
    worker = start(new, "worker", log="former.log", **path)
    await_line(new, worker, "former.log", "ready: ")
    first = run_workflow(database, slug, {}).id
    wait_until(lambda: "b" in new.executions(), "the former worker executes b")

    upgraded = new("init")
    assert upgraded.code == 0, upgraded.err
    assert "upgraded" in upgraded.out
    second = run_workflow(database, slug, {}).id
    wait_until(lambda: new.executions().count("b") == 2, "the former worker executes b of another run")
    gate.unlink()
    for run_id in (first, second):
        wait_until(lambda run_id=run_id: is_completed(database, run_id), "the former worker finishes it")  # type: ignore[misc]
    assert sorted(new.executions()) == ["a", "a", "b", "b", "c", "c"], "nothing was executed twice"
    assert value(database, EXECUTED_TWICE) == 0
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(TIMEOUT) == 0
    assert "Traceback" not in (new.directory / "former.log").read_text()

    refused = subprocess.run(
        [sys.executable, "-m", "pgflow_prefect", "init"],
        cwd=new.directory, env={**new.environment, **path}, capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "this script is of an older version" in refused.stderr
    assert "current" in new("init").out, "the former program has changed nothing"

    gate = new.write("gate")
    third = run_workflow(database, slug, {}).id
    worker = start(new, "worker", log="new.log")
    wait_until(lambda: new.executions().count("b") == 3, "the new worker executes b")
    gate.unlink()
    wait_until(lambda: is_completed(database, third), "the new worker finishes it")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(TIMEOUT) == 0
    assert len(new.executions()) == 9
