"""The consumer's side of a queue: does the steps on it, and reports them."""

import inspect
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any

import anyio
from anyio import CancelScope
from anyio.from_thread import BlockingPortal, start_blocking_portal
from pydantic import SecretStr, TypeAdapter, ValidationError

from pgflow_prefect.bindings import Kind
from pgflow_prefect.database.consumer_store import ConsumerStore, Handover
from pgflow_prefect.errors import (
    ArgumentInvalidError,
    DatabaseUnavailableError,
    PgflowPrefectError,
    ResultInvalidError,
    RetryLaterError,
    RunNotPendingError,
    UsageError,
)
from pgflow_prefect.handlers.annotations import find_hints
from pgflow_prefect.handlers.base import make_input
from pgflow_prefect.handlers.broker import (
    BrokerAddress,
    Login,
    declare_queue,
    import_kombu,
    make_connection,
    parse_broker_url,
    translate_broker_errors,
)
from pgflow_prefect.handlers.containment import contain
from pgflow_prefect.handlers.credential import read_variable, split_login
from pgflow_prefect.handlers.exact import ValueReader, explain
from pgflow_prefect.handlers.generators import collect
from pgflow_prefect.handlers.outcomes import Branch, Decided, Skip
from pgflow_prefect.handlers.queue import (
    StepMessage,
    check_queue_url,
    check_signature,
    is_same_queue,
    parse_message,
)
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.threads import run_in_thread
from pgflow_prefect.handlers.values import UnstorableError, write_result
from pgflow_prefect.models import AnyOutcome, Status, StepInput
from pgflow_prefect.raw_json import UnreadableJsonError
from pgflow_prefect.settings import Settings
from pgflow_prefect.waiting import Pauses

__all__ = ["StepMessage", "consume", "perform", "perform_sync"]

Function = Callable[..., Any]
"""A sync or async function from a step's input to its result. It may also take an argument `message`."""

_HEARTBEAT = 30  # seconds
_IDLE = 1.0  # seconds for which a consumer listens before it checks for a stop
_BUSY = 0.05  # the same in seconds while some work goes on
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds before another request to a broker

_log = logging.getLogger(__name__)


async def perform(
    message: bytes | str | None, function: Function, dsn: str | None = None, *, queue: str | None = None
) -> None:
    """Do the step that a message asks for, and report it. Do nothing if the step no longer waits for it.

    The message only names an attempt of a step. PostgreSQL knows whether that attempt was handed to this queue, and its
    input. If `PGFLOW_QUEUE_KEY` is set, the message must be signed with it, and has the input.

    Sync functions run in a thread. Acknowledge the message after this returns, because PostgreSQL has the report then.

    Args:
        message: the message on the queue; in pgqueuer, `job.payload`.
        function: called as `function(input)`, with `{"payload": …, "<upstream step>": …}`. It returns the step's
            result. An exception fails the step and its run.
        dsn: the database; without it, `PGFLOW_DSN` or libpq's variables name it.
        queue: the URL that steps are bound to, such as `pgqueuer:mails`; without it, any queue of pgqueuer.

    Raises:
        UsageError: the message is not one of a step, or is not signed; or the DSN is wrong.
        DatabaseUnavailableError: PostgreSQL could not answer for `PGFLOW_REPORT_TIMEOUT` seconds.
    """
    settings = _find_settings(dsn)
    await _perform(_accept(message, settings), function, settings, queue)


def perform_sync(
    message: bytes | str | None, function: Function, dsn: str | None = None, *, queue: str | None = None
) -> None:
    """Do the same as `perform`, without a running event loop."""
    anyio.run(partial(perform, message, function, dsn, queue=queue))


def _find_settings(dsn: str | None) -> Settings:
    return Settings() if dsn is None else Settings(dsn=SecretStr(dsn))


def _accept(body: bytes | str | None, settings: Settings) -> StepMessage:
    """Return a message, which must be signed if there is a key."""
    if settings.queue_key_bytes is not None:
        check_signature(body, settings.queue_key_bytes)
    return parse_message(body)


