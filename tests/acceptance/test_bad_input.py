"""What was asked for can't be done: one clear message, the right exit code, and nothing was started."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.acceptance.conftest import CommandLine, PrefectView, wait_until
from tests.conftest import Connection, route
from tests.engine import CHAIN, column, define

pytestmark = pytest.mark.once

SECRET = "s3cr3t-of-the-test"  # noqa: S105
NO_SERVER = "127.0.0.1:1"
"""An address at which no server listens."""

SEED = Path(__file__).parent.parent / "integration" / "seed.sql"


def count_runs(db: Connection) -> object:
    [number] = column(db, "SELECT count(*) FROM pgflow.runs")
    return number


def test_an_unreachable_database_is_named_without_its_password(outside: CommandLine) -> None:
    failed = outside("list", PGFLOW_DSN=f"postgresql://somebody:{SECRET}@{NO_SERVER}/app")

    assert failed.code == 1
    assert "can't connect to PostgreSQL" in failed.find_error()
    assert "check that it runs" in failed.err
    assert SECRET not in failed.out + failed.err


@pytest.fixture
def checked_dsn(server_dsn: str, dsn: str) -> Iterator[str]:
    """This test's database as a role whose password the server checks, which it does for no other role."""
    if "PGFLOW_TEST_DSN" in os.environ:
        pytest.skip("this test changes who may connect: unset PGFLOW_TEST_DSN, for a server of the tests' own")
    name = f"checked_{uuid4().hex[:8]}"
    role = sql.Identifier(name)
    with psycopg.connect(server_dsn, autocommit=True) as server:
        server.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, sql.Literal(SECRET)))
        [path] = column(server, "SHOW hba_file")
        hba = Path(str(path))
        rules = hba.read_text(encoding="utf-8")
        hba.write_text(f"local all {name} scram-sha-256\nhost all {name} all scram-sha-256\n{rules}", encoding="utf-8")
        server.execute("SELECT pg_reload_conf()")
        yield make_conninfo(dsn, user=name)
        hba.write_text(rules, encoding="utf-8")
        server.execute("SELECT pg_reload_conf()")
        server.execute(sql.SQL("DROP ROLE {}").format(role))


def test_a_wrong_password_is_refused_and_never_shown(outside: CommandLine, checked_dsn: str) -> None:
    wrong = make_conninfo(checked_dsn, password=f"not-{SECRET}")
    wait_until(lambda: is_refused(wrong), "the server checks the password")

    refused = outside("list", "--dsn", wrong)
    debugged = outside("list", "--dsn", wrong, "--debug", debug=True)

    assert (refused.code, debugged.code) == (1, 1)
    assert "password authentication failed for user" in refused.find_error()
    assert "Traceback" in debugged.err
    assert SECRET not in refused.out + refused.err + debugged.out + debugged.err


def is_refused(dsn: str) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return True
    return False


@pytest.mark.parametrize(
    "malformed", [f"postgresql://me:{SECRET}@[half/app", f"host=db pasword={SECRET}", f"me:{SECRET}@db/app"]
)
def test_a_malformed_dsn_is_not_repeated(outside: CommandLine, malformed: str) -> None:
    refused = outside("init", "--dsn", malformed)

    assert refused.code == 2
    assert refused.find_error().startswith("the DSN")
    assert SECRET not in refused.out + refused.err


def test_a_database_without_the_schema_says_which_command_installs_it(outside: CommandLine, empty_dsn: str) -> None:
    refused = outside("runs", "--dsn", route(empty_dsn))

    assert refused.code == 1
    assert refused.find_error().endswith("run `pgflow-prefect init` first")


def test_an_unknown_workflow_comes_with_the_nearest_name(cli: CommandLine, db: Connection, chain: str) -> None:
    mistyped = chain.replace("chain", "chian")

    for refused in (cli("runs", "--workflow", mistyped), cli("run", mistyped)):
        assert refused.code == 2
        assert refused.find_error() == f"unknown workflow {mistyped!r} (did you mean {chain!r}?)"
    assert count_runs(db) == 0


