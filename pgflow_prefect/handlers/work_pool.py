"""Does a step on one of Prefect's work pools: a process there executes the step's function in Python, and reports."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pgflow_prefect.bindings import NamedWorkPool, WorkPool
from pgflow_prefect.errors import NotRetriableError
from pgflow_prefect.handlers.base import Deferred, RetryPolicy, StepExecution, Toolbox, make_policy
from pgflow_prefect.models import Claim
from pgflow_prefect.programs import Pool
from pgflow_prefect.wording import suggest


@dataclass(frozen=True)
class WorkPoolHandler:
    """A work pool, to which an attempt is handed over.

    Attributes:
        step_slug: the step.
        binding: which work pool; a row can only name one of the worker's settings.
        toolbox: has these settings.
        source: the file of handlers, relative to the directory there; None for the usual one.
    """

    step_slug: str
    binding: WorkPool | NamedWorkPool
    toolbox: Toolbox
    source: str | None = None

    @property
    def policy(self) -> RetryPolicy:
        """The binding's."""
        return make_policy(self.binding)

    @property
    def pool(self) -> Pool:
        """The work pool.

        Raises:
            NotRetriableError: the settings do not name it.
        """
        return find_pool(self.binding, self.toolbox.pools)

    async def execute(self, claim: Claim, upstream: Collection[str], execution: StepExecution) -> Deferred:
        """Hand the attempt over. First, PostgreSQL notes it; then the flow run is created, by any owner of the run.

        Raises:
            NotRetriableError: the settings do not name the work pool.
        """
        return Deferred(f"to work pool {self.pool.pool!r}")


def find_pool(binding: WorkPool | NamedWorkPool, pools: Mapping[str, Pool]) -> Pool:
    """Return the work pool of a binding.

    Args:
        binding: of Python code, or of a row.
        pools: those of the settings, by name.

    Raises:
        NotRetriableError: the settings do not name it.
    """
    if isinstance(binding, WorkPool):
        return binding.place
    if binding.name in pools:
        return pools[binding.name]
    there = f"they name {', '.join(sorted(pools))}" if pools else "they name none"
    raise NotRetriableError(
        f"the settings of this process name no work pool {binding.name!r}{suggest(binding.name, pools)}: {there}. "
        "Add it to PGFLOW_WORK_POOLS where steps are executed"
    )
