"""Loads the result of a step for a person or a program: the value, also if it is in a storage."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from pgflow_prefect.database.store import open_store
from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.process.resources import open_toolbox
from pgflow_prefect.execution.steps.run_results import RunResults
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.models import TaskKey
from pgflow_prefect.raw_json import write_object
from pgflow_prefect.settings import Settings


async def load_result(
    settings: Settings, workflow_slug: str, handlers: Mapping[str, StepHandlers], run_id: UUID, step_slug: str
) -> Any:  # noqa: ANN401  any value
    """Return the result of a completed step: what its JSON means, or what its serializer returns.

    Args:
        settings: the database, and the storage of results.
        workflow_slug: the workflow.
        handlers: name the storages and serializers, by step slug.
        run_id: a run of the workflow.
        step_slug: the step.

    Raises:
        UnknownRunError: there is no such run.
        UsageError: it is a run of another workflow, or the step is not completed.
        StoredResultError: the object is missing, or has changed.
        StorageError: the storage does not answer, or refuses.
    """
    async with open_store(settings, size=1, only_reads=True) as store, open_toolbox(settings) as toolbox:
        run = await store.read_run(run_id)
        if run.workflow_slug != workflow_slug:
            raise UsageError(f"run {run_id} is one of workflow {run.workflow_slug!r}, not {workflow_slug!r}")
        found = await store.read_results(run_id, [step_slug])
        if step_slug not in found:
            raise UsageError(f"run {run_id} has no result of step {step_slug!r}: the step is not completed")
        installation = await store.read_installation()
        results = RunResults.of(installation, handlers).open(toolbox, run_id, TaskKey(step_slug), 0)
        inputs = await results.resolve(write_object({step_slug: found[step_slug]}))
    if step_slug in inputs.objects:
        return inputs.objects[step_slug]
    return inputs.results.split()[step_slug].decode()
