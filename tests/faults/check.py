"""What has to be true after the storm, whatever went wrong during it."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from tests.faults.database import Database
from tests.faults.weathers import Redone
from tests.faults.workflows import BEGAN, FAILED, Expected, StepPlan, Steps, expect
from tests.property.rules_model import End, Item


class Slot(NamedTuple):
    """One step of one run, or one item of it where it is a map."""

    run_id: UUID
    step_slug: str
    item_index: int | None = None


class State(NamedTuple):
    """A row of `pgflow.step_states` or `pgflow.step_items`; the reason is its `skip_reason`."""

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
        states: of their steps, and of the items of those that are maps.
        completions: the attempts that a step or an item was at whenever it became completed.
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

    @cached_property
    def indexes(self) -> Mapping[Slot, set[int]]:
        """Of each step, the items that there is anything of."""
        seen = defaultdict(set)
        for run_id, step_slug, index in chain(self.states, self.executions, self.written):
            if index is not None:
                seen[Slot(run_id, step_slug)].add(index)
        return seen


def collect(database: Database, executions: Path, prefect: Database) -> Evidence:
    """Read everything that was noted.

    Args:
        database: the storm's.
        executions: the file that they are noted in.
        prefect: the database of Prefect's server.
    """
    # Before what was noted of them: what ends meanwhile is pending here, and not an end without its notes.
    states = {
        _place(run_id, slug, index): State(
            str(status),
            result,
            int(str(attempts)),
            float(str(finished_at)),
            None if reason is None else str(reason),
        )
        for run_id, slug, index, status, result, attempts, finished_at, reason in database.read(
            "SELECT run_id, step_slug, NULL, status, step_result, attempts, "
            "coalesce(extract(epoch FROM finished_at), 'infinity'), skip_reason FROM pgflow.step_states "
            "UNION ALL "
            "SELECT run_id, step_slug, item_index, status, item_result, attempts, "
            "coalesce(extract(epoch FROM finished_at), 'infinity'), skip_reason FROM pgflow.step_items"
        )
    }
    completions, written = defaultdict(list), defaultdict(list)
    for run_id, slug, index, attempts in database.read(
        "SELECT run_id, step_slug, item_index, attempts FROM faults.completions"
    ):
        completions[_place(run_id, slug, index)].append(int(str(attempts)))
    for run_id, slug, index, attempt in database.read(
        "SELECT run_id, step_slug, item_index, attempt FROM faults.written"
    ):
        written[_place(run_id, slug, index)].append(int(str(attempt)))
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
        run_id, slug, index, attempt, at, event = line.split()
        found = executed[_place(run_id, slug, None if index == "None" else index)]
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


def _place(run_id: object, step_slug: object, index: object) -> Slot:
    return Slot(UUID(str(run_id)), str(step_slug), None if index is None else int(str(index)))


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
        expected = expect(number, steps)
        if redone is Redone.NOTHING and expected.status == "completed" and (shown := evidence.shown.get(run_id)):
            found.append((run_id, f"Prefect has shown the flow run that completed it as {' and '.join(shown)}"))
        if status != expected.status:
            found.append((run_id, f"is {status}: {error}" if status != "completed" else "is completed, and not failed"))
        for slug, plan in steps.items():
            found += [(run_id, f"step {problem}") for problem in _check_step(evidence, run_id, slug, plan, expected)]
            if redone is Redone.NOTHING or (redone is Redone.WRITTEN and not plan.writes):
                found += [(run_id, f"step {problem}") for problem in _find_repeated(evidence, Slot(run_id, slug))]
    return found


def _check_step(evidence: Evidence, run_id: UUID, slug: str, plan: StepPlan, expected: Expected) -> Iterator[str]:
    """Yield what is wrong with a step and its items, each after its name."""
    place, end = Slot(run_id, slug), expected.ends[slug]
    ends = expected.items.get(slug, ())
    problems = _check_state(evidence, place, end, expected.results.get(slug))
    if end.reason in _EXECUTED and plan.map is None:
        problems = chain(problems, _check_work(evidence, place, plan))
    elif end.reason in _EXECUTED and ends:
        problems = chain(problems, _check_completions(evidence, place))
    elif evidence.executions.get(place) or ((state := evidence.states.get(place)) and state.attempts):
        problems = chain(problems, [f"was executed, and has to be {end.row[0]} ({end.reason or 'without items'})"])
    yield from (f"{slug}: {problem}" for problem in problems)
    for index in sorted(evidence.indexes.get(place, set()).union(range(len(ends)))):
        if index < len(ends):
            problems = _check_item(evidence, Slot(run_id, slug, index), plan, ends)
        else:
            problems = iter(["there is no such item"])
        yield from (f"{slug}[{index}]: {problem}" for problem in problems)


def _check_state(evidence: Evidence, place: Slot, end: End, expected: object) -> Iterator[str]:
    state = evidence.states.get(place)
    status, reason, _ = end.row
    if state is None or (state.status, state.reason) != (status, reason):
        seen = "not there" if state is None else f"{state.status} ({state.reason or 'executed'})"
        yield f"is {seen}, not {status} ({reason or 'executed'})"
        return
    result = expected if end.outcome == "success" else None
    if state.result != result:
        yield f"has the result {state.result}, not {result}"


def _check_item(evidence: Evidence, place: Slot, plan: StepPlan, ends: Sequence[Item]) -> Iterator[str]:
    """Yield what is wrong with an item of a map."""
    assert plan.map is not None and place.item_index is not None  # noqa: PT018
    end = ends[place.item_index]
    state = evidence.states.get(place)
    # What such a map has not executed when an item fails, stays so. What is under way may still be reported.
    stops = plan.map.when_item_fails == "stop" and any(each.status == "failed" for each in ends)
    if stops and state is not None and state.status == "pending":
        yield from _check_executions(evidence.executions[place], state)
        return
    reason = "requested" if end.is_left_out else None
    if state is None or (state.status, state.reason, state.result) != (end.status, reason, end.result):
        yield f"is {state and state[:2]}, and has to be {end.status} ({reason}) with the result {end.result}"
        return
    yield from _check_work(evidence, place, plan)


def _check_work(evidence: Evidence, place: Slot, plan: StepPlan) -> Iterator[str]:
    """Yield what is wrong with the executions of a handler that has come to an end."""
    state = evidence.states.get(place)
    if state is None or state.status == "pending":
        return  # its notes may be newer
    yield from _check_completions(evidence, place)
    # The attempt that was accepted is the latest one: a row of any other was not rolled back, or is of two.
    is_kept = plan.writes and state.status == "completed" and state.reason != "handler_failed"
    kept = [state.attempts] * is_kept
    if (written := evidence.written[place]) != kept:
        yield f"{_name(place)}has rows of the attempts {written}, not {kept}"
    if not evidence.executions[place]:
        yield "was completed and never executed"
    yield from _check_executions(evidence.executions[place], state)


def _check_completions(evidence: Evidence, place: Slot) -> Iterator[str]:
    state = evidence.states.get(place)
    if state is None or state.status == "pending":
        return
    accepted = [state.attempts] * (state.status == "completed")
    if (completed := evidence.completions[place]) != accepted:
        yield (
            f"{_name(place)}was completed at the attempts {completed}, which should be once, at the last one, "
            f"{state.attempts}"
        )


def _name(place: Slot) -> str:
    return "" if place.item_index is None else "the item "


_EXECUTED = (None, "requested", "handler_failed")
"""The reasons of steps whose handlers were called; None: they ended with a result or an error."""


def _find_repeated(evidence: Evidence, place: Slot) -> Iterator[str]:
    """Yield the executions of a step or its items that came after one which had not failed."""
    items = [place._replace(item_index=index) for index in sorted(evidence.indexes.get(place, ()))]
    for each in (place, *items):
        name = place.step_slug if each is place else f"{place.step_slug}[{each.item_index}]"
        for number, execution in enumerate(executions := evidence.executions.get(each, [])):
            for earlier in executions[:number]:
                if earlier.end != FAILED:
                    yield (
                        f"{name}: was executed again as attempt {execution.attempt}; attempt {earlier.attempt} "
                        f"{earlier.end}"
                    )


def _check_executions(executions: list[Execution], state: State) -> Iterator[str]:
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
