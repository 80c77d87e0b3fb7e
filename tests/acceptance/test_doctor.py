"""`doctor`: what is wrong is named, with what to do about it, and the exit code says whether anything is broken."""

import json
from collections.abc import Iterator
from typing import Any, LiteralString
from uuid import uuid4

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.acceptance.conftest import TIMEOUT, CommandLine, Ended, PrefectView
from tests.conftest import Connection, route
from tests.engine import CHAIN, cancel, define, run_workflow
from tests.proxy import proxy_without_websockets

DATABASE = ["database", "writing", "server version", "schema", "rights", "triggers", "snapshots", "listen", "clock"]
PREFECT = [
    *("prefect url", "prefect api", "prefect version", "websockets"),
    *("task run recorder", "prefect database", "prefect connections"),
]
WORKFLOWS = ["deployments", "runs", "runs set aside", "runs not shown", "work pools"]

Findings = dict[str, dict[str, Any]]


def read_findings(ended: Ended) -> Findings:
    assert ended.err == ""
    return {each["check"]: each for each in json.loads(ended.out)}


def outcomes(findings: Findings, names: list[str]) -> set[str]:
    return {findings[name]["outcome"] for name in names}


def test_doctor_finds_a_sound_installation_well_and_leaves_nothing_behind(
    cli: CommandLine, prefect: PrefectView
) -> None:
    ended = cli("doctor", "--json")
    findings = read_findings(ended)
    assert ended.code == 0, findings
    assert [*findings] == [*DATABASE, *PREFECT, "lag", *WORKFLOWS]
    # Behind a pooler, LISTEN hears nothing; a server does not tell where its data is; the tests own the database.
    # A slow machine's server lags, which is a warning.
    hints = {"listen", "prefect database", "rights", "lag"}
    assert "superuser" in findings["rights"]["message"]
    assert {name: each for name, each in findings.items() if each["outcome"] != "ok" and name not in hints} == {}
    assert "by PGFLOW_DSN" in findings["database"]["message"]
    assert findings["lag"]["outcome"] in ("ok", "warning")
    assert findings["lag"]["message"].startswith("a task run shows as completed ")
    assert prefect.count_flow_runs("pgflow-doctor") == 0
    assert httpx.get(f"{prefect.url}/flows/name/pgflow-doctor", timeout=TIMEOUT).status_code == 404
    newest = {"sort": "TIMESTAMP_DESC", "limit": 50}
    logs = httpx.post(f"{prefect.url}/logs/filter", json=newest, timeout=TIMEOUT).raise_for_status().json()
    assert [each["message"] for each in logs if "pgflow-doctor" in each["message"]] == []


def test_a_schema_that_is_missing_is_a_fault_that_init_mends(cli: CommandLine, empty_dsn: str) -> None:
    ended = cli("doctor", "--no-flow-run", "--dsn", route(empty_dsn))
    assert (ended.code, ended.err) == (1, "")
    columns, *rows = [line.split("\t") for line in ended.lines]
    assert columns == ["check", "outcome", "message", "advice"]
    assert [row[0] for row in rows] == [*DATABASE, *PREFECT, *WORKFLOWS], "nothing is measured without a flow run"
    findings: Findings = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert findings["schema"]["outcome"] == "fault"
    assert "pgflow-prefect init" in findings["schema"]["advice"]
    assert "by --dsn" in findings["database"]["message"]
    assert outcomes(findings, ["rights", *WORKFLOWS]) == {"skipped"}
    assert outcomes(findings, ["websockets"]) == {"ok"}


EDITS: dict[str, LiteralString] = {
    "a step more": "INSERT INTO pgflow.steps VALUES ({0}, 'd')",
    "a dep less": "DELETE FROM pgflow.deps WHERE workflow_slug = {0} AND to_step_slug = 'c'",
    "a dep more": "INSERT INTO pgflow.deps VALUES ({0}, 'a', 'c')",
    "another name": "INSERT INTO pgflow.steps VALUES ({0}, 'd'); "
    "UPDATE pgflow.deps SET to_step_slug = 'd' WHERE workflow_slug = {0} AND to_step_slug = 'c'; "
    "DELETE FROM pgflow.steps WHERE workflow_slug = {0} AND slug = 'c'",
}


