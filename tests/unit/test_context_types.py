"""The types that a user's type checker sees in handlers: mypy checks this file, and `assert_type` fails there."""

import inspect
import logging
from typing import Any, assert_type
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow, dict_row

from pgflow_prefect import AsyncStepContext, StepContext, Workflow

workflow = Workflow("orders")

FOR_USERS = {
    *("run_id", "workflow_slug", "step_slug", "index", "attempt", "logger", "shadow"),
    *("connection", "idempotency_key"),
    *("logical_date", "data_interval_start", "data_interval_end", "failed_steps"),
}
"""What the guide says of `context`."""


@workflow.step
def book(context: StepContext) -> int:
    """Book an order in a thread."""
    assert_type(context.connection, psycopg.Connection[TupleRow])
    assert_type(context.connection.execute("SELECT 1").fetchone(), tuple[Any, ...] | None)
    with context.connection.transaction(), context.connection.cursor(row_factory=dict_row) as cursor:
        assert_type(cursor.fetchone(), dict[str, Any] | None)
    _ = context.connection.nothing_of_psycopg  # type: ignore[attr-defined]
    return 1


@workflow.step
async def book_async(context: AsyncStepContext) -> int:
    """Book an order on the event loop."""
    assert_type(await context.connection, psycopg.AsyncConnection[TupleRow])
    assert_type(await context.connection.execute("SELECT 1"), psycopg.AsyncCursor[TupleRow])
    async with context.connection.transaction() as savepoint, context.connection.cursor() as cursor:
        assert_type(savepoint, psycopg.AsyncTransaction)
        assert_type(await cursor.fetchone(), tuple[Any, ...] | None)
    async with context.connection.cursor(row_factory=dict_row) as rows:
        assert_type(await rows.fetchall(), list[dict[str, Any]])
    async with context.connection.cursor("of_the_server", withhold=True) as many:
        assert_type(many, psycopg.AsyncServerCursor[TupleRow])
    _ = context.connection.commit  # type: ignore[attr-defined]
    context.connection.execute("SELECT 1").fetchone()  # type: ignore[attr-defined]
    return 1


@workflow.step
def work(context: StepContext) -> None:
    """Use everything else that a context has."""
    assert_type(context.run_id, UUID)
    assert_type(context.workflow_slug, str)
    assert_type(context.step_slug, str)
    assert_type(context.index, int)
    assert_type(context.attempt, int)
    assert_type(context.shadow, bool)
    assert_type(context.idempotency_key, str)
    context.logger.info("a message")


def test_the_decorated_functions_keep_their_types() -> None:
    def call(context: StepContext) -> None:
        assert_type(book(context), int)

    assert callable(call)


def test_a_context_has_nothing_that_is_not_for_users() -> None:
    for kind in (StepContext, AsyncStepContext):
        context = kind(UUID(int=1), "orders", "book", 1, logging.getLogger(__name__))
        assert {name for name in dir(context) if not name.startswith("_")} == FOR_USERS
        assert [name for name in inspect.signature(kind).parameters if name.startswith("_")] == []
