"""A role without ownership works right after an upgrade: what `init` makes anew, it may use as what it used before."""

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgflow_prefect.database.connection import connect as connect_product
from pgflow_prefect.database.schema import install_schema
from pgflow_prefect.database.store import open_store
from pgflow_prefect.models import Claim, ClaimRequest, Completion, Report, TaskElement, TaskKey
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import define, get_run, run_workflow
from tests.former import COMMITS, grant_former_roles, install_former
from tests.integration.supabase import borrowed_roles, create_role

pytestmark = pytest.mark.anyio

RIGHTS = """
    GRANT USAGE ON SCHEMA {schema} TO {role};
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role};
    GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {role};
"""


@pytest.fixture
def roles(server_dsn: str, empty_dsn: str) -> Iterator[None]:
    """The roles of the kit, which belong to the whole server."""
    with borrowed_roles(server_dsn, empty_dsn):
        yield


async def init(dsn: str) -> None:
    async with await connect_product(dsn, timeout=10) as connection:
        await install_schema(connection)


def grant(db: Connection, dsn: str, commit: str, whose: str) -> str:
    """Grant what it takes to work in a database of a former version, and return the role that has it."""
    if whose == "the kit":
        grant_former_roles(dsn, commit)
        return "pgflow_work"
    role = create_role(db)
    for schema in ("pgflow", "pgflow_prefect"):
        db.execute(sql.SQL(RIGHTS).format(schema=sql.Identifier(schema), role=sql.Identifier(role)))
    return role


@pytest.mark.thorough
@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize(
    ("version", "whose"), [((5, 9), "the kit"), ((5, 9), "a user"), ((4, 8), "the kit"), ((2, 6), "a user")], ids=str
)
async def test_a_role_takes_and_completes_a_run_right_after_an_upgrade(
    version: tuple[int, int], whose: str, empty_dsn: str
) -> None:
    install_former(empty_dsn, COMMITS[version])
    with psycopg.connect(empty_dsn, autocommit=True) as db:
        role = grant(db, empty_dsn, COMMITS[version], whose)
        define(db, "chain", {"a": [], "b": ["a"]})
        db.execute("SELECT pgflow_prefect.enable_workflow('chain')")
        await init(empty_dsn)
        run_id = run_workflow(db, "chain", {}).id
        as_role = Settings.model_validate({"dsn": make_conninfo(empty_dsn, options=f"-c role={role}")})
        async with open_store(as_role) as store:
            await store.expire_dead_holders()
            [taken] = await store.take_runs(["chain"], 10)
            assert taken.run_id == run_id
            flow_run_id = uuid4()
            assert await store.link_flow_run(run_id, taken.epoch, flow_run_id, queued=False)
            assert await store.extend_leases([(run_id, taken.epoch)]) == [(run_id, taken.epoch, "held")]
            for step in ("a", "b"):
                [claim] = await store.perform_tasks(
                    [
                        TaskElement(
                            run_id, taken.epoch, ClaimRequest(TaskKey(step), flow_run_id, None, with_payload=True)
                        )
                    ]
                )
                assert isinstance(claim, Claim)
                completion = Completion(TaskKey(step), "1", claim.attempt, flow_run_id)
                [report] = await store.perform_tasks([TaskElement(run_id, taken.epoch, completion)])
                assert isinstance(report, Report)
                assert report.status == "completed"
            assert (await store.read_end(run_id, ["b"])).status == "completed"
            assert await store.take_runs(["chain"], 10) == []
        assert get_run(db, run_id).status == "completed"
        check_other_work(db, role)


def check_other_work(db: Connection, role: str) -> None:
    """Check what else a worker does as this role: a run with a child, and one that can't be noted."""
    db.execute("INSERT INTO pgflow.workflows (slug) VALUES ('parent')")
    db.execute("INSERT INTO pgflow.steps (workflow_slug, slug, child_workflow) VALUES ('parent', 'run', 'chain')")
    db.execute("SELECT pgflow_prefect.enable_workflow('parent')")
    parent = run_workflow(db, "parent", {}).id
    held = run_workflow(db, "chain", {}).id
    db.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    try:
        [epoch] = db.execute(
            "SELECT pgflow_prefect.take_run(%s, gen_random_uuid(), 'me', 60, 3)", [held]
        ).fetchone() or (None,)
        assert db.execute(
            "SELECT pgflow_prefect.put_off_held_run(%s, %s, 'a', 'a trigger')", [held, epoch]
        ).fetchone() == (True,)
        db.execute("SELECT pgflow_prefect.take_run(%s, gen_random_uuid(), 'me', 60, 3)", [parent])
        db.execute("SELECT pgflow_prefect.fail_run(%s, 1, 'me', 'no stock')", [parent])
        db.execute("SELECT pgflow_prefect.move_children(10)")
    finally:
        db.execute("RESET ROLE")
