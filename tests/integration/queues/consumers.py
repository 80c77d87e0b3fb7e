"""Queues, messages and consumers for the tests of steps that are bound to queues."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any
from uuid import UUID

from pgflow_prefect.bindings import Queue
from pgflow_prefect.consumer import consume
from pgflow_prefect.database.step_transaction import StepTransaction
from pgflow_prefect.errors import NotRetriableError
from pgflow_prefect.handlers.base import Deferred, StepContext, StepExecution, Toolbox
from pgflow_prefect.handlers.broker import (
    Login,
    declare_queue,
    import_kombu,
    make_connection,
    parse_broker_url,
    publish,
)
from pgflow_prefect.handlers.queue import QueueHandler
from pgflow_prefect.models import Claim, Status
from tests.conftest import Connection
from tests.engine import complete, define, get_run, run_workflow, value

LOG = logging.getLogger(__name__)


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
