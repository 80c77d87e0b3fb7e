"""The host of a flow that is called is opened while Prefect creates the flow run, for that run and no other."""

import gc
import socket

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from pydantic import SecretStr

from pgflow_prefect import Workflow
from pgflow_prefect.errors import DatabaseUnavailableError
from pgflow_prefect.execution.process import prewarmed_host as ahead
from pgflow_prefect.execution.process.prewarmed_host import open_ahead, open_host_for_run
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import value
from tests.integration.conftest import Define, make_slug

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn")]

NOWHERE = "postgresql://pgflow@127.0.0.1:1/nothing"


def count_connections(db: Connection) -> int:
    counted = value(
        db,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s",
        "pgflow-prefect",
    )
    assert isinstance(counted, int)
    return counted


async def await_connections(db: Connection, expected: int) -> None:
    with anyio.fail_after(180):
        while count_connections(db) != expected:
            await anyio.sleep(0.01)


async def test_it_is_there_before_the_run_asks_and_goes_with_the_block(db: Connection) -> None:
    async with open_ahead(None):
        await await_connections(db, 1)
        async with open_host_for_run(Settings()) as host:
            assert await host.store.list_slugs() == []
            assert count_connections(db) == 1
        await await_connections(db, 0)
    assert count_connections(db) == 0


async def test_it_goes_where_no_run_begins(db: Connection) -> None:
    async def fail() -> None:
        async with open_ahead(Settings()):
            await await_connections(db, 1)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await fail()
    await await_connections(db, 0)
    async with open_ahead(Settings()):
        pass  # before it is open
    await await_connections(db, 0)


async def test_a_connection_that_is_still_being_opened_is_closed_at_once() -> None:
    gc.disable()  # as it is closed by the collector at the latest, and that may be in hours
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener, anyio.fail_after(180):
            port = listener.getsockname()[1]
            async with open_ahead(Settings(dsn=SecretStr(f"postgresql://pgflow@127.0.0.1:{port}/silent"))):
                accepted, _ = await anyio.to_thread.run_sync(listener.accept)
            with accepted:
                accepted.settimeout(180)
                while await anyio.to_thread.run_sync(accepted.recv, 4096):
                    pass  # until the other side has closed it
    finally:
        gc.enable()


async def test_it_is_for_one_run_with_the_same_settings() -> None:
    async with open_ahead(Settings()):
        async with open_host_for_run(Settings(concurrency=3)) as other:
            assert other.settings.concurrency == 3
        async with open_host_for_run(Settings()) as first, open_host_for_run(Settings()) as second:
            assert first is not second


async def test_what_keeps_it_from_opening_is_raised_in_the_run() -> None:
    settings = Settings(dsn=SecretStr(NOWHERE))
    async with open_ahead(settings):
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(DatabaseUnavailableError):
            async with open_host_for_run(settings):
                pass
    async with open_ahead(settings):
        pass  # nothing asks, nothing hears


async def test_who_is_cancelled_waits_for_no_database_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = Settings(dsn=SecretStr(f"postgresql://pgflow@127.0.0.1:{port}/silent"), connect_timeout=900)
        with anyio.fail_after(180):
            async with open_ahead(settings):
                with anyio.move_on_after(0.1) as scope:
                    async with open_host_for_run(settings):
                        pass
        assert scope.cancelled_caught


async def test_wrong_settings_are_told_by_the_run(monkeypatch: pytest.MonkeyPatch, prefect_api: str) -> None:
    monkeypatch.setenv("PGFLOW_CONCURRENCY", "many")
    state = await Workflow(make_slug()).flow(return_state=True)
    assert state.is_failed()
    assert "concurrency" in (state.message or "")


async def test_a_call_uses_it(
    db: Connection, define: Define, client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    original = ahead.PrewarmedHost.take

    def take(self: ahead.PrewarmedHost) -> object:
        opened.append("ahead")
        return original(self)

    monkeypatch.setattr(ahead.PrewarmedHost, "take", take)
    slug = make_slug()
    define(slug, ["first"])
    workflow = Workflow(slug)
    workflow.step("first")(lambda: 1)
    assert await workflow.flow() == {"first": 1}
    assert opened == ["ahead"]
    assert await workflow.flow.with_options(name="other")() == {"first": 1}
    assert opened == ["ahead"] * 2, "and so does a call of the flow with other options"
    await await_connections(db, 0)
