"""From a run that was taken to the one flow run that is created for it."""

from collections.abc import Mapping
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Scheduled

from pgflow_prefect.errors import DeploymentGoneError, PrefectRefusedError
from pgflow_prefect.models import TakenRun
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.errors import translate_prefect_errors
from pgflow_prefect.prefect_api.flow_run_names import name_flow_run
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.internals import to_state_create
from pgflow_prefect.prefect_api.ownership import find_foreign_tags, make_ownership_tag
from pgflow_prefect.services.nesting import find_parent_task_run


def make_backfill_tags(run: TakenRun) -> list[str]:
    """Return the tag by which Prefect shows the flow runs of a backfill together; none for a live run."""
    return [] if run.backfill_id is None else [f"backfill:{run.backfill_id}"]


async def create_submission(
    writer: FlowRunWriter,
    client: PrefectClient,
    deployment_id: UUID,
    run: TakenRun,
    state: State[Any] | None = None,
    *,
    installation: UUID | None = None,
    policy: Mapping[str, Any] | None = None,
) -> FlowRun:
    """Create the flow run of a run, or find the one that was created in the same epoch.

    It gets the run's id only: the payload stays in PostgreSQL.

    Args:
        writer: creates flow runs, together with those of other runs.
        client: Prefect's API.
        deployment_id: what to run.
        run: the run, in the epoch in which it was taken.
        state: the flow run's first state; scheduled for now where not given.
        installation: the id of the database, which the flow run is tagged with.
        policy: how often Prefect tries the flow run again, in its words.

    Raises:
        PrefectUnavailableError: Prefect does not answer.
        DeploymentGoneError: there is no such deployment any more, or another installation has taken it over.
        PrefectRefusedError: Prefect refuses it for good.
    """
    body = _make_body(run, state or Scheduled(), installation, policy)
    if (parent := await find_parent_task_run(client, run)) is not None:
        body["parent_task_run_id"] = str(parent)
    with translate_prefect_errors(f"a flow run of run {run.run_id}"):
        try:
            created = await writer.create(deployment_id, body)
        except (ObjectNotFound, PrefectHTTPStatusError) as error:
            if isinstance(error, ObjectNotFound) or error.response.status_code == httpx.codes.NOT_FOUND:
                raise DeploymentGoneError(f"deployment {deployment_id} no longer exists") from error
            raise
    # Of a key that it knows, Prefect returns the flow run that is there, whatever it was asked to do.
    if created.parameters.get("run_id") != str(run.run_id) or created.deployment_id != deployment_id:
        raise PrefectRefusedError(
            f"flow run {created.id} has the idempotency key {run.idempotency_key!r}, but is not of this run: "
            f"deployment {created.deployment_id}, run {created.parameters.get('run_id')}"
        )
    if installation is not None and (foreign := find_foreign_tags(created.tags, installation)):
        with ask_prefect(f"a flow run of run {run.run_id}"):
            reason = f"the deployment belongs to another installation: {', '.join(foreign)}"
            await client.set_flow_run_state(created.id, Cancelled(message=reason), force=True)
        raise DeploymentGoneError(f"deployment {deployment_id}: {reason}")
    return created


async def create_observed(
    client: PrefectClient, flow_id: UUID, run: TakenRun, state: State[Any], *, installation: UUID
) -> FlowRun:
    """Create the flow run of a run that another program executes, or find the one that shows it.

    It belongs to no deployment: Prefect can't start such a run.

    Args:
        client: Prefect's API.
        flow_id: the flow in Prefect.
        run: the run.
        state: the flow run's first state.
        installation: the id of the database, which the flow run is tagged with.

    Raises:
        PrefectUnavailableError: Prefect does not answer.
        PrefectRefusedError: Prefect refuses it for good.
    """
    body = {**_make_body(run, state, installation, None), "flow_id": str(flow_id)}
    with ask_prefect(f"a flow run of run {run.run_id}"):
        # Prefect's client takes a Python flow here, which there is not.
        response = await cast("Any", client).request("POST", "/flow_runs/", json=body)
        created = FlowRun.model_validate(response.json())
    if created.parameters.get("run_id") != str(run.run_id):
        raise PrefectRefusedError(
            f"flow run {created.id} has the idempotency key {run.idempotency_key!r}, but is not of this run"
        )
    return created


def _make_body(
    run: TakenRun, state: State[Any], installation: UUID | None, policy: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "name": name_flow_run(run.workflow_slug, run.run_id),
        "parameters": {"run_id": str(run.run_id)},
        "state": to_state_create(state).model_dump(mode="json", exclude_unset=True),
        "idempotency_key": run.idempotency_key,
        "tags": [*([make_ownership_tag(installation)] if installation is not None else []), *make_backfill_tags(run)],
        "empirical_policy": {**(policy or {})},
    }
