"""Consumers of queues: functions that raise, bad messages, signals, outages."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from pgflow_prefect.consumer import StepMessage
from pgflow_prefect.models import Claim, Status
from pgflow_prefect.raw_json import RawJson
from tests.brokers import free_port, redis_server
from tests.conftest import Connection
from tests.engine import cancel, fail, get_run, get_state
from tests.integration.queues.consumers import consuming, hand_over, is_completed, put, send, start, take, wait_for

pytestmark = pytest.mark.anyio


async def test_a_function_that_raises_fails_the_step_and_the_consumer_goes_on(
    queue_url: str, db: Connection, dsn: str
) -> None:
    wrong, right = start(db, queue_url), start(db, queue_url)

    async def work(given: dict[str, Any], message: StepMessage) -> float:
        if message.run_id == wrong[0]:
            raise ValueError("no\0such mail")
        return 1.5

    for each in (wrong, right):
        await send(queue_url, *each)
    with consuming(queue_url, work, dsn):
        wait_for(lambda: get_run(db, right[0]).status == "completed")
    assert get_state(db, wrong[0], "a").error_message == "ValueError: no\N{REPLACEMENT CHARACTER}such mail"
    assert take(queue_url) is None


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_function_that_exits_fails_the_step_and_the_consumer_goes_on(
    kind: str, redis_queue: str, db: Connection, dsn: str
) -> None:
    wrong, right = start(db, redis_queue), start(db, redis_queue)

    def work(given: dict[str, Any], message: StepMessage) -> float:
        if message.run_id == wrong[0]:
            sys.exit("no licence")
        return 1.5

    async def work_on_the_loop(given: dict[str, Any], message: StepMessage) -> float:
        return work(given, message)

    for each in (wrong, right):
        await send(redis_queue, *each)
    with consuming(redis_queue, work if kind == "sync" else work_on_the_loop, dsn):
        wait_for(lambda: get_run(db, right[0]).status == "completed")
    assert get_state(db, wrong[0], "a").error_message == "SystemExit: no licence"


@pytest.mark.parametrize("result", [float("nan"), object(), "\0", "\ud800", "x" * 200])
async def test_a_result_that_can_not_be_stored_fails_the_step(
    redis_queue: str, db: Connection, dsn: str, monkeypatch: pytest.MonkeyPatch, result: object
) -> None:
    monkeypatch.setenv("PGFLOW_RESULT_LIMIT", "100")
    run_id, claimed = start(db, redis_queue)
    await send(redis_queue, run_id, claimed)
    with consuming(redis_queue, lambda _: result, dsn):
        wait_for(lambda: get_run(db, run_id).status == "failed")
    assert get_state(db, run_id, "a").error_message


async def test_messages_that_are_none_of_a_step_stop_no_consumer(
    queue_url: str, db: Connection, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    for body in (b"", b"no json", b"\xff\xfe", b"{}", b'{"run_id": "x", "secret": "hunter2"}', b"[1]"):
        put(queue_url, body)
    run_id, claimed = start(db, queue_url)
    await send(queue_url, run_id, claimed)
    with consuming(queue_url, lambda _: None, dsn):
        wait_for(lambda: get_run(db, run_id).status == "completed")
    assert caplog.text.count("it is rejected") == 6
    assert "hunter2" not in caplog.text
    assert take(queue_url) is None


async def test_what_no_run_waits_for_is_skipped(redis_queue: str, db: Connection, dsn: str) -> None:
    cancelled, done, again, gone = (start(db, redis_queue) for _ in range(4))
    for each in (cancelled, done, again, gone):
        await send(redis_queue, *each)
    cancel(db, cancelled[0])
    db.execute("SELECT pgflow.complete_step(%s, 'a', '1')", [done[0]])
    second = hand_over(db, again[0], redis_queue)  # as after a time-out of the first attempt
    await send(redis_queue, again[0], Claim(status=Status.PENDING, attempt=second.attempt, payload=RawJson("{}")))
    await send(redis_queue, again[0], Claim(status=Status.PENDING, attempt=second.attempt, payload=RawJson("{}")))
    db.execute("DELETE FROM pgflow.step_states WHERE run_id = %s", [gone[0]])
    db.execute("DELETE FROM pgflow.runs WHERE id = %s", [gone[0]])
    last = start(db, redis_queue)
    await send(redis_queue, *last)
    worked: list[tuple[UUID, int]] = []

    def work(given: object, message: StepMessage) -> None:
        worked.append((message.run_id, message.attempt))

    with consuming(redis_queue, work, dsn):
        wait_for(lambda: get_run(db, last[0]).status == "completed")
    assert worked == [(again[0], 2), (last[0], 1)]
    assert take(redis_queue) is None


async def test_a_run_that_fails_while_the_work_is_done_keeps_its_end(
    redis_queue: str, db: Connection, dsn: str
) -> None:
    run_id, claimed = start(db, redis_queue)
    await send(redis_queue, run_id, claimed)
    with consuming(redis_queue, lambda _: fail(db, run_id, "a", "by hand") and 1, dsn):
        wait_for(lambda: get_run(db, run_id).status == "failed")
    assert get_state(db, run_id, "a").error_message == "by hand"


async def test_several_messages_at_the_same_time(queue_url: str, db: Connection, dsn: str) -> None:
    runs = [start(db, queue_url) for _ in range(3)]
    for each in runs:
        await send(queue_url, *each)
    together = threading.Barrier(3)

    with consuming(queue_url, lambda _: together.wait(60), dsn, concurrency=3):
        wait_for(lambda: {get_run(db, run_id).status for run_id, _ in runs} == {"completed"})


WORKER = """
import os, sys, time
from pathlib import Path
from pgflow_prefect.consumer import consume

