"""Runs and step states on Supabase's realtime publication, where there is one."""

from collections.abc import Iterator

import pytest

from tests.conftest import Connection
from tests.engine import column, refused
from tests.integration.supabase import DENIED, become, become_owner, borrowed_roles, read_rights, run_script

PUBLISHED = """
    SELECT tablename FROM pg_publication_tables WHERE pubname = 'supabase_realtime' AND schemaname = 'pgflow' ORDER BY 1
"""


@pytest.fixture(autouse=True)
def roles(server_dsn: str, dsn: str) -> Iterator[None]:
    with borrowed_roles(server_dsn, dsn):
        yield


def test_runs_and_step_states_are_published_once(db: Connection) -> None:
    db.execute("CREATE TABLE public.chats (); CREATE PUBLICATION supabase_realtime FOR TABLE public.chats")
    run_script(db, "realtime")
    assert column(db, PUBLISHED) == ["runs", "step_states"]
    before = read_rights(db)
    run_script(db, "realtime")
    assert read_rights(db) == before
    assert "published chats" in before


def test_what_a_user_published_already_stays_as_it_is(db: Connection) -> None:
    db.execute("CREATE PUBLICATION supabase_realtime FOR TABLE pgflow.runs")
    run_script(db, "realtime")
    assert column(db, PUBLISHED) == ["runs", "step_states"]


@pytest.mark.parametrize(
    ("publication", "notice"),
    [
        (None, "there is no publication supabase_realtime"),
        ("CREATE PUBLICATION supabase_realtime FOR ALL TABLES", "has all tables"),
    ],
)
def test_the_script_says_if_there_is_nothing_to_do(db: Connection, publication: str | None, notice: str) -> None:
    if publication:
        db.execute(publication.encode())
    heard: list[str | None] = []
    db.add_notice_handler(lambda diagnostic: heard.append(diagnostic.message_primary))
    before = read_rights(db)
    run_script(db, "realtime")
    assert read_rights(db) == before
    assert [notice in str(message) for message in heard] == [True]


def test_a_schema_that_is_published_as_a_whole_needs_nothing(db: Connection) -> None:
    if db.info.server_version < 150000:
        pytest.skip("PostgreSQL 15 began to publish schemas: let PGFLOW_TEST_DSN name a newer server")
    db.execute("CREATE PUBLICATION supabase_realtime FOR TABLES IN SCHEMA pgflow")
    before = read_rights(db)
    run_script(db, "realtime")
    assert read_rights(db) == before


def test_the_replica_identity_stays_the_primary_key(db: Connection) -> None:
    db.execute("CREATE PUBLICATION supabase_realtime")
    run_script(db, "realtime")
    identity = (
        "SELECT relreplident FROM pg_class WHERE oid IN ('pgflow.runs'::regclass, 'pgflow.step_states'::regclass)"
    )
    assert column(db, identity) == ["d", "d"]
    db.execute("ALTER PUBLICATION supabase_realtime DROP TABLE pgflow.runs, pgflow.step_states")
    assert column(db, PUBLISHED) == []


def test_an_owner_like_supabases_publishes_by_his_own_rights(db: Connection) -> None:
    owner = become_owner(db, "")
    db.execute("RESET ROLE; CREATE PUBLICATION supabase_realtime")
    become(db, owner)
    with refused(DENIED, f"{owner} can't add pgflow.runs to the publication supabase_realtime"):
        run_script(db, "realtime")
    db.execute(f"ROLLBACK; RESET ROLE; ALTER PUBLICATION supabase_realtime OWNER TO {owner}".encode())
    become(db, owner)
    run_script(db, "realtime")
    assert column(db, PUBLISHED) == ["runs", "step_states"]
