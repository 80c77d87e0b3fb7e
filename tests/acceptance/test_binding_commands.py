"""`bind`, `observe`, `shadow`: who does a step, said on the command line."""

import json
from dataclasses import replace
from uuid import uuid4

import pytest

from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection
from tests.engine import CHAIN, column, define, value


@pytest.fixture
def bound(db: Connection) -> str:
    """A workflow a -> b -> c, and functions that fit and do not fit."""
    define(db, "chain", CHAIN)
    db.execute("CREATE SCHEMA app")
    db.execute("CREATE FUNCTION app.add(jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT '1'::jsonb $$")
    db.execute("CREATE FUNCTION app.rows(jsonb) RETURNS SETOF jsonb LANGUAGE sql AS $$ SELECT '1'::jsonb $$")
    db.execute("CREATE FUNCTION app.words(jsonb) RETURNS text LANGUAGE sql AS $$ SELECT '1'::text $$")
    return "chain"


def test_a_step_is_bound_shown_and_taken_back(cli: CommandLine, db: Connection, bound: str) -> None:
    assert cli("bind", bound, "b", "--external", "--timeout", "60").code == 0
    changed = cli("bind", bound, "b", "--sql", "app.add", "--retries", "2", "--retry-delay", "1", "--retry-delay", "5")
    assert changed.code == 0
    assert "sql app.add" in changed.out
    again = json.loads(cli("bind", bound, "b", "--sql", "app.add", "--retries", "2", "--retry-delay", "1",
                           "--retry-delay", "5", "--json").out)  # fmt: skip
    assert again["bindings"] == [
        {
            "step_slug": "b",
            "kind": "sql",
            "target": "app.add",
            "options": {"retries": 2, "retry_delay_seconds": [1, 5]},
        }
    ]
    latest, first = again["changes"]
    assert (latest["before"]["kind"], latest["after"]["kind"]) == ("external", "sql")
    assert (first["before"], first["after"]["options"]) == (None, {"timeout_seconds": 60})
    assert first["changed_by"] == value(db, "SELECT session_user")

    shown = cli("bind", bound)
    assert "the file of handlers, else an external worker" in shown.out
    assert [line.split("\t")[0] for line in shown.lines[1:4]] == ["a", "b", "c"]
    for left in (["external"], []):
        assert cli("bind", bound, "b", "--undo").code == 0
        assert column(db, "SELECT kind FROM pgflow_prefect.bindings") == left
    refused = cli("bind", bound, "b", "--undo")
    assert (refused.code, "step 'b' has no change to undo" in refused.find_error()) == (2, True)


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["b", "--http", "https://user:hunter2@example.org"], "it has credentials"),
        (
            ["b", "--queue", "redis://localhost/0?queue=q&password=hunter2"],
            "its parameter 'password' looks like a secr",
        ),
        (["b", "--sql", "app.missing"], "the function app.missing(jsonb) does not exist: CREATE FUNCTION"),
        (["b", "--sql", "app.words"], "the function app.words(jsonb) returns text"),
        (["b", "--sql", "app.rows"], "the function app.rows(jsonb) returns jsonb rows"),
        (
            ["b", "--external", "--python"],
            "--queue, --command, --work-pool, --child, --remove and --undo exclude each other",
        ),
        (["b", "--retries", "2"], "options of a binding go with"),
        (["b", "--command", "/bin/sh -c hunter2"], "name: it is no name"),
        (["b", "--command", "stamp", "--token-env", "PGFLOW_TOKEN_A"], "token_env: Unexpected keyword argument"),
        (["--external"], "which step? name it after the workflow"),
        (["bb", "--external"], "workflow 'chain' has no step 'bb' (did you mean 'b'?)"),
    ],
)
def test_what_cant_be_is_refused_and_no_secret_is_shown(
    cli: CommandLine, db: Connection, bound: str, arguments: list[str], problem: str
) -> None:
    refused = cli("bind", bound, *arguments)
    assert refused.code == 2
    assert problem in refused.find_error()
    assert "hunter2" not in refused.out + refused.err
    assert value(db, "SELECT count(*) FROM pgflow_prefect.binding_changes") == 0


@pytest.mark.once
def test_validate_finds_a_function_that_does_not_fit_any_more(cli: CommandLine, db: Connection, bound: str) -> None:
    for step, target in (("a", "app.add"), ("b", "app.rows"), ("c", "app.gone")):
        db.execute("SELECT pgflow_prefect.bind_step(%s, %s, 'sql', %s)", [bound, step, target])
    found = cli("validate", bound, "--json")
    assert found.code == 1
    checked = json.loads(found.out)
    assert checked["steps"] == {"a": "sql app.add", "b": "sql app.rows", "c": "sql app.gone"}
    of_b, of_c = sorted(checked["problems"])
    assert "returns jsonb rows and not jsonb" in of_b
    assert "app.gone(jsonb), which the database does not have" in of_c


