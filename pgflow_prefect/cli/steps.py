"""Checks the name of a step that a command was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from pgflow_prefect.database.store import Store

_SHOWN = 20  # names of steps in a message


async def list_steps(store: Store, run_id: UUID, only: str | None) -> list[str]:
    """Return the slugs of a run's steps.

    Raises:
        UsageError: the step that the user wants is not among them.
    """
    steps = [*(await store.load_run_definition(run_id)).steps]
    if only is not None and only not in steps:
        shown = ", ".join(steps[:_SHOWN]) + (", …" if len(steps) > _SHOWN else "")
        raise UsageError(f"run {run_id} has no step {only!r}: its steps are {shown}")
    return steps
