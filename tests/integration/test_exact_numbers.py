"""Numbers between steps: what no handler in Python looks at keeps every digit, and so does a Decimal."""

import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from pgflow_prefect import Workflow
from pgflow_prefect.bindings import HttpEndpoint, SqlFunction
from pgflow_prefect.consumer import perform
from pgflow_prefect.database.store import Store
from tests.conftest import Connection
from tests.engine import define, get_state, run_workflow, value
from tests.http_server import HttpServer, http_server
from tests.integration.conftest import Define, make_slug

pytestmark = [pytest.mark.anyio]

flows = pytest.mark.usefixtures("pgflow_dsn", "prefect_api")

NUMBERS = (
    '{"big": 18446744073709551617, "exact": 9007199254740993, "long": 12345678901234567.89, "money": 1.10, '
    '"negative": -0.0, "tenth": 0.10000000000000000000000001, "exponent": 1.5e30, "nested": [[{"\\u00fc\\"": 2.50}]], '
    f'"huge": 1{"0" * 400}}}'
)


def as_stored(db: Connection, document: str) -> str:
    """Return a document as jsonb has it."""
    return str(value(db, "SELECT %s::jsonb::text", document))


def read_result(db: Connection, step: str) -> str:
    return str(value(db, "SELECT step_result::text FROM pgflow.step_states WHERE step_slug = %s", step))


def start(db: Connection, slug: str) -> Any:
    return value(db, "SELECT id FROM pgflow.run_workflow(%s, %s::jsonb)", slug, NUMBERS)


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    async with http_server() as server:
        yield server


@pytest.fixture
def echo(db: Connection) -> None:
    """A function that returns what it got."""
    db.execute("CREATE SCHEMA app")
    db.execute("CREATE FUNCTION app.echo(input jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT input'")


@flows
@pytest.mark.usefixtures("echo")
async def test_an_sql_function_gets_and_returns_every_digit(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["payload", "last"], [("payload", "last")])
    workflow.bind("payload", SqlFunction("app.echo"))
    workflow.bind("last", SqlFunction("app.echo"))
    run_id = start(db, workflow.slug)
    assert await workflow.flow(run_id=run_id)
    payload = as_stored(db, NUMBERS)
    assert read_result(db, "payload") == f'{{"payload": {payload}}}'
    assert read_result(db, "last") == f'{{"payload": {payload}, "payload_": {{"payload": {payload}}}}}'


@flows
async def test_an_endpoint_gets_and_answers_every_digit(define: Define, db: Connection, server: HttpServer) -> None:
    server.respond(200, NUMBERS.encode())
    workflow = Workflow(make_slug())
    define(workflow.slug, ["first", "last"], [("first", "last")])
    workflow.bind("first", HttpEndpoint(f"{server.url}/"))
    workflow.bind("last", HttpEndpoint(f"{server.url}/"))
    run_id = start(db, workflow.slug)
    assert await workflow.flow(run_id=run_id)
    payload = as_stored(db, NUMBERS)
    first, last = (request.body.decode() for request in server.requests)
    assert first == f'{{"input":{{"payload":{payload}}}}}'
    assert last == f'{{"input":{{"payload":{payload},"first": {payload}}}}}'
    assert read_result(db, "first") == read_result(db, "last") == payload


class Sale(BaseModel):
    long: Decimal
    money: Decimal
    tenth: Decimal
    big: int
    exact: int
    exponent: float


@flows
@pytest.mark.usefixtures("echo")
async def test_a_handler_in_python_gets_decimals_exactly_and_returns_them_so(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["first", "second", "last"], [("first", "second"), ("second", "last")])
    workflow.bind("last", SqlFunction("app.echo"))
    seen: list[object] = []

    @workflow.step
    def first(payload: Sale) -> Sale:
        seen.append(payload)
        return payload

    @workflow.step
    async def second(first: Sale, payload: dict[str, Any]) -> dict[str, Decimal]:
        seen.extend([first, payload["money"], payload["big"]])
        return {"sum": first.long + first.money}

    await workflow.flow(run_id=start(db, workflow.slug))
    sale = Sale.model_construct(
        long=Decimal("12345678901234567.89"),
        money=Decimal("1.10"),
        tenth=Decimal("0.10000000000000000000000001"),
        big=18446744073709551617,
        exact=9007199254740993,
        exponent=1.5e30,
    )
    assert seen == [sale, sale, 1.1, 18446744073709551617]
    assert json.loads(read_result(db, "second")) == {"sum": "12345678901234568.99"}


async def test_the_store_gives_documents_as_they_are(store: Store, db: Connection) -> None:
    define(db, "w", {"a": [], "b": ["a"]})
    run_id = start(db, "w")
    db.execute("SELECT pgflow.complete_step(%s, 'a', %s::jsonb)", [run_id, NUMBERS])
    payload = as_stored(db, NUMBERS)
    run = await store.read_run(run_id, with_payload=True)
    assert run.payload is not None
    assert run.payload.text == payload
    [first, _] = await store.list_step_states(run_id)
    assert first.step_result is not None
    assert first.step_result.text == payload
    assert {slug: raw.text for slug, raw in (await store.read_results(run_id, ["a"])).items()} == {"a": payload}


def hand_over(db: Connection, payload: str) -> tuple[UUID, str]:
    """Return a run whose step `a` waits on a queue, and the message that is there."""
    define(db, "w", {"up": [], "a": ["up"]})
    run_id = run_workflow(db, "w", {}).id
    db.execute("UPDATE pgflow.runs SET payload = %s::jsonb", [payload])
    db.execute("SELECT pgflow.complete_step(%s, 'up', '12345678901234567.89')", [run_id])
    db.execute(
        "SELECT pgflow_prefect.claim_step(%s, 'a', (SELECT epoch FROM pgflow.runs), gen_random_uuid(), NULL, true, "
        "'queue', false, 'queue pgqueuer:mails')",
        [run_id],
    )
    message = {
        "run_id": str(run_id),
        "workflow_slug": "w",
        "step_slug": "a",
        "attempt": 1,
        "idempotency_key": "key",
        "input": {},
    }
    return run_id, json.dumps(message)


async def test_a_consumer_gets_decimals_exactly(db: Connection, dsn: str) -> None:
    run_id, message = hand_over(db, NUMBERS)

    class Input(BaseModel):
        payload: Sale
        up: Decimal

    seen: list[Input] = []

    def work(input: Input) -> str:  # noqa: A002  as users call it
        seen.append(input)
        return str(input.up)

    await perform(message, work, dsn)
    assert seen[0].payload.money == Decimal("1.10")
    assert get_state(db, run_id, "a").step_result == "12345678901234567.89"


async def test_a_consumer_fails_a_step_whose_input_python_can_t_read(db: Connection, dsn: str) -> None:
    db.execute("UPDATE pgflow.limits SET digits = 4300")
    run_id, message = hand_over(db, "{}")
    db.execute("ALTER TABLE pgflow.runs DISABLE TRIGGER check_written")
    db.execute("UPDATE pgflow.runs SET payload = %s", [f'{{"n": {"7" * 5000}}}'])

    def work(input: dict[str, object]) -> None:  # noqa: A002  as users call it
        raise AssertionError("there is no input")

    await perform(message, work, dsn)
    state = get_state(db, run_id, "a")
    assert state.status == "failed"
    assert state.error_message == (
        "the input of step 'a' can't be read: a JSON value has a number of too many digits to be read"
    )
