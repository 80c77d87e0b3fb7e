"""Making a stored definition another one: all that differs or nothing, and never over another session's edit."""

from typing import LiteralString

import anyio
import pytest

from pgflow_prefect.database.pruning import ANY_AGE
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.errors import DefinitionChangedError, PgflowPrefectError, UsageError
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, DIAMOND, cancel, complete, define, finish, run_workflow, start_run, statuses, value
from tests.unit import definitions

pytestmark = pytest.mark.anyio

CHAINED = definitions.define(CHAIN, "chain")
EDITED = definitions.define({"a": [], "b": [], "d": ["a", "b"]}, "chain")
SHORTENED = definitions.define({"a": [], "b": ["a"]}, "chain")

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
VERSION = "SELECT version FROM pgflow.workflows WHERE slug = 'chain'"
WRITERS = """
SELECT slug, xmin::text FROM pgflow.steps WHERE workflow_slug = 'chain'
UNION ALL
SELECT from_step_slug || ' -> ' || to_step_slug, xmin::text FROM pgflow.deps WHERE workflow_slug = 'chain'
"""


async def is_stored(store: Store, definition: WorkflowDefinition) -> bool:
    return (await store.load_definition(definition.slug)).definition_hash == definition.definition_hash


async def replace_behind(
    store: Store, connect: Connect, edit: LiteralString, old: WorkflowDefinition | None, new: WorkflowDefinition
) -> PgflowPrefectError | None:
    """Replace a definition while another transaction edits it, which commits as soon as it is waited for.

    Returns what the replacement was refused with.
    """
    editor, watcher = connect(), connect()
    refused: list[PgflowPrefectError] = []

    async def replace() -> None:
        try:
            await store.replace_definition(old, new)
        except PgflowPrefectError as error:
            refused.append(error)

    with anyio.fail_after(180):
        async with anyio.create_task_group() as tasks:
            with editor.transaction():
                editor.execute(edit)
                tasks.start_soon(replace)
                while value(watcher, WAITING) == 0:
                    await anyio.sleep(0.01)
    return refused[0] if refused else None


async def test_a_new_workflow_is_written(store: Store) -> None:
    await store.replace_definition(None, CHAINED)
    assert await is_stored(store, CHAINED)


