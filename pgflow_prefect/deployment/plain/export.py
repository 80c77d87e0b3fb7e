"""Gathers what an exported file needs: the definition, the rows, the handlers' source, and the schedule in Prefect."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from pgflow_prefect.database.store import open_store
from pgflow_prefect.deployment.deployments.find import find_flows
from pgflow_prefect.deployment.deployments.schedules import parse_schedule
from pgflow_prefect.deployment.handler_files import BY_ROWS, load_workflow
from pgflow_prefect.deployment.plain.source import NO_SOURCE, read_source
from pgflow_prefect.deployment.plain.write import Exported, Exporter, PlainSchedule, Target
from pgflow_prefect.errors import PgflowPrefectError, UsageError
from pgflow_prefect.prefect_api.client import connect_to_prefect, has_server
from pgflow_prefect.settings import Settings
from pgflow_prefect.workflow import to_flow_name


@dataclass(frozen=True)
class PlainWish:
    """What is to be exported, as typed.

    Attributes:
        slug: the workflow.
        target: the program that is to execute it.
        handlers: their file or module; by default flows/WORKFLOW.py.
        cron: when runs begin; None: as its deployment says.
        timezone: of `cron`.
    """

    slug: str
    target: Target
    handlers: str | None = None
    cron: str | None = None
    timezone: str = "UTC"


async def export_plain(settings: Settings, wish: PlainWish) -> Exported:
    """Return a workflow as one file.

    Args:
        settings: the database.
        wish: which, and for which program.

    Raises:
        UnknownWorkflowError: there is no such workflow.
        UsageError: the handlers can't be read, or the schedule is wrong.
    """
    slug, typed = wish.slug, None if wish.cron is None else _check(wish.cron, wish.timezone)
    async with open_store(settings, size=1, only_reads=True) as store:
        if not store.implementation.executes:
            raise UsageError("--as exports workflows of this program: the released pgflow has its own files")
        definition = await store.load_definition(slug)
        rows = await store.list_bindings(slug)
    workflow, found = load_workflow(slug, wish.handlers, has_rows=len(rows) == len(definition.steps))
    path = workflow.source
    schedule, lost = (typed, ()) if typed is not None else await _find_schedule(slug)
    source = NO_SOURCE if found == BY_ROWS or path is None else read_source(path, workflow.handlers)
    return Exporter(
        definition,
        workflow.step_handlers,
        {step: str(row.kind) for step, row in rows.items()},
        source,
        workflow.tags,
        schedule,
        lost,
    ).write(wish.target)


def _check(cron: str, timezone: str) -> PlainSchedule:
    parse_schedule(cron, None, timezone, False)
    return PlainSchedule(cron, timezone)


async def _find_schedule(slug: str) -> tuple[PlainSchedule | None, Sequence[str]]:
    """Return the schedule of a workflow's deployment, if there is one by a cron expression, and what is lost."""
    if not has_server():
        return None, ()
    name = to_flow_name(slug)
    try:
        async with connect_to_prefect() as client:
            deployment = (await find_flows(client, [name])).own.get(name)
    except PgflowPrefectError:  # the file says that it has no schedule
        return None, ()
    return choose_schedule(deployment.schedules if deployment is not None else [])


def choose_schedule(schedules: Sequence[DeploymentSchedule]) -> tuple[PlainSchedule | None, Sequence[str]]:
    """Return the first active schedule by a cron expression, and sentences on what is lost of all active ones."""
    chosen, lost = None, []
    for each in schedules:
        if not each.active:
            continue
        if chosen is None and isinstance(each.schedule, CronSchedule):
            chosen = PlainSchedule(each.schedule.cron, each.schedule.timezone or "UTC")
            if each.parameters:
                lost.append(f"the payload of the schedule {each.schedule.cron!r}")
        else:
            lost.append(f"a further schedule, or one that is no cron expression: {_describe(each)}")
    return chosen, lost


def _describe(found: DeploymentSchedule) -> str:
    match found.schedule:
        case CronSchedule() as cron:
            return f"cron {cron.cron!r}"
        case IntervalSchedule() as interval:
            return f"every {interval.interval}"
        case other:
            return str(getattr(other, "rrule", other))
