"""The interface of a handler, and the step's data that it gets."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar
from uuid import UUID

import httpx

from pgflow_prefect.bindings import Binding
from pgflow_prefect.database.step_connection import LazyConnection, SyncConnection
from pgflow_prefect.database.step_transaction import Logger, StepTransaction
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.caching import StepCache
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.handlers.row_policy import RowPolicy
from pgflow_prefect.handlers.stored import ResultOptions, StepResults, Storage
from pgflow_prefect.models import Claim, StepInput
from pgflow_prefect.programs import Pool, Program
from pgflow_prefect.raw_json import RawJson, write_object
from pgflow_prefect.wording import write_moment

C = TypeVar("C")


def _identity(value: Any) -> Any:  # noqa: ANN401
    return value


class FailedStep(NamedTuple):
    """A step of a run that has failed.

    Attributes:
        slug: the step.
        message: its error, as the database has it.
    """

    slug: str
    message: str


@dataclass(frozen=True)
class AnyStepContext(Generic[C]):
    """What a handler may ask for as its argument `context`, with the type of its connection.

    Attributes:
        run_id: the run, a row of `pgflow.runs`.
        workflow_slug: the run's workflow.
        step_slug: the step.
        index: which of the step's tasks this is; a plain step has one, 0.
        attempt: which execution of the step this is, counted from 1, over crashes and takeovers too.
        logger: its messages show in Prefect's UI, under the step's task run.
        shadow: the step is external, and this result is only compared: do nothing that has an effect elsewhere.
        failed_steps: those of the run that had failed when this attempt began, in the order of their ends; empty unless
            the rule of this step lets it run after a failure. Steps that were not run are not among them.
        logical_date: the time that the run is about, in UTC: when its schedule was due, or the date of its backfill.
            None for any other run.
        data_interval_start: the beginning of the run's data interval, in UTC: when its schedule was due before. None
            where that is not known.
        data_interval_end: its end, which is the logical date.
    """

    run_id: UUID
    workflow_slug: str
    step_slug: str
    attempt: int
    logger: Logger
    shadow: bool = False
    index: int = 0
    failed_steps: tuple[FailedStep, ...] = ()
    logical_date: datetime | None = None
    data_interval_start: datetime | None = None
    data_interval_end: datetime | None = None
    _connect: Callable[[], Any] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def connection(self) -> C:
        """A psycopg connection whose writes commit together with the step's completion: exactly once, or not at all.

        It opens at its first use, in a transaction that ends with the step. If the step fails, or another program has
        ended it, everything is rolled back. If PostgreSQL ends the transaction for a reason of the moment, such as a
        serialization failure, the step is executed again. `connection.transaction()` sets a
        savepoint.

        Returns:
            In a sync handler a `psycopg.Connection`. In an async one an object that `await` turns into a
            `psycopg.AsyncConnection`. It also works without that: `await context.connection.execute(…)`, `async with
            context.connection.cursor()`, `async with context.connection.transaction()`.

        Raises:
            UsageError: this execution of the step has ended, as after a time-out.
            NoConnectionError: the server had none within `PGFLOW_REPORT_TIMEOUT`: it is full, away or read-only.
        """
        if self._connect is None:
            raise UsageError(f"step {self.step_slug!r}: context.connection is not available here")
        connection: C = self._connect()
        return connection

    @property
    def idempotency_key(self) -> str:
        """A key that all attempts of this task share, and no other task has. Give it to services that take one."""
        # Before the slug, which may have any characters, an index can't be part of another step's slug.
        return f"{self.run_id}.{self.index}/{self.step_slug}" if self.index else f"{self.run_id}/{self.step_slug}"

    def __getstate__(self) -> dict[str, Any]:
        """Return the context without the connection, for another process."""
        return {**vars(self), "_connect": None}

    def __copy__(self) -> Self:
        """Return the same context, because nothing in it can change."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the same context, because nothing in it can change."""
        return self


@dataclass(frozen=True)
class StepContext(AnyStepContext[SyncConnection]):
    """The context of a sync handler: `connection` is a `psycopg.Connection`."""


