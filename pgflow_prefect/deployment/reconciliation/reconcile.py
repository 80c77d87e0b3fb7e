"""Compares PostgreSQL with Prefect, run by run, and repairs what differs."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType

from pgflow_prefect.database.store import Store
from pgflow_prefect.database.unsettled import UnsettledRun, UnsettledStep
from pgflow_prefect.deployment.reconciliation.comparison import (
    View,
    compare,
    compare_without_prefect,
    is_over,
    is_settled,
    list_dead,
)
from pgflow_prefect.deployment.reconciliation.disagreements import Disagreement, ShownFlowRun, ShownTaskRun
from pgflow_prefect.deployment.reconciliation.failures import Tell, has_vanished, is_end_untold, tell_none
from pgflow_prefect.deployment.reconciliation.prefect_view import (
    list_open_flow_runs,
    read_flow_runs,
    read_open_task_runs,
    read_task_runs,
)
from pgflow_prefect.deployment.reconciliation.repair import repair
from pgflow_prefect.deployment.reconciliation.strangers import compare_stranger
from pgflow_prefect.workflow import to_flow_name

GRACE = 10.0
"""Seconds for which Prefect may show less than PostgreSQL has."""

LAG = 60.0
"""The same for task runs: Prefect stores their states one by one, while others wait in a queue."""

_BATCH = 100  # runs


async def reconcile(
    store: Store,
    client: PrefectClient,
    *,
    apply: bool,
    everything: bool = False,
    strangers: bool = False,
    grace: float = GRACE,
    lag: float = LAG,
    executing: Callable[[], Collection[UUID]] = tuple,
    tell: Tell = tell_none,
) -> list[Disagreement]:
    """Return the disagreements between PostgreSQL and Prefect, and repair them with `apply`.

    Several processes may do so at the same time. It skips ended runs that have agreed before.

    Args:
        store: the database.
        client: Prefect's API.
        apply: make the repairs, and note which runs agree; without it, nothing is written.
        everything: also compare runs that have agreed before.
        strangers: also look for flow runs of this installation whose run the database does not have.
        grace: seconds for which Prefect may be behind.
        lag: seconds for which its task runs may be behind.
        executing: returns the runs that this process executes, which are left alone.
        tell: called with `apply` for each run that has failed while no process executed it.

    Raises:
        ForeignInstallationError: the database is a copy of another one.
        PrefectUnavailableError: Prefect's API does not answer.
        DatabaseUnavailableError: PostgreSQL does not.
    """
    installation = await store.read_installation()
    graces = timedelta(seconds=grace), timedelta(seconds=max(grace, lag))
    comparer = _Comparer(store, client, installation, *graces, executing, tell, is_new=not everything)
    found: list[Disagreement] = []
    after: UUID | None = None
    while run_ids := await store.list_unsettled(after=after, limit=_BATCH, everything=everything):
        after = run_ids[-1]
        found += await comparer.compare_runs(run_ids, apply=apply)
    found += await comparer.compare_open_flow_runs(apply=apply, strangers=strangers)
    return found


async def list_without_prefect(store: Store, *, everything: bool = False) -> list[Disagreement]:
    """Return the disagreements that the rows alone show, while Prefect does not answer."""
    found: list[Disagreement] = []
    after: UUID | None = None
    while run_ids := await store.list_unsettled(after=after, limit=_BATCH, everything=everything):
        after = run_ids[-1]
        for run in await store.read_unsettled(run_ids):
            found += compare_without_prefect(run)
    return found


@dataclass(frozen=True)
class _Comparer:
    store: Store
    client: PrefectClient
    installation: UUID
    grace: timedelta
    lag: timedelta
    executing: Callable[[], Collection[UUID]]
    tell: Tell
    is_new: bool  # no run has agreed before

    async def compare_runs(self, run_ids: Sequence[UUID], *, apply: bool) -> list[Disagreement]:
        found: list[Disagreement] = []
        settled: list[UnsettledRun] = []
        for view in await self._look(run_ids):
            differing = compare(view)
            if differing and apply:
                differing = await self._repair_run(view.run.id)
            elif apply and not differing and is_settled(view):
                settled.append(view.run)
                if self.is_new and has_vanished(view) and view.current is not None:
                    self.tell(view.run, view.current)
            found += differing
        if settled:
            await self.store.settle_runs(settled)
        return found

    async def _repair_run(self, run_id: UUID) -> list[Disagreement]:
        """Compare a run again, because the first comparison may be old, and make the repairs."""
        made: list[Disagreement] = []
        for view in await self._look([run_id]):
            for each in compare(view):
                made.append(await repair(self.store, self.client, each))
                if is_end_untold(view, made[-1]) and view.current is not None:
                    self.tell(view.run, view.current)
        return made

    async def _look(self, run_ids: Sequence[UUID]) -> list[View]:
        """Return both sides of these runs; PostgreSQL is read first, so that Prefect's side is never older."""
        ours = self.executing()
        runs = await self.store.read_unsettled([each for each in run_ids if each not in ours])
        steps = await self._read_steps([run.id for run in runs if list_dead(run, self.grace)])
        over = [step.task_run_id for run in runs if is_over(run, self.lag) for step in steps[run.id]]
        dead = {each for run in runs for each in list_dead(run, self.grace)}
        flow_runs = await read_flow_runs(self.client, dead, self.installation)
        started = [each.id for each in flow_runs.values() if each.type is not StateType.SCHEDULED]
        task_runs = await read_open_task_runs(self.client, started)
        task_runs |= await read_task_runs(self.client, over)
        by_flow_run: dict[UUID | None, dict[UUID, ShownTaskRun]] = defaultdict(dict)
        for task_run in task_runs.values():
            by_flow_run[task_run.flow_run_id][task_run.id] = task_run
        return [
            View(
                run,
                tuple(steps[run.id]),
                {each: flow_runs[each] for each in run.flow_run_ids if each in flow_runs},
                {task: shown for each in run.flow_run_ids for task, shown in by_flow_run[each].items()},
                self.grace,
                self.lag,
            )
            for run in runs
        ]

    async def _read_steps(self, run_ids: Sequence[UUID]) -> dict[UUID, list[UnsettledStep]]:
        steps: dict[UUID, list[UnsettledStep]] = defaultdict(list)
        for step in await self.store.list_unsettled_steps(run_ids) if run_ids else []:
            steps[step.run_id].append(step)
        return steps

    async def compare_open_flow_runs(self, *, apply: bool, strangers: bool) -> list[Disagreement]:
        """Compare from Prefect's side: open flow runs that the rows may not know."""
        slugs = {to_flow_name(slug): slug for slug in await self.store.list_slugs()}
        differing: list[Disagreement] = []
        async for page in list_open_flow_runs(self.client, slugs, self.installation):
            found = await self._find_strangers([(slugs[name], shown) for name, shown in page])
            differing += [each for each in found if strangers or each.run_id is not None]
        return [await repair(self.store, self.client, each) for each in differing] if apply else differing

    async def _find_strangers(self, page: Iterable[tuple[str, ShownFlowRun]]) -> list[Disagreement]:
        shown = {each.id: (slug, each) for slug, each in page if each.owned}
        run_ids = {each.id: each.named_run_id for _, each in shown.values()}
        existing, takers = await self.store.find_known(run_ids.values(), shown)
        ours = self.executing()
        found: list[Disagreement | None] = []
        for flow_run_id, (slug, each) in shown.items():
            run_id = run_ids[flow_run_id]
            if flow_run_id not in takers and run_id not in ours:
                known = run_id if run_id in existing else None
                found.append(compare_stranger(slug, each, known, datetime.now(UTC), self.grace))
        return [each for each in found if each is not None]
