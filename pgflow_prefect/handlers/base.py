"""What a handler is to the rest of the package, and what it is told about the step that it does."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from pgflow_prefect.models import Claim

Logger = logging.Logger | logging.LoggerAdapter[Any]


@dataclass(frozen=True)
class StepContext:
    """What a handler may ask for as its argument `context`.

    Attributes:
        run_id: the run, a row of `pgflow.runs`.
        workflow_slug: the run's workflow.
        step_slug: the step.
        attempt: which execution of the step this is, counted from 1, over crashes and takeovers too.
        logger: its messages show in Prefect's UI, under the step's task run.
    """

    run_id: UUID
    workflow_slug: str
    step_slug: str
    attempt: int
    logger: Logger

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
