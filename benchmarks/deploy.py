"""Deploying many workflows beside the calls of Prefect's client that it can't do without."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from uuid import uuid4

import anyio
from prefect.client.orchestration import get_client
from prefect.utilities.callables import parameter_schema

from benchmarks.commands import GRAPH, HANDLERS, Site, open_site
from benchmarks.engine import define
from benchmarks.measure import Report, Row, Target, interleave, ratio, seconds
from pgflow_prefect import Workflow

WORKFLOWS = 200
REPETITIONS = 3


def measure_deploy(server: str) -> Iterator[Report]:
    """Measure both in turn on the same server: every time other workflows, which Prefect has not heard of."""
    with ExitStack() as stack:
        site = stack.enter_context(open_site(server))
        deployed: list[str] = []
        sides = {
            "deploy": partial(deploy_seconds, site, deployed),
            "client": partial(client_seconds, site),
            "again": partial(again_seconds, site, deployed),
            "start": partial(start_seconds, site),
        }
        measured = interleave(sides, "s", REPETITIONS)
    yield Report(
        f"Deploy: {WORKFLOWS} workflows of {len(GRAPH)} steps, each with a file of handlers",
        [
            Row("pgflow-prefect deploy, the whole command", measured["deploy"]),
            Row("a script with Prefect's client alone", measured["client"]),
            Row("ratio", ratio(measured["deploy"], measured["client"]), Target(at_most=1.2)),
            Row("deploy again, nothing to change", measured["again"]),
            Row("of that: starting, `deploy` of one workflow", measured["start"]),
        ],
    )


def deploy_seconds(site: Site, deployed: list[str]) -> float:
    """Return how long it takes to deploy workflows that are new to Prefect."""
    slugs = add_workflows(site)
    deployed[:] = slugs
    return seconds(lambda: site.call("deploy", *slugs))


def again_seconds(site: Site, deployed: list[str]) -> float:
    """Return how long it takes to deploy workflows to which nothing has happened since."""
    if not deployed:
        deploy_seconds(site, deployed)
    return seconds(lambda: site.call("deploy", *deployed))


def start_seconds(site: Site) -> float:
    """Return how long it takes to deploy the one workflow that the site begins with."""
    return seconds(lambda: site.call("deploy", "chain"))


def client_seconds(site: Site) -> float:
    """Return how long a script takes that creates as many flows and deployments, and does nothing else."""
    environment = {**os.environ, "PREFECT_API_URL": site.api_url, "PREFECT_HOME": str(site.directory / "prefect")}
    command = [sys.executable, "-m", "benchmarks.deploy", str(site.directory), str(WORKFLOWS)]
    return seconds(lambda: subprocess.run(command, env=environment, check=True))


async def create_deployments(directory: str, count: int) -> None:
    """Create a flow and a deployment each, as `deploy` does: with a schema, an entrypoint and a directory."""
    prefix = f"client_{uuid4().hex[:8]}"
    async with get_client() as client:
        for number in range(count):
            slug = f"{prefix}_{number}"
            flow_id = await client.create_flow_from_name(slug)
            await client.create_deployment(
                flow_id,
                "pgflow",
                version="0123456789abcdef",
                tags=["pgflow"],
                entrypoint=f"flows/{slug}.py:workflow.flow",
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": directory}}],
                parameter_openapi_schema=parameter_schema(Workflow(slug).flow).model_dump(exclude_unset=True),
                enforce_parameter_schema=True,
            )


def add_workflows(site: Site) -> list[str]:
    """Define workflows in the database, and write a file of handlers for each."""
    prefix = f"made_{uuid4().hex[:8]}"
    slugs = [f"{prefix}_{number}" for number in range(WORKFLOWS)]
    for slug in slugs:
        define(site.db, slug, GRAPH)
        (site.directory / "flows" / f"{slug}.py").write_text(HANDLERS.format(slug=slug, steps=[*GRAPH]))
    return slugs


if __name__ == "__main__":
    anyio.run(create_deployments, sys.argv[1], int(sys.argv[2]))
