"""What an exported file for Airflow 3 has beside `common_part`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk.exceptions import AirflowSkipException as _AirflowSkipException

from pgflow_prefect.deployment.plain.common_part import Branch, Skip, StepContext, _call_handler, _log

# The exported file begins here.
_RESULT = "pgflow_result"


class _NoFailedSteps:
    """Stands for `context.failed_steps`: fails, so that a handler does not take an unknown list for an empty one."""

    def _fail(self, *_: Any) -> Any:
        raise RuntimeError("context.failed_steps is not known in Airflow: pgflow-prefect had it from PostgreSQL")

    __iter__ = __len__ = __bool__ = __getitem__ = __contains__ = _fail


def _perform(
    slug: str,
    workflow: str,
    function: Any,
    upstream: Mapping[str, tuple[str, str, bool]],
    context: Mapping[str, Any],
    **item: Any,
) -> Any:
    """Do the work of a task: with the results of the tasks above, and the run's `conf` as the payload.

    Args:
        slug: the step.
        workflow: its workflow.
        function: its handler.
        upstream: the argument of each step above, with the step, the id of its task, and whether that is a map.
        context: Airflow's.
        item: of a map, its item.
    """
    ti, run = context["ti"], context["dag_run"]
    results = {}
    for step, task_id, is_map in upstream.values():
        has_result, found = _pull(ti, task_id, is_map)
        if has_result:
            results[step] = found
    start, end = getattr(run, "data_interval_start", None), getattr(run, "data_interval_end", None)
    index = max(int(getattr(ti, "map_index", None) or 0), 0)
    given = {
        "payload": getattr(run, "conf", None) or {},
        "upstream": results,
        **{name: results[step] for name, (step, _, _) in upstream.items() if step in results},
        "context": StepContext(
            run_id=run.run_id,
            workflow_slug=workflow,
            step_slug=slug,
            attempt=int(ti.try_number),
            logger=_log,
            item_index=index,
            item_indexes=(index,) if item else (),
            failed_steps=_NoFailedSteps(),
            logical_date=getattr(run, "logical_date", None),
            data_interval_start=None if start == end else start,  # Airflow's timetable of a cron has empty intervals
            data_interval_end=end,
        ),
        **item,
    }
    try:
        return _call_handler(function, given)
    except Skip as skip:
        raise _AirflowSkipException(str(skip)) from skip


def _pull(ti: Any, task_id: str, is_map: bool) -> tuple[bool, Any]:
    """Return whether a task has a result, and the result: of one that chooses branches, under a key of its own."""
    if is_map:  # asked by a list, as Airflow gives the item itself where a map has one
        return True, [each for each in ti.xcom_pull(task_ids=[task_id]) if each is not None]
    kept = ti.xcom_pull(task_ids=task_id, key=_RESULT)
    if kept is not None:
        return True, kept["chosen"]
    found = ti.xcom_pull(task_ids=task_id)
    return found is not None, found


def _keep(slug: str, found: Any) -> Any:
    """Return the result of a task that chooses no branches."""
    if isinstance(found, Branch):
        raise TypeError(f"step {slug!r} returns a Branch, but its task is no @task.branch: write Branch in its handler")
    return found


def _choose(ti: Any, found: Any, below: Mapping[str, str], ruled: Mapping[str, list[str]]) -> list[str]:
    """Return the ids of the tasks that a branch takes, and keep its result.

    Args:
        ti: the task instance.
        found: what the handler has returned.
        below: the ids of the tasks below, by step.
        ruled: for each of these steps, those further below it that have a rule of their own.
    """
    if not isinstance(found, Branch):
        ti.xcom_push(key=_RESULT, value={"chosen": found})
        return [*below.values()]
    if unknown := {*found.taken} - {*below}:
        raise ValueError(f"no task waits for this one by the name {sorted(unknown)[0]!r}")
    kept = {each for step in found.taken for each in ruled[step]}
    if found.whole and (left := {each for step in below for each in ruled[step]} - kept):
        raise NotImplementedError(f"Branch(whole=True): Airflow would execute {sorted(left)[0]!r} by its trigger rule")
    ti.xcom_push(key=_RESULT, value={"chosen": found.result})
    return [task_id for step, task_id in below.items() if step in found.taken]
