"""`push` and `export`: a workflow written in Python goes into the database, and comes out of it as SQL."""

import json
import subprocess
import sys
from dataclasses import replace

import psycopg
import pytest

from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection, route
from tests.engine import CHAIN, column, define, run_workflow, value

GREETING = """
from pgflow_prefect import Workflow

workflow = Workflow("greeting")

@workflow.step
async def fetch_name(payload: dict[str, int]) -> str: ...

@workflow.step("fetch-weather", unimplemented=True)
def fetch_weather() -> str: ...

@workflow.step
async def greet(fetch_name: str, fetch_weather: str) -> str: ...

@workflow.step(after=["greet"])
def clean_up() -> None: ...
"""

IS_NEW = [
    "workflow 'greeting' is new:",
    "  + step 'clean_up'",
    "  + step 'fetch-weather'",
    "  + step 'fetch_name'",
    "  + step 'greet'",
    "  + dep 'fetch-weather' -> 'greet'",
    "  + dep 'fetch_name' -> 'greet'",
    "  + dep 'greet' -> 'clean_up'",
]

DEPS = "SELECT from_step_slug || ' -> ' || to_step_slug FROM pgflow.deps ORDER BY 1"


@pytest.fixture
def cli(outside: CommandLine, product_dsn: str) -> CommandLine:
    """The command with this test's database, the file greeting.py, and no Prefect server."""
    outside.write("greeting.py", GREETING)
    return replace(outside, environment={**outside.environment, "PGFLOW_DSN": product_dsn})


def test_push_shows_what_differs_and_writes_it_when_told_to(cli: CommandLine, db: Connection) -> None:
    planned = cli("push", "greeting.py", "--dry-run")
    unasked = cli("push", "greeting.py")
    assert (planned.code, planned.lines, planned.err) == (2, IS_NEW, "")
    assert (unasked.code, unasked.lines, unasked.err) == (2, IS_NEW, "nothing was written: --yes writes it\n")
    assert column(db, "SELECT slug FROM pgflow.workflows") == []

    written = cli("push", "greeting.py", "--yes")
    assert (written.code, written.lines, written.err) == (0, [*IS_NEW, "wrote workflow 'greeting'"], "")
    assert column(db, DEPS) == ["fetch-weather -> greet", "fetch_name -> greet", "greet -> clean_up"]

    version = value(db, "SELECT version FROM pgflow.workflows")
    again = cli("push", "greeting.py", "--yes")
    assert (again.code, again.lines, again.err) == (0, ["workflow 'greeting': nothing to change"], "")
    assert value(db, "SELECT version FROM pgflow.workflows") == version


@pytest.mark.once
def test_push_removes_what_the_file_no_longer_says(cli: CommandLine, db: Connection) -> None:
    define(db, "greeting", {"fetch_name": [], "fetch-weather": [], "greet": ["fetch_name"], "old": ["greet"]})

    written = cli("push", "greeting", "--yes")  # as a module

    assert written.lines == [
        "workflow 'greeting' differs:",
        "  + step 'clean_up'",
        "  - step 'old'",
        "  + dep 'fetch-weather' -> 'greet'",
        "  + dep 'greet' -> 'clean_up'",
        "  - dep 'greet' -> 'old'",
        "wrote workflow 'greeting'",
    ]
    assert column(db, "SELECT slug FROM pgflow.steps ORDER BY 1") == [
        "clean_up",
        "fetch-weather",
        "fetch_name",
        "greet",
    ]


def test_push_leaves_a_workflow_alone_of_which_a_pending_run_needs_a_step(cli: CommandLine, db: Connection) -> None:
    define(db, "greeting", {"fetch_name": [], "old": ["fetch_name"]})
    run_id = run_workflow(db, "greeting").id

    refused = cli("push", "greeting.py", "--yes")

    assert refused.code == 1
    assert f'step "old" of workflow "greeting" can\'t be deleted: run {run_id} is pending' in refused.find_error()
    assert "wrote" not in refused.out
    assert column(db, DEPS) == ["fetch_name -> old"]


@pytest.mark.once
def test_push_names_everything_that_keeps_handlers_from_being_a_definition(cli: CommandLine) -> None:
    cli.write("broken.py", GREETING.replace("fetch_name: str", "fetch_nam: str").replace('["greet"]', '["great"]'))

    refused = cli("push", "broken.py", "--yes")

    assert refused.code == 2
    assert refused.find_error().splitlines() == [
        "workflow 'greeting' has 2 problems:",
        "  - the handler of step 'greet' takes 'fetch_nam', which is no step of this workflow "
        "(did you mean 'fetch_name'?)",
        "  - step 'clean_up' is to come after 'great', which is no step of this workflow (did you mean 'greet'?)",
    ]


