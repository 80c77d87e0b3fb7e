"""Steps that are bound to a queue of RabbitMQ or Redis: logins, addresses, messages."""

import json
import sys
from typing import Any

import pytest

from pgflow_prefect.consumer import StepMessage, consume
from pgflow_prefect.errors import NotRetriableError, RetryLaterError, UsageError
from pgflow_prefect.handlers.broker import (
    Login,
    make_connection,
    parse_broker_url,
)
from pgflow_prefect.handlers.queue import check_queue_url
from tests.brokers import free_port, redis_server
from tests.conftest import Connection
from tests.engine import get_run, get_state
from tests.integration.queues.consumers import (
    consuming,
    put,
    send,
    start,
    take,
    wait_for,
)

pytestmark = pytest.mark.anyio


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


@pytest.mark.thorough
async def test_a_wrong_login_fails_at_once_and_is_not_shown(
    queue_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, claimed = start(db, queue_url)
    monkeypatch.setenv("BROKER_LOGIN", "mailer:hunter2")
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
