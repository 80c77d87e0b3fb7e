"""The flow of every workflow without Python: rows of `pgflow_prefect.bindings` say who does its steps."""

from typing import Any
from uuid import UUID

from prefect import flow as make_flow
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from pgflow_prefect.database.store import open_store
from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.process.database_block import find_settings
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.settings import Settings
from pgflow_prefect.workflow import Workflow, to_flow_name

ENTRYPOINT = f"{__name__}.flow"
"""The entry point for Prefect's workers: a module, so that they need no file."""


@make_flow(name="pgflow", persist_result=False, log_prints=True)
async def flow(payload: Any = None, run_id: UUID | None = None) -> Any:  # noqa: ANN401  any JSON value
    """Execute a run of the deployment's workflow: the run of this id, or a new one."""
    settings = await find_settings(Settings())
    workflow = Workflow(await _find_slug(settings, run_id))
    return await workflow.make_flow(settings).fn(payload, run_id)


async def _find_slug(settings: Settings, run_id: UUID | None) -> str:
    """Return the workflow of this flow run, by the name of Prefect's flow.

    Raises:
        UsageError: there is none, or the run belongs to another workflow: a Prefect user may name any run.
    """
    async with open_store(settings, size=1, executes_moved=True) as store:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        with ask_prefect(f"the flow of flow run {context.flow_run.name}"):
            async with get_client() as client:
                name = (await client.read_flow(context.flow_run.flow_id)).name
        slugs = [slug for slug in await store.list_slugs() if to_flow_name(slug) == name]
        if run_id is not None and (slug := (await store.read_run(run_id)).workflow_slug) not in slugs:
            raise UsageError(f"run {run_id} is one of workflow {slug!r}, and this is a flow run of {name!r}")
    if len(slugs) != 1:
        raise UsageError(
            f"{len(slugs)} workflows of this database fit Prefect's flow {name!r}: run `pgflow-prefect deploy` for the "
            "one that you mean, under a slug that no other slug resembles"
        )
    return slugs[0]
