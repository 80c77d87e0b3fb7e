"""`bind`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter

from pgflow_prefect.cli.console import format_time, out, print_json, print_table
from pgflow_prefect.cli.doers import load_doers, print_stubs
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, Handlers, make_settings
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pgflow_prefect.bindings import AnyBinding
    from pgflow_prefect.database.moving_statements import Move
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.models import BindingChange, StepBinding
    from pgflow_prefect.settings import Settings


_WHICH_STEP = "which step? name it after the workflow"

_Text = Annotated[str | None, Parameter(show_default=False)]


def bind(
    workflow: str,
    step: str | None = None,
    /,
    *,
    external: Annotated[bool, Flag] = False,
    python: Annotated[bool, Flag] = False,
    sql: _Text = None,
    http: _Text = None,
    queue: _Text = None,
    command: _Text = None,
    work_pool: _Text = None,
    remove: Annotated[bool, Flag] = False,
    undo: Annotated[bool, Flag] = False,
    timeout: Annotated[float | None, Parameter(show_default=False)] = None,
    retries: Annotated[int | None, Parameter(show_default=False)] = None,
    retry_delay: Annotated[list[float] | None, Parameter(show_default=False)] = None,
    token_env: _Text = None,
    token_block: _Text = None,
    login_env: _Text = None,
    login_block: _Text = None,
    handlers: Handlers = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Choose who does a step, from its next claim on. Without a choice, show who does each step, and since when.

    The change is one transaction. It records the time and the database user. Secrets stay out of the database: name an
    environment variable of the worker (`PGFLOW_TOKEN_…`) or a Prefect Secret block (`pgflow-…`). The worker's settings
    say which hosts may get it.

    On a database of the released pgflow (pgflow.dev), `bind FLOW --python` moves a whole flow to Prefect, by pgflow's
    own switches, and `bind FLOW --external` or `--undo` moves it back. `bind FLOW STEP --python` (or another kind)
    moves one step alone, while pgflow's own workers do the others, and `--external` or `--undo` moves it back.

    Example: `pgflow-prefect bind greeting greet --http https://example.org/send`

    Parameters
    ----------
    workflow
        The workflow's slug.
    step
        The step's slug. Without one, --python, --external and --undo are of a whole flow of the released pgflow.
    external
        An external worker does it and calls complete_step. Prefect waits, and shows it. On the released pgflow, that is
        pgflow's own worker.
    python
        The function in the file of handlers.
    sql
        A function in the database: schema.function(jsonb) returns jsonb.
    http
        An endpoint, such as a Supabase Edge Function.
    queue
        A queue: pgqueuer:NAME, amqp://HOST/VHOST?queue=NAME, redis://HOST/DB?queue=NAME.
    command
        A program, by its name in the worker's setting PGFLOW_COMMANDS.
    work_pool
        A work pool of Prefect, by its name in the worker's setting PGFLOW_WORK_POOLS.
    remove
        Delete the row. Then the file of handlers decides who does the step.
    undo
        Undo the last change that was not undone yet.
    timeout
        Seconds for each attempt, including the wait for a report.
    retries
        Attempts after the first one.
    retry_delay
        Seconds before each retry. Give it several times for different delays.
    token_env
        With --http: the environment variable with the bearer token, PGFLOW_TOKEN_….
    token_block
        With --http: the Prefect Secret block with it, pgflow-….
    login_env
        With --queue: the environment variable with USER:PASSWORD, PGFLOW_TOKEN_….
    login_block
        With --queue: the Prefect Secret block with it, pgflow-….
    """
    import anyio

    from pgflow_prefect.bindings import Kind, parse_binding
    from pgflow_prefect.handlers.row_policy import find_name_problem

    targets = {
        Kind.SQL: sql,
        Kind.HTTP: http,
        Kind.QUEUE: queue,
        Kind.COMMAND: command,
        Kind.WORK_POOL: work_pool,
    }
    given: dict[str, str | None] = {
        **{kind: None for kind, chosen in ((Kind.EXTERNAL, external), (Kind.PYTHON, python)) if chosen},
        **{kind: target for kind, target in targets.items() if target is not None},
    }
    options: dict[str, JsonValue] = {
        "timeout_seconds": timeout,
        "retries": retries,
        "retry_delay_seconds": retry_delay if retry_delay is None else [*retry_delay],
        "token_env": token_env,
        "token_block": token_block,
        "login_env": login_env,
        "login_block": login_block,
    }
    options = {name: value for name, value in options.items() if value is not None}
    kinds = [f"--{kind}" for kind in Kind]
    if len(given) + remove + undo > 1:
        raise UsageError(f"{', '.join(kinds)}, --remove and --undo exclude each other: name one")
    if options and python:
        raise UsageError("--python takes no options. Set them in the function's decorator")
    if options and not given:
        raise UsageError(f"options of a binding go with a kind: name one of {', '.join(kinds)}")
    if step is None and (given or remove or undo):
        is_of_a_flow = (python or external or undo) and not options
        if not is_of_a_flow:
            raise UsageError(_WHICH_STEP)
        anyio.run(_move, make_settings(dsn), workflow, python, json)
        return
    binding = next((parse_binding(kind, target, options) for kind, target in given.items()), None)
    if problem := find_name_problem(token_env or login_env, token_block or login_block):
        raise UsageError(problem)
    done = anyio.run(_bind, make_settings(dsn), workflow, step, binding, remove, undo)
    _print_bindings(done, step, handlers, json=json)


