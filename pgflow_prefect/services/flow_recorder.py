"""Shows runs in Prefect that other programs have executed: the workers of the released pgflow, or Airflow."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State

from pgflow_prefect.airflow.mirrored import EPOCH
from pgflow_prefect.database.recording import UnrecordedRun, UnrecordedStep
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import PgflowPrefectError
from pgflow_prefect.execution.reporting.observed import ObservedSteps
from pgflow_prefect.execution.reporting.recorded import StepEvents
from pgflow_prefect.models import StepState, TakenRun
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from pgflow_prefect.prefect_api.ids import make_placeholder
from pgflow_prefect.services.heartbeat import Heartbeat
from pgflow_prefect.services.recording import RunRecorder, send_events
from pgflow_prefect.services.submission import create_observed
from pgflow_prefect.settings import Settings
from pgflow_prefect.workflow import to_flow_name


class FlowRecorder(RunRecorder):
    """Shows runs that other workers execute: as flow runs without a deployment, which Prefect can't start."""

    def __init__(self, store: Store, client: PrefectClient, installation: UUID, settings: Settings) -> None:
        super().__init__(store, client, FlowRunWriter(client), installation, settings, lambda _: None)
        self._flow_ids: dict[str, UUID] = {}

    async def _submit(self, run: TakenRun, state: State[Any]) -> FlowRun:
        known = run.workflow_slug in self._flow_ids
        flow_id = await self._find_flow(run.workflow_slug)
        try:
            return await create_observed(self.client, flow_id, run, state, installation=self.installation)
        except PgflowPrefectError:
            self._flow_ids.pop(run.workflow_slug, None)  # a user may have deleted the flow since
            if not known:
                raise
        return await self._submit(run, state)

    async def _find_flow(self, workflow_slug: str) -> UUID:
        if workflow_slug not in self._flow_ids:
            with ask_prefect(f"the flow of {workflow_slug!r}"):
                self._flow_ids[workflow_slug] = await self.client.create_flow_from_name(to_flow_name(workflow_slug))
        return self._flow_ids[workflow_slug]

    async def _list_steps(self, run_ids: Sequence[UUID]) -> dict[UUID, list[UnrecordedStep]]:
        found: dict[UUID, list[UnrecordedStep]] = {}
        for run_id in run_ids:
            slugs = (await self.store.load_run_definition(run_id)).steps
            found[run_id] = [_to_unrecorded(run_id, each) for each in await self.store.list_step_ends(run_id, slugs)]
        return found

    async def _show_steps(self, run: UnrecordedRun, flow_run: FlowRun, steps: Sequence[UnrecordedStep]) -> None:
        events = StepEvents(flow_run, await self._read_graph(run))
        observed = ObservedSteps(events, self.find_shown_as(run.id, flow_run))
        assert run.finished_at is not None
        tasks = await self.store.list_map_tasks(run.id, at_most=self.settings.item_task_runs)
        await send_events(observed.make_events(steps, tasks, run.finished_at, has_ended=True))

    def find_shown_as(self, run_id: UUID, flow_run: FlowRun) -> UUID:
        """Return the id from which the ids of a run's task runs are made.

        The rows of a run of Airflow name its task runs before Prefect has a flow run of it.
        """
        return make_placeholder(run_id, EPOCH) if self.store.implementation.executes else flow_run.id

    async def conclude(self, run: UnrecordedRun, flow_run: FlowRun, steps: Sequence[StepState]) -> None:
        """Tell what a run that was shown from its start has come to: an event, and the artifacts that are wanted."""
        self._tell(run, flow_run)
        if self._is_worth_artifacts(run):
            await self._make_artifacts_of(run, flow_run, [_to_unrecorded(run.id, each) for each in steps])


def _to_unrecorded(run_id: UUID, step: StepState) -> UnrecordedStep:
    return UnrecordedStep.model_validate({**dict(step), "run_id": run_id, "task_run_id": None})


async def open_flow_recorder(settings: Settings, store: Store, client: PrefectClient) -> FlowRecorder:
    """Return a recorder of the runs of all flows of this database.

    Raises:
        ForeignInstallationError: the database is a copy of one that is in use.
        PrefectUnavailableError: Prefect does not answer.
    """
    installation = await Heartbeat(store, client).register()
    return FlowRecorder(store, client, installation.id, settings)
