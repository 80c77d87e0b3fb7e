"""Our claims and reports on the released pgflow beside pgflow's functions alone, which they call.

Both sides use one connection and commit each call. One plays what pgflow's own worker asks: a poll, a start of what it
has read, and a completion for each task. The other one sends what a process of ours sends: a step's completion and the
claim of the next one in one statement, and the tasks of a map in batches.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from benchmarks.measure import Report, Row, Target, interleave, ratio
from pgflow_prefect.database.implementations.released import describe_released
from pgflow_prefect.shipped import shipped_path
from tests.released_lab import DIRECTORIES, PACKAGE, REQUIRED, install_released, open_flows

Connection = psycopg.Connection[tuple[Any, ...]]

CHAIN = {f"s{n}": [f"s{n - 1}"] if n else [] for n in range(5)}
MAP = {"list": [], "each": ["list"]}
RUNS = int(os.environ.get("BENCHMARK_RUNS", "100"))
ITEMS = 1_000
REPETITIONS = int(os.environ.get("BENCHMARK_REPETITIONS", "5"))
TARGET = Target(at_most=1.5)

_BATCH = 10  # what pgflow's worker reads at a time; ours takes as many
_LEASE = 60.0

_READ = "SELECT array_agg(msg_id) FROM pgmq.read(%s, 30, %s)"
_START = "SELECT * FROM pgflow.start_tasks(%s, %s::bigint[], %s)"
_COMPLETE = "SELECT pgflow.complete_task(%s, %s, %s, %s)"
_TAKE = "SELECT pgflow_prefect.take_run(%s, %s, 'benchmark', %s, 3)"
_PERFORM = "SELECT * FROM pgflow_prefect.perform_tasks(%s)"
_WORK = "SELECT item_index, attempt, item FROM pgflow_prefect.work_items(%s, %s, %s, %s, %s, '{}')"
_REGISTER = "INSERT INTO pgflow.workers (worker_id, queue_name, function_name) VALUES (%s, %s, 'edge')"
_DONE = {"ok": True}


def measure_released(server: str) -> Iterator[Report]:
    """Measure npm's version, and each directory of migrations that `PGFLOW_TEST_RELEASED` names."""
    named = os.environ.get(DIRECTORIES, "").split(os.pathsep)
    for source in (PACKAGE, *(each for each in named if each and each != REQUIRED)):
        yield _compare(server, source)


def _compare(server: str, source: str) -> Report:
    rows: list[Row] = []
    for name, sides in {
        f"chain of {len(CHAIN)}": (_run_chains_with_pgflow, _run_chains),
        f"map of {ITEMS:,}": (_run_map_with_pgflow, _run_map),
    }.items():
        theirs, ours = (partial(_measure, server, source, side) for side in sides)
        measured = interleave({"pgflow": theirs, "ours": ours}, "ms/task", REPETITIONS)
        rows += [
            Row(f"{name}: pgflow's functions alone", measured["pgflow"]),
            Row(f"{name}: our claim and report", measured["ours"]),
            Row(f"{name}: ours / pgflow's", ratio(measured["ours"], measured["pgflow"]), TARGET),
        ]
    what = source if source == PACKAGE else Path(source).name
    return Report(f"Released pgflow ({what}): {RUNS} chains, one map, one connection, a commit a call", rows)


def _measure(server: str, source: str, side: Callable[[Connection], float]) -> float:
    with _fresh_database(server, source) as db:
        return side(db)


@contextmanager
def _fresh_database(server: str, source: str) -> Iterator[Connection]:
    """Create a database with the released pgflow, both flows and our schema, never analyzed; drop it in the end."""
    name = f"benchmark_{uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        dsn = make_conninfo(server, dbname=name)
        install_released(dsn, source)
        with open_flows(dsn) as flows:
            for script in describe_released(skips=True).scripts:
                flows.db.execute(shipped_path("sql", script).read_bytes())
            flows.define("chain", CHAIN)
            flows.define("album", MAP, maps=["each"])
            yield flows.db
        admin.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))


def _start(db: Connection, flow: str) -> UUID:
    [run_id] = db.execute("SELECT run_id FROM pgflow.start_flow(%s, '{}')", [flow]).fetchone() or [None]
    return UUID(str(run_id))


def _check(db: Connection, runs: int) -> None:
    found = db.execute("SELECT status, count(*) FROM pgflow.runs GROUP BY status").fetchall()
    assert found == [("completed", runs)], found
    left = db.execute("SELECT sum(queue_length) FROM pgmq.metrics_all()").fetchone()
    assert left == (0,), f"messages are left over: {left}"


