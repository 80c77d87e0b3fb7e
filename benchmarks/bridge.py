"""One bridge beside Prefect's client alone: how fast flow runs are created."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from uuid import UUID, uuid4

import anyio
from prefect.client.orchestration import PrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from benchmarks.commands import WORKFLOW, Site, open_site
from benchmarks.measure import Report, Row, Target, interleave, ratio
from pgflow_prefect.services.bridge import IN_FLIGHT

RUNS = 400
REPETITIONS = 4

# Of the latest runs, which were all begun in one transaction: from the first one that was taken to the last link.
DURATION = """
    SELECT extract(epoch FROM max(f.taken_at) - min(o.taken_at))::float
    FROM pgflow_prefect.owners o JOIN pgflow_prefect.flow_runs f USING (run_id) WHERE o.run_id <> ALL (%s)
"""
LINKED = "SELECT count(*) FROM pgflow_prefect.flow_runs"
RUN_IDS = "SELECT coalesce(array_agg(id), '{}') FROM pgflow.runs"


def measure_bridge(server: str) -> Iterator[Report]:
    """Measure both in turn, on the same deployment of the same server."""
    with ExitStack() as stack:
        site = stack.enter_context(open_site(server))
        stack.enter_context(temporary_settings({PREFECT_API_URL: site.api_url}))
        site.call("deploy", WORKFLOW)
        sides = {"bridge": partial(bridge_rate, site), "client": partial(anyio.run, client_rate)}
        measured = interleave(sides, "flow runs/s", REPETITIONS)
    rates = ratio(measured["bridge"], measured["client"])
    yield Report(
        f"Bridge: flow runs created for {RUNS} waiting runs, {IN_FLIGHT} at a time",
        [
            Row("bridge", measured["bridge"]),
            Row("Prefect's client alone", measured["client"]),
            Row("ratio", rates, Target(at_least=0.8)),
        ],
    )


def bridge_rate(site: Site) -> float:
    """Return how many flow runs a bridge creates and links in a second, its start left out."""
    earlier = site.ask(RUN_IDS)
    site.begin_runs(RUNS)
    with site.service("bridge"):
        site.wait_until(lambda: site.ask(LINKED) == len(earlier) + RUNS)
    return RUNS / float(site.ask(DURATION, earlier))


async def client_rate() -> float:
    """Return how many flow runs as many tasks create in a second that do nothing else."""
    waiting = [str(uuid4()) for _ in range(RUNS)]
    async with get_client() as client:
        deployment = await client.read_deployment_by_name(f"{WORKFLOW}/pgflow")
        begun = anyio.current_time()
        async with anyio.create_task_group() as creating:
            for _ in range(IN_FLIGHT):
                creating.start_soon(create_flow_runs, client, deployment.id, waiting)
        return RUNS / (anyio.current_time() - begun)


async def create_flow_runs(client: PrefectClient, deployment_id: UUID, waiting: list[str]) -> None:
    """Create flow runs until none is left to be created."""
    while waiting:
        run_id = waiting.pop()
        await client.create_flow_run_from_deployment(
            deployment_id, parameters={"run_id": run_id}, idempotency_key=f"pgflow/{run_id}/1"
        )