@pytest.mark.once
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_no_trigger_saw_is_named_with_the_command_that_helps(
    cli: CommandLine, db: Connection, chain: str, edit: str
) -> None:
    cancel(db, run_workflow(db, chain).id)
    define(db, "alike", {"a": []})
    cancel(db, run_workflow(db, "alike").id)
    switch = "ALTER TABLE pgflow.{} {} TRIGGER {}"
    events = ("insert", "update", "delete")
    triggers = [(table, f"edited_by_{event}") for table in ("steps", "deps") for event in events]
    for how in ("DISABLE", "ENABLE ALWAYS"):
        for table, trigger in triggers:
            names = sql.Identifier(table), sql.SQL(how), sql.Identifier(trigger)
            db.execute(sql.SQL(switch).format(*names))
        if how == "DISABLE":
            db.execute(sql.SQL(EDITS[edit]).format(chain))

    found = read_findings(cli("doctor", "--no-flow-run", "--json"))["snapshots"]
    assert found["outcome"] == "fault"
    assert f"a former definition of {chain!r}: " in found["message"]
    db.execute(found["advice"].partition(", ")[2].encode())
    assert read_findings(cli("doctor", "--no-flow-run", "--json"))["snapshots"]["outcome"] == "ok"


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "command"),
    [
        ("DISABLE TRIGGER edited_by_update", "ALTER TABLE pgflow.steps ENABLE ALWAYS TRIGGER edited_by_update"),
        ("ENABLE TRIGGER edited_by_update", "ALTER TABLE pgflow.steps ENABLE ALWAYS TRIGGER edited_by_update"),
        ("ENABLE REPLICA TRIGGER refuse_slug", "ALTER TABLE pgflow.steps ENABLE TRIGGER refuse_slug"),
        ("DISABLE TRIGGER ALL", "ALTER TABLE pgflow.steps ENABLE TRIGGER "),
    ],
)
def test_triggers_that_are_disabled_are_named_with_the_commands_that_help(
    cli: CommandLine, db: Connection, change: str, command: str
) -> None:
    db.execute(f"ALTER TABLE pgflow.steps {change}".encode())
    found = read_findings(cli("doctor", "--no-flow-run", "--json"))["triggers"]
    assert found["outcome"] == "fault"
    assert command in found["advice"]
    assert ("raise_version" in found["advice"]) == ("refuse_slug" not in change)
    for each in found["details"]:
        db.execute(each.encode())
    assert read_findings(cli("doctor", "--no-flow-run", "--json"))["triggers"]["outcome"] == "ok"


def test_no_server_answers_and_all_that_can_be_said_without_is_said(cli: CommandLine) -> None:
    nowhere = "postgresql://somebody:topsecret@127.0.0.1:1/nowhere"
    ended = cli("doctor", "--json", PGFLOW_DSN=nowhere, PREFECT_API_URL="http://user:topsecret@127.0.0.1:1/api")
    assert ended.code == 1
    assert "topsecret" not in ended.out
    findings = read_findings(ended)
    assert outcomes(findings, ["database", "prefect api"]) == {"fault"}
    assert "PGFLOW_DSN" in findings["database"]["advice"]
    assert "prefect server start" in findings["prefect api"]["advice"]
    skipped = [*DATABASE[1:], *PREFECT[2:], "lag", *WORKFLOWS]
    assert outcomes(findings, skipped) == {"skipped"}


@pytest.mark.once
def test_without_a_prefect_server_it_warns_and_starts_none(outside: CommandLine, product_dsn: str) -> None:
    ended = outside("doctor", "--json", PGFLOW_DSN=product_dsn)
    assert ended.code == 0
    findings = read_findings(ended)
    assert findings["prefect url"]["outcome"] == "warning"
    assert "PREFECT_API_URL" in findings["prefect url"]["advice"]
    assert outcomes(findings, [*PREFECT[1:], "lag"]) == {"skipped"}


