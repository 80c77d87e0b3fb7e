"""Chooses the handler of a step: the row decides, then Python. Without both, the step is external."""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import assert_never

from pgflow_prefect.bindings import (
    AnyBinding,
    Child,
    Command,
    External,
    HttpEndpoint,
    Kind,
    NamedCommand,
    NamedWorkPool,
    Python,
    Queue,
    SqlFunction,
    WorkPool,
    parse_binding,
)
from pgflow_prefect.handlers.base import Handler, RetryPolicy, Toolbox, make_policy
from pgflow_prefect.handlers.command import CommandHandler
from pgflow_prefect.handlers.http_endpoint import HttpHandler
from pgflow_prefect.handlers.python import AT_ONCE, PythonHandler
from pgflow_prefect.handlers.queue import QueueHandler
from pgflow_prefect.handlers.sql_function import SqlHandler
from pgflow_prefect.handlers.task_options import TaskOptions
from pgflow_prefect.handlers.work_pool import WorkPoolHandler
from pgflow_prefect.models import Claim


@dataclass(frozen=True)
class Chosen:
    """Who does a step, according to its latest claim.

    Attributes:
        policy: when to try again.
        handler: does the step, or None if an external worker does.
        shadow: the handler to run beside an external worker.
    """

    policy: RetryPolicy
    handler: Handler | None = None
    shadow: PythonHandler | None = None


@dataclass(frozen=True)
class StepHandlers:
    """The handlers and bindings of a step in Python code.

    Attributes:
        step_slug: the step.
        function: the handler in Python, if there is one that is no stub.
        binding: from `Workflow.bind`.
        task_options: of its task run in Prefect.
        at_once: of a map that is bound, the most items that a process executes at the same time.
        source: the file of handlers, relative to the working directory if it is beneath it.
    """

    step_slug: str
    function: PythonHandler | None = None
    binding: AnyBinding | None = None
    task_options: TaskOptions = field(default_factory=TaskOptions)
    at_once: int | None = None
    source: str | None = None

    @property
    def items_at_once(self) -> int:
        """The most items of a map that a process executes at the same time."""
        if self.at_once is not None:
            return self.at_once
        return self.function.at_once if self.function is not None else AT_ONCE

    @cached_property
    def bound(self) -> AnyBinding:
        """The binding if no row overrides it."""
        return self.binding or (Python() if self.function is not None else External())

    @property
    def policy(self) -> RetryPolicy:
        """When to try again, if no row overrides it."""
        if self.binding is None and self.function is not None:
            return self.function.policy
        return _make_policy(self.bound)

    @property
    def description(self) -> str | None:
        """What it does, for Prefect's UI."""
        return self.function.description if self.function is not None else None

    @property
    def wants_payload(self) -> bool:
        """Whether the function in Python takes the run's payload; the other kinds always get it."""
        return self.function is not None and self.function.wants_payload

    def choose_upstream(self, upstream: Collection[str]) -> list[str] | None:
        """Return the upstream slugs whose results the Python function takes, or None for all."""
        return self.function.choose_upstream(upstream) if self.function is not None else []

    def _find_binding(self, claim: Claim) -> AnyBinding:
        if claim.kind == Kind.CHILD:  # as the definition says, and no row can
            return self.bound if isinstance(self.bound, Child) else Child(claim.target or "")
        return self.bound if claim.kind is None else parse_binding(claim.kind, claim.target, claim.options or {})

    def choose(self, claim: Claim, toolbox: Toolbox) -> Chosen:
        """Return who does the step: according to the row in the claim, or else to the Python code.

        Raises:
            UsageError: the row is invalid.
        """
        binding = self._find_binding(claim)
        is_row = claim.kind is not None
        handler: Handler | None = None
        shadow: PythonHandler | None = None
        match binding:
            case SqlFunction():
                handler = SqlHandler(self.step_slug, binding, toolbox.function_owners if is_row else None)
            case HttpEndpoint():
                handler = HttpHandler(self.step_slug, binding, toolbox, is_row)
            case Queue():
                handler = QueueHandler(self.step_slug, binding, toolbox, is_row)
            case Command() | NamedCommand():
                handler = CommandHandler(self.step_slug, binding, toolbox)
            case WorkPool() | NamedWorkPool():
                handler = WorkPoolHandler(self.step_slug, binding, toolbox, self.source)
            case External():
                shadow = self.function if binding.shadow and self.function and self.function.shadow else None
            case Python():
                handler = self.function  # None if another process, started with another file, has it
            case Child():
                pass  # PostgreSQL begins the run, and ends the step with it
            case _:
                assert_never(binding)
        return Chosen(handler.policy if handler is not None else _make_policy(binding), handler, shadow)


def _make_policy(binding: AnyBinding) -> RetryPolicy:
    # PostgreSQL counts the retries of a child. Prefect must not try the step again beside that.
    return RetryPolicy(timeout_seconds=binding.timeout_seconds) if isinstance(binding, Child) else make_policy(binding)
