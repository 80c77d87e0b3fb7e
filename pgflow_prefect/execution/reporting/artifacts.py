"""Makes a run's artifacts in Prefect's UI: a table of its steps, its progress, and a link to the run."""

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.objects import FlowRun

from pgflow_prefect.database.item_statements import FailedItem
from pgflow_prefect.models import MapState, StepState
from pgflow_prefect.state_names import StateName

ROWS = 1_000
"""The most rows of a table, because Prefect's UI loads the whole table."""

_ERROR_LENGTH = 200  # characters


class RunArtifacts:
    """Makes the artifacts of one run's flow run, one after the other.

    Their keys begin with the workflow's slug. So Prefect's page of artifacts has one artifact of each kind for a
    workflow, with all its runs as versions.
    """

    def __init__(self, flow_run: FlowRun, run_id: UUID, workflow_slug: str) -> None:
        self._flow_run = flow_run  # whose id is a placeholder, as long as Prefect has none
        self._run_id = run_id
        self._key = make_key(workflow_slug)
        self._progress: UUID | None = None
        self._maps: dict[str, UUID] = {}  # the progress of each large map
        self._changing = asyncio.Lock()

    async def link(self, client: PrefectClient, url: str | None) -> None:
        """Name the run, with a link to its page if it has one, and with the command that shows it."""
        run = f"run `{self._run_id}`" if url is None else f"[run {self._run_id}]({url})"
        command = f"`pgflow-prefect status {self._run_id}`"
        await self._create(client, "run", "markdown", f"{run}\n\n{command}", "The run in pgflow.runs.")

    async def show_progress(self, client: PrefectClient, percent: float) -> None:
        """Show how much of the run is done."""
        async with self._changing:
            if self._progress is None:
                self._progress = await self._create(client, "progress", "progress", percent, "Steps that are done.")
            else:
                await client.update_artifact(self._progress, ArtifactUpdate(data=percent))

    async def show_map(self, client: PrefectClient, slug: str, state: MapState) -> None:
        """Show how many items of a map have ended."""
        total, remaining, failed = state.total or 0, state.remaining or 0, state.failed or 0
        percent = round(100 * (total - remaining) / total, 1) if total else 100.0
        said = (
            f"Items of {slug} in run {self._run_id}: {total - remaining:,} of {total:,} have ended, {failed:,} failed."
        )
        async with self._changing:
            if slug not in self._maps:
                self._maps[slug] = await self._create(client, make_map_kind(slug), "progress", percent, said)
            else:
                await client.update_artifact(self._maps[slug], ArtifactUpdate(data=percent, description=said))

    async def tabulate_failed(self, client: PrefectClient, slug: str, items: Sequence[FailedItem], failed: int) -> None:
        """Show a table of the first failed items of a map."""
        rows = [
            {"item": each.index, "attempts": each.attempts, "error": _shorten(each.error_message)} for each in items
        ]
        more = f" The first {len(rows)} of {failed:,}." if failed > len(rows) else ""
        said = f"The failed items of {slug} in run {self._run_id}.{more}"
        await self._create(client, f"{make_map_kind(slug)}-failed", "table", json.dumps(rows), said)

    async def tabulate(self, client: PrefectClient, order: Sequence[str], states: Mapping[str, StepState]) -> None:
        """Show a table of the run's steps, in this order; for a very large run, its first steps only."""
        rows = [make_row(slug, states.get(slug)) for slug in order[:ROWS]]
        more = f" The first {ROWS} of {len(order)}." if len(order) > ROWS else ""
        await self._create(client, "steps", "table", json.dumps(rows), f"The steps of run {self._run_id}.{more}")

    async def _create(
        self,
        client: PrefectClient,
        kind: str,
        type_: str,
        data: Any,  # noqa: ANN401  Prefect's own
        description: str,
    ) -> UUID:
        created = await client.create_artifact(
            ArtifactCreate(
                key=f"{self._key}-{kind}",
                type=type_,
                data=data,
                description=description,
                flow_run_id=self._flow_run.id,
            )
        )
        return created.id


def make_key(workflow_slug: str) -> str:
    """Return the key of a workflow's artifacts: lower-case letters, digits and dashes."""
    key = re.sub(r"[^a-z0-9]+", "-", workflow_slug.lower()).strip("-")
    if key != workflow_slug.replace("_", "-"):  # another slug may become the same
        key = f"{key}-{hashlib.sha256(workflow_slug.encode()).hexdigest()[:8]}".strip("-")
    return f"pgflow-{key}"


def make_map_kind(slug: str) -> str:
    """Return the end of the key of a map's artifacts; two slugs never have the same."""
    return f"items-{make_key(slug).removeprefix('pgflow-')}"


def make_row(slug: str, state: StepState | None) -> dict[str, str | int]:
    """Return a step's row: texts and numbers only, as Prefect's UI shows them."""
    if state is None:
        return {"step": slug, "state": "not started", "attempts": 0, "duration": "", "done by": "", "error": ""}
    return {
        "step": slug,
        "state": _name_state(state),
        "attempts": state.attempts,
        "duration": _describe_duration(state),
        "done by": state.handler or "",
        "error": _shorten(state.error_message or state.skip_message or state.skip_reason or ""),
    }


def _name_state(state: StepState) -> str:
    if state.is_skipped:
        return StateName.SKIPPED
    return StateName.NOT_RUN if state.is_not_run else state.task_state or str(state.status)


def _shorten(error: str) -> str:
    line = error.partition("\n")[0]
    return line if len(line) <= _ERROR_LENGTH else f"{line[: _ERROR_LENGTH - 1]}…"


def _describe_duration(state: StepState) -> str:
    if state.started_at is None:
        return ""
    return f"{((state.finished_at or datetime.now(UTC)) - state.started_at).total_seconds():.2f} s"
