"""Loads and checks all workflows to deploy, before anything is written."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TypeVar
from uuid import UUID

import anyio
from anyio import CapacityLimiter

from pgflow_prefect.database.schedules import ScheduledPayload
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.graph import order_steps
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.binding_problems import find_all_problems
from pgflow_prefect.deployment.deployments.wanted import DEPLOYMENT, Options, Wanted, describe_wanted
from pgflow_prefect.deployment.handler_files import (
    default_path,
    find_workflow,
    list_workflows,
    load_module,
    load_workflow,
)
from pgflow_prefect.errors import InvalidDefinitionError, PgflowPrefectError, UnknownWorkflowError, UsageError
from pgflow_prefect.execution.payloads import check_known_payload
from pgflow_prefect.models import StepBinding
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.workflow import Workflow, to_flow_name

CONNECTIONS = 4
"""How many workflows are checked in the database at the same time."""

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A workflow to deploy.

    Attributes:
        workflow: the handlers.
        source: the file or module that they are in, or `BY_ROWS`.
        definition: the workflow as the database defines it now.
        rows: the bindings by rows; known once it was examined.
        problems: the reasons why it can't be executed, a sentence each.
    """

    workflow: Workflow
    source: str
    definition: WorkflowDefinition
    rows: Mapping[str, StepBinding] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The workflow's slug."""
        return self.definition.slug

    @property
    def deployment_name(self) -> str:
        """The name of its deployment, as Prefect's commands take it: `flow/deployment`."""
        return f"{to_flow_name(self.slug)}/{DEPLOYMENT}"

    @property
    def stubs(self) -> list[str]:
        """The steps with a stub instead of a handler. They are external until the handler is written."""
        stubs = set(self.workflow.stubs)
        return [slug for slug in order_steps(self.definition) if slug in stubs]


@dataclass(frozen=True)
class Skipped:
    """A workflow that is not deployed, with the reason."""

    slug: str
    reason: str


@dataclass(frozen=True)
class Chosen:
    """The workflows that the user named, or all.

    Attributes:
        candidates: those with handlers.
        skipped: those without.
        errors: the reasons why others can't be loaded.
    """

    candidates: Sequence[Candidate]
    skipped: Sequence[Skipped] = ()
    errors: Sequence[UsageError] = ()

    def check(self) -> None:
        """Refuse workflows that can't be loaded or executed.

        Raises:
            UsageError: the message names every problem of every workflow.
        """
        invalid = [InvalidDefinitionError(each.slug, each.problems) for each in self.candidates if each.problems]
        raise_all([*self.errors, *invalid])


async def choose(store: Store, slugs: Iterable[str] | None, handlers: str | None) -> Chosen:
    """Load workflows and their handlers, and look for problems.

    Args:
        store: the database.
        slugs: these workflows, or None for all that have handlers here.
        handlers: the file or module of them all.

    Raises:
        UsageError: that file or module can't be loaded.
    """
    module = load_module(handlers) if handlers else None  # once, however many workflows are in it
    if slugs is None:
        chosen = await _choose_all(store, module, handlers)
    else:
        chosen = await _choose_named(store, list(dict.fromkeys(slugs)), module, handlers)
    return replace(chosen, candidates=await examine(store, chosen.candidates))


async def examine(store: Store, loaded: Sequence[Candidate]) -> list[Candidate]:
    """Return workflows with their rows, and with their problems, if they have any."""
    limiter = CapacityLimiter(CONNECTIONS)
    examined: dict[str, Candidate] = {}

    async def find_problems(each: Candidate) -> None:
        async with limiter:
            rows = await store.list_bindings(each.slug)
            problems = await find_all_problems(store, each.workflow, each.definition, rows)
            examined[each.slug] = replace(each, rows=rows, problems=tuple(problems))

    async with anyio.create_task_group() as group:
        for each in loaded:
            group.start_soon(find_problems, each)
    return [examined[each.slug] for each in loaded]


def check_payloads(candidates: Sequence[Candidate], options: Options) -> None:
    """Check that the payload of a schedule fits the handlers of each workflow.

    Raises:
        UsageError: the message names every workflow that it does not fit.
    """
    payload = options.schedule.payload if options.schedule is not None else None
    if payload is None:
        return
    _, errors = collect(
        lambda each: check_known_payload(each.definition, each.rows, each.workflow.step_handlers, payload), candidates
    )
    raise_all(errors)


