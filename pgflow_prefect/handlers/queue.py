"""A queue as the handler of a step: its worker does the work and reports it."""

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple
from uuid import UUID

import anyio.to_thread
from anyio import CapacityLimiter
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, PrivateAttr, ValidationError

from pgflow_prefect.bindings import Queue
from pgflow_prefect.errors import NotRetriableError, RetryLaterError, UsageError
from pgflow_prefect.handlers.base import (
    AnyItemContext,
    AnyStepContext,
    Deferred,
    RetryPolicy,
    StepExecution,
    Toolbox,
    make_input,
    make_policy,
)
from pgflow_prefect.handlers.broker import (
    BROKER_SCHEMES,
    BrokerAddress,
    Login,
    missing_package,
    parse_broker_url,
    publish,
)
from pgflow_prefect.handlers.credential import read_credential, split_login
from pgflow_prefect.handlers.json_text import check_size
from pgflow_prefect.handlers.row_policy import InternalAddressError, RowPolicy, refuse_origin
from pgflow_prefect.models import Claim, ItemKey, TaskKey
from pgflow_prefect.origins import Origin
from pgflow_prefect.raw_json import RawJson, write_object
from pgflow_prefect.wording import write_moment

_NO_TABLE = "42P01"  # PostgreSQL's code
_SIGNATURE = re.compile(rb',"signature":"[0-9a-f]{64}"\}\Z')


