"""How a task of Airflow stands, in the words of a step here."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from pydantic import JsonValue

from pgflow_prefect.database.airflow.runs import Instance
from pgflow_prefect.models import NOT_RUN, Status
from pgflow_prefect.state_names import StateName

SKIPPED = "requested"
"""Why a step was skipped, in the word of a row: Airflow's tables don't say."""

_NOT_BEGUN = frozenset({None, "scheduled", "queued", "removed"})
_RUNNING = frozenset({"running", "restarting", "deferred", "up_for_reschedule", "awaiting_input"})
_ENDS = frozenset({"success", "failed", "upstream_failed", "skipped"})
KNOWN = _NOT_BEGUN | _RUNNING | _ENDS | {"up_for_retry"}
"""All states of a task instance, of Airflow 2 and of Airflow 3. Any other counts as not begun."""


class Standing(NamedTuple):
    """How a step, or an item of a map, stands.

    Attributes:
        status: of its row; None for a task that was cleared or was not scheduled yet.
        state_name: of its task run.
        attempts: how often it was begun.
        error_message: of the latest try that failed.
        skip_reason: why it was not executed, in one word.
        skip_note: the same for people.
        created_at: when it was queued.
        started_at: when the latest try began.
        finished_at: when it ended.
    """

    status: Status | None
    state_name: StateName
    attempts: int
    error_message: str | None = None
    skip_reason: str | None = None
    skip_note: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """Return the columns of the row."""
        return {
            name: value.isoformat() if isinstance(value, datetime) else value for name, value in self._asdict().items()
        }


def find_standing(instance: Instance) -> Standing:
    """Return how a task instance stands."""
    state, tries = instance.state, instance.tries
    if state in _RUNNING:
        return Standing(
            Status.PENDING,
            StateName.RUNNING,
            tries,
            created_at=instance.queued_at or instance.started_at,
            started_at=instance.started_at,
        )
    if state == "up_for_retry":
        return Standing(
            Status.PENDING,
            StateName.AWAITING_RETRY,
            tries,
            _describe_failure(instance),
            created_at=instance.queued_at or instance.started_at,
            started_at=instance.started_at,
        )
    if state in _ENDS:
        return _find_end(instance)
    was_begun = state is None or state == "removed"  # then the number is of the last try, otherwise of the next one
    status = None if was_begun else Status.PENDING
    return Standing(status, StateName.PENDING, tries if was_begun else max(tries - 1, 0), created_at=instance.queued_at)


def _find_end(instance: Instance) -> Standing:
    created_at = instance.queued_at or instance.started_at or instance.ended_at
    ended_at = instance.ended_at or instance.started_at
    if instance.state == "skipped":
        return Standing(
            Status.COMPLETED,
            StateName.SKIPPED,
            instance.tries,
            skip_reason=SKIPPED,
            skip_note="skipped in Airflow",
            created_at=created_at,
            finished_at=ended_at,
        )
    if instance.state == "upstream_failed":
        return Standing(
            Status.FAILED,
            StateName.NOT_RUN,
            instance.tries,
            skip_reason=NOT_RUN,
            created_at=created_at,
            finished_at=ended_at,
        )
    has_failed = instance.state == "failed"
    return Standing(
        Status.FAILED if has_failed else Status.COMPLETED,
        StateName.FAILED if has_failed else StateName.COMPLETED,
        instance.tries,
        _describe_failure(instance) if has_failed else None,
        created_at=created_at,
        started_at=instance.started_at,
        finished_at=ended_at,
    )


def _describe_failure(instance: Instance) -> str:
    of = max(instance.most_retries + 1, instance.tries)
    return f"try {instance.tries} of {of} failed in Airflow: its log has the error"


def combine(items: Sequence[Standing]) -> Standing:
    """Return how a mapped task stands, from its items."""
    begun = [each.started_at for each in items if each.started_at is not None]
    created = [each.created_at for each in items if each.created_at is not None]
    attempts = max((each.attempts for each in items), default=0)
    created_at, started_at = min(created, default=None), min(begun, default=None)
    if any(each.finished_at is None or each.status in {None, Status.PENDING} for each in items):
        name = StateName.RUNNING if begun else StateName.PENDING
        return Standing(Status.PENDING, name, attempts, created_at=created_at, started_at=started_at)
    finished_at = max(each.finished_at for each in items if each.finished_at is not None)
    failed = sum(each.status is Status.FAILED and each.skip_reason is None for each in items)
    if failed:
        message = f"{failed} of {len(items)} items failed in Airflow"
        return Standing(
            Status.FAILED, StateName.FAILED, attempts, message, None, None, created_at, started_at, finished_at
        )
    if any(each.skip_reason == NOT_RUN for each in items):
        return Standing(Status.FAILED, StateName.NOT_RUN, attempts, None, NOT_RUN, None, created_at, None, finished_at)
    if all(each.skip_reason is not None for each in items):
        note = "skipped in Airflow"
        return Standing(
            Status.COMPLETED, StateName.SKIPPED, attempts, None, SKIPPED, note, created_at, None, finished_at
        )
    return Standing(
        Status.COMPLETED, StateName.COMPLETED, attempts, None, None, None, created_at, started_at, finished_at
    )
