"""Checks of deployments, waiting runs and work pools."""

from collections import Counter
from collections.abc import Collection, Mapping

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import WorkerStatus, WorkPool

from pgflow_prefect.database.implementations import CLASSIC
from pgflow_prefect.deployment.deployments import find_deployments
from pgflow_prefect.deployment.diagnosis.findings import Check, Outcome, Patient, Verdict
from pgflow_prefect.models import Status
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.workflow import to_flow_name

_UNTAKEN_AFTER = 60.0  # seconds: worker and bridge look every other second
_UNSHOWN_AFTER = 60.0  # seconds: a worker shows a failed run soon after its end
_NAMED = 10  # runs set aside
_PAGE = 200  # the largest answer of Prefect's API by default


async def _list_enabled(patient: Patient) -> list[str]:
    return [slug for slug, each in (await patient.reached.list_enabled()).items() if each.enabled]


async def _check_deployments(patient: Patient) -> Verdict:
    enabled = await _list_enabled(patient)
    if not enabled:
        return Verdict(
            Outcome.OK, "no workflow is enabled: `pgflow-prefect deploy` or `pgflow-prefect worker` enables one"
        )
    found = await find_deployments(patient.prefect, map(to_flow_name, enabled))
    missing = [slug for slug in enabled if to_flow_name(slug) not in {*found.chosen, *found.ambiguous}]
    if missing:
        return Verdict(
            Outcome.WARNING,
            f"enabled, and without a deployment: {', '.join(missing)}",
            f"pgflow-prefect deploy {' '.join(missing)}",
            details=tuple(missing),
        )
    return Verdict(Outcome.OK, f"all {len(enabled)} enabled workflows have a deployment")


async def _check_runs(patient: Patient) -> Verdict:
    found = await patient.reached.count_untaken_runs(_UNTAKEN_AFTER)
    waiting = {each.workflow_slug: each.runs for each in found if each.runs}
    older = {each.workflow_slug: each.older for each in found if each.older}
    if waiting:
        return Verdict(
            Outcome.WARNING,
            f"no process has taken these runs for more than a minute: {_list_counts(waiting)}",
            "start `pgflow-prefect worker` or `pgflow-prefect bridge`, or more of them",
            details=tuple(waiting),
        )
    if older:
        return Verdict(
            Outcome.WARNING,
            f"runs that were begun before their workflow was enabled: {_list_counts(older)}",
            "`pgflow-prefect worker --adopt` or `pgflow-prefect bridge --adopt` takes them",
            details=tuple(older),
        )
    return Verdict(Outcome.OK, "no run waits for a worker or bridge")


async def _check_set_aside(patient: Patient) -> Verdict:
    found = await patient.reached.list_set_aside(_NAMED)
    if not found:
        return Verdict(Outcome.OK, "no run was set aside")
    count = found[0].runs
    return Verdict(
        Outcome.WARNING,
        f"{count} {'run is' if count == 1 else 'runs are'} set aside; {found[0].run_id} of "
        f"{found[0].workflow_slug!r}: {found[0].reason}",
        "mend what the error names: they are tried again; `pgflow-prefect cancel RUN_ID` ends one",
        details=tuple(f"{each.run_id} of {each.workflow_slug!r}: {each.reason}" for each in found),
    )


async def _check_unshown(patient: Patient) -> Verdict:
    slugs = [*await patient.reached.list_enabled()]
    left = await patient.reached.list_left_unshown(slugs, grace=_UNSHOWN_AFTER, after=None, limit=_PAGE)
    failed = Counter(each.workflow_slug for each in left if each.status is Status.FAILED)
    if not failed:
        return Verdict(Outcome.OK, "no failed run waits to be shown in Prefect")
    more = " or more" if len(left) == _PAGE else ""
    return Verdict(
        Outcome.WARNING,
        f"failed runs that Prefect does not show yet: {_list_counts(failed)}{more}",
        "start `pgflow-prefect worker` for these workflows, or `pgflow-prefect record --since 7d --status failed`",
        details=tuple(str(each.run_id) for each in left if each.status is Status.FAILED),
    )


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} of {slug}" for slug, number in counts.items())


async def _check_work_pools(patient: Patient) -> Verdict:
    enabled = await _list_enabled(patient)
    found = await find_deployments(patient.prefect, map(to_flow_name, enabled))
    of_steps = {each.pool for each in patient.settings.pools.values()}
    names = sorted({each.work_pool_name for each in found.chosen.values() if each.work_pool_name} | of_steps)
    if not names:
        return Verdict(Outcome.OK, "no deployment has a work pool: `pgflow-prefect worker` executes the runs")
    with ask_prefect("a look at the work pools"):
        idle = await _find_idle(patient.prefect, names)
    if not idle:
        return Verdict(Outcome.OK, f"work pools with a worker: {', '.join(names)}")
    advice = ", ".join(f"`prefect worker start --pool '{name}'`" for name in idle)
    return Verdict(
        Outcome.WARNING,
        f"work pools that are missing, paused, or without an online worker: {', '.join(idle)}",
        f"{advice}; a paused one: `prefect work-pool resume NAME`",
        details=tuple(idle),
    )


async def _find_idle(client: PrefectClient, names: Collection[str]) -> list[str]:
    chosen = WorkPoolFilter(name=WorkPoolFilterName(any_=[*names]))
    pools = await client.read_work_pools(work_pool_filter=chosen, limit=_PAGE)
    idle = [pool.name for pool in pools if pool.is_paused or not await _has_worker(client, pool)]
    return sorted({*names} - {pool.name for pool in pools} | {*idle})


async def _has_worker(client: PrefectClient, pool: WorkPool) -> bool:
    if pool.is_push_pool or pool.is_managed_pool:
        return True  # Prefect Cloud starts the runs of these itself
    workers = await client.read_workers_for_work_pool(pool.name, limit=_PAGE)
    return any(worker.status is WorkerStatus.ONLINE for worker in workers)


WORKFLOW_CHECKS = (
    Check("deployments", _check_deployments, needs=("schema", "rights", "prefect api"), schema=CLASSIC.name),
    Check("runs", _check_runs, needs=("schema", "rights"), schema=CLASSIC.name),
    Check("runs set aside", _check_set_aside, needs=("schema", "rights"), schema=CLASSIC.name),
    Check("runs not shown", _check_unshown, needs=("schema", "rights"), schema=CLASSIC.name),
    Check(
        "work pools",
        _check_work_pools,
        needs=("schema", "rights", "prefect api"),
        patience=20,
        schema=CLASSIC.name,
    ),
)