def _is_handed_over(message: StepMessage, handover: Handover, queue: str | None) -> bool:
    """Tell whether PostgreSQL knows that the attempt was handed to this queue. A message alone proves nothing."""
    kind, _, target = (handover.handler or "").partition(" ")
    if kind != Kind.QUEUE or message.workflow_slug != handover.workflow_slug:
        return False
    with suppress(UsageError):  # the target names no queue that this version knows
        return target.startswith("pgqueuer:") if queue is None else is_same_queue(queue, target)
    return False


async def _perform(message: StepMessage, function: Function, settings: Settings, queue: str | None) -> None:
    steps = _Steps(ConsumerStore.open(settings), message)
    step = message.run_id, message.item or message.task, message.attempt
    handover = await steps.find_handover()
    if handover is None:
        _log.info("run %s, step %s, attempt %d: no run waits for it any more; skipped", *step)
        return
    if not _is_handed_over(message, handover, queue):
        _log.warning("run %s, step %s, attempt %d: it was not handed to this queue; skipped", *step)
        return
    try:
        if settings.queue_key is None:
            message = message.with_input(make_input(await steps.read_input()))
    except UnreadableJsonError as error:
        await _report(steps.fail, step, f"the input of step {message.step_slug!r} can't be read: {error}")
        return
    try:
        decided = _decide(await _call(function, message), settings.result_limit)
    except Skip as skip:
        decided = Decided.to_skip(skip)
    except Exception as error:  # noqa: BLE001  whatever the work raises is its end
        _log.exception("run %s, step %s, attempt %d failed", *step)
        await _report(steps.fail, step, describe(error))
        return
    try:
        await _report(steps.complete, step, decided.result, decided.outcome)
    except DatabaseUnavailableError:
        raise
    except PgflowPrefectError as error:  # PostgreSQL would refuse it again
        _log.exception("run %s, step %s, attempt %d: its result can't be stored", *step)
        await _report(steps.fail, step, describe(error))


@dataclass(frozen=True)
class _Steps:
    """What is asked and said of the step of a message, or of its item of a map."""

    store: ConsumerStore
    message: StepMessage

    async def find_handover(self) -> Handover | None:
        message, item = self.message, self.message.item
        if item is not None:
            return await self.store.find_item_handover(message.run_id, item, message.attempt)
        return await self.store.find_handover(message.run_id, message.task, message.attempt)

    async def read_input(self) -> StepInput:
        message, item = self.message, self.message.item
        if item is not None:
            return await self.store.read_item_input(message.run_id, item)
        return await self.store.read_input(message.run_id, message.task)

    async def complete(self, result: str, outcome: AnyOutcome | None) -> Status:
        message, item = self.message, self.message.item
        if item is not None:
            return await self.store.complete_item(message.run_id, item, message.attempt, result, outcome)
        return await self.store.complete(message.run_id, message.task, message.attempt, result, outcome)

    async def fail(self, reason: str) -> Status:
        message, item = self.message, self.message.item
        if item is not None:
            return await self.store.fail_item(message.run_id, item, message.attempt, reason)
        return await self.store.fail(message.run_id, message.task, message.attempt, reason)


async def _report(report: Callable[..., Any], step: tuple[object, ...], *what: object) -> None:
    try:
        status = await report(*what)
        _log.info("run %s, step %s, attempt %d: reported; it is %s", *step, status)
    except (UsageError, RunNotPendingError) as error:  # deleted, or reopened, while the work was done
        _log.warning("run %s, step %s, attempt %d: its report is refused: %s", *step, error)


async def _call(function: Function, message: StepMessage) -> object:
    options = {"message": message} if "message" in inspect.signature(function).parameters else {}
    return await contain(_call_function(function, partial(function, _read_input(function, message), **options)))


