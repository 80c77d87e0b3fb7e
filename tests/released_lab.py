"""The released pgflow on a plain PostgreSQL, for tests: npm's migrations, and stand-ins for what Supabase brings.

Nothing of pgflow's is kept here. The migrations come from npm, or from directories that `PGFLOW_TEST_RELEASED` names.
npm has no version that skips steps, so there is a stand-in of our own for one that does: `released_fake.sql`.
"""

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connection

PACKAGE = "@pgflow/core@0.8.1"
FAKE = "our own stand-in for 0.14"
DIRECTORIES = "PGFLOW_TEST_RELEASED"
REQUIRED = "required"

# What pgflow's migrations and functions use of Supabase. No part of it does anything outside the database.
STAND_INS = """
    CREATE SCHEMA realtime;
    CREATE TABLE realtime.messages (payload jsonb, event text, topic text, private boolean);
    CREATE FUNCTION realtime.send(payload jsonb, event text, topic text, private boolean DEFAULT true) RETURNS void
        LANGUAGE sql AS $$ INSERT INTO realtime.messages VALUES (payload, event, topic, private) $$;

    CREATE SCHEMA vault;
    CREATE TABLE vault.decrypted_secrets (name text PRIMARY KEY, decrypted_secret text NOT NULL);

    CREATE SCHEMA net;
    CREATE TABLE net.requests (id bigint GENERATED ALWAYS AS IDENTITY, url text, headers jsonb, body jsonb);
    CREATE FUNCTION net.http_post(url text, body jsonb DEFAULT '{}', params jsonb DEFAULT '{}',
                                  headers jsonb DEFAULT '{}', timeout_milliseconds int DEFAULT 5000) RETURNS bigint
        LANGUAGE sql AS $$ INSERT INTO net.requests (url, headers, body) VALUES (url, headers, body) RETURNING id $$;

    CREATE SCHEMA cron;
    CREATE TABLE cron.job (jobid bigint GENERATED ALWAYS AS IDENTITY, jobname text PRIMARY KEY, schedule text,
                           command text);
    CREATE TABLE cron.job_run_details (jobid bigint, start_time timestamptz, end_time timestamptz, status text);
    CREATE FUNCTION cron.schedule(job_name text, schedule text, command text) RETURNS bigint LANGUAGE sql AS $$
        INSERT INTO cron.job (jobname, schedule, command) VALUES (job_name, schedule, command)
        ON CONFLICT (jobname) DO UPDATE SET schedule = excluded.schedule, command = excluded.command RETURNING jobid $$;
    CREATE FUNCTION cron.unschedule(job_name text) RETURNS boolean LANGUAGE sql AS $$
        WITH gone AS (DELETE FROM cron.job WHERE jobname = job_name RETURNING 1) SELECT EXISTS (SELECT FROM gone) $$;
"""

_EXTENSION = re.compile(r"^\s*create\s+extension\b[^;]*;", re.IGNORECASE | re.MULTILINE)


def list_sources() -> list[str]:
    """Return where migrations come from: npm's package, our stand-in, and each directory that the variable names."""
    named = os.environ.get(DIRECTORIES, "")
    return [PACKAGE, FAKE, *(each for each in named.split(os.pathsep) if each and each != REQUIRED)]


@cache
def find_migrations(source: str) -> tuple[bytes, ...]:
    """Return pgflow's migrations in their order; skip the test where they, or PyPI's `pgmq`, can't be had."""
    if find_spec("pgmq") is None:
        _give_up("PyPI's `pgmq`, which has its SQL, is not installed: `pip install 'pgflow-prefect[dev]'`")
    if source == FAKE:
        return (Path(__file__).with_name("released_fake.sql").read_bytes(),)
    if source != PACKAGE:
        return _read(Path(source))
    if shutil.which("npm") is None:
        _give_up(f"npm is not installed: install it, or name directories with pgflow's migrations in {DIRECTORIES}")
    with tempfile.TemporaryDirectory() as directory:
        packing = ["npm", "pack", "--silent", "--fetch-retries=5", "--pack-destination", directory, PACKAGE]
        try:
            subprocess.run(packing, check=True, timeout=120, capture_output=True, cwd=directory)
        except (subprocess.SubprocessError, OSError) as error:
            _give_up(
                f"npm can't get {PACKAGE} ({error}): let npm reach its registry, or name directories with pgflow's "
                f"migrations in {DIRECTORIES}"
            )
        [archive] = Path(directory).glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(directory, filter="data")
        return _read(Path(directory))


def _read(directory: Path) -> tuple[bytes, ...]:
    found = sorted(directory.rglob("*_pgflow_*.sql"), key=lambda file: file.name)
    if not found:
        _give_up(f"{directory} has no migrations of pgflow: name another directory in {DIRECTORIES}")
    return tuple(_EXTENSION.sub("", file.read_text(encoding="utf-8")).encode() for file in found)


def _give_up(reason: str) -> None:
    """Skip the test, or fail it where the released pgflow has to be there."""
    if REQUIRED in os.environ.get(DIRECTORIES, "").split(os.pathsep):
        pytest.fail(reason)
    pytest.skip(reason)