def test_observing_makes_all_external_and_enables(cli: CommandLine, db: Connection, bound: str) -> None:
    observed = cli("observe", bound)
    assert observed.out.startswith("workflow 'chain' is observed: its steps are external (3 changed)")
    assert json.loads(cli("observe", bound, "--json").out) == {"workflow": bound, "changed": 0, "airflow": False}
    assert column(db, "SELECT workflow_slug FROM pgflow_prefect.enabled_workflows WHERE enabled") == [bound]
    assert cli("list").lines[1].endswith("\tyes\t3 external")


def test_a_shadow_is_for_handlers_that_say_so(cli: CommandLine, db: Connection, chain: str) -> None:
    refused = cli("shadow", chain, "a")
    assert refused.code == 2
    assert "@workflow.step(shadow=True)" in refused.find_error()
    assert value(db, "SELECT count(*) FROM pgflow_prefect.bindings") == 0

    path = f"flows/{chain}.py"
    text = (cli.directory / path).read_text(encoding="utf-8")
    cli.write(path, text.replace("@workflow.step\ndef a", "@workflow.step(shadow=True)\ndef a"))
    assert "has a shadow" in cli("shadow", chain, "a").out
    assert column(db, "SELECT options FROM pgflow_prefect.bindings") == [{"shadow": True}]
    assert cli("shadow", chain).out.startswith("no shadow has run yet")
    db.execute("SELECT pgflow_prefect.report_shadow((r).id, 'a', 'different', '{$.n: another number}', 0.5) "
               "FROM (SELECT pgflow.run_workflow(%s, '{}') AS r) started", [chain])  # fmt: skip
    [row] = json.loads(cli("shadow", chain, "--json").out)
    assert (row["same"], row["different"], row["failed"], row["details"]) == (0, 1, 0, ["$.n: another number"])
    assert "$.n: another number" in cli("shadow", chain).out
    assert "no shadow any more" in cli("shadow", chain, "a", "--off").out
    assert column(db, "SELECT options FROM pgflow_prefect.bindings") == [{}]
    cli("bind", chain, "a", "--python")
    cli("shadow", chain, "a", "--off")
    assert column(db, "SELECT kind FROM pgflow_prefect.bindings") == ["python"], "its present worker goes on"


@pytest.mark.once
def test_list_shows_who_does_each_step(cli: CommandLine, db: Connection, chain: str) -> None:
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'b', 'http', 'https://example.org/b', '{\"retries\": 1}')", [chain])

    shown = cli("list", chain)
    steps = json.loads(cli("list", chain, "--json").out)

    lines = (cli.directory / f"flows/{chain}.py").read_text(encoding="utf-8").splitlines()
    at = {step: next(number for number, line in enumerate(lines) if f"def {step}(" in line) for step in "ac"}
    assert [line.split("\t") for line in shown.lines] == [
        ["step", "waits for", "done by", "options"],
        ["a", "-", f"python a in flows/{chain}.py:{at['a']}", ""],
        ["b", "a", "http https://example.org/b", "retries=1"],
        ["c", "b", f"python c in flows/{chain}.py:{at['c']}", ""],
    ]
    assert [(step["function"], step["line"], step["stub"]) for step in steps] == [
        ("a", at["a"], False),
        (None, None, False),
        ("c", at["c"], False),
    ]
    assert [(step["step"], step["binding"] and step["binding"]["kind"]) for step in steps] == [
        ("a", None),
        ("b", "http"),
        ("c", None),
    ]
    assert cli("list", "nowhere").code == 2


@pytest.mark.once
def test_what_would_change_nothing_is_refused(cli: CommandLine, db: Connection, chain: str) -> None:
    empty = cli("bind", chain, "a", "--http", "")
    ignored = cli("bind", chain, "a", "--python", "--timeout", "5")

    assert (empty.code, ignored.code) == (2, 2)
    assert "it has no scheme" in empty.find_error()
    assert "--python takes no options" in ignored.find_error()
    assert value(db, "SELECT count(*) FROM pgflow_prefect.bindings") == 0


STUBS = """
from pgflow_prefect import External, Workflow

workflow = Workflow("stubs")
workflow.bind("signed", External())

@workflow.step
def zeroth(payload): ...

@workflow.step("any-slug", unimplemented=True)
def written_later(zeroth): ...
"""