async def test_what_is_the_same_already_costs_no_statement(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    with anyio.fail_after(180), db.transaction():
        db.execute("LOCK TABLE pgflow.workflows, pgflow.steps, pgflow.deps")  # not even a look would pass
        await store.replace_definition(CHAINED, CHAINED)


async def test_only_what_differs_is_written_and_in_one_transaction(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    define(db, "diamond", DIAMOND)
    before = {str(row): str(writer) for row, writer in db.execute(WRITERS)}
    version = value(db, VERSION)

    await store.replace_definition(CHAINED, EDITED)

    after = {str(row): str(writer) for row, writer in db.execute(WRITERS)}
    assert await is_stored(store, EDITED)
    assert {row: after[row] for row in ("a", "b")} == {row: before[row] for row in ("a", "b")}
    assert len({after[row] for row in ("d", "a -> d", "b -> d")} - {*before.values()}) == 1
    assert value(db, VERSION) == int(str(version)) + 1
    assert await is_stored(store, definitions.define(DIAMOND, "diamond"))


async def test_a_dep_may_turn_round(store: Store) -> None:
    await store.replace_definition(None, CHAINED)
    turned = definitions.define({"c": [], "b": ["c"], "a": ["b"]}, "chain")
    await store.replace_definition(CHAINED, turned)
    assert await is_stored(store, turned)


async def test_a_cycle_is_refused_as_a_whole(store: Store) -> None:
    await store.replace_definition(None, CHAINED)
    with pytest.raises(UsageError, match='workflow "chain" has a cycle: a -> b -> a'):
        await store.replace_definition(CHAINED, definitions.define({"a": ["b"], "b": ["a"], "d": []}, "chain"))
    assert await is_stored(store, CHAINED)


async def test_a_run_keeps_the_definition_that_it_began_with(store: Store, db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    longer = definitions.define({**CHAIN, "d": ["a"], "b": []}, "chain")
    await store.replace_definition(CHAINED, longer)
    assert finish(db, run_id) == ["a", "b", "c"]
    assert statuses(db, run_workflow(db, "chain").id) == {"a": "pending", "b": "pending"}


async def test_a_step_that_a_pending_run_has_yet_to_start_stays_and_all_else_with_it(
    store: Store, db: Connection
) -> None:
    run_id = start_run(db, "chain", CHAIN)
    with pytest.raises(PgflowPrefectError, match=f'step "c" .* can\'t be deleted: run {run_id} is pending') as refused:
        await store.replace_definition(CHAINED, EDITED)
    assert str(refused.value).endswith(f"end it with `pgflow-prefect cancel {run_id}`")
    assert await is_stored(store, CHAINED)

    cancel(db, run_id)
    await store.replace_definition(CHAINED, SHORTENED)
    assert await is_stored(store, SHORTENED)


async def test_a_step_that_a_run_has_executed_stays_as_long_as_its_state(store: Store, db: Connection) -> None:
    finish(db, start_run(db, "chain", CHAIN))
    with pytest.raises(PgflowPrefectError, match=r"'chain' can't be removed.*\(chain, c\) is still referenced.*step_s"):
        await store.replace_definition(CHAINED, SHORTENED)
    assert await is_stored(store, CHAINED)

    db.execute("DELETE FROM pgflow.step_states WHERE step_slug = 'c'")
    await store.replace_definition(CHAINED, SHORTENED)
    assert await is_stored(store, SHORTENED)


async def test_a_step_can_be_removed_once_the_runs_that_executed_it_are_deleted(store: Store, db: Connection) -> None:
    finish(db, start_run(db, "chain", CHAIN))
    cut = definitions.define({"b": [], "c": ["b"]}, "chain")
    pending = run_workflow(db, "chain").id
    complete(db, pending, "a")
    with pytest.raises(PgflowPrefectError) as refused:
        await store.replace_definition(CHAINED, cut)
    prune = "delete the runs that have ended: `pgflow-prefect prune --workflow chain --any-age`"
    assert str(refused.value).endswith(f"end run {pending} first, `pgflow-prefect cancel {pending}`, and {prune}")

    cancel(db, pending)
    with pytest.raises(PgflowPrefectError) as refused:
        await store.replace_definition(CHAINED, cut)
    assert str(refused.value).endswith(f"Keep the step, or {prune}")
    assert await store.prune_runs(ANY_AGE, at_most=10, workflow_slugs=["chain"]) == 2
    await store.replace_definition(CHAINED, cut)
    assert await is_stored(store, cut)


async def test_a_definition_that_was_edited_since_it_was_read_is_left_alone(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    await store.replace_definition(CHAINED, SHORTENED)
    with pytest.raises(DefinitionChangedError, match="workflow 'chain' was edited by another session"):
        await store.replace_definition(CHAINED, EDITED)
    with pytest.raises(DefinitionChangedError):
        await store.replace_definition(None, EDITED)
    with pytest.raises(DefinitionChangedError):
        await store.replace_definition(definitions.define({}, "gone"), definitions.define({"a": []}, "gone"))
    assert await store.list_slugs() == ["chain"]
    assert await is_stored(store, SHORTENED)


@pytest.mark.parametrize(
    "edit",
    [
        "INSERT INTO pgflow.steps VALUES ('chain', 'x')",
        "DELETE FROM pgflow.deps WHERE workflow_slug = 'chain' AND to_step_slug = 'c'",
    ],
)
async def test_an_edit_under_way_is_waited_for_and_then_seen(
    store: Store, db: Connection, connect: Connect, edit: LiteralString
) -> None:
    define(db, "chain", CHAIN)
    refused = await replace_behind(store, connect, edit, CHAINED, EDITED)
    assert isinstance(refused, DefinitionChangedError)


async def test_of_two_who_create_a_workflow_one_does(store: Store, connect: Connect) -> None:
    created: LiteralString = "INSERT INTO pgflow.workflows VALUES ('chain')"
    refused = await replace_behind(store, connect, created, None, CHAINED)
    assert isinstance(refused, DefinitionChangedError)
    assert (await store.load_definition("chain")).steps == ()


async def test_a_run_that_begins_meanwhile_keeps_its_steps(store: Store, db: Connection, connect: Connect) -> None:
    cancel(db, start_run(db, "chain", CHAIN))
    begin: LiteralString = "SELECT pgflow.run_workflow('chain', '{}')"
    refused = await replace_behind(store, connect, begin, CHAINED, SHORTENED)
    assert "can't be deleted" in str(refused)
    assert await is_stored(store, CHAINED)


async def test_two_who_push_together_do_not_mix(store: Store, db: Connection) -> None:
    define(db, "chain", CHAIN)
    refused = []

    async def push(new: WorkflowDefinition) -> None:
        try:
            await store.replace_definition(CHAINED, new)
        except DefinitionChangedError:
            refused.append(new)

    async with anyio.create_task_group() as tasks:
        for new in (EDITED, SHORTENED):
            tasks.start_soon(push, new)

    [late] = refused
    assert await is_stored(store, SHORTENED if late is EDITED else EDITED)


async def test_a_workflow_that_stays_locked_is_named(
    store: Store, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUERIES, "limit_waiting", QUERIES["limit_waiting"].replace("10s", "50ms"))
    define(db, "chain", CHAIN)
    with db.transaction():
        db.execute("SELECT FROM pgflow.workflows FOR UPDATE")
        with pytest.raises(PgflowPrefectError, match="workflow 'chain' is locked by another transaction"):
            await store.replace_definition(CHAINED, EDITED)
    await store.replace_definition(CHAINED, EDITED)
