"""The player of pgflow's own worker does what its contract says, on each version of pgflow."""

import threading
from collections.abc import Callable
from uuid import UUID

import pytest

from tests.acceptance.conftest import wait_until
from tests.contract.worlds import BrokenError, ReleasedWorld
from tests.edge_worker import HEARTBEAT, EdgeFunction, EdgeTask, EdgeWorker, FlowMismatchError
from tests.released_lab import ReleasedFlows

MAPPED = {"list": [], "resize": ["list"], "report": ["resize"]}
POLL = 1  # second: a poll that waits for no message is soon over


def do(task: EdgeTask) -> object:
    """Execute a task of the flow above."""
    if task.step == "list":
        return [5, 6, 7]
    return int(str(task.given)) * 10 if task.step == "resize" else task.given


def await_run(flows: ReleasedFlows, run_id: UUID, status: str = "completed") -> None:
    read = "SELECT status FROM pgflow.runs WHERE run_id = %s"
    wait_until(lambda: flows.db.execute(read, [run_id]).fetchone() == (status,), f"the run is {status}")


def read_left_over(flows: ReleasedFlows, slug: str) -> object:
    """Return how many messages are in the queue."""
    [left] = flows.db.execute("SELECT queue_length FROM pgmq.metrics(%s)", [slug]).fetchone() or [None]
    return left


def make_player(
    released: ReleasedWorld, slug: str, handler: Callable[[EdgeTask], object], heartbeat: float = HEARTBEAT
) -> EdgeWorker:
    return EdgeWorker(released.dsn, slug, handler, heartbeat=heartbeat, poll=POLL)


def test_a_flow_is_executed_and_no_message_is_left_over(released: ReleasedWorld) -> None:
    flows = released.flows
    flows.define("photos", MAPPED, maps=["resize"])
    with make_player(released, "photos", do) as worker:
        run_id = flows.start("photos", {"album": 7})
        await_run(flows, run_id)
    assert sorted((task.step, task.index) for task in worker.executed) == [
        ("list", 0),
        ("report", 0),
        ("resize", 0),
        ("resize", 1),
        ("resize", 2),
    ]
    output = "SELECT output #> '{report,resize}' FROM pgflow.runs WHERE run_id = %s"
    assert flows.db.execute(output, [run_id]).fetchone() == ([50, 60, 70],)
    assert (read_left_over(flows, "photos"), worker.errors) == (0, [])
    row = "SELECT function_name, queue_name, last_heartbeat_at > started_at FROM pgflow.workers WHERE worker_id = %s"
    assert flows.db.execute(row, [worker.worker_id]).fetchone() == ("edge", "photos", True)


def test_a_task_that_fails_is_tried_again_until_its_attempts_are_used_up(released: ReleasedWorld) -> None:
    flows = released.flows
    flows.define("shaky", {"only": []}, attempts=2)

    def fail(task: EdgeTask) -> object:
        raise BrokenError("the network is away")

    with make_player(released, "shaky", fail) as worker:
        run_id = flows.start("shaky", {})
        await_run(flows, run_id, "failed")
    assert len(worker.executed) == 2
    error = "SELECT error_message, attempts_count FROM pgflow.step_tasks WHERE run_id = %s"
    assert flows.db.execute(error, [run_id]).fetchone() == ("the network is away", 2)


def test_a_worker_that_is_deprecated_finishes_its_batch_and_stops(released: ReleasedWorld) -> None:
    flows = released.flows
    flows.define("photos", MAPPED, maps=["resize"])
    begun, gate = threading.Event(), threading.Event()

    def wait(task: EdgeTask) -> object:
        begun.set()
        assert gate.wait(60)
        return [1]

    worker = make_player(released, "photos", wait, heartbeat=0)
    worker.start()
    try:
        run_id = flows.start("photos", {})
        assert begun.wait(60)
        flows.db.execute("UPDATE pgflow.workers SET deprecated_at = now()")
        gate.set()
    finally:
        gate.set()
        worker.await_end()
    assert [task.step for task in worker.executed] == ["list"]
    states = "SELECT status, count(*) FROM pgflow.step_tasks WHERE run_id = %s GROUP BY 1 ORDER BY 1"
    assert flows.db.execute(states, [run_id]).fetchall() == [("completed", 1), ("queued", 1)]


def test_a_worker_that_is_killed_leaves_its_task_begun(released: ReleasedWorld) -> None:
    flows = released.flows
    flows.define("only", {"only": []})
    begun, gate = threading.Event(), threading.Event()

    def wait(task: EdgeTask) -> object:
        begun.set()
        assert gate.wait(60)
        return 1

    worker = make_player(released, "only", wait)
    worker.start()
    killing = threading.Thread(target=worker.kill)
    try:
        flows.start("only", {})
        assert begun.wait(60)
        killing.start()
        wait_until(lambda: worker.is_killed, "the worker is killed")
    finally:
        gate.set()
        worker.kill()
    killing.join()
    assert flows.db.execute("SELECT status FROM pgflow.step_tasks").fetchall() == [("started",)]


def test_a_worker_with_another_flow_refuses_to_start(released: ReleasedWorld) -> None:
    flows = released.flows
    if flows.db.execute("SELECT to_regproc('pgflow.ensure_flow_compiled')").fetchone() == (None,):
        pytest.skip("this version of pgflow does not compare flows")
    flows.define("photos", MAPPED, maps=["resize"])
    worker = EdgeWorker(released.dsn, "photos", do, shape={"steps": []})
    with pytest.raises(FlowMismatchError):
        worker.start()
    assert flows.db.execute("SELECT count(*) FROM pgflow.workers").fetchone() == (0,)


def test_a_function_that_is_switched_off_starts_no_worker_until_it_is_switched_on(released: ReleasedWorld) -> None:
    flows = released.flows
    flows.define("photos", MAPPED, maps=["resize"])
    with EdgeFunction(lambda: make_player(released, "photos", do, heartbeat=0), released.dsn) as edge:
        first = flows.start("photos", {})
        await_run(flows, first)
        switch(edge, flows, is_on=False)
        wait_until(lambda: not edge.workers[-1].is_alive, "the worker has stopped")
        second = flows.start("photos", {})
        assert len(edge.workers) == 1
        switch(edge, flows, is_on=True)
        await_run(flows, second)
        assert len(edge.workers) == 2


def switch(edge: EdgeFunction, flows: ReleasedFlows, *, is_on: bool) -> None:
    """Switch the function on or off as pgflow's guide says, by its own columns."""
    edge.enabled = is_on
    if flows.db.execute("SELECT to_regclass('pgflow.worker_functions')").fetchone() != (None,):
        flows.db.execute("UPDATE pgflow.worker_functions SET enabled = %s", [is_on])
    if not is_on:
        flows.db.execute("UPDATE pgflow.workers SET deprecated_at = now() WHERE deprecated_at IS NULL")
