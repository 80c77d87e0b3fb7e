"""Deployments: what Prefect knows a workflow by, so that its workers, its schedules and its buttons can start runs."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import DeploymentSort
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.urls import url_for

from pgflow_prefect.deployment import bound
from pgflow_prefect.deployment.handler_files import BY_ROWS, find_workflow
from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.prefect_errors import translate_prefect_errors
from pgflow_prefect.graph import suggest
from pgflow_prefect.models import WorkflowDefinition
from pgflow_prefect.workflow import Workflow, to_flow_name

DEPLOYMENT = "pgflow"
"""The name of the one deployment that we keep for each workflow; a tag of it, too."""

_BATCH = 100  # flow names in one request
_PAGE = 200  # deployments in one answer: a server gives no more by default

_SET_DIRECTORY = "prefect.deployments.steps.set_working_directory"


class Outcome(StrEnum):
    """What a deployment of ours went through."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Deployed:
    """A deployment of ours, as it is after `deploy`.

    Attributes:
        workflow_slug: its workflow.
        id: Prefect's id of it.
        name: as Prefect's commands take it, `flow/deployment`.
        outcome: what became of it.
        work_pool: whose workers execute its flow runs; without one, only `pgflow-prefect worker` does.
        url: its page in Prefect's UI, if there is one that outlives this process.
    """

    workflow_slug: str
    id: UUID
    name: str
    outcome: Outcome
    work_pool: str | None
    url: str | None


@dataclass(frozen=True)
class FoundDeployments:
    """The deployments of some flows.

    Attributes:
        chosen: by flow name: the one that is called `pgflow`, else the only one that there is.
        ambiguous: by flow name: the names of several others, none of which is called `pgflow`.
    """

    chosen: Mapping[str, DeploymentResponse]
    ambiguous: Mapping[str, tuple[str, ...]]


async def deploy(
    client: PrefectClient,
    workflow: Workflow,
    definition: WorkflowDefinition,
    source: str,
    *,
    work_pool: str | None = None,
    directory: Path | None = None,
) -> Deployed:
    """Create a workflow's deployment, or update it where it differs.

    Only what follows from the workflow is written. What people set in Prefect stays: schedules, the paused flag, the
    concurrency limit, parameters, job variables, further tags, and the work pool where none is named here.

    Args:
        client: of Prefect's API.
        workflow: the handlers.
        definition: whose hash becomes the deployment's version.
        source: the file or module that the handlers were loaded from.
        work_pool: whose workers are to execute the flow runs.
        directory: the working directory of flow runs that Prefect's workers execute; the current one where not given.

    Raises:
        UsageError: there is no such work pool, or Prefect can't load a flow from such a source.
        PrefectUnavailableError: the API does not answer.
        PrefectRefusedError: Prefect refuses the deployment.
    """
    flow = workflow.flow
    directory = (directory or Path.cwd()).resolve()
    wanted: dict[str, Any] = {
        "version": definition.definition_hash,
        "entrypoint": make_entrypoint(workflow.slug, source, directory),
        # Without a step that says where the code is, a worker copies its own working directory for every flow run.
        "pull_steps": [] if source == BY_ROWS else [{_SET_DIRECTORY: {"directory": str(directory)}}],
        "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
        "enforce_parameter_schema": True,
    }
    with translate_prefect_errors(f"the deployment of workflow {workflow.slug!r}"):
        if work_pool is not None:
            await _check_work_pool(client, work_pool)
        existing = await _read_own(client, flow.name)
        if existing is None:
            description = workflow.description or flow.description
            deployment_id = await _create(
                client, flow.name, **wanted, description=description, work_pool_name=work_pool
            )
            return _describe(workflow.slug, deployment_id, Outcome.CREATED, work_pool)
        if workflow.description:
            wanted["description"] = workflow.description
        outcome = await _update(client, existing, wanted, work_pool)
        return _describe(workflow.slug, existing.id, outcome, work_pool or existing.work_pool_name)


async def register(client: PrefectClient, workflow: Workflow, definition: WorkflowDefinition, source: str) -> Deployed:
    """Deploy a workflow for a process that executes it itself, unless a work pool has it.

    Of that deployment, the pool's workers load the code from where it says: not from where this process was started.
    Arguments and errors as of `deploy`.
    """
    with translate_prefect_errors(f"the deployment of workflow {workflow.slug!r}"):
        existing = await _read_own(client, workflow.flow.name)
    if existing is not None and existing.work_pool_name is not None:
        return _describe(workflow.slug, existing.id, Outcome.UNCHANGED, existing.work_pool_name)
    return await deploy(client, workflow, definition, source)


async def find_deployments(client: PrefectClient, flow_names: Iterable[str]) -> FoundDeployments:
    """Return each flow's deployment; of a flow that has none, nothing.

    Raises:
        PrefectUnavailableError: the API does not answer.
    """
    chosen: dict[str, DeploymentResponse] = {}
    ambiguous: dict[str, tuple[str, ...]] = {}
    with translate_prefect_errors("a look at the deployments"):
        for flow_name, deployments in (await _read_all(client, list(dict.fromkeys(flow_names)))).items():
            own = [each for each in deployments if each.name == DEPLOYMENT]
            if own or len(deployments) == 1:
                chosen[flow_name] = (own or deployments)[0]
            else:
                ambiguous[flow_name] = tuple(sorted(each.name for each in deployments))
    return FoundDeployments(chosen, ambiguous)


