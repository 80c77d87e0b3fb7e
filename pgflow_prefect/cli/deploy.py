"""`deploy`, and its part that `import --deploy` shares."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from json import dumps as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

from cyclopts import Parameter

from pgflow_prefect.cli.console import err
from pgflow_prefect.cli.deploy_options import NO_FLAGS, DeployFlags
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, Handlers, make_settings
from pgflow_prefect.errors import PgflowPrefectError, UsageError

if TYPE_CHECKING:
    from pgflow_prefect.cli.candidates import Candidate
    from pgflow_prefect.cli.deploy_report import AutomationReport, Preview, Report
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.deployment.deployments.apply import Plans
    from pgflow_prefect.deployment.deployments.change import Change
    from pgflow_prefect.deployment.deployments.wanted import Options
    from pgflow_prefect.deployment.deployments.write import Deployed
    from pgflow_prefect.settings import Settings


@dataclass(frozen=True)
class Wish:
    """The arguments of `deploy`.

    Attributes:
        slugs: the workflows, or None for all.
        handlers: their file or module.
        options: of the deployments.
        plan: only show what `deploy` would do.
        prune: delete the deployments of workflows that are gone.
        json: print JSON.
    """

    slugs: tuple[str, ...] | None
    handlers: str | None
    options: Options
    plan: bool
    prune: bool
    json: bool


def deploy(
    *workflows: str,
    all_: Annotated[bool, Parameter(name="--all", negative="", show_default=False)] = False,
    handlers: Handlers = None,
    flags: DeployFlags = NO_FLAGS,
    as_in_airflow: Annotated[bool, Flag] = False,
    airflow_dsn: Annotated[str | None, Parameter(show_default=False)] = None,
    dag_file: Annotated[Path | None, Parameter(show_default=False)] = None,
    directory: str | None = None,
    plan: Annotated[bool, Flag] = False,
    prune: Annotated[bool, Flag] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> int:
    """Create or update the Prefect deployment of workflows, and let workers and bridges take their new runs.

    Prefect's workers, schedules and buttons start runs through a deployment. Deploying again updates what differs.
    Settings that were made in Prefect stay: a pause, parameters, further tags and schedules. If one of the workflows
    is invalid, nothing is written.

    Example: `pgflow-prefect deploy greeting --work-pool local --cron "0 9 * * 1-5"`

    Parameters
    ----------
    workflows
        The workflows' slugs.
    all_
        All workflows of the database that have handlers here, or need none because rows bind all their steps.
    as_in_airflow
        Take over the schedule of the DAG that the workflow was imported from, and the defaults of its params as the
        payload. Pause the DAG in Airflow before.
    airflow_dsn
        With --as-in-airflow: Airflow's metadata database. The default is PGFLOW_AIRFLOW_DSN.
    dag_file
        With --as-in-airflow: the file that the script of `pgflow-prefect airflow dump` has written.
    directory
        The directory on the workers' machine, or in the image, that corresponds to the current one. With --source:
        the directory in the repository.
    plan
        Show what `deploy` would do, and do nothing. The exit code is 2 if there is something to do.
    prune
        With --all: delete the deployments of workflows that this database no longer has.
    """
    from pgflow_prefect.execution.process.signals import run_event_loop

    _check_choice(workflows, all_=all_, prune=prune)
    check_server()
    settings = make_settings(dsn)
    if as_in_airflow:
        flags = _take_over(settings, workflows, flags, airflow_dsn, dag_file)
    elif airflow_dsn is not None or dag_file is not None:
        raise UsageError("--airflow-dsn and --dag-file go with --as-in-airflow")
    options = flags.parse(directory)
    wish = Wish(None if all_ else tuple(dict.fromkeys(workflows)), handlers, options, plan, prune, json)
    return run_event_loop(_deploy, settings, wish)


def _take_over(
    settings: Settings, workflows: Sequence[str], flags: DeployFlags, airflow_dsn: str | None, dag_file: Path | None
) -> DeployFlags:
    """Return the options with the schedule of a DAG, and with its params as the payload."""
    import anyio

    from pgflow_prefect.airflow.schedule import find_options
    from pgflow_prefect.cli.import_foreign import read_one_dag
    from pgflow_prefect.definitions.airflow.params import read_params

    if len(set(workflows)) != 1:
        raise UsageError("--as-in-airflow takes over one DAG: name one workflow")
    if flags.cron or flags.interval or flags.timezone or flags.no_schedule:
        raise UsageError("--as-in-airflow takes the schedule from the DAG: leave out --cron, --interval, --timezone")
    dag = anyio.run(read_one_dag, settings, workflows[0], airflow_dsn, dag_file)
    cron, interval, timezone = find_options(dag)
    if cron is None and interval is None:
        err.print(f"DAG {dag.dag_id!r} has no schedule: its runs are started by hand or by a program", markup=False)
        return flags
    conf = {each.name: each.default for each in read_params(dag.said.get("params"))}
    payload = json_text({"conf": conf}) if conf and flags.payload is None else flags.payload
    err.print(
        f"takes over {f'--cron {cron!r}' if cron else f'--interval {interval}'} ({timezone}) of DAG {dag.dag_id!r}. "
        "Pause the DAG in Airflow. `pgflow-prefect backfill "
        f"{dag.dag_id} --missed --dry-run` lists the dates that no run was for",
        markup=False,
    )
    return replace(flags, cron=cron, interval=interval, timezone=timezone, payload=payload)


def check_server() -> None:
    """Refuse to deploy to a temporary server, which would end with the command.

    Raises:
        UsageError: no server is configured.
    """
    from pgflow_prefect.prefect_api.client import has_server

    if not has_server():
        raise UsageError(
            "PREFECT_API_URL is not set, and a deployment needs a Prefect server that stays: "
            "start one with `prefect server start`, and set PREFECT_API_URL to what it says"
        )


@dataclass(frozen=True)
class Done:
    """The deployments that were made, the errors of the others, and the changed automations."""

    reports: list[Report]
    failures: Sequence[PgflowPrefectError]
    automations: Sequence[AutomationReport] = ()


@dataclass(frozen=True)
class Foreseen:
    """What would be done to each deployment, and the automations that would change."""

    previews: list[Preview]
    automations: list[AutomationReport]


async def deploy_all(
    store: Store, candidates: Sequence[Candidate], options: Options, *, prune: bool = False, quiet: bool
) -> Done:
    """Deploy workflows, several at a time, and enable those without problems.

    Args:
        store: the database.
        candidates: the workflows.
        options: of the deployments.
        prune: delete the deployments of workflows that the database no longer has.
        quiet: show no progress.

    Raises:
        UsageError: one of them can't be deployed, or the options do not fit; nothing is written then.
        ForeignInstallationError: the database is a copy of another one that has been used with Prefect.
        PrefectUnavailableError: Prefect does not answer; nothing is written then.
    """
    from pgflow_prefect.cli.deploy_report import AutomationReport, show_progress
    from pgflow_prefect.deployment.deployments.apply import delete_schedules, write_schedules
    from pgflow_prefect.services.heartbeat import Heartbeat

    installation = (await store.use_installation()).id
    async with _open_plans(store, candidates, options, prune, installation) as plans:
        await Heartbeat(store, plans.client).register()
        await write_schedules(store, plans.plans)
        with show_progress(len(plans.plans), quiet=quiet) as notice:
            carried = await plans.carry_out(notice)
        await delete_schedules(store, carried)
    deployed = {each.name: each for each in carried.deployed}
    healthy = [each.slug for each in candidates if not each.problems and each.deployment_name in deployed]
    await store.enable_workflows(healthy)
    enabled = await find_enabled(store)
    older: dict[str, list[UUID]] = {}
    for slug, run_id in await store.list_older_runs(healthy):
        older.setdefault(slug, []).append(run_id)
    by_name = {each.deployment_name: each for each in candidates}
    reports = [
        _make_report(deployed[plan.name], plan.changes, by_name.get(plan.name), enabled, older)
        for plan in carried.plans
        if plan.name in deployed
    ]
    return Done(reports, carried.failures, [AutomationReport(each) for each in carried.automations])


async def preview_all(
    store: Store, candidates: Sequence[Candidate], options: Options, *, prune: bool = False
) -> Foreseen:
    """Return what `deploy_all` would do, and write nothing. Arguments and errors are the same."""
    from pgflow_prefect.cli.deploy_report import AutomationReport, Preview

    async with _open_plans(store, candidates, options, prune, await store.read_installation()) as plans:
        enabled = await find_enabled(store)
    waiting = {each.deployment_name for each in candidates if not each.problems and each.slug not in enabled}
    return Foreseen(
        [Preview(plan, plan.name in waiting) for plan in plans.plans],
        [AutomationReport(each, is_preview=True) for each in plans.automations if each.changes],
    )


def check_events(settings: Settings, options: Options) -> None:
    """Refuse an automation that no event would ever start.

    Raises:
        UsageError: the settings let no process send the events of runs.
    """
    from pgflow_prefect.settings import Events

    if options.on_failure and settings.events is Events.NONE:
        raise UsageError(
            "--on-failure makes an automation that waits for the event pgflow.run.failed, and PGFLOW_EVENTS=none sends "
            "no events: set PGFLOW_EVENTS=runs here, and for the processes that execute runs"
        )


async def find_enabled(store: Store) -> set[str]:
    """Return the slugs of the enabled workflows."""
    return {slug for slug, each in (await store.list_enabled()).items() if each.enabled}


@asynccontextmanager
async def _open_plans(
    store: Store, candidates: Sequence[Candidate], options: Options, prune: bool, installation: UUID
) -> AsyncIterator[Plans]:
    from pgflow_prefect.cli.candidates import check_payloads, describe_all, find_unfit_schedules
    from pgflow_prefect.deployment.deployments.apply import open_plans

    check_payloads(candidates, options)
    payloads = await store.list_schedules([each.slug for each in candidates])
    for problem in find_unfit_schedules(candidates, options, payloads):
        err.print(problem, markup=False)
    wanted = describe_all(candidates, replace(options, prune=prune), installation, payloads)
    async with open_plans(wanted, installation, store.list_slugs if prune else None) as plans:
        yield plans


def _make_report(
    deployed: Deployed,
    changes: tuple[Change, ...],
    candidate: Candidate | None,
    enabled: Collection[str],
    older: Mapping[str, list[UUID]],
) -> Report:
    from pgflow_prefect.cli.deploy_report import Report

    if candidate is None:  # the workflow is gone
        return Report(deployed, changes)
    return Report(
        deployed,
        changes,
        candidate.slug in enabled,
        candidate.problems,
        tuple(candidate.stubs),
        tuple(older.get(candidate.slug, ())),
    )


def _check_choice(workflows: Sequence[str], *, all_: bool, prune: bool) -> None:
    if not workflows and not all_:
        raise UsageError("which workflow? name it, or say --all")
    if workflows and all_:
        raise UsageError("--all means all workflows: name none beside it")
    if prune and not all_:
        raise UsageError("--prune goes with --all")


async def _deploy(settings: Settings, wish: Wish) -> int:
    from pgflow_prefect.cli.candidates import CONNECTIONS, choose, raise_all
    from pgflow_prefect.cli.deploy_report import print_found
    from pgflow_prefect.database.store import open_store

    check_events(settings, wish.options)
    async with open_store(settings, size=CONNECTIONS, executes_moved=True) as store:
        if store.implementation.moves_flows:
            known = await store.list_slugs()
            await store.refuse_unmoved(slug for slug in wish.slugs or () if slug in known)
        chosen = await choose(store, wish.slugs, wish.handlers)
        chosen.check()
        await store.refuse_unmoved(each.slug for each in chosen.candidates)
        if not chosen.candidates and not wish.prune:
            reasons = "".join(f"\n  - {each.slug}: {each.reason}" for each in chosen.skipped)
            raise UsageError(f"no workflow of the database can be deployed from here:{reasons or ' it has none'}")
        if wish.plan:
            foreseen = await preview_all(store, chosen.candidates, wish.options, prune=wish.prune)
            found: list[Preview | AutomationReport] = [*foreseen.previews, *foreseen.automations]
            print_found(found, chosen.skipped, json=wish.json)
            return 2 if any(each.is_worth_saying for each in found) else 0
        done = await deploy_all(store, chosen.candidates, wish.options, prune=wish.prune, quiet=wish.json)
    print_found([*done.reports, *done.automations], chosen.skipped, json=wish.json)
    raise_all(done.failures)
    return 0