def test_a_run_that_does_not_exist_is_unknown(cli: CommandLine) -> None:
    missing = str(uuid4())
    for refused in (cli("status", missing), cli("run", "--resume", missing)):
        assert refused.code == 2
        assert refused.find_error() == f"unknown run {missing}; `pgflow-prefect runs` shows the newest"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], 'Unknown command "frobnicate"'),
        (["list", "--frob"], "Unknown option: --frob.\n`pgflow-prefect list --help` shows what it takes"),
        (["status"], "RUN_ID requires an argument.\n`pgflow-prefect status --help` shows what it takes"),
        (["status", "0815x"], "RUN_ID"),
        (["graph", "--run", "last"], "RUN_ID"),
        (["run", "--resume", "the-last-one"], "RUN_ID"),
        (["runs", "--status", "done"], "--status"),
        (["runs", "--limit", "0"], "--limit"),
        (["graph"], "WORKFLOW"),
    ],
)
def test_a_mistyped_command_line_is_explained(outside: CommandLine, arguments: list[str], message: str) -> None:
    refused = outside(*arguments)

    assert refused.code == 2
    assert refused.out == ""
    assert message in refused.find_error()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("{campaign: 1}", "the payload is not JSON"),
        ("@missing.json", "No such file or directory: 'missing.json'"),
    ],
)
def test_a_payload_that_is_no_json_starts_nothing(
    cli: CommandLine, db: Connection, chain: str, payload: str, message: str
) -> None:
    refused = cli("run", chain, "--payload", payload)

    assert refused.code == 2
    assert message in refused.find_error()
    assert count_runs(db) == 0


def test_run_wants_a_workflow_or_a_run(cli: CommandLine) -> None:
    refused = cli("run")

    assert refused.code == 2
    assert "name a workflow to run, or give --resume RUN_ID" in refused.find_error()


def test_a_cycle_is_named_and_nothing_runs(outside: CommandLine, empty_dsn: str, prefect_api: str) -> None:
    """The database was made with pgflow's bare tables, and has had the cycle since then."""
    with psycopg.connect(empty_dsn, autocommit=True) as db:
        db.execute(SEED.read_bytes())
        define(db, "looped", {"a": ["c"], "b": ["a"], "c": ["b"], "d": []})
        installed = outside("init", "--dsn", route(empty_dsn))
        results = [
            outside("run", "looped", "--dsn", route(empty_dsn), PREFECT_API_URL=prefect_api),
            outside("graph", "looped", "--dsn", route(empty_dsn)),
        ]

        assert installed.code == 0
        for refused in results:
            assert refused.code == 2
            assert "its steps wait for each other: a -> b -> c -> a" in refused.find_error()
        assert count_runs(db) == 0


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "does not exist; write it with `pgflow-prefect import"),
        ("from pgflow_prefect import Workflow\n\nworkflow = Workflow(nowhere)\n", "NameError: name 'nowhere' is not"),
        ("workflow = None\n", "it has no Workflow at all"),
    ],
)
def test_handlers_that_can_not_be_loaded_start_no_run(
    cli: CommandLine, db: Connection, prefect: PrefectView, written: str | None, message: str
) -> None:
    define(db, "unhandled", CHAIN)
    if written is not None:
        cli.write("flows/unhandled.py", written)

    refused = cli("run", "unhandled")

    assert refused.code == 2
    assert message in refused.find_error()
    assert "flows/unhandled.py" in refused.err
    assert count_runs(db) == 0
    assert prefect.count_flow_runs("unhandled") == 0


def test_a_setting_that_can_t_be_is_named(cli: CommandLine) -> None:
    refused = cli("runs", PGFLOW_LEASE="soon")
    assert refused.code == 2
    assert refused.find_error().startswith("the settings can't be used: PGFLOW_LEASE: Input should be a valid number")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["status", "latest"], 2, "there is no run yet: start one with `pgflow-prefect run`"),
        (["cancel", "nothing-of-the-kind"], 2, "RUN_ID 'nothing-of-the-kind' is no run's id"),
        (["list", "nowhere"], 2, "unknown workflow 'nowhere'"),
        (["list", "--frob"], 2, "Unknown option: --frob"),
        (["runs", "--dsn", f"postgresql://somebody:{SECRET}@{NO_SERVER}/app"], 1, "can't connect to PostgreSQL"),
    ],
)
def test_a_script_that_asks_for_json_gets_errors_as_json_too(
    cli: CommandLine, arguments: list[str], code: int, message: str
) -> None:
    failed = cli(*arguments, "--json")
    told = json.loads(failed.out)
    assert (failed.code, told["exit_code"]) == (code, code)
    assert told.get("hint", "a text"), "no hint is left out"
    assert message in told["error"]
    assert failed.find_error().startswith(told["error"].splitlines()[0])
    assert SECRET not in failed.out + failed.err
    assert cli(*arguments).out == "", "people read standard error"


def test_printed_json_stays_one_value_if_an_error_follows(cli: CommandLine, chain: str) -> None:
    cli.write("broken")
    failed = cli("run", chain, "--json")
    assert failed.code == 1
    assert json.loads(failed.out)["run"]["status"] == "failed"
