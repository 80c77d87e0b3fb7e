"""Gathers what an exported file needs: the definition, the rows, the handlers' source, and the schedule in Prefect."""

from dataclasses import dataclass

from prefect.client.schemas.schedules import CronSchedule

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
    slug, schedule = wish.slug, None if wish.cron is None else _check(wish.cron, wish.timezone)
    async with open_store(settings, size=1, only_reads=True) as store:
        if not store.implementation.executes:
            raise UsageError("--as exports workflows of this program: the released pgflow has its own files")
        definition = await store.load_definition(slug)
        rows = await store.list_bindings(slug)
    workflow, found = load_workflow(slug, wish.handlers, has_rows=len(rows) == len(definition.steps))
    path = workflow.source
    source = NO_SOURCE if found == BY_ROWS or path is None else read_source(path, workflow.handlers)
    return Exporter(
        definition,
        workflow.step_handlers,
        {step: str(row.kind) for step, row in rows.items()},
        source,
        workflow.tags,
        schedule or await _find_schedule(slug),
    ).write(wish.target)


def _check(cron: str, timezone: str) -> PlainSchedule:
    parse_schedule(cron, None, timezone, False)
    return PlainSchedule(cron, timezone)


async def _find_schedule(slug: str) -> PlainSchedule | None:
    """Return the schedule of a workflow's deployment, if there is one by a cron expression."""
    if not has_server():
        return None
    name = to_flow_name(slug)
    try:
        async with connect_to_prefect() as client:
            deployment = (await find_flows(client, [name])).own.get(name)
    except PgflowPrefectError:  # the file says that it has no schedule
        return None
    schedules = [each.schedule for each in deployment.schedules if each.active] if deployment is not None else []
    for each in schedules:
        if isinstance(each, CronSchedule):
            return PlainSchedule(each.cron, each.timezone or "UTC")
    return None
