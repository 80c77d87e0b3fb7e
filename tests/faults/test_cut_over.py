"""Steps that go from Prefect to external workers and back all the time, under load: each is done once."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from random import Random
from uuid import uuid4

import psycopg
import pytest

from pgflow_prefect.cli.bind import bind
from tests.acceptance.conftest import CommandLine, Services, wait_until
from tests.conftest import Connection
from tests.engine import column, complete, define, run_workflow, value

RUNS = 80
STEPS = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}
PAUSE = 0.06  # seconds between two runs, and not much more between two changes
BACKLOG = 15  # runs that are pending at most: on a slow machine, too, most are executed while steps are turned over
SHARE = 5  # steps that each side executes at least: a fraction of what it does on any machine so far

HANDLERS = """
import asyncio

from pgflow_prefect import AsyncStepContext, Workflow

workflow = Workflow("SLUG")


async def work(context: AsyncStepContext) -> str:
    await context.connection.execute(
        "INSERT INTO executed VALUES (%s, %s, %s, 'prefect')", [context.run_id, context.step_slug, context.attempt]
    )
    await asyncio.sleep(0.01)
    return context.step_slug


for slug in "abcd":
    workflow.step(slug)(work)
"""


@pytest.fixture
def services(cli: CommandLine) -> Iterator[Services]:
    found = Services(cli)
    yield found
    found.stop()


def work_outside(dsn: str, slug: str, over: threading.Event) -> int:
    """Do what is external until it is over; return how many steps that were."""
    done = 0
    with psycopg.connect(dsn, autocommit=True) as connection:
        while not over.is_set():
            taken = connection.execute(
                "SELECT run_id, step_slug, attempt FROM pgflow_prefect.take_external_steps(%s, NULL, 3, '1 minute')",
                [slug],
            ).fetchall()
            for run_id, step, attempt in taken:
                with connection.transaction():
                    connection.execute("INSERT INTO executed VALUES (%s, %s, %s, 'outside')", [run_id, step, attempt])
                    complete(connection, run_id, step, step, attempt=attempt)
                done += 1
            if not taken:
                over.wait(0.02)
    return done


def turn_over(dsn: str, slug: str, changes: list[str], over: threading.Event) -> int:
    """Bind steps to others and back as the command does, and note how; return how often."""
    random = Random(7)  # noqa: S311
    while not over.is_set():
        how = random.choice(["external", "python", "undo", "remove"])
        try:
            bind(
                slug,
                random.choice("abcd"),
                external=how == "external",
                python=how == "python",
                undo=how == "undo",
                remove=how == "remove",
                dsn=dsn,
                json=True,
            )
            changes.append(how)
        except Exception as error:
            if "has no change to undo" not in str(error):
                raise
        over.wait(PAUSE)
    return len(changes)


@contextmanager
def until_over(*jobs: Callable[[threading.Event], int]) -> Iterator[list[Future[int]]]:
    over = threading.Event()
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job, over) for job in jobs]
        try:
            yield futures
        finally:
            over.set()


def has_completed(db: Connection, runs: int) -> bool:
    completed = value(db, "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'")
    return int(str(completed)) >= runs


@pytest.mark.timeout(1800)  # for what hangs
def test_a_cut_over_back_and_forth_loses_and_repeats_nothing(
    services: Services, cli: CommandLine, db: Connection, dsn: str
) -> None:
    slug = f"cut_{uuid4().hex[:8]}"
    define(db, slug, STEPS)
    db.execute("CREATE TABLE executed (run_id uuid, step_slug text, attempt int, by text)")  # no key: it would hide it
    cli.write(f"flows/{slug}.py", HANDLERS.replace("SLUG", slug))
    services.start("worker", "--concurrency", "12", PGFLOW_RECONCILE_INTERVAL="5")

    def outside(over: threading.Event) -> int:
        return work_outside(dsn, slug, over)

    changes: list[str] = []

    def turning(over: threading.Event) -> int:
        return turn_over(dsn, slug, changes, over)

    def has_kept_up(runs: int) -> bool:
        return turned.done() or len(changes) > runs / 3

    with until_over(outside, outside) as workers:
        with until_over(turning) as [turned]:
            for number in range(RUNS):
                run_workflow(db, slug, number)
                time.sleep(PAUSE)
                wait_until(partial(has_kept_up, number), "steps are turned over")
                wait_until(partial(has_completed, db, number - BACKLOG), "the worker keeps up")
        for share in range(10, RUNS + 1, 10):
            wait_until(partial(has_completed, db, share), f"{share} runs complete")
    assert turned.result() > RUNS / 4
    assert sum(worker.result() for worker in workers) > SHARE, "the ones outside had their share"

    assert value(db, "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'") == RUNS
    found = db.execute("SELECT run_id, step_slug, count(*), array_agg(by) FROM executed GROUP BY 1, 2").fetchall()
    assert len(found) == RUNS * len(STEPS), "none is lost"
    assert [each for each in found if each[2] != 1] == [], "none is repeated"
    assert int(str(value(db, "SELECT count(*) FROM executed WHERE by = 'prefect'"))) > SHARE, "and so had Prefect"
    assert column(db, "SELECT DISTINCT status FROM pgflow.step_states") == ["completed"]
    differs = """
        SELECT count(*) FROM pgflow.step_states s JOIN executed e USING (run_id, step_slug)
        WHERE s.attempts <> e.attempt OR s.step_result <> to_jsonb(s.step_slug)
    """
    assert value(db, differs) == 0, "who has executed it last has completed it"

    def is_settled() -> bool:
        looked = cli("reconcile", "--all", "--json")
        return looked.code == 0 and json.loads(looked.out) == []

    late = "SELECT max(finished_at) < clock_timestamp() - interval '11 s' FROM pgflow.runs"
    wait_until(lambda: bool(value(db, late)), "reconcile looks at the last run, too")
    wait_until(is_settled, "reconcile finds nothing")
    assert column(db, "SELECT DISTINCT state_name FROM pgflow_prefect.task_runs") in (["Completed"],
                      ["Cached", "Completed"], ["Completed", "Cached"])  # fmt: skip
