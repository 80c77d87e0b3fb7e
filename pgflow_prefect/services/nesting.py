"""Nests the flow run of a child below the task run that waits for it, as Prefect shows a subflow."""

import logging
from typing import Any, cast
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Pending

from pgflow_prefect.models import TakenRun, TaskKey
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ids import find_task_run_id, is_placeholder
from pgflow_prefect.prefect_api.internals import to_state_create
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.wording import clean

_OF_ALL = frozenset({401, 403, 408, 425, 429, 502, 503, 504})
"""Status codes that say nothing of this one task run."""

_logger = logging.getLogger(__name__)


async def find_parent_task_run(client: PrefectClient, run: TakenRun) -> UUID | None:
    """Return the task run below which Prefect is to show a run; None for a run that is no child, or if none shows it.

    Prefect refuses a flow run below a task run that it does not know. It may know that one by an event that is on its
    way. So this creates the task run, as that event would. If it is there, it stays as it is.

    Args:
        client: Prefect's API.
        run: any run.

    Raises:
        PrefectUnavailableError: Prefect does not answer.
    """
    parent, slug = run.parent_flow_run_id, run.parent_step_slug
    if parent is None or slug is None or is_placeholder(parent):
        return None
    task_run_id = find_task_run_id(parent, TaskKey(slug))
    name = clean(slug)
    body = {
        "id": str(task_run_id),
        "flow_run_id": str(parent),
        "name": name,
        "task_key": name,
        "dynamic_key": str(task_run_id),
        "state": to_state_create(Pending()).model_dump(mode="json", exclude_unset=True),
    }
    with ask_prefect(f"the task run of step {slug!r}"):
        try:
            await cast("Any", client).request("POST", "/task_runs/", json=body)
        except PrefectHTTPStatusError as error:
            if error.response.status_code in _OF_ALL:
                raise
            # A user has deleted that flow run, say. The run is more important than its place in the UI.
            _logger.warning("run %s is not shown below its parent: %s", run.run_id, describe_error(error))
            return None
    return task_run_id
