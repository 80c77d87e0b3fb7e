"""The flow of every step that is done on a work pool: one flow run is one attempt."""

import os
import sys
from uuid import UUID

from prefect import flow as make_flow
from prefect.client.schemas.objects import State

from pgflow_prefect.database.store import open_store
from pgflow_prefect.deployment.handler_files import load_workflow
from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.pool_step import PoolStep
from pgflow_prefect.execution.process.database_block import find_settings
from pgflow_prefect.execution.process.pool_watch import FLOW
from pgflow_prefect.execution.reporting.handler_logs import show_logs
from pgflow_prefect.models import PoolAttempt, TaskKey
from pgflow_prefect.prefect_api.states import superseded
from pgflow_prefect.settings import Settings

_CONNECTIONS = 3  # the work's, the report's, and one more


@make_flow(name=FLOW, persist_result=False, log_prints=True)
async def flow(  # noqa: PLR0917  Prefect passes them by name
    run: UUID, step: str, attempt: int, index: int = 0, directory: str | None = None, handlers: str | None = None
) -> State[None]:
    """Do an attempt of a step, if a run waits for it.

    Args:
        run: the run in PostgreSQL, which has the input and gets the result.
        step: its step.
        attempt: the number of the attempt; another one is not done.
        index: which of the step's tasks this is.
        directory: the directory with the folder of handlers.
        handlers: the file of handlers, relative to it; by default, the usual one.
    """
    settings = await find_settings(Settings())
    async with open_store(settings, size=_CONNECTIONS, executes_moved=True) as store:
        work = PoolStep(store, settings, PoolAttempt(run, TaskKey(step, index), attempt))
        given = await work.begin()
        if given is None:
            return superseded("no run waits for this attempt any more, or another process does it")
        with work.keep() as lease:
            try:
                _enter(directory)
                workflow, _ = load_workflow(given.workflow_slug, handlers)
            except (UsageError, OSError) as error:
                return await work.fail(f"the handlers can't be loaded on the work pool: {error}", is_final=True)
            show_logs(each.function for each in workflow.handlers.values())
            return await work.perform(given, workflow.step_handlers, lease)


def _enter(directory: str | None) -> None:
    if directory is not None:
        os.chdir(directory)
        sys.path.insert(0, directory)