@dataclass(frozen=True)
class AsyncStepContext(AnyStepContext[LazyConnection]):
    """The context of an async handler: `await context.connection` is a `psycopg.AsyncConnection`."""


@dataclass(frozen=True)
class AnyItemContext(AnyStepContext[C]):
    """What the handler of a map may ask for as its argument `context`: of one item.

    `attempt` counts the executions of the item. The writes of `connection` commit together with the item's completion.

    Attributes:
        item_index: the item's place in the array, from 0. Of a batch, that of its first item.
        item_indexes: the places of all items of a batch.
    """

    item_index: int = 0
    item_indexes: tuple[int, ...] = ()

    @property
    def idempotency_key(self) -> str:
        """A key that all attempts of this item share, or of this batch, and no other item or step has."""
        first, last = self.item_indexes[0], self.item_indexes[-1]
        if self.item_indexes != tuple(range(first, last + 1)):  # some of a former batch are tried again
            which = sha256(repr(self.item_indexes).encode()).hexdigest()[:16]
        else:
            which = str(first) if first == last else f"{first}-{last}"
        # Before the slug, as the index of a task. The key of the step itself has none.
        return f"{self.run_id}.{which}/{self.step_slug}"


@dataclass(frozen=True)
class ItemContext(AnyItemContext[SyncConnection]):
    """The context of a sync handler of a map: `connection` is a `psycopg.Connection`."""


@dataclass(frozen=True)
class AsyncItemContext(AnyItemContext[LazyConnection]):
    """The context of an async handler of a map: `await context.connection` is a `psycopg.AsyncConnection`."""


@dataclass(frozen=True)
class StepExecution:
    """One execution of a step: the user's context, and the executor's part.

    Attributes:
        context: what the user's code may ask for.
        transaction: of `context.connection`; None if there is no connection.
        settle: turns a result that is no plain value, such as a state, into its value.
        results: writes and reads results that are in a storage; None if there is no storage.
        cache: finds results of earlier runs; None if the step takes none over.
    """

    context: AnyStepContext[Any]
    transaction: StepTransaction | None = None
    settle: Callable[[Any], Any] = _identity
    results: StepResults | None = None
    cache: StepCache | None = None

    @classmethod
    def of(
        cls,
        context: AnyStepContext[Any],
        transaction: StepTransaction,
        settle: Callable[[Any], Any] = _identity,
        results: StepResults | None = None,
        cache: StepCache | None = None,
    ) -> "StepExecution":
        """Return the execution in a transaction, to which the context's connection belongs."""
        connected = replace(context)
        # Not a parameter of the class, because users make contexts for the tests of their handlers.
        object.__setattr__(connected, "_connect", lambda: transaction.connection)
        return cls(connected, transaction, settle, results, cache)

    def abandon(self) -> None:
        """Note that the step has abandoned the handler, which goes on in its thread. Its writes must not count."""
        if self.transaction is not None:
            self.transaction.abandon()


@dataclass(frozen=True)
class RetryPolicy:
    """How often a step is tried again after an error, and how long an attempt may take.

    Attributes:
        retries: attempts after the first one.
        retry_delay_seconds: before each of them, or a list with one for each; the last one repeats.
        retry_jitter_factor: spreads a delay at random, by up to this factor.
        timeout_seconds: for each attempt; None for no limit.
        retry_condition: of Python code, Prefect's `retry_condition_fn`: says whether to try again after this error.
    """

    retries: int = 0
    retry_delay_seconds: float | list[float] = 0
    retry_jitter_factor: float | None = None
    timeout_seconds: float | None = None
    retry_condition: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Deferred:
    """The result of a handler that has handed the work to another program. The step waits for that program's report.

    Attributes:
        reason: who was asked, for people: `on queue 'mails' of redis://localhost`.
    """

    reason: str


def _refuse_storage(given: object) -> Storage:
    raise UsageError("no storage of results is known here")


def _refuse_rows() -> httpx.AsyncClient:
    raise UsageError("no request of a row can be sent here")


