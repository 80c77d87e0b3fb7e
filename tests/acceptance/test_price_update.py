"""The example with a step of every kind, on the real servers: HTTP, Redis, RabbitMQ, pgqueuer, a person."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode
from uuid import UUID

import pytest
from psycopg.conninfo import conninfo_to_dict

from pgflow_prefect.shipped import shipped_path
from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import column, value

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
            "MARGINS_TOKEN": "a-token-that-nobody-may-see",
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


@pytest.fixture
def surroundings(
    cli: CommandLine, db: Connection, dsn: str, redis_url: str, rabbitmq_url: str
) -> Iterator[Environment]:
    db.execute(shipped_path("flows", "price_update", "workflow.sql").read_bytes())
    folder = shipped_path("flows", "price_update")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Environment(port, f"{redis_url}?queue=labels", f"{rabbitmq_url}?queue=shops")
    environment = {**os.environ, **cli.environment, **found.variables, "PYTHONPATH": str(folder)}
    # pgqueuer listens and prepares statements: it speaks to PostgreSQL itself, and not to a pooler before it.
    direct = {**environment, "PGFLOW_DSN": dsn, "PGDSN": make_uri(dsn)}
    pgq = Path(sys.executable).with_name("pgq")
    subprocess.run([pgq, "install"], env=direct, check=True, capture_output=True)
    python = sys.executable
    commands: dict[str, tuple[list[object], dict[str, str]]] = {
        "endpoint": ([python, folder / "endpoint.py", port], environment),
        "labels": ([python, folder / "consumers.py", "labels", found.labels], environment),
        "shops": ([python, folder / "consumers.py", "shops", found.shops], environment),
        "search": ([python, folder / "consumers.py", "search"], direct),
    }
    processes = []
    for name, (command, variables) in commands.items():
        with (cli.directory / f"{name}.log").open("wb") as log:
            arguments = [str(each) for each in command]
            processes.append(subprocess.Popen(arguments, env=variables, cwd=folder, stdout=log, stderr=log))
    wait_until(lambda: is_listening(port), "the endpoint takes requests")
    yield found
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
