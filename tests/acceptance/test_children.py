"""Services execute runs and the runs of their steps, and another process goes on with both."""

from uuid import UUID, uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, kill, wait_until
from tests.conftest import Connection
from tests.engine import column, get_run, get_state, run_workflow

pytestmark = pytest.mark.once

INNER = """
from pathlib import Path
from time import sleep

from pgflow_prefect import Workflow

workflow = Workflow("inner_x")


@workflow.step
def pay(payload: int) -> int:
    with Path(f"paid{payload}").open("a") as file:
        file.write("x")
    while Path("gate").exists():
        sleep(0.05)
    return payload * 2
"""

OUTER = """
from pgflow_prefect import Child, Workflow

workflow = Workflow("outer_x")
workflow.bind("settle", Child("inner_x", payload="payload"))


@workflow.step
def look(payload: int) -> list[int]:
    return [payload + 1, payload + 2]


workflow.bind_map("each", Child("inner_x", payload="item"), over="look")


@workflow.step
def tell(settle: dict[str, int], each: list[dict[str, int]]) -> int:
    return settle["pay"] + sum(one["pay"] for one in each)
"""

PAID = ("paid1", "paid2", "paid3")
TOLD = 2 * (1 + 2 + 3)
CHILDREN = "SELECT id FROM pgflow.runs WHERE parent_run_id IS NOT NULL"


@pytest.fixture
def outer(cli: CommandLine, db: Connection) -> str:
    """The slug of a workflow with a child and a map of children. The handlers of both are in `flows/`."""
    suffix = uuid4().hex[:6]
    for name, text in (("inner", INNER), ("outer", OUTER)):
        cli.write(f"flows/{name}_{suffix}.py", text.replace('_x"', f'_{suffix}"'))
    pushed = cli("push", f"flows/inner_{suffix}.py", f"flows/outer_{suffix}.py", "--yes")
    assert pushed.code == 0, pushed.err
    return f"outer_{suffix}"


def check(cli: CommandLine, db: Connection, run_id: UUID, *, times: int) -> None:
    """Check that the run and its three children have ended, and how often the step of each child was executed."""
    assert get_state(db, run_id, "tell").step_result == TOLD, get_run(db, run_id).error_message
    children = [UUID(str(child)) for child in column(db, CHILDREN)]
    assert [get_run(db, child).status for child in children] == ["completed"] * 3
    assert [get_state(db, child, "pay").attempts for child in children] == [times] * 3
    assert [(cli.directory / name).read_text() for name in PAID] == ["x" * times] * 3
    assert {get_state(db, run_id, step).attempts for step in ("look", "settle", "tell")} == {1}


def test_serve_executes_a_child_and_a_map_of_children(
    services: Services, cli: CommandLine, db: Connection, prefect: PrefectView, outer: str
) -> None:
    services.start("serve", f"flows/{outer}.py", f"flows/{outer.replace('outer', 'inner')}.py")
    run_id = run_workflow(db, outer, 1).id
    wait_until(lambda: get_run(db, run_id).status != "pending", "the run ends")
    check(cli, db, run_id, times=1)
    for shown in (run_id, *column(db, CHILDREN)):
        prefect.await_state(UUID(str(shown)), "Completed")


def test_another_worker_takes_the_run_and_the_children_of_a_killed_one_and_begins_no_further_child(
    services: Services, cli: CommandLine, db: Connection, outer: str
) -> None:
    gate = cli.write("gate")
    killed = services.start("worker", PGFLOW_LEASE="600")
    run_id = run_workflow(db, outer, 1).id
    wait_until(lambda: all((cli.directory / name).exists() for name in PAID), "the children execute")
    kill(killed)
    gate.unlink()
    services.start("worker", PGFLOW_LEASE="600")
    wait_until(lambda: get_run(db, run_id).status != "pending", "the run ends")
    check(cli, db, run_id, times=2)