@pytest.mark.once
def test_push_of_several_workflows_tells_scripts_what_becomes_of_each(cli: CommandLine, db: Connection) -> None:
    define(db, "chain", CHAIN)
    cli.write(
        "chain.py",
        "from pgflow_prefect import Workflow\n"
        "chain = Workflow('chain')\n"
        "chain.step('a')(lambda: 1)\nchain.step('b')(lambda a: a)\nchain.step('c')(lambda b: b)\n",
    )

    chosen = cli("push", "greeting.py", "chain.py", "--workflow", "greeting", "--json")
    written = cli("push", "greeting.py", "chain.py", "--json", "--yes")

    assert (chosen.code, written.code) == (2, 0)
    greeting, chain = json.loads(written.out)
    assert greeting["new"] is True
    assert greeting["steps_added"] == ["clean_up", "fetch-weather", "fetch_name", "greet"]
    assert ["greet", "clean_up"] in greeting["deps_added"]
    assert greeting["written"] is True
    assert json.loads(chosen.out) == [{**greeting, "written": False}]
    nothing: dict[str, list[str]] = {"steps_added": [], "steps_removed": [], "deps_added": [], "deps_removed": []}
    told = {"workflow": "chain", "new": False, **nothing, "written": False}
    assert {name: chain[name] for name in told} == told


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "which file?"),
        (["greeting.py", "--dry-run", "--yes"], "--dry-run and --yes exclude each other"),
        (["greeting.py", "--workflow", "greting"], "no file has workflow 'greting' (did you mean 'greeting'?)"),
        (["plain.py"], "plain.py has no handlers: it has no Workflow"),
        (["nowhere.py"], "there is no file nowhere.py"),
    ],
)
def test_push_that_can_not_be_meant_is_refused(cli: CommandLine, arguments: list[str], reason: str) -> None:
    cli.write("plain.py", "from prefect import flow\n\n@flow\ndef greeting(): ...\n")

    refused = cli("push", *arguments)

    assert refused.code == 2
    assert refused.find_error().startswith(reason)


def test_a_workflow_goes_from_one_database_to_another_as_sql(cli: CommandLine, db: Connection, empty_dsn: str) -> None:
    cli("push", "greeting.py", "--yes")
    define(db, "it's", {"\\": [], "a\u2028b": ["\\"]})

    exported = cli("export", "--all")
    again = cli("export", "greeting", "it's", "greeting")
    assert (exported.code, exported.err) == (0, "")
    assert exported.out == again.out, "the same text, each workflow once"

    there = route(empty_dsn)
    cli("init", PGFLOW_DSN=there)
    with psycopg.connect(empty_dsn, autocommit=True) as other:
        for _ in range(2):
            other.execute(exported.out.encode())
        assert column(other, DEPS) == column(db, DEPS)
        assert column(other, "SELECT slug FROM pgflow.steps ORDER BY 1") == column(
            db, "SELECT slug FROM pgflow.steps ORDER BY 1"
        )
    assert cli("export", "--all", PGFLOW_DSN=there).out == exported.out
    assert cli("push", "greeting.py", "--dry-run", PGFLOW_DSN=there).code == 0


@pytest.mark.once
def test_export_tells_scripts_the_definition(cli: CommandLine, db: Connection) -> None:
    define(db, "chain", CHAIN)

    [chain] = json.loads(cli("export", "chain", "--json").out)

    assert len(chain.pop("definition_hash")) == 16
    assert chain == {"slug": "chain", "steps": ["a", "b", "c"], "deps": [["a", "b"], ["b", "c"]]}


@pytest.mark.once
def test_export_of_nothing_and_of_an_unknown_workflow_is_refused(cli: CommandLine, db: Connection) -> None:
    define(db, "chain", CHAIN)
    nothing, unknown = cli("export"), cli("export", "chian")

    assert (nothing.code, unknown.code) == (2, 2)
    assert "name it, or say --all" in nothing.find_error()
    assert "unknown workflow 'chian' (did you mean 'chain'?)" in unknown.find_error()


@pytest.mark.once
def test_export_of_a_cycle_that_the_engine_never_saw_names_it(cli: CommandLine, db: Connection) -> None:
    define(db, "chain", CHAIN)
    with db.transaction():
        db.execute("SET LOCAL session_replication_role = replica")  # as when a dump is loaded: no triggers
        db.execute("INSERT INTO pgflow.deps VALUES ('chain', 'c', 'a')")

    refused = cli("export", "chain")

    assert refused.code == 2
    assert "its steps wait for each other: a -> b -> c -> a" in refused.find_error()


@pytest.mark.once
def test_the_stubs_that_import_writes_define_the_workflow_that_they_are_from(cli: CommandLine, db: Connection) -> None:
    define(db, "chain", {**CHAIN, "2nd-root": [], "the join": ["a", "c", "2nd-root"]})
    cli("import", "chain")

    assert cli("push", "flows/chain.py").lines == ["workflow 'chain': nothing to change"]


@pytest.mark.once
def test_export_does_not_wait_for_prefect_to_be_imported() -> None:
    looked = "import sys, pgflow_prefect.cli.push; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", looked], check=False).returncode == 0
