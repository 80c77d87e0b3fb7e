"""Workflows that branch, skip and clean up: from the file of an ordinary user to the commands that show them."""

import json
from dataclasses import replace
from uuid import uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import column, get_run, run_workflow, statuses, value

ORDERS = """
from typing import Any

from pgflow_prefect import Branch, Skip, Workflow

workflow = Workflow("orders", failed_by="steps")


@workflow.step
def look(payload: dict[str, Any]) -> Branch[int]:
    return Branch(payload["take"], result=3)


@workflow.step(when_exhausted="skip-cascade")
def full(look: int) -> int:
    return look


@workflow.step(only_if={"look": 3})
def delta(look: int) -> int:
    raise Skip("nothing new")


@workflow.step(rule="none_failed_min_one_success")
async def publish(full: int | None = None, delta: int | None = None) -> list[int | None]:
    return [full, delta]


@workflow.step(rule="all_done", after=["publish"], fails_run=False)
def clean_up() -> str:
    return "clean"


flow = workflow.flow
"""

RULES = [
    "  ~ step 'clean_up': rule = 'all_done', fails_run = False",
    "  ~ step 'delta': only_if = {'look': 3}",
    "  ~ step 'full': when_exhausted = 'skip-cascade'",
    "  ~ step 'publish': rule = 'none_failed_min_one_success'",
]

SPOILT = """
from pgflow_prefect import Workflow

workflow = Workflow("spoilt")


@workflow.step(when_exhausted="skip")
def a() -> int: ...


@workflow.step
def b(a: int) -> int: ...


@workflow.step(rule="all_done")
def c(b: int) -> int: ...
"""


@pytest.fixture
def without_prefect(outside: CommandLine, product_dsn: str) -> CommandLine:
    """The command with this test's database and the files of this module, and no Prefect server."""
    outside.write("flows/orders.py", ORDERS)
    outside.write("flows/spoilt.py", SPOILT)
    return replace(outside, environment={**outside.environment, "PGFLOW_DSN": product_dsn})


@pytest.mark.once
def test_rules_make_the_round_trip(without_prefect: CommandLine, db: Connection) -> None:
    cli = without_prefect
    pushed = cli("push", "flows/orders.py", "--yes")
    assert (pushed.code, pushed.err) == (0, "")
    assert pushed.lines[-5:] == [*RULES, "wrote workflow 'orders'"]
    assert cli("push", "flows/orders.py").lines == ["workflow 'orders': nothing to change"]
    script = cli("export", "orders").out
    told = json.loads(cli("export", "orders", "--json").out)

    version = value(db, "SELECT version FROM pgflow.workflows")
    run_workflow(db, "orders", {"take": "full"})
    db.execute(script.encode())
    assert value(db, "SELECT version FROM pgflow.workflows") == version
    db.execute("TRUNCATE pgflow.workflows CASCADE")
    db.execute(script.encode())
    assert json.loads(cli("export", "orders", "--json").out) == told

    cli.remove("flows/orders.py")
    assert cli("import", "orders").code == 0
    assert cli("push", "flows/orders.py").lines == ["workflow 'orders': nothing to change"]


def test_the_commands_show_skips_and_what_is_not_run(without_prefect: CommandLine, db: Connection) -> None:
    cli = without_prefect
    cli("push", "flows/orders.py", "--yes")
    assert "publish  (none_failed_min_one_success)" in cli("graph", "orders").out

    run_id = str(run_workflow(db, "orders", {"take": "full"}).id)
    db.execute("SELECT pgflow.take_branches(%s, 'look', '{full}', '3')", [run_id])
    shown = cli("status", run_id)
    assert "delta\tskipped" in shown.out
    assert 'branch not taken by "look"' in shown.out
    assert "⤼ skipped" in cli("graph", "--run", run_id).out

    skipped = cli("skip", run_id, "full", "--note", "not today")
    assert (skipped.code, skipped.out) == (0, f"step 'full' of run {run_id} is skipped: not today\n")
    again = json.loads(cli("status", run_id, "--json").out)
    assert {each["step_slug"]: each["skip_reason"] for each in again["steps"]}["publish"] == "dependency_skipped"

    failed = str(run_workflow(db, "orders", {}).id)
    db.execute("SELECT pgflow.fail_step(%s, 'look', 'broken')", [failed])
    assert "publish\tnot run" in cli("status", failed).out
    assert "⊝ not run" in cli("graph", "--run", failed).out
    assert cli("timeline", failed).code == 0


