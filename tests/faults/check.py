"""What has to be true after the storm, whatever went wrong during it."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from tests.faults.database import Database
from tests.faults.workflows import Steps, expect_results


class Place(NamedTuple):
    """One step of one run."""

    run_id: UUID
    step_slug: str


class State(NamedTuple):
    """A row of `pgflow.step_states`."""

    status: str
    result: object
    attempts: int
    finished_at: float


class Execution(NamedTuple):
    """One time that a handler was called."""

    attempt: int
    at: float


@dataclass(frozen=True)
class Evidence:
    """What was seen.

    Attributes:
        runs: each with its workflow, its number, its status and its error message.
        states: of their steps.
        completions: the attempts that a step was at whenever it became completed.
        written: the attempts that rows written through `context.connection` are of.
        executions: of the handlers.
    """

    runs: Mapping[UUID, tuple[str, int, str, str | None]]
    states: Mapping[Place, State]
    completions: Mapping[Place, list[int]]
    written: Mapping[Place, list[int]]
    executions: Mapping[Place, list[Execution]]


def collect(database: Database, executions: Path) -> Evidence:
    """Read everything that was noted."""
    completions, written, executed = defaultdict(list), defaultdict(list), defaultdict(list)
    for run_id, slug, attempts in database.read("SELECT run_id, step_slug, attempts FROM faults.completions"):
        completions[_place(run_id, slug)].append(int(str(attempts)))
    for run_id, slug, attempt in database.read("SELECT run_id, step_slug, attempt FROM faults.written"):
        written[_place(run_id, slug)].append(int(str(attempt)))
    for line in executions.read_text(encoding="utf-8").splitlines():
        run_id, slug, attempt, at = line.split()
        executed[_place(run_id, slug)].append(Execution(int(attempt), float(at)))
    return Evidence(
        runs={
            UUID(str(run_id)): (str(workflow), int(str(number)), str(status), None if error is None else str(error))
            for run_id, workflow, number, status, error in database.read(
                "SELECT id, workflow_slug, payload ->> 'number', status, error_message FROM pgflow.runs"
            )
        },
        states={
            _place(run_id, slug): State(str(status), result, int(str(attempts)), float(str(finished_at)))
            for run_id, slug, status, result, attempts, finished_at in database.read(
                "SELECT run_id, step_slug, status, step_result, attempts, "
                "coalesce(extract(epoch FROM finished_at), 'infinity') FROM pgflow.step_states"
            )
        },
        completions=completions,
        written=written,
        executions=executed,
    )


def _place(run_id: object, step_slug: object) -> Place:
    return Place(UUID(str(run_id)), str(step_slug))


def find_violations(
    evidence: Evidence, workflows: Mapping[str, Steps], begun: Mapping[UUID, int]
) -> list[tuple[UUID, str]]:
    """Return what is wrong, a sentence each, and with which run.

    Args:
        evidence: what was seen.
        workflows: what there was to do.
        begun: the runs that were started, and their numbers.
    """
    found = [(run_id, "was started, and is not there") for run_id in begun.keys() - evidence.runs.keys()]
    found += [(run_id, "nobody has started it") for run_id in evidence.runs.keys() - begun.keys()]
    for run_id, (workflow, number, status, error) in evidence.runs.items():
        if status != "completed":
            found.append((run_id, f"is {status}: {error}"))
        steps = workflows[workflow]
        expected = expect_results(number, steps)
        for slug, plan in steps.items():
            problems = _check_step(evidence, Place(run_id, slug), expected[slug], writes=plan.writes)
            found += [(run_id, f"step {slug}: {problem}") for problem in problems]
    return found


def _check_step(evidence: Evidence, place: Place, expected: str, *, writes: bool) -> Iterator[str]:
    state = evidence.states.get(place)
    if state is None or state.status != "completed":
        yield f"is {state.status if state else 'not there'}"
        return
    if state.result != expected:
        yield f"has the result {state.result}, not {expected}"
    if (completed := evidence.completions[place]) != [state.attempts]:
        yield f"was completed at the attempts {completed}, which should be once, at the last one, {state.attempts}"
    # The attempt that was accepted is the latest one: a row of any other was not rolled back, or is of two.
    if (written := evidence.written[place]) != [state.attempts] * writes:
        yield f"has rows of the attempts {written}, not {[state.attempts] * writes}"
    yield from _check_executions(evidence.executions[place], state)


def _check_executions(executions: list[Execution], state: State) -> Iterator[str]:
    if not executions:
        yield "was completed and never executed"
    counted = Counter(attempt for attempt, _ in executions)
    for attempt, times in counted.items():
        if times > 1:
            yield f"attempt {attempt} was executed {times} times"
        if attempt > state.attempts:
            yield f"attempt {attempt} was executed, of {state.attempts}"
    for attempt, at in executions:
        # Not one that was superseded before the step was completed: what it had claimed it may have begun late.
        if at > state.finished_at and attempt >= state.attempts:
            yield f"attempt {attempt} was executed {at - state.finished_at:.3f} s after the step was completed"