async def _move(settings: Settings, workflow: str, here: bool, json: bool) -> None:
    """Move a whole flow of the released pgflow, and say what was done."""
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, executes_moved=True) as store:
        if not store.implementation.moves_flows:
            raise UsageError(_WHICH_STEP)
        await store.load_definition(workflow)
        by_steps = workflow in {each.workflow_slug for each in await store.list_moved_steps()}
        moved = await (store.move_flow(workflow) if here else store.move_flow_back(workflow))
        if here:
            await store.enable_workflow(workflow)
    if json:
        print_json({"workflow": workflow, "by": "prefect" if here else "pgflow", **moved.model_dump()})
        return
    for line in _describe_move(workflow, moved) if here else _describe_move_back(workflow, moved, by_steps=by_steps):
        out.print(line, markup=False)


def _describe_move(workflow: str, moved: Move) -> Iterator[str]:
    """Yield what moving a flow to Prefect has done."""
    yield f"Prefect executes flow {workflow!r}" + ("" if moved.changed else ", as before")
    if moved.workers:
        yield f"told to stop: {moved.workers} of pgflow's workers. They end the tasks that they have begun"
    if moved.functions:
        yield f"switched off in pgflow.worker_functions: {', '.join(moved.functions)}"
    elif not moved.has_functions:
        yield "this version of pgflow starts no Edge Functions: stop what starts them, such as a cron job of yours"
    runs = "1 run goes on" if moved.runs == 1 else f"{moved.runs} runs go on"
    yield f"{runs} as soon as a worker is there: pgflow-prefect worker --help"


def _describe_move_back(workflow: str, moved: Move, *, by_steps: bool) -> Iterator[str]:
    """Yield what giving a flow back has done."""
    yield f"pgflow's own workers execute flow {workflow!r}" + ("" if moved.changed else ", as before")
    if moved.functions:
        yield f"switched on in pgflow.worker_functions: {', '.join(moved.functions)}. pgflow starts them within seconds"
    elif moved.changed and not by_steps:  # else it has never stopped
        yield "start its Edge Function, as you did before"
    if moved.changed:
        yield "workers of pgflow-prefect end the tasks that they have begun, and show the rest of their runs"


class _Bound(NamedTuple):
    """The bindings of a workflow's steps, and the changes of them.

    Attributes:
        definition: the workflow.
        rows: its bindings, by step.
        changes: of them, the latest first.
        moved: whether a step of a flow of the released pgflow was moved to Prefect, or back; None: neither.
    """

    definition: WorkflowDefinition
    rows: Mapping[str, StepBinding]
    changes: list[BindingChange]
    moved: bool | None = None


