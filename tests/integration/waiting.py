"""Flow runs that go on in the background of a test, and what is waited for meanwhile."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID, uuid4

import anyio
import pytest
from prefect.client.schemas.objects import State

from pgflow_prefect import Workflow
from pgflow_prefect.execution.process import host as hosts
from pgflow_prefect.execution.process.host import ActiveRun
from pgflow_prefect.execution.workflow_flow import AsyncFlow
from tests.conftest import Connection
from tests.engine import run_workflow, value

TIMEOUT = 180

WAITING: LiteralString = "SELECT count(*) FROM pgflow_prefect.task_runs WHERE state_name = 'Waiting'"
STARTED_HERE: LiteralString = "SELECT count(*) FROM pgflow_prefect.owners"


@dataclass
class Going:
    """A flow run that goes on.

    Attributes:
        run_id: its run.
        state: what it has ended with.
    """

    run_id: UUID
    state: State[Any] | None = None

    @property
    def ended(self) -> State[Any]:
        assert self.state is not None
        return self.state


@asynccontextmanager
async def going(workflow: Workflow, db: Connection, payload: object = None) -> AsyncIterator[Going]:
    """Start a run by SQL and execute it; the block's end waits for its end."""
    run_id = run_workflow(db, workflow.slug, payload, uuid4()).id
    async with going_on(workflow, run_id) as run:
        yield run


@asynccontextmanager
async def going_on(workflow: Workflow, run_id: UUID, flow: AsyncFlow | None = None) -> AsyncIterator[Going]:
    """Execute a run that exists, perhaps by a flow with other options; the block's end waits for its end."""
    run = Going(run_id)

    async def execute() -> None:
        run.state = await (flow or workflow.flow)(run_id=run_id, return_state=True)

    with anyio.fail_after(TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(execute)
            yield run


async def await_value(db: Connection, expected: object, statement: LiteralString, *parameters: object) -> None:
    """Return once a statement returns this."""
    found = None
    with anyio.move_on_after(TIMEOUT):
        while (found := value(db, statement, *parameters)) != expected:
            await anyio.sleep(0.02)
        return
    raise AssertionError(f"{statement} returns {found!r}, not {expected!r}")


def read_times(db: Connection, run_id: UUID, step: str) -> tuple[datetime, datetime]:
    """Return when the work on a step began and ended, as PostgreSQL has it."""
    [[began, ended]] = db.execute(
        "SELECT coalesce(started_at, created_at), finished_at FROM pgflow.step_states "
        "WHERE run_id = %s AND step_slug = %s",
        [run_id, step],
    ).fetchall()
    assert isinstance(began, datetime)
    assert isinstance(ended, datetime)
    return began, ended


def note_active_runs(monkeypatch: pytest.MonkeyPatch) -> list[ActiveRun]:
    """Return where the runs that begin from now on are noted, to be drained."""
    begun: list[ActiveRun] = []

    class Noted(ActiveRun):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            begun.append(self)

    monkeypatch.setattr(hosts, "ActiveRun", Noted)
    return begun