class StepMessage(BaseModel):
    """A message on a queue: a step to be done. Members that this version does not know are ignored.

    Attributes:
        run_id: the run.
        workflow_slug: the run's workflow.
        step_slug: the step.
        task_index: which of the step's tasks this is; the message of a plain step does not name it.
        item_index: which item of a map this is; the message of any other step does not name it.
        attempt: which execution of the step this is, counted from 1; a report with another number is refused.
        idempotency_key: the same for every attempt.
        logical_date: the time that the run is about; the message of a run without one does not name it.
        input: `{"payload": …, "<upstream step>": …}`.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    step_slug: str
    task_index: int = Field(default=0, ge=0)
    item_index: int | None = Field(default=None, ge=0)
    attempt: int = Field(ge=1)
    idempotency_key: str
    logical_date: AwareDatetime | None = None
    input: dict[str, JsonValue]
    _input: RawJson | None = PrivateAttr(default=None)

    @property
    def input_json(self) -> str:
        """The input as JSON text, in which every number has all its digits."""
        return self._input.text if self._input is not None else RawJson.of(self.input).text

    def with_input(self, raw: RawJson) -> "StepMessage":
        """Return the message with another input."""
        changed = self.model_copy(update={"input": raw.decode()})
        changed._input = raw
        return changed

    @property
    def task(self) -> TaskKey:
        """The task of the run."""
        return TaskKey(self.step_slug, self.task_index)

    @property
    def item(self) -> ItemKey | None:
        """The item of a map; None for a message of a plain step."""
        return None if self.item_index is None else ItemKey(self.step_slug, self.item_index)


def sign_message(body: bytes, key: bytes) -> bytes:
    """Return a message, a JSON object, with its signature as the last member."""
    return body[:-1] + _write_signature(body, key)


def _write_signature(body: bytes, key: bytes) -> bytes:
    return b',"signature":"%s"}' % hmac.new(key, b"pgflow message " + body, hashlib.sha256).hexdigest().encode()


def check_signature(body: bytes | str | None, key: bytes) -> None:
    """Check that a message was signed with this key.

    Raises:
        UsageError: it was not.
    """
    text = body.encode() if isinstance(body, str) else (body or b"")
    signature = _SIGNATURE.search(text)
    if signature is None:
        raise UsageError("a message on the queue is not signed, and PGFLOW_QUEUE_KEY is set here: set it for workers")
    unsigned = text[: signature.start()] + b"}"
    if not hmac.compare_digest(signature[0], _write_signature(unsigned, key)):
        raise UsageError("a message on the queue has a wrong signature: PGFLOW_QUEUE_KEY differs, or it is forged")


def parse_message(body: bytes | str | None) -> StepMessage:
    """Return the message of a step.

    Raises:
        UsageError: it is not valid; the error names the reasons, but no content.
    """
    try:
        message = StepMessage.model_validate_json(body or b"")
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        reasons = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in details)
        raise UsageError(f"a message on the queue is not a step's: {reasons}") from None
    text = body.decode() if isinstance(body, bytes) else (body or "")
    message._input = RawJson(text).split()["input"]
    return message


def _address(context: AnyStepContext[Any]) -> dict[str, JsonValue]:
    """Return what names the task within its step; nothing for the task of a plain step."""
    if isinstance(context, AnyItemContext):
        return {"item_index": context.item_index}
    return {"task_index": context.index} if context.index else {}


class _Order(NamedTuple):
    """A message to be published.

    Attributes:
        url: of the queue.
        login: for the broker.
        body: JSON.
        context: of the step.
        rows: the policy for rows; None if the Python code names the queue.
    """

    url: str
    login: Login
    body: bytes
    context: AnyStepContext[Any]
    rows: RowPolicy | None


async def _publish_on_broker(order: _Order) -> str:
    address = parse_broker_url(order.url)
    if order.rows is not None and address.origin not in order.rows.allowed:
        address = await _check_address(address, order.rows)
    # A limiter of its own, because it must not wait for the handlers of users. Its time-outs end an abandoned thread.
    await anyio.to_thread.run_sync(
        partial(publish, address, order.login, order.body), abandon_on_cancel=True, limiter=CapacityLimiter(1)
    )
    return f"on {address}"


async def _check_address(address: BrokerAddress, rows: RowPolicy) -> BrokerAddress:
    """Return the queue of a row with an address that the row may reach."""
    try:
        found = await rows.find_addresses(address.host, address.origin.port)
    except InternalAddressError as error:
        raise refuse_origin(address.origin, error) from None
    except OSError as error:
        raise RetryLaterError(f"{address} can't be reached: {error}", None) from error
    return replace(address, via=found[0])


async def _publish_on_pgqueuer(order: _Order) -> str:
    """Enqueue in the step's own transaction, so that the job exists exactly if the step is noted as deferred."""
    try:
        from pgqueuer.adapters.drivers.psycopg import PsycopgDriver  # noqa: PLC0415  an extra, and slow to import
        from pgqueuer.queries import Queries  # noqa: PLC0415  an extra
    except ImportError as error:
        raise missing_package("pgqueuer") from error
    entrypoint = _read_entrypoint(order.url)
    driver = PsycopgDriver(await order.context.connection)
    try:
        await Queries(driver).enqueue(entrypoint, order.body)
    except Exception as error:
        if getattr(error, "sqlstate", None) == _NO_TABLE:
            raise NotRetriableError(
                f"pgqueuer's tables are not in this database: run `pgq install` ({error})"
            ) from error
        raise
    return f"on queue {entrypoint!r} of pgqueuer"


def _read_entrypoint(url: str) -> str:
    entrypoint = url.partition(":")[2]
    if not entrypoint or entrypoint.startswith("/"):
        raise UsageError(f"the queue {url!r} names no entrypoint: write pgqueuer:NAME")
    return entrypoint


def _find_broker_origin(url: str) -> Origin | None:
    return parse_broker_url(url).origin


class _Scheme(NamedTuple):
    check: Callable[[str], object]
    publish: Callable[[_Order], Awaitable[str]]
    find_origin: Callable[[str], Origin | None]


_SCHEMES = {"pgqueuer": _Scheme(_read_entrypoint, _publish_on_pgqueuer, lambda url: None)} | dict.fromkeys(
    BROKER_SCHEMES, _Scheme(parse_broker_url, _publish_on_broker, _find_broker_origin)
)
"""For each kind of queue: the check of its URL, and the function that publishes a message."""


