"""Names and rebuilds messages of the released pgflow that are in no queue: after a purge, say, or a partial restore."""

from pgflow_prefect.database.moving_statements import LostMessage
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation.disagreements import Disagreement, Kind

_BATCH = 1000  # messages
_LEFT = "another transaction holds the task, or the database user may not write to its queue"


async def restore_lost_messages(store: Store, *, apply: bool) -> list[Disagreement]:
    """Return the tasks without a message, and rebuild each message with `apply`.

    Args:
        store: the database. The classic schema has no such tasks.
        apply: rebuild them; without it, nothing is written, and only the first ones are returned.
    """
    if not apply:
        found = await store.list_lost_messages(limit=_BATCH)
        return [_describe(each, "rebuild the message") for each in found]
    restored: list[Disagreement] = []
    while page := await store.restore_messages(limit=_BATCH):
        told = [_describe(each, "rebuilt the message") for each in page]
        restored += [each.model_copy(update={"repaired": True}) for each in told]
    left = [_describe(each, "rebuild the message") for each in await store.list_lost_messages(limit=_BATCH)]
    return [*restored, *(each.model_copy(update={"error": _LEFT}) for each in left)]


def _describe(lost: LostMessage, repair: str) -> Disagreement:
    return Disagreement.model_validate(
        {
            "kind": Kind.LOST_MESSAGE,
            "run_id": lost.run_id,
            "workflow_slug": lost.workflow_slug,
            "flow_run_id": None,
            "found": f"task {lost.step_slug}[{lost.task_index}] waits, and its message is in no queue",
            "repair": repair,
        }
    )
