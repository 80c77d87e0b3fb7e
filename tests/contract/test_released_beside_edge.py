"""Our claims and reports beside pgflow's own worker, while the flow moves between the two: each task once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.acceptance.conftest import wait_until
from tests.conftest import Connection
from tests.contract.worlds import ReleasedWorld
from tests.edge_worker import EdgeFunction, EdgeWorker
from tests.faults.breaking import break_released_fences

FLOW = "album"
STEPS = {"list": [], "resize": ["list"], "report": ["resize"]}
RUNS, ITEMS = 20, 98
"""Two thousand tasks."""

AT_ONCE = 40  # items that a worker of ours claims at a time
A_MOVE = 60  # tasks that are completed between two moves of the flow

NOTING = """
    CREATE SCHEMA faults;
    CREATE TABLE faults.written (run_id uuid, step_slug text, task_index int);
    CREATE TABLE faults.completions (run_id uuid, step_slug text, task_index int, is_ours boolean);
    CREATE FUNCTION faults.note_completion() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO faults.completions
        SELECT new.run_id, new.step_slug, new.task_index,
               EXISTS (SELECT FROM pgflow_prefect.moved_flows m WHERE m.worker_id = new.last_worker_id);
        RETURN NULL;
    END
    $$;
    CREATE TRIGGER note_completion AFTER UPDATE OF status ON pgflow.step_tasks FOR EACH ROW
    WHEN (new.status = 'completed') EXECUTE FUNCTION faults.note_completion();
