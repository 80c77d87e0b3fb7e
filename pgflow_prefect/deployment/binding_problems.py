"""Finds problems of a workflow's handlers and bindings before a run."""

import os
from collections.abc import Iterator, Mapping

from pgflow_prefect.bindings import (
    AnyBinding,
    Command,
    Kind,
    NamedCommand,
    NamedWorkPool,
    Python,
    Queue,
    SqlFunction,
    WorkPool,
    parse_binding,
    parse_function,
)
from pgflow_prefect.database.store import Store
from pgflow_prefect.definitions.children import find_child_problems
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.deployment.result_problems import find_result_problems
from pgflow_prefect.deployment.row_credentials import find_row_problems
from pgflow_prefect.errors import NotRetriableError, UsageError
from pgflow_prefect.handlers.command import find_problems, find_program
from pgflow_prefect.handlers.edges import find_type_problems
from pgflow_prefect.handlers.queue import check_queue_url, find_missing_packages
from pgflow_prefect.handlers.row_policy import RowPolicy
from pgflow_prefect.handlers.work_pool import find_pool
from pgflow_prefect.models import StepBinding
from pgflow_prefect.programs import Pool, Program
from pgflow_prefect.settings import Settings
from pgflow_prefect.workflow import Workflow

_PYTHON = Python()


async def find_all_problems(
    store: Store,
    workflow: Workflow,
    definition: WorkflowDefinition,
    rows: Mapping[str, StepBinding],
    *,
    others_have_functions: bool = False,
    policy: RowPolicy | None = None,
    judge_rows: bool = True,
) -> list[str]:
    """Return all problems that prevent a workflow's execution: in its definition, its handlers, its bindings.

    Args:
        store: has the functions that steps may be bound to.
        workflow: the handlers, and the bindings of `bind`.
        definition: its steps and dependencies.
        rows: the bindings by rows, from `list_bindings`.
        others_have_functions: a step that is bound to Python and has no handler here may wait for another process.
        policy: of the process that executes the steps; without it, only the names are checked.
        judge_rows: whether a row that names a forbidden thing is a problem: it stops its own step only.

    Returns:
        A sentence for each problem.
    """
    bindings, problems = _parse_rows(rows)
    in_force = {**workflow.bindings, **bindings}
    if not others_have_functions:
        problems += [
            f"step {slug!r} is bound to {Kind.PYTHON}, and has no handler there: write it, or bind the step otherwise"
            for slug in find_missing_functions(workflow, find_doers(workflow, definition, rows))
        ]
        problems += _find_missing_on_pools(workflow, in_force)
    problems += _check_queues(in_force)
    problems += find_row_problems(bindings, policy) if judge_rows else ()
    judged = {slug: each for slug, each in in_force.items() if judge_rows or slug not in bindings}
    problems += _find_maps_on_pools(definition, judged)
    problems += await _check_functions(store, in_force)
    if definition.children:
        problems += find_child_problems(definition, await store.list_slugs(), workflow.handlers)
    # A step that a row or `bind` gives to another kind has no annotations.
    done_here = {
        slug: each
        for slug, each in workflow.handlers.items()
        if in_force.get(slug, _PYTHON).kind in (Kind.PYTHON, Kind.WORK_POOL)
    }
    problems += find_type_problems(done_here, definition.deps, definition.maps)
    return [*workflow.find_problems(definition), *problems]


def find_missing_here(workflow: Workflow, rows: Mapping[str, StepBinding], settings: Settings) -> list[str]:
    """Return the variables, packages, programs and storages that a workflow's steps need and that this process lacks.

    The machine that deploys a workflow need not have them; the one that executes its runs does.

    Args:
        workflow: the handlers, and the bindings of `bind`.
        rows: the bindings by rows.
        settings: of this process.

    Returns:
        A sentence for each problem.
    """
    bindings, _ = _parse_rows(rows)
    problems = [*find_result_problems(workflow, settings)]
    for slug, binding in {**workflow.bindings, **bindings}.items():
        variable = getattr(binding, "token_env", None) or getattr(binding, "login_env", None)
        if variable is not None and not os.environ.get(variable, "").strip():
            problems.append(
                f"step {slug!r} is bound to {binding}, and the environment variable {variable} is not set here: set it"
            )
        if isinstance(binding, Queue):
            problems += [
                f"step {slug!r} is bound to {binding}, and the package {name} is not installed here: "
                "pip install 'pgflow-prefect[queues]'"
                for name in find_missing_packages(binding.url)
            ]
        if isinstance(binding, Command | NamedCommand):
            problems += [
                f"step {slug!r} is bound to {binding}, and {each}"
                for each in _check_program(binding, settings.programs)
            ]
    return problems