def install_released(dsn: str, source: str) -> None:
    """Install the released pgflow in an empty database, each migration in a transaction of its own."""
    migrations = find_migrations(source)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(STAND_INS.encode())
        connection.execute(files("pgmq").joinpath("sql/pgmq.sql").read_bytes())
        for migration in migrations:
            with connection.transaction():
                connection.execute(migration)


@dataclass(frozen=True)
class ReleasedFlows:
    """Flows, runs and tasks of the released pgflow, made by its own functions: what its Edge workers do.

    Attributes:
        db: a connection to its database.
    """

    db: Connection

    def define(
        self,
        slug: str,
        steps: Mapping[str, Sequence[str]],
        maps: Sequence[str] = (),
        attempts: int = 1,
        **options: str,
    ) -> None:
        """Define a flow.

        Args:
            slug: its slug.
            steps: the steps, each with those that it waits for.
            maps: those that are map steps.
            attempts: of each task; the next one is due at once.
            options: further arguments of `add_step` for the step of this name, as SQL.
        """
        self.db.execute("SELECT pgflow.create_flow(%s, max_attempts => %s, base_delay => 0)", [slug, attempts])
        for step, upstream in steps.items():
            kind = "map" if step in maps else "single"
            more = f", {options[step]}" if step in options else ""
            add = f"SELECT pgflow.add_step(%s, %s, %s::text[], step_type => %s{more})"
            self.db.execute(add.encode(), [slug, step, list(upstream), kind])

    def start(self, slug: str, given: object) -> UUID:
        """Start a run."""
        row = self.db.execute("SELECT run_id FROM pgflow.start_flow(%s, %s)", [slug, Jsonb(given)]).fetchone()
        assert row is not None
        return UUID(str(row[0]))

    def work(self, slug: str, do: Callable[[str, int], object], *, at_most: int = 100) -> list[tuple[str, int]]:
        """Do the tasks that are queued, as a worker of this flow does, and return step and index of each.

        Args:
            slug: the flow.
            do: returns the output of a task, of this step and index; an exception is its failure.
            at_most: tasks.
        """
        return list(self._work(slug, do, at_most))

    def _work(self, slug: str, do: Callable[[str, int], object], at_most: int) -> Iterator[tuple[str, int]]:
        for run_id, step, index in self.claim(slug, at_most):
            task = [run_id, step, index]
            try:
                output = do(step, index)
            except Exception as error:  # noqa: BLE001  whatever a handler raises
                self.db.execute("SELECT pgflow.fail_task(%s, %s, %s, %s)", [*task, str(error)])
            else:
                self.complete((run_id, step, index), output)
            yield step, index

    def complete(self, task: tuple[UUID, str, int], output: object) -> None:
        """Report a task, given with run, step and index, as done."""
        self.db.execute("SELECT pgflow.complete_task(%s, %s, %s, %s)", [*task, Jsonb(output)])

    def claim(self, slug: str, at_most: int = 100) -> list[tuple[UUID, str, int]]:
        """Claim tasks as a worker does, and return run, step and index of each."""
        worker = uuid4()
        register = "INSERT INTO pgflow.workers (worker_id, queue_name, function_name) VALUES (%s, %s, 'edge')"
        self.db.execute(register, [worker, slug])
        read = "SELECT array_agg(msg_id ORDER BY msg_id) FROM pgmq.read(%s, 0, %s)"
        [messages] = self.db.execute(read, [slug, at_most]).fetchone() or [None]
        started = """
            SELECT t.run_id, t.step_slug, t.task_index FROM pgflow.start_tasks(%s, %s::bigint[], %s) s
            JOIN pgflow.step_tasks t ON t.run_id = s.run_id AND t.message_id = s.msg_id
        """
        rows = self.db.execute(started, [slug, messages or [], worker]).fetchall()
        return [(UUID(str(run)), str(step), int(str(index))) for run, step, index in rows]


@contextmanager
def open_flows(dsn: str) -> Iterator[ReleasedFlows]:
    """Connect to a database of the released pgflow."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield ReleasedFlows(connection)


def read_objects(db: Connection) -> list[tuple[object, ...]]:
    """Return every object of the schema pgflow with its definition, to tell whether it was changed."""
    statement = sql.SQL("""
        SELECT 'relation', c.oid::regclass::text, c.relkind::text || coalesce(c.relacl::text, '') FROM pg_class c
        WHERE c.relnamespace = 'pgflow'::regnamespace
        UNION ALL SELECT 'function', p.oid::regprocedure::text, md5(p.prosrc) || coalesce(p.proacl::text, '')
        FROM pg_proc p WHERE p.pronamespace = 'pgflow'::regnamespace
        UNION ALL SELECT 'trigger', t.tgname::text || t.tgrelid::regclass::text, pg_get_triggerdef(t.oid)
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid AND c.relnamespace = 'pgflow'::regnamespace
        ORDER BY 1, 2
    """)
    return db.execute(statement).fetchall()


def run_released_script(db: Connection, name: str) -> None:
    """Run one of our scripts for the released pgflow, as an SQL editor does."""
    cursor = db.execute(shipped_path("sql", f"released/{name}.sql").read_bytes())
    while cursor.nextset():
        pass