def _read_input(function: Function, message: StepMessage) -> object:
    """Return the argument of a function: an exact value if its annotation has a Decimal, otherwise the plain input.

    Raises:
        ArgumentInvalidError: the input does not fit such an annotation.
    """
    reader = _find_reader(function)
    if reader is None:
        return message.input
    try:
        return reader.read(message.input_json)
    except ValidationError as error:
        raise ArgumentInvalidError(f"the input does not fit its annotation: {explain(error)}") from None


def _find_reader(function: Function) -> ValueReader | None:
    with suppress(Exception):  # ignore an annotation that can't be read
        name = next(iter(inspect.signature(function).parameters))
        reader = ValueReader(TypeAdapter(find_hints(function)[name]))
        return reader if reader.has_decimals else None
    return None


async def _call_function(function: Function, call: Callable[[], Any]) -> object:
    if inspect.iscoroutinefunction(function):
        return await call()
    value: Any = None
    with CancelScope(shield=True):  # let the current work finish
        value = await run_in_thread(lambda: collect(call()))
    return await value if inspect.isawaitable(value) else value


def _decide(value: object, limit: int) -> Decided:
    if isinstance(value, Branch):
        return Decided.to_branch(value, _serialise(value.result, limit))
    return Decided(_serialise(value, limit))


def _serialise(value: object, limit: int) -> str:
    try:
        text = write_result(value, None)
    except UnstorableError as error:
        raise ResultInvalidError(f"the result can't be stored as JSON: {error}") from None
    if (size := len(text.encode("utf-8", "surrogatepass"))) > limit:
        raise ResultInvalidError(
            f"the result has {size:,} bytes of JSON, more than the limit of {limit:,} (PGFLOW_RESULT_LIMIT): store it "
            "elsewhere and return its address"
        )
    return text


def consume(
    url: str,
    function: Function,
    *,
    dsn: str | None = None,
    bound_to: str | None = None,
    login_env: str | None = None,
    concurrency: int = 1,
    visibility_timeout: float = 3600,
    stop: threading.Event | None = None,
) -> None:
    """Do the steps on a queue of RabbitMQ or Redis, until SIGTERM or Ctrl-C. Then finish the current steps.

    The consumer acknowledges a message after the step's report. If it dies before, the broker delivers the message
    again: RabbitMQ at once, Redis after `visibility_timeout`. So a step may be done twice, with the same idempotency
    key. The consumer logs and rejects a message that is not one of a step. If the broker is away, it tries again.

    Args:
        url: the URL that the step is bound to: `amqp://HOST/VHOST?queue=NAME`, `redis://HOST/DB?queue=NAME`.
        function: as in `perform`. Async functions of one consumer share one event loop.
        dsn: as in `perform`.
        bound_to: the URL that steps are bound to, if this process reaches the broker by another URL.
        login_env: the environment variable with the broker's `USER:PASSWORD`.
        concurrency: the most messages in work at the same time.
        visibility_timeout: seconds, longer than any work. Otherwise, Redis delivers a message again during its work.
        stop: ends this as a signal does. Only the main thread gets signals.

    Raises:
        UsageError: the URL or the DSN is wrong.
        NotRetriableError: the broker refuses the login, or a package or a variable is missing.
        PgflowPrefectError: PostgreSQL refuses every message, for example because the schema is missing.
    """
    check_queue_url(url)
    check_queue_url(bound_to or url)
    if url.startswith("pgqueuer:"):
        raise UsageError("pgqueuer has a worker of its own: call `perform(job.payload, function)` in its entrypoint")
    address = parse_broker_url(url)
    login = Login(*split_login(read_variable(login_env), login_env)) if login_env else Login()
    import_kombu()
    stop = stop or threading.Event()
    with _stop_on_signals(stop), start_blocking_portal() as portal:
        consumer = _Consumer(address, login, function, _find_settings(dsn), bound_to or url, concurrency, portal, stop)
        consumer.run(visibility_timeout)


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set the event at the first signal. A second signal has its former effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        _log.info("stopping: what is under way is finished first")
        stop.set()
        restore()

    former = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    try:
        yield
    finally:
        restore()


