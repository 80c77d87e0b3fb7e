"""`deploy`, and what `import --deploy` shares with it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from cyclopts import Parameter

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.enabling import enable_workflow, print_older_runs
from pgflow_prefect.cli.options import AsJson, Dsn, Handlers, make_settings
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.deployment.binding_problems import find_all_problems
from pgflow_prefect.deployment.deployments import Deployed
from pgflow_prefect.deployment.deployments import deploy as create_or_update
from pgflow_prefect.deployment.handler_files import find_workflow, load_module, load_workflow
from pgflow_prefect.errors import InvalidDefinitionError, UsageError
from pgflow_prefect.execution.in_process import connect_to_prefect, has_server, run_event_loop
from pgflow_prefect.models import WorkflowDefinition
from pgflow_prefect.settings import Settings
from pgflow_prefect.workflow import Workflow

WorkPool = Annotated[
    str | None,
    Parameter(
        name="--work-pool",
        help="The work pool whose workers execute the flow runs; where not given, the one that the deployment has.",
    ),
]


@dataclass(frozen=True)
class Candidate:
    """A workflow that is to be deployed, and what is wrong with it.

    Attributes:
        workflow: the handlers.
        source: the file or module that they are in.
        definition: the workflow as the database defines it now.
    """

    workflow: Workflow
    source: str
    definition: WorkflowDefinition

    async def find_problems(self, store: Store) -> list[str]:
        """Return what keeps the workflow from being executed, a sentence each."""
        return await find_all_problems(store, self.workflow, self.definition)

    @property
    def stubs(self) -> list[str]:
        """The steps whose handlers are yet to be written: until then somebody else does them."""
        return [slug for slug in self.workflow.stubs if slug in self.definition.steps]


@dataclass(frozen=True)
class Report:
    """What became of one workflow.

    Attributes:
        deployed: its deployment.
        enabled: whether workers and bridges take its runs.
        problems: why it was not enabled.
        stubs: the steps that somebody else does until their handlers are written.
        older_runs: pending ones that are not taken, for they are older than the enabling.
    """

    deployed: Deployed
    enabled: bool
    problems: list[str]
    stubs: list[str]
    older_runs: list[UUID]

    def to_json(self) -> dict[str, object]:
        """Return what scripts get."""
        return {
            "workflow": self.deployed.workflow_slug,
            "deployment": self.deployed.name,
            "id": str(self.deployed.id),
            "outcome": self.deployed.outcome,
            "work_pool": self.deployed.work_pool,
            "url": self.deployed.url,
            "enabled": self.enabled,
            "problems": self.problems,
            "older_runs": [str(each) for each in self.older_runs],
        }


def deploy(
    *workflows: str, work_pool: WorkPool = None, handlers: Handlers = None, json: AsJson = False, dsn: Dsn = None
) -> None:
    """Create or update the Prefect deployment of workflows, and let workers and bridges take their new runs.

    A deployment is what Prefect's workers, schedules and buttons start runs by. Deploying again updates it; what was
    set in Prefect stays: its schedules, work pool, limits. Nothing is deployed while one of the workflows is invalid.

    Example: `pgflow-prefect deploy email_campaign --work-pool local`

    Parameters
    ----------
    workflows
        The workflows' slugs.
    """
    if not workflows:
        raise UsageError("which workflow? name it")
    check_server()
    reports = run_event_loop(_deploy, make_settings(dsn), tuple(dict.fromkeys(workflows)), handlers, work_pool, json)
    if json:
        print_json([each.to_json() for each in reports])


def check_server() -> None:
    """Refuse to deploy to a server that ends with the command, and to wait for what people do there.

    Raises:
        UsageError: no server is configured.
    """
    if not has_server():
        raise UsageError(
            "PREFECT_API_URL is not set, and a deployment needs a Prefect server that stays: "
            "start one with `prefect server start`, and set PREFECT_API_URL to what it says"
        )


async def deploy_all(store: Store, candidates: Iterable[Candidate], work_pool: str | None, quiet: bool) -> list[Report]:
    """Deploy workflows, one after the other; enable those that have no problems.

    Args:
        store: the database.
        candidates: the workflows.
        work_pool: for all of them.
        quiet: print nothing; else, what is done is said at once, for the next one may fail.
    """
    reports = []
    async with connect_to_prefect() as client:
        for each in candidates:
            deployed = await create_or_update(client, each.workflow, each.definition, each.source, work_pool=work_pool)
            reports.append(await _enable(store, each, deployed))
            if not quiet:
                _print_report(reports[-1])
    return reports


async def _enable(store: Store, candidate: Candidate, deployed: Deployed) -> Report:
    if problems := await candidate.find_problems(store):  # its runs would only fail
        known = (await store.list_enabled()).get(deployed.workflow_slug)
        return Report(deployed, known is not None and known.enabled, problems, candidate.stubs, [])
    switched = await enable_workflow(store, deployed.workflow_slug)
    return Report(deployed, True, [], candidate.stubs, switched.older_runs)


async def _deploy(
    settings: Settings, slugs: tuple[str, ...], handlers: str | None, work_pool: str | None, quiet: bool
) -> list[Report]:
    async with open_store(settings, size=1) as store:
        definitions = [await store.load_definition(slug) for slug in slugs]
        return await deploy_all(store, await _load_valid(store, definitions, handlers), work_pool, quiet)


async def _load_valid(store: Store, definitions: list[WorkflowDefinition], handlers: str | None) -> list[Candidate]:
    """Load the handlers of all these definitions.

    Raises:
        UsageError: with everything that is wrong with any of them.
    """
    module = load_module(handlers) if handlers else None  # once, however many workflows are in it
    candidates, errors = [], []
    for definition in definitions:
        try:
            if handlers and module:
                workflow, source = find_workflow(module, definition.slug, handlers), handlers
            else:
                has_rows = bool(await store.list_bindings(definition.slug))
                workflow, source = load_workflow(definition.slug, has_rows=has_rows)
            candidates.append(Candidate(workflow, source, definition))
            if problems := await candidates[-1].find_problems(store):
                raise InvalidDefinitionError(definition.slug, problems)
        except UsageError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else UsageError("\n".join(map(str, errors)))
    return candidates


def _print_report(report: Report) -> None:
    deployed = report.deployed
    by = f"work pool {deployed.work_pool!r}" if deployed.work_pool else "no work pool: `pgflow-prefect worker` runs it"
    where = f": {deployed.url}" if deployed.url else ""
    out.print(f"{deployed.outcome} deployment {deployed.name} ({by}){where}", markup=False)
    print_older_runs(report.older_runs)
    if report.stubs:
        out.print(f"done by somebody else until their stubs are filled in: {', '.join(report.stubs)}", markup=False)
    if report.problems:
        todo = "see `pgflow-prefect validate`"
        state = "is enabled all the same, and its runs will fail" if report.enabled else "is not enabled yet"
        slug = deployed.workflow_slug
        out.print(f"workflow {slug!r} {state}: {todo}, then `pgflow-prefect deploy {slug}`", markup=False)
