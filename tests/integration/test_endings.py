"""How a run ended, where its status does not say it; also in a database that an older version has made."""

from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from pgflow_prefect.database.schema import read_scripts
from tests.conftest import Connection
from tests.engine import CHAIN, cancel, complete, define, fail, get_run, get_state, run_workflow, value

# What the script of version 2 had, so far as it concerns endings.
OLDER = """
DROP FUNCTION pgflow.fail_run(uuid, text), pgflow.break_off_run(uuid, text, pgflow.ending),
    pgflow.end_run(pgflow.runs, text, pgflow.ending);
ALTER TABLE pgflow.runs DROP COLUMN ended_as;
ALTER TABLE pgflow.step_states DROP COLUMN ended_as;
DROP TYPE pgflow.ending;
"""
FORMER_FUNCTIONS = """
CREATE OR REPLACE FUNCTION pgflow.engine_version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2';
CREATE OR REPLACE FUNCTION pgflow_prefect.adapter_version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 6';
"""


@pytest.fixture
def older(db: Connection) -> Connection:
    """A database of the former version, with runs that ended in every way."""
    define(db, "chain", CHAIN)
    return db


def end_by_hand(db: Connection, reason: str, *, step_reason: str | None) -> UUID:
    """End a run as the former version wrote it."""
    run_id = run_workflow(db, "chain").id
    db.execute(
        "UPDATE pgflow.runs SET status = 'failed', error_message = %s, finished_at = now() WHERE id = %s",
        [reason, run_id],
    )
    if step_reason is not None:
        db.execute(
            "UPDATE pgflow.step_states SET status = 'failed', error_message = %s WHERE run_id = %s",
            [step_reason, run_id],
        )
    return run_id


def upgrade(db: Connection) -> None:
    db.execute(OLDER + FORMER_FUNCTIONS)
    db.execute(read_scripts().encode())


@pytest.mark.parametrize(
    ("reason", "step_reason", "ended_as"),
    [
        ("cancelled", "cancelled", "cancelled"),
        ("cancelled: wrong list", "cancelled: wrong list", "cancelled"),
        ("cancelled in Prefect", None, "cancelled"),
        ("changed our mind", "changed our mind", "cancelled"),
        ('step "a" failed: cancelled', "cancelled", None),
        ('step "a" failed: broken', "broken", None),
        ("given up: 4 owners in a row have vanished", "given up: 4 owners in a row have vanished", None),
        ("written by hand", "another reason", None),
        ("written by hand", None, None),
    ],
)
def test_an_upgrade_notes_which_runs_were_cancelled_as_far_as_they_can_be_told(
    older: Connection, reason: str, step_reason: str | None, ended_as: str | None
) -> None:
    run_id = end_by_hand(older, reason, step_reason=step_reason)
    upgrade(older)
    assert get_run(older, run_id).ended_as == ended_as
    assert get_state(older, run_id, "a").ended_as == (ended_as if step_reason is not None else None)


def test_an_upgrade_does_not_take_what_this_product_gave_up_for_cancelled(older: Connection) -> None:
    run_id = end_by_hand(older, "its handlers do not fit", step_reason="its handlers do not fit")
    older.execute(
        "INSERT INTO pgflow_prefect.owners (run_id, epoch, held_by, lease_until, given_up_in) "
        "VALUES (%s, 0, 'the tests', '-infinity', 0)",
        [run_id],
    )
    upgrade(older)
    assert (get_run(older, run_id).ended_as, get_state(older, run_id, "a").ended_as) == (None, None)


REACT = """
    CREATE TABLE reactions (what text);
    CREATE FUNCTION react() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO reactions VALUES (TG_NAME); RETURN NEW; END $$;
    CREATE TRIGGER usual AFTER UPDATE ON pgflow.runs FOR EACH ROW EXECUTE FUNCTION react();
    CREATE TRIGGER always BEFORE UPDATE ON pgflow.step_states FOR EACH ROW EXECUTE FUNCTION react();
    ALTER TABLE pgflow.step_states ENABLE ALWAYS TRIGGER always;
    CREATE TRIGGER off AFTER UPDATE ON pgflow.step_states FOR EACH ROW EXECUTE FUNCTION react();
    ALTER TABLE pgflow.step_states DISABLE TRIGGER off;
    CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON pgflow.runs DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION react();
    CREATE RULE noted AS ON UPDATE TO pgflow.runs DO ALSO INSERT INTO reactions VALUES ('noted');
"""
REACTIONS = """
    SELECT tgname::text, tgenabled::text FROM pg_trigger
    WHERE tgrelid IN ('pgflow.runs'::regclass, 'pgflow.step_states'::regclass) AND NOT tgisinternal
    UNION ALL SELECT rulename, ev_enabled::text FROM pg_rewrite WHERE ev_class = 'pgflow.runs'::regclass ORDER BY 1
"""