@dataclass
class _Job:
    """A message in work.

    Attributes:
        work: ends with the report.
        delivery: the delivery to acknowledge. After a lost link, this is the latest one.
    """

    work: "Future[None]"
    delivery: Any


@dataclass
class _Consumer:
    """The work of one process on one queue. The link to the broker is in this thread, the work in an event loop.

    So the link is used while the work goes on: RabbitMQ would take a silent consumer for dead.
    """

    address: BrokerAddress
    login: Login
    function: Function
    settings: Settings
    bound_to: str
    concurrency: int
    portal: BlockingPortal
    stop: threading.Event
    _jobs: dict[bytes, _Job] = field(default_factory=dict)

    def run(self, visibility: float) -> None:
        """Listen until the event is set, over lost links."""
        pauses = Pauses(_FIRST_PAUSE, _LONGEST_PAUSE)
        while not self.stop.is_set():
            began = monotonic()
            try:
                with translate_broker_errors(self.address, self.login):
                    self._listen(visibility)
            except RetryLaterError as error:
                if monotonic() - began > _LONGEST_PAUSE:
                    pauses.reset()
                pause = pauses.draw()
                _log.warning("%s; again in %.1f s", error, pause)
                self.stop.wait(pause)
        wait([job.work for job in self._jobs.values()])

    def _listen(self, visibility: float) -> None:
        with make_connection(self.address, self.login, visibility=visibility, heartbeat=_HEARTBEAT) as connection:
            kombu = import_kombu()
            channel = declare_queue(connection, self.address)
            queue = kombu.Queue(self.address.queue, channel=channel, durable=True, no_declare=True)
            consumer = kombu.Consumer(
                channel, [queue], on_message=self._start, prefetch_count=self.concurrency, auto_declare=False
            )
            consumer.consume()
            _log.info("listening on %s", self.address)
            while not self.stop.is_set():
                self._turn(connection)
            consumer.cancel()  # no further messages
            while self._jobs:
                self._turn(connection)

    def _turn(self, connection: Any) -> None:  # noqa: ANN401  kombu has no types
        """Listen for a moment, and acknowledge finished messages."""
        working = [job.work for job in self._jobs.values()]
        if len(working) >= self.concurrency or (working and self.stop.is_set()):
            wait(working, timeout=_IDLE, return_when="FIRST_COMPLETED")
        self._settle()
        with suppress(TimeoutError):
            if not self.stop.is_set():
                connection.drain_events(timeout=_BUSY if self._jobs else _IDLE)
        connection.heartbeat_check()

    def _start(self, delivery: Any) -> None:  # noqa: ANN401
        body = delivery.body.encode() if isinstance(delivery.body, str) else bytes(delivery.body)
        if known := self._jobs.get(body):
            known.delivery = delivery
            return
        if self.stop.is_set():  # RabbitMQ sends the next message after an acknowledgement
            delivery.requeue()
            return
        try:
            message = _accept(body, self.settings)
        except UsageError as error:
            _log.error("%s: %s; it is rejected", self.address, error)
            delivery.reject()
            return
        work = self.portal.start_task_soon(_perform, message, self.function, self.settings, self.bound_to)
        self._jobs[body] = _Job(work, delivery)

    def _settle(self) -> None:
        """Acknowledge the reported messages. Put messages that could not be reported back on the queue."""
        for body, job in [*self._jobs.items()]:
            if not job.work.done():
                continue
            del self._jobs[body]  # first: what the broker refuses now, it delivers again, as another job
            error = job.work.exception()
            if error is None:
                job.delivery.ack()
            else:
                job.delivery.requeue()
            if isinstance(error, DatabaseUnavailableError):
                _log.error("a step could not be reported, its message is back on the queue: %s", error)
            elif error is not None:
                raise error
