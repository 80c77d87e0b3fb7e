"""Commands as a role that row-level security applies to: each says so, and none answers from the rows that are left."""

from collections.abc import Iterator
from uuid import UUID, uuid4

import anyio
import pytest
from psycopg.conninfo import make_conninfo

from pgflow_prefect.database.consumer_store import ConsumerStore
from pgflow_prefect.errors import HiddenRowsError
from pgflow_prefect.models import TaskKey
from tests.acceptance.chain import CHAIN_HANDLERS
from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection
from tests.engine import CHAIN, claim, define, get_state, run_workflow

COMMANDS = {
    "list": ["list"],
    "graph": ["graph", "chain"],
    "runs": ["runs"],
    "status": ["status", "latest"],
    "push": ["push", "handlers.py", "--dry-run"],
    "reconcile": ["reconcile"],
    "worker": ["worker", "handlers.py"],
    "run": ["run", "chain", "--handlers", "handlers.py", "--payload", "{}"],
    "cancel": ["cancel", "latest"],
    "enable": ["enable", "chain"],
    "bind": ["bind", "chain", "a", "--external"],
    "prune": ["prune", "--older-than", "1d", "--dry-run"],
    "export": ["export", "chain"],
    "init": ["init"],
}


@pytest.fixture
def role(db: Connection) -> Iterator[str]:
    """A role that may do everything, and that row-level security applies to."""
    name = f"hidden_{uuid4().hex[:12]}"
    db.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret' NOSUPERUSER NOBYPASSRLS".encode())
    for schema in ("pgflow", "pgflow_prefect"):
        db.execute(
            f"GRANT USAGE ON SCHEMA {schema} TO {name}; GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {name};"
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {name}".encode()
        )
    yield name
    db.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = %s", [name])
    db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


@pytest.fixture
def run_id(db: Connection) -> UUID:
    define(db, "chain", CHAIN)
    return run_workflow(db, "chain").id


@pytest.mark.parametrize("table", ["pgflow.runs", "pgflow.workflows", "pgflow_prefect.heartbeats"])
def test_a_command_names_the_table_and_the_role(
    cli: CommandLine, db: Connection, dsn: str, role: str, run_id: UUID, table: str
) -> None:
    db.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY".encode())
    listed = cli("list", PGFLOW_DSN=make_conninfo(dsn, user=role, password="secret"))  # noqa: S106
    assert (listed.code, listed.out) == (1, "")
    assert f"the database role '{role}' may not see every row of {table}" in listed.find_error()
    assert f"ALTER ROLE {role} BYPASSRLS" in " ".join(listed.find_error().split())


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_says_that_rows_are_hidden(
    cli: CommandLine, db: Connection, dsn: str, role: str, run_id: UUID, command: str
) -> None:
    cli.write("handlers.py", CHAIN_HANDLERS)
    for table in ("runs", "step_states", "workflows", "steps", "deps"):
        db.execute(f"ALTER TABLE pgflow.{table} ENABLE ROW LEVEL SECURITY".encode())
    ended = cli(*COMMANDS[command], PGFLOW_DSN=make_conninfo(dsn, user=role, password="secret"))  # noqa: S106
    assert (ended.code, ended.out) == (1, "")
    assert f"the database role '{role}' may not see every row of pgflow.runs" in ended.find_error()
    assert get_state(db, run_id, "a").status == "pending"


def test_doctor_names_the_tables(cli: CommandLine, db: Connection, dsn: str, role: str) -> None:
    db.execute("ALTER TABLE pgflow.runs ENABLE ROW LEVEL SECURITY")
    ended = cli("doctor", PGFLOW_DSN=make_conninfo(dsn, user=role, password="secret"))  # noqa: S106
    assert ended.code == 1
    assert "BYPASSRLS, for row-level security of pgflow.runs" in " ".join(ended.out.split())


def test_a_role_that_sees_every_row_is_let_in(
    cli: CommandLine, db: Connection, dsn: str, role: str, run_id: UUID
) -> None:
    db.execute("ALTER TABLE pgflow.runs ENABLE ROW LEVEL SECURITY")
    db.execute(f"ALTER ROLE {role} BYPASSRLS".encode())
    listed = cli("list", PGFLOW_DSN=make_conninfo(dsn, user=role, password="secret"))  # noqa: S106
    assert listed.code == 0
    assert "chain" in listed.out


def test_a_consumer_of_a_queue_does_nothing(db: Connection, dsn: str, role: str, run_id: UUID) -> None:
    claim(db, run_id, "a")
    db.execute("ALTER TABLE pgflow.step_states ENABLE ROW LEVEL SECURITY")
    store = ConsumerStore(make_conninfo(dsn, user=role, password="secret"), connect_timeout=10, patience=10)  # noqa: S106

    async def find() -> None:
        await store.find_handover(run_id, TaskKey("a"), 1)

    with pytest.raises(HiddenRowsError, match=f"role '{role}' may not see every row of pgflow.step_states"):
        anyio.run(find)
    assert get_state(db, run_id, "a").status == "pending"
