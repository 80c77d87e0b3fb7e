"""Every kind of handler does steps of a flow of the released pgflow that was moved to Prefect."""

import json
import os
from collections.abc import AsyncIterator
from typing import LiteralString

import anyio
import pytest
from prefect.client.orchestration import PrefectClient

from pgflow_prefect import HttpEndpoint, Workflow
from pgflow_prefect.consumer import perform
from tests.engine import column, value
from tests.http_server import HttpServer, http_server
from tests.integration.conftest import await_task_runs, read_flow_run
from tests.integration.queues.test_pgqueuer import pgqueuer_tables
from tests.integration.test_moved_flows import flows, move, released_template, workflow
from tests.integration.waiting import await_value
from tests.released_lab import ReleasedFlows

pytestmark = [pytest.mark.anyio, pytest.mark.thorough, pytest.mark.usefixtures("prefect_api")]

__all__ = ["flows", "released_template", "workflow"]  # the fixtures

BIND: LiteralString = "SELECT pgflow_prefect.bind_step(%s, %s, %s, %s)"
STATE: LiteralString = "SELECT max(state_name) FROM pgflow_prefect.task_runs WHERE step_slug = %s"


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    async with http_server() as answers:
        yield answers


async def test_rows_bind_the_steps_of_a_moved_flow_to_every_kind(
    flows: ReleasedFlows,
    workflow: Workflow,
    server: HttpServer,
    client: PrefectClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One after the other: an endpoint, a program, a queue, an external worker, and a function."""
    monkeypatch.setenv("PGFLOW_HTTP_ALLOW", server.url)
    monkeypatch.setenv("PGFLOW_COMMANDS", json.dumps({"echo": ["/bin/cat"]}))
    server.respond(200, b"42", Content_Type="application/json")

    @workflow.step
    async def report(sign: int) -> int:
        return sign + 1

    steps = {"ask": [], "count": ["ask"], "mail": ["count"], "sign": ["mail"], "report": ["sign"]}
    flows.define(workflow.slug, steps)
    move(flows, workflow.slug)
    kinds = {"ask": ("http", server.url), "count": ("command", "echo"), "mail": ("queue", "pgqueuer:mails")}
    for step, bound in {**kinds, "sign": ("external", None)}.items():
        flows.db.execute(BIND, [workflow.slug, step, *bound])

    ended: list[object] = []

    async def execute() -> None:
        ended.append(await workflow.flow(payload={"n": 4}))

    async with pgqueuer_tables(os.environ["PGFLOW_DSN"]), anyio.create_task_group() as executing:
        executing.start_soon(execute)
        await await_value(flows.db, 1, "SELECT count(*) FROM pgqueuer")
        assert value(flows.db, STATE, "mail") == "Deferred"
        message = value(flows.db, "SELECT payload FROM pgqueuer")
        assert isinstance(message, bytes)
        await perform(message, lambda given: given["count"]["payload"]["n"] * 10)
        await await_value(flows.db, "Waiting", STATE, "sign")
        [task] = flows.claim(workflow.slug)  # an external worker calls pgflow's functions itself
        flows.complete(task, 7)

    assert ended == [{"report": 8}]
    outputs = (
        "SELECT t.output FROM pgflow.step_tasks t JOIN pgflow.steps s USING (flow_slug, step_slug) ORDER BY step_index"
    )
    assert column(flows.db, outputs) == [42, {"ask": 42, "payload": {"n": 4}}, 40, 7, 8]
    assert value(flows.db, "SELECT sum(queue_length) FROM pgmq.metrics_all()") == 0, "no message is left over"
    await await_task_runs(client, await read_flow_run(client, workflow.slug), dict.fromkeys(steps, "Completed"))


async def test_pgflow_counts_the_attempts_of_an_endpoint_and_a_program(
    flows: ReleasedFlows, workflow: Workflow, server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_COMMANDS", json.dumps({"fail": ["/bin/sh", "-c", "echo no disk >&2; exit 1"]}))
    server.respond(500)
    workflow.bind("ask", HttpEndpoint(server.url, retries=9, retry_delay_seconds=0))
    flows.define(
        workflow.slug, {"ask": [], "work": []}, attempts=3, ask="when_exhausted => 'skip'", work="max_attempts => 2"
    )
    move(flows, workflow.slug)
    flows.db.execute(BIND, [workflow.slug, "work", "command", "fail"])
    state = await workflow.flow(payload={}, return_state=True)
    assert state.is_failed()
    assert "no disk" in str(state.message)
    attempts = "SELECT attempts_count FROM pgflow.step_tasks WHERE step_slug = 'work'"
    assert value(flows.db, attempts) == 2
    assert 1 <= len(server.requests) <= 3, "the run may end before its third attempt"


async def test_a_consumer_that_fails_fails_the_attempt_and_pgflow_tries_again(
    flows: ReleasedFlows, workflow: Workflow
) -> None:
    flows.define(workflow.slug, {"mail": []}, attempts=2)
    move(flows, workflow.slug)
    flows.db.execute(BIND, [workflow.slug, "mail", "queue", "pgqueuer:mails"])

    def fail(given: object) -> object:
        raise ValueError("the mailbox is full")

    ended: list[object] = []

    async def execute() -> None:
        ended.append(await workflow.flow(payload={}))

    async with pgqueuer_tables(os.environ["PGFLOW_DSN"]), anyio.create_task_group() as executing:
        executing.start_soon(execute)
        for attempt, do in ((1, fail), (2, lambda given: "sent")):
            await await_value(flows.db, attempt, "SELECT count(*) FROM pgqueuer")
            message = value(flows.db, "SELECT payload FROM pgqueuer ORDER BY id DESC LIMIT 1")
            assert isinstance(message, bytes)
            await perform(message, do)
    assert ended == [{"mail": "sent"}]
    row = "SELECT attempts_count || ' ' || error_message FROM pgflow.step_tasks"
    assert "2 " in str(value(flows.db, row))
