"""What has to be true after a storm on the released pgflow: each task once, none lost, no message left over."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from psycopg import sql

from tests.faults.database import Database
from tests.faults.released_flows import FLOWS, expect_tasks

TOO_MANY = "too many rows"
"""What is said of a task whose handler's writes were committed more often than its completion."""


class Task(NamedTuple):
    """A task of a run."""

    run_id: UUID
    step: str
    number: int


@dataclass(frozen=True)
class BegunRun:
    """A run that was started."""

    flow: str
    number: int
    items: int


@dataclass(frozen=True)
class ReleasedEvidence:
    """What was seen.

    Attributes:
        runs: their statuses.
        failures: why those that have failed did.
        tasks: of all runs, each with its status and its output.
        completions: how often a task became completed, and by how many of them one of ours was the worker.
        written: the rows that our handlers have written through `context.connection`.
        left_over: messages in the queue of each flow.
        unarchived: completed tasks whose message is not in the archive.
    """

    runs: Mapping[UUID, str]
    failures: Mapping[UUID, str]
    tasks: Mapping[Task, tuple[str, object]]
    completions: Mapping[Task, tuple[int, int]]
    written: Mapping[Task, int]
    left_over: Mapping[str, int]
    unarchived: int


def collect_released(database: Database) -> ReleasedEvidence:
    """Read everything that was noted. A commit meanwhile gives no task too many rows."""
    written = {
        _place(run, step, index): int(str(rows))
        for run, step, index, rows in database.read(
            "SELECT run_id, step_slug, task_index, count(*) FROM faults.written GROUP BY 1, 2, 3"
        )
    }
    tasks = {
        _place(run, step, index): (str(status), output)
        for run, step, index, status, output in database.read(
            "SELECT run_id, step_slug, task_index, status, output FROM pgflow.step_tasks"
        )
    }
    left_over, unarchived = {}, 0
    for flow in FLOWS:
        [[count]] = database.read("SELECT queue_length FROM pgmq.metrics(%s)", [flow])
        left_over[flow] = int(str(count))
        missing = sql.SQL("""
            SELECT count(*) FROM pgflow.step_tasks t
            WHERE t.flow_slug = {} AND t.status = 'completed'
              AND NOT EXISTS (SELECT FROM pgmq.{} a WHERE a.msg_id = t.message_id)
        """).format(sql.Literal(flow), sql.Identifier(f"a_{flow}"))
        [found] = database.connect().execute(missing).fetchone() or [0]
        unarchived += int(str(found))
    return ReleasedEvidence(
        runs={UUID(str(run)): str(status) for run, status in database.read("SELECT run_id, status FROM pgflow.runs")},
        failures={
            UUID(str(run)): f"{step}: {error}"
            for run, step, error in database.read(
                "SELECT run_id, step_slug, error_message FROM pgflow.step_states WHERE status = 'failed'"
            )
        },
        tasks=tasks,
        completions={
            _place(run, step, index): (int(str(times)), int(str(ours)))
            for run, step, index, times, ours in database.read(
                "SELECT run_id, step_slug, task_index, count(*), count(*) FILTER (WHERE is_ours) "
                "FROM faults.completions GROUP BY 1, 2, 3"
            )
        },
        written=written,
        left_over=left_over,
        unarchived=unarchived,
    )


def _place(run: object, step: object, index: object) -> Task:
    return Task(UUID(str(run)), str(step), int(str(index)))


def find_released_violations(evidence: ReleasedEvidence, begun: Mapping[UUID, BegunRun]) -> list[str]:
    """Return what is wrong, in sentences."""
    return [*_check_runs(evidence, begun), *_check_effects(evidence), *_check_messages(evidence)]


def _check_runs(evidence: ReleasedEvidence, begun: Mapping[UUID, BegunRun]) -> Iterator[str]:
    done: dict[UUID, dict[tuple[str, int], object]] = {}
    for task, (status, output) in evidence.tasks.items():
        if status == "completed":
            done.setdefault(task.run_id, {})[task.step, task.number] = output
    for run_id, run in begun.items():
        status = evidence.runs.get(run_id, "lost")
        if status != "completed":
            why = evidence.failures.get(run_id, "no step has failed")
            yield f"run {run_id} of {run.flow} is {'pending' if status == 'started' else status}: {why}"
        elif done.get(run_id, {}) != expect_tasks(run.flow, run.number, run.items):
            yield f"run {run_id} of {run.flow} has other tasks or outputs than expected: {done.get(run_id)}"


def _check_effects(evidence: ReleasedEvidence) -> Iterator[str]:
    for task, (status, _) in evidence.tasks.items():
        times, ours = evidence.completions.get(task, (0, 0))
        rows = evidence.written.get(task, 0)
        if status == "completed" and times != 1:
            yield f"{_name(task)} was completed {times} times"
        if rows > ours:
            yield f"{_name(task)} has {TOO_MANY}: {rows}, and a worker of ours has completed it {ours} times"
        elif rows < ours:
            yield f"{_name(task)} was completed by a worker of ours, and its row is lost"
    if not any(ours for _, ours in evidence.completions.values()):
        yield "no task was completed by a worker of ours"
    if not any(times > ours for times, ours in evidence.completions.values()):
        yield "no task was completed by an Edge worker"


def _check_messages(evidence: ReleasedEvidence) -> Iterator[str]:
    for flow, count in evidence.left_over.items():
        if count:
            yield f"{count} messages are left over in the queue of {flow}"
    if evidence.unarchived:
        yield f"{evidence.unarchived} messages of completed tasks are not in the archive"


def _name(task: Task) -> str:
    return f"task {task.step}[{task.number}] of run {task.run_id}"