def work(given):
    Path(sys.argv[2]).touch()
    while not Path(sys.argv[3]).exists():
        time.sleep(0.02)
    return "first"

consume(sys.argv[1], work)
assert "prefect" not in sys.modules
"""


@contextmanager
def worker(url: str, dsn: str, directory: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A consumer of its own process, in the midst of its first message."""
    begun, let_go = directory / "begun", directory / "let_go"
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, url, str(begun), str(let_go)], env={**os.environ, "PGFLOW_DSN": dsn}
    )
    try:
        wait_for(begun.exists)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.thorough
async def test_a_consumer_that_dies_loses_nothing(queue_url: str, db: Connection, dsn: str, tmp_path: Any) -> None:
    run_id, claimed = start(db, queue_url)
    await send(queue_url, run_id, claimed)
    with worker(queue_url, dsn, tmp_path) as process:
        process.kill()
        process.wait()
    assert get_state(db, run_id, "a").status == "pending"
    with consuming(queue_url, lambda _: "second", dsn, visibility_timeout=1):
        wait_for(lambda: get_run(db, run_id).status == "completed")
    assert get_state(db, run_id, "a").step_result == "second"


@pytest.mark.thorough
async def test_a_signal_lets_the_message_at_hand_be_finished(
    queue_url: str, db: Connection, dsn: str, tmp_path: Any
) -> None:
    first, second = start(db, queue_url), start(db, queue_url)
    await send(queue_url, *first)
    await send(queue_url, *second)
    with worker(queue_url, dsn, tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        (tmp_path / "let_go").touch()
        assert process.wait(60) == 0
    assert get_state(db, first[0], "a").step_result == "first"
    assert get_state(db, second[0], "a").status == "pending"
    assert take(queue_url) is not None
    assert take(queue_url) is None


async def test_a_report_waits_for_postgresql(redis_queue: str, db: Connection, dsn: str) -> None:
    run_id, claimed = start(db, redis_queue)
    await send(redis_queue, run_id, claimed)
    name = db.info.dbname

    def work(given: object) -> str:
        db.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0')
        threading.Timer(1, lambda: db.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT -1')).start()
        return "done"

    with consuming(redis_queue, work, dsn):
        wait_for(lambda: get_run(db, run_id).status == "completed")


@pytest.mark.thorough
async def test_a_consumer_goes_on_when_its_broker_comes_back(db: Connection, dsn: str) -> None:
    url = f"redis://127.0.0.1:{(port := free_port())}/0?queue=q"
    with consuming(url, lambda _: None, dsn):
        for _ in range(2):
            with redis_server(port):
                run_id, claimed = start(db, url)
                await send(url, run_id, claimed)
                wait_for(partial(is_completed, db, run_id), 60)