def _register(db: Connection, flow: str) -> UUID:
    worker = uuid4()
    db.execute(_REGISTER, [worker, flow])
    return worker


def _work_like_edge(db: Connection, flow: str, worker: UUID, output: object) -> int:
    """Read a batch, start its tasks and complete each, as pgflow's worker does; return how many there were."""
    [ids] = db.execute(_READ, [flow, _BATCH]).fetchone() or [None]
    with db.cursor() as cursor:
        cursor.execute(_START, [flow, ids or [], worker])
        names = [column.name for column in cursor.description or ()]
        tasks = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    for task in tasks:
        index = task.get("task_index", 0)
        db.execute(_COMPLETE, [task["run_id"], task["step_slug"], index, Jsonb(output)])
    return len(tasks)


def _run_chains_with_pgflow(db: Connection) -> float:
    worker = _register(db, "chain")
    took = 0.0
    for _ in range(RUNS):
        _start(db, "chain")
        begun = perf_counter()
        for _ in CHAIN:
            _work_like_edge(db, "chain", worker, _DONE)
        took += perf_counter() - begun
    _check(db, RUNS)
    return took * 1000 / (RUNS * len(CHAIN))


def _run_map_with_pgflow(db: Connection) -> float:
    worker = _register(db, "album")
    _start(db, "album")
    _work_like_edge(db, "album", worker, [*range(ITEMS)])
    begun = perf_counter()
    while _work_like_edge(db, "album", worker, _DONE):
        pass
    took = perf_counter() - begun
    _check(db, 1)
    return took * 1000 / ITEMS


def _take(db: Connection, run_id: UUID) -> int:
    [epoch] = db.execute(_TAKE, [run_id, uuid4(), _LEASE]).fetchone() or [None]
    return int(str(epoch))


def _element(do: str, run_id: UUID, step: str, epoch: int, task_run_id: UUID) -> dict[str, object]:
    """Return a claim or a completion, as a process of ours sends it."""
    element = {
        "do": do,
        "run_id": str(run_id),
        "epoch": epoch,
        "step_slug": step,
        "task_index": 0,
        "task_run_id": str(task_run_id),
    }
    if do == "claim":
        upstream = {**CHAIN, **MAP}[step]
        given = {"upstream": upstream, "with_payload": not upstream}
        return {**element, **given, "bound": "python", "has_function": True, "handler": f"flows.py:{step}"}
    return {**element, "attempt": 1, "result": _DONE}


def _run_chains(db: Connection) -> float:
    """Take each run, and claim a step in the statement that completes the one before, as a process of ours does."""
    db.execute("SELECT pgflow_prefect.move_flow('chain')")
    took = 0.0
    for _ in range(RUNS):
        run_id = _start(db, "chain")
        begun = perf_counter()
        epoch = _take(db, run_id)
        asked: list[dict[str, object]] = []
        for step in CHAIN:
            task_run_id = uuid4()
            asked.append(_element("claim", run_id, step, epoch, task_run_id))
            db.execute(_PERFORM, [Jsonb(asked)]).fetchall()
            asked = [_element("complete", run_id, step, epoch, task_run_id)]
        db.execute(_PERFORM, [Jsonb(asked)])
        took += perf_counter() - begun
    _check(db, RUNS)
    return took * 1000 / (RUNS * len(CHAIN))


def _run_map(db: Connection) -> float:
    db.execute("SELECT pgflow_prefect.move_flow('album')")
    run_id = _start(db, "album")
    epoch = _take(db, run_id)
    task_run_id = uuid4()
    db.execute(_PERFORM, [Jsonb([_element("claim", run_id, "list", epoch, task_run_id)])])
    done = {**_element("complete", run_id, "list", epoch, task_run_id), "result": [*range(ITEMS)]}
    db.execute(_PERFORM, [Jsonb([done])])
    begun = perf_counter()
    db.execute(_PERFORM, [Jsonb([_element("claim", run_id, "each", epoch, uuid4())])])
    reports: list[dict[str, object]] = []
    while True:
        found = db.execute(_WORK, [run_id, "each", epoch, Jsonb(reports), _BATCH]).fetchall()
        reports = [
            {"do": "complete", "item_index": index, "attempt": attempt, "result": _DONE}
            for index, attempt, _ in found
            if index is not None
        ]
        if not reports:
            break
    took = perf_counter() - begun
    _check(db, 1)
    return took * 1000 / ITEMS
