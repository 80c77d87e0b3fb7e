"""A workflow whose step writes one row, for the tests of `context.connection`."""

from collections.abc import Callable
from typing import Any, LiteralString

import pytest

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from tests.conftest import Connection

INSERT: LiteralString = "INSERT INTO written (attempt, pid) VALUES (%s, pg_backend_pid())"


both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])


Meanwhile = Callable[[Any], object]  # a StepContext, or an AsyncStepContext
"""What else happens while the handler works, after it has written."""


def read_attempts(db: Connection) -> list[object]:
    """Return the attempts that have written, one for each row."""
    return [row[0] for row in db.execute("SELECT attempt FROM written ORDER BY attempt").fetchall()]


def add_writer(workflow: Workflow, kind: str, meanwhile: Meanwhile = lambda _: None, **policy: Any) -> None:
    """Give the workflow a handler that writes one row and returns its attempt."""
    if kind == "sync":

        @workflow.step("write", **policy)
        def write(context: StepContext) -> Any:
            context.connection.execute(INSERT, (context.attempt,))
            return meanwhile(context) or context.attempt
    else:

        @workflow.step("write", **policy)
        async def write_async(context: AsyncStepContext) -> Any:
            await context.connection.execute(INSERT, (context.attempt,))
            return meanwhile(context) or context.attempt


def raise_once(error: Exception) -> Meanwhile:
    """Return what raises this in the first attempt."""

    def fail(context: StepContext | AsyncStepContext) -> None:
        if context.attempt == 1:
            raise error

    return fail