def _check_pool(binding: WorkPool | NamedWorkPool, pools: Mapping[str, Pool]) -> list[str]:
    try:
        find_pool(binding, pools)
    except NotRetriableError as error:
        return [str(error)]
    return []


def _check_program(binding: Command | NamedCommand, programs: Mapping[str, Program]) -> list[str]:
    try:
        return [*find_problems(find_program(binding, programs))]
    except NotRetriableError as error:
        return [str(error)]


def find_missing_functions(workflow: Workflow, doers: Mapping[str, str]) -> list[str]:
    """Return the steps that are bound to Python and have no handler there."""
    return sorted(slug for slug, doer in doers.items() if doer == Kind.PYTHON and slug not in workflow.handlers)


def find_doers(workflow: Workflow, definition: WorkflowDefinition, rows: Mapping[str, StepBinding]) -> dict[str, str]:
    """Return who does each step, in words: the row decides, then Python."""
    handlers = workflow.step_handlers
    doers = {}
    for slug in definition.steps:
        if (child := definition.find_rules(slug).child) is not None:
            doers[slug] = f"{Kind.CHILD} {child.workflow}"
        elif (row := rows.get(slug)) is not None:
            doers[slug] = " ".join(filter(None, [row.kind, row.target]))
        else:
            doers[slug] = str(handlers[slug].bound) if slug in handlers else str(Kind.EXTERNAL)
    return doers


def find_refused_rows(definition: WorkflowDefinition, rows: Mapping[str, StepBinding], policy: RowPolicy) -> list[str]:
    """Return a sentence for each of these rows whose step fails.

    Its credential may not go to the row's origin, or it gives a map to a work pool.
    """
    bindings, _ = _parse_rows(rows)
    return [*find_row_problems(bindings, policy), *_find_maps_on_pools(definition, bindings)]


def _parse_rows(rows: Mapping[str, StepBinding]) -> tuple[dict[str, AnyBinding], list[str]]:
    bindings: dict[str, AnyBinding] = {}
    problems: list[str] = []
    for slug, row in rows.items():
        try:
            bindings[slug] = parse_binding(row.kind, row.target, row.options)
        except UsageError as error:
            problems.append(f"step {slug!r}: {error}")
    return bindings, problems


def _find_missing_on_pools(workflow: Workflow, bindings: Mapping[str, AnyBinding]) -> Iterator[str]:
    """Yield a sentence for each step on a work pool whose function the file of handlers lacks."""
    for slug, binding in bindings.items():
        # Without a file here, the pool's processes may have one.
        if binding.kind is Kind.WORK_POOL and workflow.known_steps and slug not in workflow.handlers:
            yield f"step {slug!r} is bound to {binding}, and has no function in Python for its processes: write it"


def _find_maps_on_pools(definition: WorkflowDefinition, bindings: Mapping[str, AnyBinding]) -> Iterator[str]:
    """Yield a sentence for each map that a work pool is to do."""
    for slug in definition.maps:
        if slug in bindings and bindings[slug].kind is Kind.WORK_POOL:
            yield f"step {slug!r} is a map, and {bindings[slug]} does plain steps only: bind it otherwise"


def _check_queues(bindings: Mapping[str, AnyBinding]) -> Iterator[str]:
    for slug, binding in bindings.items():
        if isinstance(binding, Queue):
            try:
                check_queue_url(binding.url)
            except UsageError as error:
                yield f"step {slug!r}: {error}"


async def _check_functions(store: Store, bindings: Mapping[str, AnyBinding]) -> list[str]:
    names = {slug: each.function for slug, each in bindings.items() if isinstance(each, SqlFunction)}
    if not names:
        return []
    found = await store.find_functions({slug: parse_function(name) for slug, name in names.items()})
    problems = []
    for slug, name in names.items():
        if slug not in found:
            problems.append(
                f"step {slug!r} is bound to {name}(jsonb), which the database does not have, or not for this user: "
                f"CREATE FUNCTION {name}(input jsonb) RETURNS jsonb …"
            )
        elif found[slug] != "jsonb":
            problems.append(f"step {slug!r} is bound to {name}(jsonb), which returns {found[slug]} and not jsonb")
    return problems
