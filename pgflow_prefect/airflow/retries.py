"""The delays between the attempts of a task, as options of a step."""

from pgflow_prefect.definitions.airflow.tasks import AirflowTask

MOST_DELAYS = 20
"""Delays that are written out; the last one repeats."""

_LONGEST = 24 * 60 * 60.0
"""Seconds: Airflow waits no longer before an attempt, where the delay grows."""


def list_delays(task: AirflowTask) -> float | list[float]:
    """Return the delay of a task before each attempt, or one for each attempt where it grows; in seconds."""
    if not task.backoff:
        return task.retry_delay
    longest = _LONGEST if task.max_retry_delay is None else min(task.max_retry_delay, _LONGEST)
    delays = []
    delay = task.retry_delay
    for _ in range(min(task.retries, MOST_DELAYS)):
        delays.append(min(delay, longest))
        delay = min(delay * task.backoff, longest)
    return delays
