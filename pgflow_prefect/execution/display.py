"""What Prefect shows of a run beside its flow run and its task runs: a name, events, artifacts."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from urllib.parse import quote
from uuid import UUID

import anyio
from prefect.client.orchestration import PrefectClient, get_client

from pgflow_prefect.execution.artifacts import ROWS, RunArtifacts
from pgflow_prefect.execution.events import RunEvents
from pgflow_prefect.execution.redaction import describe_error
from pgflow_prefect.execution.steps import Steps
from pgflow_prefect.graph import sort_steps
from pgflow_prefect.models import Run, Status

PATIENCE = 5.0
"""Seconds that a run which has ended waits for what is only shown: Prefect may be away."""

LONG = 10.0
"""Seconds after which a run counts as long, and shows its progress."""

_INTERVAL = 5.0  # seconds between two pictures of the progress

_PREFECTS_OWN_NAME = re.compile(r"[a-z]+-[a-z]+")  # an adjective and an animal

_logger = logging.getLogger(__name__)


def name_flow_run(workflow_slug: str, run_id: UUID) -> str:
    """Return what a run's flow run is called: its workflow, and the beginning of its id."""
    return f"{workflow_slug}-{str(run_id)[:8]}"


class Display:
    """Shows one run. Whatever goes wrong here is logged, and harms no run."""

    def __init__(self, steps: Steps) -> None:
        """Prepare to show a run, and to hear of every state that a step of it enters."""
        self._settings = steps.host.settings
        self._store = steps.host.store
        self._run = steps.run
        self._run_id = steps.run.run_id
        self._workflow_slug = steps.workflow_slug
        self._flow_run = steps.flow_run
        self._graph = steps.graph
        self._events = RunEvents(
            self._run_id, self._workflow_slug, self._flow_run, steps.find_task_run_id, self._settings.events
        )
        self._done = 0
        self._observer, steps.observe = steps.observe, self.observe

    def observe(self, step_slug: str, state_name: str) -> None:
        """Hear of a state that a step enters."""
        if state_name in {"Completed", "Cached"}:
            self._done += 1
        self._events.tell_of_step(step_slug, state_name)
        self._observer(step_slug, state_name)

    @asynccontextmanager
    async def show(self) -> AsyncIterator[None]:
        """Show a run that is executed in the block, and how it has ended."""
        self._events.tell_of_run("Running")
        async with get_client() as client:
            artifacts = RunArtifacts(client, self._flow_run.id, self._run_id, self._workflow_slug)
            beside = [asyncio.create_task(self._try("its name", self._rename(client)))]
            progress = anyio.CancelScope()
            if self._settings.artifacts:
                beside.append(asyncio.create_task(self._try("its link", self._link(artifacts))))
                beside.append(asyncio.create_task(self._try("progress", self._show_progress(artifacts, progress))))
            try:
                yield
                progress.cancel()
                with anyio.move_on_after(PATIENCE):
                    await asyncio.wait(beside)
                    await self._try("its end", self._show_end(artifacts))
            finally:
                for task in beside:
                    task.cancel()

    async def _rename(self, client: PrefectClient) -> None:
        """Call a flow run that Prefect started as those are called that we start, unless somebody has named it."""
        name = name_flow_run(self._workflow_slug, self._run_id)
        if _PREFECTS_OWN_NAME.fullmatch(self._flow_run.name):
            await client.update_flow_run(self._flow_run.id, name=name)

    async def _link(self, artifacts: RunArtifacts) -> None:
        slug = quote(self._workflow_slug, safe="")
        await artifacts.link(self._settings.run_url.format(run_id=self._run_id, workflow=slug))

    async def _show_progress(self, artifacts: RunArtifacts, scope: anyio.CancelScope) -> None:
        shown = -1
        with scope:
            await anyio.sleep(LONG)
            while True:
                if self._done != shown:
                    shown = self._done
                    await artifacts.show_progress(self._percent)
                await anyio.sleep(_INTERVAL)

    @property
    def _percent(self) -> float:
        return round(100 * self._done / len(self._graph), 1)

    async def _show_end(self, artifacts: RunArtifacts) -> None:
        run = await self._store.read_run(self._run_id)
        if run.status is Status.PENDING or run.epoch != self._run.epoch:
            return  # somebody else goes on with it, or has done so
        self._events.tell_of_run(_describe(run))
        if self._settings.artifacts:
            await artifacts.finish_progress(self._percent)
            slugs = sort_steps(self._graph)
            states = await self._store.list_step_ends(self._run_id, slugs[:ROWS])
            await artifacts.tabulate(slugs, {each.step_slug: each for each in states})

    async def _try(self, what: str, show: Awaitable[None]) -> None:
        try:
            await show
        except Exception as error:  # noqa: BLE001  whatever it is, it is only shown
            _logger.warning("run %s: %s is not shown: %s", self._run_id, what, describe_error(error))


def _describe(run: Run) -> str:
    return "Cancelled" if run.is_cancelled else run.status.value.capitalize()
