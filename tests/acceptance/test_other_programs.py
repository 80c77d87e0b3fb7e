"""A database whose schema pgflow belongs to another program."""

import json

import psycopg
import pytest

from tests.acceptance.conftest import CommandLine
from tests.conftest import route

RELEASED = """
    CREATE SCHEMA pgflow;
    CREATE TABLE pgflow.flows (flow_slug text PRIMARY KEY);
    CREATE TABLE pgflow.steps (flow_slug text REFERENCES pgflow.flows, step_slug text);
    CREATE TABLE pgflow.runs (run_id uuid PRIMARY KEY, flow_slug text, status text);
"""
OTHER = "CREATE SCHEMA pgflow; CREATE TABLE pgflow.workflows (id int PRIMARY KEY, name text)"


@pytest.mark.once
@pytest.mark.parametrize(
    ("tables", "whose", "table"),
    [(RELEASED, "the pgflow that npm has (pgflow.dev)", "flows"), (OTHER, "another program", "workflows")],
)
def test_every_command_says_whose_the_schema_is(
    outside: CommandLine, empty_dsn: str, tables: str, whose: str, table: str
) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as db:
        db.execute(tables.encode())
        before = db.execute("SELECT count(*) FROM pg_class").fetchone()
        for command in (("list",), ("runs",), ("validate", "x"), ("init",)):
            refused = outside(*command, "--dsn", route(empty_dsn))
            assert refused.code == 1
            assert f"pgflow.{table}, and no pgflow.workflows with a slug" in refused.find_error()
            assert "`pgflow-prefect init`" not in refused.err
        assert f"the schema pgflow belongs to {whose}" in outside("list", "--dsn", route(empty_dsn)).err
        assert db.execute("SELECT count(*) FROM pg_class").fetchone() == before, "init has changed nothing"
    checks = json.loads(outside("doctor", "--no-flow-run", "--json", "--dsn", route(empty_dsn)).out)
    [found] = [each for each in checks if each["check"] == "schema"]
    assert f"belongs to {whose}" in found["message"]
    assert "another database" in found["advice"]
