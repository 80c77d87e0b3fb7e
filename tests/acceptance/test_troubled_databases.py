"""Services on databases in trouble: full, silent or read-only. No run is executed twice, and none is forgotten."""

import signal
import socket
from collections.abc import Callable, Iterator
from typing import LiteralString
from uuid import UUID, uuid4

import httpx
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection, execute
from tests.engine import get_run, get_state, run_workflow, value
from tests.silent_proxy import SilentProxy, silent_proxy

OTHERS: LiteralString = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def is_completed(db: Connection, run_id: UUID) -> bool:
    return bool(get_run(db, run_id).status == "completed")


def await_extensions(db: Connection, run_id: UUID, number: int) -> None:
    """Return once the run's lease was extended so many times."""
    for _ in range(number):
        before = value(db, "SELECT lease_until FROM pgflow_prefect.owners WHERE run_id = %s", run_id)

        def is_extended(before: object = before) -> bool:
            return value(db, "SELECT lease_until FROM pgflow_prefect.owners WHERE run_id = %s", run_id) != before

        wait_until(is_extended, "the lease is extended")


def check_executed_once(db: Connection, cli: CommandLine, run_id: UUID) -> None:
    wait_until(lambda: is_completed(db, run_id), "the run completes")
    assert cli.executions() == ["a", "b", "c"]
    assert [get_state(db, run_id, step).attempts for step in "abc"] == [1, 1, 1]
    assert value(db, "SELECT count(DISTINCT flow_run_id) FROM pgflow_prefect.flow_runs WHERE run_id = %s", run_id) == 1


@pytest.fixture
def login(db: Connection) -> Iterator[str]:
    """A role that may do what a worker needs; unlike a superuser, it meets its connection limit."""
    name = f"login_{uuid4().hex[:12]}"
    db.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'".encode())
    for schema in ("pgflow", "pgflow_prefect"):
        db.execute(
            f"GRANT USAGE ON SCHEMA {schema} TO {name}; GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {name};"
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA {schema} TO {name};"
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {name}".encode()
        )
    yield name
    db.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = %s", [name])
    db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


def fill(db: Connection, login: str) -> int:
    """Leave the role no room beside the connections that it has, and return how many these are."""
    of_login = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
    wait_until(lambda: value(db, f"{of_login} AND query LIKE 'LISTEN%%'", login) == 1, "the service listens")
    number = value(db, of_login, login)
    assert isinstance(number, int)
    db.execute(f"ALTER ROLE {login} CONNECTION LIMIT {number}".encode())
    return number


@pytest.mark.parametrize("concurrency", ["10", "1"])
def test_on_a_full_server_a_worker_keeps_the_run_that_it_executes(
    services: Services,
    db: Connection,
    cli: CommandLine,
    prefect: PrefectView,
    chain: str,
    dsn: str,
    login: str,
    concurrency: str,
) -> None:
    gate = cli.write("gate")
    ours = make_conninfo(dsn, user=login, password="secret")  # noqa: S106
    services.start("worker", "--concurrency", concurrency, PGFLOW_DSN=ours, PGFLOW_LEASE="2")
    fill(db, login)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    await_extensions(db, run_id, 5)  # more than a lease
    prefect.await_state(run_id, "Running")
    gate.unlink()
    check_executed_once(db, cli, run_id)


@pytest.mark.thorough
def test_on_a_full_server_a_process_of_serve_keeps_the_run_that_it_executes(
    services: Services, db: Connection, cli: CommandLine, chain: str, dsn: str, login: str
) -> None:
    gate = cli.write("gate")
    ours = make_conninfo(dsn, user=login, password="secret")  # noqa: S106
    services.start("serve", PGFLOW_DSN=ours, PGFLOW_LEASE="3")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    await_extensions(db, run_id, 1)
    number = value(db, "SELECT count(*) FROM pg_stat_activity WHERE usename = %s", login)
    assert isinstance(number, int)
    db.execute(f"ALTER ROLE {login} CONNECTION LIMIT {number - 1}".encode())
    db.execute(f"SELECT pg_terminate_backend(pid) {OTHERS} AND query LIKE '%extend_leases%'".encode())
    await_extensions(db, run_id, 5)  # more than a lease
    gate.unlink()
    check_executed_once(db, cli, run_id)


def test_a_worker_whose_connection_for_leases_is_lost_on_a_full_server_uses_its_pool(
    services: Services, db: Connection, cli: CommandLine, chain: str, dsn: str, login: str
) -> None:
    gate = cli.write("gate")
    ours = make_conninfo(dsn, user=login, password="secret")  # noqa: S106
    worker = services.start("worker", PGFLOW_DSN=ours, PGFLOW_LEASE="3")
    number = fill(db, login)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    await_extensions(db, run_id, 1)
    db.execute(f"ALTER ROLE {login} CONNECTION LIMIT {number - 1}".encode())
    assert value(db, f"SELECT pg_terminate_backend(pid) {OTHERS} AND query LIKE '%%extend_leases%%'")
    worker.await_line("the pool has to extend the leases")
    await_extensions(db, run_id, 5)
    gate.unlink()
    check_executed_once(db, cli, run_id)


def test_without_room_for_its_connections_a_worker_does_not_start(
    cli: CommandLine, db: Connection, chain: str, dsn: str, login: str
) -> None:
    db.execute(f"ALTER ROLE {login} CONNECTION LIMIT 1".encode())
    ended = cli("worker", PGFLOW_DSN=make_conninfo(dsn, user=login, password="secret"))  # noqa: S106
    assert ended.code == 1
    assert "no connection for the leases of runs" in ended.err
    assert "too many connections for role" in ended.err


@pytest.fixture
def proxy(dsn: str) -> Iterator[SilentProxy]:
    with silent_proxy(dsn) as opened:
        yield opened


