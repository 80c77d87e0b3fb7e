"""What the tests of flows share: workflows in the database, and what Prefect's API says of a flow run."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Any
from uuid import uuid4

import anyio
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, TaskRun

from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.statements import LeaseTerms
from pgflow_prefect.database.store import Store
from tests.conftest import Connection
from tests.integration import live
from tests.statement_counter import StatementCounter, count_statements

Define = Callable[..., None]


def insert_workflow(
    connection: Connection, slug: str, steps: Iterable[str], deps: Iterable[tuple[str, str]] = ()
) -> None:
    """Define a workflow; deps are pairs of an upstream step and its downstream step."""
    connection.execute("INSERT INTO pgflow.workflows (slug) VALUES (%s)", (slug,))
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO pgflow.steps VALUES (%s, %s)", [(slug, step) for step in steps])
        cursor.executemany("INSERT INTO pgflow.deps VALUES (%s, %s, %s)", [(slug, *dep) for dep in deps])


TENURE = LeaseTerms("the tests", lease=60, max_recoveries=3)


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    async with open_pool(dsn, size=2, timeout=10) as pool:
        yield Store(pool, TENURE)


@pytest.fixture
def define(db: Connection) -> Define:
    """`insert_workflow`, on this test's connection."""
    return partial(insert_workflow, db)


@pytest.fixture(params=[live.Engine.OURS, live.Engine.PREFECT])  # the quick suite takes the first one
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> live.Engine:
    """The engine that executes flow runs in this test: each of them once."""
    chosen = live.Engine(request.param)
    monkeypatch.setattr(live, "chosen", chosen)
    return chosen


@pytest.fixture
def pgflow_dsn(dsn: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """This test's database, as a flow in this process finds it."""
    monkeypatch.setenv("PGFLOW_DSN", dsn)
    return dsn


@pytest.fixture
def counter(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatementCounter]:
    """Counts the statements on this test's database of all flows in this process."""
    monkeypatch.setenv("PGFLOW_LEASE", "600")  # or a slow machine extends it meanwhile
    with count_statements(dsn) as counter:
        monkeypatch.setenv("PGFLOW_DSN", counter.dsn)
        yield counter


@pytest.fixture
async def client(prefect_api: str) -> AsyncIterator[PrefectClient]:
    async with get_client() as opened:
        yield opened


async def read_flow_run(client: PrefectClient, flow_name: str) -> FlowRun:
    """Return the only flow run of a flow."""
    (flow_run,) = await client.read_flow_runs(flow_filter=FlowFilter(name={"any_": [flow_name]}))
    return flow_run


async def await_task_runs(client: PrefectClient, flow_run: FlowRun, states: dict[str, str]) -> dict[str, TaskRun]:
    """Wait until Prefect shows exactly these task runs in these states: its view comes a little later."""
    shown: dict[str, TaskRun] = {}
    with anyio.fail_after(180):
        while {name: run.state_name for name, run in shown.items()} != states:
            await anyio.sleep(0.1)
            found = await client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}))
            assert len(found) <= len(states), [run.name for run in found]
            shown = {run.name: run for run in found}
    return shown


async def read_edges(client: PrefectClient, flow_run: FlowRun) -> set[tuple[str, str]]:
    """Return the edges of a flow run's graph, as Prefect's UI draws it, between the names of task runs."""
    response = await client.request("GET", "/flow_runs/{id}/graph-v2", path_params={"id": flow_run.id})
    nodes: dict[str, Any] = dict(response.json()["nodes"])
    pairs = [(parent["id"], node["id"]) for node in nodes.values() for parent in node["parents"]]
    assert len(pairs) == len(set(pairs)), "an edge is shown twice"
    return {(nodes[parent]["label"], nodes[child]["label"]) for parent, child in pairs}


def make_slug() -> str:
    """Return a slug of this test's own: one Prefect server serves all tests."""
    return f"workflow-{uuid4().hex[:8]}"


def read_steps(db: Connection) -> dict[str, tuple[Any, ...]]:
    """Return status, attempts, result and error message of every step that has started, by slug."""
    rows: Any = db.execute("SELECT step_slug, status, attempts, step_result, error_message FROM pgflow.step_states")
    return {row[0]: row[1:] for row in rows}


def read_run(db: Connection) -> tuple[Any, ...]:
    """Return status, error message and id of the only run."""
    (row,) = db.execute("SELECT status, error_message, id FROM pgflow.runs").fetchall()
    return row
