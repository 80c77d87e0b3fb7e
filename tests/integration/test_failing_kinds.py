"""Endpoints and queues that fail: what becomes of the step, of its run, and of what Prefect shows."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import anyio
import pytest
from prefect.client.orchestration import PrefectClient

from pgflow_prefect import HttpEndpoint, Queue, Workflow
from tests.conftest import Connection
from tests.http_server import HttpServer, http_server, send
from tests.integration.conftest import Define, await_task_runs, make_slug, read_flow_run, read_run, read_steps
from tests.integration.waiting import going, going_on

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n42"
DEFERRED = "SELECT count(*) FROM pgflow_prefect.task_runs WHERE state_name = 'Deferred'"

DEATH = """
    UPDATE pgflow_prefect.owners SET lease_until = '-infinity';
    CREATE FUNCTION keep_dead() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER keep_dead BEFORE UPDATE ON pgflow_prefect.owners
        FOR EACH ROW WHEN (OLD.epoch = 1 AND NEW.epoch = 1) EXECUTE FUNCTION keep_dead();
"""
"""What makes the first owner of the only run look dead, although its process goes on to extend its lease."""


@dataclass(frozen=True)
class Case:
    """What an endpoint answers, and what comes of that."""

    answer: bytes
    status: str
    attempts: int
    shown: str
    message: str | None = None
    options: dict[str, float] = field(default_factory=dict)


def respond(status: int, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Reason", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


CASES = {
    "an answer": Case(OK, "completed", 1, "Completed"),
    "nothing to say": Case(respond(204), "completed", 1, "Completed"),
    "not found": Case(respond(404, b"no such function"), "failed", 1, "Failed", "no such function"),
    "out of order": Case(respond(500), "failed", 3, "Failed", "500"),
    "too many": Case(respond(429, b"", "Retry-After: 0"), "failed", 3, "Failed", "429"),
    "no JSON": Case(respond(200, b"<html>"), "failed", 1, "Failed", "JSON"),
    "no number": Case(respond(200, b"NaN"), "failed", 1, "Failed", "JSON"),
    "too large": Case(respond(200, b'"' + b"x" * 2000 + b'"'), "failed", 1, "Failed", "PGFLOW_RESULT_LIMIT"),
    "moved": Case(respond(308, b"", "Location: https://elsewhere"), "failed", 1, "Failed", "https://elsewhere"),
}


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    async with http_server() as answers:
        yield answers


@pytest.fixture
def workflow(define: Define) -> Workflow:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["ask", "after"], [("ask", "after")])

    @workflow.step
    async def after(ask: int | None) -> int | None:
        return ask

    return workflow


@pytest.mark.parametrize("name", CASES)
async def test_what_an_endpoint_answers_is_what_becomes_of_the_step(
    name: str,
    db: Connection,
    client: PrefectClient,
    workflow: Workflow,
    server: HttpServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[name]
    monkeypatch.setenv("PGFLOW_RESULT_LIMIT", "1000")
    server.answer = send(case.answer)
    workflow.bind("ask", HttpEndpoint(server.url, retries=2, retry_delay_seconds=0))

    state = await workflow.flow(return_state=True)

    status, attempts, _, message = read_steps(db)["ask"]
    assert (status, attempts, len(server.requests)) == (case.status, case.attempts, case.attempts)
    assert (case.message or "") in (message or "")
    assert read_run(db)[0] == case.status
    assert state.is_completed() is (case.status == "completed")
    shown = {"ask": case.shown} | ({"after": "Completed"} if case.status == "completed" else {})
    await await_task_runs(client, await read_flow_run(client, workflow.slug), shown)


async def test_an_endpoint_that_recovers_is_asked_again(db: Connection, workflow: Workflow, server: HttpServer) -> None:
    answers = iter([respond(503, b"", "Retry-After: 0"), respond(408), OK])

    async def answer(writer: asyncio.StreamWriter) -> None:
        await send(next(answers))(writer)

    server.answer = answer
    workflow.bind("ask", HttpEndpoint(server.url, retry_delay_seconds=0))

    await workflow.flow()

    assert read_steps(db)["ask"][:3] == ("completed", 3, 42)
    keys = {request.headers["idempotency-key"] for request in server.requests}
    attempts = [request.headers["pgflow-attempt"] for request in server.requests]
    assert (len(keys), attempts) == (1, ["1", "2", "3"])


@pytest.mark.parametrize("kind", ["http", "redis", "amqp"])
async def test_without_a_listener_the_step_fails_once_its_retries_are_used_up(
    kind: str, db: Connection, workflow: Workflow
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        if kind == "http":
            workflow.bind("ask", HttpEndpoint(f"http://{address}/", retries=1, retry_delay_seconds=0))
        else:
            place = "0" if kind == "redis" else "/"
            workflow.bind("ask", Queue(f"{kind}://{address}/{place}?queue=work", retries=1, retry_delay_seconds=0))

        state = await workflow.flow(return_state=True)

    status, attempts, _, _ = read_steps(db)["ask"]
    assert (status, attempts, read_run(db)[0]) == ("failed", 2, "failed")
    assert state.is_failed()


async def test_a_slow_endpoint_is_given_up_in_time(db: Connection, workflow: Workflow, server: HttpServer) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    server.answer = answer
    workflow.bind("ask", HttpEndpoint(server.url, request_timeout_seconds=0.2, retries=0))

    with anyio.fail_after(180):
        await workflow.flow(return_state=True)

    status, attempts, _, message = read_steps(db)["ask"]
    assert (status, attempts) == ("failed", 1)
    assert "0.2 s" in str(message)


async def test_202_leaves_the_report_to_the_endpoint_and_is_not_asked_again_by_the_next_owner(
    db: Connection, workflow: Workflow, server: HttpServer
) -> None:
    server.respond(202)
    workflow.bind("ask", HttpEndpoint(server.url))

    async with going(workflow, db) as first:
        await _until(db, DEFERRED)
        db.execute(DEATH)
        async with going_on(workflow, first.run_id) as second:
            await _until(db, "SELECT epoch - 1 FROM pgflow.runs")
            await _until(db, DEFERRED)
            db.execute("SELECT pgflow.complete_step(%s, 'ask', '7', attempt => 1)", [first.run_id])

    assert first.ended.name == "Superseded"
    assert second.ended.is_completed()
    assert len(server.requests) == 1
    assert read_steps(db)["ask"][:3] == ("completed", 1, 7)


@pytest.mark.thorough
async def test_202_and_no_report_is_a_time_out_and_asked_again(
    db: Connection, workflow: Workflow, server: HttpServer
) -> None:
    server.respond(202)
    workflow.bind("ask", HttpEndpoint(server.url, timeout_seconds=2, retries=1, retry_delay_seconds=0))

    state = await workflow.flow(return_state=True)

    status, attempts, _, message = read_steps(db)["ask"]
    assert (status, attempts, len(server.requests)) == ("failed", 2, 2)
    assert "no program has reported it within 2 s" in str(message)
    assert state.is_failed()


@pytest.mark.parametrize("answers", ["never", "by 202"])
async def test_a_run_that_is_cancelled_waits_for_no_endpoint(
    answers: str,
    db: Connection,
    client: PrefectClient,
    workflow: Workflow,
    server: HttpServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGFLOW_LEASE", "1")  # the process hears of it within a third of that
    asked = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        asked.set()
        if answers == "by 202":
            await send(respond(202))(writer)
        else:
            await asyncio.Event().wait()

    server.answer = answer
    workflow.bind("ask", HttpEndpoint(server.url))

    async with going(workflow, db) as run:
        await asked.wait()
        if answers == "by 202":
            await _until(db, DEFERRED)
        db.execute("SELECT pgflow.cancel_run(%s, 'cancelled: wrong list')", [run.run_id])

    assert run.ended.name == "Cancelled"
    assert read_steps(db)["ask"][0] == "failed"
    assert read_run(db)[:2] == ("failed", "cancelled: wrong list")
    await await_task_runs(client, await read_flow_run(client, workflow.slug), {"ask": "Cancelled"})


async def _until(db: Connection, count: str) -> None:
    """Return once this statement counts something."""
    with anyio.fail_after(180):
        while not (row := db.execute(count).fetchone()) or not row[0]:
            await anyio.sleep(0.02)