SOON = {"PGFLOW_REPORT_TIMEOUT": "15", "PGFLOW_CONNECT_TIMEOUT": "2"}


def test_a_worker_whose_connections_died_silently_takes_the_next_run(
    services: Services, db: Connection, cli: CommandLine, chain: str, proxy: SilentProxy
) -> None:
    services.start("worker", PGFLOW_DSN=proxy.dsn, **SOON)
    proxy.fall_silent()
    check_executed_once(db, cli, run_workflow(db, chain, {}).id)


def test_what_finishes_on_a_silent_connection_is_reported_on_another_one(
    services: Services, db: Connection, cli: CommandLine, chain: str, proxy: SilentProxy
) -> None:
    gate = cli.write("gate")
    services.start("worker", PGFLOW_DSN=proxy.dsn, **SOON)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    proxy.fall_silent()
    gate.unlink()
    check_executed_once(db, cli, run_id)


@pytest.mark.parametrize("service", ["worker", "bridge", "serve"])
def test_sigterm_ends_a_service_whose_database_is_silent(
    services: Services, cli: CommandLine, chain: str, proxy: SilentProxy, service: str
) -> None:
    started = services.start(service, PGFLOW_DSN=proxy.dsn, **SOON)
    proxy.fall_silent(for_new_ones=True)
    started.await_line("no answer")  # a statement is under way, and finds out
    started.process.send_signal(signal.SIGTERM)
    assert started.wait() == 0


STUCK = """
import time
from pathlib import Path

from pgflow_prefect import StepContext, Workflow

workflow = Workflow("chain")


@workflow.step
def a(context: StepContext) -> int:
    context.connection.execute("SELECT 1")
    with Path("executions").open("a") as file:
        file.write("a\\n")
    while Path("gate").exists():
        time.sleep(0.02)
    context.connection.execute("SELECT 1")
    return 1


@workflow.step
async def b(a: int) -> int:
    return a


@workflow.step
def c(b: int) -> int:
    return b
"""


def test_one_sigterm_ends_a_worker_whose_handler_waits_on_a_silent_link(
    services: Services, cli: CommandLine, db: Connection, chain: str, proxy: SilentProxy
) -> None:
    gate = cli.write("gate")
    cli.write(f"flows/{chain}.py", STUCK.replace('Workflow("chain")', f'Workflow("{chain}")'))
    worker = services.start("worker", PGFLOW_DSN=proxy.dsn, **SOON)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "a" in cli.executions(), "a executes")
    proxy.fall_silent()
    proxy.synchronise()
    gate.unlink()
    worker.process.send_signal(signal.SIGTERM)
    worker.await_line("was handed back: the process ends")
    assert worker.wait() == 0
    assert get_run(db, run_id).status == "pending"


@pytest.fixture
def failover(db: Connection, server_dsn: str) -> Iterator[Callable[[bool], None]]:
    """A function that makes the database read-only, or writable again, and cuts all connections as a failover does."""
    database = sql.Identifier(db.info.dbname)

    def set_read_only(is_read_only: bool) -> None:
        setting = "SET default_transaction_read_only = on" if is_read_only else "RESET default_transaction_read_only"
        execute(server_dsn, sql.SQL("ALTER DATABASE {} {}").format(database, sql.SQL(setting)))
        db.execute(f"SELECT pg_terminate_backend(pid) {OTHERS}".encode())

    yield set_read_only
    set_read_only(False)


def test_a_worker_outlives_a_database_that_is_read_only_for_a_while(
    services: Services, db: Connection, cli: CommandLine, chain: str, failover: Callable[[bool], None]
) -> None:
    gate = cli.write("gate")
    worker = services.start("worker")
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    failover(True)
    gate.unlink()
    worker.await_line("read-only transaction; trying again")
    failover(False)
    check_executed_once(db, cli, run_id)
    assert worker.process.poll() is None


@pytest.mark.parametrize("service", ["worker", "bridge", "serve"])
def test_a_service_is_not_ready_on_a_read_only_database(
    cli: CommandLine, chain: str, failover: Callable[[bool], None], service: str
) -> None:
    failover(True)
    ended = cli(service, PGFLOW_REPORT_TIMEOUT="0.5")
    assert ended.code == 1
    assert "is read-only: default_transaction_read_only is on" in ended.err
    assert "ready:" not in ended.err


def test_doctor_names_a_read_only_database(cli: CommandLine, db: Connection, failover: Callable[[bool], None]) -> None:
    failover(True)
    ended = cli("doctor")
    assert ended.code == 1
    assert f"database '{db.info.dbname}' is read-only" in ended.out


@pytest.mark.parametrize("service", ["worker", "bridge", "serve"])
def test_probes_hear_whether_a_service_is_ready(
    services: Services, cli: CommandLine, chain: str, failover: Callable[[bool], None], service: str
) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = int(free.getsockname()[1])
    file = cli.directory / "health"
    started = services.start(service, "--health-port", str(port), "--health-file", str(file))

    def ask(path: str) -> tuple[int, str]:
        answer = httpx.get(f"http://127.0.0.1:{port}{path}")
        return answer.status_code, answer.text.strip()

    wait_until(lambda: ask("/ready") == (200, "ok"), "it is ready")
    wait_until(lambda: file.read_text(encoding="utf-8") == "ready\n", "the file says so")
    failover(True)
    wait_until(lambda: ask("/ready") == (503, "the database is read-only"), "it says why it is not")
    assert ask("/live") == (200, "ok")
    failover(False)
    wait_until(lambda: ask("/ready") == (200, "ok"), "it is ready again")
    started.process.send_signal(signal.SIGTERM)
    assert started.wait() == 0
    assert not file.exists()
