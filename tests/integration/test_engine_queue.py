"""A user's trigger puts steps on a queue, and plain workers empty it: no Prefect, no adapter."""

from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest

from tests.conftest import Connect, Connection
from tests.engine import DIAMOND, complete, define, fail, get_run, reopen, run_workflow, start_run, statuses, value

QUEUE = """
    CREATE TABLE queue (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, run_id uuid, step_slug text);
    CREATE FUNCTION put_on_queue() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO public.queue (run_id, step_slug) VALUES (NEW.run_id, NEW.step_slug); RETURN NULL; END $$;
"""
ON_INSERT = """
    CREATE TRIGGER put_on_queue AFTER INSERT ON pgflow.step_states
    FOR EACH ROW EXECUTE FUNCTION put_on_queue();
"""
ON_INSERT_OR_REOPENING = """
    CREATE TRIGGER put_on_queue AFTER INSERT OR UPDATE OF status ON pgflow.step_states
    FOR EACH ROW WHEN (NEW.status = 'pending') EXECUTE FUNCTION put_on_queue();
"""
FETCH = """
    DELETE FROM queue WHERE id = (SELECT id FROM queue ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 1)
    RETURNING run_id, step_slug
"""


@pytest.fixture(params=[ON_INSERT, ON_INSERT_OR_REOPENING], ids=["insert", "insert or reopening"])
def queue(request: pytest.FixtureRequest, db: Connection) -> Connection:
    """A database with the queue, and the plainer or the fuller of the two triggers."""
    db.execute(QUEUE)
    db.execute(request.param)
    return db


def fetch(connection: Connection) -> tuple[UUID, str] | None:
    fetched = connection.execute(FETCH).fetchone()
    if fetched is None:
        return None
    run_id, step = fetched
    assert isinstance(run_id, UUID)
    return run_id, str(step)


def work(connection: Connection) -> list[tuple[UUID, str]]:
    """Fetch and complete steps, until no run is pending; return what was done."""
    done: list[tuple[UUID, str]] = []
    while value(connection, "SELECT EXISTS (SELECT FROM pgflow.runs WHERE status = 'pending')"):
        with connection.transaction():
            if task := fetch(connection):
                complete(connection, *task)
                done.append(task)
    return done


def test_each_step_is_on_the_queue_exactly_once(queue: Connection) -> None:
    run_id = start_run(queue, "diamond", DIAMOND)
    assert work(queue) == [(run_id, step) for step in "abcd"]
    assert get_run(queue, run_id).status == "completed"


def test_several_workers_share_several_runs(queue: Connection, connect: Connect) -> None:
    define(queue, "diamond", DIAMOND)
    runs = [run_workflow(queue, "diamond").id for _ in range(10)]
    with ThreadPoolExecutor(4) as pool:
        done = [task for tasks in pool.map(work, [connect() for _ in range(4)]) for task in tasks]
    assert sorted(done) == sorted((run_id, step) for run_id in runs for step in "abcd")
    assert {get_run(queue, run_id).status for run_id in runs} == {"completed"}


def test_a_claim_does_not_put_a_step_on_the_queue_again(queue: Connection) -> None:
    run_id = start_run(queue, "one", {"a": []})
    queue.execute("SELECT pgflow.claim_step(%s, 'a')", [run_id])
    assert value(queue, "SELECT count(*) FROM queue") == 1


def test_a_reopened_step_is_on_the_queue_again(db: Connection) -> None:
    db.execute(QUEUE)
    db.execute(ON_INSERT_OR_REOPENING)
    run_id = start_run(db, "diamond", DIAMOND)
    task = fetch(db)
    assert task == (run_id, "a")
    fail(db, *task)
    assert fetch(db) is None
    reopen(db, run_id)
    assert [step for _, step in work(db)] == ["a", "b", "c", "d"]
    assert statuses(db, run_id) == dict.fromkeys("abcd", "completed")
