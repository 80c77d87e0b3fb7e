"""Does a step by a function in the database, in the transaction that completes the step."""

from collections.abc import Collection
from dataclasses import dataclass

from pgflow_prefect.bindings import SqlFunction, parse_function
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.base import RetryPolicy, StepExecution, make_input, make_policy
from pgflow_prefect.models import Claim


@dataclass(frozen=True)
class SqlHandler:
    """`schema.function(jsonb) returns jsonb`, which gets the step's input and returns its result.

    Attributes:
        step_slug: the step.
        binding: which function.
        trusted_owners: if a row binds the step, the roles whose functions it may name; None if code binds it.
    """

    step_slug: str
    binding: SqlFunction
    trusted_owners: tuple[str, ...] | None = None

    @property
    def policy(self) -> RetryPolicy:
        """The binding's."""
        return make_policy(self.binding)

    async def execute(self, claim: Claim, upstream: Collection[str], execution: StepExecution) -> str:
        """Call the function and return its result as JSON text; a time-out cancels the statement."""
        if execution.transaction is None:
            raise UsageError(f"step {self.step_slug!r}: an SQL function can't be called here")
        argument = make_input(claim).text
        path = parse_function(self.binding.function)
        if self.trusted_owners is None:
            return await execution.transaction.call_function(path, argument)
        return await execution.transaction.call_bound_function(
            path, argument, workflow_slug=execution.context.workflow_slug, trusted_owners=self.trusted_owners
        )
