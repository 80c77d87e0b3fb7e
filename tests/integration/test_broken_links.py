"""Links of `context.connection` that break for as long as a step is patient: never a failure of its handler."""

from uuid import UUID

import psycopg
import pytest

from pgflow_prefect import AsyncStepContext, StepContext, Workflow
from pgflow_prefect.bindings import SqlFunction
from tests.conftest import Connection
from tests.engine import value
from tests.integration.conftest import Define, make_slug, read_steps

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

BREAK = "SELECT pg_terminate_backend(pg_backend_pid())"


@pytest.fixture
def workflow(define: Define, monkeypatch: pytest.MonkeyPatch) -> Workflow:
    """A workflow of one step, `write`, which has no handler yet; its patience is short, however slow the machine is."""
    monkeypatch.setenv("PGFLOW_REPORT_TIMEOUT", "5")
    made = Workflow(make_slug())
    define(made.slug, ["write"])
    return made


async def check_left_to_the_next_owner(db: Connection, workflow: Workflow) -> None:
    state = await workflow.flow(return_state=True)
    assert state.is_crashed(), state
    assert read_steps(db)["write"][0] == "pending"
    assert value(db, "SELECT status FROM pgflow.runs") == "pending"


async def test_a_sync_handler_whose_link_always_breaks_has_not_failed(db: Connection, workflow: Workflow) -> None:
    @workflow.step
    def write(context: StepContext) -> None:
        context.connection.execute(BREAK)

    await check_left_to_the_next_owner(db, workflow)


@pytest.mark.thorough
async def test_an_async_handler_whose_link_always_breaks_has_not_failed(db: Connection, workflow: Workflow) -> None:
    @workflow.step
    async def write(context: AsyncStepContext) -> None:
        await context.connection.execute(BREAK)

    await check_left_to_the_next_owner(db, workflow)


@pytest.mark.thorough
async def test_a_handler_that_raises_its_own_error_from_a_broken_link_has_not_failed(
    db: Connection, workflow: Workflow
) -> None:
    class BookingError(Exception):
        pass

    @workflow.step
    def write(context: StepContext) -> None:
        try:
            context.connection.execute(BREAK)
        except psycopg.Error as error:
            raise BookingError("no booking") from error

    await check_left_to_the_next_owner(db, workflow)


@pytest.mark.thorough
async def test_a_function_whose_link_always_breaks_has_not_failed(db: Connection, workflow: Workflow) -> None:
    db.execute(
        "CREATE SCHEMA app; CREATE FUNCTION app.f(input jsonb) RETURNS jsonb LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN input; END $$"
    )
    workflow.bind("write", SqlFunction("app.f"))
    await check_left_to_the_next_owner(db, workflow)


async def test_an_error_of_the_handler_beside_a_broken_link_is_its_failure(db: Connection, workflow: Workflow) -> None:
    broken: list[UUID] = []

    @workflow.step
    def write(context: StepContext) -> None:
        connection = context.connection
        try:
            connection.execute(BREAK)
        except psycopg.OperationalError:
            broken.append(context.run_id)
        raise LookupError("no such customer")

    state = await workflow.flow(return_state=True)
    assert state.is_failed()
    assert read_steps(db)["write"][0] == "failed"
    assert len(broken) == 1
