"""Runs of thousands of steps: the memory and the time of a step, and what Prefect's UI has to ask for."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import httpx

from benchmarks.commands import Site, open_site
from benchmarks.measure import Report, Row, Sample, Side, Target, interleave, ratio, seconds
from benchmarks.processes import Measurement, find_postmaster, side_process, wait_until_quiet
from benchmarks.workflows import WARM_UP

SIZES = {1_000: "20 layers of 50", 2_000: "40 layers of 50", 5_000: "100 layers of 50"}
REPETITIONS = 3
QUESTIONS = 5
LONGEST = 5.0  # seconds: what people will wait for a picture of thousands of steps

FLOW_RUN = """
    SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f JOIN pgflow.runs r ON r.id = f.run_id
    WHERE r.workflow_slug LIKE %s ORDER BY f.taken_at DESC LIMIT 1
"""
PATIENCE = 300.0  # seconds


def measure_scale(server: str) -> Iterator[Report]:
    """Measure each size in processes of their own: only the first run of a process shows what memory it takes."""
    taken: dict[int, list[Measurement]] = {size: [] for size in SIZES}
    with open_site(server) as site:
        for repetition in range(REPETITIONS):
            for size in [*SIZES][:: -1 if repetition % 2 else 1]:
                taken[size].append(execute(site, server, size))
        asked = interleave(ask(site), "s", QUESTIONS)
    memory = {n: Sample(tuple(each.memory * 1024 / n for each in taken[n]), "KiB/step") for n in SIZES}
    cost = {n: Sample(tuple(each.seconds * 1000 / n for each in taken[n]), "ms/step") for n in SIZES}
    small, *_, large = SIZES
    yield Report(
        "Scale: one run in layers of 50",
        [
            *(Row(f"{size:,} steps: memory", sample) for size, sample in memory.items()),
            Row(f"memory a step: {large:,} / {small:,}", ratio(memory[large], memory[small]), Target(at_most=1.2)),
            *(Row(f"{size:,} steps: time", sample) for size, sample in cost.items()),
            Row(f"time a step: {large:,} / {small:,}", ratio(cost[large], cost[small]), Target(at_most=1.2)),
        ],
    )
    yield Report(
        f"Scale: what Prefect's UI asks for, of a run of {large:,} steps",
        [Row(question, sample, Target(at_most=LONGEST)) for question, sample in asked.items()],
    )


def execute(site: Site, server: str, size: int) -> Measurement:
    """Run a graph once in a new process that has run a small one."""
    postmaster = find_postmaster(site)
    with side_process(site, "ours", site.dsn, server) as side:
        side.measure(WARM_UP, "nothing")
        wait_until_quiet(postmaster)
        measured = side.measure(SIZES[size], "nothing")
        wait_until_quiet(postmaster)
    return measured


def ask(site: Site) -> dict[str, Side]:
    """Return the questions, each of which tells how many seconds its answer took; once all of a run is shown."""
    size, shape = max(SIZES.items())
    flow_run = site.ask(FLOW_RUN, shape.replace(" ", "\\_") + "%")
    mine = {"flow_runs": {"id": {"any_": [str(flow_run)]}}}
    client = httpx.Client(base_url=f"{site.api_url}/", timeout=60)
    deadline = time.monotonic() + PATIENCE
    while client.post("task_runs/count", json=mine).raise_for_status().json() < size:
        assert time.monotonic() < deadline, "Prefect never showed all of it"
        time.sleep(0.5)
    page = {**mine, "sort": "EXPECTED_START_TIME_DESC", "limit": 200, "offset": size // 2}
    questions = {
        "the graph (graph-v2)": partial(client.get, f"flow_runs/{flow_run}/graph-v2"),
        "a page of 200 task runs (task_runs/filter)": partial(client.post, "task_runs/filter", json=page),
        "how many task runs there are (task_runs/count)": partial(client.post, "task_runs/count", json=mine),
        "the flow run": partial(client.get, f"flow_runs/{flow_run}"),
    }
    return {name: partial(answer_seconds, question) for name, question in questions.items()}


def answer_seconds(question: Callable[[], httpx.Response]) -> float:
    """Return how long an answer takes, in seconds."""
    return seconds(lambda: question().raise_for_status())