@pytest.mark.once
def test_a_proxy_that_lets_no_websocket_through_is_a_fault(cli: CommandLine, prefect_api: str) -> None:
    with proxy_without_websockets(prefect_api) as url:
        ended = cli("doctor", "--json", PREFECT_API_URL=url)
    assert ended.code == 1
    findings = read_findings(ended)
    assert findings["prefect api"]["outcome"] == "ok"
    assert findings["websockets"]["outcome"] == "fault"
    assert "403" in findings["websockets"]["message"]
    assert "/api/events/in" in findings["websockets"]["advice"]
    assert findings["lag"]["outcome"] == "skipped", "a flow run whose task is never shown would prove nothing"


@pytest.fixture
def stranger(server_dsn: str) -> Iterator[str]:
    """A role that may do nothing."""
    name = f"stranger_{uuid4().hex[:8]}"
    with psycopg.connect(server_dsn, autocommit=True) as server:
        server.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
        yield name
        server.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_a_role_without_rights_is_told_which_it_lacks_and_a_token_is_not_shown(
    cli: CommandLine, dsn: str, stranger: str, prefect_api: str
) -> None:
    as_stranger = make_conninfo(dsn, options=f"-c role={stranger}")
    with_token = prefect_api.replace("//", "//topsecret@")
    ended = cli("doctor", "--no-flow-run", "--json", "--dsn", as_stranger, PREFECT_API_URL=with_token)
    assert ended.code == 1
    findings = read_findings(ended)
    assert "topsecret" not in ended.out
    assert findings["websockets"]["outcome"] == "fault", "a websocket takes no user without a password"
    assert findings["schema"]["outcome"] == "ok", "the versions can be seen without rights"
    rights = findings["rights"]
    assert rights["outcome"] == "fault"
    assert "pgflow_work" in rights["advice"]
    assert stranger in rights["advice"]
    expected = {
        "USAGE on schema pgflow",
        "INSERT on pgflow.runs",
        "UPDATE on pgflow.step_states",
        "EXECUTE on function pgflow_prefect.claim_step",
        "SELECT on pgflow_prefect.bindings",
    }
    assert expected <= {*rights["details"]}
    assert "INSERT on pgflow_prefect.bindings" not in rights["details"], "who executes need not define"


@pytest.mark.once
def test_what_stands_ready_for_runs_is_looked_at(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    pool = f"pool-{uuid4().hex[:8]}"
    wish = {"name": pool, "type": "process"}
    httpx.post(f"{prefect.url}/work_pools/", json=wish, timeout=TIMEOUT).raise_for_status()
    assert cli("deploy", chain, "--work-pool", pool).code == 0
    alone = f"alone_{uuid4().hex[:8]}"
    define(db, alone, CHAIN)
    db.execute("INSERT INTO pgflow_prefect.enabled_workflows (workflow_slug, enabled) VALUES (%s, true)", [alone])
    for workflow in (chain, alone):
        run_workflow(db, workflow)
    db.execute("UPDATE pgflow_prefect.enabled_workflows SET since = since - interval '1 hour'")
    for workflow, shifted in ((alone, "-2 minutes"), (chain, "1 hour")):  # young, however slow this machine is
        db.execute(
            "UPDATE pgflow.runs SET created_at = created_at + %s::interval WHERE workflow_slug = %s",
            [shifted, workflow],
        )

    ended = cli("doctor", "--no-flow-run", "--json")
    assert ended.code == 0, "nothing is broken"
    findings = read_findings(ended)
    assert outcomes(findings, ["deployments", "runs", "work pools"]) == {"warning"}
    assert findings["deployments"]["details"] == [alone]
    assert f"pgflow-prefect deploy {alone}" in findings["deployments"]["advice"]
    assert findings["runs"]["details"] == [alone], "the other one is too young to worry"
    assert findings["work pools"]["details"] == [pool]
    assert f"prefect worker start --pool '{pool}'" in findings["work pools"]["advice"]