"""
TAKE = "SELECT run_id, epoch FROM pgflow_prefect.take_runs(%s, 3, true, %s, 600, 3, '{}', true)"
TAKE_ONE = "SELECT pgflow_prefect.take_run(%s, NULL, 'another process', 600, 3, true)"
PERFORM = "SELECT outcome, status, attempt, waits FROM pgflow_prefect.perform_tasks(%s)"
WRITE = "INSERT INTO faults.written VALUES (%s, %s, 0)"
COMPLETE = "SELECT accepted FROM pgflow_prefect.complete_pending_step(%s, %s, 0, %s, %s, %s, %s)"
WORK = "SELECT item_index, attempt FROM pgflow_prefect.work_items(%s, %s, %s, %s, %s, '{}')"


def do(step: str, index: int) -> object:
    """Return what a task of the flow returns: the same for both workers."""
    return [*range(ITEMS)] if step == "list" else f"{step} {index}"


def claim(db: Connection, run_id: UUID, step: str, epoch: int, task_run_id: UUID) -> tuple[str | None, int | None]:
    """Claim a step as a process of ours does, and return its status and the attempt; no attempt if it is not ours."""
    element = {
        "do": "claim",
        "run_id": str(run_id),
        "epoch": epoch,
        "step_slug": step,
        "task_index": 0,
        "task_run_id": str(task_run_id),
        "upstream": [],
        "with_payload": False,
        "bound": "python",
        "has_function": True,
    }
    [outcome, status, attempt, waits] = db.execute(PERFORM, [Jsonb([element])]).fetchone() or [None] * 4
    if outcome != "done" or status is None:
        return None, None
    return str(status), None if waits or status != "pending" else int(str(attempt))


def complete(db: Connection, run_id: UUID, step: str, epoch: int, attempt: int, task_run_id: UUID) -> bool:
    """Report a step in the transaction that writes a row, as handlers do; tell whether it was accepted."""
    with db.transaction() as transaction:
        db.execute(WRITE, [run_id, step])
        given = [run_id, step, Jsonb(do(step, 0)), epoch, attempt, task_run_id]
        accepted = db.execute(COMPLETE, given).fetchone() == (True,)
        if not accepted:
            raise psycopg.Rollback(transaction)
    return accepted


def execute(db: Connection, run_id: UUID, epoch: int) -> None:
    """Do what can be done of a run now, and release it."""
    for step in STEPS:
        if step == "resize":
            reports: list[dict[str, object]] = []
            while True:
                rows = db.execute(WORK, [run_id, step, epoch, Jsonb(reports), AT_ONCE]).fetchall()
                items = [(index, attempt) for index, attempt in rows if index is not None]
                if not items:
                    break
                reports = [
                    {"do": "complete", "item_index": index, "attempt": attempt, "result": do(step, int(str(index)))}
                    for index, attempt in items
                ]
            continue
        task_run_id = uuid4()
        status, attempt = claim(db, run_id, step, epoch, task_run_id)
        if attempt is not None:
            complete(db, run_id, step, epoch, attempt, task_run_id)
        elif status != "completed":
            break
    db.execute("SELECT pgflow_prefect.release_run(%s, %s)", [run_id, epoch])


@contextmanager
def beside(dsn: str, act: Callable[[Connection, threading.Event], None]) -> Iterator[None]:
    """Do something again and again on a connection of its own while the block runs; what it raises is raised here."""
    over, failures = threading.Event(), list[BaseException]()

    def repeat() -> None:
        try:
            with psycopg.connect(dsn, autocommit=True) as db:
                while not over.is_set():
                    act(db, over)
        except BaseException as error:  # noqa: BLE001  raised again, in the main thread
            failures.append(error)

    thread = threading.Thread(target=repeat, name=act.__name__)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]


def work(db: Connection, over: threading.Event) -> None:
    taken = db.execute(TAKE, [[FLOW], threading.current_thread().name]).fetchall()
    for run_id, epoch in taken:
        execute(db, UUID(str(run_id)), int(str(epoch)))
    if not taken:
        over.wait(0.02)


def requeue(db: Connection, over: threading.Event) -> None:
    if db.execute("SELECT to_regproc('pgflow.requeue_stalled_tasks')").fetchone() != (None,):
        db.execute("SELECT pgflow.requeue_stalled_tasks()")
    over.wait(1)


def count(db: Connection) -> int:
    [found] = db.execute("SELECT count(*) FROM faults.completions").fetchone() or [0]
    return int(str(found))


@pytest.mark.thorough
def test_two_thousand_tasks_beside_an_edge_worker_are_each_completed_once(released: ReleasedWorld) -> None:
    db = released.db
    released.flows.define(FLOW, STEPS, maps=["resize"])
    db.execute(NOTING)
    moves: list[bool] = []
    edge = EdgeFunction(
        lambda: EdgeWorker(released.dsn, FLOW, lambda task: do(task.step, task.index), heartbeat=0, poll=1),
        released.dsn,
    )

    def move(mover: Connection, over: threading.Event) -> None:
        before = count(mover)
        while count(mover) < before + A_MOVE and not over.wait(0.02):
            pass
        if over.is_set():
            return
        is_ours = not (moves and moves[-1])
        edge.enabled = not is_ours
        mover.execute(f"SELECT pgflow_prefect.move_flow{'' if is_ours else '_back'}(%s)".encode(), [FLOW])
        moves.append(is_ours)

    runs = [released.flows.start(FLOW, {}) for _ in range(RUNS)]
    ended = "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'"
    with edge, ExitStack() as stack:
        for act in (work, work, requeue, move):
            stack.enter_context(beside(released.dsn, act))
        wait_until(lambda: db.execute(ended).fetchone() == (RUNS,), "all runs are completed")
    assert len(moves) >= 4, "the flow has moved to us and back more than once"
    tasks = "SELECT count(*), count(DISTINCT (run_id, step_slug, task_index)), count(*) FILTER (WHERE is_ours)"
    [completions, different, ours] = db.execute(f"{tasks} FROM faults.completions".encode()).fetchone() or [0, 0, 0]
    assert (completions, different) == (RUNS * (ITEMS + 2),) * 2, "each task once"
    assert 0 < int(str(ours)) < RUNS * (ITEMS + 2), "both sides have worked"
    assert db.execute("SELECT queue_length FROM pgmq.metrics(%s)", [FLOW]).fetchone() == (0,), "no message is left over"
    statuses = "SELECT DISTINCT status FROM pgflow.step_tasks"
    assert db.execute(statuses).fetchall() == [("completed",)]
    expected = {"report": "report 0"}
    outputs = db.execute("SELECT output FROM pgflow.runs WHERE run_id = ANY (%s)", [runs]).fetchall()
    assert outputs == [(expected,)] * RUNS
    written = "SELECT run_id, step_slug FROM faults.written ORDER BY 1, 2"
    single = "SELECT run_id, step_slug FROM faults.completions WHERE is_ours AND step_slug <> 'resize' ORDER BY 1, 2"
    rows = db.execute(written).fetchall()
    assert rows == db.execute(single).fetchall(), "our rows commit with our completions, each once"


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_former_owner_is_refused_with_its_rows_and_without_the_fences_both_owners_rows_are_there(
    released: ReleasedWorld, is_broken: bool
) -> None:
    db = released.db
    released.flows.define(FLOW, {"list": [], "other": []})  # the run goes on after the first completion
    db.execute(NOTING)
    db.execute("SELECT pgflow_prefect.move_flow(%s)", [FLOW])
    if is_broken:
        break_released_fences(db)
    run_id = released.flows.start(FLOW, {})
    [[_, first]] = db.execute(TAKE, [[FLOW], "first"]).fetchall()
    former, later = uuid4(), uuid4()
    _, attempt = claim(db, run_id, "list", int(str(first)), former)
    [second] = db.execute(TAKE_ONE, [run_id]).fetchone() or [0]
    _, again = claim(db, run_id, "list", int(str(second)), later)
    assert attempt == again == 1, "it is taken over in place"
    assert complete(db, run_id, "list", int(str(second)), 1, later)
    assert complete(db, run_id, "list", int(str(first)), 1, former) is is_broken
    assert db.execute("SELECT count(*) FROM faults.written").fetchone() == (2 if is_broken else 1,)
    assert count(db) == 1
