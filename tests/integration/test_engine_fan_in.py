"""A step that waits for several: it starts whatever the timing, exactly once, and however many they are."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from uuid import UUID

from tests.conftest import Connect, Connection
from tests.engine import complete, define, finish, get_run, run_workflow, start_run, statuses, value, waiting

WORKERS = 8
ROUNDS = 200
UPSTREAMS = [f"up{number}" for number in range(WORKERS)]


def complete_together(connect: Connect, runs: list[UUID]) -> None:
    """Complete all upstream steps of each run at the same moment, one connection each."""
    barrier = Barrier(WORKERS)

    def work(step: str) -> None:
        connection = connect()
        for run_id in runs:
            barrier.wait()
            complete(connection, run_id, step)

    with ThreadPoolExecutor(WORKERS) as pool:
        for task in [pool.submit(work, step) for step in UPSTREAMS]:
            task.result()


def count_inserts(db: Connection) -> None:
    """Note each start of a step in a table."""
    db.execute("""
        CREATE TABLE starts (run_id uuid, step_slug text);
        CREATE FUNCTION note_start() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN INSERT INTO public.starts VALUES (NEW.run_id, NEW.step_slug); RETURN NULL; END $$;
        CREATE TRIGGER note_start AFTER INSERT ON pgflow.step_states FOR EACH ROW EXECUTE FUNCTION note_start();
    """)


def test_a_join_starts_exactly_once_when_all_its_upstreams_finish_at_the_same_moment(
    db: Connection, connect: Connect
) -> None:
    define(db, "wide", dict.fromkeys(UPSTREAMS, ()) | {"join": UPSTREAMS})
    count_inserts(db)
    runs = [run_workflow(db, "wide").id for _ in range(ROUNDS)]
    complete_together(connect, runs)
    started = "SELECT count(*), count(DISTINCT run_id) FROM starts WHERE step_slug = 'join'"
    assert db.execute(started).fetchone() == (ROUNDS, ROUNDS)
    assert value(db, "SELECT count(*) FROM pgflow.waiting_steps") == 0
    assert {get_run(db, run_id).remaining for run_id in runs} == {1}


def test_two_joins_over_the_same_upstreams_both_start(db: Connection, connect: Connect) -> None:
    define(db, "wide", dict.fromkeys(UPSTREAMS, ()) | {"first": UPSTREAMS, "second": UPSTREAMS[::-1]})
    runs = [run_workflow(db, "wide").id for _ in range(20)]
    complete_together(connect, runs)
    assert all(finish(db, run_id) == ["first", "second"] for run_id in runs)


def test_a_join_waits_for_its_last_upstream(db: Connection) -> None:
    run_id = start_run(db, "join", {"a": [], "b": [], "c": [], "d": ["a", "b", "c"]})
    complete(db, run_id, "a")
    assert waiting(db, run_id) == {"d": 2}
    complete(db, run_id, "c")
    assert "d" not in statuses(db, run_id)
    assert waiting(db, run_id) == {"d": 1}
    complete(db, run_id, "b")
    assert statuses(db, run_id)["d"] == "pending"
    assert waiting(db, run_id) == {}