@pytest.mark.once
def test_list_bind_and_validate_say_which_steps_are_still_stubs_and_what_does_the_others(
    cli: CommandLine, db: Connection
) -> None:
    define(db, "stubs", {"zeroth": [], "any-slug": ["zeroth"], "alone": ["any-slug"], "signed": ["alone"]})
    cli.write("handlers.py", STUBS)

    stub = "written_later in handlers.py:10"
    expected = {
        "zeroth": "python zeroth in handlers.py:7",
        "any-slug": f"external: {stub} is still a stub",
        "alone": "external: handlers.py has no handler of it",
        "signed": "external, as handlers.py says",
    }
    for command, column_of_doer in (("list", 2), ("bind", 1), ("validate", 1)):
        shown = cli(command, "stubs", "--handlers", "handlers.py")
        assert (shown.code, shown.err) == (0, "")
        rows = [line.split("\t") for line in shown.lines if "\t" in line]
        assert {row[0]: row[column_of_doer] for row in rows[1:]} == expected
        assert [row[0] for row in rows[1:]] == [*expected], "each after the steps that it waits for"
        assert "1 step is still a stub: it stays external until you remove `unimplemented=True`" in shown.lines
        assert shown.out.count(stub) == 1
    told = json.loads(cli("validate", "stubs", "--handlers", "handlers.py", "--json").out)
    assert told["stubs"] == ["any-slug"]
    assert told["functions"]["zeroth"]["file"] == "handlers.py"


@pytest.mark.once
def test_handlers_that_can_not_be_loaded_do_not_hide_what_rows_say(cli: CommandLine, db: Connection) -> None:
    define(db, "broken", CHAIN)
    cli.write("flows/broken.py", "import nowhere\n")
    shown = cli("bind", "broken", "b", "--external")
    assert (shown.code, shown.lines[1]) == (0, "b\texternal\t")
    assert "ModuleNotFoundError" in shown.err
    assert cli("list", "broken", "--handlers", "flows/broken.py").code == 2


@pytest.mark.once
def test_types_that_do_not_fit_along_an_edge_are_found_before_a_run(
    cli: CommandLine, db: Connection, chain: str
) -> None:
    path = f"flows/{chain}.py"
    text = (cli.directory / path).read_text(encoding="utf-8")
    cli.write(path, text.replace("def c(b: int)", "def c(b: str)"))

    checked, run = cli("validate", chain), cli("run", chain)

    problem = "the handler of step 'c' takes 'b' as str, which the int that step 'b' returns can't be"
    assert (checked.code, run.code) == (1, 2)
    assert problem in checked.out
    assert problem in run.find_error()
    assert column(db, "SELECT id FROM pgflow.runs") == []
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'b', 'external')", [chain])
    assert cli("validate", chain).code == 0, "what another does has no annotation"


BOUND = """
from pgflow_prefect import HttpEndpoint, Queue, Workflow

workflow = Workflow("{slug}")
workflow.bind("a", HttpEndpoint("https://example.org/b", token_env="SHOP_TOKEN"))
workflow.bind("b", Queue("redis://localhost/0?queue=q", login_env="SHOP_LOGIN"))
workflow.bind("c", Queue("amqp://localhost//?queue=q"))
"""


@pytest.mark.once
def test_what_a_binding_needs_and_this_process_lacks_is_found_before_a_run(
    cli: CommandLine, db: Connection, chain: str
) -> None:
    cli.write(f"flows/{chain}.py", BOUND.format(slug=chain))

    checked, run = cli("validate", chain, SHOP_LOGIN=""), cli("run", chain)

    assert (checked.code, run.code) == (1, 2)
    for name in ("SHOP_TOKEN", "SHOP_LOGIN"):
        assert f"the environment variable {name} is not set here" in checked.out
        assert f"the environment variable {name} is not set here" in run.err
    assert column(db, "SELECT id FROM pgflow.runs") == []
    assert cli("validate", chain, SHOP_TOKEN="x", SHOP_LOGIN="a:b").code == 0  # noqa: S106
    assert cli("deploy", chain).code == 0, "the machine that deploys executes nothing"


@pytest.mark.once
def test_a_program_is_bound_by_its_name_and_the_settings_say_what_it_is(cli: CommandLine, db: Connection) -> None:
    slug = f"bound_{uuid4().hex[:8]}"
    define(db, slug, {"only": []})
    assert "command stamp" in cli("bind", slug, "only", "--command", "stamp").out
    missing = cli("validate", slug)
    assert missing.code == 1
    assert "name no program 'stamp': they name none" in missing.out
    secret = "hunter2-in-the-settings"  # noqa: S105  a made-up one
    wrong = replace(cli, environment={**cli.environment, "PGFLOW_COMMANDS": f'{{"stamp": "{secret}"}}'})(
        "validate", slug
    )
    assert wrong.code == 2
    assert "PGFLOW_COMMANDS" in wrong.find_error()
    assert secret not in wrong.out + wrong.err
    programs = json.dumps({"stamp": ["/bin/sh", "-c", "echo stamping; cat"]})
    knowing = replace(cli, environment={**cli.environment, "PGFLOW_COMMANDS": programs})
    assert knowing("validate", slug).code == 0
    ran = knowing("run", slug, "--payload", '{"n": 1}')
    assert ran.code == 0, ran
    assert value(db, "SELECT step_result FROM pgflow.step_states") == {"payload": {"n": 1}}