def make_entrypoint(workflow_slug: str, source: str, directory: Path) -> str:
    """Return what Prefect's workers load a workflow's flow by: `path/to/file.py:NAME`, or `package.module:NAME`.

    Args:
        workflow_slug: the workflow.
        source: the file or module that its handlers were loaded from, or `BY_ROWS`.
        directory: the working directory of the flow runs; a file beneath it is named relative to it.

    Raises:
        UsageError: the file's name does not end in `.py`, or the workflow was not loaded from there.
    """
    if source == BY_ROWS:
        return bound.ENTRYPOINT
    name = _find_flow(_find_module(source), workflow_slug, source)
    if not _is_file(source):
        return f"{source}:{name}"
    path = Path(source).resolve()
    if path.suffix != ".py":
        raise UsageError(f"{source} can't be deployed: Prefect loads flows from files whose names end in .py only")
    return f"{path.relative_to(directory) if path.is_relative_to(directory) else path}:{name}"


def _is_file(source: str) -> bool:
    return source.endswith(".py") or Path(source).is_file()


def _find_module(source: str) -> ModuleType:
    """Return the module that was loaded from a file or module, without executing it again."""
    if not _is_file(source) and source in sys.modules:
        return sys.modules[source]
    path = str(Path(source).resolve())
    for module in [*sys.modules.values()]:
        if isinstance(module, ModuleType) and vars(module).get("__file__") == path:
            return module
    raise UsageError(f"{source} has not been loaded: there is no flow to deploy")


def _find_flow(module: ModuleType, workflow_slug: str, source: str) -> str:
    """Return the name of a workflow's flow in a module, `flow` or `workflow.flow` most often."""
    workflow = find_workflow(module, workflow_slug, source)
    names = vars(module)
    # By its function: a user may have bound `workflow.flow.with_options(…)`, and then means that one.
    function = workflow.flow.fn
    flows = [name for name, value in names.items() if isinstance(value, Flow) and value.fn is function]
    if flows:
        return "flow" if "flow" in flows else flows[0]
    return next(f"{name}.flow" for name, value in names.items() if value is workflow)


async def _check_work_pool(client: PrefectClient, name: str) -> None:
    if await client.read_work_pools(work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[name]))):
        return
    known = sorted(pool.name for pool in await client.read_work_pools())
    there = f"there are {', '.join(map(repr, known))}" if known else "there is none yet"
    raise UsageError(
        f"unknown work pool {name!r}{suggest(name, known)}: {there}; "
        f"create it with `prefect work-pool create {name} --type process`"
    )


async def _read_own(client: PrefectClient, flow_name: str) -> DeploymentResponse | None:
    found = await client.read_deployments(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
        deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[DEPLOYMENT])),
    )
    return found[0] if found else None


async def _create(client: PrefectClient, flow_name: str, **fields: Any) -> UUID:  # noqa: ANN401  Prefect's own
    """Create our deployment of a flow; one that somebody else has created meanwhile is updated."""
    flow_id = await client.create_flow_from_name(flow_name)
    return await client.create_deployment(flow_id, DEPLOYMENT, tags=[DEPLOYMENT], **fields)


async def _update(
    client: PrefectClient, existing: DeploymentResponse, wanted: Mapping[str, Any], work_pool: str | None
) -> Outcome:
    """Change what is not as it is wanted, by PATCH: creating it again would delete its schedules and settings."""
    changed = {name: value for name, value in wanted.items() if getattr(existing, name) != value}
    if DEPLOYMENT not in existing.tags:
        changed["tags"] = [*existing.tags, DEPLOYMENT]
    if work_pool not in {None, existing.work_pool_name}:  # naming the same one again would reset the queue
        # Prefect looks whether the job variables fit the pool, and takes them for empty where they are not named.
        changed |= {"work_pool_name": work_pool, "job_variables": existing.job_variables}
    if not changed:
        return Outcome.UNCHANGED
    await client.update_deployment(existing.id, DeploymentUpdate(**changed))
    return Outcome.UPDATED


def _describe(slug: str, deployment_id: UUID, outcome: Outcome, work_pool: str | None) -> Deployed:
    url = url_for("deployment", obj_id=deployment_id) if get_current_settings().api.url else None
    return Deployed(slug, deployment_id, f"{to_flow_name(slug)}/{DEPLOYMENT}", outcome, work_pool, url)


async def _read_all(client: PrefectClient, flow_names: list[str]) -> dict[str, list[DeploymentResponse]]:
    """Return all deployments of these flows by flow name, with a few requests for each hundred names."""
    found: dict[str, list[DeploymentResponse]] = {}
    for start in range(0, len(flow_names), _BATCH):
        chosen = FlowFilter(name=FlowFilterName(any_=flow_names[start : start + _BATCH]))
        names = {flow.id: flow.name for flow in await client.read_flows(flow_filter=chosen, limit=_BATCH)}
        page: list[DeploymentResponse] = []
        offset = 0
        while offset == 0 or len(page) == _PAGE:
            page = await client.read_deployments(
                flow_filter=chosen, sort=DeploymentSort.CREATED_DESC, limit=_PAGE, offset=offset
            )
            offset += _PAGE
            for each in page:
                if each.flow_id in names:  # else it was created between the two requests
                    found.setdefault(names[each.flow_id], []).append(each)
    return found
