"""`export`: the SQL that defines workflows, or one workflow as a file for another program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from pgflow_prefect.cli.console import print_json
from pgflow_prefect.cli.options import AsJson, Dsn, Handlers, make_settings
from pgflow_prefect.errors import InvalidDefinitionError, UsageError

if TYPE_CHECKING:
    from pgflow_prefect.database.store import Store
    from pgflow_prefect.definitions.model import WorkflowDefinition
    from pgflow_prefect.deployment.plain.export import PlainWish
    from pgflow_prefect.settings import Settings


def export(
    *workflows: str,
    all_: Annotated[bool, Parameter(name="--all", negative="", show_default=False)] = False,
    as_: Annotated[Literal["airflow", "prefect"] | None, Parameter(name="--as", show_default=False)] = None,
    handlers: Handlers = None,
    cron: str | None = None,
    timezone: str | None = None,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Print the SQL that defines a workflow, for `psql -f`, an SQL editor or a migration.

    The SQL adds what is missing, and can be run again. The same definition always gives the same text. On a database of
    the released pgflow (pgflow.dev), the SQL calls pgflow's own functions.

    With --as, print one Python file instead, with the code of the handlers. It runs without this program: as a DAG of
    Airflow 3, or as a flow of Prefect. What it lacks stands at its top, and is printed to standard error.

    Example: `pgflow-prefect export email_campaign > email_campaign.sql`

    Parameters
    ----------
    workflows
        The workflows' slugs.
    all_
        All workflows that the database defines.
    as_
        Print a file for airflow or prefect.
    cron
        With --as: when runs begin. The default is the schedule of the workflow's deployment.
    timezone
        With --cron: its time zone, such as Europe/Berlin. The default is UTC.
    """
    import anyio

    from pgflow_prefect.definitions.graph import build_graph, find_cycles

    if not workflows and not all_:
        raise UsageError("which workflow? name it, or say --all")
    if as_ is not None:
        from pgflow_prefect.deployment.plain.export import PlainWish

        if len(workflows) != 1 or all_ or json:
            raise UsageError("--as writes one file: name one workflow, without --all and --json")
        if timezone is not None and cron is None:
            raise UsageError("--timezone goes with --cron")
        _export_plain(make_settings(dsn), PlainWish(workflows[0], as_, handlers, cron, timezone or "UTC"))
        return
    if handlers is not None or cron is not None or timezone is not None:
        raise UsageError("--handlers, --cron and --timezone go with --as")
    chosen = None if all_ else workflows
    if json:
        print_json([_to_json(each) for each in anyio.run(load_definitions, make_settings(dsn), chosen)])
        return
    definitions, write = anyio.run(_load_writer, make_settings(dsn), chosen)
    for each in definitions:
        if cycles := [*find_cycles(build_graph(each))]:  # from before the engine refused them; no database takes it
            raise InvalidDefinitionError(each.slug, cycles)
    sys.stdout.write("\n".join(map(write, definitions)))


def _export_plain(settings: Settings, wish: PlainWish) -> None:
    import anyio

    from pgflow_prefect.cli.console import err
    from pgflow_prefect.deployment.plain.export import export_plain

    exported = anyio.run(export_plain, settings, wish)
    sys.stdout.write(exported.text)
    for each in exported.lost:
        err.print(f"lost: {each}", markup=False)


async def _load_writer(
    settings: Settings, slugs: Collection[str] | None
) -> tuple[list[WorkflowDefinition], Callable[[WorkflowDefinition], str]]:
    """Return the present definitions, and the function that writes one as SQL of the database's own schema."""
    from pgflow_prefect.database.definition_script import write_script
    from pgflow_prefect.database.implementations import CLASSIC
    from pgflow_prefect.database.released_script import write_flow_script
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        definitions = await _load_definitions(store, slugs)
        if store.implementation.name == CLASSIC.name:
            return definitions, write_script
        options = {each.slug: await store.list_task_options(each.slug) for each in definitions}
    return definitions, lambda definition: write_flow_script(definition, options[definition.slug])


def _to_json(definition: WorkflowDefinition) -> dict[str, object]:
    """Return a definition for scripts: rules only where there are some."""
    rows = definition.model_dump(mode="json", include={"slug", "steps", "deps"})
    return {**rows, **definition.said, "definition_hash": definition.definition_hash}


async def load_definitions(settings: Settings, slugs: Collection[str] | None) -> list[WorkflowDefinition]:
    """Return the present definitions of these workflows, or of all workflows for None.

    Raises:
        UnknownWorkflowError: the database does not define one of them.
    """
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1, only_reads=True) as store:
        return await _load_definitions(store, slugs)


async def _load_definitions(store: Store, slugs: Collection[str] | None) -> list[WorkflowDefinition]:
    wanted = dict.fromkeys(await store.list_slugs() if slugs is None else slugs)
    return [await store.load_definition(slug) for slug in wanted]
