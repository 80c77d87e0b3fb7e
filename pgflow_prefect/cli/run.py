"""`run`."""

from __future__ import annotations

import json as jsonlib
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn
from uuid import uuid4

from cyclopts import Parameter

from pgflow_prefect.cli.console import err, format_duration, is_debugging, out, print_error, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, Handlers, make_settings
from pgflow_prefect.errors import InvalidDefinitionError, RunHeldError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from pgflow_prefect.database.run_names import RunName
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.execution.process.host import Host, Plan
    from pgflow_prefect.models import Run, StepBinding
    from pgflow_prefect.settings import Settings
    from pgflow_prefect.workflow import Workflow

_HELD_INTERVAL = 0.5  # seconds between two looks at a run that another process holds


def run(
    workflow: str | None = None,
    /,
    *,
    payload: Annotated[str, Parameter(allow_leading_hyphen=True)] = "{}",  # `-` alone
    resume: Annotated[str | None, Parameter(show_default=False)] = None,
    force: Annotated[bool, Flag] = False,
    handlers: Handlers = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> int:
    """Run a workflow on Prefect, here and now.

    Without `PREFECT_API_URL`, Prefect starts a temporary server. The exit code is 1 when the run fails.

    Example: `pgflow-prefect run email_campaign --payload '{"campaign_id": 123}'`

    Parameters
    ----------
    workflow
        The workflow's slug.
    payload
        JSON, or @FILE, or - for standard input.
    resume
        Continue this run instead of starting one: its id, the beginning of its id, or latest. Completed steps are not
        executed again. A failed run is reopened.
    force
        With --resume: take the run from the process that executes it now, and do not wait for its lease to expire.
    """
    from pgflow_prefect.database.run_names import parse_run_name
    from pgflow_prefect.execution.process.signals import run_event_loop

    if (workflow is None) == (resume is None):
        raise UsageError("name a workflow to run, or give --resume RUN_ID to continue a run")
    settings = make_settings(dsn)
    if force and resume is None:
        raise UsageError("--force goes with --resume RUN_ID")
    if resume is not None:
        return run_event_loop(_resume, settings, parse_run_name(resume), handlers, json, force)
    assert workflow is not None
    return run_event_loop(_start, settings, workflow, read_payload(payload), handlers, json)


def read_payload(argument: str) -> str:
    """Return the JSON text that `--payload` means.

    Raises:
        UsageError: the file can't be read, or the text is not JSON.
    """
    try:
        if argument == "-":
            text = sys.stdin.read()
        elif argument.startswith("@"):
            text = Path(argument[1:]).read_text(encoding="utf-8")
        else:
            text = argument
        # Numbers stay text, so that they keep all digits.
        jsonlib.loads(text, parse_constant=_refuse_constant, parse_int=str, parse_float=str)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the payload can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the payload is not JSON: {error}") from error
    return text


async def _start(settings: Settings, slug: str, payload: str, handlers: str | None, json: bool) -> int:
    from pgflow_prefect.definitions.graph import find_problems
    from pgflow_prefect.execution.payloads import check_known_payload
    from pgflow_prefect.execution.process.host import open_host
    from pgflow_prefect.raw_json import RawJson

    async with open_host(settings) as host:
        definition = await host.store.load_definition(slug)
        await host.store.refuse_unmoved([slug])
        # Before the handlers are loaded: for an unknown workflow, `import` would not write them.
        if problems := find_problems(definition):
            raise InvalidDefinitionError(slug, problems)
        rows = await host.store.list_bindings(slug)
        workflow, source = await _load(host, definition, rows, handlers)
        children = await _load_children(host, definition, source)
        check_known_payload(definition, rows, workflow.step_handlers, RawJson(payload))
        return await _execute(host, workflow, source, children, payload=payload, run_id=uuid4(), json=json)


async def _resume(settings: Settings, name: RunName, handlers: str | None, json: bool, force: bool) -> int:
    from pgflow_prefect.execution.process.host import open_host
    from pgflow_prefect.models import Status

    async with open_host(settings) as host:
        run_id = await host.store.find_run_id(name)
        found = await host.store.read_run(run_id)
        if found.status is Status.COMPLETED and json:
            return _report(found, None, json=json)
        if found.status is Status.COMPLETED:
            out.print(f"run {run_id} is completed: nothing to do", markup=False)
            return 0
        plan = await host.prepare_plan(run_id)
        await host.store.refuse_unmoved([plan.definition.slug])
        rows = await host.store.list_bindings(plan.definition.slug)
        workflow, source = await _load(host, plan.definition, rows, handlers)
        children = await _load_children(host, plan.definition, source)
        begun = plan if found.steps is not None else None  # of a run that has not begun, edits still count
        return await _execute(
            host, workflow, source, children, payload=None, run_id=run_id, json=json, force=force, plan=begun
        )


async def _load(
    host: Host, definition: WorkflowDefinition, rows: Mapping[str, StepBinding], handlers: str | None
) -> tuple[Workflow, str]:
    """Load the handlers of a workflow, and print which of its steps are external.

    Raises:
        InvalidDefinitionError: definition, handlers and bindings contradict each other.
    """
    from pgflow_prefect.bindings import Kind
    from pgflow_prefect.definitions.graph import order_steps
    from pgflow_prefect.deployment.binding_problems import find_all_problems, find_doers, find_missing_here
    from pgflow_prefect.deployment.handler_files import load_workflow

    workflow, source = load_workflow(definition.slug, handlers, has_rows=bool(rows))
    problems = await find_all_problems(host.store, workflow, definition, rows, policy=host.toolbox.rows)
    if problems := [*problems, *find_missing_here(workflow, rows, host.settings)]:
        raise InvalidDefinitionError(definition.slug, problems)
    doers = find_doers(workflow, definition, rows)
    if external := [step for step in order_steps(definition) if doers[step] == Kind.EXTERNAL]:
        stubs = [step for step in external if step in workflow.stubs]
        note = f" ({', '.join(stubs)}: still a stub, `unimplemented`)" if stubs else ""
        err.print(f"external workers have to complete these steps: {', '.join(external)}{note}", markup=False)
    return workflow, source


async def _load_children(host: Host, definition: WorkflowDefinition, source: str) -> Mapping[str, Workflow]:
    """Load the workflows that the run may begin runs of, by slug, and print which of them workers have to execute."""
    if not definition.children:
        return {}
    from pgflow_prefect.deployment.child_workflows import load_child_workflows

    loaded = await load_child_workflows(host.store, definition, source, host.settings, host.toolbox.rows)
    for each in loaded.missing:
        err.print(f"a worker has to execute runs that this one begins: {each}", markup=False)
    return loaded.found


async def _execute(
    host: Host,
    workflow: Workflow,
    source: str,
    children: Mapping[str, Workflow],
    *,
    payload: str | None,
    run_id: UUID,
    json: bool,
    force: bool = False,
    plan: Plan | None = None,
) -> int:
    """Execute a run and print how it ended.

    Args:
        host: this process.
        workflow: the handlers.
        source: where they are.
        children: the workflows whose runs it may begin.
        payload: of a run to create; None to continue one.
        run_id: the run.
        json: print JSON only.
        force: take the run from the process that executes it.
        plan: the run's definition, if it is known.
    """
    from pgflow_prefect.cli.progress import make_view
    from pgflow_prefect.execution.in_process import create_flow_run
    from pgflow_prefect.models import Status
    from pgflow_prefect.prefect_api.client import connect_to_prefect, has_server
    from pgflow_prefect.services.cancellation import execute_until_cancelled
    from pgflow_prefect.services.child_runs import execute_children

    view = make_view(quiet=json)
    store = host.store
    flow = workflow.make_flow(host.settings, view.observe, host)
    if not has_server():
        err.print(
            "PREFECT_API_URL is not set. Prefect starts a temporary server, which takes some seconds", markup=False
        )
    # Before the run is created: without Prefect, no process would execute it.
    async with connect_to_prefect() as client:
        if payload is not None:
            epoch = await store.create_run(workflow.slug, payload, run_id)
        else:
            epoch = await _take(store, run_id, force=force)
        try:  # from here on there is a run, and every outcome must print its id
            created = await create_flow_run(client, flow, workflow.slug, run_id, host.installation.id)
            if epoch is not None:
                await store.link_flow_run(run_id, epoch, created.flow_run.id, queued=False)
            plan = plan or await host.prepare_plan(run_id)
            if not json:
                out.print(f"handlers: {source}", markup=False)
                out.print(f"run {run_id}", markup=False)
                if created.url:
                    out.print(f"in Prefect: {created.url}", markup=False)
            with view.show(len(plan.definition.steps)), _show_lines(json=json):
                async with execute_children(host, client, children):
                    state = await execute_until_cancelled(host, client, flow, created.flow_run, run_id)
        except BaseException:
            if not json:
                out.print(f"run {run_id} is pending; go on with it: pgflow-prefect run --resume {run_id}", markup=False)
            raise
    finished = await store.read_run(run_id, with_payload=json)
    if finished.status is Status.PENDING:
        return print_error(
            f"{state.message or state.name}", hint=f"go on: pgflow-prefect run --resume {run_id}", code=1
        )
    return _report(finished, created.url, json=json)


async def _take(store: Store, run_id: UUID, *, force: bool) -> int | None:
    """Take a run to continue it. If another process holds it, wait until that lease expires.

    Raises:
        RunHeldError: another process executes it, and has extended its lease meanwhile.
    """
    import anyio

    from pgflow_prefect.models import Held

    await store.reopen_run(run_id)
    await store.repair_run(run_id)
    deadline = anyio.current_time() + store.lease_terms.lease + 1
    told = False
    while True:
        await store.expire_dead_holders(run_id)  # at each try: a process that was just killed takes a moment to die
        try:
            return await store.take_run(run_id, force=force)
        except RunHeldError as error:
            if (await store.read_run(run_id)).held is Held.QUEUED or anyio.current_time() > deadline:
                raise RunHeldError(f"{error}; --force takes it from there") from error
            if not told:
                err.print(
                    f"{str(error).rstrip('.')}; waiting {store.lease_terms.lease:g} s for the lease to run out",
                    markup=False,
                )
                told = True
        await anyio.sleep(_HELD_INTERVAL)


def _show_lines(*, json: bool) -> AbstractContextManager[None]:
    """Show what handlers log and print, until the block ends; not to scripts, and not twice."""
    from pgflow_prefect.services.handler_lines import show_handler_lines

    return nullcontext() if json or is_debugging() else show_handler_lines(_write_line)


def _write_line(line: str) -> None:
    # A live view takes the place of this stream, and puts the line above what it draws. `print` would write a log line.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _report(run: Run, url: str | None, *, json: bool) -> int:
    from pgflow_prefect.models import Status

    if json:
        print_json({"run": run, "url": url})
    elif run.status is Status.COMPLETED:
        out.print(f"completed in {format_duration(run.created_at, run.finished_at)}", markup=False)
    else:
        print_error(f"run {run.id} failed: {run.error_message}", code=1)
    return int(run.status is not Status.COMPLETED)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
