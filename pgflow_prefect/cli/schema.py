"""`init`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pgflow_prefect.cli.console import out
from pgflow_prefect.cli.options import Dsn, make_settings

if TYPE_CHECKING:
    from pgflow_prefect.settings import Settings


def init(*, dry_run: Annotated[bool, Parameter(negative="", show_default=False)] = False, dsn: Dsn = None) -> None:
    """Install or upgrade the schema in the database.

    Creates the schemas `pgflow`, the engine, and `pgflow_prefect`, what the adapter keeps. A database that was made
    with pgflow's own tables is upgraded, and keeps its rows. Running it again changes nothing.

    Example: `pgflow-prefect init --dsn postgresql://postgres@localhost/app`

    Parameters
    ----------
    dry_run
        Print the SQL and do nothing.
    """
    import anyio

    from pgflow_prefect.database.schema import read_scripts

    if dry_run:
        sys.stdout.write(read_scripts())
        return
    anyio.run(_init, make_settings(dsn))


async def _init(settings: Settings) -> None:
    from pgflow_prefect.database.connection import connect, find_dsn
    from pgflow_prefect.database.schema import install_schema, read_versions

    async with await connect(find_dsn(settings), timeout=settings.connect_timeout) as connection:
        before = await read_versions(connection)
        await install_schema(connection)
        after = await read_versions(connection)
        database = connection.info.dbname
    if before == after:
        out.print(f"database {database!r} is current: pgflow {after[0]}, pgflow_prefect {after[1]}")
    else:
        verb = "upgraded" if any(before) else "installed"
        out.print(f"{verb} in database {database!r}: pgflow {after[0]}, pgflow_prefect {after[1]}")
    if any(before):
        await _name_old_credentials(settings)


async def _name_old_credentials(settings: Settings) -> None:
    """Say what rows of an older version name that rows may name no more."""
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.deployment.row_credentials import list_row_credentials

    async with open_store(settings, size=1) as store:
        found = await list_row_credentials(store)
    for each in found:
        named = each.variable or each.block
        if named != each.name:
            out.print(
                f"workflow {each.workflow_slug!r}, step {each.step_slug!r}: its row names {named!r}, which a row may "
                "not name any more: `pgflow-prefect credentials --rename` renames it and says what to set",
                markup=False,
            )
