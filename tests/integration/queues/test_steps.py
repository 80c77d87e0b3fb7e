"""Steps that are bound to a queue, and the workers that empty it: real brokers, and pgqueuer in the test's database."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from time import monotonic, sleep
from typing import Any
from uuid import UUID, uuid4

import anyio
import psycopg
import pytest

from pgflow_prefect.bindings import Queue
from pgflow_prefect.consumer import StepMessage, consume, perform
from pgflow_prefect.database.step_connection import Connector
from pgflow_prefect.database.step_transaction import StepTransaction
from pgflow_prefect.errors import NotRetriableError, RetryLaterError, UsageError
from pgflow_prefect.handlers.base import Deferred, StepContext, StepExecution, Toolbox
from pgflow_prefect.handlers.broker import (
    Login,
    declare_queue,
    import_kombu,
    make_connection,
    parse_broker_url,
    publish,
)
from pgflow_prefect.handlers.queue import QueueHandler, check_queue_url
from pgflow_prefect.models import Claim, Status, TaskKey
from pgflow_prefect.raw_json import RawJson
from tests.brokers import free_port, redis_server
from tests.conftest import Connection
from tests.engine import cancel, complete, define, fail, get_run, get_state, run_workflow, value

pytestmark = pytest.mark.anyio

LOG = logging.getLogger(__name__)


@pytest.fixture(params=["redis_url", "rabbitmq_url"])
def queue_url(request: pytest.FixtureRequest) -> str:
    """A new queue, of each broker."""
    return f"{request.getfixturevalue(request.param)}?queue=q-{uuid4().hex[:8]}"


@pytest.fixture
def redis_queue(redis_url: str) -> str:
    return f"{redis_url}?queue=q-{uuid4().hex[:8]}"


@pytest.fixture
def rabbitmq_queue(rabbitmq_url: str) -> str:
    return f"{rabbitmq_url}?queue=q-{uuid4().hex[:8]}"


def put(url: str, body: bytes) -> None:
    publish(parse_broker_url(url), Login(), body)


def take(url: str) -> bytes | None:
    """Return the next message of a queue, and acknowledge it."""
    address = parse_broker_url(url)
    with make_connection(address, Login()) as connection:
        message = import_kombu().Queue(address.queue, channel=declare_queue(connection, address)).get()
        if message is None:
            return None
        message.ack()
        return message.body.encode() if isinstance(message.body, str) else bytes(message.body)


def wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not come to that"
        sleep(0.02)


def is_completed(db: Connection, run_id: UUID) -> bool:
    return get_run(db, run_id).status == "completed"


NOWHERE = "redis://127.0.0.1:1/0?queue=q"


def start(db: Connection, url: str = NOWHERE) -> tuple[UUID, Claim]:
    """Start a run of the workflow `w` and claim its step `a`, which is bound to a queue."""
    if not value(db, "SELECT count(*) FROM pgflow.workflows"):
        define(db, "w", {"up": [], "a": ["up"]})
    run_id = run_workflow(db, "w", {"n": 1}).id
    complete(db, run_id, "up", 2)
    return run_id, hand_over(db, run_id, url)


def hand_over(db: Connection, run_id: UUID, url: str) -> Claim:
    """Claim the step `a` as a worker does before it puts a message on a queue."""
    statement = """
        SELECT attempt, payload::text, upstream_results::text FROM pgflow_prefect.claim_step(
            %s, 'a', (SELECT epoch FROM pgflow.runs WHERE id = %s), gen_random_uuid(), NULL, true, 'queue', false, %s)
    """
    row: Any = db.execute(statement, [run_id, run_id, f"queue {url}"]).fetchone()
    return Claim(status=Status.PENDING, attempt=row[0], payload=row[1], upstream_results=row[2])


async def no_secret(name: str) -> str:
    raise NotRetriableError(f"there is no Prefect Secret block {name!r}")


async def send(
    url: str,
    run_id: UUID,
    claimed: Claim,
    transaction: StepTransaction | None = None,
    limit: int = 10_000,
    **options: Any,
) -> Deferred:
    http: Any = None
    handler = QueueHandler("a", Queue(url, **options), Toolbox(http, no_secret, limit))
    context = StepContext(run_id, "w", "a", claimed.attempt, LOG)
    execution = StepExecution(context) if transaction is None else StepExecution.of(context, transaction)
    return await handler.execute(claimed, ["up"], execution)


@contextmanager
def consuming(url: str, function: Callable[..., Any], dsn: str, **options: Any) -> Iterator[None]:
    stop = threading.Event()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            consume(url, function, dsn=dsn, stop=stop, **options)
        except BaseException as error:
            failure.append(error)
            raise

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
    assert failure == []


async def test_a_step_goes_over_the_queue_and_back(queue_url: str, db: Connection, dsn: str) -> None:
    run_id, claimed = start(db, queue_url)
    deferred = await send(queue_url, run_id, claimed)
    assert deferred.reason == f"on queue {parse_broker_url(queue_url).queue!r} of 127.0.0.1"
    seen: list[Any] = []

    def work(given: dict[str, Any], message: StepMessage) -> dict[str, Any]:
        seen.extend((given, message))
        return {"sum": given["payload"]["n"] + given["up"]}

    with consuming(queue_url, work, dsn):
        wait_for(lambda: get_run(db, run_id).status == "completed")
    assert get_state(db, run_id, "a").step_result == {"sum": 3}
    given, message = seen
    assert given == {"payload": {"n": 1}, "up": 2}
    assert (message.run_id, message.step_slug, message.attempt) == (run_id, "a", 1)
    assert message.idempotency_key == f"{run_id}/a"
    assert take(queue_url) is None, "it is acknowledged"


async def test_messages_that_follow_each_other_share_a_connection(queue_url: str) -> None:
    for number in range(5):
        put(queue_url, b"%d" % number)
    assert [take(queue_url) for _ in range(6)] == [b"0", b"1", b"2", b"3", b"4", None]


async def test_a_connection_that_broke_while_it_lay_idle_is_replaced(rabbitmq_queue: str) -> None:
    import kombu.pools  # noqa: PLC0415  an extra

    put(rabbitmq_queue, b"1")
    pool = kombu.pools.connections[make_connection(parse_broker_url(rabbitmq_queue), Login())]
    with pool.acquire() as connection:
        assert connection.connected
        connection.connection.transport.sock.shutdown(2)
    put(rabbitmq_queue, b"2")
    assert [take(rabbitmq_queue), take(rabbitmq_queue)] == [b"1", b"2"]


async def test_a_queue_of_another_type_is_used_as_it_is(rabbitmq_queue: str) -> None:
    address = parse_broker_url(rabbitmq_queue)
    with make_connection(address, Login()) as connection:
        connection.channel().queue_declare(
            address.queue,
            durable=True,
            auto_delete=False,
            arguments={"x-max-length": 1, "x-overflow": "reject-publish"},
        )
    put(rabbitmq_queue, b"1")
    with pytest.raises(RetryLaterError, match="did not take it: MessageNacked"):
        put(rabbitmq_queue, b"2")


@pytest.mark.parametrize("scheme", ["redis://127.0.0.1:1/0", "amqp://127.0.0.1:1/"])
async def test_a_broker_that_is_down_is_tried_again_later(scheme: str, db: Connection) -> None:
    run_id, claimed = start(db)
    with pytest.raises(RetryLaterError, match=r"queue 'q' of 127\.0\.0\.1 can't be reached") as caught:
        await send(f"{scheme}?queue=q", run_id, claimed)
    assert caught.value.after is None


async def test_a_wrong_login_fails_at_once_and_is_not_shown(
    queue_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, claimed = start(db, queue_url)
    monkeypatch.setenv("BROKER_LOGIN", "somebody:hunter2")
    with pytest.raises(NotRetriableError, match="refused") as caught:
        await send(queue_url, run_id, claimed, login_env="BROKER_LOGIN")
    assert "hunter2" not in f"{caught.value} {caught.value.__cause__!r}"
    with pytest.raises(NotRetriableError, match="refused"):
        consume(queue_url, print, login_env="BROKER_LOGIN")


async def test_the_right_login_is_used(db: Connection, rabbitmq_queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id, claimed = start(db, rabbitmq_queue)
    monkeypatch.setenv("BROKER_LOGIN", "guest:guest")
    await send(rabbitmq_queue, run_id, claimed, login_env="BROKER_LOGIN")
    with redis_server(port := free_port(), "--requirepass", "guest"):
        monkeypatch.setenv("BROKER_LOGIN", ":guest")
        await send(f"redis://127.0.0.1:{port}/0?queue=q", run_id, claimed, login_env="BROKER_LOGIN")
        with pytest.raises(NotRetriableError, match="refused"):
            await send(f"redis://127.0.0.1:{port}/0?queue=q", run_id, claimed)


async def test_a_login_that_is_missing_or_none_is_named(db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id, claimed = start(db)
    url = "redis://127.0.0.1:1/0?queue=q"
    with pytest.raises(NotRetriableError, match="BROKER_LOGIN is not set"):
        await send(url, run_id, claimed, login_env="BROKER_LOGIN")
    monkeypatch.setenv("BROKER_LOGIN", "hunter2")
    with pytest.raises(NotRetriableError, match="login in BROKER_LOGIN has no colon") as caught:
        await send(url, run_id, claimed, login_env="BROKER_LOGIN")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(NotRetriableError, match="Secret block 'login'"):
        await send(url, run_id, claimed, login_block="login")


async def test_a_message_that_is_too_large_is_not_sent(queue_url: str, db: Connection) -> None:
    run_id, claimed = start(db, queue_url)
    with pytest.raises(NotRetriableError, match="more than the limit of 100"):
        await send(queue_url, run_id, claimed, limit=100)
    assert take(queue_url) is None


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("kafka://h/q", "no kind that is known"),
        ("pgqueuer:", "names no entrypoint"),
        ("pgqueuer://name", "names no entrypoint"),
        ("redis://h/0", "has no name"),
        ("redis://h/0?queue=", "has no name"),
        ("redis://h/0?queue=a&queue=b", "has no name"),
        ("redis://h/0?queue=a&x=1", "nothing reads: x"),
        ("redis://h/mails?queue=a", "Redis has numbers"),
        ("amqp:///vhost?queue=a", "names no host"),
        ("amqp://h:port/?queue=a", "port that can't be right"),
        ("amqp://h/?queue=a#b", "fragment"),
    ],
)
async def test_a_url_that_names_no_queue_is_refused(url: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        check_queue_url(url)


async def test_urls_that_name_queues() -> None:
    for url in ("pgqueuer:mails", "redis://h?queue=a", "rediss://h:1/3?queue=a%23b", "amqps://h/%2Fv?queue=a"):
        check_queue_url(url)
    assert parse_broker_url("amqp://h?queue=a").place == "/"
    assert parse_broker_url("amqp://h/%2Fv?queue=a%23b").queue == "a#b"


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


async def test_a_consumer_goes_on_when_its_broker_comes_back(db: Connection, dsn: str) -> None:
    url = f"redis://127.0.0.1:{(port := free_port())}/0?queue=q"
    with consuming(url, lambda _: None, dsn):
        for _ in range(2):
            with redis_server(port):
                run_id, claimed = start(db, url)
                await send(url, run_id, claimed)
                wait_for(partial(is_completed, db, run_id), 60)


# pgqueuer


@asynccontextmanager
async def pgqueuer_tables(dsn: str) -> AsyncIterator[Any]:
    from pgqueuer.adapters.drivers.psycopg import PsycopgDriver  # noqa: PLC0415  an extra
    from pgqueuer.queries import Queries  # noqa: PLC0415  an extra

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        queries = Queries(PsycopgDriver(connection))
        await queries.install()
        yield queries


async def test_pgqueuers_own_worker_does_the_step(db: Connection, dsn: str) -> None:
    from pgqueuer.qm import QueueManager  # noqa: PLC0415  an extra
    from pgqueuer.types import QueueExecutionMode  # noqa: PLC0415  an extra

    run_id, claimed = start(db, "pgqueuer:mails")
    async with pgqueuer_tables(dsn) as queries:
        transaction = StepTransaction(Connector(dsn, 10), run_id, TaskKey("a"), LOG)
        async with transaction:
            deferred = await send("pgqueuer:mails", run_id, claimed, transaction)
            assert deferred.reason == "on queue 'mails' of pgqueuer"
            assert db.execute("SELECT count(*) FROM pgqueuer").fetchone() == (0,), "not before the step's commit"
            await transaction.defer(task_run_id=uuid4(), state_name="Deferred", message=deferred.reason)
        manager = QueueManager(queries)

        @manager.entrypoint("mails")
        async def mails(job: Any) -> None:
            await perform(job.payload, lambda given: given["payload"]["n"] + 1, dsn)

        with anyio.fail_after(180):
            await manager.run(mode=QueueExecutionMode.drain)
    assert get_state(db, run_id, "a").step_result == 2
    assert db.execute("SELECT count(*) FROM pgqueuer").fetchone() == (0,)


async def test_an_attempt_that_is_rolled_back_leaves_no_job(db: Connection, dsn: str) -> None:
    run_id, claimed = start(db)
    async with pgqueuer_tables(dsn):
        async with StepTransaction(Connector(dsn, 10), run_id, TaskKey("a"), LOG) as transaction:
            await send("pgqueuer:mails", run_id, claimed, transaction)
        assert db.execute("SELECT count(*) FROM pgqueuer").fetchone() == (0,)


async def test_missing_tables_of_pgqueuer_are_named(db: Connection, dsn: str) -> None:
    run_id, claimed = start(db, "pgqueuer:mails")
    async with StepTransaction(Connector(dsn, 10), run_id, TaskKey("a"), LOG) as transaction:
        with pytest.raises(NotRetriableError, match="pgq install"):
            await send("pgqueuer:mails", run_id, claimed, transaction)


async def test_perform_refuses_what_is_no_message(dsn: str) -> None:
    with pytest.raises(UsageError, match="not a step's"):
        await perform(None, print, dsn)
    with pytest.raises(UsageError, match="worker of its own"):
        consume("pgqueuer:mails", print, dsn=dsn)


@pytest.mark.parametrize(("package", "url"), [("kombu", "redis://127.0.0.1:1/0?queue=q"), ("pgqueuer", "pgqueuer:q")])
async def test_a_missing_package_is_named(
    package: str, url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, claimed = start(db)
    for name in [name for name in sys.modules if name.partition(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        NotRetriableError, match=rf"{package} is not installed here: pip install 'pgflow-prefect\[queues\]'"
    ):
        await send(url, run_id, claimed)


async def test_the_message_is_json_that_any_worker_can_read(queue_url: str, db: Connection) -> None:
    run_id, claimed = start(db, queue_url)
    await send(queue_url, run_id, claimed)
    body = take(queue_url)
    assert body is not None
    assert json.loads(body) == {
        "run_id": str(run_id),
        "workflow_slug": "w",
        "step_slug": "a",
        "attempt": 1,
        "idempotency_key": f"{run_id}/a",
        "input": {"payload": {"n": 1}, "up": 2},
    }
