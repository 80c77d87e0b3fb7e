"""The block that says where the database is, and what comes before it."""

from collections.abc import AsyncIterator
from contextlib import suppress
from uuid import uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import ObjectNotFound
from prefect.utilities.dispatch import get_registry_for_type
from pydantic import SecretStr

from pgflow_prefect import PgflowDatabase, Settings, Workflow
from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.process.database_block import find_settings, save_block
from tests.conftest import Connection
from tests.integration.conftest import Define, read_run

pytestmark = pytest.mark.anyio

ADDRESS = "postgresql://app:hush@db.example.org/app"


@pytest.fixture
async def block_name(client: PrefectClient) -> AsyncIterator[str]:
    name = f"database-{uuid4().hex[:8]}"
    yield name
    await delete_block(client, name)


@pytest.fixture
async def default_block(client: PrefectClient, dsn: str) -> AsyncIterator[None]:
    await save_block("default", Settings(dsn=SecretStr(dsn), pool_size=3))
    yield
    with suppress(ObjectNotFound):  # another process of pytest, on the same server, has deleted it
        await delete_block(client, "default")


async def delete_block(client: PrefectClient, name: str) -> None:
    document = await client.read_block_document_by_name(name, "pgflow-database")
    assert document.id is not None
    await client.delete_block_document(document.id)


async def test_a_block_that_is_saved_again_has_the_new_address_and_keeps_its_size(
    client: PrefectClient, block_name: str
) -> None:
    assert await save_block(block_name, Settings(dsn=SecretStr(ADDRESS), pool_size=7))
    found = await find_settings(Settings(block=block_name))
    assert (found.dsn, found.pool_size) == (SecretStr(ADDRESS), 7)
    assert not await save_block(block_name, Settings(dsn=SecretStr(ADDRESS.replace("hush", "quiet"))))
    found = await find_settings(Settings(block=block_name))
    assert (found.dsn, found.pool_size) == (SecretStr(ADDRESS.replace("hush", "quiet")), 7)


async def test_prefect_shows_the_connection_string_to_no_user(client: PrefectClient, block_name: str) -> None:
    await save_block(block_name, Settings(dsn=SecretStr(ADDRESS)))
    shown = await client.read_block_document_by_name(block_name, "pgflow-database", include_secrets=False)
    assert "hush" not in shown.model_dump_json()
    assert "hush" not in repr(PgflowDatabase(dsn=SecretStr(ADDRESS)))


async def test_a_nearer_setting_wins(default_block: None, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = Settings(block="default")
    assert (await find_settings(named)).dsn == SecretStr(dsn)
    assert (await find_settings(named)).pool_size == 3
    assert (await find_settings(Settings(block="default", pool_size=9))).pool_size == 9
    monkeypatch.setenv("PGHOST", "elsewhere")
    assert (await find_settings(named)).dsn == SecretStr(dsn)
    monkeypatch.setenv("PGFLOW_DSN", ADDRESS)
    assert (await find_settings(Settings(block="none-of-this-name"))).dsn == SecretStr(ADDRESS)


async def test_a_block_that_is_missing_is_named(client: PrefectClient) -> None:
    with pytest.raises(UsageError, match="there is no Prefect block pgflow-database/nowhere: make it with"):
        await find_settings(Settings(block="nowhere"))


async def test_a_block_without_a_connection_string_says_so(client: PrefectClient, block_name: str) -> None:
    await PgflowDatabase(dsn=SecretStr("")).asave(block_name)
    with pytest.raises(UsageError, match=f"pgflow-database/{block_name} has no usable values"):
        await find_settings(Settings(block=block_name))


@pytest.mark.parametrize("name", ["Bad Name", "a/b", ""])
async def test_a_name_that_prefect_does_not_take_is_refused(client: PrefectClient, name: str) -> None:
    with pytest.raises(UsageError, match="can't be the name of a block"):
        await save_block(name, Settings(dsn=SecretStr(ADDRESS)))


async def test_a_block_that_no_setting_names_is_not_read(default_block: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await find_settings(Settings())).dsn is None
    monkeypatch.setenv("PGHOST", "elsewhere")
    assert (await find_settings(Settings())).dsn is None


async def test_a_flow_finds_its_database_by_the_block(
    default_block: None, db: Connection, define: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_BLOCK", "default")
    slug = f"by_block_{uuid4().hex[:8]}"
    define(slug, ["greet"])
    workflow = Workflow(slug)

    @workflow.step
    def greet() -> str:
        return "hello"

    assert await workflow.flow({}) == {"greet": "hello"}
    assert read_run(db)[0] == "completed"


def test_prefect_finds_the_kind_of_block_by_its_entry_point() -> None:
    from prefect.blocks.core import Block  # noqa: PLC0415  as a worker does
    from prefect.plugins import load_prefect_collections  # noqa: PLC0415

    loaded = load_prefect_collections()
    assert not isinstance(loaded["pgflow_prefect"], Exception)
    registry = get_registry_for_type(Block)
    assert registry is not None
    assert registry["pgflow-database"] is PgflowDatabase
