"""Shows a run in Prefect beside its flow run and task runs: its name, events and artifacts."""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any
from urllib.parse import quote
from uuid import UUID

import anyio
from prefect.client.schemas.objects import FlowRun

from pgflow_prefect.database.item_statements import FailedItem
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.graph import Graph, sort_steps
from pgflow_prefect.execution.reporting.artifacts import ROWS, RunArtifacts
from pgflow_prefect.execution.reporting.events import RunEvents
from pgflow_prefect.models import MapState, RunEnd, Status
from pgflow_prefect.prefect_api.event_sender import Request, Sender
from pgflow_prefect.prefect_api.flow_run_names import is_made_up, name_flow_run
from pgflow_prefect.prefect_api.ids import TaskRunIds
from pgflow_prefect.prefect_api.internals import flow_run_logger
from pgflow_prefect.prefect_api.ownership import make_ownership_tag
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.prefect_api.states import DECIDED
from pgflow_prefect.settings import Artifacts, Settings
from pgflow_prefect.state_names import DONE, Observer, StateName

PATIENCE = 5.0
"""Seconds for which the host of an ended run waits for the rows to be shown."""

LONG = 10.0
"""Seconds after which a run counts as long: it shows its progress, and is notable however it ends."""

FAILED_ITEMS = 100
"""The most rows of a table of failed items."""

_NAMED = 20  # steps that a line of the log names
_INTERVAL = 5.0  # seconds between two pictures of the progress

_logger = logging.getLogger(__name__)


