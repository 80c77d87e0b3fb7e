"""The storm's database: the product's two schemas, and tables that hold what is checked at the end."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import LiteralString
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Jsonb

from pgflow_prefect.database.schema import SCRIPTS
from pgflow_prefect.shipped import shipped_path
from tests.faults.servers import PATIENCE
from tests.faults.workflows import MapPlan, Steps, have_rules, make_payload

_OBSERVATIONS = """
CREATE SCHEMA faults;
-- Neither has a unique constraint: it would hide what this is here to show.
CREATE TABLE faults.written (run_id uuid, step_slug text, item_index int, attempt int);
CREATE TABLE faults.completions (run_id uuid, step_slug text, item_index int, attempts int);
CREATE FUNCTION faults.note_completion() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO faults.completions
    VALUES (new.run_id, new.step_slug, (to_jsonb(new) ->> 'item_index')::int, new.attempts);
    RETURN NULL;
END
$$;
CREATE TRIGGER note_completion AFTER UPDATE OF status ON pgflow.step_states FOR EACH ROW
WHEN (new.status = 'completed') EXECUTE FUNCTION faults.note_completion();
CREATE TRIGGER note_completion AFTER UPDATE OF status ON pgflow.step_items FOR EACH ROW
WHEN (new.status = 'completed') EXECUTE FUNCTION faults.note_completion();
"""

# What a worker needs; unlike a superuser, it meets the limits that are set for it.
_RIGHTS = """
GRANT USAGE ON SCHEMA {schema} TO {role};
GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {role};
GRANT ALL ON ALL SEQUENCES IN SCHEMA {schema} TO {role};
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {role};
"""

Row = tuple[object, ...]


class Database:
    """A connection that comes back when PostgreSQL does.

    Attributes:
        dsn: of a superuser.
        name: of the database.
    """

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.name = str(conninfo_to_dict(dsn)["dbname"])
        self._connection: psycopg.Connection[Row] | None = None

    def connect(self) -> psycopg.Connection[Row]:
        if self._connection is None:
            self._connection = psycopg.connect(self.dsn, autocommit=True, connect_timeout=5)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    def read(self, statement: LiteralString, parameters: Sequence[object] = ()) -> list[Row]:
        """Return what a statement returns that may be executed twice."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self.connect().execute(statement, parameters).fetchall()
            except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction):  # down, or a standby
                self.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def install(self, workflows: Mapping[str, Steps], role: str) -> None:
        """Make everything that the storm needs, with all workflows defined and enabled, and the role's rights."""
        connection = self.connect()
        for script in SCRIPTS:
            connection.execute(shipped_path("sql", script).read_bytes())
        connection.execute(_OBSERVATIONS)
        for schema in ("pgflow", "pgflow_prefect", "faults"):
            connection.execute(sql.SQL(_RIGHTS).format(schema=sql.Identifier(schema), role=sql.Identifier(role)))
        self.define(workflows)

    def set_option(self, role: str, option: str, text: str) -> None:
        """Have a role's sessions begin with a setting."""
        self.connect().execute(
            sql.SQL("ALTER ROLE {} SET {} = {}").format(sql.Identifier(role), sql.Identifier(option), sql.Literal(text))
        )

    def define(self, workflows: Mapping[str, Steps]) -> None:
        """Define workflows, and enable them."""
        connection = self.connect()
        for slug, steps in workflows.items():
            connection.execute("INSERT INTO pgflow.workflows VALUES (%s)", [slug])
            for step in steps:
                connection.execute("INSERT INTO pgflow.steps VALUES (%s, %s)", [slug, step])
            for step, plan in steps.items():
                for upstream in plan.upstream:
                    connection.execute("INSERT INTO pgflow.deps VALUES (%s, %s, %s)", [slug, upstream, step])
            if have_rules(steps):
                self._set_rules(slug, steps)
            connection.execute("SELECT pgflow_prefect.enable_workflow(%s)", [slug])

    def _set_rules(self, workflow: str, steps: Steps) -> None:
        connection = self.connect()
        connection.execute("UPDATE pgflow.workflows SET when_failed = 'continue' WHERE slug = %s", [workflow])
        for step, plan in steps.items():
            pattern = None if plan.pattern is None else Jsonb(plan.pattern)
            connection.execute(
                "UPDATE pgflow.steps SET rule = %s, required_input_pattern = %s, when_exhausted = %s, fails_run = %s "
                "WHERE workflow_slug = %s AND slug = %s",
                [plan.rule, pattern, plan.when_exhausted, plan.fails_run, workflow, step],
            )
            if plan.map is not None:
                self._set_map(workflow, step, plan.map)

    def _set_map(self, workflow: str, step: str, said: MapPlan) -> None:
        self.connect().execute(
            "UPDATE pgflow.steps SET step_type = 'map', map_over = %s, map_path = %s, max_items = %s, when_empty = %s, "
            "when_item_fails = %s WHERE workflow_slug = %s AND slug = %s",
            [said.source, [*said.path], said.max_items, said.when_empty, said.when_item_fails, workflow, step],
        )

    def start_run(self, workflow: str, run_id: UUID, number: int) -> None:
        """Start a run; where the answer is lost, again: the same id makes no second one."""
        payload = Jsonb(make_payload(number))
        self.read("SELECT id FROM pgflow.run_workflow(%s, %s, %s)", [workflow, payload, run_id])

    def list_pending(self) -> list[UUID]:
        return [UUID(str(run_id)) for (run_id,) in self.read("SELECT id FROM pgflow.runs WHERE status = 'pending'")]
