"""What goes into a handler and comes out of it, through PostgreSQL."""

import datetime as dt
from typing import Any
from uuid import uuid4

import pytest
from pydantic import BaseModel, JsonValue

from pgflow_prefect import Workflow
from pgflow_prefect.errors import PayloadInvalidError, UsageError
from tests.conftest import Connection
from tests.engine import run_workflow
from tests.integration.conftest import (
    Define,
    make_slug,
    read_run,
    read_steps,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]


class Order(BaseModel):
    number: int
    day: dt.date


async def test_a_step_sees_what_its_upstream_returned_through_its_annotations(define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["make", "take"], [("make", "take")])
    taken: list[Order] = []

    @workflow.step
    def make() -> Order:
        return Order(number=7, day=dt.date(2026, 2, 28))

    @workflow.step
    def take(make: Order) -> None:
        taken.append(make)

    await workflow.flow()
    assert taken == [Order(number=7, day=dt.date(2026, 2, 28))]


async def test_an_argument_with_a_default_keeps_it_unless_it_names_an_upstream_step(define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["fetch", "report", "publish"], [("fetch", "publish")])

    @workflow.step
    def fetch(payload: object, page_size: int = 100) -> int:
        return page_size

    @workflow.step
    def report() -> int:
        return 7

    @workflow.step
    async def publish(fetch: int | None = None, report: int | None = None, *, dry: bool = True) -> list[object]:
        return [fetch, report, dry]

    assert await workflow.flow() == {"report": 7, "publish": [100, None, True]}


async def test_a_value_that_does_not_fit_fails_the_step_at_once_and_names_it(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["count"])
    calls = []

    @workflow.step(retries=5)
    def count(payload: dict[str, int]) -> int:
        calls.append(payload)
        return len(payload)

    with pytest.raises(Exception, match="argument 'payload'"):
        await workflow.flow(run_id=run_workflow(db, workflow.slug, {"n": "many"}).id)
    assert calls == []
    status, attempts, _, message = read_steps(db)["count"]
    assert (status, attempts) == ("failed", 1)
    assert message.startswith("step 'count': argument 'payload' does not fit its annotation: n: ")


@pytest.mark.parametrize("value", [float("nan"), "a\0b", "\ud800", object()], ids=["nan", "nul", "surrogate", "object"])
async def test_a_result_that_jsonb_can_not_hold_fails_the_step(db: Connection, define: Define, value: object) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["produce"])

    @workflow.step(retries=3)
    def produce() -> Any:
        return value

    with pytest.raises(Exception, match="step 'produce'"):
        await workflow.flow()
    assert read_run(db)[0] == "failed"
    assert read_steps(db)["produce"][:2] == ("failed", 1)


async def test_a_result_over_the_limit_fails_the_step(
    db: Connection, define: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_RESULT_LIMIT", "1000")
    workflow = Workflow(make_slug())
    define(workflow.slug, ["produce"])

    @workflow.step
    def produce() -> str:
        return "x" * 1000

    with pytest.raises(Exception, match="limit of 1,000"):
        await workflow.flow()
    assert read_run(db)[0] == "failed"


async def test_null_from_sql_and_null_in_json_are_both_none(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["sql_null", "json_null", "join"], [("sql_null", "join"), ("json_null", "join")])
    seen: list[object] = []
    for slug in ("sql_null", "json_null"):

        @workflow.step(slug)
        def never() -> None:
            raise AssertionError("another program has completed it")

    @workflow.step
    def join(sql_null: object, json_null: object, payload: object) -> None:
        seen.extend([sql_null, json_null, payload])

    run_id = uuid4()
    db.execute("SELECT pgflow.run_workflow(%s, 'null', %s)", (workflow.slug, run_id))
    db.execute("SELECT pgflow.complete_step(%s, 'sql_null', NULL)", (run_id,))
    db.execute("SELECT pgflow.complete_step(%s, 'json_null', 'null')", (run_id,))
    await workflow.flow(run_id=run_id)
    assert seen == [None, None, None]


async def test_the_payload_of_a_call_is_any_json_whatever_it_means_to_prefect(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["echo"])
    payload = {"schema": {"$ref": "#/$defs/order"}, "__prefect_kind": "json", "value": "no JSON"}

    @workflow.step
    def echo(payload: Any) -> Any:
        return payload

    assert await workflow.flow(payload) == {"echo": payload}
    assert read_run(db)[0] == "completed"


async def test_a_run_id_may_be_text_and_has_to_be_a_uuid(db: Connection, define: Define) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["only"])

    @workflow.step
    def only() -> int:
        return 1

    db.execute("SELECT pgflow.run_workflow(%s, '{}', %s)", (workflow.slug, run_id := uuid4()))
    assert await workflow.flow(run_id=str(run_id)) == {"only": 1}
    with pytest.raises(UsageError, match=r"the parameter run_id is 'nonsense', and no UUID: leave it out"):
        await workflow.flow(run_id="nonsense")
    assert read_run(db)[2] == run_id, "and no other run was begun"


async def test_a_payload_that_does_not_fit_begins_no_run(define: Define, db: Connection) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["load", "late"], [("load", "late")])
    not_a_number = "step 'late': argument 'payload' does not fit its annotation: n: "

    @workflow.step
    def load(payload: JsonValue) -> JsonValue:
        return payload

    @workflow.step
    def late(load: JsonValue, payload: dict[str, int]) -> JsonValue:
        return load

    with pytest.raises(PayloadInvalidError, match=not_a_number) as refused:
        await workflow.flow(payload={"n": "many"})
    assert "many" not in str(refused.value)
    assert db.execute("SELECT count(*) FROM pgflow.runs").fetchone() == (0,)
    await workflow.flow(payload={"n": 1})
    assert read_run(db)[0] == "completed"


async def test_a_payload_need_not_fit_a_function_whose_step_a_row_binds_elsewhere(
    define: Define, db: Connection
) -> None:
    workflow = Workflow(make_slug())
    define(workflow.slug, ["load"])
    db.execute("CREATE FUNCTION public.load_it(jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT to_jsonb(7)';")
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'load', 'sql', 'public.load_it')", (workflow.slug,))

    @workflow.step
    def load(payload: int) -> int:
        return payload

    assert await workflow.flow(payload="many") == {"load": 7}