def test_no_trigger_or_rule_reacts_to_the_note_and_each_is_afterwards_as_before(older: Connection) -> None:
    cancelled = end_by_hand(older, "cancelled", step_reason="cancelled")
    given_up = end_by_hand(older, "its handlers do not fit", step_reason="its handlers do not fit")
    older.execute(
        "INSERT INTO pgflow_prefect.owners (run_id, epoch, held_by, lease_until, given_up_in) "
        "VALUES (%s, 0, 'the tests', '-infinity', 0)",
        [given_up],
    )
    older.execute(REACT)
    before = older.execute(REACTIONS).fetchall()
    upgrade(older)
    assert (get_run(older, cancelled).ended_as, get_run(older, given_up).ended_as) == ("cancelled", None)
    assert value(older, "SELECT count(*) FROM reactions") == 0
    assert older.execute(REACTIONS).fetchall() == before


def test_a_constraint_that_refuses_the_note_does_not_keep_the_upgrade_from_its_end(older: Connection) -> None:
    run_id = end_by_hand(older, "cancelled", step_reason="cancelled")
    older.execute("ALTER TABLE pgflow.runs ADD CONSTRAINT mine CHECK (status <> 'failed') NOT VALID")
    said: list[str | None] = []
    older.add_notice_handler(lambda notice: said.append(notice.message_primary))
    upgrade(older)
    assert [text and text.partition(": ")[0] for text in said] == [
        "which runs were cancelled before this upgrade can't be noted"
    ]
    assert get_run(older, run_id).ended_as is None


@pytest.mark.parametrize(
    ("reason", "ended_as"),
    [('step "a" failed: broken', None), ("given up: 4 owners", None), ("changed our mind", "cancelled")],
)
def test_an_upgrade_takes_back_a_note_that_the_former_functions_have_outlived(
    db: Connection, reason: str, ended_as: str | None
) -> None:
    define(db, "chain", CHAIN)
    run_id = run_workflow(db, "chain").id
    cancel(db, run_id, "changed our mind")
    db.execute(FORMER_FUNCTIONS)
    db.execute("UPDATE pgflow.runs SET error_message = %s WHERE id = %s", [reason, run_id])
    db.execute(read_scripts().encode())
    assert (get_run(db, run_id).ended_as, get_state(db, run_id, "a").ended_as) == (ended_as, ended_as)


def test_a_role_that_wrote_single_columns_can_go_on_after_the_upgrade(older: Connection) -> None:
    role = sql.Identifier(f"worker_of_{value(older, 'SELECT current_database()')}")
    older.execute(sql.SQL("CREATE ROLE {}").format(role))
    run_id, cancelled = run_workflow(older, "chain").id, run_workflow(older, "chain").id
    try:
        older.execute(
            sql.SQL(
                "GRANT USAGE ON SCHEMA pgflow TO {0}; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgflow TO {0}; "
                "GRANT SELECT ON ALL TABLES IN SCHEMA pgflow TO {0}; "
                "GRANT INSERT, DELETE ON pgflow.waiting_steps TO {0}; "
                "GRANT UPDATE (status, error_message, finished_at, remaining) ON pgflow.runs TO {0}; "
                "GRANT UPDATE (status, error_message, finished_at, step_result), INSERT ON pgflow.step_states TO {0}"
            ).format(role)
        )
        upgrade(older)
        older.execute(sql.SQL("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgflow TO {0}; SET ROLE {0}").format(role))
        complete(older, run_id, "a")
        fail(older, run_id, "b")
        assert cancel(older, cancelled).ended_as == "cancelled"
    finally:
        older.execute("RESET ROLE")
        older.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def test_an_ending_that_a_status_by_hand_has_outlived_does_not_count(db: Connection) -> None:
    define(db, "chain", CHAIN)
    run_id = run_workflow(db, "chain").id
    cancel(db, run_id)
    db.execute("UPDATE pgflow.step_states SET status = 'pending' WHERE run_id = %s", [run_id])
    db.execute("UPDATE pgflow.runs SET status = 'pending' WHERE id = %s", [run_id])
    fail(db, run_id, "a")
    assert (get_run(db, run_id).ended_as, get_state(db, run_id, "a").ended_as) == (None, None)


def test_the_ending_takes_no_word_that_means_nothing(db: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        db.execute("UPDATE pgflow.runs SET ended_as = 'canceled'")
