"""What the tests of the Supabase kit share: its scripts, Supabase's roles, and a table of who may do what."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import dedent
from typing import LiteralString
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from pgflow_prefect.database.schema import SCRIPTS
from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connection

DENIED = "42501"

# What the statements of the tables are about.
RUN, FAILED = UUID(int=1), UUID(int=2)
ALICE, BOB = UUID(int=0xA), UUID(int=0xB)
SUBJECTS = {"run": RUN, "failed": FAILED, "alice": ALICE, "bob": BOB}

KIT_ROLES = ("pgflow_define", "pgflow_run", "pgflow_work", "pgflow_observe")
RELEASED_ROLE = "pgflow_execute"  # of the released pgflow alone
SUPABASE_ROLES = {"anon": "NOINHERIT", "authenticated": "NOINHERIT", "service_role": "NOINHERIT BYPASSRLS"}
AUTH = """
    CREATE SCHEMA auth;
    CREATE FUNCTION auth.jwt() RETURNS jsonb LANGUAGE sql STABLE AS
        $$ SELECT nullif(current_setting('request.jwt.claims', true), '')::jsonb $$;
    CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS
        $$ SELECT nullif(nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub', '')::uuid $$;
    GRANT USAGE ON SCHEMA auth TO anon, authenticated, service_role;
"""
RIGHTS = """
    SELECT 'schema ' || nspname, nspacl::text FROM pg_namespace WHERE nspname ~ '^pgflow'
    UNION ALL SELECT 'relation ' || c.oid::regclass,
                     concat_ws(' ', relkind, relrowsecurity, relforcerowsecurity, relreplident, relacl)
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname ~ '^pgflow'
    UNION ALL SELECT format('column %s.%s', attrelid::regclass, attname), attacl::text
    FROM pg_attribute JOIN pg_class c ON c.oid = attrelid JOIN pg_namespace n ON n.oid = relnamespace
    WHERE nspname ~ '^pgflow' AND NOT attisdropped
    UNION ALL SELECT 'function ' || p.oid::regprocedure, concat_ws(' ', prosecdef, md5(prosrc), proacl)
    FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE nspname ~ '^pgflow'
    UNION ALL SELECT format('policy %s on %s.%s', policyname, schemaname, tablename),
                     concat_ws(' ', permissive, roles, cmd, qual, with_check) FROM pg_policies
    UNION ALL SELECT format('trigger %s on %s', tgname, tgrelid::regclass), tgenabled::text
    FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'role ' || rolname, concat_ws(' ', rolcanlogin, rolinherit, rolbypassrls)
    FROM pg_roles WHERE rolname ~ '^pgflow_'
    UNION ALL SELECT 'published ' || tablename, pubname FROM pg_publication_tables
    ORDER BY 1
"""


def run_script(db: Connection, name: str) -> list[tuple[object, ...]]:
    """Run one of the kit's scripts, as an SQL editor does, and return the rows that the editor would show."""
    cursor = db.execute(shipped_path("sql", "supabase", f"{name}.sql").read_bytes())
    while cursor.nextset():
        pass
    return cursor.fetchall() if cursor.description else []


def read_rights(db: Connection) -> dict[object, object]:
    """Return everything that the kit's scripts decide, by a name for it."""
    return {row[0]: row[1] for row in db.execute(RIGHTS)}


@contextmanager
def borrowed_roles(server_dsn: str, dsn: str) -> Iterator[None]:
    """Lend a test Supabase's roles and the kit's: roles are the whole server's, so one test at a time, and none stays.

    Whatever roles named `kit_…` the test creates go as well.
    """
    with psycopg.connect(server_dsn, autocommit=True) as server:
        server.execute("SELECT pg_advisory_lock(7031902210564)")
        before = list_roles(server)
        for name, attributes in SUPABASE_ROLES.items():
            if name not in before:
                server.execute(f"CREATE ROLE {name} {attributes}".encode())
        try:
            yield
        finally:
            with psycopg.connect(dsn, autocommit=True) as db:
                borrowed = [name for name in list_roles(db) if name not in before]
                for name in borrowed:
                    db.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(name)))
                for name in borrowed:
                    db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def list_roles(db: Connection) -> list[str]:
    """Return the roles that this kit and its tests know of; those that were made by others of them come first."""
    ours = [*KIT_ROLES, RELEASED_ROLE, *SUPABASE_ROLES]
    found = db.execute(
        "SELECT rolname FROM pg_roles WHERE rolname = ANY (%s) OR rolname ~ '^kit_' ORDER BY oid DESC", [ours]
    )
    return [str(name) for [name] in found]


def create_role(db: Connection, attributes: str = "") -> str:
    """Create a role of this test's own."""
    name = f"kit_{uuid4().hex[:12]}"
    db.execute(f"CREATE ROLE {name} {attributes}".encode())
    return name


def become_owner(db: Connection, attributes: str) -> str:
    """Install everything anew as a role of this test's own, no superuser, and go on as that role."""
    name = create_role(db, attributes)
    db.execute("DROP SCHEMA pgflow CASCADE; DROP SCHEMA pgflow_prefect CASCADE")
    db.execute(f"GRANT CREATE ON DATABASE {db.info.dbname} TO {name}; SET ROLE {name}".encode())
    for script in SCRIPTS:
        db.execute(shipped_path("sql", script).read_bytes())
    return name


def become(db: Connection, role: str, user: UUID | None = None, **claims: object) -> Connection:
    """Let the connection act as a role and, as PostgREST does it, for a user of the application."""
    db.execute("RESET ROLE")
    token = Jsonb(claims | {"role": role} | ({"sub": str(user)} if user else {}))
    db.execute("SELECT set_config('request.jwt.claims', %s::jsonb::text, false)", [token])
    db.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    return db


def attempt(db: Connection, statement: LiteralString) -> str:
    """Try a statement about `SUBJECTS` and take it back: `yes`; `none` where it finds no row; `-`: refused."""
    try:
        with db.transaction(force_rollback=True):
            cursor = db.execute(statement, SUBJECTS)
            return "yes" if cursor.rowcount > 0 else "none"
    except psycopg.errors.InsufficientPrivilege:
        return "-"
    except psycopg.errors.NoDataFound:
        return "none"


def tabulate(
    db: Connection, actors: Mapping[str, tuple[str, UUID | None]], operations: Mapping[str, LiteralString]
) -> str:
    """Return a table of what each actor, a role and perhaps a user, may do."""
    cells: dict[str, list[str]] = {operation: [] for operation in operations}
    for role, user in actors.values():
        become(db, role, user)
        for operation, statement in operations.items():
            cells[operation].append(attempt(db, statement))
        db.execute("RESET ROLE")
    rows: Iterable[tuple[str, Sequence[str]]] = [("", [*actors]), *cells.items()]
    return "\n".join(_format_row(operation, texts) for operation, texts in rows)


def _format_row(operation: str, texts: Sequence[str]) -> str:
    return (f"{operation:<34}" + "".join(f"{text:<9}" for text in texts)).rstrip()


def table(text: str) -> str:
    """Return a table that a test expects, as `tabulate` would."""
    return "\n".join(line.rstrip() for line in dedent(text).strip("\n").splitlines())
