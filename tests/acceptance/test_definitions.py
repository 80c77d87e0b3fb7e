"""What the commands that look at definitions print, and what `init` installs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from pgflow_prefect.cli.app import COMMANDS
from pgflow_prefect.database.schema import ADAPTER_VERSION, ENGINE_VERSION
from pgflow_prefect.shipped import shipped_path
from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection, route
from tests.engine import CHAIN, DIAMOND, column, define

HELP = """
import sys
from contextlib import suppress
from pgflow_prefect.cli import main

for command in sys.argv[1:]:  # in one process, because importing Prefect takes seconds
    with suppress(SystemExit):
        main([command, "--help"])
"""


def test_init_installs_what_is_missing_and_changes_nothing_again(cli: CommandLine, empty_dsn: str) -> None:
    first = cli("init", "--dsn", route(empty_dsn))
    again = cli("init", "--dsn", route(empty_dsn))

    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("installed in database 'test_")
    assert again.code == 0
    assert f"is current: pgflow {ENGINE_VERSION}, pgflow_prefect {ADAPTER_VERSION}" in again.out
    told = json.loads(cli("init", "--dsn", route(empty_dsn), "--json").out)
    assert (told["outcome"], told["before"]) == ("current", told["after"])
    assert told["after"] == {"pgflow": ENGINE_VERSION, "pgflow_prefect": ADAPTER_VERSION}


def test_init_that_waits_for_a_lock_in_vain_says_what_to_do(outside: CommandLine, empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as db, psycopg.connect(empty_dsn) as reader:
        db.execute("CREATE SCHEMA pgflow; CREATE TABLE pgflow.workflows (slug TEXT PRIMARY KEY NOT NULL)")
        reader.execute("TABLE pgflow.workflows")
        failed = outside("init", "--dsn", route(empty_dsn))
    assert failed.code == 1
    assert "another transaction holds a table of database" in failed.find_error()
    assert "let that transaction end, and run `pgflow-prefect init` again" in failed.err


def test_init_only_prints_its_sql_on_a_dry_run(outside: CommandLine, empty_dsn: str) -> None:
    printed = outside("init", "--dry-run")

    assert printed.code == 0
    with psycopg.connect(empty_dsn, autocommit=True) as db:
        assert column(db, "SELECT nspname FROM pg_namespace WHERE nspname ~ '^pgflow'") == []
        db.execute(printed.out.encode())
        define(db, "chain", CHAIN)
        db.execute("SELECT pgflow.run_workflow('chain', '{}')")
    assert "is current" in outside("init", "--dsn", route(empty_dsn)).out


def test_list_names_each_workflow_with_its_size_and_its_runs(cli: CommandLine, db: Connection) -> None:
    assert "insert one into pgflow.workflows" in cli("list").out

    define(db, "chain", CHAIN)
    define(db, "diamond", DIAMOND)
    db.execute("SELECT pgflow.run_workflow('chain', '{}')")

    assert cli("list").lines == [
        "workflow\tsteps\tdeps\tpending\tcompleted\tfailed\tenabled\tbound",
        "chain\t3\t2\t1\t0\t0\t-\t-",
        "diamond\t4\t4\t0\t0\t0\t-\t-",
    ]
    chain, diamond = json.loads(cli("list", "--json").out)
    counts = {"steps": 3, "deps": 2, "pending": 1, "completed": 0, "failed": 0}
    assert chain == {"slug": "chain", **counts, "enabled": None, "bound": None}
    assert diamond["slug"] == "diamond"


@pytest.mark.once
def test_graph_draws_as_text_and_as_mermaid(cli: CommandLine, db: Connection) -> None:
    define(db, "diamond", DIAMOND)

    text = cli("graph", "diamond")
    mermaid = cli("graph", "diamond", "--format", "mermaid")

    assert (text.code, mermaid.code) == (0, 0)
    assert text.lines[-1] == "4 steps, 4 dependencies, 3 layers; critical path: a -> b -> d"
    assert all(any(line.endswith(step) for line in text.lines) for step in DIAMOND)
    assert mermaid.lines[0] == "flowchart LR"
    names = dict(re.findall(r'(step\d)\["(\w)"\]', mermaid.out))
    arrows = re.findall(r"(step\d) --> (step\d)", mermaid.out)
    assert {(names[upstream], names[downstream]) for upstream, downstream in arrows} == {
        ("a", "b"),
        ("a", "c"),
        ("b", "d"),
        ("c", "d"),
    }


@pytest.mark.once
def test_validate_says_that_a_workflow_fits_its_handlers(cli: CommandLine, chain: str) -> None:
    valid = cli("validate", chain)

    assert (valid.code, valid.err) == (0, "")
    assert valid.lines[0] == f"handlers: flows/{chain}.py"
    assert valid.lines[1].startswith(f"workflow {chain!r} is valid: 3 steps, 2 dependencies")


@pytest.mark.once
def test_validate_names_every_problem_at_once(cli: CommandLine, db: Connection) -> None:
    define(db, "broken", {"load": [], "check-it": ["load"], "check_it": ["load"], "send": ["load"], "lost": []})
    cli.write(
        "handlers.py",
        """