async def _bind(  # noqa: PLR0917
    settings: Settings,
    workflow: str,
    step: str | None,
    binding: AnyBinding | None,
    remove: bool,
    undo: bool,
) -> _Bound:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, executes_moved=True) as store:
        await check_step(store, workflow, step)
        before = await _is_moved(store, workflow, step)
        if step is not None and undo:
            if not await store.undo_binding(workflow, step):
                raise UsageError(
                    f"step {step!r} has no change to undo. `pgflow-prefect bind {workflow}` lists the changes"
                )
        elif step is not None and (binding is not None or remove):
            await _check_target(store, binding)
            if binding is None:
                await store.bind_step(workflow, step, None)
            else:
                await store.bind_step(workflow, step, binding.kind, binding.target, binding.options)
        now = await _is_moved(store, workflow, step)
        if now and not before:
            await store.enable_workflow(workflow)  # so that a worker takes the runs
        rows = await store.list_bindings(workflow)
        changes = await store.list_binding_changes(workflow, step)
        definition = await store.load_definition(workflow)
        return _Bound(definition, rows, changes, None if now == before else now)


async def _is_moved(store: Store, workflow: str, step: str | None) -> bool:
    """Tell whether a step of a flow of the released pgflow is moved alone."""
    return (workflow, step) in {(each.workflow_slug, each.step_slug) for each in await store.list_moved_steps()}


def _print_bindings(bound: _Bound, step: str | None, handlers: str | None, *, json: bool) -> None:
    definition, rows, changes, moved = bound
    doers = {slug: each for slug, each in load_doers(definition, rows, handlers).items() if step in (None, slug)}
    if json:
        bindings = [rows[slug] for slug in doers if slug in rows]
        steps = [{"step": slug, **each.to_json()} for slug, each in doers.items()]
        print_json({"workflow": definition.slug, "bindings": bindings, "changes": changes, "steps": steps})
        return
    if moved is not None:
        out.print(_describe_moved_step(definition.slug, step, here=moved), markup=False)
    print_table(("step", "done by", "options"), [(slug, each.text, each.options) for slug, each in doers.items()])
    print_stubs(doers)
    if changes:
        out.print()
        columns = ("changed", "by", "step", "from", "to", "taken back")
        print_table(columns, [_describe_change(each) for each in changes])


def _describe_moved_step(workflow: str, step: str | None, *, here: bool) -> str:
    if here:
        return (
            f"Prefect executes step {step!r} of flow {workflow!r}, and pgflow's own workers do the others. "
            "Start a worker: pgflow-prefect worker --help"
        )
    return f"pgflow's own workers execute step {step!r} of flow {workflow!r}. What a worker here has begun, it ends"


async def check_step(store: Store, workflow: str, step: str | None) -> None:
    """Raise a UsageError if the workflow does not define this step."""
    from pgflow_prefect.wording import suggest

    steps = (await store.load_definition(workflow)).steps
    if step is not None and step not in steps:
        raise UsageError(f"workflow {workflow!r} has no step {step!r}{suggest(step, steps)}")


async def _check_target(store: Store, binding: AnyBinding | None) -> None:
    from pgflow_prefect.bindings import Kind, SqlFunction, parse_function

    if isinstance(binding, SqlFunction):
        name = binding.function
        returns = (await store.find_functions({name: parse_function(name)})).get(name)
        if returns != "jsonb":
            there = f"returns {returns}" if returns else "does not exist"
            raise UsageError(f"the function {name}(jsonb) {there}: CREATE FUNCTION {name}(input jsonb) RETURNS jsonb …")
    elif binding is not None and binding.kind is Kind.QUEUE:
        from pgflow_prefect.handlers.queue import check_queue_url

        assert binding.target is not None
        check_queue_url(binding.target)


def _describe_change(change: BindingChange) -> tuple[str, ...]:
    undone = f"{format_time(change.undone_at)} by {change.undone_by}" if change.undone_at else ""
    sides = (_describe_side(change.before), _describe_side(change.after))
    return (format_time(change.changed_at), change.changed_by, change.step_slug, *sides, undone)


def _describe_side(side: Mapping[str, JsonValue] | None) -> str:
    if side is None:
        return "no row"
    doer = " ".join(str(part) for part in (side["kind"], side["target"]) if part)
    return f"{doer} {side['options']}" if side["options"] else doer
