"""What has to be true after the storm, whatever went wrong during it."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from tests.faults.database import Database
from tests.faults.weathers import Redone
from tests.faults.workflows import BEGAN, FAILED, StepPlan, Steps, expect_ends, expect_results
from tests.property.rules_model import End


class Slot(NamedTuple):
    """One step of one run."""

    run_id: UUID
    step_slug: str


class State(NamedTuple):
    """A row of `pgflow.step_states`; the reason is its `skip_reason`."""

    status: str
    result: object
    attempts: int
    finished_at: float
    reason: str | None = None


class Execution(NamedTuple):
    """One time that a handler was called.

    Attributes:
        attempt: its number.
        at: when it began.
        end: how it ended; `BEGAN` where it has not.
    """

    attempt: int
    at: float
    end: str


@dataclass(frozen=True)
class Evidence:
    """What was seen.

    Attributes:
        runs: each with its workflow, its number, its status and its error message.
        states: of their steps.
        completions: the attempts that a step was at whenever it became completed.
        written: the attempts that rows written through `context.connection` are of.
        executions: of the handlers.
        shown: the states without success that Prefect has shown of the flow run that completed a run, whatever it
            shows now.
    """

    runs: Mapping[UUID, tuple[str, int, str, str | None]]
    states: Mapping[Slot, State]
    completions: Mapping[Slot, list[int]]
    written: Mapping[Slot, list[int]]
    executions: Mapping[Slot, list[Execution]]
    shown: Mapping[UUID, list[str]]

    def of(self, run_ids: Collection[UUID]) -> "Evidence":
        """Return what there is of these runs alone; all executions, whichever runs they are of."""
        return replace(self, runs={run_id: run for run_id, run in self.runs.items() if run_id in run_ids})


def collect(database: Database, executions: Path, prefect: Database) -> Evidence:
    """Read everything that was noted.

    Args:
        database: the storm's.
        executions: the file that they are noted in.
        prefect: the database of Prefect's server.
    """
    # Before what was noted of them: what ends meanwhile is pending here, and not an end without its notes.
    states = {
        _place(run_id, slug): State(
            str(status),
            result,
            int(str(attempts)),
            float(str(finished_at)),
            None if reason is None else str(reason),
        )
        for run_id, slug, status, result, attempts, finished_at, reason in database.read(
            "SELECT run_id, step_slug, status, step_result, attempts, "
            "coalesce(extract(epoch FROM finished_at), 'infinity'), skip_reason FROM pgflow.step_states"
        )
    }
    completions, written = defaultdict(list), defaultdict(list)
    for run_id, slug, attempts in database.read("SELECT run_id, step_slug, attempts FROM faults.completions"):
        completions[_place(run_id, slug)].append(int(str(attempts)))
    for run_id, slug, attempt in database.read("SELECT run_id, step_slug, attempt FROM faults.written"):
        written[_place(run_id, slug)].append(int(str(attempt)))
    return Evidence(
        runs={
            UUID(str(run_id)): (str(workflow), int(str(number)), str(status), None if error is None else str(error))
            for run_id, workflow, number, status, error in database.read(
                "SELECT id, workflow_slug, payload ->> 'number', status, error_message FROM pgflow.runs"
            )
        },
        states=states,
        completions=completions,
        written=written,
        executions=_read_executions(executions),
        shown=_read_shown(database, prefect),
    )


def _read_executions(file: Path) -> dict[Slot, list[Execution]]:
    executed: dict[Slot, list[Execution]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        run_id, slug, attempt, at, event = line.split()
        found = executed[_place(run_id, slug)]
        if event == BEGAN:
            found.append(Execution(int(attempt), float(at), event))
            continue
        # Where an attempt was executed twice, which is wrong in any case, the end may be of either.
        number = next(n for n, each in enumerate(found) if each.attempt == int(attempt) and each.end == BEGAN)
        found[number] = found[number]._replace(end=event)
    return executed


def _read_shown(database: Database, prefect: Database) -> dict[UUID, list[str]]:
    latest = {
        UUID(str(flow_run_id)): UUID(str(run_id))
        for run_id, flow_run_id in database.read(
            "SELECT DISTINCT ON (run_id) run_id, flow_run_id FROM pgflow_prefect.flow_runs ORDER BY run_id, epoch DESC"
        )
    }
    shown = defaultdict(list)
    for flow_run_id, name in prefect.read(
        "SELECT flow_run_id, name FROM flow_run_state WHERE type IN ('CRASHED', 'CANCELLED', 'CANCELLING', 'FAILED')"
    ):
        if (run_id := latest.get(UUID(str(flow_run_id)))) is not None:
            shown[run_id].append(str(name))
    return shown


def _place(run_id: object, step_slug: object) -> Slot:
    return Slot(UUID(str(run_id)), str(step_slug))


def find_violations(
    evidence: Evidence, workflows: Mapping[str, Steps], begun: Mapping[UUID, int], redone: Redone = Redone.ANYTHING
) -> list[tuple[UUID, str]]:
    """Return what is wrong, a sentence each, and with which run.

    Args:
        evidence: what was seen.
        workflows: what there was to do.
        begun: the runs that were started, and their numbers.
        redone: what may have been done again though its handler had not failed.
    """
    found = [(run_id, "was started, and is not there") for run_id in begun.keys() - evidence.runs.keys()]
    found += [(run_id, "the storm has not started it") for run_id in evidence.runs.keys() - begun.keys()]
    strange = {place.run_id for place in evidence.executions} - evidence.runs.keys()
    found += [(run_id, "was executed here, and is not of this database") for run_id in strange]
    for run_id, (workflow, number, status, error) in evidence.runs.items():
        steps = workflows[workflow]
        expected_status, ends = expect_ends(number, steps)
        if redone is Redone.NOTHING and expected_status == "completed" and (shown := evidence.shown.get(run_id)):
            found.append((run_id, f"Prefect has shown the flow run that completed it as {' and '.join(shown)}"))
        if status != expected_status:
            found.append((run_id, f"is {status}: {error}" if status != "completed" else "is completed, and not failed"))
        expected = expect_results(number, steps)
        for slug, plan in steps.items():
            problems = _check_step(evidence, Slot(run_id, slug), expected[slug], ends[slug], plan)
            found += [(run_id, f"step {slug}: {problem}") for problem in problems]
            if redone is Redone.NOTHING or (redone is Redone.WRITTEN and not plan.writes):
                problems = _find_repeated(evidence.executions[Slot(run_id, slug)])
                found += [(run_id, f"step {slug}: {problem}") for problem in problems]
    return found


def _check_step(evidence: Evidence, place: Slot, expected: str, end: End, plan: StepPlan) -> Iterator[str]:
    state = evidence.states.get(place)
    status, reason, _ = end.row
    if state is None or (state.status, state.reason) != (status, reason):
        seen = "not there" if state is None else f"{state.status} ({state.reason or 'executed'})"
        yield f"is {seen}, not {status} ({reason or 'executed'})"
        return
    result = expected if end.outcome == "success" else None
    if state.result != result:
        yield f"has the result {state.result}, not {result}"
    if reason not in _EXECUTED:
        if state.attempts or evidence.executions[place]:
            yield f"was executed, and is {status} ({reason})"
        return
    accepted = [state.attempts] * (status == "completed")
    if (completed := evidence.completions[place]) != accepted:
        yield f"was completed at the attempts {completed}, which should be once, at the last one, {state.attempts}"
    # The attempt that was accepted is the latest one: a row of any other was not rolled back, or is of two.
    kept = accepted * (plan.writes and reason != "handler_failed")
    if (written := evidence.written[place]) != kept:
        yield f"has rows of the attempts {written}, not {kept}"
    yield from _check_executions(evidence.executions[place], state)


_EXECUTED = (None, "requested", "handler_failed")
"""The reasons of steps whose handlers were called; None: they ended with a result or an error."""


def _find_repeated(executions: list[Execution]) -> Iterator[str]:
    """Yield the executions that came after one which had not failed."""
    for number, execution in enumerate(executions):
        for earlier in executions[:number]:
            if earlier.end != FAILED:
                yield f"was executed again as attempt {execution.attempt}; attempt {earlier.attempt} {earlier.end}"


def _check_executions(executions: list[Execution], state: State) -> Iterator[str]:
    if not executions:
        yield "was completed and never executed"
    counted = Counter(execution.attempt for execution in executions)
    for attempt, times in counted.items():
        if times > 1:
            yield f"attempt {attempt} was executed {times} times"
        if attempt > state.attempts:
            yield f"attempt {attempt} was executed, of {state.attempts}"
    for attempt, at, _ in executions:
        # Not one that was superseded before the step was completed: what it had claimed it may have begun late.
        if at > state.finished_at and attempt >= state.attempts:
            yield f"attempt {attempt} was executed {at - state.finished_at:.3f} s after the step was completed"
