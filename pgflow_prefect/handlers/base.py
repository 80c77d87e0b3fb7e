"""What a handler is to the rest of the package, and what it is told about the step that it does."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

from pgflow_prefect.database.step_transaction import Logger, StepTransaction
from pgflow_prefect.errors import UsageError
from pgflow_prefect.models import Claim


@dataclass(frozen=True)
class StepContext:
    """What a handler may ask for as its argument `context`.

    Attributes:
        run_id: the run, a row of `pgflow.runs`.
        workflow_slug: the run's workflow.
        step_slug: the step.
        attempt: which execution of the step this is, counted from 1, over crashes and takeovers too.
        logger: its messages show in Prefect's UI, under the step's task run.
        transaction: what `connection` belongs to; of use to handlers of this package only.
    """

    run_id: UUID
    workflow_slug: str
    step_slug: str
    attempt: int
    logger: Logger
    transaction: StepTransaction | None = field(default=None, repr=False, compare=False)

    @property
    def connection(self) -> Any:  # noqa: ANN401  which of two it is depends on who asks
        """A psycopg connection whose writes commit together with the step's completion: exactly once, or not at all.

        It is opened when it is first used, in a transaction that ends with the step. Where the step fails, or somebody
        else has ended it, everything is rolled back; where PostgreSQL ends the transaction for a reason of the moment,
        such as a serialization failure, the step is executed again. `connection.transaction()` sets a savepoint.

        Returns:
            In a sync handler a `psycopg.Connection`. In an async one what `await` makes a `psycopg.AsyncConnection`,
            and what can be used as one without: `await context.connection.execute(…)`, `async with
            context.connection.cursor()`, `async with context.connection.transaction()`.

        Raises:
            UsageError: this execution of the step has ended, as after a time-out.
            TransientError: PostgreSQL can't be reached at this moment.
        """
        if self.transaction is None:
            raise UsageError(f"step {self.step_slug!r}: context.connection is not available here")
        return self.transaction.connection

    def abandon(self) -> None:
        """Note that the handler goes on in its thread though nobody waits for it: its writes are not to count."""
        if self.transaction is not None:
            self.transaction.abandon()

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this step in this run, and for no other: give it to services that take one."""
        return f"{self.run_id}/{self.step_slug}"


@dataclass(frozen=True)
class RetryPolicy:
    """How often a step is tried again when its handler raises, and how long an attempt may take.

    Attributes:
        retries: attempts after the first one.
        retry_delay_seconds: before each of them, or one for each; the last one repeats.
        retry_jitter_factor: spreads a delay at random, by up to this factor.
        timeout_seconds: for each attempt; None for no limit.
    """

    retries: int = 0
    retry_delay_seconds: float | list[float] = 0
    retry_jitter_factor: float | None = None
    timeout_seconds: float | None = None


class Handler(Protocol):
    """What does the work of one step."""

    @property
    def step_slug(self) -> str:
        """The step."""

    @property
    def policy(self) -> RetryPolicy:
        """When to try again."""

    @property
    def description(self) -> str | None:
        """What it does, for Prefect's UI."""

    @property
    def arguments(self) -> Collection[str]:
        """The names of its arguments, for validation."""

    @property
    def wants_payload(self) -> bool:
        """Whether the run's payload is to be fetched for it."""

    def choose_upstream(self, upstream: Collection[str]) -> list[str] | None:
        """Return those of the step's upstream slugs whose results it takes; None for all."""

    async def execute(self, claim: Claim, upstream: Collection[str], context: StepContext) -> str:
        """Do the step's work and return its result as JSON text.

        Raises:
            ArgumentInvalidError: the input does not fit.
            ResultInvalidError: the result does not fit.
            Exception: whatever the work itself raises.
        """
