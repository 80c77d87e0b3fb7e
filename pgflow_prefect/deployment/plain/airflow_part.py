"""What an exported file for Airflow 3 has beside `common_part`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk.exceptions import AirflowSkipException as _AirflowSkipException

from pgflow_prefect.deployment.plain.common_part import Branch, Skip, StepContext, _call_handler, _log

# The exported file begins here.
_RESULT = "pgflow_result"


def _perform(
    slug: str,
    workflow: str,
    function: Any,
    upstream: Mapping[str, tuple[str, str]],
    context: Mapping[str, Any],
    **item: Any,
) -> Any:
    """Do the work of a task: with the results of the tasks above, and the run's `conf` as the payload.

    Args:
        slug: the step.
        workflow: its workflow.
        function: its handler.
        upstream: the argument of each step above, with the step and the id of its task.
        context: Airflow's.
        item: of a map, its item.
    """
    ti, run = context["ti"], context["dag_run"]
    results = {}
    for step, task_id in upstream.values():
        state, found = _pull(ti, task_id)
        if state:
            results[step] = found
    given = {
        "payload": getattr(run, "conf", None) or {},
        "upstream": results,
        **{name: results[step] for name, (step, _) in upstream.items() if step in results},
        "context": StepContext(
            run_id=run.run_id,
            workflow_slug=workflow,
            step_slug=slug,
            attempt=int(ti.try_number),
            logger=_log,
            item_index=max(int(getattr(ti, "map_index", -1) or 0), 0),
            logical_date=getattr(run, "logical_date", None),
            data_interval_start=getattr(run, "data_interval_start", None),
            data_interval_end=getattr(run, "data_interval_end", None),
        ),
        **item,
    }
    try:
        return _call_handler(function, given)
    except Skip as skip:
        raise _AirflowSkipException(str(skip)) from skip


def _pull(ti: Any, task_id: str) -> tuple[bool, Any]:
    """Return whether a task has a result, and the result: of one that chooses branches, under a key of its own."""
    found = ti.xcom_pull(task_ids=task_id, key=_RESULT)
    if found is None:
        found = ti.xcom_pull(task_ids=task_id)
    if found is not None and not isinstance(found, (str, int, float, bool, list, dict)):
        found = [*found]  # of a map
    return found is not None, found


def _choose(ti: Any, found: Any, below: Mapping[str, str]) -> list[str]:
    """Return the ids of the tasks that a branch takes, and keep its result."""
    if not isinstance(found, Branch):
        ti.xcom_push(key=_RESULT, value=found)
        return [*below.values()]
    ti.xcom_push(key=_RESULT, value=found.result)
    if unknown := {*found.taken} - {*below}:
        raise ValueError(f"no task waits for this one by the name {sorted(unknown)[0]!r}")
    return [task_id for step, task_id in below.items() if step in found.taken]
