"""The store against a real database: definitions and runs as it returns them, and how it says no."""

from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.definitions.model import Dep
from pgflow_prefect.errors import (
    PgflowPrefectError,
    RunHeldError,
    SchemaMissingError,
    UnknownRunError,
    UnknownWorkflowError,
    UsageError,
)
from pgflow_prefect.models import Ending, Held, Run, Status, WorkflowSummary
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.settings import Settings
from tests.conftest import Connection, execute
from tests.engine import CHAIN, DIAMOND, define
from tests.json_values import decode

pytestmark = pytest.mark.anyio

FLOW_RUN, TASK_RUN = uuid4(), uuid4()


async def test_the_connection_that_tells_whether_there_is_a_database_is_the_first_of_the_pool(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, opened = psycopg.AsyncConnection.connect, 0

    async def count(*arguments: Any, **options: Any) -> Any:
        nonlocal opened
        opened += 1
        return await connect(*arguments, **options)

    monkeypatch.setattr(psycopg.AsyncConnection, "connect", count)
    async with open_pool(dsn, size=2, timeout=10) as pool:
        async with pool.connection() as first:
            assert opened == 1
            async with pool.connection() as second:
                assert opened == 2
                assert (first.autocommit, second.autocommit) == (True, True)
        assert not first.closed
    assert first.closed
    assert second.closed


async def test_workflows_are_listed_with_their_size_and_runs(store: Store, db: Connection) -> None:
    assert await store.list_workflows() == []
    define(db, "chain", CHAIN)
    define(db, "bare", {})
    await store.create_run("chain", "{}", uuid4())
    await store.create_run("chain", "{}", cancelled := uuid4())
    await store.cancel_run(cancelled, "enough")
    assert await store.list_slugs() == ["bare", "chain"]
    assert await store.list_workflows() == [
        WorkflowSummary(slug="bare", steps=0, deps=0, pending=0, completed=0, failed=0, enabled=None),
        WorkflowSummary(slug="chain", steps=3, deps=2, pending=1, completed=0, failed=1, enabled=None),
    ]


async def test_a_definition_has_the_rows_of_the_tables(store: Store, db: Connection) -> None:
    define(db, "other", {"z": [], "a": ["z"]})
    define(db, "diamond", DIAMOND)
    define(db, "bare", {})
    definition = await store.load_definition("diamond")
    assert (definition.slug, definition.steps) == ("diamond", ("a", "b", "c", "d"))
    assert definition.deps == (Dep("a", "b"), Dep("a", "c"), Dep("b", "d"), Dep("c", "d"))
    bare = await store.load_definition("bare")
    assert (bare.steps, bare.deps) == ((), ())


async def test_an_unknown_workflow_is_told_with_the_nearest(store: Store, db: Connection) -> None:
    with pytest.raises(UnknownWorkflowError, match=r"unknown workflow 'mails'; there is none yet"):
        await store.load_definition("mails")
    define(db, "campaign", CHAIN)
    with pytest.raises(UnknownWorkflowError, match=r"unknown workflow 'campain' \(did you mean 'campaign'\?\)"):
        await store.load_definition("campain")
    with pytest.raises(UnknownWorkflowError, match=r"'xyz'; `pgflow-prefect list` shows all"):
        await store.load_definition("xyz")


async def test_a_run_keeps_the_definition_that_it_began_with(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    await store.create_run("chain", "{}", run_id := uuid4())
    before = await store.load_definition("chain")
    db.execute("INSERT INTO pgflow.steps VALUES ('chain', 'new')")
    assert await store.load_run_definition(run_id) == before
    assert (await store.load_definition("chain")).steps == ("a", "b", "c", "new")


async def test_a_run_that_nothing_was_done_to_has_the_current_definition(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id = uuid4()
    db.execute("INSERT INTO pgflow.runs (workflow_slug, id, payload) VALUES ('chain', %s, '{}')", [run_id])
    assert await store.load_run_definition(run_id) == await store.load_definition("chain")


@pytest.mark.parametrize("payload", ['{"n": [1, null]}', "null", '"text"', "0"])
async def test_a_run_is_created_with_any_json(store: Store, db: Connection, payload: str) -> None:
    define(db, "chain", CHAIN)
    await store.create_run("chain", payload, run_id := uuid4())
    run = await store.read_run(run_id, with_payload=True)
    assert run.created_at is not None
    assert run == Run(
        id=run.id,
        workflow_slug="chain",
        status=Status.PENDING,
        payload=RawJson(payload),
        epoch=1,
        remaining=3,
        steps=3,
        error_message=None,
        created_at=run.created_at,
        finished_at=None,
        held_by="the tests",
        held=Held.LEASED,
        is_older=True,
    )
    assert [state.step_slug for state in await store.list_step_states(run.id)] == ["a"]


async def test_the_same_id_again_makes_no_second_run(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id = uuid4()
    assert await store.create_run("chain", '"first"', run_id, FLOW_RUN) == 1
    assert await store.create_run("chain", '"second"', run_id, FLOW_RUN) == 2
    (run,) = await store.list_runs(with_payload=True)
    assert decode(run.payload) == "first"


@pytest.mark.parametrize(
    ("workflow", "message"), [("unknown", 'unknown workflow "unknown"'), ("bare", 'workflow "bare" has no steps. Ins')]
)
async def test_a_run_that_can_t_be_is_refused(store: Store, db: Connection, workflow: str, message: str) -> None:
    define(db, "bare", {})
    with pytest.raises(UsageError, match=message):
        await store.create_run(workflow, "{}", uuid4())


async def test_runs_are_listed_newest_first(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    define(db, "other", CHAIN)
    ids = [uuid4(), uuid4(), uuid4()]
    for workflow, run_id in zip(("chain", "other", "chain"), ids, strict=True):
        await store.create_run(workflow, "{}", run_id)
    await store.cancel_run(ids[0], "enough")
    epoch = await store.create_run("other", "{}", failed := uuid4())
    assert epoch is not None
    assert await store.fail_run(failed, epoch, "cancelled, says the carrier")

    async def list_ids(**filters: Any) -> list[UUID]:
        return [run.id for run in await store.list_runs(**filters)]

    assert await list_ids() == [failed, *ids[::-1]]
    assert await list_ids(limit=1) == [failed]
    assert await list_ids(workflow_slug="chain") == [ids[2], ids[0]]
    assert await list_ids(status=Status.FAILED) == [failed, ids[0]]
    assert await list_ids(status=Ending.CANCELLED) == [ids[0]]
    assert await list_ids(workflow_slug="chain", status=Status.FAILED) == [ids[0]]
    assert await list_ids(workflow_slug="other", status=Ending.CANCELLED) == []


async def test_taking_a_run_raises_its_epoch_and_names_its_flow_run(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    await store.create_run("chain", "{}", run_id := uuid4())
    assert (await store.read_run(run_id)).flow_run_id is None
    assert await store.take_run(run_id, FLOW_RUN) == 2
    other = uuid4()
    with pytest.raises(RunHeldError, match=f"run {run_id} is held by the tests"):
        await store.take_run(run_id, other)
    assert await store.take_run(run_id, other, force=True) == 3
    run = await store.read_run(run_id)
    assert (run.epoch, run.flow_run_id) == (3, other)
    assert (await store.list_runs())[0] == run.model_copy(update={"is_older": False}), "a list does not look at that"


async def test_an_unknown_run_is_told(store: Store) -> None:
    unknown = uuid4()
    for read in (store.read_run, store.load_run_definition, partial(store.read_end, step_slugs=["a"])):
        with pytest.raises(UnknownRunError, match=f"unknown run {unknown}; `pgflow-prefect runs` shows the newest"):
            await read(unknown)
    for change in (store.reopen_run, store.repair_run):
        with pytest.raises(UsageError, match=f"unknown run {unknown}"):
            await change(unknown)
    assert await store.list_step_states(unknown) == []
    assert await store.read_results(unknown, ["a"]) == {}


async def test_a_database_without_the_schema_says_how_to_get_it(
    empty_dsn: str, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_DSN", empty_dsn)
    with pytest.raises(SchemaMissingError, match="no schema pgflow and pgflow_prefect: run `pgflow-prefect init`"):
        async with open_store(Settings()):
            pass
    monkeypatch.setenv("PGFLOW_DSN", dsn)
    async with open_store(Settings()) as opened:
        assert await opened.list_slugs() == []


async def test_a_database_that_does_not_say_what_its_text_means_is_refused(
    server_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"no_encoding_{uuid4().hex[:8]}"
    create = "CREATE DATABASE {} ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    execute(server_dsn, sql.SQL(create).format(sql.Identifier(name)))
    try:
        monkeypatch.setenv("PGFLOW_DSN", make_conninfo(server_dsn, dbname=name))
        with pytest.raises(PgflowPrefectError, match=f"'{name}' has the encoding SQL_ASCII.*ENCODING 'UTF8'"):
            async with open_store(Settings()):
                pass
    finally:
        execute(server_dsn, sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))
