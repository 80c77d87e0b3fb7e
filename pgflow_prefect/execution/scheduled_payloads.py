"""Finds the payload with which a schedule begins a run: a row of PostgreSQL has it, and Prefect its id."""

from contextlib import suppress
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun

from pgflow_prefect.database.schedules import ScheduledPayload
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import PrefectUnavailableError, UnknownRunError, UsageError
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.schedule_names import find_creator, read_schedule_name
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.waiting import Backoff


async def read_scheduled(store: Store, workflow_slug: str, schedule_id: UUID, run_id: UUID) -> RawJson:
    """Return the payload of a row. A run that has begun before has it, whatever has become of the row.

    Args:
        store: the database.
        workflow_slug: the workflow of the flow run.
        schedule_id: the row that the schedule names.
        run_id: of the run that the flow run begins.

    Raises:
        UsageError: there is no such row, or it is one of another workflow.
    """
    row = await store.read_schedule(schedule_id)
    if row is not None and row.payload is not None and row.workflow_slug == workflow_slug:
        return row.payload
    with suppress(UnknownRunError):
        return (await store.read_run(run_id, with_payload=True)).payload or RawJson("{}")
    again = f"`pgflow-prefect deploy {workflow_slug} --cron … --payload …`"
    if row is not None:
        raise UsageError(
            f"schedule {schedule_id} is one of workflow {row.workflow_slug!r}, not {workflow_slug!r}: set this one's "
            f"with {again}"
        )
    raise UsageError(
        f"schedule {schedule_id} of workflow {workflow_slug!r} has no payload: its row in pgflow_prefect.schedules is "
        f"gone. Set it again with {again}, or delete the schedule in Prefect"
    )


async def find_schedule_id(
    store: Store, client: PrefectClient, flow_run: FlowRun, workflow_slug: str, patience: float
) -> UUID | None:
    """Return the row for a flow run that a schedule of ours has created without its id; None if there is no such row.

    Prefect's server forgets the parameters of a schedule that a user pauses or resumes. The run must not begin with
    another payload.

    Args:
        store: the database.
        client: of Prefect's API.
        flow_run: the flow run.
        workflow_slug: its workflow.
        patience: seconds for which Prefect is asked again while it can't answer: a schedule's date comes only once.

    Raises:
        UsageError: the schedule is gone, so that its payload is not known.
        PrefectUnavailableError: Prefect's API did not answer in all that time.
    """
    creator = find_creator(flow_run)
    if creator is None or flow_run.deployment_id is None:
        return None
    rows = {each.name: each for each in await store.list_schedules([workflow_slug])}
    if not rows:
        return None
    backoff = Backoff(patience, f"workflow {workflow_slug}")
    while True:
        try:
            return await _find_row(client, flow_run.deployment_id, creator, rows)
        except PrefectUnavailableError as error:
            if not await backoff.pause(error):
                raise


async def _find_row(
    client: PrefectClient, deployment_id: UUID, creator: UUID, rows: dict[str, ScheduledPayload]
) -> UUID | None:
    with ask_prefect(f"schedule {creator}"):
        schedules = (await client.read_deployment(deployment_id)).schedules
    slugs = {each.id: each.slug for each in schedules}
    if creator not in slugs:
        raise UsageError(f"the schedule {creator} that has started this flow run is gone from Prefect, and its payload")
    row = rows.get(read_schedule_name(slugs[creator]) or "")
    return row.id if row is not None else None
