"""The example with a step of every kind, on the real servers: HTTP, Redis, RabbitMQ, pgqueuer, a person."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode
from uuid import UUID

import httpx
import pytest
from psycopg.conninfo import conninfo_to_dict

from pgflow_prefect.shipped import shipped_path
from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import column, value

pytestmark = pytest.mark.once

PRODUCTS = 4000
PAYLOAD = {"products": PRODUCTS, "shops": ["Bern", "Ghent", "Turku"]}
STEPS = "SELECT step_slug, status FROM pgflow.step_states WHERE run_id = %s"
KINDS = {
    "load_costs": "sql shop.load_costs",
    "price_books": "python",
    "price_garden": "python",
    "price_tools": "python",
    "price_toys": "python",
    "check_margins": "http http://127.0.0.1:{port}/check",
    "sign_off": "external",
    "print_labels": "queue {labels}",
    "tell_shops": "queue {shops}",
    "update_search": "queue pgqueuer:search",
    "report": "python",
}


class Environment:
    """Everything that the workflow's steps need, running."""

    def __init__(self, port: int, labels: str, shops: str) -> None:
        self.port, self.labels, self.shops = port, labels, shops

    @property
    def variables(self) -> dict[str, str]:
        return {
            "MARGINS_URL": f"http://127.0.0.1:{self.port}/check",
            "MARGINS_TOKEN": "a-token-that-must-stay-secret",
            "LABELS_QUEUE": self.labels,
            "SHOPS_QUEUE": self.shops,
            "SHOPS_LOGIN": "guest:guest",
        }


def make_uri(dsn: str) -> str:
    """Return a connection string in the only form that pgqueuer's command takes."""
    parts = {name: str(part) for name, part in conninfo_to_dict(dsn).items()}
    return f"postgresql:///{parts.pop('dbname')}?{urlencode(parts)}"


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


Start = Callable[[str, list[object], dict[str, str]], None]
"""Starts a command in the example's folder, with its log's name, its arguments and its environment."""

FOLDER = shipped_path("flows", "price_update")


@pytest.fixture(autouse=True)
def undeployed(prefect: PrefectView) -> None:
    """Delete the deployment that another test has left: its database was another installation."""
    found = httpx.get(f"{prefect.url}/deployments/name/price_update/pgflow", timeout=TIMEOUT)
    if found.status_code == httpx.codes.OK:
        httpx.delete(f"{prefect.url}/deployments/{found.json()['id']}", timeout=TIMEOUT).raise_for_status()


@pytest.fixture
def start(cli: CommandLine) -> Iterator[Start]:
    processes: list[subprocess.Popen[bytes]] = []

    def begin(name: str, command: list[object], variables: dict[str, str]) -> None:
        environment = {**os.environ, **cli.environment, **variables, "PYTHONPATH": str(FOLDER)}
        with (cli.directory / f"{name}.log").open("wb") as log:
            arguments = [str(each) for each in command]
            processes.append(subprocess.Popen(arguments, env=environment, cwd=FOLDER, stdout=log, stderr=log))

    yield begin
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def surroundings(
    cli: CommandLine, db: Connection, dsn: str, redis_url: str, rabbitmq_url: str, start: Start
) -> Environment:
    db.execute(shipped_path("flows", "price_update", "workflow.sql").read_bytes())
    port = find_free_port()
    found = Environment(port, f"{redis_url}?queue=labels", f"{rabbitmq_url}?queue=shops")
    # pgqueuer listens and prepares statements: it speaks to PostgreSQL itself, and not to a pooler before it.
    direct = {**found.variables, "PGFLOW_DSN": dsn, "PGDSN": make_uri(dsn)}
    pgq = Path(sys.executable).with_name("pgq")
    subprocess.run([pgq, "install"], env={**os.environ, **cli.environment, **direct}, check=True, capture_output=True)
    python = sys.executable
    start("endpoint", [python, FOLDER / "endpoint.py", port], found.variables)
    start("labels", [python, FOLDER / "consumers.py", "labels", found.labels], found.variables)
    start("shops", [python, FOLDER / "consumers.py", "shops", found.shops], found.variables)
    start("search", [python, FOLDER / "consumers.py", "search"], direct)
    wait_until(lambda: is_listening(port), "the endpoint takes requests")
    return found


