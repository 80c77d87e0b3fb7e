"""The statements of pgflow's first README, word for word, and what they have always returned."""

from uuid import UUID

import pytest

from tests.conftest import Connection
from tests.engine import finish, get_run, start_step, statuses, value


@pytest.fixture
def readme_db(db: Connection) -> Connection:
    """A database in which the README's first three sections have been carried out."""
    db.execute("INSERT INTO pgflow.workflows (slug) VALUES ('my_workflow');")
    db.execute("""
        INSERT INTO pgflow.steps (workflow_slug, slug) VALUES
          ('my_workflow', 'step_one'),
          ('my_workflow', 'step_two'),
          ('my_workflow', 'step_three');
    """)
    db.execute("""
        -- step_two depends on step_one
        INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
          ('my_workflow', 'step_one', 'step_two');

        -- step_three depends on step_two
        INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
          ('my_workflow', 'step_two', 'step_three');
    """)
    return db


@pytest.fixture
def run_id(readme_db: Connection) -> UUID:
    rows = readme_db.execute("""SELECT * FROM pgflow.run_workflow('my_workflow', '{"key": "value"}');""").fetchall()
    [run_id] = [row[1] for row in rows]
    assert isinstance(run_id, UUID)
    return run_id


def columns(db: Connection, statement: bytes) -> list[str]:
    cursor = db.execute(statement)
    return [column.name for column in cursor.description or []]


def test_running_a_workflow_returns_its_pending_run(readme_db: Connection, run_id: UUID) -> None:
    run = get_run(readme_db, run_id)
    assert (run.workflow_slug, run.status, run.payload) == ("my_workflow", "pending", {"key": "value"})


def test_a_new_run_has_a_state_for_its_root_steps_only(readme_db: Connection, run_id: UUID) -> None:
    assert statuses(readme_db, run_id) == {"step_one": "pending"}


def test_the_first_columns_of_a_run_are_the_seeds(readme_db: Connection) -> None:
    names = columns(readme_db, b"""SELECT * FROM pgflow.run_workflow('my_workflow', '{"key": "value"}');""")
    assert names[:4] == ["workflow_slug", "id", "status", "payload"]


def test_the_first_columns_of_a_step_state_are_the_seeds(readme_db: Connection, run_id: UUID) -> None:
    seed = ["workflow_slug", "run_id", "step_slug", "status", "step_result"]
    started = f"SELECT * FROM pgflow.start_step('{run_id}', 'step_one');"  # noqa: S608  as a user types it
    completed = f"""SELECT * FROM pgflow.complete_step('{run_id}', 'step_one', '{{"result": "data"}}');"""  # noqa: S608
    assert columns(readme_db, started.encode())[:5] == seed
    assert columns(readme_db, completed.encode())[:5] == seed


def test_completing_a_step_stores_its_result_and_starts_the_next(readme_db: Connection, run_id: UUID) -> None:
    statement = """SELECT * FROM pgflow.complete_step(%s, 'step_one', '{"result": "data"}');"""
    [row] = readme_db.execute(statement, [run_id]).fetchall()
    assert row[:5] == ("my_workflow", run_id, "step_one", "completed", {"result": "data"})
    assert statuses(readme_db, run_id) == {"step_one": "completed", "step_two": "pending"}


def test_unmet_deps_are_those_not_completed(readme_db: Connection, run_id: UUID) -> None:
    assert value(readme_db, "SELECT pgflow.has_unmet_deps(%s, 'step_one');", run_id) is False
    assert value(readme_db, "SELECT pgflow.has_unmet_deps(%s, 'step_two');", run_id) is True
    readme_db.execute("SELECT pgflow.complete_step(%s, 'step_one', '{}')", [run_id])
    assert value(readme_db, "SELECT pgflow.has_unmet_deps(%s, 'step_two');", run_id) is False
    assert value(readme_db, "SELECT pgflow.has_unmet_deps(%s, 'step_three');", run_id) is True


def test_starting_a_step_that_is_started_returns_it_as_it_is(readme_db: Connection, run_id: UUID) -> None:
    readme_db.execute("SELECT pgflow.complete_step(%s, 'step_one', '1')", [run_id])
    assert start_step(readme_db, run_id, "step_one").status == "completed"
    assert start_step(readme_db, run_id, "step_two").status == "pending"


def test_a_run_completes_with_its_last_step(readme_db: Connection, run_id: UUID) -> None:
    assert finish(readme_db, run_id) == ["step_one", "step_two", "step_three"]
    run = get_run(readme_db, run_id)
    assert (run.status, run.remaining) == ("completed", 0)
    assert run.finished_at is not None


def test_the_readmes_email_campaign_runs(db: Connection) -> None:
    db.execute("INSERT INTO pgflow.workflows (slug) VALUES ('email_campaign');")
    db.execute("""
        INSERT INTO pgflow.steps (workflow_slug, slug) VALUES
          ('email_campaign', 'prepare_list'),
          ('email_campaign', 'send_emails'),
          ('email_campaign', 'generate_report');
    """)
    db.execute("""
        -- 'send_emails' depends on 'prepare_list'
        INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
          ('email_campaign', 'prepare_list', 'send_emails');

        -- 'generate_report' depends on 'send_emails'
        INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
          ('email_campaign', 'send_emails', 'generate_report');
    """)
    run_id = value(db, """SELECT id FROM pgflow.run_workflow('email_campaign', '{"campaign_id": 123}');""")
    assert isinstance(run_id, UUID)
    db.execute("""SELECT * FROM pgflow.complete_step(%s, 'prepare_list', '{"success": true}');""", [run_id])
    assert finish(db, run_id) == ["send_emails", "generate_report"]
    assert get_run(db, run_id).status == "completed"
