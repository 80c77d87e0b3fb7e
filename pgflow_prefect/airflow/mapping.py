"""A mapped task: what it is expanded over, and what becomes of that here."""

from collections.abc import Iterator

from pgflow_prefect.definitions.airflow.expansion import Expansion
from pgflow_prefect.definitions.airflow.tasks import AirflowTask
from pgflow_prefect.definitions.model import MapRules, Rule
from pgflow_prefect.definitions.origin import LedgerLine
from pgflow_prefect.wording import write_code


def describe_map(task: AirflowTask, said: MapRules | None) -> Iterator[LedgerLine]:
    """Yield what a task is expanded over, and what becomes of that.

    Args:
        task: with an expansion.
        said: of the map that it becomes; None where it becomes a plain step.
    """
    assert task.expansion is not None
    if said is None:
        yield _describe_no_map(task.task_id, task.expansion)
        return
    [argument] = task.expansion.arguments
    yield LedgerLine(
        task.task_id,
        "map",
        f"A map over {write_code(said.over or '')}: `item` is Airflow's argument {write_code(argument)}. The other "
        "items go on where one fails. Without items it is skipped.",
        is_done=True,
    )
    if said.max_items is None:
        yield LedgerLine(
            task.task_id,
            "map length",
            "Airflow's setting max_map_length is not in the document. Its default is 1024: max_items here.",
            is_done=False,
        )
    if task.rule != Rule.ALL_SUCCESS:
        yield LedgerLine(
            task.task_id,
            "map of nothing",
            f"Where {write_code(said.over or '')} is skipped, Airflow does not run it: upstream_failed. Here its rule "
            "decides, and it has no items.",
            is_done=False,
        )


def _describe_no_map(slug: str, expansion: Expansion) -> LedgerLine:
    return LedgerLine(
        slug,
        "map",
        f"Airflow executes it once for each element of {write_code(expansion.text)}. That is no result of one task, "
        "and not imported. Let a step before it return the list, and make it a map over that step.",
        is_done=False,
    )