def test_a_workflow_with_a_step_of_every_kind_runs_and_prices_each_row_once(
    cli: CommandLine, db: Connection, services: Services, prefect: PrefectView, surroundings: Environment
) -> None:
    handlers = str(shipped_path("flows", "price_update.py"))
    worker = services.start("worker", handlers, **surroundings.variables)
    worker.await_line("ready: price_update")
    run = "SELECT id FROM pgflow.run_workflow('price_update', %s::jsonb)"
    run_id = value(db, run, json.dumps(PAYLOAD))
    assert isinstance(run_id, UUID)

    def is_left_to_a_person() -> bool:
        return ("sign_off", "pending") in db.execute(STEPS, [run_id]).fetchall()

    wait_until(is_left_to_a_person, "everything but the signature is done")
    db.execute("""SELECT pgflow.complete_step(%s, 'sign_off', '{"by": "Ada"}')""", [run_id])

    def has_ended() -> bool:
        return value(db, "SELECT status FROM pgflow.runs WHERE id = %s", run_id) != "pending"

    wait_until(has_ended, "the queues' workers have done theirs")
    ended = cli("status", str(run_id), "--watch", "--json")

    assert ended.code == 0, ended
    shown = json.loads(ended.out)
    places = {"port": surroundings.port, "labels": surroundings.labels, "shops": surroundings.shops}
    assert {step["step_slug"]: step["handler"] for step in shown["steps"]} == {
        slug: kind.format(**places) for slug, kind in KINDS.items()
    }
    results = {step["step_slug"]: step["step_result"] for step in shown["steps"]}
    assert results["load_costs"] == dict.fromkeys(["books", "garden", "tools", "toys"], 1000)
    assert results["check_margins"] == {"checked": 4, "run": str(run_id)}
    told = ["labels: 4000", "shops: 3", "search: 4000"]
    assert results["report"] == {"products": PRODUCTS, "told": told}
    assert column(db, "SELECT DISTINCT priced_times FROM shop.products") == [1]
    assert value(db, "SELECT sum(price) > 1.1 * sum(cost) FROM shop.products") is True
    assert all(step["attempts"] == (0 if step["step_slug"] == "sign_off" else 1) for step in shown["steps"])
    prefect.await_task_states(run_id, dict.fromkeys(KINDS, "Completed"))
    assert surroundings.variables["MARGINS_TOKEN"] not in ended.out + worker.log.read_text()


def test_a_row_binds_the_endpoint_as_the_readme_of_the_examples_shows(
    cli: CommandLine, db: Connection, services: Services, start: Start
) -> None:
    """Without brokers: the three queues are left to a person, as `sign_off` is."""
    db.execute(shipped_path("flows", "price_update", "workflow.sql").read_bytes())
    origin = f"http://127.0.0.1:{find_free_port()}"
    variables = {
        "MARGINS_TOKEN": "any-secret",
        "PGFLOW_TOKEN_MARGINS": "any-secret",
        "PGFLOW_HTTP_ALLOW": origin,
        "PGFLOW_CREDENTIAL_ORIGINS": f"PGFLOW_TOKEN_MARGINS={origin}",
        "SHOPS_LOGIN": "guest:guest",
        "MARGINS_URL": "http://127.0.0.1:9/check",  # of the binding in Python, which the row replaces
    }
    port = int(origin.rpartition(":")[2])
    start("endpoint", [sys.executable, FOLDER / "endpoint.py", port], variables)
    wait_until(lambda: is_listening(port), "the endpoint takes requests")
    cli = replace(cli, environment={**cli.environment, **variables})
    by_row = ["--http", f"{origin}/check", "--token-env", "PGFLOW_TOKEN_MARGINS"]
    assert cli("bind", "price_update", "check_margins", *by_row).code == 0
    queues = ["print_labels", "tell_shops", "update_search"]
    for step in queues:
        assert cli("bind", "price_update", step, "--external").code == 0

    services.start("worker", str(shipped_path("flows", "price_update.py")), **variables)
    run_id = value(db, "SELECT id FROM pgflow.run_workflow('price_update', %s::jsonb)", json.dumps(PAYLOAD))
    assert isinstance(run_id, UUID)
    for step in ["sign_off", *queues]:
        wait_until(lambda step=step: (step, "pending") in db.execute(STEPS, [run_id]).fetchall(), f"{step} waits")  # type: ignore[misc]
        db.execute("SELECT pgflow.complete_step(%s, %s, '1')", [run_id, step])
    checked = "SELECT step_result FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'check_margins'"
    assert value(db, checked, run_id) == {"checked": 4, "run": str(run_id)}
    is_completed = "SELECT status = 'completed' FROM pgflow.runs WHERE id = %s"
    wait_until(lambda: value(db, is_completed, run_id) is True, "the run completes")
