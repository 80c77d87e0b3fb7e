"""Names and ends tasks that the released pgflow has given up: their runs would wait for them for ever."""

from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation.disagreements import Disagreement, Kind

_BATCH = 100  # tasks


async def end_given_up(store: Store, *, apply: bool) -> list[Disagreement]:
    """Return the tasks that pgflow has given up, and fail them with `apply`: the flow says what follows.

    Args:
        store: the database. The classic schema has no such tasks.
        apply: fail them; without it, nothing is written, and only the first ones are returned.
    """
    if not apply:
        found = await store.list_given_up_tasks(limit=_BATCH)
        return [
            _describe(each.workflow_slug, each.run_id, f"{each.step_slug}[{each.task_index}]", "fail it")
            for each in found
        ]
    ended: list[Disagreement] = []
    while page := await store.end_given_up_tasks(limit=_BATCH):
        for each in page:
            repair = f"failed; the run is {each.run_status}"
            told = _describe(each.workflow_slug, each.run_id, f"{each.step_slug}[{each.task_index}]", repair)
            ended.append(told.model_copy(update={"repaired": True}))
    return ended


def _describe(workflow_slug: str, run_id: object, task: str, repair: str) -> Disagreement:
    return Disagreement.model_validate(
        {
            "kind": Kind.GIVEN_UP,
            "run_id": run_id,
            "workflow_slug": workflow_slug,
            "flow_run_id": None,
            "found": f"pgflow has given up task {task}, and the run waits for it",
            "repair": repair,
        }
    )