def _find_scheme(url: str) -> _Scheme:
    name = url.partition(":")[0].lower()
    if name not in _SCHEMES:
        raise UsageError(f"the queue {url!r} is of no kind that is known: its URL begins with {', '.join(_SCHEMES)}")
    return _SCHEMES[name]


def check_queue_url(url: str) -> None:
    """Check that a URL names a queue.

    Raises:
        UsageError: it does not; the message says what is missing.
    """
    _find_scheme(url).check(url)


def is_same_queue(url: str, other: str) -> bool:
    """Tell whether two URLs name the same queue in any notation.

    Raises:
        UsageError: one of them names none.
    """
    if "pgqueuer" in (url.partition(":")[0].lower(), other.partition(":")[0].lower()):
        return url.partition(":")[2] == other.partition(":")[2] and _find_scheme(url) is _find_scheme(other)
    mine, theirs = parse_broker_url(url), parse_broker_url(other)
    return (mine.origin, mine.place, mine.queue) == (theirs.origin, theirs.place, theirs.queue)


def find_queue_origin(url: str) -> Origin | None:
    """Return the origin of a queue on the network; None for a queue in the same database.

    Raises:
        UsageError: the URL names no queue.
    """
    return _find_scheme(url).find_origin(url)


def find_missing_packages(url: str) -> list[str]:
    """Return the missing packages that a queue of this URL needs; none for an invalid URL."""
    scheme = url.partition(":")[0]
    needed = {"pgqueuer": ("pgqueuer",), "redis": ("kombu", "redis"), "rediss": ("kombu", "redis")}
    names = needed.get(scheme, ("kombu",) if scheme in BROKER_SCHEMES else ())
    return [name for name in names if find_spec(name) is None]


@dataclass(frozen=True)
class QueueHandler:
    """A queue that gets the step's input, and whose worker calls `complete_step` or `fail_step`.

    Attributes:
        step_slug: the step.
        binding: which queue.
        toolbox: has the secrets.
        is_row: whether a row binds the step, and not Python code: the settings limit what a row may name and reach.
    """

    step_slug: str
    binding: Queue
    toolbox: Toolbox
    is_row: bool = False

    @property
    def policy(self) -> RetryPolicy:
        """The binding's."""
        return make_policy(self.binding)

    async def execute(self, claim: Claim, upstream: Collection[str], execution: StepExecution) -> Deferred:
        """Publish one message for this attempt.

        Raises:
            RetryLaterError: the broker can't be reached, or did not take the message.
            NotRetriableError: another attempt would fail, too. For example, the URL names no queue, the broker refuses
                the message, a package is missing, or the row may not reach the broker.
        """
        url = self.binding.url
        try:
            scheme = _find_scheme(url)
            scheme.check(url)
        except UsageError as error:
            raise NotRetriableError(str(error)) from error
        context = execution.context
        head: dict[str, JsonValue] = {
            "run_id": str(context.run_id),
            "workflow_slug": context.workflow_slug,
            "step_slug": context.step_slug,
            **_address(context),
            **({"logical_date": write_moment(context.logical_date)} if context.logical_date is not None else {}),
            "attempt": context.attempt,
            "idempotency_key": context.idempotency_key,
        }
        message = {name: RawJson.of(value) for name, value in head.items()} | {"input": make_input(claim)}
        body = write_object(message).text.encode()
        check_size(body, self.toolbox.result_limit, self.step_slug, "its queue")
        if self.toolbox.queue_key is not None:
            body = sign_message(body, self.toolbox.queue_key)
        rows = self.toolbox.rows if self.is_row else None
        return Deferred(await scheme.publish(_Order(url, await self._find_login(), body, context, rows)))

    async def _find_login(self) -> Login:
        binding = self.binding
        if self.is_row:
            origin = find_queue_origin(binding.url)
            self.toolbox.rows.check_credential(binding.login_env, binding.login_block, origin)
        login = await read_credential(binding.login_env, binding.login_block, self.toolbox.find_secret)
        return Login(*split_login(login, binding.login_env or f"Prefect Secret block {binding.login_block!r}"))
