"""A mapped task: what it is expanded over, and what becomes of that here."""

from collections.abc import Iterator

from pgflow_prefect.definitions.airflow.tasks import AirflowTask
from pgflow_prefect.definitions.origin import LedgerLine
from pgflow_prefect.wording import write_code


def describe_map(task: AirflowTask) -> Iterator[LedgerLine]:
    """Yield what a task is expanded over, and what to do about it."""
    assert task.expansion is not None
    yield LedgerLine(
        task.task_id,
        "map",
        f"Airflow executes it once for each element of {write_code(task.expansion.text)}. That is not imported: the "
        "stub gets the whole list. Write a loop in it.",
        is_done=False,
    )