@dataclass(frozen=True)
class Toolbox:
    """What the handlers of one process share.

    Attributes:
        http: a client for requests; its time-outs are given with each.
        find_secret: returns the text of a Prefect Secret block by name.
        result_limit: bytes of JSON that a result may have.
        rows: what a binding of a row may name and reach.
        row_http: a client that only connects to addresses that rows may reach.
        queue_key: signs messages for queues; None for no signature.
        flat_body: whether endpoints get a step's input as the whole body, as they did before `input` was its member.
        function_owners: the roles whose SQL functions rows may name, beside the roles that are always trusted.
        results: what the settings say of results that a row can't have.
        find_storage: returns the storage that code or settings name.
        programs: the programs that rows may name.
        pools: the work pools that rows may name.
        secrets: texts that no output of a program may show.
    """

    http: Callable[[], httpx.AsyncClient]
    find_secret: Callable[[str], Awaitable[str]]
    result_limit: int
    rows: RowPolicy = field(default_factory=RowPolicy)
    row_http: Callable[[], httpx.AsyncClient] = _refuse_rows
    flat_body: bool = False
    function_owners: tuple[str, ...] = ()
    programs: Mapping[str, Program] = field(default_factory=dict, repr=False)
    pools: Mapping[str, Pool] = field(default_factory=dict)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    queue_key: bytes | None = field(default=None, repr=False)
    results: ResultOptions = field(default_factory=ResultOptions)
    find_storage: Callable[[object], Storage] = _refuse_storage


class Handler(Protocol):
    """Does the work of one step."""

    @property
    def step_slug(self) -> str:
        """The step."""

    @property
    def policy(self) -> RetryPolicy:
        """When to try again."""

    async def execute(
        self, claim: Claim, upstream: Collection[str], execution: StepExecution
    ) -> str | Decided | Deferred:
        """Do the step's work and return its result as JSON text, or `Deferred` if another program does it.

        `Decided` says as well that the step is skipped, or which branches it takes.

        Raises:
            ArgumentInvalidError: the input does not fit.
            ResultInvalidError: the result does not fit.
            RetryLaterError: another attempt, after a certain time, may succeed.
            Exception: the work itself raised it.
        """


_NULL, _NONE = RawJson("null"), RawJson("{}")


def make_policy(binding: Binding) -> RetryPolicy:
    """Return the retry policy of a binding."""
    delay = binding.retry_delay_seconds
    return RetryPolicy(
        binding.retries,
        list(delay) if isinstance(delay, tuple) else delay,
        binding.retry_jitter_factor,
        binding.timeout_seconds,
    )


def make_input(claim: Claim | StepInput) -> RawJson:
    """Return a step's input for SQL functions, endpoints and queues: `{"payload": …, "<upstream step>": …}`.

    The result of a step called `payload` has the key `payload_`, as in Python. Values pass unchanged from the database,
    and are not parsed. If the run has a logical date, the payload has it, too.
    """
    payload = claim.payload or _NULL
    if claim.logical_date is not None:
        payload = add_dates(payload, claim.logical_date, claim.interval_start, claim.interval_end)
    return join_input(payload, claim.upstream_results or _NONE)


def add_dates(payload: RawJson, logical_date: datetime, start: datetime | None, end: datetime | None) -> RawJson:
    """Return a payload with the dates of its run, as `pgflow.add_dates` writes them; one that is no object stays so.

    Args:
        payload: any document. A member that it has stays.
        logical_date: the time that the run is about.
        start: the beginning of its data interval.
        end: its end.
    """
    if not payload.text.lstrip().startswith("{"):
        return payload
    dates = {"logical_date": logical_date, "interval_start": start, "interval_end": end}
    named = {name: RawJson.of(write_moment(moment)) for name, moment in dates.items() if moment is not None}
    members = payload.split()
    return payload if named.keys() <= members.keys() else write_object(named | members)


def join_input(payload: RawJson, results: RawJson) -> RawJson:
    """Return the same as `make_input`, from a run's payload and the results of a step's upstream steps.

    Args:
        payload: any document.
        results: an object, by slug.
    """
    if "payload" in results.text:  # a step may have such a slug
        named = {"payload_" if slug == "payload" else slug: result for slug, result in results.split().items()}
        return write_object({"payload": payload} | named)
    members = results.text.strip().removeprefix("{").strip()
    return RawJson(f'{{"payload":{payload.text}{"" if members == "}" else ","}{members}')
