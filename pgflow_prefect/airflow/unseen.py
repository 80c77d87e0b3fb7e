"""Ends of Airflow's tasks that no policy reports: how they are reported from Airflow's rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pgflow_prefect.airflow.mirrored import ResultKey
from pgflow_prefect.airflow.results import read_return_value
from pgflow_prefect.airflow.states import SKIPPED, Standing, combine, find_standing
from pgflow_prefect.database.airflow.runs import Instance, ReturnValue
from pgflow_prefect.models import Status

GRACE = timedelta(seconds=150)
"""For how long after its end a task may report itself: the policy tries for two minutes."""

_NEVER_EXECUTED = frozenset({"EmptyOperator", "DummyOperator"})
"""Airflow's scheduler ends these tasks by itself."""


@dataclass(frozen=True)
class UnseenEnd:
    """The end of a task that has not reported itself.

    Attributes:
        step_slug: the step.
        try_number: Airflow's.
        outcome: completed, skipped or failed.
        message: for people.
        wanted: the return values that its result is made of, in their order.
        is_map: the result is an array of them.
    """

    step_slug: str
    try_number: int
    outcome: str
    message: str | None
    wanted: tuple[ResultKey, ...] = ()
    is_map: bool = False


def find_end(task_id: str, instances: Sequence[Instance], now: datetime, *, has_asked: bool) -> UnseenEnd | None:
    """Return the end of a task that does not report itself; None if it goes on, or may still report itself.

    Args:
        task_id: the task.
        instances: those of the task.
        now: the time.
        has_asked: the task has asked here who does it, so it was seen.
    """
    items = [each for each in instances if each.map_index >= 0 and each.state != "removed"]
    of_task = items or [*instances][:1]
    if not of_task:
        return None
    standing = combine([find_standing(each) for each in items]) if items else find_standing(of_task[0])
    outcome = _find_outcome(standing)
    if outcome is None or standing.finished_at is None:
        return None
    is_unseen = items or outcome == "skipped" or of_task[0].operator in _NEVER_EXECUTED
    if (has_asked or not is_unseen) and standing.finished_at > now - GRACE:
        return None
    ended = sorted((each for each in of_task if each.state == "success"), key=lambda each: each.map_index)
    return UnseenEnd(
        task_id,
        max(each.tries for each in of_task),
        outcome,
        standing.skip_note if outcome == "skipped" else standing.error_message,
        tuple((each.task_id, each.map_index, each.tries) for each in ended) if outcome == "completed" else (),
        bool(items),
    )


def _find_outcome(standing: Standing) -> str | None:
    """Return how to report an end; None for one that the engine decides, as after a failure above."""
    if standing.status is Status.COMPLETED:
        return "completed" if standing.skip_reason is None else "skipped" if standing.skip_reason == SKIPPED else None
    return "failed" if standing.status is Status.FAILED and standing.skip_reason is None else None


def make_result(end: UnseenEnd, found: Mapping[ResultKey, ReturnValue | None]) -> tuple[str | None, list[str]]:
    """Return the result of a step as JSON text, and notes on what was not copied.

    Args:
        end: the end of its task.
        found: the return values, None for a task that has returned nothing.
    """
    texts, notes = [], []
    for key in end.wanted:
        value = found[key]
        text, note = ("null", None) if value is None else read_return_value(value)
        texts.append(text or "null")
        notes += [note] if note is not None else []
    if end.is_map:
        return f"[{','.join(texts)}]", notes
    return (texts[0] if texts else None), notes