def find_unfit_schedules(
    candidates: Sequence[Candidate], options: Options, payloads: Collection[ScheduledPayload]
) -> list[str]:
    """Return a sentence for each workflow whose schedule, without `--payload`, starts only runs that fail.

    Args:
        candidates: the workflows.
        options: of the deploying user.
        payloads: of the schedules of these workflows.
    """
    wish = options.schedule
    if wish is None or wish.schedule is None or wish.payload is not None:
        return []
    former = {each.workflow_slug: each.payload for each in payloads if each.name == wish.name}
    found: list[str] = []
    for each in candidates:
        payload = former.get(each.slug)
        given = "{}" if payload is None else "its former payload"
        try:
            check_known_payload(each.definition, each.rows, each.workflow.step_handlers, payload or RawJson("{}"))
        except UsageError as error:
            found.append(f"{error}. The schedule starts runs with {given}, and each will fail: add --payload")
    return found


def describe_all(
    candidates: Sequence[Candidate], options: Options, installation: UUID, payloads: Collection[ScheduledPayload] = ()
) -> list[Wanted]:
    """Return what the deployments of workflows should be.

    Args:
        candidates: the workflows.
        options: of the deploying user.
        installation: the id of the database.
        payloads: of the schedules of these workflows.

    Raises:
        UsageError: the message names every workflow that can't be deployed, and why.
    """
    by_name: dict[str, list[str]] = {}
    for each in candidates:
        by_name.setdefault(to_flow_name(each.slug), []).append(each.slug)
    if clashing := [" and ".join(map(repr, slugs)) for slugs in by_name.values() if len(slugs) > 1]:
        raise UsageError(f"Prefect would have one flow for several workflows, {'; '.join(clashing)}: rename one")
    rows: dict[str, list[ScheduledPayload]] = {}
    for payload in payloads:
        rows.setdefault(payload.workflow_slug, []).append(payload)
    wanted, errors = collect(
        lambda each: describe_wanted(
            each.workflow, each.definition, each.source, options, installation, payloads=rows.get(each.slug, [])
        ),
        candidates,
    )
    raise_all(errors)
    return wanted


def collect(make: Callable[[S], T], things: Iterable[S]) -> tuple[list[T], list[UsageError]]:
    """Apply a function to each thing. Return the results, and the errors of those that failed."""
    made: list[T] = []
    errors: list[UsageError] = []
    for each in things:
        try:
            made.append(make(each))
        except UsageError as error:
            errors.append(error)
    return made, errors


def raise_all(errors: Sequence[PgflowPrefectError]) -> None:
    """Raise several errors as one: a `UsageError` if all of them are."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kind = UsageError if all(isinstance(each, UsageError) for each in errors) else PgflowPrefectError
        raise kind("\n".join(map(str, errors))) from ExceptionGroup("all of them", errors)


async def _choose_named(store: Store, slugs: Sequence[str], module: ModuleType | None, handlers: str | None) -> Chosen:
    definitions = await store.find_definitions(slugs)
    with_rows = await store.list_workflows_with_bindings()

    def load(slug: str) -> Candidate:
        if handlers and module:
            return Candidate(find_workflow(module, slug, handlers), handlers, definitions[slug])
        return Candidate(*load_workflow(slug, has_rows=slug in with_rows), definitions[slug])

    candidates, errors = collect(load, [slug for slug in slugs if slug in definitions])
    unknown = [await _explain_unknown(store, slug) for slug in slugs if slug not in definitions]
    return Chosen(candidates, errors=[*unknown, *errors])


async def _explain_unknown(store: Store, slug: str) -> UsageError:
    try:
        await store.load_definition(slug)
    except UnknownWorkflowError as error:
        return error  # it says what may have been meant
    return UsageError(f"workflow {slug!r} has been defined just now: try again")


async def _choose_all(store: Store, module: ModuleType | None, handlers: str | None) -> Chosen:
    definitions = await store.find_definitions()
    if handlers and module:
        return _choose_all_of_file(definitions, module, handlers)
    bound = set(await store.list_bound_workflows())
    paths = {slug: default_path(slug) for slug in definitions}
    there = bound | {slug for slug, path in paths.items() if path.is_file()}
    skipped = [
        Skipped(slug, f"it has no handlers here: {path} does not exist")
        for slug, path in paths.items()
        if slug not in there
    ]
    known = [each for slug, each in definitions.items() if slug in there]
    candidates, errors = collect(lambda each: Candidate(*load_workflow(each.slug, has_rows=True), each), known)
    return Chosen(candidates, skipped, errors)


def _choose_all_of_file(definitions: Mapping[str, WorkflowDefinition], module: ModuleType, handlers: str) -> Chosen:
    workflows = list_workflows(module)
    skipped = [Skipped(slug, f"{handlers} has no handlers of it") for slug in definitions if slug not in workflows]
    skipped += [Skipped(slug, "the database does not define it") for slug in workflows if slug not in definitions]
    candidates = [
        Candidate(workflow, handlers, definitions[slug])
        for slug, workflow in sorted(workflows.items())
        if slug in definitions
    ]
    return Chosen(candidates, skipped)