class Display:
    """Shows one run; an error here is logged, and never harms the run."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        installation: UUID,
        run_id: UUID,
        epoch: int,
        workflow_slug: str,
        flow_run: FlowRun,
        graph: Graph,
        task_run_ids: TaskRunIds,
        event_sender: Sender,
        observer: Observer,
        is_named: bool = False,
    ) -> None:
        """Prepare to show a run.

        Args:
            settings: say what to show.
            store: the database.
            installation: the database's id.
            run_id: the run.
            epoch: in which it was taken.
            workflow_slug: its workflow.
            flow_run: the flow run that executes it.
            graph: its steps.
            task_run_ids: their task runs.
            event_sender: sends requests and events to Prefect.
            observer: called with every state that a step enters, too.
            is_named: the user's flow says how its flow runs are called.
        """
        self._settings = settings
        self._store = store
        self._epoch = epoch
        self._run_id = run_id
        self._workflow_slug = workflow_slug
        self._flow_run = flow_run
        self._tag = make_ownership_tag(installation)
        self._graph = graph
        self._event_sender = event_sender
        self._observer = observer
        self._is_named = is_named
        self._events = RunEvents(
            self._run_id, workflow_slug, flow_run, task_run_ids.find, self._settings.events, event_sender
        )
        self._artifacts = RunArtifacts(flow_run, self._run_id, workflow_slug)
        self._done = 0
        self._decided: dict[str, list[str]] = {}  # the steps that are skipped or not run, by the name of that state
        self._began_at = monotonic()
        self._is_linked = False
        self._is_progress_shown = False
        self._maps: dict[str, MapState] = {}  # the latest of each map

    def observe(self, step_slug: str, state_name: str) -> None:
        """Show a state that a step enters, and tell the observer."""
        if state_name in DONE:
            self._done += 1
        if state_name in DECIDED:
            self._decided.setdefault(state_name, []).append(step_slug)
        self._events.tell_of_step(step_slug, state_name)
        self._observer(step_slug, state_name)

    def notice_map(self, step_slug: str, state: MapState) -> None:
        """Note how many items of a map have ended, for its progress."""
        if state.total:
            self._maps[step_slug] = state

    @contextmanager
    def show(self) -> Iterator[None]:
        """Show the run that the block executes; the run waits for no answer of Prefect."""
        self._events.tell_of_run(StateName.RUNNING)
        self._label()
        if self._settings.artifacts is Artifacts.ALL:
            self._link()
        progress = [asyncio.create_task(self._show_progress()), asyncio.create_task(self._show_maps())]
        try:
            yield
        finally:
            for each in progress:
                each.cancel()
            if self._decided:
                flow_run_logger(self._flow_run).info("%s", _describe_decided(self._decided))
            # The flow run is about to enter its last state, and its caller waits for that. Only if all steps are
            # done: if the flow run is cancelled, Prefect cancels each task whose end it has not heard of.
            if self._done == len(self._graph):
                self._event_sender.give_way()

    def _link(self) -> None:
        """Link to the run, once."""
        if not self._is_linked and self._event_sender.is_shown:
            self._is_linked = True
            url = self._find_url()
            self._request("its link", lambda client: self._artifacts.link(client, url))

    def _find_url(self) -> str | None:
        if self._settings.run_url is None:
            return None
        return self._settings.run_url.format(run_id=self._run_id, workflow=quote(self._workflow_slug, safe=""))

    async def show_end(self, run: RunEnd, *, is_tried_again: bool = False) -> None:
        """Show how the run has ended in PostgreSQL.

        Args:
            run: its end.
            is_tried_again: Prefect tries the flow run again, so that this failure is not the end of the run.
        """
        if not self._event_sender.is_shown or run.status is Status.PENDING or run.epoch != self._epoch:
            return  # another process goes on with it, or has done so
        try:
            if run.status is not Status.FAILED or run.is_cancelled:
                self._events.tell_of_run(_describe(run))
            elif not is_tried_again:
                self._events.tell_of_run(_describe(run), message=run.error_message)
            await self._show_end_of_maps()
            if self._is_worth_artifacts(run):
                self._link()
                if self._is_progress_shown:
                    self._request_progress()
                with anyio.move_on_after(PATIENCE):
                    await self._show_table()
        except Exception as error:  # noqa: BLE001  whatever it is, it is only shown
            _logger.warning("run %s: its end is not shown: %s", self._run_id, describe_error(error))

    def _is_worth_artifacts(self, run: RunEnd) -> bool:
        if self._settings.artifacts is not Artifacts.NOTABLE:
            return self._settings.artifacts is Artifacts.ALL
        return run.status is not Status.COMPLETED or monotonic() >= self._began_at + LONG

    def _label(self) -> None:
        """Name and tag a flow run of Prefect like those that we create; keep a name that a user gave it."""
        changes: dict[str, Any] = {}
        what = "its tag"
        if self._tag not in self._flow_run.tags:
            changes["tags"] = [*self._flow_run.tags, self._tag]
        if is_made_up(self._flow_run.name) and not self._is_named:
            what = "its name"
            changes["name"] = name_flow_run(self._workflow_slug, self._run_id)
        if changes:
            self._request(what, lambda client: client.update_flow_run(self._flow_run.id, **changes))

    async def _show_progress(self) -> None:
        if self._settings.artifacts is Artifacts.NONE:
            return
        shown = -1
        await anyio.sleep(LONG)
        while True:
            self._link()
            if self._done != shown and self._event_sender.is_shown:
                shown = self._done
                self._is_progress_shown = True
                self._request_progress()
            await anyio.sleep(_INTERVAL)

    async def _show_maps(self) -> None:
        """Show the progress of maps whose items have no task runs."""
        shown: dict[str, MapState] = {}
        while self._settings.artifacts is not Artifacts.NONE:
            await anyio.sleep(_INTERVAL)
            for slug, state in self._large_maps.items():
                if shown.get(slug) is not state and self._event_sender.is_shown:
                    shown[slug] = state
                    self._request_map(slug, state)

    @property
    def _large_maps(self) -> dict[str, MapState]:
        most = self._settings.item_task_runs
        return {slug: state for slug, state in self._maps.items() if (state.total or 0) > most}

    def _request_map(self, slug: str, state: MapState) -> None:
        self._request(f"the items of {slug!r}", lambda client: self._artifacts.show_map(client, slug, state))

    async def _show_end_of_maps(self) -> None:
        if self._settings.artifacts is Artifacts.NONE:
            return
        for slug, state in self._large_maps.items():
            self._request_map(slug, state)
            if state.failed:
                with anyio.move_on_after(PATIENCE):
                    self._request_failed(slug, state.failed, await self._find_failed(slug))

    async def _find_failed(self, slug: str) -> list[FailedItem]:
        return await self._store.list_failed_items(self._run_id, slug, FAILED_ITEMS)

    def _request_failed(self, slug: str, failed: int, items: list[FailedItem]) -> None:
        self._request(
            f"the failed items of {slug!r}",
            lambda client: self._artifacts.tabulate_failed(client, slug, items, failed),
        )

    def _request_progress(self) -> None:
        percent = round(100 * self._done / len(self._graph), 1)
        self._request("its progress", lambda client: self._artifacts.show_progress(client, percent))

    async def _show_table(self) -> None:
        slugs = sort_steps(self._graph)
        states = {each.step_slug: each for each in await self._store.list_step_ends(self._run_id, slugs[:ROWS])}
        self._request("its table", lambda client: self._artifacts.tabulate(client, slugs, states))

    def _request(self, what: str, act: Request) -> None:
        self._event_sender.request(act, f"run {self._run_id}: {what}")


def _describe_decided(decided: Mapping[str, Sequence[str]]) -> str:
    """Name the steps that were not executed, in a sentence for each state; of many, the first ones."""
    words = {StateName.SKIPPED: "Skipped", StateName.NOT_RUN: "Not run"}
    return " ".join(f"{words[name]}: {_list(decided[name])}." for name in words if name in decided)


def _list(slugs: Sequence[str]) -> str:
    more = f" and {len(slugs) - _NAMED:,} more" if len(slugs) > _NAMED else ""
    return f"{', '.join(slugs[:_NAMED])}{more}"


def _describe(run: RunEnd) -> str:
    return (run.ended_as or run.status).capitalize()
