"""Our claims and reports beside an unmodified Edge worker, while single steps move between the two: each task once.

CI plays 200 tasks. `pytest --big -k while_steps_move tests/contract` plays 2,000, too.
"""

import random
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from uuid import UUID, uuid4

import pytest
from psycopg.types.json import Jsonb

from tests.acceptance.conftest import wait_until
from tests.conftest import Connection
from tests.contract.test_released_beside_edge import (
    AT_ONCE,
    FLOW,
    ITEMS,
    NOTING,
    STEPS,
    TAKE,
    WORK,
    beside,
    claim,
    complete,
    count,
    do,
    requeue,
)
from tests.contract.worlds import ReleasedWorld
from tests.edge_worker import EdgeTask, EdgeWorker

BIND = "SELECT pgflow_prefect.bind_step(%s, %s, %s)"
FLAKY = 7  # of our items, one of so many fails in its first attempt
A_FLIP = 8  # tasks that are completed between two flips, which is far less than 100 ms


class Flaky:
    """Items that fail in their first attempt on our side.

    Those of the Edge worker don't. Its concurrent failures and completions may wait for each other in pgflow's own
    functions, and before 0.13.2 the task that PostgreSQL then breaks off stays begun for ever.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[UUID, int]] = set()

    def fails(self, run_id: UUID, index: int) -> bool:
        """Tell whether this attempt fails."""
        if index % FLAKY or (run_id, index) in self._seen:
            return False
        self._seen.add((run_id, index))
        return True


def execute(db: Connection, run_id: UUID, epoch: int, flaky: Flaky) -> None:
    """Do what Prefect may do of a run now, and release it."""
    reports: list[dict[str, object]] = []
    while items := _exchange(db, run_id, epoch, reports):
        reports = [
            {"item_index": index, "attempt": attempt, "do": "fail", "message": "not yet"}
            if flaky.fails(run_id, index)
            else {"item_index": index, "attempt": attempt, "do": "complete", "result": do("resize", index)}
            for index, attempt in items
        ]
    for step in ("list", "report"):
        task_run_id = uuid4()
        status, attempt = claim(db, run_id, step, epoch, task_run_id)
        if status == "pending" and attempt is not None:
            complete(db, run_id, step, epoch, attempt, task_run_id)
    db.execute("SELECT pgflow_prefect.release_run(%s, %s)", [run_id, epoch])


def _exchange(db: Connection, run_id: UUID, epoch: int, reports: Sequence[object]) -> list[tuple[int, int]]:
    rows = db.execute(WORK, [run_id, "resize", epoch, Jsonb(reports), AT_ONCE // 4]).fetchall()
    return [(int(str(index)), int(str(attempt))) for index, attempt in rows if index is not None]


def do_task(task: EdgeTask) -> object:
    """Do a task as the Edge worker's handler."""
    return do(task.step, task.index)


def play(released: ReleasedWorld, runs: int) -> None:
    """Execute runs beside an Edge worker while the steps move, and check what became of each task and message."""
    db = released.db
    released.flows.define(FLOW, STEPS, maps=["resize"], attempts=3)
    db.execute(NOTING)
    flaky, flips = Flaky(), list[str]()

    def work(connection: Connection, over: threading.Event) -> None:
        taken = connection.execute(TAKE, [[FLOW], threading.current_thread().name]).fetchall()
        for run_id, epoch in taken:
            execute(connection, UUID(str(run_id)), int(str(epoch)), flaky)
        if not taken:
            over.wait(0.02)

    def flip(connection: Connection, over: threading.Event) -> None:
        before = count(connection)
        while count(connection) < before + A_FLIP and not over.wait(0.01):
            pass
        step, kind = random.choice(list(STEPS)), random.choice(("python", "external"))  # noqa: S311  no secret
        connection.execute(BIND, [FLOW, step, kind])
        flips.append(f"{step} {kind}")

    started = [released.flows.start(FLOW, {}) for _ in range(runs)]
    ended = "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'"
    with EdgeWorker(released.dsn, FLOW, do_task, poll=1), ExitStack() as stack:
        for act in (work, work, requeue, flip):
            stack.enter_context(beside(released.dsn, act))
        wait_until(lambda: db.execute(ended).fetchone() == (runs,), "all runs are completed")
    check(released, started)
    assert len(flips) >= 3, "the steps have moved more than once"


def check(released: ReleasedWorld, runs: Sequence[UUID]) -> None:
    """Check that each task was completed once, and that no message is left over."""
    db, tasks = released.db, len(runs) * (ITEMS + 2)
    counts = "SELECT count(*), count(DISTINCT (run_id, step_slug, task_index)), count(*) FILTER (WHERE is_ours)"
    [completions, different, ours] = db.execute(f"{counts} FROM faults.completions".encode()).fetchone() or [0, 0, 0]
    assert (completions, different) == (tasks, tasks), "each task once"
    assert 0 < int(str(ours)) < tasks, "both sides have worked"
    outputs = db.execute("SELECT output FROM pgflow.runs WHERE run_id = ANY (%s)", [list(runs)]).fetchall()
    assert outputs == [({"report": "report 0"},)] * len(runs)
    db.execute("SELECT pgflow_prefect.move_flow_back(%s)", [FLOW])
    assert db.execute("SELECT queue_length FROM pgmq.metrics(%s)", [FLOW]).fetchone() == (0,), "no message is left over"
    assert db.execute("SELECT count(*) FROM pgflow_prefect.taken_out").fetchone() == (0,)
    archived = "SELECT count(*), count(DISTINCT msg_id) FROM pgmq.a_album"
    assert db.execute(archived).fetchone() == (tasks, tasks), "each message is archived once"
    ours_left = "SELECT count(*) FROM pgflow_prefect.list_lost_messages(5)"
    assert db.execute(ours_left).fetchone() == (0,)
    written = db.execute("SELECT run_id, step_slug FROM faults.written ORDER BY 1, 2").fetchall()
    single = "SELECT run_id, step_slug FROM faults.completions WHERE is_ours AND step_slug <> 'resize' ORDER BY 1, 2"
    assert written == db.execute(single).fetchall(), "our rows commit with our completions, each once"


@pytest.mark.thorough
@pytest.mark.parametrize("runs", [2, 20])
def test_tasks_beside_an_edge_worker_are_each_completed_once_while_steps_move(
    released: ReleasedWorld, pytestconfig: pytest.Config, runs: int
) -> None:
    if runs > 2 and not pytestconfig.getoption("--big"):
        pytest.skip("two thousand tasks: --big")
    play(released, runs)
