"""Which database an installation is, as Prefect has it registered, and as other databases see that."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import psycopg
import pytest
from prefect.client.orchestration import PrefectClient

from pgflow_prefect import Workflow
from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import ForeignInstallationError
from pgflow_prefect.services.heartbeat import Heartbeat
from tests.conftest import Connection
from tests.copying import copy_database
from tests.engine import define, value
from tests.integration.conftest import TENURE, make_slug

pytestmark = pytest.mark.anyio

SAME_STAMP = (
    "CREATE OR REPLACE FUNCTION pgflow_prefect.current_stamp() RETURNS text LANGUAGE sql STABLE AS $$ SELECT '1/1' $$"
)
"""What a clone of the whole server looks like."""


@asynccontextmanager
async def open_copy(dsn: str, copy_dsn: str) -> AsyncIterator[Store]:
    copy_database(dsn, copy_dsn)
    async with open_pool(copy_dsn, size=2, timeout=10) as pool:
        yield Store(pool, TENURE)


async def test_an_installation_is_registered_once_whatever_registers_it(store: Store, client: PrefectClient) -> None:
    first = await Heartbeat(store, client).register()
    assert await Heartbeat(store, client).register() == first.model_copy(update={"is_used": True})
    variable = await client.read_variable_by_name(f"pgflow_installation_{first.id.hex}")
    assert variable is not None
    assert isinstance(variable.value, dict)
    assert variable.value["stamp"] == first.stamp
    assert variable.value["beat"] in map(str, await store.list_beats())


async def test_a_clone_of_the_server_is_refused_while_the_original_lives(
    store: Store, client: PrefectClient, db: Connection, dsn: str, copy_dsn: str
) -> None:
    db.execute(SAME_STAMP)
    db.execute("UPDATE pgflow_prefect.installation SET stamp = '1/1'")
    await Heartbeat(store, client).register()
    async with open_copy(dsn, copy_dsn) as copy, anyio.create_task_group() as group:
        group.start_soon(Heartbeat(store, client, interval=0.2).keep, lambda error: None)
        with anyio.fail_after(180):
            while len(await store.list_beats()) < 3:
                await anyio.sleep(0.05)
        with pytest.raises(ForeignInstallationError, match="is registered in Prefect for database"):
            # It can't tell the original from one that is gone before the next sign of life.
            await Heartbeat(copy, client, interval=20).register()
        group.cancel_scope.cancel()


async def test_a_database_takes_the_place_of_its_clone_that_gives_no_sign_of_life(
    store: Store, client: PrefectClient, db: Connection, dsn: str, copy_dsn: str
) -> None:
    db.execute(SAME_STAMP)
    db.execute("UPDATE pgflow_prefect.installation SET stamp = '1/1'")
    await Heartbeat(store, client).register()
    async with open_copy(dsn, copy_dsn) as copy:
        db.execute("UPDATE pgflow_prefect.heartbeats SET beat_at = '-infinity'")
        await Heartbeat(store, client).register()
        found = await Heartbeat(copy, client, interval=0.1).register()
    assert found.id == await store.read_installation()


async def test_a_running_service_stops_once_another_database_goes_on_under_its_id(
    store: Store, client: PrefectClient, db: Connection, dsn: str, copy_dsn: str
) -> None:
    db.execute(SAME_STAMP)
    db.execute("UPDATE pgflow_prefect.installation SET stamp = '1/1'")
    await Heartbeat(store, client).register()
    failures: list[ForeignInstallationError] = []
    async with open_copy(dsn, copy_dsn) as copy, anyio.create_task_group() as group:
        group.start_soon(Heartbeat(copy, client, interval=0.5).keep, failures.append)
        group.start_soon(Heartbeat(store, client, interval=0.5).keep, failures.append)
        with anyio.fail_after(180):
            while not failures:
                await anyio.sleep(0.05)
        group.cancel_scope.cancel()
    assert len(failures) == 1, "the other one goes on"


async def test_two_copies_from_before_there_were_stamps_are_told_apart(
    store: Store, client: PrefectClient, dsn: str, copy_dsn: str
) -> None:
    async with open_copy(dsn, copy_dsn) as copy:
        with psycopg.connect(copy_dsn, autocommit=True) as connection:  # as an upgrade stamps it
            connection.execute("UPDATE pgflow_prefect.installation SET stamp = pgflow_prefect.current_stamp()")
        await Heartbeat(store, client).register()
        with pytest.raises(ForeignInstallationError, match="is registered in Prefect for database"):
            await Heartbeat(copy, client).register()


async def test_a_flow_on_a_copy_ends_before_it_makes_a_run(db: Connection, pgflow_dsn: str, prefect_api: str) -> None:
    workflow = Workflow(make_slug())
    define(db, workflow.slug, {"a": []})
    db.execute("INSERT INTO pgflow_prefect.heartbeats DEFAULT VALUES")
    db.execute("UPDATE pgflow_prefect.installation SET stamp = '1/1'")

    @workflow.step
    def a() -> None:
        raise AssertionError("it was called")

    with pytest.raises(ForeignInstallationError, match="this database is a copy"):
        await workflow.flow()
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 0


async def test_a_role_that_may_not_read_the_cluster_s_identifier_finds_its_database_all_the_same(
    store: Store, client: PrefectClient, db: Connection
) -> None:
    db.execute(
        "UPDATE pgflow_prefect.installation SET stamp = '?/' || split_part(pgflow_prefect.current_stamp(), '/', 2)"
    )
    assert (await Heartbeat(store, client).register()).fits


def test_an_installation_of_an_older_version_is_stamped_where_it_is(
    make_database: Callable[[str | None], str], template: str
) -> None:
    from pgflow_prefect.database.schema import read_scripts  # noqa: PLC0415

    with psycopg.connect(make_database(template), autocommit=True) as connection:
        connection.execute("ALTER TABLE pgflow_prefect.installation DROP COLUMN stamp, DROP COLUMN former_stamps")
        before = value(connection, "SELECT id FROM pgflow_prefect.installation")
        connection.execute(read_scripts().encode())
        found = connection.execute("SELECT id, fits, is_used FROM pgflow_prefect.read_installation()").fetchone()
        assert found == (before, True, True), "its deployments carry this id"
