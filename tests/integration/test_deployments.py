"""Prefect's own ways to deploy a flow, taken from a user's file, and a process worker that runs them."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter

import pgflow_prefect
from tests.conftest import Connection
from tests.integration.conftest import Define

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

HANDLERS = """
from pgflow_prefect import Workflow

campaign = Workflow("{slug}")

@campaign.step
def first(payload: dict[str, int]) -> int:
    return payload["n"]

@campaign.step
async def second(first: int) -> int:
    return first + 1

flow = campaign.flow
"""

# Without a source to pull, a process worker starts a flow in an empty directory: it has to be told of this one.
APPLY = """
from pathlib import Path
from flows.campaign import flow
here = {{"working_dir": str(Path.cwd())}}
flow.to_deployment(name="applied", work_pool_name="{pool}", job_variables=here).apply()
"""

SERVE = """
from flows.campaign import flow
if __name__ == "__main__":
    flow.serve(name="served", print_starting_message=False)
"""


@pytest.fixture
def slug(define: Define) -> str:
    name = f"campaign-{uuid4().hex[:8]}"
    define(name, ["first", "second"], [("first", "second")])
    return name


@pytest.fixture
def project(slug: str, tmp_path: Path) -> Path:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "campaign.py").write_text(HANDLERS.format(slug=slug))
    return tmp_path


@pytest.fixture
async def pool(client: PrefectClient) -> AsyncIterator[str]:
    name = f"pool-{uuid4().hex[:8]}"
    await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    yield name
    await client.delete_work_pool(name)


@contextmanager
def started(project: Path, environment: dict[str, str], *command: str) -> Iterator[None]:
    """Run a command that does not end by itself; end it with all that it has started."""
    with (project / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=project,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait()


async def await_completion(client: PrefectClient, flow_run_id: UUID, project: Path) -> None:
    with anyio.move_on_after(90) as scope:
        while not ((state := (await client.read_flow_run(flow_run_id)).state) and state.is_final()):
            await anyio.sleep(0.2)
    assert not scope.cancelled_caught, (project / "output").read_text()
    assert state is not None
    assert state.is_completed(), (state, (project / "output").read_text())


@pytest.fixture
def environment(dsn: str, prefect_api: str) -> dict[str, str]:
    ours = {"PGFLOW_DSN": dsn, "PREFECT_API_URL": prefect_api, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    return {**os.environ, **ours}


def run(project: Path, environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_deployed_flows_complete_on_a_process_worker(
    db: Connection, client: PrefectClient, slug: str, project: Path, pool: str, environment: dict[str, str]
) -> None:
    run(project, environment, "-c", APPLY.format(pool=pool))
    run(
        project,
        environment,
        *("-m", "prefect", "--no-prompt", "deploy", "flows/campaign.py:flow", "--name", "by-cli", "--pool", pool),
    )
    deployments = [await client.read_deployment_by_name(f"{slug}/{name}") for name in ("applied", "by-cli")]
    package = str(Path(pgflow_prefect.__file__).parent)
    for deployment in deployments:
        assert deployment.entrypoint in {"flows/campaign.py:campaign.flow", "flows/campaign.py:flow"}
        assert package not in deployment.model_dump_json()

    with started(project, environment, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"):
        for number, deployment in enumerate(deployments):
            created = await client.create_flow_run_from_deployment(deployment.id, parameters={"payload": {"n": number}})
            await await_completion(client, created.id, project)

    results = db.execute("SELECT step_result FROM pgflow.step_states WHERE step_slug = 'second' ORDER BY 1").fetchall()
    assert results == [(1,), (2,)]


async def test_a_served_flow_completes(
    db: Connection, client: PrefectClient, slug: str, project: Path, environment: dict[str, str]
) -> None:
    (project / "serve.py").write_text(SERVE)
    with started(project, environment, "serve.py"):
        this_flow = FlowFilter(name={"any_": [slug]})
        with anyio.fail_after(180):
            while not (deployments := await client.read_deployments(flow_filter=this_flow)):
                await anyio.sleep(0.2)
        assert deployments[0].entrypoint == "flows/campaign.py:campaign.flow"
        created = await client.create_flow_run_from_deployment(deployments[0].id, parameters={"payload": {"n": 1}})
        await await_completion(client, created.id, project)
    assert db.execute("SELECT workflow_slug, status FROM pgflow.runs").fetchall() == [(slug, "completed")]
