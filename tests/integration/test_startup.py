"""What starting takes: a command imports what it needs, and a command without Prefect does not wait for it."""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest

from pgflow_prefect.cli.app import COMMANDS
from tests.conftest import Connection
from tests.engine import CHAIN, define, run_workflow

pytestmark = pytest.mark.processes

CALL = """
import json, sys
from contextlib import suppress
from pgflow_prefect.cli import main

for arguments in json.loads(sys.argv[1]):
    with suppress(SystemExit):
        main(arguments)
json.dump([*sys.modules], sys.stderr)
"""

HEAVY = {"anyio", "jinja2", "networkx", "prefect", "psycopg", "psycopg_pool", "pydantic", "pydantic_settings"}
"""What takes about as long to import as a help takes to be shown, or longer."""


class Called(NamedTuple):
    """What commands printed, and what they had imported in the end."""

    out: str
    modules: list[str]

    @property
    def heavy(self) -> set[str]:
        return HEAVY & {*self.modules}


def call(*commands: list[str]) -> Called:
    """Call commands, one after the other, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    return Called(done.stdout, json.loads(done.stderr.splitlines()[-1]))


def test_the_list_of_commands_needs_what_draws_it_and_nothing_else() -> None:
    called = call(["--help"])

    assert all(f" {command} " in called.out for command in COMMANDS)
    assert called.heavy == set()
    assert "markdown_it" not in called.modules
    assert len(called.modules) < 300


def test_no_help_of_a_command_imports_what_the_command_works_with() -> None:
    called = call(*([command, "--help"] for command in COMMANDS))

    assert called.out.count("Usage: pgflow-prefect ") == len(COMMANDS)
    assert called.heavy == {"pydantic"}  # for the names of statuses


def test_the_guide_is_read_without_all_that() -> None:
    called = call(["guide"], ["guide", "scaling"])

    assert called.out.startswith("page\tabout\n")
    assert called.heavy == set()


@pytest.mark.parametrize("command", ["list", "runs"])
def test_what_lists_rows_imports_what_reads_them(product_dsn: str, command: str) -> None:
    called = call([command, "--json", "--dsn", product_dsn])

    assert json.loads(called.out) == []
    assert called.heavy == {"anyio", "psycopg", "psycopg_pool", "pydantic", "pydantic_settings"}
    assert len(called.modules) < 700


def test_what_shows_a_workflow_or_a_run_does_not_import_prefect(product_dsn: str, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run = run_workflow(db, "chain")

    called = call(["graph", "chain", "--dsn", product_dsn], ["status", str(run.id), "--dsn", product_dsn])

    assert f"run {run.id} of workflow 'chain': pending" in called.out
    assert called.heavy == HEAVY - {"prefect", "jinja2"}