from pgflow_prefect import Workflow

workflow = Workflow("broken")

@workflow.step(unimplemented=True)
def load(payload): ...

@workflow.step
def send(lod): ...

@workflow.step
def sned(load): ...

@workflow.step("check-it")
def check(load: "Nothing"): ...
""",
    )

    plain = cli("validate", "broken", "--handlers", "handlers.py")
    as_json = cli("validate", "broken", "--handlers", "handlers", "--json")

    assert (plain.code, as_json.code) == (1, 1)
    told = json.loads(as_json.out)
    assert (told["workflow"], told["handlers"]) == ("broken", "handlers")
    assert re.fullmatch("[0-9a-f]{16}", told["definition_hash"])
    problems = told["problems"]
    for part in (
        "the steps 'check-it', 'check_it' have the same Python name 'check_it'",
        "handler 'sned' fits no step",
        "takes 'lod', which is no upstream step of it (did you mean 'load'?)",
        "the handler of step 'check-it' has an annotation that can't be used",
    ):
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    assert all(f"  - {problem}" in plain.lines for problem in problems)
    assert f"has {len(problems)} problems:" in plain.out


@pytest.mark.once
def test_the_help_of_each_command_has_an_example(outside: CommandLine) -> None:
    script = outside.write("all.py", HELP)
    shown = subprocess.run(
        [sys.executable, script, *COMMANDS], env=outside.environment, capture_output=True, text=True, check=True
    )

    for command in COMMANDS:
        assert f"Example: pgflow-prefect {command}" in shown.stdout, command
    assert "The default is flows/WORKFLOW.py" in " ".join(re.sub("│", " ", shown.stdout).split())


@pytest.mark.once
def test_no_example_breaks_on_a_terminal_of_80_columns(outside: CommandLine) -> None:
    script = outside.write("all.py", HELP)
    shown = subprocess.run(
        [sys.executable, script, *COMMANDS],
        env={**outside.environment, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    examples = [line for line in shown.stdout.splitlines() if line.startswith("Example: ")]
    assert len(examples) == len(COMMANDS)
    for line in shown.stdout.splitlines():
        assert line.count('"') % 2 == 0, f"a quotation goes on in the next line: {line}"
    whole = {
        " ".join(docstring.split("`")[1].split()) for docstring in re.findall(r"Example: `[^`]+`", read_docstrings())
    }
    of_a_group = {
        example for example in whole if example.startswith("pgflow-prefect airflow ")
    }  # each has its own help
    seen = {example.removeprefix("Example: ").partition(" writes ")[0] for example in examples}
    assert seen - of_a_group == whole - of_a_group


def read_docstrings() -> str:
    """Return the source of all commands, in which their docstrings are."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(Path("pgflow_prefect/cli").glob("*.py")))


@pytest.mark.once
def test_the_help_lists_the_commands_in_the_order_of_a_first_session(outside: CommandLine) -> None:
    shown = outside("--help")
    version, short = outside("--version"), outside("-V")

    assert (shown.code, version.code) == (0, 0)
    assert short.out == version.out
    assert re.findall(r"^│ (\w+) ", shown.out, re.MULTILINE) == [*COMMANDS]
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", version.out)


@pytest.mark.once
def test_the_example_workflow_is_drawn_from_its_sql(cli: CommandLine, db: Connection) -> None:
    db.execute(shipped_path("flows", "email_campaign", "workflow.sql").read_bytes())

    assert "prepare_list -> send_emails -> generate_report" in cli("graph", "email_campaign").out
