"""Prints what `deploy` has done, or would do."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pgflow_prefect.cli.candidates import Skipped
from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.enable import print_older_runs
from pgflow_prefect.deployment.deployments.automations import AutomationPlan
from pgflow_prefect.deployment.deployments.change import Change
from pgflow_prefect.deployment.deployments.plan import Outcome, Plan
from pgflow_prefect.deployment.deployments.write import Deployed

MANY = 10
"""From this many deployments on, a progress bar is shown."""

_GONE = "its workflow is gone from the database"
_NO_POOL = "no work pool: `pgflow-prefect worker` runs it"
_VERBS = {Outcome.CREATED: "create", Outcome.UPDATED: "update", Outcome.DELETED: "delete"}


@dataclass(frozen=True)
class Report:
    """The outcome for one workflow.

    Attributes:
        deployed: its deployment.
        changes: how the deployment differed.
        enabled: whether workers and bridges take its runs.
        problems: why it was not enabled.
        stubs: the steps that are external until their handlers are written.
        older_runs: pending runs that no worker takes, because they began before the workflow was enabled.
    """

    deployed: Deployed
    changes: tuple[Change, ...] = ()
    enabled: bool = False
    problems: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    older_runs: tuple[UUID, ...] = ()

    @property
    def is_worth_saying(self) -> bool:
        """Whether there is anything to print."""
        return True

    def print(self) -> None:
        """Print what was done to the deployment."""
        deployed = self.deployed
        if deployed.outcome is Outcome.DELETED:
            out.print(f"deleted deployment {deployed.name}: {_GONE}", markup=False)
            return
        by = f"work pool {deployed.work_pool!r}" if deployed.work_pool else _NO_POOL
        where = f": {deployed.url}" if deployed.url else ""
        out.print(f"{deployed.outcome} deployment {deployed.name} ({by}){where}", markup=False)
        _print_changes(self.changes)
        print_older_runs(list(self.older_runs))
        if self.stubs:
            out.print(f"external until their stubs are filled in: {', '.join(self.stubs)}", markup=False)
        if self.problems:
            todo = "see `pgflow-prefect validate`"
            state = "is enabled all the same, and its runs will fail" if self.enabled else "is not enabled yet"
            slug = deployed.workflow_slug
            out.print(f"workflow {slug!r} {state}: {todo}, then `pgflow-prefect deploy {slug}`", markup=False)

    def to_json(self) -> dict[str, object]:
        """Return the JSON value for scripts."""
        return {
            "workflow": self.deployed.workflow_slug,
            "deployment": self.deployed.name,
            "id": str(self.deployed.id),
            "outcome": self.deployed.outcome,
            "changes": [each.to_json() for each in self.changes],
            "work_pool": self.deployed.work_pool,
            "url": self.deployed.url,
            "enabled": self.enabled,
            "problems": list(self.problems),
            "older_runs": [str(each) for each in self.older_runs],
        }


@dataclass(frozen=True)
class Preview:
    """What deploying would do to one workflow.

    Attributes:
        plan: the change of its deployment.
        enables: deploying would enable the workflow, which is not enabled now.
    """

    plan: Plan
    enables: bool

    @property
    def is_worth_saying(self) -> bool:
        """Whether there is anything to be done."""
        return self.enables or self.plan.outcome is not Outcome.UNCHANGED

    def print(self) -> None:
        """Print what would be done to the deployment."""
        if self.plan.outcome is Outcome.UNCHANGED:
            out.print(f"would leave deployment {self.plan.name} as it is", markup=False)
        else:
            why = f": {_GONE}" if self.plan.outcome is Outcome.DELETED else ""
            if self.plan.outcome is Outcome.CREATED and not self.plan.work_pool:
                why = f" ({_NO_POOL})"
            out.print(f"would {_VERBS[self.plan.outcome]} deployment {self.plan.name}{why}", markup=False)
        if self.plan.outcome is Outcome.CREATED:  # of others, what changes is said
            given = [Change("work pool", None, self.plan.work_pool)] if self.plan.work_pool else []
            _print_changes([*given, *self.plan.schedules.changes])
        _print_changes(self.plan.changes)
        if self.enables:
            out.print(f"would enable workflow {self.plan.workflow_slug!r}", markup=False)

    def to_json(self) -> dict[str, object]:
        """Return the JSON value for scripts."""
        return {
            "workflow": self.plan.workflow_slug,
            "deployment": self.plan.name,
            "id": str(self.plan.id) if self.plan.id else None,
            "outcome": self.plan.outcome,
            "changes": [each.to_json() for each in self.plan.changes],
            "work_pool": self.plan.work_pool,
            "schedule": self.plan.schedule,
            "enables": self.enables,
        }


@dataclass(frozen=True)
class AutomationReport:
    """What was done, or would be done, to the automation of a workflow.

    Attributes:
        plan: its change.
        is_preview: nothing was done.
    """

    plan: AutomationPlan
    is_preview: bool = False

    @property
    def is_worth_saying(self) -> bool:
        """Whether there is anything to print."""
        return True

    def print(self) -> None:
        """Print the change."""
        verb = f"would {_VERBS[self.plan.outcome]}" if self.is_preview else self.plan.outcome
        why = f": {_GONE}" if self.plan.is_of_none else ""
        out.print(f"{verb} {self.plan.name}{why}", markup=False)
        _print_changes(self.plan.changes)

    def to_json(self) -> dict[str, object]:
        """Return the JSON value for scripts."""
        return {
            "workflow": self.plan.workflow_slug,
            "automation": self.plan.name,
            "outcome": self.plan.outcome,
            "changes": [each.to_json() for each in self.plan.changes],
        }


def print_found(
    found: Sequence[Report | Preview | AutomationReport], skipped: Sequence[Skipped], *, json: bool
) -> None:
    """Print the outcomes. People also read that there is nothing to do.

    Args:
        found: the outcome of each deployment.
        skipped: the workflows that are left out.
        json: print JSON.
    """
    if json:
        left_out = [{"workflow": each.slug, "outcome": "skipped", "reason": each.reason} for each in skipped]
        print_json([*(each.to_json() for each in found), *left_out])
    elif any(each.is_worth_saying for each in found):
        for each in found:
            each.print()
        for left in skipped:
            out.print(f"skipped workflow {left.slug!r}: {left.reason}", markup=False)
    elif found:
        many = f"{len(found)} deployments are as they" if len(found) > 1 else "1 deployment is as it"
        out.print(f"nothing to do: {many} would be", markup=False)


@contextmanager
def show_progress(count: int, *, quiet: bool) -> Iterator[Callable[[Deployed], None]]:
    """Show a progress bar on a terminal if there are many deployments. Yield the function to call after each."""
    if quiet or count < MANY or not out.is_terminal:
        yield lambda deployed: None
        return
    columns = (BarColumn(complete_style="cyan"), MofNCompleteColumn(), TextColumn("deployments"), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("deployments", total=count)
        yield lambda deployed: bar.advance(task)


def _print_changes(changes: Sequence[Change]) -> None:
    for change in changes:
        out.print(f"  {change}", markup=False)
