"""`bind`, `observe`, `shadow`: who does the steps of a workflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter

from pgflow_prefect.cli.console import format_time, out, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, Handlers, make_settings
from pgflow_prefect.cli.validate import load_doers, print_stubs
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pgflow_prefect.bindings import AnyBinding
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.models import BindingChange, ShadowSummary, StepBinding
    from pgflow_prefect.settings import Settings

_Flag = Parameter(negative="", show_default=False)
_Text = Annotated[str | None, Parameter(show_default=False)]


def bind(
    workflow: str,
    step: str | None = None,
    /,
    *,
    external: Annotated[bool, _Flag] = False,
    python: Annotated[bool, _Flag] = False,
    sql: _Text = None,
    http: _Text = None,
    queue: _Text = None,
    remove: Annotated[bool, _Flag] = False,
    undo: Annotated[bool, _Flag] = False,
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
    """Say who does a step, in force from its next claim; without saying who, show who does which step, and since when.

    One transaction, recorded with time and database user. What is secret stays out of it: name an environment variable
    of the worker, or a Prefect Secret block.

    Its name begins with `PGFLOW_TOKEN_`, or with `pgflow-`, and the worker's settings say where it may go.

    Example: `pgflow-prefect bind greeting greet --http https://example.org/send`

    Parameters
    ----------
    workflow
        The workflow's slug.
    step
        The step's slug.
    external
        An external worker does it and calls complete_step. Prefect waits, and shows it.
    python
        The function in the file of handlers.
    sql
        A function in the database: schema.function(jsonb) returns jsonb.
    http
        An endpoint, such as a Supabase Edge Function.
    queue
        A queue: pgqueuer:NAME, amqp://HOST/VHOST?queue=NAME, redis://HOST/DB?queue=NAME.
    remove
        No row says so any more: what the file of handlers says counts.
    undo
        Take the last change back that was not taken back yet.
    timeout
        Seconds for each attempt, the wait for a report included.
    retries
        Attempts after the first one.
    retry_delay
        Seconds before each of them; given several times, one for each.
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

    given: dict[str, str | None] = {
        **{kind: None for kind, chosen in ((Kind.EXTERNAL, external), (Kind.PYTHON, python)) if chosen},
        **{
            kind: target
            for kind, target in ((Kind.SQL, sql), (Kind.HTTP, http), (Kind.QUEUE, queue))
            if target is not None
        },
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
    if len(given) + remove + undo > 1:
        raise UsageError("only one of --external, --python, --sql, --http, --queue, --remove and --undo at a time")
    if options and python:
        raise UsageError("--python takes no options: those of the function's decorator count")
    if options and not given:
        raise UsageError("options of a binding go with --external, --python, --sql, --http or --queue")
    if step is None and (given or remove or undo):
        raise UsageError("which step? name it after the workflow")
    binding = next((parse_binding(kind, target, options) for kind, target in given.items()), None)
    if problem := find_name_problem(token_env or login_env, token_block or login_block):
        raise UsageError(problem)
    done = anyio.run(_bind, make_settings(dsn), workflow, step, binding, remove, undo)
    _print_bindings(done, step, handlers, json=json)


def observe(workflow: str, /, *, json: AsJson = False, dsn: Dsn = None) -> None:
    """Have Prefect show the runs of a workflow that others execute: all its steps are external, and it is enabled.

    Nothing is executed: a worker or a bridge takes each run, waits for the states of its steps, and shows them with the
    times that PostgreSQL has. Step by step, `bind` moves the work; `bind … --undo` moves it back.

    Example: `pgflow-prefect observe email_campaign`

    Parameters
    ----------
    workflow
        The workflow's slug.
    """
    import anyio

    changed = anyio.run(_observe, make_settings(dsn), workflow)
    if json:
        print_json({"workflow": workflow, "changed": changed})
        return
    out.print(
        f"workflow {workflow!r} is observed: its steps are external ({changed} changed), and its runs are shown by a "
        f"worker (`pgflow-prefect worker --workflow {workflow}`) or, with `pgflow-prefect deploy {workflow}`, a bridge",
        markup=False,
    )


def shadow(
    workflow: str,
    step: str | None = None,
    /,
    *,
    off: Annotated[bool, _Flag] = False,
    handlers: Handlers = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Run a step's handler beside an external worker and compare their results; without a step, show what came of it.

    The step becomes external, if it is not. The handler has to say that it may: `@workflow.step(shadow=True)`. What it
    writes through `context.connection` is rolled back, its result is compared and never stored.

    Example: `pgflow-prefect shadow email_campaign prepare_list`

    Parameters
    ----------
    workflow
        The workflow's slug.
    step
        The step's slug.
    off
        Let the other one do it alone again.
    """
    import anyio

    settings = make_settings(dsn)
    if step is None:
        _print_shadows(anyio.run(_list_shadows, settings, workflow), json)
        return
    if not off:
        _check_shadow(workflow, step, handlers)
    changed = anyio.run(_shadow, settings, workflow, step, not off)
    if json:
        print_json({"workflow": workflow, "step": step, "shadow": not off, "changed": changed})
        return
    state = "has no shadow any more" if off else "has a shadow: `pgflow-prefect shadow` shows what comes of it"
    out.print(f"step {step!r} of workflow {workflow!r} {state}", markup=False)


class _Bound(NamedTuple):
    """What binds the steps of a workflow, and what has changed of that."""

    definition: WorkflowDefinition
    rows: Mapping[str, StepBinding]
    changes: list[BindingChange]


async def _bind(  # noqa: PLR0917
    settings: Settings,
    workflow: str,
    step: str | None,
    binding: AnyBinding | None,
    remove: bool,
    undo: bool,
) -> _Bound:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        await _check_step(store, workflow, step)
        if step is not None and undo:
            if not await store.undo_binding(workflow, step):
                raise UsageError(f"there is no change of step {step!r} to take back: `pgflow-prefect bind {workflow}`")
        elif step is not None and (binding is not None or remove):
            await _check_target(store, binding)
            if binding is None:
                await store.bind_step(workflow, step, None)
            else:
                await store.bind_step(workflow, step, binding.kind, binding.target, binding.options)
        rows = await store.list_bindings(workflow)
        changes = await store.list_binding_changes(workflow, step)
        return _Bound(await store.load_definition(workflow), rows, changes)


def _print_bindings(bound: _Bound, step: str | None, handlers: str | None, *, json: bool) -> None:
    definition, rows, changes = bound
    doers = {slug: each for slug, each in load_doers(definition, rows, handlers).items() if step in (None, slug)}
    if json:
        bindings = [rows[slug] for slug in doers if slug in rows]
        steps = [{"step": slug, **each.to_json()} for slug, each in doers.items()]
        print_json({"workflow": definition.slug, "bindings": bindings, "changes": changes, "steps": steps})
        return
    print_table(("step", "done by", "options"), [(slug, each.text, each.options) for slug, each in doers.items()])
    print_stubs(doers)
    if changes:
        out.print()
        columns = ("changed", "by", "step", "from", "to", "taken back")
        print_table(columns, [_describe_change(each) for each in changes])


async def _check_step(store: Store, workflow: str, step: str | None) -> None:
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


async def _observe(settings: Settings, workflow: str) -> int:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        await store.load_definition(workflow)
        changed = await store.observe_workflow(workflow)
        await store.enable_workflow(workflow)
        return changed


def _check_shadow(workflow: str, step: str, handlers: str | None) -> None:
    from pgflow_prefect.deployment.handler_files import load_workflow

    loaded, source = load_workflow(workflow, handlers)
    handler = loaded.handlers.get(step)
    if handler is None:
        raise UsageError(f"{source} has no handler of step {step!r} that could be its shadow: write it")
    if not handler.shadow:
        raise UsageError(
            f"the handler of step {step!r} in {source} does not say that it may run beside an external worker: "
            "@workflow.step(shadow=True), once nothing that it does can be seen from outside"
        )


async def _shadow(settings: Settings, workflow: str, step: str, wanted: bool) -> bool:
    from pgflow_prefect.bindings import Kind
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        await _check_step(store, workflow, step)
        row = (await store.list_bindings(workflow)).get(step)
        options = dict(row.options) if row is not None and row.kind == Kind.EXTERNAL else {}
        had_one = options.pop("shadow", False)
        if not (wanted or had_one):
            return False  # the present worker goes on
        return await store.bind_step(
            workflow, step, Kind.EXTERNAL, options=options | {"shadow": True} if wanted else options
        )


async def _list_shadows(settings: Settings, workflow: str) -> list[ShadowSummary]:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        await store.load_definition(workflow)
        return await store.list_shadows(workflow)


def _print_shadows(shadows: list[ShadowSummary], json: bool) -> None:
    if json:
        print_json(shadows)
    elif not shadows:
        out.print("no shadow has run yet: `pgflow-prefect shadow WORKFLOW STEP` lets one")
    else:
        columns = ("step", "same", "different", "failed", "took", "last difference")
        print_table(columns, [_describe_shadow(each) for each in shadows])


def _describe_shadow(found: ShadowSummary) -> tuple[str, ...]:
    from pgflow_prefect.render.labels import format_seconds

    took = format_seconds(found.seconds) if found.seconds is not None else "-"
    counts = (str(found.same), str(found.different), str(found.failed))
    return (found.step_slug, *counts, took, "; ".join(found.details))


def _describe_change(change: BindingChange) -> tuple[str, ...]:
    undone = f"{format_time(change.undone_at)} by {change.undone_by}" if change.undone_at else ""
    sides = (_describe_side(change.before), _describe_side(change.after))
    return (format_time(change.changed_at), change.changed_by, change.step_slug, *sides, undone)


def _describe_side(side: Mapping[str, JsonValue] | None) -> str:
    if side is None:
        return "no row"
    doer = " ".join(str(part) for part in (side["kind"], side["target"]) if part)
    return f"{doer} {side['options']}" if side["options"] else doer