@pytest.mark.once
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("look", "is completed already"),
        ("lock", "has no step 'lock' (did you mean 'look'?)"),
        ("delta", "is completed"),
    ],
)
def test_what_can_not_be_skipped_is_refused(
    without_prefect: CommandLine, db: Connection, step: str, reason: str
) -> None:
    cli = without_prefect
    cli("push", "flows/orders.py", "--yes")
    run_id = run_workflow(db, "orders", {}).id
    db.execute("SELECT pgflow.complete_step(%s, s, '3') FROM unnest('{look,delta}'::text[]) AS s", [run_id])
    refused = cli("skip", str(run_id), step)
    assert refused.code in (1, 2)
    assert reason in refused.find_error()


@pytest.mark.once
def test_validate_names_arguments_whose_step_may_have_no_result(without_prefect: CommandLine) -> None:
    cli = without_prefect
    cli("push", "flows/spoilt.py", "--yes")
    checked = cli("validate", "spoilt")
    assert checked.code == 1
    assert "the handler of step 'b' needs the result of 'a', and may run without it" in checked.out
    assert "the handler of step 'c' needs the result of 'b', and may run without it" in checked.out


@pytest.mark.once
def test_a_file_whose_rules_are_not_in_the_database_is_invalid(without_prefect: CommandLine, db: Connection) -> None:
    cli = without_prefect
    cli("push", "flows/orders.py", "--yes")
    db.execute("UPDATE pgflow.steps SET rule = NULL")
    checked = cli("validate", "orders")
    assert checked.code == 1
    assert "the rules of step 'publish' are others in the database" in checked.out


@pytest.fixture
def orders(cli: CommandLine) -> str:
    """The slug of the workflow, pushed: one of this test's own, as Prefect has one deployment of a name."""
    slug = f"orders_{uuid4().hex[:8]}"
    cli.write(f"flows/{slug}.py", ORDERS.replace('"orders"', f'"{slug}"'))
    assert cli("push", f"flows/{slug}.py", "--yes").code == 0
    return slug


def test_run_executes_branches_and_skips_and_prefect_shows_them(
    cli: CommandLine, db: Connection, prefect: PrefectView, orders: str
) -> None:
    ran = cli("run", orders, "--payload", '{"take": "full"}')
    assert (ran.code, ran.err) == (0, "")
    run_id = ran.find_run_id()
    assert get_run(db, run_id).status == "completed"
    states = {
        "look": "Completed",
        "full": "Completed",
        "delta": "Skipped",
        "publish": "Completed",
        "clean_up": "Completed",
    }
    prefect.await_task_states(run_id, states)
    assert cli("reconcile").code == 0


@pytest.mark.parametrize("service", ["worker", "serve"])
def test_a_service_executes_what_follows_a_skip_of_a_handler(
    service: str, services: Services, cli: CommandLine, db: Connection, prefect: PrefectView, orders: str
) -> None:
    services.start(service)
    cli("enable", orders)
    run_id = run_workflow(db, orders, {"take": ["delta"]}).id
    wait_until(lambda: get_run(db, run_id).status != "pending", "the run ends")
    assert get_run(db, run_id).status == "completed"
    assert set(statuses(db, run_id).values()) == {"completed"}
    assert column(db, "SELECT step_slug FROM pgflow.step_states WHERE skip_reason IS NOT NULL ORDER BY 1") == [
        *("delta", "full", "publish"),
    ]
    states = {"look": "Completed", "full": "Skipped", "delta": "Skipped", "publish": "Skipped", "clean_up": "Completed"}
    prefect.await_task_states(run_id, states)
